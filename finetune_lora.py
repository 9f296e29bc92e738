"""
Fine-tune on one GPU: only low-rank adapters train, the base checkpoint stays as it is.

    python finetune_lora.py --config libero_lora.py --base_checkpoint openvla-7b --data_root_dir DIR
    python convert_weights.py merge-lora runs/libero_spatial_lora openvla-7b-libero-spatial

The loop is that of train.py. The run folder holds the adapter in PEFT's files, the dataset statistics and the
preprocessing; sample.py takes it as it is, or the merged folder. `python -m toy.transfer` shows it in the toy world.

OpenVLA section 5.3, https://arxiv.org/abs/2406.09246; vla-scripts/finetune.py of github.com/openvla/openvla; QLoRA
https://arxiv.org/abs/2305.14314.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import train
from checkpoint import complete_export
from configurator import configure, fail
from data import check_cameras
from distributed import barrier, exit_cleanly, fill, is_main_process
from formats.dataset import RobotDataset
from lora import PARTS, add_lora, random_adapters, save_adapter
from model import OpenVLA
from speed.nf4 import quantize_linears
from train import Trainee, choose_tokens, fill_base, open_base, write_preparation

WHAT_TO_GIVE = (
    "give a config file and what it needs, for example\n"
    "    python finetune_lora.py --config libero_lora.py --base_checkpoint openvla-7b --data_root_dir DIR\n"
    "`python -m toy.transfer` fine-tunes the toy model of quickstart.py and needs nothing else"
)


@dataclass
class Config(train.Config):
    # Adapters
    lora_rank: int = 32
    lora_alpha: float = 0.0  # 0: min(rank, 16)
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = tuple(PARTS)  # which parts get adapters: vision, projector, language
    quantize_base: str = ""  # nf4: keep the frozen weights in 4 bits (QLoRA)

    # Other defaults than train.py's, as in the official script
    batch_size: int = 16
    micro_batch_size: int = 16
    max_steps: int = 200_000
    lr: float = 5e-4
    weight_decay: float = 0.01
    grad_clip: float = 0.0
    save_every: int = 5000
    export_every_save: bool = True  # the adapter, with each checkpoint


def build(cfg: Config, datasets: list[RobotDataset]) -> Trainee:
    """Build the base checkpoint with adapters, which alone train."""
    check_cameras(datasets, num_images=1)
    model, tokenizer, processor, files = build_adapted(cfg)
    tokenizer.fast = choose_tokens(cfg, datasets, tokenizer)
    model.rows_count_equally = tokenizer.fast is not None
    return Trainee(model, model, tokenizer, processor, files, fill_adapted, export_adapter, exports_whole_model=False)


def build_adapted(cfg: Config):
    """
    Return the base checkpoint, frozen, in the dtype it is stored in or in 4 bits, with float32 adapters, and all of it
    without memory yet; tokenizer, image processor and the files of the base weights.
    """
    check(cfg)
    model, tokenizer, processor, files = open_base(cfg)
    torch.manual_seed(cfg.seed)  # for the adapters of modules that never run, which are drawn here
    with torch.device("meta"):
        if cfg.quantize_base:
            quantize_linears(model)
        add_lora(model, cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout, cfg.lora_targets)
    return model, tokenizer, processor, files


def fill_adapted(trainee: Trainee, cfg: Config):
    """Read the weights of the base checkpoint, and give the adapters values that change nothing yet."""
    fill_base(trainee, cfg)
    for name, values in random_adapters(trainee.vla, cfg.seed):
        fill(trainee.vla.get_parameter(name), values)


def export_adapter(run: Path, trainee: Trainee, statistics: dict, cfg: Config):
    """Write the adapter, and what sample.py needs besides the base checkpoint, into the run folder."""
    adapters = gather_trained(trainee.model)
    if is_main_process():
        with complete_export(run):
            write_run(run, trainee, adapters, statistics, cfg)
    barrier()


def gather_trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights that train, whole and on the CPU, from all processes."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    return get_model_state_dict(model, options=options)


def write_run(run: Path, trainee: Trainee, adapters: dict, statistics: dict, cfg: Config):
    """Write an adapter with all that goes with it. adapters: those of modules that run."""
    write_preparation(run, trainee.tokenizer, trainee.processor, statistics)
    save_adapter(trainee.vla, run, cfg.base_checkpoint, {**adapters, **unused_adapters(trainee.vla)}, has_record=True)


def unused_adapters(model: OpenVLA) -> dict[str, torch.Tensor]:
    """Return the adapters of modules that never run, which PEFT makes and saves too."""
    return {name: weight for name, weight in model.unused.items() if ".lora_" in name}


def check(cfg: Config):
    """Raise ValueError for what train.py does not look at."""
    if cfg.quantize_base not in ("", "nf4"):
        raise ValueError(f"--quantize_base {cfg.quantize_base!r}: only nf4 is known")
    if not cfg.base_checkpoint:
        raise ValueError("--base_checkpoint FOLDER is missing: LoRA starts from a trained model")
    if cfg.lora_rank < 1:
        raise ValueError(f"--lora_rank {cfg.lora_rank}: must be 1 or more")
    if cfg.train_parts != "full":
        raise ValueError("--train_parts is for train.py; here --lora_targets says where the adapters go")


def main(cfg: Config):
    with exit_cleanly():
        check(cfg)
        train.train(cfg, build)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        fail(WHAT_TO_GIVE)
    main(configure(Config))
