"""
How fast and how large: each command prints a table and then one JSON line. BENCHMARKS.md holds what was measured.

    python bench.py load                          # random weights of the 7B shape in a temporary folder: load, act once
    python bench.py load --checkpoint openvla-7b
    python bench.py enlarge --data_root_dir DIR --out BIG        # the Bridge sample with 256 x 256 pictures
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
    data_root_dir: str = ""  # data, enlarge: folder with the datasets
    out: str = "bench"  # enlarge: where the enlarged dataset goes
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
    from tokenizer import make_standin

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


def write_synthetic(folder: Path, source: Path, episodes: int, steps: int, side: int, seed: int = 0):
    """
    An RLDS dataset `bridge_orig` in `folder`: the real episodes of `source`, their pictures enlarged with noise to
    side x side JPEGs of about 23 kB, lengthened to `steps` steps. What the official pipeline was measured on.
    """
    import shutil

    import simplejpeg
    from PIL import Image

    from rlds import find_dataset, read_records
    from toy import write_tfrecord

    old = find_dataset(source, "bridge_orig")
    out = folder / "bridge_orig" / "1.0.0"
    out.mkdir(parents=True)
    for name in ("features.json", "dataset_info.json"):
        shutil.copyfile(old / name, out / name)
    features = (out / "features.json").read_text().replace('"64"', f'"{side}"')
    (out / "features.json").write_text(features)
    info = json.loads((out / "dataset_info.json").read_text())
    info["splits"] = [{**s, "shardLengths": [str(episodes)]} for s in info["splits"] if s["name"] == "train"]
    (out / "dataset_info.json").write_text(json.dumps(info))
    records = [record for path in old.glob("*-train.tfrecord*") for _, record in read_records(path)]
    rng = np.random.default_rng(seed)

    def enlarge(jpeg: bytes) -> bytes:
        small = Image.fromarray(simplejpeg.decode_jpeg(jpeg)).resize((side, side))
        noisy = np.asarray(small).astype(int) + rng.integers(-9, 10, (side, side, 1))
        return simplejpeg.encode_jpeg(np.ascontiguousarray(noisy.clip(0, 255).astype(np.uint8)), 85, "RGB", "420")

    lengthened = [lengthen(records[e % len(records)], steps, enlarge) for e in range(episodes)]
    write_tfrecord(out / "bridge_dataset-train.tfrecord-00000-of-00001", lengthened)


def bench_enlarge(cfg: Config):
    write_synthetic(Path(cfg.out), Path(cfg.data_root_dir), episodes=60, steps=38, side=256)


def lengthen(record: bytes, steps: int, enlarge) -> bytes:
    """A tf.train.Example whose lists go on in a circle until they have `steps` entries per step; JPEGs are enlarged."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    if not hasattr(lengthen, "Example"):  # tf.train.Example, described here because TensorFlow is not installed
        field = descriptor_pb2.FieldDescriptorProto
        file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")
        for name, kind in (
            ("BytesList", field.TYPE_BYTES),
            ("FloatList", field.TYPE_FLOAT),
            ("Int64List", field.TYPE_INT64),
        ):
            file.message_type.add(name=name).field.add(name="value", number=1, type=kind, label=field.LABEL_REPEATED)
        feature = file.message_type.add(name="Feature")
        for i, name in enumerate(("BytesList", "FloatList", "Int64List")):
            one = dict(number=i + 1, type=field.TYPE_MESSAGE, label=field.LABEL_OPTIONAL)
            feature.field.add(name=name.lower(), type_name=f".t.{name}", **one)
        features = file.message_type.add(name="Features")
        entry = features.nested_type.add(name="FeatureEntry")
        entry.options.map_entry = True
        one = dict(label=field.LABEL_OPTIONAL)
        entry.field.add(name="key", number=1, type=field.TYPE_STRING, **one)
        entry.field.add(name="value", number=2, type=field.TYPE_MESSAGE, type_name=".t.Feature", **one)
        many = dict(number=1, type=field.TYPE_MESSAGE, label=field.LABEL_REPEATED)
        features.field.add(name="feature", type_name=".t.Features.FeatureEntry", **many)
        example = file.message_type.add(name="Example")
        example.field.add(name="features", number=1, type=field.TYPE_MESSAGE, type_name=".t.Features", **one)
        pool = descriptor_pool.DescriptorPool()
        pool.Add(file)
        lengthen.Example = message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))
    example = lengthen.Example.FromString(record)
    T = len(example.features.feature["steps/is_first"].int64list.value)
    for key, feature in example.features.feature.items():
        for part in ("byteslist", "floatlist", "int64list"):
            values = list(getattr(feature, part).value)
            if key.startswith("steps/") and values:
                width = len(values) // T
                values = [values[(i % T) * width + j] for i in range(steps) for j in range(width)]
                if "image" in key:
                    values = [enlarge(v) for v in values]
                del getattr(feature, part).value[:]
                getattr(feature, part).value.extend(values)
    return example.SerializeToString()


