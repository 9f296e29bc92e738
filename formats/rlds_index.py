"""
The index of an RLDS dataset: what training needs of each record, found in one pass over all records by all cores.

    read_info, find_shards -> places of records -> batches -> all cores: read_trajectory -> index_trajectory
                                                -> write_tables -> statistics

A record is read once, verified, parsed and standardised. The index keeps actions and states, and the places of
instructions and images. It is the same whatever the number of processes. `write_index` says what its files are.

The index lies beside the data, or in a cache folder. Its name holds a fingerprint of the data, of the dataset's row and
of its standardise function, so that after a change of any of them it is made anew.

Statistics as in prismatic/vla/datasets/rlds/utils/data_utils.py of github.com/openvla/openvla.

Axes: T steps of an episode, N frames of all episodes, V views (cameras), A action dimensions, P state dimensions.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from files import read_json_object, write_json
from formats import oxe
from formats.tfrecord import (
    Place,
    describe,
    find_records,
    find_shards,
    raise_or_skip,
    read_content,
    read_info,
)
from formats.user_code import fingerprint_of
from formats.workers import serve_main_process
from normalize import compute_statistics
from progress import no_progress

VERSION = 2  # of the files of an index; another one makes all indices anew

# The tables of an index, one file each for every split. `write_index` says what their columns are.
TABLES = {"action": "<f4", "proprio": "<f4", "frames": "<i8", "episodes": "<i8"}

# The first bytes of the images that image.py decodes
IMAGE_STARTS = (
    *(b"\xff\xd8", b"\x89PNG", b"GIF8", b"BM", b"RIFF"),  # JPEG, PNG, GIF, BMP, WebP
    *(b"\xff\x4f", b"\0\0\0\x0cjP", b"II*\0", b"MM\0*", b"P5", b"P6"),  # JPEG 2000, TIFF, PPM
)

MB = 10**6
MAX_BATCH_BYTES = 8 * MB  # a process gets so much at a time,
MAX_BATCH = 256  # and so many records: that a request fits into a pipe, so that sending it does not wait
MIN_BYTES_PER_PROCESS = 32 * MB  # less is not worth starting another process
DAY = 24 * 60 * 60  # seconds


# -----------------------------------------------------------------------------
# One episode: parse and standardise


def read_trajectory(parser, record: bytes, row: oxe.Dataset, rng: np.random.Generator | None) -> dict:
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
    T = count_steps(steps)
    if T == 0:
        raise ValueError("an empty episode")
    steps["traj_metadata"] = {key: repeat(value, T) for key, value in episode.items()}

    # Standardise.
    trajectory = oxe.standardize(row, steps, rng)

    # Check.
    if "action" not in trajectory:
        raise ValueError(f'it has no action; of {sorted(trajectory)}, name the right keys in its row: action=("...",)')
    if isinstance(trajectory["action"], dict):
        keys = ", ".join(f'"action/{key}"' for key in sorted(trajectory["action"]))
        raise ValueError(f"its action is a dict; name its parts in the right order in the row: action=({keys})")
    action = np.asarray(trajectory["action"], np.float32)  # (T, A)
    if action.ndim != 2 or row.action_dim not in (None, action.shape[1]):
        raise ValueError(
            f"action has shape {action.shape}, {row.action_encoding} means (T, {row.action_dim}); a row with gripper= "
            "and absolute= takes any number of dimensions"
        )
    broken = np.argwhere(~np.isfinite(action))
    if len(broken):
        raise ValueError(f"action {broken[0].tolist()} (step, dimension) is not finite")
    if not len(action):
        raise ValueError("no step is left of this episode after its standardise function")
    return {**trajectory, "action": action}


def count_steps(steps: dict) -> int:
    """Return T of a raw trajectory: of its action, or else of whatever comes first."""
    values = steps.get("action", steps)
    while isinstance(values, dict):  # some datasets store the action as a dict of its parts
        values = next(iter(values.values()))
    return len(values)


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
# One episode: what the index keeps of it


@dataclass
class IndexedEpisode:
    """What the index keeps of one record."""

    action: np.ndarray  # (T, A) float32
    proprio: np.ndarray  # (T, P) float32
    places: np.ndarray  # (T, 2 + 3 V) int64: columns 1 and on of the table `frames`, see `write_index`
    text: bytes  # its instructions; their places count from its beginning
    has_instruction: bool


def index_trajectory(trajectory: dict, record: bytes, offset: int, row: oxe.Dataset) -> IndexedEpisode:
    """
    Return what the index keeps of a trajectory. offset: where in its file the record begins. Raises ValueError if a
    camera or a state that the row names is missing.
    """
    T = len(trajectory["action"])
    proprio = read_proprio(trajectory, row.state, T)
    instructions = np.broadcast_to(trajectory.get("language_instruction", b""), T).tolist()

    text, places = join_instructions(instructions)
    columns = [places]  # (T, 2), then (T, 3) for each view
    for key in row.images.values():
        if key:
            images = get_key(trajectory["observation"], key, "camera")
            columns.append(locate_images(record, images, offset, key))
    return IndexedEpisode(
        action=trajectory["action"],
        proprio=proprio,
        places=np.concatenate(columns, axis=1),
        text=text,
        has_instruction=any(instructions),
    )


def join_instructions(instructions: list[bytes]) -> tuple[bytes, np.ndarray]:
    """Return the different instructions of an episode, one behind the other, and offset and length of each step's."""
    text = b""
    places = {}
    for instruction in dict.fromkeys(instructions):
        places[instruction] = (len(text), len(instruction))
        text += instruction
    return text, np.array([places[instruction] for instruction in instructions], np.int64)


