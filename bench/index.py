"""
`python -m bench index`: how fast is a dataset indexed, by one process and by several? It has made-up episodes of 30
steps, each with an image of 15 kB.
"""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from bench.common import Config, report, run_fresh
from bench.data_speed import PeakMemory
from formats import oxe
from formats.rlds_index import open_index
from formats.tfrecord import find_dataset
from formats.write_rlds import write_rlds
from image import encode_jpeg

STEPS = 30
NAME = "noise"
ROW = oxe.Dataset(name=NAME, primary="image", gripper=True, absolute=False)


def bench_index(cfg: Config):
    """Write a dataset, index it in fresh processes, and print MB/s."""
    with tempfile.TemporaryDirectory() as folder:
        write_rlds(folder, {"train": episodes(cfg.episodes)}, NAME)
        megabytes = sum(path.stat().st_size for path in Path(folder).rglob("*.tfrecord*")) / 1e6
        rows = {"episodes": cfg.episodes, "megabytes": megabytes}
        for processes in sorted({1, cfg.processes}):
            measured = run_fresh("bench.index", replace(cfg, data_root_dir=folder, processes=processes))
            rows[f"index_s_{processes}"] = measured["seconds"]
            rows[f"mb_per_s_{processes}"] = megabytes / measured["seconds"]
            rows[f"peak_mb_{processes}"] = measured["peak_mb"]
    report(rows)


def episodes(count: int) -> Iterator[dict]:
    """Yield episodes that differ in their actions, and share a few images."""
    rng = np.random.default_rng(0)
    images = [encode_jpeg(rng.integers(0, 255, (110, 110, 3), np.uint8)) for _ in range(STEPS)]
    for i in range(count):
        action = rng.random((STEPS, 7), np.float32)
        yield {"action": action, "image": images, "state": action, "instruction": f"do {i % 50}"}


def measure(cfg: Config) -> dict:
    """Index the dataset with cfg.processes processes. Returns seconds, and the peak memory of all of them in MB."""
    folder = find_dataset(Path(cfg.data_root_dir), NAME)
    peak = PeakMemory()
    start = time.perf_counter()
    open_index(folder, f"{NAME}-{cfg.processes}", ROW, num_processes=cfg.processes)
    seconds = time.perf_counter() - start
    peak.stop()
    return {"seconds": seconds, "peak_mb": peak.mb}
