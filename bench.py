"""
How fast and how large: each command prints a table and then one JSON line. BENCHMARKS.md holds what was measured.

    python bench.py load                          # random weights of the 7B shape in a temporary folder: load, act once
    python bench.py load --checkpoint openvla-7b
    python bench.py data --data_root_dir DIR --data_mix bridge --image_aug True
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from configurator import configure, fail


@dataclass
class Config:
    checkpoint: str = ""  # load: this folder instead of random weights
    shape: str = "7b"  # load: shape of the random weights: tiny, 7b
    dtype: str = "bfloat16"
    data_root_dir: str = ""  # data: folder with the datasets
    data_mix: str = "bridge"  # data: mixture or dataset
    image_aug: bool = True  # data: random crops and colours
    batch_size: int = 16
    num_workers: int = 2
    seconds: float = 20.0  # data: how long to measure


def report(rows: dict):
    """A table for people, one JSON line for machines, with what it was measured on."""
    rows = {**rows, "python": platform.python_version(), "torch": torch.__version__, "cpus": os.cpu_count()}
    rows["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    for key, value in rows.items():
        print(f"{key:28s} {value:,.3f}" if isinstance(value, float) else f"{key:28s} {value}")
    print(json.dumps(rows))


def memory_mb(tree: bool = False) -> float:
    """Resident memory of this process or, with shared pages counted once (PSS), of it and all its children, in MB."""
    pids = [os.getpid()]
    if not tree:
        return resident(pids[0], "VmRSS", "status")
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            pids += [int(child) for child in task.read_text().split()]
    return sum(resident(pid, "Pss", "smaps_rollup") for pid in pids)


def resident(pid: int, key: str, file: str) -> float:
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:  # it has ended
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:")), 0.0)


class Peak(threading.Thread):
    """The largest memory of this process and its children, looked at ten times a second."""

    def __init__(self):
        super().__init__(daemon=True)
        self.mb, self.done = 0.0, threading.Event()
        self.start()

    def run(self):
        while not self.done.wait(0.1):
            self.mb = max(self.mb, memory_mb(tree=True))


# -----------------------------------------------------------------------------


def write_random_checkpoint(folder: Path, shape: str):
    """A folder like a released one, with random bf16 weights, without ever holding the model in memory."""
    from safetensors.torch import save_file

    from image import ImageProcessor
    from model import INDEX, LlamaConfig, OpenVLA, OpenVLAConfig, ViTConfig, write_json
    from toy import make_tokenizer

    config = OpenVLAConfig()
    if shape == "tiny":
        vision = [ViTConfig(64, 3, 4, 14, 224, 128), ViTConfig(64, 3, 4, 14, 224, 128, False, 0, False)]
        config = OpenVLAConfig(vision, LlamaConfig(32064, 64, 128, 2, 4))
    elif shape != "7b":
        fail(f"--shape {shape}: must be tiny or 7b")
    with torch.device("meta"):
        names = OpenVLA(config).state_dict()
    config.extra = {"norm_stats": {"random": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7}}}}
    folder.mkdir(parents=True, exist_ok=True)
    where, shards, size = {}, [{}], 0
    for name, meta in [*names.items(), (None, None)]:
        if name is None or size > 4.5e9:
            file = f"model-{len(shards):05d}.safetensors"
            save_file(shards[-1], folder / file, {"format": "pt"})
            where |= dict.fromkeys(shards[-1], file)
            shards[-1].clear()
            shards, size = [*shards, {}], 0
        if name is not None:
            shards[-1][name] = torch.empty(meta.shape, dtype=torch.bfloat16).normal_(0, 0.02)
            size += shards[-1][name].nbytes
    write_json(folder / INDEX, {"metadata": {}, "weight_map": where})
    write_json(folder / "config.json", config.to_dict() | {"torch_dtype": "bfloat16"})
    write_json(folder / "preprocessor_config.json", ImageProcessor().to_dict())
    make_tokenizer(folder / "tokenizer.model")


def bench_load(cfg: Config):
    """Load a checkpoint in a fresh process and act once: seconds and peak resident memory against the size on disk."""
    if os.environ.get("BENCH_LOAD_CHILD"):
        import resource

        from sample import load, predict_action

        before, start = memory_mb(), time.perf_counter()
        policy = load(cfg.checkpoint, getattr(torch, cfg.dtype))
        loaded = time.perf_counter()
        image = np.zeros((480, 640, 3), np.uint8)
        key = sorted(policy.norm_stats)[0]
        predict_action(policy, [image], ["pick up the red cube"], key)
        acted = time.perf_counter()
        predict_action(policy, [image], ["pick up the red cube"], key)
        rows = dict(load_s=loaded - start, first_action_s=acted - loaded, second_action_s=time.perf_counter() - acted)
        rows |= dict(resident_before_mb=before, peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        rows["weights_mb"] = sum(p.nbytes for p in policy.model.parameters()) / 2**20
        print(json.dumps(rows | {"peak_over_weights": rows["peak_mb"] / rows["weights_mb"]}))
        return
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(cfg.checkpoint or tmp)
        if not cfg.checkpoint:
            write_random_checkpoint(folder, cfg.shape)
        disk = sum(p.stat().st_size for p in folder.glob("*.safetensors")) / 2**20
        argv = [sys.executable, __file__, "load", "--checkpoint", str(folder), "--dtype", cfg.dtype]
        run = subprocess.run(argv, env={**os.environ, "BENCH_LOAD_CHILD": "1"}, capture_output=True, text=True)
        if run.returncode:
            fail(run.stderr.strip())
        report({"disk_mb": disk, "dtype": cfg.dtype, **json.loads(run.stdout.splitlines()[-1])})


if __name__ == "__main__":
    commands = {"load": bench_load}
    if len(sys.argv) < 2 or sys.argv[1] not in (*commands, "--help", "-h"):
        fail(f"usage: python bench.py {{{'|'.join(commands)}}} [--option value ...]; --help lists the options")
    argv = sys.argv[1:] if sys.argv[1].startswith("-") else sys.argv[2:]
    commands.get(sys.argv[1], bench_load)(configure(Config, argv))
