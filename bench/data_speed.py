"""
`python -m bench data`: samples per second of data.py. `python -m bench enlarge`: data for it, as large as real Bridge
episodes, from a small sample of them.

    64 x 64 images of the sample -> enlarged to 256 x 256 with noise -> episodes of 38 steps -> an RLDS dataset
    -> decode, resize, augment, tokenize, batch -> samples per second

The same images are then only decoded and resized, on one core: the limit that the pipeline is compared with.
"""

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from bench.common import Config, process_tree, report, run_fresh, tree_mb
from data import Mixture, Positions, make_loader, open_mixture
from formats.tfrecord import find_dataset, read_records
from formats.write_rlds import write_tfrecord
from image import decode, resize_lanczos3
from tokenizer import Tokenizer, make_standin

IMAGE_SIZE = 224  # pixels, of the images that the model gets
LIMIT_IMAGES = 200  # that are decoded and resized for the limit


# -----------------------------------------------------------------------------
# Speed


def bench_data(cfg: Config):
    """Measure the data pipeline and its limit, each in a fresh process, and print both."""
    speed = run_fresh("bench.data_speed", cfg, "speed")
    limit_s = run_fresh("bench.data_speed", cfg, "limit", threads=1)["decode_resize_s"]
    report(
        {
            "data": cfg.data_mix,
            "frames": speed["frames"],
            "image_aug": cfg.image_aug,
            "workers": cfg.num_workers,
            "samples_per_s": speed["samples_per_s"],
            "cpu_ms_per_sample": 1e3 * speed["cpu_s_per_sample"],
            "decode_resize_ms": 1e3 * limit_s,
            "share_of_decode_resize_limit": limit_s / speed["cpu_s_per_sample"],
            "first_batch_s": speed["first_batch_s"],
            "peak_mb_all_processes": speed["peak_mb_all_processes"],
        }
    )


def measure(cfg: Config, part: str) -> dict:
    """Return what one of the two fresh processes measures."""
    if part == "speed":
        return measure_speed(cfg)
    return measure_limit(cfg)


def measure_speed(cfg: Config) -> dict:
    """
    Return samples per second from a warm index, in batches as training takes them; CPU time per sample; seconds from
    the start of this process to the first batch; and the memory of all processes.
    """
    peak = PeakMemory()
    with tempfile.TemporaryDirectory() as temporary:
        make_standin(Path(temporary) / "tokenizer.model")
        parts = open_mixture(cfg.data_root_dir, cfg.data_mix, skip_bad_records=True)
        mixture = Mixture(parts, Tokenizer(temporary), image_aug=cfg.image_aug)
        positions = Positions(cfg.batch_size, cfg.batch_size)
        batches = iter(make_loader(mixture, positions, cfg.num_workers))

        next(batches)
        first_batch_s = time.time() - process_start()
        for _ in range(2 * cfg.num_workers):  # those that were prepared while the workers started
            next(batches)

        num_samples = 0
        cpu_before = cpu_seconds()
        start = time.perf_counter()
        while time.perf_counter() - start < cfg.seconds:
            num_samples += len(next(batches)["input_ids"])
        seconds = time.perf_counter() - start
        cpu = cpu_seconds() - cpu_before
        peak.stop()
    return {
        "frames": sum(len(dataset) for dataset, _ in parts),
        "samples_per_s": num_samples / seconds,
        "cpu_s_per_sample": cpu / num_samples,
        "first_batch_s": first_batch_s,
        "peak_mb_all_processes": peak.mb,
    }


def measure_limit(cfg: Config) -> dict:
    """Return the CPU seconds in which one core decodes and resizes an image of the dataset."""
    dataset, _ = open_mixture(cfg.data_root_dir, cfg.data_mix, skip_bad_records=True)[0]
    frames = range(0, min(len(dataset), 2 * LIMIT_IMAGES), 2)
    encoded = [dataset[i]["pictures"][0] for i in frames]
    start = time.process_time()
    for data in encoded:
        resize_lanczos3(decode(data), IMAGE_SIZE)
    return {"decode_resize_s": (time.process_time() - start) / len(encoded)}


class PeakMemory(threading.Thread):
    """The largest memory of this process and its children, looked at ten times a second."""

    def __init__(self):
        super().__init__(daemon=True)
        self.mb = 0.0
        self.stopped = threading.Event()
        self.start()

    def run(self):
        while not self.stopped.wait(0.1):
            self.mb = max(self.mb, tree_mb())

    def stop(self):
        self.stopped.set()


def process_start() -> float:
    """Return when this process began, in seconds since the epoch."""
    ticks_after_boot = int(stat_fields(os.getpid())[19])
    for line in Path("/proc/stat").read_text().splitlines():
        if line.startswith("btime"):
            boot = int(line.split()[1])
    return boot + ticks_after_boot / os.sysconf("SC_CLK_TCK")


def cpu_seconds() -> float:
    """Return the CPU time so far of this process and all its living children."""
    ticks = 0
    for pid in process_tree():
        try:
            fields = stat_fields(pid)
        except OSError:
            continue  # it has ended
        ticks += int(fields[11]) + int(fields[12])  # user and system time
    return ticks / os.sysconf("SC_CLK_TCK")


