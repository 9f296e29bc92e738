"""
What the stages of `python -m bench gpu` share: where results go, how large models are, random models, small helpers.

A stage is a process of its own. It runs its parts one after the other with `stage.run(name, function)`; a part writes
its results with `stage.write` and `stage.check`. An error ends the part that it happens in, and becomes a result.
"""

import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path

import torch
import torch.distributed as dist

from bench.common import random_config
from bench.gpu_lines import (
    FAILED,
    MEASURED,
    OUT_OF_MEMORY,
    PASSED,
    SKIPPED,
    WITH_VALUE,
    Line,
    append_line,
)
from bench.random_weights import fill_random
from distributed import shard
from image import ImageProcessor
from model import OpenVLA
from policy import Policy
from tokenizer import Tokenizer, make_standin

ROOT = Path(__file__).parent.parent
MAX_NOTE = 500  # characters
STATISTICS = {"random": {"action": {"q01": [-1.0] * 7, "q99": [1.0] * 7}}}  # of the policies with random weights


@dataclass
class Sizes:
    """How large and how many things are."""

    policy: str  # shape of the models whose speed is measured, see SHAPES of bench/common.py
    checked: str  # of those whose answers are compared
    full: str  # of the one whose weights all train
    actions: int  # to time
    prompts: int  # to compare
    group: int  # inputs of a layer in 4 bits that share a scale
    batch: int  # samples in a step with adapters
    full_batch: int  # samples in a step of all weights
    steps: int  # to time
    most: int  # samples that the search for the largest batch goes up to


REAL = Sizes(
    policy="7b",
    checked="100m",
    full="1.3b",
    actions=40,
    prompts=1000,
    group=128,
    batch=16,
    full_batch=32,
    steps=6,
    most=128,
)
TINY = Sizes(
    policy="tiny",
    checked="tiny",
    full="tiny",
    actions=2,
    prompts=10,
    group=32,
    batch=2,
    full_batch=2,
    steps=1,
    most=3,
)


# -----------------------------------------------------------------------------
# A stage


@dataclass
class Stage:
    """What a stage is told, and where its results go."""

    name: str
    results: str  # the file of all results
    device: str  # cuda, or cpu with `tiny`
    tiny: bool
    command: str  # which started the run
    official: str  # a checkout of github.com/openvla/openvla, or ""
    official_python: str

    @property
    def sizes(self) -> Sizes:
        return TINY if self.tiny else REAL

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def compiler(self) -> str:
        """The backend of torch.compile: on a CPU one that traces and writes no code, which would take minutes."""
        return "inductor" if self.on_gpu else "aot_eager"

    def write(self, name: str, value: float | None, unit: str, note: str = "", status: str = MEASURED):
        """Write a result. A value that is no finite number is a failure."""
        if status in WITH_VALUE and not is_finite(value):
            note = f"the value was {value}. {note}"
            value = None
            status = FAILED
        line = Line(
            stage=self.name,
            name=name,
            value=value,
            unit=unit,
            status=status,
            note=note[:MAX_NOTE].replace("\n", " "),
            card=card(self.device),
            versions=versions(),
            date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            command=self.command,
            tiny=self.tiny,
        )
        append_line(Path(self.results), line)

    def check(self, name: str, value: float, limit: float, unit: str, note: str):
        """Write the result of a check: it has passed if the value is at most the limit."""
        has_passed = is_finite(value) and value <= limit
        self.write(name, value, unit, f"at most {limit:g}. {note}", PASSED if has_passed else FAILED)

    def skip(self, name: str, why: str):
        """Write that something was not measured, and what is missing."""
        self.write(name, None, "", why, SKIPPED)

    def run(self, name: str, part: Callable, *arguments):
        """Call part(stage, *arguments). If it fails, write that as the result `name`, and go on with the next part."""
        try:
            part(self, *arguments)
        except torch.OutOfMemoryError as error:
            self.write(name, None, "", str(error), OUT_OF_MEMORY)
        except ModuleNotFoundError as error:
            self.skip(name, f"{error}; pip install {error.name}")
        except Exception as error:
            traceback.print_exc()  # goes to the log
            self.write(name, None, "", f"{type(error).__name__}: {error}", FAILED)
        free_memory()


