"""
RLDS folders (TFDS tfrecords) -> frames by number, without TensorFlow.

    frames = RLDS("~/data", "bridge_orig")
    frames[0]["pictures"], frames[0]["actions"], frames[0]["instruction"], frames.statistics["action"]["q01"]

Open X-Embodiment is stored as RLDS: an episode is one record of about 2 MB, with its images encoded.

    first run    tfrecord files -> read_records -> read_trajectory -> index_trajectory -> write_index
    later        frame number -> index: action, state, and the places of instruction and images -> one read per image

The first run reads every record once, verifies it, standardises it and writes an index. From then on a frame costs one
read of one image: 20 to 100 kB at a known place. No episode is read or parsed for the sake of one frame. So the order
of frames is free. Memory does not grow with the data, because the index is memory-mapped. Where scattered reads are
slow (a network drive), copy the data to a local disk first.

The index lies beside the data, or in a cache folder. Its name holds a fingerprint of the data, so edited data is
indexed anew. RLDS: https://arxiv.org/abs/2111.02767; statistics as in prismatic/vla/datasets/rlds/utils/data_utils.py
of github.com/openvla/openvla.

Axes: T steps of an episode, N frames of all episodes, V views (cameras), K steps of an action chunk, A action
dimensions, P state dimensions.
"""

import hashlib
import inspect
import json
import os
import re
import shutil
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from files import atomic_write, read_json_object, write_json
from formats import oxe
from formats.dataset import HOLD_OUT
from normalize import SCHEME, compute_statistics, normalize
from progress import no_progress

# The tables of an index, one file each for every split. `write_index` says what their columns are.
TABLES = {"action": "<f4", "proprio": "<f4", "frames": "<i8", "episodes": "<i8"}

MAX_RECORD = 1 << 30  # bytes of an episode; the largest of Open X-Embodiment have about a tenth of it
DAY = 24 * 60 * 60  # seconds


# -----------------------------------------------------------------------------
# Files and records


def find_dataset(data_root_dir: str | Path, name: str) -> Path:
    """Return the newest version folder of a dataset. Raises FileNotFoundError with what is there instead."""
    root = Path(data_root_dir)
    folders = [path.parent for path in (root / name).glob("*/features.json")]
    if folders:
        return max(folders, key=version_number)

    others = sorted(path.parent.parent.name for path in root.glob("*/*/features.json"))
    content = f"it has: {', '.join(others)}" if others else "no RLDS dataset is in it"
    raise FileNotFoundError(
        f"{root / name}: no dataset (DIR/{name}/VERSION/features.json is looked for) in --data_root_dir {root}; "
        f"{content}. docs/your-data.md says where to get data; `python quickstart.py` makes its own"
    )


def version_number(folder: Path) -> list[int]:
    """Return "10.0.0" as [10, 0, 0], so that it is newer than "9.0.0". A part that is no number counts as -1."""
    return [int(part) if part.isdecimal() else -1 for part in folder.name.split(".")]


def masked_crc32c(data: bytes) -> int:
    """Return the checksum of a tfrecord file: crc32c, rotated by 15 bits, plus a constant."""
    import google_crc32c

    crc = google_crc32c.value(data)
    rotated = crc >> 15 | crc << 17
    return (rotated + 0xA282EAD8) & 0xFFFFFFFF


def has_checksum(data: bytes, checksum: bytes) -> bool:
    """Return True if `checksum`, as stored in a tfrecord file, is that of `data`."""
    return masked_crc32c(data) == int.from_bytes(checksum, "little")


def raise_or_skip(problem: str, on_bad: Callable[[str], None] | None):
    """Call on_bad(problem). Raises ValueError if there is no such function."""
    if on_bad is None:
        raise ValueError(f"{problem}, or --skip_bad_records")
    on_bad(problem)


