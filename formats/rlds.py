"""
RLDS folders (TFDS tfrecords) -> frames by number, without TensorFlow.

    frames = RLDS("~/data", "bridge_orig")
    frames[0]["pictures"], frames[0]["actions"], frames[0]["instruction"], frames.statistics["action"]["q01"]

Open X-Embodiment is stored as RLDS: an episode is one record of about 2 MB, with its images encoded.

    first run    tfrecord files -> read_records -> read_trajectory (oxe.py) -> index_trajectory -> write_index
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
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from files import atomic_write, read_json, write_json
from formats import oxe
from formats.dataset import HOLD_OUT
from normalize import compute_statistics, normalize
from progress import no_progress

# The tables of an index, one file each for every split. `write_index` says what their columns are.
TABLES = {"action": "<f4", "proprio": "<f4", "frames": "<i8", "episodes": "<i8"}


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


def read_records(path: Path, on_bad: Callable[[str], None] | None = None) -> Iterator[tuple[int, bytes]]:
    """
    Yield (offset, content) of each record of a tfrecord file, whose parts are

        length of the content (8 bytes), checksum of the length (4), content, checksum of the content (4)

    Raises ValueError for a broken record. With `on_bad` it calls on_bad(message) instead, and goes on with the next
    record where that can be found.
    """
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
            elif end > size:
                problem = f"cut off, {size - offset:,} bytes of {end - offset:,}"
            else:
                content = file.read(length)
                if not has_checksum(content, file.read(4)):
                    problem = "wrong checksum"

            if not problem:
                yield offset + 12, content
            else:
                message = (
                    f"{path}: record {number} at byte {offset}: {problem}; get the file again, or --skip_bad_records"
                )
                if on_bad is None:
                    raise ValueError(message)
                on_bad(message)
            offset = end
            number += 1


# -----------------------------------------------------------------------------
# One episode: parse and standardise


def read_trajectory(parser, record: bytes, row: oxe.Dataset, rng: np.random.Generator) -> dict:
    """
    Return the standardised trajectory of a record: a nested dict of arrays with leading axis T, images still encoded.
    Raises ValueError for an episode without steps, or whose actions are not finite or not as many as the row says.
    """
    # Parse.
    episode = parser.parse_example(record)
    steps = dict(episode.pop("steps"))
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
    info = read_json(folder / "dataset_info.json")
    rng = np.random.default_rng(zlib.crc32(name.encode()))  # DROID: which of its two cameras an episode shows
    bad_records = []
    on_bad = bad_records.append if skip_bad_records else None

    splits = {}
    proprio_dim = 0
    with open(out / "text", "wb") as text:
        for split in [entry["name"] for entry in info["splits"]]:
            files = sorted(folder.glob(f"*-{split}.tfrecord*"))
            shown_files = progress(files, f"indexing {name} {split}", "files")
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
    write_json(out / "index.json", meta)


def make_parser(folder: Path):
    """Return the parser for the records of a dataset: that of TFDS in numpy, which needs no TensorFlow."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.example_parser import ExampleParserNp

    features = tfds.features.FeaturesDict.from_config(str(folder))
    return ExampleParserNp(features.get_serialized_info())


def read_episodes(
    files: Iterable[Path],
    parser,
    row: oxe.Dataset,
    rng: np.random.Generator,
    text: BinaryIO,
    on_bad: Callable[[str], None] | None,
) -> Iterator[tuple[int, IndexedEpisode]]:
    """
    Yield (number of the file, episode) for each record of these files. Raises ValueError for a record that cannot be
    used; with `on_bad` it calls on_bad(message) instead, and goes on.
    """
    for number, path in enumerate(files):
        for offset, record in read_records(path, on_bad):
            try:
                trajectory = read_trajectory(parser, record, row, rng)
                episode = index_trajectory(trajectory, record, offset, row, text)
            except (ValueError, KeyError) as error:
                message = f"{path}: episode at byte {offset}: {error.args[0]}"
                if on_bad is None:
                    raise ValueError(message) from None
                on_bad(message)
                continue
            yield number, episode


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
    Return the folder with the index of a dataset. `write_index` makes it if there is none for these very files. It lies
    beside the data or, where that is read-only, in OPENVLA_CACHE (default: .cache/openvla in the home folder).
    """
    key = f"{name}-{fingerprint(folder, row)}"
    beside_data = folder / ".index" / key
    cache = os.environ.get("OPENVLA_CACHE") or Path.home() / ".cache" / "openvla"
    in_cache = Path(cache) / key
    for place in (beside_data, in_cache):
        if (place / "index.json").is_file():
            return place

    is_read_only = folder.stat().st_mode & 0o222 == 0  # root could write there, but should not
    place = beside_data if os.access(folder, os.W_OK) and not is_read_only else in_cache
    place.parent.mkdir(parents=True, exist_ok=True)

    # Written under another name first: an index that has its name is complete.
    unfinished = Path(tempfile.mkdtemp(dir=place.parent))
    try:
        write_index(unfinished, folder, name, row, skip_bad_records, progress)
        try:
            unfinished.rename(place)
        except OSError:
            made_by_another_process = (place / "index.json").is_file()
            if not made_by_another_process:
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return place


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
    return [name for code in codes for name in code.co_names]


# -----------------------------------------------------------------------------
# Read the index


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


def choose_episodes(splits: dict, split: str, hold_out: float) -> tuple[str, int, int]:
    """
    Return the split of the files that a split is taken from, its first episode there, and the end of its episodes.

    The rule: where the files have a val split, train and val are as in the files; where they have none, val is the last
    `hold_out` of the train episodes, and train is the rest.
    """
    if split != "train" and has_frames(splits, split):
        return split, 0, splits[split]["episodes"]

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
        self.meta = read_json(self.index / "index.json")
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
        self.stored_split, self.first_episode, self.end_episode = choose_episodes(self.meta["splits"], split, hold_out)
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
        """Return the numbers of the usable frames, memory-mapped. They are found once, and kept with the index."""
        name = f"usable-{self.stored_split}-{self.first_episode}-{self.end_episode}-{self.action_chunk}"
        if self.row.keep_frames:
            name += f"-{zlib.crc32(source_of(self.row.keep_frames).encode()):x}"
        path = self.index / name
        if not path.is_file():
            self.write_usable(path, tables)
        return open_table(path, "<i8", width=1)[:, 0]

    def write_usable(self, path: Path, tables: dict[str, np.ndarray]):
        """Write the numbers of the usable frames. Raises PermissionError if the index belongs to somebody else."""
        try:
            with atomic_write(path) as temporary, open(temporary, "wb") as file:
                for episode in range(self.first_episode, self.end_episode):
                    frames = self.usable_frames(tables, episode)
                    file.write(frames.astype("<i8").tobytes())
        except PermissionError:
            raise PermissionError(f"{path.parent} cannot be written; ask its owner, or copy the data") from None

    def usable_frames(self, tables: dict[str, np.ndarray], episode: int) -> np.ndarray:
        """Return the numbers of the usable frames of one episode."""
        _, first, T, has_instruction = tables["episodes"][episode].tolist()
        num_starts = max(T - self.action_chunk + 1, 0)  # later ones have fewer than K actions left
        if not has_instruction or num_starts == 0:
            return np.zeros(0, int)

        frames = np.arange(first, first + num_starts)
        if self.row.keep_frames is None:
            return frames
        actions = normalize(tables["action"][first : first + T], self.statistics["action"])
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

        image = os.pread(tables["files"][file], length, offset)
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
