"""
Write demonstrations as an RLDS dataset: a folder that TensorFlow Datasets opens, and rlds.py reads. Without TensorFlow.

    write_rlds(folder, {"train": episodes}, name)  ->  folder/name/1.0.0: features.json, dataset_info.json, *.tfrecord-*

An episode is a dict of

    action         (T, A) numbers, stored as float32
    instruction    str
    image, ...     images by the name of their camera, (T or T + 1, H, W, 3) uint8, or a list of as many JPEGs
    state, ...     vectors by any name, (T or T + 1, S) numbers, stored as float32

All episodes have the same keys and shapes. What does not fit is refused, with the episode and the key.

    python -m formats.write_rlds DIR/my_robot/1.0.0     a dataset in ArrayRecord: write it as tfrecord, too

    episode -> encode_episode -> a tf.train.Example -> write_tfrecord -> NAME-SPLIT.tfrecord-00000-of-00014

RLDS https://arxiv.org/abs/2111.02767, tfrecord and tf.train.Example as in tensorflow/core/lib/io/record_writer.h and
tensorflow/core/example/example.proto.
Axes: T steps of an episode, A dimensions of an action, S of a state, H and W height and width of an image.
"""

import re
import shutil
import struct
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from configurator import fail
from files import atomic_write, read_json_object, write_json
from formats.protobuf import message
from formats.tfrecord import FORMAT, masked_crc32c
from image import decode, encode_jpeg
from progress import show_progress

VERSION = "1.0.0"
JPEG_START = b"\xff\xd8"


# -----------------------------------------------------------------------------
# One episode


