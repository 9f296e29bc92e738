"""
Stages `lora`, `full` and `batch` of `python -m bench gpu`: how fast a model trains, and what fits.

    lora    adapters of rank 32 on 7B: blocks kept or recomputed, compiled, in NF4; and beside PEFT on the official
            model, if that is given
    full    all weights of 1.3B, sharded over this one card as over many: eager, compiled, recomputed
    batch   the largest batch of `lora` that the card can hold

A step is forward, backward and AdamW on random samples, made and sharded as train.py does it.

MFU, model FLOPs utilisation: floating-point operations that the model needs, over what the card could do in that time.

    operations of a sample = f * (vision weights * patches + Llama's weights * tokens + head weights * 8) + attention
    f = 6 where all weights train: 2 forward, 2 backward to the inputs, 2 backward to the weights
    f = 4 with adapters: frozen weights get no gradient. (The adapters, 1.5 % more, are not counted.)
    attention = 12 * layers * width * tokens^2 / 2

What recomputing repeats is not counted: the model does not need it. An H100 SXM and an H200 can do 989 TFLOP/s in
dense bfloat16 by their data sheets.
"""

import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bench.common import peak_gb, random_config
from bench.gpu_common import (
    Stage,
    free_memory,
    official_command,
    prepare_model,
    random_model,
    run_stage,
)
from bench.gpu_lines import OUT_OF_MEMORY
from bench.train_step import TEXT_TOKENS, TRAINED_TOKENS, random_batch
from lora import add_lora
from metrics import count_weights, flops_per_sample, peak_flops
from model import OpenVLA, OpenVLAConfig
from speed.nf4 import quantize_linears
from train import Config as TrainConfig
from train import build_optimizer

LORA_RANK = 32
LORA_RATE = 5e-4
FULL_RATE = 2e-5
WARM_UP_STEPS = 2  # not counted; compiling happens there
OFFICIAL_SECONDS = 90


@dataclass
class Way:
    """How a model is trained."""

    name: str
    is_recomputed: bool = False
    is_compiled: bool = False
    is_nf4: bool = False


# The recipes recompute by default, so that comes first.
WAYS = (
    Way("recomputed", is_recomputed=True),
    Way("kept"),
)
COMPILED_WAYS = (
    Way("recomputed, compiled", is_recomputed=True, is_compiled=True),
    Way("kept, compiled", is_compiled=True),
)
NF4_WAY = Way("NF4, recomputed", is_recomputed=True, is_nf4=True)


# -----------------------------------------------------------------------------
# Models and steps


def build_lora(stage: Stage, way: Way) -> OpenVLA:
    """Return a frozen model in bfloat16, or in NF4, with adapters in float32, sharded over this process alone."""
    model = random_model(stage.sizes.policy, torch.bfloat16, stage.device)
    if way.is_nf4:
        quantize_linears(model)
    add_lora(model, LORA_RANK)
    prepare_model(stage, model, way.is_recomputed, way.is_compiled, is_sharded=True, bf16=stage.on_gpu)
    return model


def build_full(stage: Stage, way: Way) -> OpenVLA:
    """Return a model in float32 whose weights all train, sharded over this process alone."""
    model = random_model(stage.sizes.full, torch.float32, stage.device)
    prepare_model(stage, model, way.is_recomputed, way.is_compiled, is_sharded=True, bf16=stage.on_gpu)
    return model


def time_steps(
    stage: Stage, model: OpenVLA, batch_size: int, lr: float, num_steps: int, num_warm_up: int = WARM_UP_STEPS
) -> list[float]:
    """Return the seconds of each step, after a few that are not counted."""
    optimizer = build_optimizer(model, TrainConfig(lr=lr), fused=stage.on_gpu)
    dtype = model.language_model.model.norm.weight.dtype
    batch = random_batch(model, batch_size, stage.device)
    free_memory()
    seconds = []
    for _ in range(num_warm_up + num_steps):
        start = time.perf_counter()
        train_step(model, optimizer, batch, dtype)
        seconds.append(time.perf_counter() - start)
    return seconds[num_warm_up:]