def locate_images(record: bytes, images: Iterable[bytes], offset: int, camera: str) -> np.ndarray:
    """
    Find encoded images in the bytes of their record, which begins at `offset` in its file. Return (T, 3) int64: offset
    in that file, length and crc32c of each. Raises ValueError for an image that is not there, or not encoded.
    """
    import google_crc32c

    places = []
    position = 0
    for image in images:
        image = bytes(image)
        # The images of a camera stand in the order of their steps, so the search goes on where the last one ended. The
        # next one is only a few bytes further: behind its tag and its length, which take seven bits a byte.
        expected = position + 1 + (len(image).bit_length() + 6) // 7
        if places and record.startswith(image, expected):
            position = expected
        else:
            position = record.find(image, position)
        if not image or position < 0 or not image.startswith(IMAGE_STARTS):
            raise ValueError(
                f"camera {camera!r} has an empty image, or pixels that are not stored as JPEG or PNG (it begins with "
                f"{image[:4]!r}); write the data with tfds.features.Image, or with formats/write_rlds.py"
            )
        places.append((offset + position, len(image), google_crc32c.value(image)))
        position += len(image)
    return np.array(places, np.int64)


# -----------------------------------------------------------------------------
# Many episodes: by all cores


@dataclass
class Task:
    """One record for a process."""

    file: int  # number of its file in the split
    number: int  # of the record in the dataset
    place: Place