def encode_episode(episode: dict) -> bytes:
    """
    Return an episode as an encoded tf.train.Example. Observations after the last action are left out. Raises ValueError
    that names what does not fit.
    """
    action, observations = convert_episode(episode)
    T = len(action)
    is_last = np.arange(T) == T - 1
    steps = {
        **{f"observation/{key}": values for key, values in observations.items()},
        "action": action,
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


def convert_episode(episode: dict) -> tuple[np.ndarray, dict[str, np.ndarray | list[bytes]]]:
    """
    Return the actions (T, A) and the observations of an episode as they are stored: vectors (T, S) as float32, images
    as T JPEGs. Raises ValueError that names what does not fit.
    """
    missing = {"action", "instruction"} - episode.keys()
    if missing:
        raise ValueError(f"it has no {sorted(missing)}, its keys are {sorted(episode)}")
    if not isinstance(episode["instruction"], str):
        raise ValueError(f"instruction: expected a str, found {episode['instruction']!r:.80}")
    action = to_float32("action", episode["action"])
    if action.ndim != 2 or not len(action):
        raise ValueError(f"action: expected (T, A) with at least one step, found {action.shape}")
    if not np.isfinite(action).all():
        raise ValueError("action: it has numbers that are not finite")

    observations = {}
    for key, values in episode.items():
        if key in ("action", "instruction"):
            continue
        steps = encode_images(key, values) if is_images(values) else to_float32(key, values)
        T = len(action)
        num_steps = len(steps) if np.ndim(steps) else 0
        if num_steps not in (T, T + 1):
            raise ValueError(f"{key}: {num_steps} steps, but there are {T} actions")
        observations[key] = steps[:T]
    return action, observations


def is_images(values) -> bool:
    """Return True for images: arrays (H, W, 3), or encoded ones."""
    first = next(iter(values), None) if np.iterable(values) else None
    return isinstance(first, bytes) or getattr(first, "ndim", 0) == 3


def encode_images(key: str, values) -> list[bytes]:
    """Return images as JPEGs. Raises ValueError if they are neither JPEGs nor (T, H, W, 3) uint8."""
    if isinstance(values[0], bytes):
        if not all(isinstance(jpeg, bytes) and jpeg.startswith(JPEG_START) for jpeg in values):
            raise ValueError(f"{key}: expected JPEGs, found other bytes; give arrays (T, H, W, 3) uint8")
        return list(values)
    images = np.asarray(values)
    if images.dtype != np.uint8 or images.shape[3] != 3:
        raise ValueError(f"{key}: expected images (T, H, W, 3) uint8, found {images.shape} {images.dtype}")
    return [encode_jpeg(image) for image in images]


def to_float32(key: str, values) -> np.ndarray:
    """Return numbers as float32. Raises ValueError for what is no number, or too large for it."""
    try:
        numbers = np.asarray(values)
    except (ValueError, TypeError) as error:  # rows of different length
        raise ValueError(f"{key}: expected an array of numbers ({error!s:.100})") from None
    is_number = numbers.dtype.kind in "fiub"
    if not is_number:
        raise ValueError(f"{key}: expected numbers that fit into float32, found dtype {numbers.dtype}")

    with np.errstate(over="ignore"):
        converted = numbers.astype("<f4")
    if numbers.dtype.kind == "f":
        fits = np.array_equal(np.isfinite(converted), np.isfinite(numbers))
    else:
        fits = np.array_equal(converted, numbers)
    if not fits:
        raise ValueError(f"{key}: {numbers.dtype} numbers that float32 cannot hold")
    return converted


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
    shapes = {}
    for key, values in episode.items():
        if key == "instruction":
            continue
        first = values[0]
        shapes[key] = decode(first).shape if isinstance(first, bytes) else np.shape(first)
    return shapes


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
    check_name(name, "dataset")
    shapes = {}

    def encode(split: str, episodes: Iterable[dict]) -> Iterator[bytes]:
        check_name(split, "split")
        for number, episode in enumerate(episodes):
            try:
                record = encode_episode(episode)
                compare_shapes(shapes, shapes_of(episode))
            except ValueError as error:
                raise ValueError(f"{split}, episode {number}: {error}") from None
            yield record

    records = {split: encode(split, episodes) for split, episodes in splits.items()}
    return write_examples(folder, records, shapes, name, shard)


def check_name(name: str, purpose: str):
    """Raise ValueError for a name that cannot be part of the names of files."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"a {purpose} cannot be called {name!r}; use letters, digits and _")


def compare_shapes(shapes: dict, of_episode: dict):
    """Raise ValueError if the shapes of an episode are not those of the first one, which are taken into `shapes`."""
    if not shapes:
        shapes.update(of_episode)
    for key in {**shapes, **of_episode}:
        if shapes.get(key) != of_episode.get(key):
            expected = shapes.get(key, "no such key")
            found = of_episode.get(key, "no such key")
            raise ValueError(f"{key}: expected {expected} at each step, as in the first episode, found {found}")


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
    if "action" not in shapes:
        raise ValueError(f"{target}: there are no episodes to write")
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


def write_tfrecord(path: Path, records: Iterable[bytes]):
    """Write each record behind its length, both with a checksum. rlds.py reads them again with `read_records`."""
    with open(path, "wb") as file:
        for record in records:
            for part in (struct.pack("<Q", len(record)), record):
                file.write(part + struct.pack("<I", masked_crc32c(part)))


# -----------------------------------------------------------------------------
# Command line: from ArrayRecord, in which newer versions of TFDS store data


def convert_array_record(folder: Path):
    """Write a tfrecord file beside each ArrayRecord file of a dataset, and say so in its dataset_info.json."""
    from array_record.python.array_record_module import ArrayRecordReader

    info = read_json_object(folder / "dataset_info.json")
    paths = sorted(folder.glob("*.array_record*"))
    if not paths:
        raise ValueError(f"{folder}: no ArrayRecord files; give the version folder, such as DIR/my_robot/1.0.0")
    for path in show_progress(paths, "converting", "files"):
        reader = ArrayRecordReader(str(path))
        records = (reader.read([i])[0] for i in range(reader.num_records()))
        with atomic_write(folder / path.name.replace("array_record", FORMAT)) as temporary:
            write_tfrecord(temporary, records)
    write_json(folder / "dataset_info.json", {**info, "fileFormat": FORMAT})


if __name__ == "__main__":
    if len(sys.argv) != 2:
        fail("give the version folder of a dataset in ArrayRecord, such as DIR/my_robot/1.0.0")
    try:
        convert_array_record(Path(sys.argv[1]))
    except ImportError as error:
        fail(f"{error}: pip install array_record")
    except (ValueError, OSError, RuntimeError) as error:
        fail(error)
