"""
The OFT recipe: a trained OpenVLA becomes a policy that answers with a chunk of actions in one forward pass (oft.py).

    python finetune_oft.py --config libero_oft.py --base_checkpoint openvla-7b --data_root_dir DIR
    python convert_weights.py merge-lora runs/libero_spatial_oft openvla-7b-oft-libero-spatial

The loop is that of train.py. The model gets LoRA adapters; its new parts (action head, state projector) train whole.
sample.py and eval_libero.py take the run folder as it is, or the merged one. `python -m toy.chunks` shows it in the toy
world.

OpenVLA-OFT, https://arxiv.org/abs/2502.19645; vla-scripts/finetune.py of github.com/moojink/openvla-oft.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import finetune_lora
import train
from checkpoint import complete_export
from configurator import configure, fail
from distributed import barrier, exit_cleanly, fill, is_main_process
from finetune_lora import build_adapted, fill_adapted, gather_trained, write_run
from formats.dataset import RobotDataset
from oft import HEADS, OFT, OFTConfig, save_components
from train import Trainee

WHAT_TO_GIVE = (
    "give a config file and what it needs, for example\n"
    "    python finetune_oft.py --config libero_oft.py --base_checkpoint openvla-7b --data_root_dir DIR\n"
    "`python -m toy.chunks` fine-tunes the toy model of quickstart.py and needs nothing else"
)


@dataclass
class Config(finetune_lora.Config):
    # OFT
    action_chunk: int = 8  # actions per answer: 8 LIBERO, 25 ALOHA, 5 Bridge
    views: tuple[str, ...] = ("primary", "wrist")  # cameras of datasets of formats/oxe.py; your own data names its own
    use_proprio: bool = True  # the robot's state as one more token
    oft_state: bool = True
    head: str = "l1"  # l1, diffusion, discrete
    film: bool = False  # the instruction modulates the vision encoders

    # Other defaults than finetune_lora.py's, as in the official recipe (whose weight decay is on norms and biases, too)
    hold_out: float = 0.0
    batch_size: int = 64
    micro_batch_size: int = 8
    max_steps: int = 150_000
    schedule: str = "step"
    decay_step: int = 100_000
    save_every: int = 10_000


def build(cfg: Config, datasets: list[RobotDataset]) -> Trainee:
    """
    Build the base checkpoint with adapters, held by an OFT whose new parts train whole, in float32. As officially, no
    chunk reaches beyond the end of its episode (the last K - 1 frames start none), so the loss has no padded actions.
    """
    check(cfg)
    oft_cfg = common_config(cfg, datasets)
    vla, tokenizer, processor, files = build_adapted(cfg)
    tokenizer.fast = None  # placeholders stand for numbers, whatever tokens the base has
    if cfg.head != "discrete":
        vla.language_model.lm_head.requires_grad_(False)  # nothing reads it: no gradient, no optimizer state
    with torch.device("meta"):
        model = OFT(vla, oft_cfg)
    return Trainee(model, vla, tokenizer, processor, files, fill_oft, export_components, exports_whole_model=False)


def fill_oft(trainee: Trainee, cfg: Config):
    """Read the weights of the base checkpoint; adapters and new parts start random."""
    fill_adapted(trainee, cfg)
    for name, values in trainee.model.random_parts(cfg.seed):
        fill(trainee.model.get_parameter(name), values)


def common_config(cfg: Config, datasets: list[RobotDataset]) -> OFTConfig:
    """Return what a model of all the datasets' sizes is made of. Raises ValueError if one model cannot learn them."""
    first, *others = datasets
    wanted = oft_config(cfg, first)
    for other in others:
        its = oft_config(cfg, other)
        if its != wanted:
            raise ValueError(f"one model cannot learn both: {first.name} needs {wanted}, {other.name} needs {its}")
    return wanted


def oft_config(cfg: Config, dataset: RobotDataset) -> OFTConfig:
    """Return what a model of this dataset's sizes is made of."""
    stats = dataset.statistics
    state_dim = 0
    if cfg.use_proprio:
        if not stats.get("proprio", {}).get("q01"):
            raise ValueError(
                f"{dataset.name} has no states of the robot; name them (state=), or give --use_proprio False"
            )
        state_dim = len(stats["proprio"]["q01"])
    return OFTConfig(
        action_chunk=cfg.action_chunk,
        action_dim=len(stats["action"]["q01"]),
        proprio_dim=state_dim,
        num_images=len(dataset.cameras),
        head=cfg.head,
        film=cfg.film,
        scheme=dataset.scheme,
    )


def export_components(run: Path, trainee: Trainee, statistics: dict, cfg: Config):
    """Write adapter, components and all that the base checkpoint does not have into the run folder."""
    trained = gather_trained(trainee.model)
    if is_main_process():
        adapters = {}
        components = {}
        for name, weight in trained.items():
            if ".lora_" in name:
                # Named as in the plain model: FiLM wraps blocks, and the OFT holds the model as `vla`.
                adapters[name.removeprefix("vla.").replace(".block.", ".")] = weight
            else:
                components[name] = weight
        with complete_export(run):
            write_run(run, trainee, adapters, statistics, cfg)
            save_components(trainee.model.oft, components, run)
    barrier()


def check(cfg: Config):
    """Raise ValueError for what finetune_lora.py does not look at."""
    finetune_lora.check(cfg)
    if cfg.head not in HEADS:
        raise ValueError(f"--head {cfg.head!r}: must be one of {', '.join(HEADS)}")
    if cfg.action_tokenizer not in ("", "bins"):
        raise ValueError("--action_tokenizer is for models that generate tokens: train.py and finetune_lora.py")
    if cfg.action_chunk < 1:
        raise ValueError(f"--action_chunk {cfg.action_chunk}: must be 1 or more")


def main(cfg: Config):
    with exit_cleanly():
        check(cfg)
        train.train(cfg, build)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        fail(WHAT_TO_GIVE)
    main(configure(Config))