class Indexer:
    """What each process needs to make something of records."""

    def __init__(self, folder: Path, name: str, row: oxe.Dataset):
        self.parser = make_parser(folder)
        self.row = row
        self.seed = zlib.crc32(name.encode())

    def index(self, tasks: list[Task]) -> list[IndexedEpisode | str]:
        """Return what the index keeps of each record, or a message that says why it cannot be used."""
        outcomes = []
        with ExitStack() as stack:
            file = None
            for task in tasks:
                place = task.place
                try:
                    if not place.problem and (file is None or file.name != str(place.path)):
                        file = stack.enter_context(open(place.path, "rb"))
                    record = read_content(file, place)
                except (ValueError, OSError) as error:
                    outcomes.append(str(error))
                    continue
                try:
                    trajectory = read_trajectory(self.parser, record, self.row, self.generator(task.number))
                    outcomes.append(index_trajectory(trajectory, record, place.content, self.row))
                except Exception as error:  # functions of the user raise what they like
                    outcomes.append(f"{place.path}: episode at byte {place.content}: {explain(error)}")
        return outcomes

    def generator(self, number: int) -> np.random.Generator | None:
        """Return the random numbers of a record, which say which of its two cameras an episode of DROID shows."""
        if not self.row.swap_images:
            return None
        rng = np.random.default_rng(self.seed)
        rng.bit_generator.advance(number)
        return rng


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


def explain(error: Exception) -> str:
    """Return the message of a ValueError, which is made for people. For any other error also its kind and its line."""
    if isinstance(error, ValueError):
        return str(error)
    line = traceback.extract_tb(error.__traceback__)[-1]
    return f"{describe(error)} (in {line.filename}, line {line.lineno})"


def batches_of(tasks: Iterable[Task]) -> Iterator[list[Task]]:
    """Yield the tasks in batches of about 8 MB."""
    batch = []
    num_bytes = 0
    for task in tasks:
        batch.append(task)
        num_bytes += task.place.length
        if num_bytes >= MAX_BATCH_BYTES or len(batch) == MAX_BATCH:
            yield batch
            batch = []
            num_bytes = 0
    if batch:
        yield batch


def index_all(indexer: Indexer, tasks: Iterable[Task], num_processes: int) -> Iterator[list[tuple]]:
    """Yield [(task, its outcome)] of each batch, in the order of the tasks."""
    batches = batches_of(tasks)
    if num_processes == 1:
        for batch in batches:
            yield list(zip(batch, indexer.index(batch), strict=True))
        return

    # Forked, and not started afresh: functions of a config file cannot be sent to a process, and a process that is
    # started afresh would run the user's script once more.
    context = multiprocessing.get_context("fork")
    processes = []
    connections = []
    try:
        for _ in range(num_processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(indexer, theirs), daemon=True)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # Python's, as numpy has threads
                process.start()
            theirs.close()
            processes.append(process)
            connections.append(ours)

        # Batches go round, two for each process, and come back in the same order.
        sent = deque()
        for i, batch in enumerate(batches):
            if len(sent) == 2 * num_processes:
                yield receive(*sent.popleft())
            connection = connections[i % num_processes]
            with suppress(ConnectionError):  # its process is gone, which `receive` says
                connection.send(batch)
            sent.append((connection, batch))
        while sent:
            yield receive(*sent.popleft())
    finally:
        for process in processes:
            process.kill()
            process.join()


def receive(connection: Connection, batch: list[Task]) -> list[tuple]:
    """Return [(task, its outcome)] of a batch that was sent. Raises OSError if its process is gone."""
    try:
        return list(zip(batch, connection.recv(), strict=True))
    except (EOFError, ConnectionError):
        place = batch[0].place
        what = f"{place.path}: the process that indexes it from byte {place.offset} on was killed"
        raise OSError(f"{what}; is there too little memory?") from None


def serve(indexer: Indexer, connection: Connection):
    """Index batches in a process of its own, which ends when the main process does, even if that was killed."""
    serve_main_process()
    with suppress(EOFError, ConnectionError):  # the main process is gone
        while True:
            connection.send(indexer.index(connection.recv()))