def bench_data(cfg: Config):
    """
    Samples per second from a warm index, decoding included, in batches as training takes them; seconds from the start
    of the process to the first batch; memory of all processes; and the limit: decode and resize of the same pictures.
    """
    from data import Mixture, Positions, make_loader, open_mixture
    from image import decode, resize_lanczos3
    from tokenizer import Tokenizer, make_standin

    if "BENCH_LIMIT" in os.environ:  # on one core: CPU seconds to decode and resize one picture
        dataset = open_mixture(cfg.data_root_dir, cfg.data_mix)[0][0]
        pictures = [dataset[i]["pictures"][0] for i in range(0, min(len(dataset), 400), 2)]
        start = time.process_time()
        for picture in pictures:
            resize_lanczos3(decode(picture), 224)
        return print((time.process_time() - start) / len(pictures))
    peak = Peak()
    with tempfile.TemporaryDirectory() as tmp:
        make_standin(Path(tmp) / "tokenizer.model")
        parts = open_mixture(cfg.data_root_dir, cfg.data_mix)
        mixture = Mixture(parts, Tokenizer(tmp), image_aug=cfg.image_aug)
        loader = iter(make_loader(mixture, Positions(cfg.batch_size, cfg.batch_size), cfg.num_workers))
        next(loader)
        first = time.time() - process_start()
        for _ in range(2 * cfg.num_workers):
            next(loader)
        cpu, start, n = cpu_seconds(), time.perf_counter(), 0
        while time.perf_counter() - start < cfg.seconds:
            n += len(next(loader)["input_ids"])
        seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
        peak.done.set()
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "BENCH_LIMIT": "1"}
    run = subprocess.run([sys.executable, *sys.argv], env=env, capture_output=True, text=True, check=True)
    limit = float(run.stdout)
    rows = dict(
        data=cfg.data_mix, frames=sum(len(d) for d, _ in parts), image_aug=cfg.image_aug, workers=cfg.num_workers
    )
    rows |= dict(samples_per_s=n / seconds, cpu_ms_per_sample=1e3 * cpu / n, decode_resize_ms=1e3 * limit)
    rows |= dict(share_of_decode_resize_limit=limit * n / cpu, first_batch_s=first, peak_mb_all_processes=peak.mb)
    report(rows)


def process_start() -> float:
    """When this process began, in seconds since the epoch."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(") ", 1)[1].split()[19])
    boot = next(int(x.split()[1]) for x in Path("/proc/stat").read_text().splitlines() if x.startswith("btime"))
    return boot + ticks / os.sysconf("SC_CLK_TCK")


def cpu_seconds() -> float:
    """CPU time of this process and all its living children so far."""
    pids, total = [os.getpid()], 0.0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
        except OSError:
            continue
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            pids += [int(child) for child in task.read_text().split()]
    return total


if __name__ == "__main__":
    commands = {"load": bench_load, "data": bench_data, "enlarge": bench_enlarge}
    if len(sys.argv) < 2 or sys.argv[1] not in (*commands, "--help", "-h"):
        fail(f"usage: python bench.py {{{'|'.join(commands)}}} [--option value ...]; --help lists the options")
    argv = sys.argv[1:] if sys.argv[1].startswith("-") else sys.argv[2:]
    commands.get(sys.argv[1], bench_load)(configure(Config, argv))