def read_records(
    path: Path, on_bad: Callable[[str], None] | None = None, num_records: int | None = None
) -> Iterator[tuple[int, bytes]]:
    """
    Yield (offset, content) of each record of a tfrecord file, whose parts are

        length of the content (8 bytes), checksum of the length (4), content, checksum of the content (4)

    Raises ValueError for a broken record, or if there are not `num_records` of them. With `on_bad` it calls
    on_bad(message) instead, and goes on with the next record where that can be found.
    """
    if not path.is_file():
        raise ValueError(f"{path}: not a file; get it again")
    size = path.stat().st_size
    offset = 0
    number = 0
    with open(path, "rb") as file:
        while offset < size:
            header = file.read(12)
            length = int.from_bytes(header[:8], "little")
            end = offset + 12 + length + 4

            problem = ""
            if len(header) < 12 or not has_checksum(header[:8], header[8:]):
                problem = "its length has a wrong checksum, so the rest of the file cannot be read"
                end = size
            elif length > MAX_RECORD:
                problem = f"it has {length:,} bytes, an episode has at most {MAX_RECORD:,}"
            elif end > size:
                problem = f"cut off, {size - offset:,} bytes of {end - offset:,}"
            else:
                content = file.read(length)
                if not has_checksum(content, file.read(4)):
                    problem = "wrong checksum"

            if not problem:
                yield offset + 12, content
            else:
                raise_or_skip(f"{path}: record {number} at byte {offset}: {problem}; get the file again", on_bad)
            offset = end
            number += 1

    if num_records is not None and number != num_records:
        raise_or_skip(f"{path}: {number} records, dataset_info.json says {num_records}; get the file again", on_bad)


def read_splits(folder: Path) -> dict[str, list[int] | None]:
    """
    Return the splits of a dataset, and how many records each of their files has (None if dataset_info.json does not
    say). Raises OSError or ValueError that names dataset_info.json.
    """
    path = folder / "dataset_info.json"
    info = read_json_object(path)
    splits = {}
    try:
        for entry in info["splits"]:
            lengths = entry.get("shardLengths")
            splits[str(entry["name"])] = None if lengths is None else [int(length) for length in lengths]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path}: its splits are not as expected ({describe(error)}); get it again") from None

    for name in splits:
        if not re.fullmatch(r"[\w-][\w.-]*", name):  # it becomes part of names of files
            raise ValueError(f"{path}: a split cannot be called {name!r}; get it again")
    return splits


def find_shards(
    folder: Path, split: str, lengths: list[int] | None, on_bad: Callable[[str], None] | None
) -> dict[Path, int | None]:
    """
    Return the files of a split, and how many records each has (None: not known). lengths: those of `read_splits`.
    Raises ValueError for a file that is missing or too many; with `on_bad` it calls on_bad(message) instead.
    """
    files = sorted(folder.glob(f"*-{split}.tfrecord*"))
    if lengths is None:
        return dict.fromkeys(files)

    # Files without a number are taken in the order of their names.
    is_numbered = any("-of-" in path.name for path in files)
    if not is_numbered and len(files) == len(lengths):
        return dict(zip(files, lengths, strict=True))

    endings = [f"-{i:05d}-of-{len(lengths):05d}" for i in range(len(lengths))]
    missing = dict(zip(endings, lengths, strict=True))
    shards = {}
    for path in files:
        ending = path.name.rpartition(".tfrecord")[2]
        if ending in missing:
            shards[path] = missing.pop(ending)
        else:
            raise_or_skip(f"{path}: none of the {len(lengths)} files that dataset_info.json lists; remove it", on_bad)
    for ending, length in missing.items():
        if length:
            file = folder / f"*-{split}.tfrecord{ending}"
            raise_or_skip(f"{file}: missing, dataset_info.json says it has {length} episodes; get it", on_bad)
    return shards


# -----------------------------------------------------------------------------
# One episode: parse and standardise


def read_trajectory(parser, record: bytes, row: oxe.Dataset, rng: np.random.Generator) -> dict:
    """
    Return the standardised trajectory of a record: a nested dict of arrays with leading axis T, images still encoded.
    Raises ValueError for an episode without steps, or whose actions are not finite or not as many as the row says.
    """
    # Parse.
    try:
        episode = parser.parse_example(record)
        steps = dict(episode.pop("steps"))
    except Exception as error:  # TensorFlow Datasets and protobuf raise what they like
        raise ValueError(f"it does not fit features.json ({describe(error)})") from None
    T = count_steps(steps["action"])
    if T == 0:
        raise ValueError("an empty episode")
    steps["traj_metadata"] = {key: repeat(value, T) for key, value in episode.items()}

    # Standardise.
    trajectory = oxe.standardize(row, steps, rng)

    # Check.
    action = np.asarray(trajectory["action"], np.float32)  # (T, A)
    if action.ndim != 2 or action.shape[1] != row.action_dim:
        raise ValueError(f"action has shape {action.shape}, {row.action_encoding} means (T, {row.action_dim})")
    broken = np.argwhere(~np.isfinite(action))
    if len(broken):
        raise ValueError(f"action {broken[0].tolist()} (step, dimension) is not finite")
    if not len(action):
        raise ValueError("no step is left of this episode after its standardise function")
    return {**trajectory, "action": action}


