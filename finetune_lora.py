"""
Fine-tune on one GPU: only low-rank adapters train, the base checkpoint stays as it is.

    python finetune_lora.py                        # the toy world's model learns a changed world, on a CPU
    python finetune_lora.py --config libero_lora.py --base_checkpoint openvla-7b --data_root_dir DIR
    python finetune_lora.py --merge runs/libero --out openvla-7b-libero

The loop is that of train.py. The run folder holds the adapter in PEFT's files, the dataset statistics and the
preprocessing beside what train.py leaves; sample.py takes it as it is, or the merged folder.

OpenVLA section 5.3, https://arxiv.org/abs/2406.09246; vla-scripts/finetune.py of github.com/openvla/openvla; QLoRA
https://arxiv.org/abs/2305.14314.
"""

import json
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import train
from configurator import configure
from lora import PARTS, add_lora, merge, save_adapter
from speed import nf4


@dataclass
class Config(train.Config):
    lora_rank: int = 32
    lora_alpha: float = 0.0  # 0: min(rank, 16)
    lora_dropout: float = 0.0
    lora_targets: tuple[str, ...] = tuple(PARTS)  # which parts get adapters: vision, projector, language
    quantize_base: str = ""  # nf4: keep the frozen weights in 4 bits (QLoRA)
    merge: str = ""  # instead of training: a run folder, to be folded into its base ...
    out: str = ""  # ... and written here
    # defaults other than train.py's, as in the official script
    batch_size: int = 16
    micro_batch_size: int = 16
    max_steps: int = 200_000
    lr: float = 5e-4
    weight_decay: float = 0.01
    grad_clip: float = 0.0
    save_every: int = 5000
    export_every_save: bool = True  # the adapter, with each checkpoint


def build(cfg: Config):
    """The base checkpoint, frozen, in the dtype it is stored in or 4 bits, with float32 adapters at identity."""
    model, tokenizer, processor = train.start(cfg)
    if cfg.quantize_base:
        nf4.quantize_linears(model)
    torch.manual_seed(cfg.seed)
    add_lora(model, cfg.lora_rank, cfg.lora_alpha, cfg.lora_dropout, cfg.lora_targets)
    return model, tokenizer, processor


def export(run: Path, model, tokenizer, processor, stats: dict, cfg: Config):
    """The adapter, and what sample.py needs beside the base, into the run folder."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(model, options=options)
    if train.main_process():
        write_run(run, model, state, tokenizer, processor, stats, cfg)
    train.barrier()


def write_run(run: Path, model, adapters: dict, tokenizer, processor, stats: dict, cfg: Config):
    unused = {name: w for name, w in model.unused.items() if ".lora_" in name}
    train.write_preparation(run, tokenizer, processor, stats)
    save_adapter(model, run, cfg.base_checkpoint, adapters | unused)


def check(cfg: Config):
    """Raise ValueError for what train.py does not look at."""
    if bool(cfg.merge) != bool(cfg.out):
        raise ValueError("--merge RUN and --out FOLDER go together")
    if cfg.quantize_base not in ("", "nf4"):
        raise ValueError(f"--quantize_base {cfg.quantize_base!r}: only nf4 is known")
    if not cfg.merge and not cfg.base_checkpoint:
        raise ValueError("--base_checkpoint FOLDER is missing: LoRA starts from a trained model")
    if cfg.lora_rank < 1:
        raise ValueError(f"--lora_rank {cfg.lora_rank}: must be 1 or more")
    if cfg.train_parts != "full":
        raise ValueError("--train_parts is for train.py; here --lora_targets says where the adapters go")


def toy_transfer(cfg: Config):
    """The toy world's model in a changed world: before, with adapters, and with all weights trained as long."""
    import sample
    from toy import play
    from toy import world as toy

    if not Path(cfg.base_checkpoint).is_dir():
        raise FileNotFoundError(f"{cfg.base_checkpoint}: no toy model there; `python train.py` trains it")
    if not toy.is_written(cfg.data_root_dir, cfg.data_mix):
        episodes = toy.demonstrations(toy.TRAIN, cfg.toy_episodes, toy.CHANGED)
        toy.write_rlds(cfg.data_root_dir, dict(train=episodes), name=cfg.data_mix)

    def show(name: str, folder: str, key: str) -> float:
        ok = play.play(sample.load(folder), cfg.toy_scenes, key, world=toy.CHANGED).success
        play.report(name, ok)
        return float(ok.mean())

    full = {f.name: getattr(cfg, f.name) for f in fields(train.Config)} | dict(run_dir=f"{cfg.run_dir}/full")
    start = time.perf_counter()
    result = {"before": show("the toy model in the changed world", cfg.base_checkpoint, "toy")}
    train.train(cfg, build, export)
    result["lora"] = show("adapters trained", cfg.run_dir, cfg.data_mix)
    result["seconds"] = time.perf_counter() - start
    train.train(train.Config(**full))  # the same steps at the same learning rate
    result["full"] = show("all weights trained", f"{cfg.run_dir}/full/checkpoint", cfg.data_mix)
    with open(Path(cfg.run_dir) / "metrics.jsonl", "a") as f:
        f.write(json.dumps({f"toy/{k}": v for k, v in result.items()}) + "\n")


def main(cfg: Config):
    with train.ended_well():
        check(cfg)
        if cfg.merge:
            merge(cfg.merge, cfg.out)
            print(f"{cfg.out}: {cfg.merge} folded into its base")
            return
        if cfg.toy_episodes:
            toy_transfer(cfg)
        else:
            train.train(cfg, build, export)


if __name__ == "__main__":
    main(configure(Config, sys.argv[1:] or ["--config", "toy_lora.py"]))
