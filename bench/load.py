"""
`python -m bench load`: load a checkpoint in a fresh process and act twice. Seconds, and peak resident memory against
the size of the weights.
"""

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bench.common import (
    Config,
    peak_resident_bytes,
    report,
    resident_mb,
    run_fresh,
    write_random_checkpoint,
)
from policy import load_policy, predict_action

MB = 2**20


def bench_load(cfg: Config):
    """Measure a checkpoint, or random weights in a temporary folder, and print what came out."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(cfg.checkpoint or temporary)
        if not cfg.checkpoint:
            write_random_checkpoint(folder, cfg.shape)
        disk_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        measured = run_fresh("bench.load", replace(cfg, checkpoint=str(folder)))
        report({"disk_mb": disk_bytes / MB, "dtype": cfg.dtype, **measured})


def measure(cfg: Config) -> dict:
    """Load a checkpoint, act twice, and return seconds and MB. Raises ValueError or OSError for a broken folder."""
    before_mb = resident_mb()
    start = time.perf_counter()
    policy = load_policy(cfg.checkpoint, getattr(torch, cfg.dtype))
    loaded = time.perf_counter()

    image = np.zeros((480, 640, 3), np.uint8)
    instruction = "pick up the red cube"
    unnorm_key = sorted(policy.norm_stats)[0]
    predict_action(policy, [image], [instruction], unnorm_key)
    first_action = time.perf_counter()
    predict_action(policy, [image], [instruction], unnorm_key)
    second_action = time.perf_counter()

    peak_mb = peak_resident_bytes() / MB
    weights_mb = sum(weight.nbytes for weight in policy.model.state_dict().values()) / MB
    return {
        "load_s": loaded - start,
        "first_action_s": first_action - loaded,
        "second_action_s": second_action - first_action,
        "resident_before_mb": before_mb,
        "peak_mb": peak_mb,
        "weights_mb": weights_mb,
        "peak_over_weights": peak_mb / weights_mb,
    }
