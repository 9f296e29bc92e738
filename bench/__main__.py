"""
How fast and how large: each command prints a table and then one JSON line. BENCHMARKS.md holds what was measured.

    python bench.py infer --shape 100m --dtype float32 --device cpu          # one action, with and without drafts
    python bench.py infer --shape 7b --vs official --official openvla --official_python venv/bin/python
    python bench.py infer --checkpoint runs/toy/checkpoint --trajectories toy --dtype float32 --plot speed.png
    python bench.py drafts --checkpoint runs/toy/checkpoint --trajectories toy --dtype float32
    python bench.py agree --checkpoint runs/toy-int4 --against runs/toy/checkpoint --trajectories toy --dtype bfloat16
    python bench.py serve --checkpoint runs/toy/checkpoint --dtype float32 --seconds 60
    python bench.py load                          # random weights of the 7B shape in a temporary folder: load, act once
    python bench.py train --shape 100m --dtype float32                       # one training step
    python bench.py enlarge --data_root_dir DIR --out BIG        # the Bridge sample with 256 x 256 pictures
    python bench.py data --data_root_dir DIR --data_mix bridge --image_aug True
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from configurator import configure, fail


@dataclass
class Config:
    checkpoint: str = ""  # this folder instead of random weights
    shape: str = "7b"  # of the random weights: tiny, 100m, 1b, 7b
    dtype: str = "bfloat16"
    device: str = "auto"  # infer, train: auto, cpu, cuda
    # infer, drafts, agree
    actions: int = 50  # to time
    inputs: int = 50  # different pictures
    against: str = ""  # agree: the checkpoint to compare with
    trajectories: str = ""  # where they come from: "" noise, toy (the policy's own way), data (a dataset's episodes)
    unnorm_key: str = ""
    vs: str = ""  # official: the official classes in the same run
    official: str = ""  # a checkout of github.com/openvla/openvla
    official_python: str = "python"  # of a virtual environment with transformers 4.40.1 and timm 0.9.10
    log: str = ""  # append the JSON line to this file, with a `label`
    label: str = ""
    plot: str = ""  # picture of this run or, with --log, of all runs in the log
    clients: int = 64  # serve: at once
    # data, enlarge, train
    data_root_dir: str = ""  # folder with the datasets
    out: str = "bench"  # enlarge: where the enlarged dataset goes
    data_mix: str = "bridge"  # data: mixture or dataset
    image_aug: bool = True  # data: random crops and colours
    batch_size: int = 16
    num_workers: int = 2
    seconds: float = 20.0  # data, train, serve: how long to measure


SHAPES = {  # towers as (width, depth, heads), Llama as (width, inner width, depth, heads)
    "tiny": ((64, 3, 4), (64, 128, 2, 4)),
    "100m": ((384, 12, 6), (512, 1408, 8, 8)),
    "1b": ((768, 12, 12), (1536, 4096, 24, 12)),
}


def report(rows: dict):
    """A table for people, one JSON line for machines, with what it was measured on."""
    rows = {**rows, "python": platform.python_version(), "torch": torch.__version__, "cpus": os.cpu_count()}
    rows["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    for key, value in rows.items():
        if not isinstance(value, dict):
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


# -----------------------------------------------------------------------------


def random_config(shape: str):
    from model import LlamaConfig, OpenVLAConfig, ViTConfig

    config = OpenVLAConfig()
    if shape in SHAPES:
        (width, depth, heads), llama = SHAPES[shape]
        vit = ViTConfig(width, depth, heads, 14, 224, 4 * width)
        vision = [vit, replace(vit, cls_token=False, reg_tokens=0, layer_scale=False)]
        config = OpenVLAConfig(vision, LlamaConfig(32064, *llama))
    elif shape != "7b":
        fail(f"--shape {shape}: must be 7b, {', '.join(SHAPES)}")
    return config


def write_random_checkpoint(folder: Path, shape: str):
    """A folder like a released one, with random bf16 weights, without ever holding the model in memory."""
    from safetensors.torch import save_file

    from image import ImageProcessor
    from model import INDEX, OpenVLA, write_json
    from tokenizer import make_standin

    config = random_config(shape)
    with torch.device("meta"):
        names = OpenVLA(config).state_dict()
    stats = dict.fromkeys(("q01", "min"), [-1.0] * 7) | dict.fromkeys(("q99", "max"), [1.0] * 7)
    stats["mean"] = [0.0] * 7
    config.extra = {"norm_stats": {"random": {"action": stats}}}
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
    make_standin(folder / "tokenizer.model")


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
        rows["weights_mb"] = sum(w.nbytes for w in policy.model.state_dict().values()) / 2**20
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
            fail(run.stderr.strip().removeprefix("error: "))
        report({"disk_mb": disk, "dtype": cfg.dtype, **json.loads(run.stdout.splitlines()[-1])})


def bench_infer(cfg: Config):
    from bench_infer import infer

    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(cfg.checkpoint or Path(tmp) / "random")
        if not cfg.checkpoint:
            write_random_checkpoint(folder, cfg.shape)
        infer(cfg, folder, Path(tmp))


def bench_drafts(cfg: Config):
    from bench.infer import drafts

    drafts(cfg)


def bench_agree(cfg: Config):
    from bench.infer import agree

    agree(cfg)


def bench_serve(cfg: Config):
    from bench.server import serve

    serve(cfg)


def bench_train(cfg: Config):
    """One step of training on random pictures: forward, backward, AdamW; no data is read."""
    from metrics import flops_per_sample, peak_memory_gb
    from model import OpenVLA
    from sample import pick_device
    from train import Config as Train
    from train import build_optimizer

    device = pick_device(cfg.device)
    model = OpenVLA(random_config(cfg.shape)).init_weights().to(device)
    optimizer = build_optimizer(model, Train(), fused=device == "cuda")
    ids = torch.randint(3, 30000, (cfg.batch_size, 40), device=device)
    labels = ids.masked_fill(torch.arange(40, device=device) < 32, -100)
    size = model.cfg.vision[0].img_size
    pixels = torch.randn(cfg.batch_size, 3 * len(model.cfg.vision), size, size, device=device)
    seconds, end = [], time.perf_counter() + cfg.seconds
    while time.perf_counter() < end or len(seconds) < 4:
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=cfg.dtype == "bfloat16"):
            loss = model(ids, pixels, labels)[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the GPU
        seconds.append(time.perf_counter() - start)
    middle = float(np.median(seconds[2:]))
    rows = dict(shape=cfg.shape, dtype=cfg.dtype, device=device, batch_size=cfg.batch_size, s_per_step=middle)
    flops = cfg.batch_size * flops_per_sample(model, 256 + ids.shape[1]) / middle
    report(rows | dict(samples_per_s=cfg.batch_size / middle, tflops=flops / 1e12, peak_gb=peak_memory_gb()))


def bench_data(cfg: Config):
    from bench import data_speed as bench_data

    bench_data.data(cfg)


def bench_enlarge(cfg: Config):
    from bench import data_speed as bench_data

    bench_data.enlarge(cfg)


if __name__ == "__main__":
    commands = dict(infer=bench_infer, drafts=bench_drafts, agree=bench_agree, load=bench_load, train=bench_train)
    commands |= dict(serve=bench_serve, data=bench_data, enlarge=bench_enlarge)
    if len(sys.argv) < 2 or sys.argv[1] not in (*commands, "--help", "-h"):
        fail(f"usage: python bench.py {{{'|'.join(commands)}}} [--option value ...]; --help lists the options")
    argv = sys.argv[1:] if sys.argv[1].startswith("-") else sys.argv[2:]
    cfg = configure(Config, argv)
    known = dict(dtype=("bfloat16", "float32", "float16"), vs=("", "official"), trajectories=("", "toy", "data"))
    for key, values in known.items():
        if getattr(cfg, key) not in values:
            fail(f"--{key} {getattr(cfg, key)}: must be one of {', '.join(filter(None, values))}")
    if min(cfg.actions, cfg.inputs, cfg.batch_size, cfg.clients) < 1:
        fail("--actions, --inputs, --batch_size and --clients must be 1 or more")
    if cfg.vs and not (Path(cfg.official) / "prismatic" / "extern" / "hf").is_dir():
        fail(f"--official {cfg.official or '(missing)'}: give a checkout of github.com/openvla/openvla")
    try:
        commands[sys.argv[1]](cfg)
    except (ValueError, OSError) as error:
        fail(error)
