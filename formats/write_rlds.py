"""
Write demonstrations as an RLDS dataset: a folder that TensorFlow Datasets opens, and rlds.py reads. Without TensorFlow.

    write_rlds(folder, {"train": episodes}, name)  ->  folder/name/1.0.0: features.json, dataset_info.json, *.tfrecord-*

An episode is a dict of

    action         (T, A) float32
    instruction    str
    image, ...     images by the name of their camera, (T or T + 1, H, H, 3) uint8, or JPEGs (then see `write_examples`)
    state, ...     vectors by any name, (T, S) float32

    episode -> encode_episode -> a tf.train.Example -> write_tfrecord -> NAME-SPLIT.tfrecord-00000-of-00014

RLDS https://arxiv.org/abs/2111.02767, tfrecord and tf.train.Example as in tensorflow/core/lib/io/record_writer.h and
tensorflow/core/example/example.proto.
Axes: T steps of an episode, A dimensions of an action, S of a state, H = W side of an image.
"""

import shutil
import struct
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from files import write_json
from formats.rlds import masked_crc32c
from image import encode_jpeg

VERSION = "1.0.0"


# -----------------------------------------------------------------------------
# Protocol buffers


def varint(n: int) -> bytes:
    """Return n >= 0 as bytes of seven bits each, the lowest first. The top bit of a byte says that another follows."""
    encoded = bytearray()
    while n >= 128:
        encoded.append(n & 127 | 128)
        n >>= 7
    encoded.append(n)
    return bytes(encoded)


def message(number: int, content: bytes) -> bytes:
    """Return field `number` of a protocol buffer: its key, its length, its content."""
    length_delimited = 2  # the type of fields that hold bytes
    return varint(number << 3 | length_delimited) + varint(len(content)) + content


# -----------------------------------------------------------------------------
# One episode


def encode_episode(episode: dict) -> bytes:
    """Return an episode as an encoded tf.train.Example. Images after the last action are left out."""
    T = len(episode["action"])
    is_last = np.arange(T) == T - 1
    steps = {
        **encode_observations(episode, T),
        "action": episode["action"],
        "language_instruction": [episode["instruction"].encode()] * T,
        "is_first": np.arange(T) == 0,
        "is_last": is_last,
        "is_terminal": is_last,
        "reward": is_last.astype("<f4"),
        "discount": np.ones(T, "<f4"),
    }

    # An Example has Features (field 1), which are entries of a map (field 1 each): name (1) and Feature (2).
    entries = []
    for key, values in steps.items():
        name = f"steps/{key}".encode()
        entries.append(message(1, message(1, name) + message(2, encode_feature(values))))
    return message(1, b"".join(entries))


def encode_observations(episode: dict, T: int) -> dict[str, list[bytes] | np.ndarray]:
    """Return the observations of an episode by their names in a dataset: images as JPEGs, vectors as they are."""
    observations = {}
    for key, values in episode.items():
        if key in ("action", "instruction"):
            continue
        first = values[0]
        if isinstance(first, bytes):
            values = list(values[:T])
        elif first.ndim == 3:
            values = [encode_jpeg(image) for image in values[:T]]
        observations[f"observation/{key}"] = values
    return observations


def encode_feature(values: list[bytes] | np.ndarray) -> bytes:
    """Return a tf.train.Feature. All its values are in one flat list: bytes (field 1), float32 (2) or integers (3)."""
    if isinstance(values, list):
        return message(1, b"".join(message(1, value) for value in values))
    field = 3 if values.dtype == bool else 2
    return message(field, message(1, values.tobytes()))


# -----------------------------------------------------------------------------
# features.json: what the steps of an episode are


def shapes_of(episode: dict) -> dict[str, tuple[int, ...]]:
    """Return the shape of each array of an episode at one step."""
    return {key: values.shape[1:] for key, values in episode.items() if key != "instruction"}