def train_step(model: OpenVLA, optimizer: torch.optim.Optimizer, batch: tuple, dtype: torch.dtype):
    """Take one step on input_ids (B, T), labels (B, T) and pixels (B, 6, 224, 224)."""
    input_ids, labels, pixel_values = batch
    _, loss = model(input_ids, pixel_values.to(dtype), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    loss.item()  # waits for the GPU


# -----------------------------------------------------------------------------
# What a step is worth


def sample_flops(config: OpenVLAConfig, is_frozen: bool) -> float:
    """Return the operations of a sample. is_frozen: the weights get no gradients, only adapters do."""
    with torch.device("meta"):
        model = OpenVLA(config)
    num_tokens = config.num_patches + TEXT_TOKENS
    flops = flops_per_sample(model, num_tokens)
    if not is_frozen:
        return flops

    vision = count_weights(model.vision_backbone) + count_weights(model.projector)
    text = count_weights(model.language_model.model.layers)
    head = config.text.hidden_size * config.text.vocab_size
    return flops - 2 * (vision * config.num_patches + text * num_tokens + head * TRAINED_TOKENS)


def write_steps(stage: Stage, name: str, seconds: list[float], batch_size: int, flops: float, peak: float | None):
    """Write samples per second, memory and MFU of steps. flops: of a sample."""
    s_per_step = float(np.median(seconds))
    note = f"batch {batch_size}, median of {len(seconds)} steps: {1e3 * s_per_step:.0f} ms"
    stage.write(name, batch_size / s_per_step, "samples/s", note)
    if peak is not None:
        stage.write(f"{name}: memory", peak, "GB", "of tensors, at the peak")

    rate = batch_size * flops / s_per_step
    peak_rate = peak_flops() if stage.on_gpu else None
    note = f"{rate / 1e12:.1f} TFLOP/s; {flops / 1e12:.2f} TFLOP a sample, as bench/gpu_train.py counts"
    if peak_rate is None:
        stage.skip(f"{name}: MFU", f"needs a card that PEAK_FLOPS of metrics.py knows; {note}")
    else:
        stage.write(f"{name}: MFU", rate / peak_rate, "of the card", f"{note}; the card {peak_rate / 1e12:.0f}")


# -----------------------------------------------------------------------------
# Stages


def run_lora(stage: Stage):
    """Measure adapters on the large model."""
    for way in WAYS:
        stage.run(f"LoRA, {way.name}", measure_lora, way, stage.sizes.batch)
    stage.run("official LoRA", measure_official)
    stage.run(f"LoRA, {NF4_WAY.name}", measure_lora, NF4_WAY, 1)
    for way in compiled_ways(stage):
        stage.run(f"LoRA, {way.name}", measure_lora, way, stage.sizes.batch)


def measure_lora(stage: Stage, way: Way, batch_size: int):
    """Write speed and memory of steps with adapters."""
    model = build_lora(stage, way)
    seconds = time_steps(stage, model, batch_size, LORA_RATE, stage.sizes.steps)
    flops = sample_flops(model.cfg, is_frozen=True)
    write_steps(stage, f"LoRA, {way.name}", seconds, batch_size, flops, peak_gb(stage.device))


def measure_official(stage: Stage):
    """Write speed and memory of PEFT on the official model."""
    if not stage.official:
        stage.skip("official LoRA", "give --official and --official_python: docs/benchmarks.md says what they need")
        return
    with tempfile.TemporaryDirectory() as temporary:
        sizes = stage.sizes
        command = official_command(stage, "lora", Path(temporary), str(sizes.batch), str(sizes.steps))
        process = subprocess.run(command, capture_output=True, text=True, timeout=OFFICIAL_SECONDS)
    print(process.stderr)
    if process.returncode:
        raise ValueError(f"the official code stopped: {process.stderr.strip()[-300:]}")
    result = json.loads(process.stdout.splitlines()[-1])
    flops = sample_flops(random_config(sizes.policy), is_frozen=True)
    write_steps(stage, "official LoRA", result["seconds"], sizes.batch, flops, result["peak_gb"])


def run_full(stage: Stage):
    """Measure steps in which all weights train."""
    for way in (*WAYS, *compiled_ways(stage)):
        stage.run(f"all weights, {way.name}", measure_full, way)


def compiled_ways(stage: Stage) -> tuple[Way, ...]:
    """Return the ways that compile; the first one only in a try-out, because each takes seconds on a CPU."""
    return COMPILED_WAYS[:1] if stage.tiny else COMPILED_WAYS


def measure_full(stage: Stage, way: Way):
    """Write speed and memory of steps in which all weights train."""
    model = build_full(stage, way)
    batch_size = stage.sizes.full_batch
    seconds = time_steps(stage, model, batch_size, FULL_RATE, stage.sizes.steps)
    flops = sample_flops(model.cfg, is_frozen=False)
    write_steps(stage, f"all weights, {way.name}", seconds, batch_size, flops, peak_gb(stage.device))


def run_batch(stage: Stage):
    """Find the largest batch of adapters on the large model."""
    recomputed, kept = WAYS
    first = stage.sizes.batch
    stage.run("largest batch, kept", measure_largest, kept, first)
    stage.run("largest batch, recomputed", measure_largest, recomputed, 4 * first)


def measure_largest(stage: Stage, way: Way, first: int):
    """Write the largest batch that fits into the card's memory."""
    peaks = {}  # batch -> GB, None if it does not fit

    def fits(batch_size: int) -> bool:
        try:
            peaks[batch_size] = peak_of_steps(stage, way, batch_size)
        except torch.OutOfMemoryError:
            peaks[batch_size] = None
        free_memory()
        return peaks[batch_size] is not None

    most = stage.sizes.most
    largest = find_largest(fits, min(first, most), most)
    if largest == 0:
        stage.write(f"largest batch, {way.name}", None, "", f"{min(peaks)} samples do not fit", OUT_OF_MEMORY)
        return
    failed = [batch_size for batch_size, peak in peaks.items() if peak is None]
    beyond = f"{min(failed)} do not fit" if failed else "the most that was tried"
    note = f"adapters of rank {LORA_RANK}, {peaks[largest]:.1f} GB at the peak; {beyond}"
    stage.write(f"largest batch, {way.name}", largest, "samples", note)


def peak_of_steps(stage: Stage, way: Way, batch_size: int) -> float:
    """Return the memory in GB that training adapters takes: two steps, as AdamW's state is there from the second on."""
    model = build_lora(stage, way)
    time_steps(stage, model, batch_size, LORA_RATE, num_steps=2, num_warm_up=0)
    return peak_gb(stage.device)


def find_largest(fits: Callable[[int], bool], first: int, most: int) -> int:
    """
    Return the largest number up to `most` that fits, as near as a thirty-second of `most`; 0 if none does. It doubles
    the number from `first` on, and then looks in the middle between what fits and what does not.
    """
    precision = max(1, most // 32)
    fitting = 0
    failing = most + 1
    candidate = first
    while failing - fitting > precision:
        if fits(candidate):
            fitting = candidate
        else:
            failing = candidate
        if failing > most:
            candidate = min(2 * fitting, most)
        else:
            candidate = (fitting + failing) // 2
    return fitting


if __name__ == "__main__":
    run_stage({"lora": run_lora, "full": run_full, "batch": run_batch})
