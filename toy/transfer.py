"""
LoRA in the toy world: the model of quickstart.py learns a changed world, with adapters and with all weights.

    python quickstart.py && python -m toy.transfer

In the changed world things have other colours and names, the camera is turned, and the gripper closes at 1. The
adapters train for two minutes on two CPU cores. All weights take as long, with the same steps and learning rate.
"""

from dataclasses import dataclass
from pathlib import Path

from configurator import configure, fail
from quickstart import run


@dataclass
class Config:
    episodes: int = 1000  # demonstrations in the changed world
    max_steps: int = 1200  # training steps, of the adapters and of all weights
    scenes: int = 200  # unseen scenes of each evaluation


def main(cfg: Config):
    if not Path("runs/toy/checkpoint").is_dir():
        fail("runs/toy/checkpoint: no toy model there; `python quickstart.py` trains it")
    play = f"python -m toy.play --changed True --controls False --scenes {cfg.scenes}"

    # 1. The expert shows the changed world. The model that has never seen it fails there.
    demonstrations = f"--name toy_changed --folder runs/toy_lora/data --episodes {cfg.episodes}"
    run(f"python -m toy.world --changed {demonstrations} --validation 0")
    run(f"{play} --checkpoint runs/toy/checkpoint --unnorm_key toy")

    # 2. Adapters learn it.
    run(f"python finetune_lora.py --config toy_lora.py --max_steps {cfg.max_steps}")
    run(f"{play} --checkpoint runs/toy_lora")

    # 3. All weights learn it, to compare.
    run(f"python train.py --config toy_full.py --max_steps {cfg.max_steps}")
    run(f"{play} --checkpoint runs/toy_full/checkpoint")


if __name__ == "__main__":
    main(configure(Config))
