"""
`python -m bench start`: how much memory does each of several processes need to start training? They hold a checkpoint
together, its weights in float32, as train.py starts it. Peak resident memory of each, against its share of the weights.
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

import train
from bench.common import Config, peak_resident_bytes, report, resident_mb, write_random_checkpoint
from configurator import fail
from distributed import is_torchrun, shard, start_processes

MB = 2**20


def bench_start(cfg: Config):
    """Start cfg.processes processes with a checkpoint, or random weights in a temporary folder, and print the most."""
    with tempfile.TemporaryDirectory() as temporary:
        if not cfg.checkpoint:
            write_random_checkpoint(Path(temporary), cfg.shape)
            cfg = replace(cfg, checkpoint=temporary)
        launcher = [sys.executable, "-m"]
        if cfg.processes > 1:
            launcher += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(cfg.processes), "-m"]
        command = [*launcher, "bench.start", cfg.checkpoint, temporary]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            fail(process.stderr.strip()[-2000:])
        rows = [json.loads(path.read_text()) for path in Path(temporary).glob("rank*.json")]
    most = {key: max(row[key] for row in rows) for key in rows[0]}
    report({"processes": cfg.processes, **most})


def measure(checkpoint: str) -> dict:
    """Start this process's part of a model, and return seconds and MB."""
    _, world, device = start_processes()
    before_mb = resident_mb()
    start = time.perf_counter()
    model, tokenizer, processor, files = train.open_base(train.Config(base_checkpoint=checkpoint))
    trainee = train.Trainee(model.float(), model, tokenizer, processor, files, train.fill_base, train.export_model)
    if is_torchrun():
        shard(model, [*model.transformer_blocks(), model.vision_backbone], device.partition(":")[0], bf16=False)
    model.to_empty(device=device)
    trainee.fill(trainee, train.Config())

    largest = max(weight.numel() * 4 for weight in model.parameters())
    share = sum(weight.numel() * 4 for weight in model.parameters()) / world
    return {
        "start_s": time.perf_counter() - start,
        "before_mb": before_mb,
        "share_mb": share / MB,
        "largest_weight_mb": largest / MB,
        "peak_mb": peak_resident_bytes() / MB,
        "peak_beyond_share_mb": (peak_resident_bytes() - share) / MB,
    }


if __name__ == "__main__":
    measured = measure(sys.argv[1])
    rank = dist.get_rank() if dist.is_initialized() else 0
    (Path(sys.argv[2]) / f"rank{rank}.json").write_text(json.dumps(measured))
    if dist.is_initialized():
        dist.destroy_process_group()
