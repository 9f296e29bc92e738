"""
Write demonstrations as an RLDS dataset: a folder that TensorFlow Datasets opens, and rlds.py reads. Without TensorFlow.

    write_rlds(folder, {"train": episodes}, name)  ->  folder/name/1.0.0: features.json, dataset_info.json, *.tfrecord-*

RLDS https://arxiv.org/abs/2111.02767, tfrecord and tf.train.Example as in tensorflow/core/lib/io/record_writer.h and
tensorflow/core/example/example.proto. Axes: T steps of an episode, A dimensions of an action, H = W side of a picture.
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


def varint(n: int) -> bytes:
    return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)


def message(number: int, content: bytes) -> bytes:
    """Field `number` of a protocol buffer."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def encode_episode(episode: dict) -> bytes:
    """
    image (T or T + 1, H, H, 3) uint8, state (T, S) and action (T, A) float32, instruction -> a tf.train.Example;
    pictures as JPEG of quality 95, the one after the last action left out.
    """
    T, pictures, entries = len(episode["action"]), [], b""
    for image in episode["image"][:T]:
        Image.fromarray(image).save(file := io.BytesIO(), "JPEG", quality=95)
        pictures.append(file.getvalue())
    last = np.arange(T) == T - 1
    steps = {"observation/image": pictures, "observation/state": episode["state"], "action": episode["action"]}
    steps |= dict(language_instruction=[episode["instruction"].encode()] * T, is_first=np.arange(T) == 0)
    steps |= dict(is_last=last, is_terminal=last, reward=last.astype("<f4"), discount=np.ones(T, "<f4"))
    for key, values in steps.items():  # each flat: bytes_list is field 1, float_list 2, int64_list 3
        if isinstance(values, list):
            feature = message(1, b"".join(message(1, v) for v in values))
        else:
            feature = message(3 if values.dtype == bool else 2, message(1, values.tobytes()))
        entries += message(1, message(1, f"steps/{key}".encode()) + message(2, feature))
    return message(1, entries)


def features_json(image: int, state: int, action: int) -> dict:
    """What features.json says about the steps of `encode_episode`."""

    def feature(name: str, **content) -> dict:
        return dict(pythonClassName=f"tensorflow_datasets.core.features.{name}", **content)

    def tensor(dtype: str, *shape: int, **more: str) -> dict:
        return dict(shape=dict(dimensions=[str(n) for n in shape]) if shape else {}, dtype=dtype, **more)

    def vector(n: int) -> dict:
        return feature("tensor_feature.Tensor", tensor=tensor("float32", n, encoding="none"))

    picture = feature("image_feature.Image", image=tensor("uint8", image, image, 3, encodingFormat="jpeg"))
    text = feature("text_feature.Text", text={})
    seen = dict(features=dict(image=picture, state=vector(state)))
    observation = feature("features_dict.FeaturesDict", featuresDict=seen)
    steps = dict(observation=observation, action=vector(action), language_instruction=text)
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
    """
    Write the episodes of each split to folder/name/1.0.0, `shard` of them to a file. Returns that folder, which
    appears when it is whole and takes the place of an older one.
    """
    to = Path(folder) / name / "1.0.0"
    tmp, infos, sizes = to.with_name(".1.0.0.tmp"), [], {}

    def encode(episode: dict) -> bytes:
        sizes.update({key: episode[key].shape[1] for key in ("image", "state", "action")})
        return encode_episode(episode)

    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    for split, episodes in splits.items():
        lengths, total, records = [], 0, map(encode, episodes)
        while part := list(islice(records, shard)):
            write_tfrecord(tmp / f"part-{len(lengths)}", part)
            lengths, total = [*lengths, str(len(part))], total + sum(map(len, part))
        for i in range(len(lengths)):
            (tmp / f"part-{i}").rename(tmp / f"{name}-{split}.tfrecord-{i:05d}-of-{len(lengths):05d}")
        template = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        infos.append(dict(name=split, filepathTemplate=template, numBytes=str(total), shardLengths=lengths))
    info = dict(name=name, version="1.0.0", fileFormat="tfrecord", moduleName=name, splits=infos)
    (tmp / "features.json").write_text(json.dumps(features_json(**sizes), indent=2))
    (tmp / "dataset_info.json").write_text(json.dumps(info, indent=2))
    shutil.rmtree(to, ignore_errors=True)
    return tmp.rename(to)
