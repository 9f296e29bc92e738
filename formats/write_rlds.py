"""
Write demonstrations as an RLDS dataset: a folder that TensorFlow Datasets opens, and rlds.py reads. Without TensorFlow.

    write_rlds(folder, {"train": episodes}, name)  ->  folder/name/1.0.0: features.json, dataset_info.json, *.tfrecord-*

RLDS https://arxiv.org/abs/2111.02767, tfrecord and tf.train.Example as in tensorflow/core/lib/io/record_writer.h and
tensorflow/core/example/example.proto.
Axes: T steps of an episode, A dimensions of an action, S of a state, H = W side of a picture.
"""

import io
import json
import shutil
import struct
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

VERSION = "1.0.0"


def varint(n: int) -> bytes:
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


def message(number: int, content: bytes) -> bytes:
    """Field `number` of a protocol buffer."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def jpeg(image: np.ndarray) -> bytes:
    """(H, W, 3) uint8 -> what tf.io.encode_jpeg makes of it by default, which is how such datasets store pictures."""
    Image.fromarray(image).save(file := io.BytesIO(), "JPEG", quality=95)
    return file.getvalue()


def encode_episode(episode: dict) -> bytes:
    """
    action (T, A) float32, instruction, and observations by name: vectors (T, S) float32 and pictures, (T or T + 1, H,
    H, 3) uint8 or JPEGs -> a tf.train.Example. What comes after the last action is left out.
    """
    T, entries = len(episode["action"]), b""
    last, steps = np.arange(T) == T - 1, {}
    for key, values in episode.items():
        if key not in ("action", "instruction"):
            picture = isinstance(values[0], bytes) or values[0].ndim == 3
            encoded = [v if isinstance(v, bytes) else jpeg(v) for v in values[:T]] if picture else values
            steps[f"observation/{key}"] = encoded
    steps |= dict(action=episode["action"], language_instruction=[episode["instruction"].encode()] * T)
    steps |= dict(is_first=np.arange(T) == 0, is_last=last, is_terminal=last)
    steps |= dict(reward=last.astype("<f4"), discount=np.ones(T, "<f4"))
    for key, values in steps.items():  # each flat: bytes_list is field 1, float_list 2, int64_list 3
        if isinstance(values, list):
            feature = message(1, b"".join(message(1, v) for v in values))
        else:
            feature = message(3 if values.dtype == bool else 2, message(1, values.tobytes()))
        entries += message(1, message(1, f"steps/{key}".encode()) + message(2, feature))
    return message(1, entries)


def shapes_of(episode: dict) -> dict[str, tuple[int, ...]]:
    """The shape of each array of `encode_episode`'s episode at one step."""
    return {key: values.shape[1:] for key, values in episode.items() if key != "instruction"}


def features_json(shapes: dict[str, tuple[int, ...]]) -> dict:
    """What features.json says about the steps of `encode_episode`."""

    def feature(name: str, **content) -> dict:
        return dict(pythonClassName=f"tensorflow_datasets.core.features.{name}", **content)

    def tensor(dtype: str, *shape: int, **more: str) -> dict:
        return dict(shape=dict(dimensions=[str(n) for n in shape]) if shape else {}, dtype=dtype, **more)

    def array(shape: tuple[int, ...]) -> dict:
        if len(shape) == 3:
            return feature("image_feature.Image", image=tensor("uint8", *shape, encodingFormat="jpeg"))
        return feature("tensor_feature.Tensor", tensor=tensor("float32", *shape, encoding="none"))

    seen = dict(features={key: array(shape) for key, shape in shapes.items() if key != "action"})
    observation = feature("features_dict.FeaturesDict", featuresDict=seen)
    text = feature("text_feature.Text", text={})
    steps = dict(observation=observation, action=array(shapes["action"]), language_instruction=text)
    for key in ("is_first", "is_last", "is_terminal", "reward", "discount"):
        dtype = "bool" if key.startswith("is_") else "float32"
        steps[key] = feature("scalar.Scalar", tensor=tensor(dtype, encoding="none"))
    steps = feature("features_dict.FeaturesDict", featuresDict=dict(features=steps))
    steps = feature("dataset_feature.Dataset", sequence=dict(feature=steps, length="-1"))
    return feature("features_dict.FeaturesDict", featuresDict=dict(features=dict(steps=steps)))


def write_tfrecord(path: Path, records: list[bytes]):
    """Each record behind its length, both with a checksum (crc32c, rotated and offset)."""
    from google_crc32c import value as crc32c

    with open(path, "wb") as f:
        for part in (part for record in records for part in (struct.pack("<Q", len(record)), record)):
            crc = crc32c(part)
            f.write(part + struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF))


def write_rlds(folder: str | Path, splits: dict[str, Iterable[dict]], name: str = "toy", shard: int = 300) -> Path:
    """Write the episodes of each split as `encode_episode` takes them; else as `write_examples`."""
    shapes: dict = {}

    def encode(episode: dict) -> bytes:
        shapes.update(shapes_of(episode))
        return encode_episode(episode)

    return write_examples(folder, {s: map(encode, episodes) for s, episodes in splits.items()}, shapes, name, shard)


def write_examples(folder: str | Path, splits: dict[str, Iterable[bytes]], shapes: dict, name: str, shard=300) -> Path:
    """
    Write encoded episodes to folder/name/1.0.0, `shard` of them to a file. Returns that folder, which appears when it
    is whole and takes the place of an older one. shapes: as `shapes_of`, looked at last.
    """
    to = Path(folder) / name / VERSION
    tmp, infos = to.with_name(f".{VERSION}.tmp"), []
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    for split, records in splits.items():
        lengths, total, records = [], 0, iter(records)
        while part := list(islice(records, shard)):
            write_tfrecord(tmp / f"part-{len(lengths)}", part)
            lengths, total = [*lengths, str(len(part))], total + sum(map(len, part))
        for i in range(len(lengths)):
            (tmp / f"part-{i}").rename(tmp / f"{name}-{split}.tfrecord-{i:05d}-of-{len(lengths):05d}")
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        infos.append(dict(name=split, filepathTemplate=template, numBytes=str(total), shardLengths=lengths))
    info = dict(name=name, version=VERSION, fileFormat="tfrecord", moduleName=name, splits=infos)
    (tmp / "features.json").write_text(json.dumps(features_json(shapes), indent=2))
    (tmp / "dataset_info.json").write_text(json.dumps(info, indent=2))
    shutil.rmtree(to, ignore_errors=True)
    return tmp.rename(to)