def features_json(shapes: dict[str, tuple[int, ...]]) -> dict:
    """Return the content of features.json, for arrays of these shapes at one step."""
    observations = {key: array_feature(shape) for key, shape in shapes.items() if key != "action"}
    steps = {
        "observation": dict_feature(observations),
        "action": array_feature(shapes["action"]),
        "language_instruction": feature("text_feature.Text", text={}),
        "is_first": scalar_feature("bool"),
        "is_last": scalar_feature("bool"),
        "is_terminal": scalar_feature("bool"),
        "reward": scalar_feature("float32"),
        "discount": scalar_feature("float32"),
    }
    sequence = {"feature": dict_feature(steps), "length": "-1"}
    return dict_feature({"steps": feature("dataset_feature.Dataset", sequence=sequence)})


def feature(name: str, **content) -> dict:
    """Return the JSON of one of the features of TensorFlow Datasets."""
    return {"pythonClassName": f"tensorflow_datasets.core.features.{name}", **content}


def dict_feature(features: dict) -> dict:
    return feature("features_dict.FeaturesDict", featuresDict={"features": features})


def scalar_feature(dtype: str) -> dict:
    return feature("scalar.Scalar", tensor={"shape": {}, "dtype": dtype, "encoding": "none"})


def array_feature(shape: tuple[int, ...]) -> dict:
    """Return the JSON of an image, for a shape (H, W, 3), or of a float32 vector."""
    dimensions = {"dimensions": [str(n) for n in shape]} if shape else {}
    if len(shape) == 3:
        image = {"shape": dimensions, "dtype": "uint8", "encodingFormat": "jpeg"}
        return feature("image_feature.Image", image=image)
    tensor = {"shape": dimensions, "dtype": "float32", "encoding": "none"}
    return feature("tensor_feature.Tensor", tensor=tensor)


# -----------------------------------------------------------------------------
# The folder


def write_rlds(folder: str | Path, splits: dict[str, Iterable[dict]], name: str = "toy", shard: int = 300) -> Path:
    """
    Write a dataset from the episodes of each split, and return its folder. The top of this file says what an episode
    is, `write_examples` says the rest.
    """
    shapes = {}

    def encode(episodes: Iterable[dict]) -> Iterator[bytes]:
        for episode in episodes:
            shapes.update(shapes_of(episode))
            yield encode_episode(episode)

    records = {split: encode(episodes) for split, episodes in splits.items()}
    return write_examples(folder, records, shapes, name, shard)


def write_examples(
    folder: str | Path, splits: dict[str, Iterable[bytes]], shapes: dict, name: str, shard: int = 300
) -> Path:
    """
    Write encoded episodes to folder/name/1.0.0, `shard` of them to a file. Returns that folder. It replaces an older
    one only once it is complete. shapes: as `shapes_of`; they are read after the last episode.
    """
    target = Path(folder) / name / VERSION
    unfinished = target.with_name(f".{VERSION}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)

    split_infos = [write_split(unfinished, name, split, records, shard) for split, records in splits.items()]
    info = {
        "name": name,
        "version": VERSION,
        "fileFormat": "tfrecord",
        "moduleName": name,
        "splits": split_infos,
    }
    write_json(unfinished / "features.json", features_json(shapes))
    write_json(unfinished / "dataset_info.json", info)

    shutil.rmtree(target, ignore_errors=True)
    return unfinished.rename(target)


def write_split(folder: Path, name: str, split: str, records: Iterable[bytes], shard: int) -> dict:
    """Write the files of one split, and return what dataset_info.json says about it."""
    shard_lengths = []
    num_bytes = 0
    remaining = iter(records)
    while part := list(islice(remaining, shard)):
        write_tfrecord(folder / f"part-{len(shard_lengths)}", part)
        shard_lengths.append(len(part))
        num_bytes += sum(len(record) for record in part)

    # The name of a file says how many files there are, which is known only now.
    num_shards = len(shard_lengths)
    for i in range(num_shards):
        file = folder / f"{name}-{split}.tfrecord-{i:05d}-of-{num_shards:05d}"
        (folder / f"part-{i}").rename(file)
    return {
        "name": split,
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        "numBytes": str(num_bytes),
        "shardLengths": [str(length) for length in shard_lengths],
    }


def write_tfrecord(path: Path, records: list[bytes]):
    """Write each record behind its length, both with a checksum. rlds.py reads them again with `read_records`."""
    with open(path, "wb") as file:
        for record in records:
            for part in (struct.pack("<Q", len(record)), record):
                file.write(part + struct.pack("<I", masked_crc32c(part)))
