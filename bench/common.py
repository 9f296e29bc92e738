"""The options of all benchmarks, and what several of them need: report, processes, time, memory, random checkpoints."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from configurator import fail
from files import write_json
from image import ImageProcessor
from model import INDEX, LlamaConfig, OpenVLA, OpenVLAConfig, ViTConfig, split_into_shards
from tokenizer import make_standin


@dataclass
class Config:
    checkpoint: str = ""  # this folder instead of random weights
    shape: str = "7b"  # of the random weights: tiny, 100m, 1b, 1.3b, 7b
    dtype: str = "bfloat16"  # bfloat16, float32, float16
    device: str = "auto"  # infer, drafts, agree, train, gpu: auto, cpu, cuda
    seconds: float = 20.0  # data, train, serve: how long to measure

    # infer, drafts, agree
    actions: int = 50  # to time
    inputs: int = 50  # different images
    against: str = ""  # agree: the checkpoint to compare with
    trajectories: str = ""  # where images come from: "" noise, toy (the policy's own way), data (a dataset's episodes)
    unnorm_key: str = ""  # whose statistics give actions their units; "": the first of the checkpoint
    vs: str = ""  # official: the official classes in the same run
    official: str = ""  # infer, gpu: a checkout of github.com/openvla/openvla
    official_python: str = "python"  # of a virtual environment with transformers 4.40.1 and timm 0.9.10
    log: str = ""  # infer: append the JSON line to this file, with a `label`
    label: str = ""  # infer: "": checkpoint and dtype
    plot: str = ""  # infer: draw this run or, with --log, all runs in the log, to this file

    # start, index
    processes: int = 2  # start: that hold the model together; index: that read, beside one alone
    episodes: int = 4000  # index: of 30 images

    # gpu
    stages: tuple[str, ...] = ()  # some of them, by name or letter; none: all
    tiny: bool = False  # every stage with tiny models, on the CPU unless --device says cuda

    # serve
    clients: int = 64  # at once

    # data, enlarge, train
    data_root_dir: str = ""  # folder with the datasets
    out: str = "runs/bench"  # enlarge, gpu: where the enlarged dataset or the results go
    data_mix: str = "bridge"  # data: mixture or dataset
    image_aug: bool = True  # data: random crops and colours
    batch_size: int = 16  # data, train
    num_workers: int = 2  # data: processes that read and decode


# -----------------------------------------------------------------------------
# Report


def report(rows: dict):
    """Print a table for people and one JSON line for machines, with what it was measured on."""
    has_cuda = torch.cuda.is_available()
    rows = {
        **rows,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if has_cuda else None,
    }
    for key, value in rows.items():
        if isinstance(value, dict):
            continue  # a table of its own
        text = f"{value:,.3f}" if isinstance(value, float) else str(value)
        print(f"{key:28s} {text}")
    print(json.dumps(rows))


# -----------------------------------------------------------------------------
# A fresh process, which has imported only what it measures


def run_fresh(module: str, cfg: Config, *arguments: str, threads: int | None = None) -> dict:
    """
    Return what measure(cfg, *arguments) of a module returns in a process of its own. Ends the program with its message
    if it fails. threads: of numpy.
    """
    # Not `-m module`: data workers would import the main module again, each for itself.
    code = f"import bench.common, {module}; bench.common.print_measured({module}.measure)"
    command = [sys.executable, "-c", code, json.dumps(asdict(cfg)), *arguments]
    env = dict(os.environ)
    if threads is not None:
        env["OPENBLAS_NUM_THREADS"] = str(threads)
    process = subprocess.run(command, env=env, capture_output=True, text=True)
    if process.returncode:
        fail(process.stderr.strip().removeprefix("error: "))
    return json.loads(process.stdout.splitlines()[-1])


def print_measured(measure: Callable[..., dict]):
    """Call measure(cfg, *arguments) with the command line of `run_fresh`, and print what it returns."""
    cfg = Config(**json.loads(sys.argv[1]))
    try:
        print(json.dumps(measure(cfg, *sys.argv[2:])))
    except (ValueError, OSError) as error:
        fail(error)


# -----------------------------------------------------------------------------
# Time and memory

# That are copied to see how fast the memory is. On a GPU it takes that many to hide how long a kernel takes to start.
COPY_BYTES = {"cpu": 2**28, "mps": 2**28, "cuda": 2**32}


def timed(function: Callable, *inputs) -> tuple[float, object]:
    """Return the seconds that a call took, work on the GPU included, and its result."""
    synchronize()
    start = time.perf_counter()
    result = function(*inputs)
    synchronize()
    return time.perf_counter() - start, result


def synchronize():
    """Wait until the GPU has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure_copy(device: str | torch.device) -> float:
    """Return how fast memory is copied, in GB/s, reading and writing together."""
    num_bytes = COPY_BYTES[torch.device(device).type]
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    fastest = min(timed(target.copy_, source)[0] for _ in range(9))
    return 2 * num_bytes / fastest / 1e9