def stat_fields(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat that come after the program's name, which may hold blanks."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()


# -----------------------------------------------------------------------------
# Data as large as the real one


def bench_enlarge(cfg: Config):
    """Write the enlarged dataset that the official pipeline was measured on, too."""
    write_enlarged(Path(cfg.out), Path(cfg.data_root_dir), num_episodes=60, num_steps=38, size=256)


def write_enlarged(folder: Path, source: Path, num_episodes: int, num_steps: int, size: int, seed: int = 0):
    """
    Write an RLDS dataset `bridge_orig` into a folder: the real episodes of `source`, lengthened to `num_steps` steps,
    their images enlarged with noise to JPEGs of size x size pixels and about 23 kB.
    """
    small = find_dataset(source, "bridge_orig")
    out = folder / "bridge_orig" / "1.0.0"
    out.mkdir(parents=True)
    features = (small / "features.json").read_text().replace('"64"', f'"{size}"')
    (out / "features.json").write_text(features)

    info = json.loads((small / "dataset_info.json").read_text())
    train = next(split for split in info["splits"] if split["name"] == "train")
    info["splits"] = [{**train, "shardLengths": [str(num_episodes)]}]
    (out / "dataset_info.json").write_text(json.dumps(info))

    rng = np.random.default_rng(seed)

    def enlarge(jpeg: bytes) -> bytes:
        return enlarge_jpeg(jpeg, size, rng)

    records = []
    for path in small.glob("*-train.tfrecord*"):
        records += [record for _, record in read_records(path)]
    episodes = [lengthen(records[i % len(records)], num_steps, enlarge) for i in range(num_episodes)]
    write_tfrecord(out / "bridge_dataset-train.tfrecord-00000-of-00001", episodes)


def enlarge_jpeg(jpeg: bytes, size: int, rng: np.random.Generator) -> bytes:
    """Return a JPEG of size x size pixels, with noise: without it, it would be far smaller than a real one."""
    import simplejpeg

    image = Image.fromarray(simplejpeg.decode_jpeg(jpeg)).resize((size, size))
    noisy = np.asarray(image).astype(int) + rng.integers(-9, 10, (size, size, 1))
    noisy = np.ascontiguousarray(noisy.clip(0, 255).astype(np.uint8))
    return simplejpeg.encode_jpeg(noisy, quality=85, colorspace="RGB", colorsubsampling="420")


def lengthen(record: bytes, num_steps: int, enlarge: Callable[[bytes], bytes]) -> bytes:
    """Return an episode, a tf.train.Example, that repeats its steps until it has `num_steps`, with enlarged JPEGs."""
    example = example_class().FromString(record)
    features = example.features.feature
    old_steps = len(features["steps/is_first"].int64list.value)
    for key in sorted(features):  # so that the noise is the same each time
        if not key.startswith("steps/"):
            continue
        feature = features[key]
        for kind in ("byteslist", "floatlist", "int64list"):
            field = getattr(feature, kind).value
            if not field:
                continue
            values = repeat_steps(list(field), old_steps, num_steps)
            if "image" in key:
                values = [enlarge(jpeg) for jpeg in values]
            del field[:]
            field.extend(values)
    return example.SerializeToString(deterministic=True)


def repeat_steps(values: list, old_steps: int, num_steps: int) -> list:
    """Return the values of `num_steps` steps, from those of `old_steps`, which are as many for each step."""
    per_step = len(values) // old_steps
    repeated = []
    for i in range(num_steps):
        first = (i % old_steps) * per_step
        repeated += values[first : first + per_step]
    return repeated


@lru_cache
def example_class():
    """Return tf.train.Example, described here because TensorFlow need not be installed."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")

    # message BytesList { repeated bytes value = 1; } and likewise for the others
    kinds = {"BytesList": field.TYPE_BYTES, "FloatList": field.TYPE_FLOAT, "Int64List": field.TYPE_INT64}
    for name, kind in kinds.items():
        values = file.message_type.add(name=name)
        values.field.add(name="value", number=1, type=kind, label=field.LABEL_REPEATED)

    # message Feature { BytesList byteslist = 1; FloatList floatlist = 2; Int64List int64list = 3; }
    feature = file.message_type.add(name="Feature")
    for number, name in enumerate(kinds, start=1):
        add_message_field(feature, name.lower(), number, f".t.{name}")

    # message Features { map<string, Feature> feature = 1; }
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    add_message_field(entry, "value", 2, ".t.Feature")
    add_message_field(features, "feature", 1, ".t.Features.FeatureEntry", is_repeated=True)

    # message Example { Features features = 1; }
    example = file.message_type.add(name="Example")
    add_message_field(example, "features", 1, ".t.Features")

    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


def add_message_field(message, name: str, number: int, type_name: str, is_repeated: bool = False):
    """Add a field that holds another message to the description of a message."""
    from google.protobuf.descriptor_pb2 import FieldDescriptorProto

    label = FieldDescriptorProto.LABEL_REPEATED if is_repeated else FieldDescriptorProto.LABEL_OPTIONAL
    message.field.add(
        name=name, number=number, type=FieldDescriptorProto.TYPE_MESSAGE, type_name=type_name, label=label
    )