def describe(error: Exception) -> str:
    """Return the kind of an error and the beginning of its message, which can hold a whole record."""
    return f"{type(error).__name__}: {str(error)[:200]}"


def count_steps(action: np.ndarray | dict) -> int:
    """Return T of a raw action. Some datasets store it as a dict of its parts."""
    if isinstance(action, dict):
        action = next(iter(action.values()))
    return len(action)


def repeat(tree, T: int):
    """Return episode metadata, a nested dict, with every value once for each step."""
    if isinstance(tree, dict):
        return {key: repeat(value, T) for key, value in tree.items()}
    return np.repeat(np.array(tree)[None], T, axis=0)


def get_key(observation: dict, path: str, purpose: str):
    """
    Return observation["a"]["b"] for the path "a/b", or observation["a/b"] if there is such a key. Raises ValueError
    with the keys that are there. purpose: what the key is for, "camera" or "state".
    """
    parts = [path] if path in observation else path.split("/")
    tree = observation
    for part in parts:
        if part not in tree:
            raise ValueError(f"no {purpose} {path!r} in the observation, which has {sorted(observation)}; fix its row")
        tree = tree[part]
    return tree


def read_proprio(trajectory: dict, keys: tuple[str | None, ...], T: int) -> np.ndarray:
    """Return the robot's state (T, P) float32: the columns that a row names, a column of zeros for each None."""
    columns = [np.zeros((T, 0), np.float32)]  # P = 0 if the row names no state
    for key in keys:
        if key is None:
            columns.append(np.zeros((T, 1), np.float32))
        else:
            column = get_key(trajectory["observation"], key, "state")
            columns.append(np.asarray(column, np.float32).reshape(T, -1))
    return np.concatenate(columns, axis=1)


# -----------------------------------------------------------------------------
# The index: one pass over all records


@dataclass
class IndexedEpisode:
    """What the index keeps of one record."""

    action: np.ndarray  # (T, A) float32
    proprio: np.ndarray  # (T, P) float32
    places: np.ndarray  # (T, 2 + 3 V) int64: columns 1 and on of the table `frames`, see `write_index`
    has_instruction: bool


def write_index(out: Path, folder: Path, name: str, row: oxe.Dataset, skip_bad_records: bool, progress: Callable):
    """
    Read every record of a dataset once, and write its index into the folder `out`.

    SPLIT.action    (N, A) float32, standardised actions in robot units
    SPLIT.proprio   (N, P) float32, states
    SPLIT.frames    (N, 3 + 3 V) int64: number of the episode; offset and length of the instruction in `text`; then for
                    each view offset in its tfrecord file, length and crc32 of the encoded image
    SPLIT.episodes  (episodes, 4) int64: number of the file, first frame, number of frames T, 1 if it has an instruction
    text            the instructions, one behind the other
    index.json      sizes, names of files and views, bad records, statistics

    Raises ValueError for a record that is broken or does not fit its row. With `skip_bad_records` such records are left
    out and listed; then it raises ValueError only if nothing is left.
    """
    parser = make_parser(folder)
    rng = np.random.default_rng(zlib.crc32(name.encode()))  # DROID: which of its two cameras an episode shows
    bad_records = []
    on_bad = bad_records.append if skip_bad_records else None

    splits = {}
    proprio_dim = 0
    with open(out / "text", "wb") as text:
        for split, lengths in read_splits(folder).items():
            files = find_shards(folder, split, lengths, on_bad)
            shown_files = progress(files.items(), f"indexing {name} {split}", "files")
            episodes = read_episodes(shown_files, parser, row, rng, text, on_bad)
            num_episodes, num_frames, width = write_tables(out, split, episodes)
            proprio_dim = max(proprio_dim, width)
            splits[split] = {"episodes": num_episodes, "frames": num_frames, "files": [path.name for path in files]}

    total_episodes = sum(split["episodes"] for split in splits.values())
    total_frames = sum(split["frames"] for split in splits.values())
    if total_frames == 0:
        first_problems = "".join(f"\n{message}" for message in bad_records[:3])
        raise ValueError(f"{folder}: no usable episode in {splits}{first_problems}")

    meta = {
        "name": name,
        "views": [view for view, key in row.images.items() if key],
        "splits": splits,
        "action_dim": row.action_dim,
        "proprio_dim": proprio_dim,
        "episodes": total_episodes,
        "frames": total_frames,
        "bad_records": bad_records,
    }
    meta["statistics"] = index_statistics(out, meta, row)
    write_meta(out, meta)