def count_processes(num_bytes: int) -> int:
    """Return how many processes should index so many bytes: one for each core, if they are worth it."""
    can_fork = sys.platform == "linux" and not multiprocessing.current_process().daemon
    if not can_fork:
        return 1
    num_cores = len(os.sched_getaffinity(0))
    return max(1, min(num_cores, num_bytes // MIN_BYTES_PER_PROCESS))


# -----------------------------------------------------------------------------
# Write the index


def write_index(
    out: Path,
    folder: Path,
    name: str,
    row: oxe.Dataset,
    skip_bad_records: bool,
    progress: Callable,
    num_processes: int | None = None,
):
    """
    Read every record of a dataset once, and write its index into the folder `out`. num_processes: None: by its size.

    SPLIT.action    (N, A) float32, standardised actions in robot units
    SPLIT.proprio   (N, P) float32, states
    SPLIT.frames    (N, 3 + 3 V) int64: number of the episode; offset and length of the instruction in `text`; then for
                    each view offset in its tfrecord file, length and crc32c of the encoded image
    SPLIT.episodes  (episodes, 4) int64: number of the file, first frame, number of frames T, 1 if it has an instruction
    text            the instructions, one behind the other
    index.json      sizes, names of files and views, bad records, statistics

    Raises ValueError for a record that is broken or does not fit its row. With `skip_bad_records` such records are left
    out and listed; then it raises ValueError only if nothing is left.
    """
    bad_records = []
    on_bad = bad_records.append if skip_bad_records else None
    shards = {split.name: find_shards(folder, split, on_bad) for split in read_info(folder)}
    sizes = {name: sum(path.stat().st_size for path in files) for name, files in shards.items()}
    if num_processes is None:
        num_processes = count_processes(sum(sizes.values()))

    indexer = Indexer(folder, name, row)
    tables = Tables(out, on_bad)
    splits = {}
    first_record = 0
    with open(out / "text", "wb") as text:
        for split, files in shards.items():
            chosen = row.episodes if split == row.train_split else None
            tasks = Tasks(files, first_record, chosen)
            total = sizes[split] // MB + 1
            with closing(index_all(indexer, tasks, num_processes)) as batches:  # its processes end with it
                shown = progress(in_megabytes(batches), f"indexing {name} {split}", "MB", total=total)
                num_episodes, num_frames = tables.write(split, shown, text)
            tasks.check_chosen(folder, split)
            first_record = tasks.next_record
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
        "action_dim": tables.widths["action"],
        "proprio_dim": tables.widths["proprio"],
        "episodes": total_episodes,
        "frames": total_frames,
        "bad_records": bad_records,
    }
    meta["statistics"] = index_statistics(out, meta, row)
    write_meta(out, meta)


class Tasks:
    """The records of the files of a split. `chosen`: numbers of the episodes to take; None: all."""

    def __init__(self, files: dict[Path, int | None], first_record: int, chosen: tuple[int, ...] | None):
        self.files = files
        self.first_record = first_record
        self.next_record = first_record  # the number of the next record in the dataset
        self.chosen = None if chosen is None else set(chosen)

    def __iter__(self) -> Iterator[Task]:
        for file, (path, num_records) in enumerate(self.files.items()):
            count = 0
            for place in find_records(path, num_records):
                number = self.next_record + place.number
                count = place.number + 1
                is_chosen = self.chosen is None or number - self.first_record in self.chosen
                if is_chosen or place.problem:
                    yield Task(file, number, place)
            self.next_record += count if num_records is None else num_records

    def check_chosen(self, folder: Path, split: str):
        """Raise ValueError if an episode was chosen that is not there."""
        num_episodes = self.next_record - self.first_record
        missing = sorted(number for number in self.chosen or () if not 0 <= number < num_episodes)
        if missing:
            raise ValueError(f"{folder}: episodes={missing}: split {split!r} has {num_episodes}, counted from 0")


def in_megabytes(batches: Iterable[list]) -> Iterator[list]:
    """Yield what there is to yield once for each megabyte of records, so that progress counts megabytes."""
    outcomes = []
    num_bytes = 0
    for batch in batches:
        outcomes += batch
        num_bytes += sum(task.place.length for task, _ in batch)
        while num_bytes >= MB:
            num_bytes -= MB
            yield outcomes
            outcomes = []
    yield outcomes


class Tables:
    """Writes the tables of an index. All episodes have the same number of action and of state dimensions."""

    def __init__(self, out: Path, on_bad: Callable[[str], None] | None):
        self.out = out
        self.on_bad = on_bad
        self.widths = {}  # of the tables `action` and `proprio`: those of the first episode

    def write(self, split: str, outcomes: Iterable[list[tuple]], text) -> tuple[int, int]:
        """Write the tables of a split, and its instructions to `text`. Return how many episodes and frames it has."""
        num_episodes = 0
        num_frames = 0
        with ExitStack() as stack:
            files = {kind: stack.enter_context(open(self.out / f"{split}.{kind}", "wb")) for kind in TABLES}
            for batch in outcomes:
                for task, episode in batch:
                    problem = episode if isinstance(episode, str) else self.compare(task, episode)
                    if problem:
                        raise_or_skip(problem, self.on_bad)
                        continue

                    T = len(episode.action)
                    frames = np.empty((T, 1 + episode.places.shape[1]), np.int64)
                    frames[:, 0] = num_episodes
                    frames[:, 1:] = episode.places
                    frames[:, 1] += text.tell()
                    rows = {
                        "action": episode.action,
                        "proprio": episode.proprio,
                        "frames": frames,
                        "episodes": [task.file, num_frames, T, episode.has_instruction],
                    }
                    for kind, dtype in TABLES.items():
                        files[kind].write(np.asarray(rows[kind], dtype).tobytes())
                    text.write(episode.text)
                    num_episodes += 1
                    num_frames += T
        return num_episodes, num_frames

    def compare(self, task: Task, episode: IndexedEpisode) -> str:
        """Return what is wrong with the size of an episode's actions and states; "" if they are like all others."""
        for kind, table in {"action": episode.action, "proprio": episode.proprio}.items():
            width = self.widths.setdefault(kind, table.shape[1])
            if table.shape[1] != width:
                place = task.place
                return (
                    f"{place.path}: episode at byte {place.content}: {kind} has {table.shape[1]} dimensions, "
                    f"those before it {width}"
                )
        return ""


def index_statistics(index: Path, meta: dict, row: oxe.Dataset) -> dict:
    """
    Return what dataset_statistics.json holds for one dataset: mean, std, max, min, q01 and q99 of each dimension. They
    are over all splits and before the language filter, as for the released checkpoints.
    """
    actions = [open_table(index / f"{split}.action", "<f4", meta["action_dim"]) for split in meta["splits"]]
    states = [open_table(index / f"{split}.proprio", "<f4", meta["proprio_dim"]) for split in meta["splits"]]
    _, is_normalized = row.action_masks(meta["action_dim"])
    return {
        "action": {**compute_statistics(actions), "mask": list(is_normalized)},
        "proprio": compute_statistics(states),
        "num_transitions": meta["frames"],
        "num_trajectories": meta["episodes"],
    }


# -----------------------------------------------------------------------------
# Find the index that belongs to the data


def open_index(
    folder: Path,
    name: str,
    row: oxe.Dataset,
    skip_bad_records: bool = False,
    progress: Callable = no_progress,
    num_processes: int | None = None,
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
        write_index(unfinished, folder, name, row, skip_bad_records, progress, num_processes)
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
    Return 16 hex digits that change with the files of the dataset, with its row, and with its standardise function and
    all that it uses.
    """
    files = []
    for path in sorted(folder.iterdir()):
        if path.is_file():
            stat = path.stat()
            files.append((path.name, stat.st_size, stat.st_mtime_ns))
    layout = (row.images, row.state, row.action, row.action_encoding, row.gripper, row.absolute)
    choice = (row.swap_images, row.episodes, row.train_split)
    parts = (VERSION, files, layout, choice, fingerprint_of(row.standardize, "standardize"))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


# -----------------------------------------------------------------------------
# The files of an index


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
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
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
