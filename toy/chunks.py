"""
OFT in the toy world: the model of quickstart.py learns to answer with eight actions in one pass.

    python quickstart.py && python -m toy.chunks

Prints its success and how long an answer takes, beside the model that generates one action as seven tokens. Takes
twenty minutes on two CPU cores.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configurator import configure, fail
from policy import Policy, load_policy, predict_chunk
from quickstart import run
from toy import world


@dataclass
class Config:
    episodes: int = 8000  # demonstrations
    max_steps: int = 12000  # training steps
    scenes: int = 200  # unseen scenes of each evaluation


def main(cfg: Config):
    if not Path("runs/toy/checkpoint").is_dir():
        fail("runs/toy/checkpoint: no toy model there; `python quickstart.py` trains it")
    play = f"python -m toy.play --controls False --scenes {cfg.scenes}"

    # 1. Demonstrations. No chunk crosses the end of an episode, so episodes go on for a while after success. Nothing
    # disturbs them: nothing that is seen at the start of a chunk tells what will disturb its later steps.
    demonstrations = f"--name toy_chunks --folder runs/toy_oft/data --episodes {cfg.episodes}"
    run(f"python -m toy.world {demonstrations} --noise 0 --detour 0 --linger 7 --validation 0")

    # 2. Training.
    run(f"python finetune_oft.py --config toy_oft.py --max_steps {cfg.max_steps}")

    # 3. Success and speed of both models.
    run(f"{play} --checkpoint runs/toy/checkpoint")
    run(f"{play} --checkpoint runs/toy_oft")
    print()
    print_latency("seven tokens", "runs/toy/checkpoint")
    print_latency("a chunk of eight actions", "runs/toy_oft")


def print_latency(name: str, folder: str):
    """Print how long a policy takes for an answer, and how many actions a second that gives."""
    policy = load_policy(folder)
    seconds = latency(policy)
    print(f"{name}: {1e3 * seconds:.1f} ms an answer, {policy.action_chunk / seconds:.0f} actions/s")


def latency(policy: Policy, times: int = 50) -> float:
    """Return the seconds from one image and instruction to the actions, the median of that many times."""
    scene = world.make_scene(world.TEST, 0, world.STANDARD)
    image = world.draw(scene, world.STANDARD)
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        predict_chunk(policy, [[image]], ["pick up the red cube"])
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


if __name__ == "__main__":
    main(configure(Config))