def peak_gb(device: str) -> float:
    """Return the largest memory so far: on the GPU if the work ran there, else of this process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 1e9
    return peak_resident_bytes() / 1e9


def peak_resident_bytes() -> int:
    """Return the largest resident memory of this process so far."""
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_mb() -> float:
    """Return the resident memory of this process in MB."""
    return read_memory_mb(os.getpid(), file="status", key="VmRSS")


def tree_mb() -> float:
    """Return the memory of this process and all its children in MB, with shared pages counted once (PSS)."""
    return sum(read_memory_mb(pid, file="smaps_rollup", key="Pss") for pid in process_tree())


def read_memory_mb(pid: int, file: str, key: str) -> float:
    """Return one line of a file in /proc/PID in MB; 0 if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    except OSError:
        return 0.0
    for line in lines:
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024  # kB
    return 0.0


def process_tree() -> list[int]:
    """Return the ids of this process, its children, their children and so on."""
    pids = [os.getpid()]
    for pid in pids:  # grows while it is walked
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            pids += [int(child) for child in children.read_text().split()]
    return pids


# -----------------------------------------------------------------------------
# Random checkpoints


@dataclass
class Shape:
    """Sizes of a model between the tests' and the released one."""

    vision_dim: int
    vision_depth: int
    vision_heads: int
    dim: int
    mlp_dim: int
    depth: int
    heads: int


SHAPES = {
    "tiny": Shape(vision_dim=64, vision_depth=3, vision_heads=4, dim=64, mlp_dim=128, depth=2, heads=4),
    "100m": Shape(vision_dim=384, vision_depth=12, vision_heads=6, dim=512, mlp_dim=1408, depth=8, heads=8),
    "1b": Shape(vision_dim=768, vision_depth=12, vision_heads=12, dim=1536, mlp_dim=4096, depth=24, heads=12),
    "1.3b": Shape(vision_dim=768, vision_depth=12, vision_heads=12, dim=2048, mlp_dim=5632, depth=20, heads=16),
}
RANDOM_SHARD_BYTES = 45 * 10**8  # weights that are in memory at the same time
WEIGHT_SPREAD = 0.02


def random_config(shape: str) -> OpenVLAConfig:
    """Return the config of openvla-7b, or of a smaller model of the same architecture."""
    if shape == "7b":
        return OpenVLAConfig()
    if shape not in SHAPES:
        fail(f"--shape {shape}: must be 7b, {', '.join(SHAPES)}")
    sizes = SHAPES[shape]
    dinov2 = ViTConfig(
        embed_dim=sizes.vision_dim,
        depth=sizes.vision_depth,
        num_heads=sizes.vision_heads,
        mlp_dim=4 * sizes.vision_dim,
    )
    siglip = replace(dinov2, cls_token=False, reg_tokens=0, layer_scale=False)
    llama = LlamaConfig(
        vocab_size=32064,
        hidden_size=sizes.dim,
        intermediate_size=sizes.mlp_dim,
        num_hidden_layers=sizes.depth,
        num_attention_heads=sizes.heads,
    )
    return OpenVLAConfig([dinov2, siglip], llama)


def write_random_checkpoint(folder: Path, shape: str):
    """Write a folder like a released one, with random bf16 weights, one file at a time: never the model in memory."""
    config = random_config(shape)
    with torch.device("meta"):
        tensors = OpenVLA(config).state_dict()
    action_stats = {
        "q01": [-1.0] * 7,
        "min": [-1.0] * 7,
        "q99": [1.0] * 7,
        "max": [1.0] * 7,
        "mean": [0.0] * 7,
    }
    config.extra = {"norm_stats": {"random": {"action": action_stats}}}

    folder.mkdir(parents=True, exist_ok=True)
    sizes = {name: tensor.numel() * torch.bfloat16.itemsize for name, tensor in tensors.items()}
    weight_map = {}
    for i, names in enumerate(split_into_shards(sizes, RANDOM_SHARD_BYTES)):
        file = f"model-{i + 1:05d}.safetensors"
        shard = {}
        for name in names:
            shard[name] = torch.empty(tensors[name].shape, dtype=torch.bfloat16).normal_(0, WEIGHT_SPREAD)
            weight_map[name] = file
        save_file(shard, folder / file, {"format": "pt"})

    write_json(folder / INDEX, {"metadata": {}, "weight_map": weight_map})
    write_json(folder / "config.json", {**config.to_dict(), "torch_dtype": "bfloat16"})
    write_json(folder / "preprocessor_config.json", ImageProcessor().to_dict())
    make_standin(folder / "tokenizer.model")
