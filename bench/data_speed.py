"""
What `bench.py data` and `bench.py enlarge` do: samples per second of data.py, on data as large as real Bridge episodes.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from bench.common import Config, memory_mb, report


class Peak(threading.Thread):
    """The largest memory of this process and its children, looked at ten times a second."""

    def __init__(self):
        super().__init__(daemon=True)
        self.mb, self.done = 0.0, threading.Event()
        self.start()

    def run(self):
        while not self.done.wait(0.1):
            self.mb = max(self.mb, memory_mb(tree=True))


def write_synthetic(folder: Path, source: Path, episodes: int, steps: int, side: int, seed: int = 0):
    """
    An RLDS dataset `bridge_orig` in `folder`: the real episodes of `source`, their pictures enlarged with noise to
    side x side JPEGs of about 23 kB, lengthened to `steps` steps. What the official pipeline was measured on.
    """
    import shutil

    import simplejpeg
    from PIL import Image

    from formats.rlds import find_dataset, read_records
    from formats.write_rlds import write_tfrecord

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


def enlarge(cfg: Config):
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


def data(cfg: Config):
    """
    Samples per second from a warm index, decoding included, in batches as training takes them; seconds from the start
    of the process to the first batch; memory of all processes; and the limit: decode and resize of the same pictures.
    """
    from data import Mixture, Positions, make_loader, open_mixture
    from image import decode, resize_lanczos3
    from tokenizer import Tokenizer, make_standin

    if "BENCH_LIMIT" in os.environ:  # on one core: CPU seconds to decode and resize one picture
        dataset = open_mixture(cfg.data_root_dir, cfg.data_mix, skip_bad_records=True)[0][0]
        pictures = [dataset[i]["pictures"][0] for i in range(0, min(len(dataset), 400), 2)]
        start = time.process_time()
        for picture in pictures:
            resize_lanczos3(decode(picture), 224)
        return print((time.process_time() - start) / len(pictures))
    peak = Peak()
    with tempfile.TemporaryDirectory() as tmp:
        make_standin(Path(tmp) / "tokenizer.model")
        parts = open_mixture(cfg.data_root_dir, cfg.data_mix, skip_bad_records=True)
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