def make_parser(folder: Path):
    """
    Return the parser for the records of a dataset: that of TFDS in numpy, which needs no TensorFlow. Raises OSError or
    ValueError that names features.json.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.example_parser import ExampleParserNp

    path = folder / "features.json"
    check_classes(read_json_object(path), path)
    try:
        features = tfds.features.FeaturesDict.from_config(str(folder))
        return ExampleParserNp(features.get_serialized_info())
    except Exception as error:  # TensorFlow Datasets raises what it likes
        raise ValueError(f"{path}: not understood ({describe(error)}); get it again") from None


def check_classes(features: dict, path: Path):
    """Raise ValueError if features.json names a class that is not one of TFDS, which would import any module."""
    waiting = [features]
    while waiting:
        content = waiting.pop()
        if isinstance(content, list):
            waiting.extend(content)
        if not isinstance(content, dict):
            continue
        waiting.extend(content.values())
        for key in ("pythonClassName", "python_class_name", "type"):
            name = content.get(key)
            if isinstance(name, str) and not name.startswith("tensorflow_datasets.core.features."):
                raise ValueError(f"{path}: feature class {name!r} is none of TensorFlow Datasets, it is not imported")


def read_episodes(
    files: Iterable[tuple[Path, int | None]],
    parser,
    row: oxe.Dataset,
    rng: np.random.Generator,
    text: BinaryIO,
    on_bad: Callable[[str], None] | None,
) -> Iterator[tuple[int, IndexedEpisode]]:
    """
    Yield (number of the file, episode) for each record of these files. Raises ValueError for a record that cannot be
    used; with `on_bad` it calls on_bad(message) instead, and goes on. files: those of `find_shards`.
    """
    for number, (path, num_records) in enumerate(files):
        for offset, record in read_records(path, on_bad, num_records):
            try:
                trajectory = read_trajectory(parser, record, row, rng)
                episode = index_trajectory(trajectory, record, offset, row, text)
            except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
                message = f"{path}: episode at byte {offset}: {explain(error)}"
                if on_bad is None:
                    raise ValueError(message) from None
                on_bad(message)
                continue
            yield number, episode


def explain(error: Exception) -> str:
    """Return the message of a ValueError, which is made for people. For any other error also its kind and its line."""
    if isinstance(error, ValueError):
        return str(error)
    line = traceback.extract_tb(error.__traceback__)[-1]
    return f"{describe(error)} (in {line.filename}, line {line.lineno})"


def index_trajectory(trajectory: dict, record: bytes, offset: int, row: oxe.Dataset, text: BinaryIO) -> IndexedEpisode:
    """
    Return what the index keeps of a trajectory, and append its instructions to `text`. offset: where in its file the
    record begins. Raises ValueError if a camera or a state that the row names is missing.
    """
    T = len(trajectory["action"])
    proprio = read_proprio(trajectory, row.state, T)
    instructions = np.broadcast_to(trajectory.get("language_instruction", b""), T).tolist()

    columns = write_instructions(text, instructions)
    for key in row.images.values():
        if key:
            images = get_key(trajectory["observation"], key, "camera")
            columns += locate_images(record, images, offset)
    return IndexedEpisode(
        action=trajectory["action"],
        proprio=proprio,
        places=np.stack(columns, axis=1),  # (T, 2 + 3 V)
        has_instruction=any(instructions),
    )


def write_instructions(text: BinaryIO, instructions: list[bytes]) -> list[np.ndarray]:
    """Append each different instruction of an episode once. Return offsets and lengths, each (T,) int64."""
    places = {}
    for instruction in dict.fromkeys(instructions):
        places[instruction] = (text.tell(), len(instruction))
        text.write(instruction)
    return list(np.array([places[instruction] for instruction in instructions], np.int64).T)


def locate_images(record: bytes, images: Iterable[bytes], offset: int) -> list[np.ndarray]:
    """
    Find encoded images in the bytes of their record, which begins at `offset` in its file. Return offsets in that file,
    lengths and crc32s, each (T,) int64. Raises ValueError for an image that is not there.
    """
    places = []
    position = 0
    for image in images:
        image = bytes(image)
        # The images of a camera stand in the order of their steps, so the search goes on where the last one was found.
        position = record.find(image, position)
        if not image or position < 0:
            raise ValueError("an empty image, or images that are not stored as encoded bytes")
        places.append((offset + position, len(image), zlib.crc32(image)))
    return list(np.array(places, np.int64).T)


def write_tables(out: Path, split: str, episodes: Iterable[tuple[int, IndexedEpisode]]) -> tuple[int, int, int]:
    """Write the tables of a split. Return how many episodes and frames it has, and how many state dimensions."""
    num_episodes = 0
    num_frames = 0
    proprio_dim = 0
    with ExitStack() as stack:
        files = {kind: stack.enter_context(open(out / f"{split}.{kind}", "wb")) for kind in TABLES}
        for file_number, episode in episodes:
            T = len(episode.action)
            episode_number = np.full((T, 1), num_episodes)
            rows = {
                "action": episode.action,
                "proprio": episode.proprio,
                "frames": np.concatenate([episode_number, episode.places], axis=1),
                "episodes": [file_number, num_frames, T, episode.has_instruction],
            }
            for kind, dtype in TABLES.items():
                files[kind].write(np.asarray(rows[kind], dtype).tobytes())
            num_episodes += 1
            num_frames += T
            proprio_dim = episode.proprio.shape[1]
    return num_episodes, num_frames, proprio_dim


def index_statistics(index: Path, meta: dict, row: oxe.Dataset) -> dict:
    """
    Return what dataset_statistics.json holds for one dataset: mean, std, max, min, q01 and q99 of each dimension. They
    are over all splits and before the language filter, as for the released checkpoints.
    """
    actions = [open_table(index / f"{split}.action", "<f4", meta["action_dim"]) for split in meta["splits"]]
    states = [open_table(index / f"{split}.proprio", "<f4", meta["proprio_dim"]) for split in meta["splits"]]
    return {
        "action": {**compute_statistics(actions), "mask": list(row.action_normalization_mask)},
        "proprio": compute_statistics(states),
        "num_transitions": meta["frames"],
        "num_trajectories": meta["episodes"],
    }


# -----------------------------------------------------------------------------
# Find the index that belongs to the data


def open_index(
    folder: Path, name: str, row: oxe.Dataset, skip_bad_records: bool = False, progress: Callable = no_progress
) -> Path:
    """
    Return the folder with the index of a dataset. `write_index` makes it if there is none for these very files, or if
    it is damaged. It lies beside the data or, where that cannot be written, in the cache folder.
    """
    key = f"{name}-{fingerprint(folder, row)}"
    beside_data = folder / ".index" / key
    in_cache = cache_folder() / key
    for place in (beside_data, in_cache):
        remove_leftovers(place.parent)
        if is_whole(place):
            return place

    on_the_way = [path for path in (folder, beside_data.parent, beside_data) if path.exists()]
    place = beside_data if all(can_write(path) for path in on_the_way) else in_cache
    place.parent.mkdir(parents=True, exist_ok=True)

    # Written under another name first, so that it appears at once.
    unfinished = Path(tempfile.mkdtemp(dir=place.parent, prefix="tmp"))
    try:
        write_index(unfinished, folder, name, row, skip_bad_records, progress)
        try:
            if not is_whole(place):
                shutil.rmtree(place, ignore_errors=True)
                unfinished.rename(place)
        except OSError:
            made_by_another_process = is_whole(place)
            if not made_by_another_process:
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return place


def cache_folder() -> Path:
    """Return OPENVLA_CACHE, or .cache/openvla in the home folder."""
    return Path(os.environ.get("OPENVLA_CACHE") or Path.home() / ".cache" / "openvla")


def can_write(folder: Path) -> bool:
    """Return True if files can be made in a folder. Root can everywhere, but should not in one that is read-only."""
    return os.access(folder, os.W_OK) and folder.stat().st_mode & 0o222 != 0


def remove_leftovers(folder: Path):
    """Remove what killed runs left of their indices in `folder`, once nothing in it has changed for a day."""
    for unfinished in folder.glob("tmp*"):
        try:
            newest = max(path.stat().st_mtime for path in (unfinished, *unfinished.iterdir()))
        except OSError:  # its run has just completed it
            continue
        if time.time() - newest > DAY:
            shutil.rmtree(unfinished, ignore_errors=True)


def fingerprint(folder: Path, row: oxe.Dataset) -> str:
    """
    Return 16 hex digits that change with the files of the dataset, with its row, and with the source of its standardise
    function.
    """
    files = []
    for path in sorted(folder.iterdir()):
        if path.is_file():
            stat = path.stat()
            files.append((path.name, stat.st_size, stat.st_mtime_ns))
    parts = (files, str(row.images), row.state, row.action_encoding, source_of(row.standardize))
    if row.swap_images:
        parts += row.swap_images
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def source_of(function: Callable) -> str:
    """
    Return the source of a function and of all that it uses of its own file: functions, and numbers, texts or tables.
    For instance, of `scaled` in a config file that has

        SCALE = 0.001

        def in_metres(action):
            return action * SCALE

        def scaled(trajectory):
            return {**trajectory, "action": in_metres(trajectory["action"])}

    it returns both functions and "0.001", so the index is made anew whichever of the three is edited.
    """
    used = {}  # name -> source of a function, or value of a constant
    waiting = [function]
    while waiting:
        function = waiting.pop()
        settings = repr(getattr(function, "keywords", ""))  # a functools.partial has a function, and settings for it
        function = getattr(function, "func", function)
        used[name_of(function)] = inspect.getsource(function) + settings

        for name in names_in(function):
            value = function.__globals__.get(name)
            if inspect.isfunction(value):
                if value.__module__ == function.__module__ and name_of(value) not in used:
                    waiting.append(value)
            elif isinstance(value, int | float | str | tuple | list | dict | np.ndarray):
                used[name] = repr(value)

    # A function inside a table counts by its name: its address in memory is another one in each run.
    return re.sub(r" at 0x[0-9a-f]+", "", repr(sorted(used.items())))


def name_of(function: Callable) -> str:
    """Return "file.function", without the folder: a file that moves does not make all indices invalid."""
    file = function.__module__.rpartition(".")[2]
    return f"{file}.{function.__qualname__}"


def names_in(function: Callable) -> list[str]:
    """Return the names in the byte code of a function and of the functions inside it. Some of them are globals."""
    codes = [function.__code__]
    codes.extend(constant for constant in function.__code__.co_consts if inspect.iscode(constant))
    names = []
    for code in codes:
        names.extend(code.co_names)
    return names


# -----------------------------------------------------------------------------
# Read the index


def write_meta(index: Path, meta: dict):
    """Write index.json: `meta`, sizes and checksums of the files of the index, and a checksum of all this."""
    tables = {}
    for path in sorted(index.iterdir()):
        is_table = path.suffix.removeprefix(".") in TABLES or path.name == "text"
        if is_table:
            tables[path.name] = [path.stat().st_size, checksum_of(path)]
    content = {**meta, "tables": tables}
    content.pop("checksum", None)
    write_json(index / "index.json", {**content, "checksum": checksum_of_json(content)})


def is_whole(index: Path) -> bool:
    """Return True if there is an index in this folder, and its files are as they were written."""
    try:
        meta = read_json_object(index / "index.json")
        if meta.pop("checksum") != checksum_of_json(meta):
            return False
        for name, (size, checksum) in meta["tables"].items():
            path = index / name
            if path.stat().st_size != size or checksum_of(path) != checksum:
                return False
        for split in meta["splits"].values():
            leaves_folder = any(Path(name).name != name for name in split["files"])
            if leaves_folder:
                return False
        return True
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def checksum_of(path: Path) -> int:
    """Return the crc32c of a file. It takes about a second for the index of ten million frames."""
    import google_crc32c

    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc = google_crc32c.extend(crc, block)
    return crc


def checksum_of_json(content: dict) -> int:
    return zlib.crc32(json.dumps(content).encode())


def open_table(path: Path, dtype: str, width: int) -> np.ndarray:
    """Return a file of numbers as a memory-mapped (rows, width) array."""
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.zeros((0, width), dtype)
    return np.memmap(path, dtype, "r").reshape(-1, width)


def open_tables(index: Path, meta: dict, split: str) -> dict[str, np.ndarray]:
    """Return the memory-mapped tables of a split, see `write_index`. meta: the content of index.json."""
    widths = {
        "action": meta["action_dim"],
        "proprio": meta["proprio_dim"],
        "frames": 3 + 3 * len(meta["views"]),
        "episodes": 4,
    }
    return {kind: open_table(index / f"{split}.{kind}", dtype, widths[kind]) for kind, dtype in TABLES.items()}


def read_usable(path: Path) -> np.ndarray | None:
    """Return the memory-mapped numbers that `write_usable` wrote. None: they are missing or damaged."""
    size = path.stat().st_size if path.is_file() else 0
    if size == 0 or size % 8:
        return None
    numbers = np.memmap(path, "<i8", "r")
    frames = numbers[:-1]
    return frames if zlib.crc32(frames) == numbers[-1] else None


def choose_episodes(splits: dict, split: str, hold_out: float) -> tuple[str, int, int]:
    """
    Return the split of the files that a split is taken from, its first episode there, and the end of its episodes.

    The rule: where the files have a val split, train and val are as in the files; where they have none, val is the last
    `hold_out` of the train episodes, and train is the rest.
    """
    if split != "train" and has_frames(splits, split):
        return split, 0, splits[split]["episodes"]

    if "train" not in splits:
        raise ValueError(f"no split called 'train', dataset_info.json names {', '.join(splits)}")
    num_episodes = splits["train"]["episodes"]
    cut = num_episodes
    if not has_frames(splits, "val"):
        cut = round((1 - hold_out) * num_episodes)
    if split == "train":
        return "train", 0, cut
    return "train", cut, num_episodes


def has_frames(splits: dict, split: str) -> bool:
    return split in splits and splits[split]["frames"] > 0


# -----------------------------------------------------------------------------
# Frames by number


class RLDS:
    """
    One split of one dataset, see formats/dataset.py: len() is the number of usable frames, and [i] is one of them, with
    encoded images as its `pictures`.

    row: how the dataset is laid out; None: its row in oxe.py. split: "train" or "val", see `choose_episodes`. views:
    the cameras. action_chunk: K. hold_out: share of the episodes that is the val split if the data has none.
    Not usable are episodes without any instruction, frames that the row's `keep_frames` drops, and the last K - 1
    frames of an episode (OFT).
    Raises FileNotFoundError or ValueError with the names that would do.
    """

    def __init__(
        self,
        data_root_dir: str | Path,
        name: str,
        split: str = "train",
        row: oxe.Dataset | None = None,
        views: tuple[str, ...] = ("primary",),
        action_chunk: int = 1,
        skip_bad_records: bool = False,
        progress: Callable = no_progress,
        hold_out: float = HOLD_OUT,
    ):
        self.name = name
        self.row = row or oxe.lookup(name)
        self.cameras = tuple(views)
        self.action_chunk = action_chunk
        self.folder = find_dataset(Path(data_root_dir).expanduser(), name)
        check_views(name, self.row, self.cameras)

        # The index: made in the first run, found in later ones.
        self.index = open_index(self.folder, name, self.row, skip_bad_records, progress)
        self.meta = read_json_object(self.index / "index.json")
        self.bad_records = self.meta["bad_records"]
        if self.bad_records and not skip_bad_records:
            raise ValueError(
                f"{self.bad_records[0]}; {len(self.bad_records)} bad records were left out of the index by "
                "--skip_bad_records True"
            )

        self.statistics = self.meta["statistics"]
        self.absolute_mask = self.row.absolute_action_mask
        self.scheme = self.row.scheme
        self.user_code = (self.row.standardize, self.row.keep_frames)

        # The frames of this split.
        try:
            episodes = choose_episodes(self.meta["splits"], split, hold_out)
        except ValueError as error:
            raise ValueError(f"{self.folder}: {error}") from None
        self.stored_split, self.first_episode, self.end_episode = episodes
        self.opened = None
        self.length = len(self.open()["usable"])
        if self.length == 0 and split == "train":
            raise ValueError(f"{self.folder}: no frame of split {split!r} can be used; has it instructions?")

    def open(self) -> dict:
        """
        Return the memory-mapped tables `action`, `proprio`, `frames`, `episodes` and `usable`, and the open `files` and
        `text`. They are opened when they are first asked for, so that each worker process has its own.
        """
        if self.opened is None:
            tables = open_tables(self.index, self.meta, self.stored_split)
            file_names = self.meta["splits"][self.stored_split]["files"]
            self.opened = {
                **tables,
                "usable": self.find_usable(tables),
                "files": [os.open(self.folder / name, os.O_RDONLY) for name in file_names],
                "text": os.open(self.index / "text", os.O_RDONLY),
            }
        return self.opened

    def __getstate__(self) -> dict:
        return {**self.__dict__, "opened": None}  # goes to a worker without open files

    # Which frames may start a sample

    def find_usable(self, tables: dict[str, np.ndarray]) -> np.ndarray:
        """
        Return the numbers of the usable frames, memory-mapped. They are found once, and kept with the index, or in the
        cache folder if the index belongs to somebody else.
        """
        name = f"usable-{self.stored_split}-{self.first_episode}-{self.end_episode}-{self.action_chunk}"
        if self.row.keep_frames:
            name += f"-{zlib.crc32(source_of(self.row.keep_frames).encode()):x}"
            if self.row.scheme != SCHEME:  # `keep_frames` is shown normalised actions
                name += f"-{self.row.scheme}"
        places = (self.index / name, cache_folder() / self.index.name / name)
        for path in places:
            usable = read_usable(path)
            if usable is not None:
                return usable

        path = places[0] if can_write(self.index) else places[1]
        self.write_usable(path, tables)
        return read_usable(path)

    def write_usable(self, path: Path, tables: dict[str, np.ndarray]):
        """Write the numbers of the usable frames, and behind them their checksum as one more number."""
        crc = 0
        with atomic_write(path) as temporary, open(temporary, "wb") as file:
            for episode in range(self.first_episode, self.end_episode):
                frames = self.usable_frames(tables, episode).astype("<i8").tobytes()
                crc = zlib.crc32(frames, crc)
                file.write(frames)
            file.write(np.array(crc, "<i8").tobytes())

    def usable_frames(self, tables: dict[str, np.ndarray], episode: int) -> np.ndarray:
        """Return the numbers of the usable frames of one episode."""
        _, first, T, has_instruction = tables["episodes"][episode].tolist()
        num_starts = max(T - self.action_chunk + 1, 0)  # later ones have fewer than K actions left
        if not has_instruction or num_starts == 0:
            return np.zeros(0, int)

        frames = np.arange(first, first + num_starts)
        if self.row.keep_frames is None:
            return frames
        actions = normalize(tables["action"][first : first + T], self.statistics["action"], self.row.scheme)
        keep = self.row.keep_frames({"action": actions})  # (T,) bool
        return frames[keep[:num_starts]]

    # One frame

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict:
        tables = self.open()
        frame = int(tables["usable"][i])
        episode = tables["frames"][frame, 0]
        _, first, T, _ = tables["episodes"][episode].tolist()
        end = min(frame + self.action_chunk, first + T)

        proprio = np.zeros(0, np.float32)
        if self.meta["proprio_dim"]:
            proprio = np.array(tables["proprio"][frame])
        return {
            "pictures": [self.read_image(frame, camera) for camera in self.cameras],
            "actions": np.array(tables["action"][frame:end]),
            "instruction": self.read_instruction(frame),
            "proprio": proprio,
        }

    def read_image(self, frame: int, camera: str) -> bytes:
        """Return an encoded image of a frame of the tables. Raises ValueError if the file has changed there."""
        tables = self.open()
        places = tables["frames"][frame].tolist()
        column = 3 + 3 * self.meta["views"].index(camera)
        offset, length, crc = places[column : column + 3]
        file = int(tables["episodes"][places[0], 0])

        size = os.fstat(tables["files"][file]).st_size
        image = os.pread(tables["files"][file], min(length, size), offset)
        if zlib.crc32(image) != crc:
            path = self.folder / self.meta["splits"][self.stored_split]["files"][file]
            raise ValueError(
                f"{path}: the {camera} image at byte {offset} has changed since it was indexed; get the file again"
            )
        return image

    def read_instruction(self, frame: int) -> str:
        """Return the instruction of a frame of the tables."""
        tables = self.open()
        _, offset, length = tables["frames"][frame, :3].tolist()
        return os.pread(tables["text"], length, offset).decode("utf-8", "replace")

    def instruction(self, i: int) -> str:
        """Return the instruction of usable frame i, without reading its images."""
        return self.read_instruction(int(self.open()["usable"][i]))

    def all_actions(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the first action of every usable frame (n, A), and its episode (n,)."""
        tables = self.open()
        usable = tables["usable"]
        return tables["action"][usable], tables["frames"][usable, 0]

    def where(self, i: int) -> tuple[int, int]:
        """Return the episode and the step of usable frame i."""
        tables = self.open()
        frame = int(tables["usable"][i])
        episode = int(tables["frames"][frame, 0])
        return episode, frame - int(tables["episodes"][episode, 1])


def check_views(name: str, row: oxe.Dataset, views: tuple[str, ...]):
    """Raise ValueError for a camera that a dataset does not have."""
    for view in views:
        if not row.images.get(view):
            known = [known_view for known_view, key in row.images.items() if key]
            raise ValueError(f"{name} has no {view!r} camera; its row in oxe.py names {', '.join(known) or 'none'}")