def is_finite(value: float | None) -> bool:
    return value is not None and abs(value) < float("inf")  # False for NaN, too


def run_stage(parts: dict[str, Callable]):
    """
    Run the stage that the command line describes, as bench/gpu.py wrote it there. parts: name of a stage -> function
    of it.
    """
    stage = Stage(**json.loads(sys.argv[1]))
    parts[stage.name](stage)
    if dist.is_initialized():
        dist.destroy_process_group()


def card(device: str) -> str:
    """Return the name of the GPU, or of what stands in for it."""
    if device == "cpu":
        return f"no GPU, {os.cpu_count()} CPU cores"
    return torch.cuda.get_device_name(device)


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "code": code_version(),
    }


@lru_cache
def code_version() -> str:
    """Return the commit that runs, with "-dirty" if files have changed since; "unknown" outside a clone."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() or "unknown"


# -----------------------------------------------------------------------------
# Memory


def free_memory():
    """Give back what the last part has left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def used_gb(device: str) -> float:
    """Return the memory that tensors take now on a GPU; 0 on a CPU, which does not say."""
    return torch.cuda.memory_allocated() / 1e9 if device != "cpu" else 0.0


# -----------------------------------------------------------------------------
# Models


def random_model(shape: str, dtype: torch.dtype, device: str) -> OpenVLA:
    """Return a model in eval mode, with random weights that were made on the device."""
    with torch.device("meta"):
        model = OpenVLA(random_config(shape))
    model = model.to(dtype).to_empty(device=device)
    return fill_random(model).eval()


def random_policy(model: OpenVLA) -> Policy:
    """Return a policy around a model, with a tokenizer that knows the prompt, and actions from -1 to 1."""
    with tempfile.TemporaryDirectory() as folder:
        make_standin(Path(folder) / "tokenizer.model")
        tokenizer = Tokenizer(folder)
    return Policy(model, tokenizer, ImageProcessor(), STATISTICS, "random weights")


def prepare_model(stage: Stage, model: OpenVLA, is_recomputed: bool, is_compiled: bool, is_sharded: bool, bf16: bool):
    """
    Prepare a model for training in place, as train.py does: recompute and compile its blocks, and shard it over this
    process alone. bf16: a sharded model computes in bfloat16.
    """
    model.train()
    if is_recomputed:
        model.recompute_blocks()
    if is_compiled:
        compile_blocks(model, stage.compiler)
    if is_sharded:
        start_one_process(stage.device)
        device_type = torch.device(stage.device).type
        shard(model, [*model.transformer_blocks(), model.vision_backbone], device_type, bf16)


def compile_blocks(model: OpenVLA, backend: str):
    """Compile the blocks in place; one block's code serves all of its kind."""
    torch.compiler.reset()  # else earlier models count towards the number of versions that PyTorch compiles
    for block in model.transformer_blocks():
        block.compile(backend=backend)


def start_one_process(device: str):
    """Make a process group of this process alone, unless there is one. (distributed.shard makes one on a GPU only.)"""
    if not dist.is_initialized():
        backend = "gloo" if device == "cpu" else "nccl"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


# -----------------------------------------------------------------------------
# The official code


def official_command(stage: Stage, task: str, folder: Path, *arguments: str) -> list[str]:
    """Return the command line of bench/gpu_official.py, and write the config that it reads into a folder."""
    config = random_config(stage.sizes.policy)
    config.extra = {"norm_stats": STATISTICS}
    config_file = folder / "config.json"
    config_file.write_text(json.dumps(config.to_dict()))
    script = str(ROOT / "bench" / "gpu_official.py")
    return [stage.official_python, script, task, stage.official, str(config_file), stage.device, *arguments]
