"""
A LeRobot folder (v2.0, v2.1, v3.0) -> frames by number, for `data_mix` of a config. Needs `pip install pyarrow av`.

    from formats.lerobot import LeRobot
    data_mix = [(LeRobot("~/data/my_robot", camera="observation.images.front"), 1.0)]

    folder/meta      -> read_info, read_episodes, read_tasks: where the files of each episode are
    folder/data      -> read_numbers: actions, states, times; read once, into memory (about 100 bytes a frame)
    folder/videos    -> read_frame: one image, when it is asked for

v2 has a parquet file of numbers and an mp4 file for each episode. v3 joins many episodes into one file, and says in
meta/episodes where each begins. A frame of a video is decoded from the key frame before it. Images can also be inside
the parquet files. These are read a whole file at a time, so better make videos of them.
The format: https://huggingface.co/docs/lerobot/lerobot-dataset-v3.

Axes: N frames of all episodes, T steps of an episode, K steps of an action chunk, A action dimensions, P state
dimensions.
"""

import importlib
import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from files import read_json_lines, read_json_object
from formats.dataset import HOLD_OUT
from normalize import SCHEME, compute_statistics

VERSIONS = ("v2.0", "v2.1", "v3.0")
STATE = "observation.state"
COLUMNS = {  # of a parquet file in data/
    "episode_index": np.int64,
    "timestamp": np.float64,
    "task_index": np.int64,
    "action": np.float32,
    STATE: np.float32,
}

# What is read at once of one file; more is a broken file, or one that would fill the memory.
MAX_ROWS = 10_000_000
MAX_BYTES = 1 << 30
ROWS_AT_ONCE = 1024
MAX_PIXELS = 1 << 26  # of an image of a video


def import_package(name: str):
    """Import a package that only this file needs. Raises ImportError that says what to install."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError("a LeRobot folder needs two more packages: pip install pyarrow av") from None


# -----------------------------------------------------------------------------
# meta/: which episodes there are, and where


@dataclass
class Episode:
    """Where the frames of one episode are."""

    index: int
    length: int  # T
    data: Path  # parquet file with the numbers; in v3 also with those of other episodes
    video: Path | None  # None: the images are inside the parquet file
    start: float  # seconds from the beginning of the video


def read_info(folder: Path) -> dict:
    """Return the content of meta/info.json. Raises FileNotFoundError, or ValueError for what is not supported."""
    path = folder / "meta" / "info.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: not a LeRobot dataset, it has no meta/info.json")
    info = read_json_object(path)
    version = info.get("codebase_version")
    if version not in VERSIONS:
        raise ValueError(f"{path}: codebase_version is {version}, known are {', '.join(VERSIONS)}")

    features = info.get("features")
    if not isinstance(features, dict):
        raise ValueError(f"{path}: 'features' is {features!r}, expected an object")
    for name, feature in features.items():
        if not isinstance(feature, dict) or not isinstance(feature.get("dtype"), str):
            raise ValueError(f"{path}: feature {name!r} has no dtype")
    if "action" not in features:
        raise ValueError(f"{path}: no feature 'action', it has {', '.join(features)}")

    fps = info.get("fps")
    if type(fps) not in (int, float) or not 0 < fps < math.inf:
        raise ValueError(f"{path}: fps is {fps!r}, expected a number above 0")
    chunks_size = info.get("chunks_size", 1000)
    if type(chunks_size) is not int or chunks_size < 1:
        raise ValueError(f"{path}: chunks_size is {chunks_size!r}, expected a whole number above 0")
    return info


def choose_camera(folder: Path, info: dict, camera: str | None) -> str:
    """Return the camera of this name; None: the first one. Raises ValueError with the names that are there."""
    cameras = [name for name, feature in info["features"].items() if feature["dtype"] in ("image", "video")]
    if camera is None and cameras:
        return cameras[0]
    if camera not in cameras:
        raise ValueError(
            f"{folder / 'meta' / 'info.json'}: no camera {camera or ''}, it has {', '.join(cameras) or 'none'}"
        )
    return camera


def read_episodes(folder: Path, info: dict, camera: str) -> list[Episode]:
    """Return the episodes in their order. Raises FileNotFoundError for a file that should be there."""
    meta = folder / "meta"
    if info["codebase_version"] == "v3.0":
        tables = sorted(meta.glob("episodes/*/*.parquet"))
        if not tables:
            raise FileNotFoundError(f"{meta / 'episodes'}: no parquet file in it; copy the dataset again")
        rows = []
        for table in tables:
            rows.extend(read_rows(table))
    else:
        rows = read_json_lines(meta / "episodes.jsonl")
    check_rows(rows, meta)

    episodes = []
    for row in sorted(rows, key=itemgetter("episode_index")):
        files = find_files(folder, info, camera, row)
        episode = Episode(
            index=row["episode_index"],
            length=row["length"],
            data=files["data"],
            video=files.get("video"),
            start=row.get(f"videos/{camera}/from_timestamp", 0.0),  # v2 has a video for each episode
        )
        if not isinstance(episode.start, int | float) or not math.isfinite(episode.start):
            raise ValueError(f"{meta}: episode {episode.index} starts at {episode.start!r}, expected seconds")
        episodes.append(episode)
    return episodes


def check_rows(rows: list[dict], meta: Path):
    """Raise ValueError if an episode that meta/ lists has no number or length, or the number of another one."""
    numbers = set()
    for row in rows:
        for key in ("episode_index", "length"):
            if type(row.get(key)) is not int or row[key] < 0:
                raise ValueError(f"{meta}: an episode has {key} {row.get(key)!r}, expected a whole number")
        if row["episode_index"] in numbers:
            raise ValueError(f"{meta}: episode {row['episode_index']} is listed twice")
        numbers.add(row["episode_index"])
    if not numbers:
        raise ValueError(f"{meta}: no episode is listed")


def find_files(folder: Path, info: dict, camera: str, row: dict) -> dict[str, Path]:
    """
    Return the files of one episode: its numbers, "data", and its "video" unless the images are with the numbers. row:
    what meta/ says about it. Raises FileNotFoundError.
    """
    prefixes = {"data": "data"}  # of the row's keys that number the files of v3
    if info["features"][camera]["dtype"] == "video":
        prefixes["video"] = f"videos/{camera}"

    index = row["episode_index"]
    files = {}
    for kind, prefix in prefixes.items():
        names = {
            "video_key": camera,
            "episode_index": index,
            "episode_chunk": index // info.get("chunks_size", 1000),
        }
        if info["codebase_version"] == "v3.0":
            names["chunk_index"] = row.get(f"{prefix}/chunk_index")
            names["file_index"] = row.get(f"{prefix}/file_index")
        try:
            file = inside(folder, fill(info[f"{kind}_path"], names))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder / 'meta'}: no {kind} file for episode {index} ({error})") from None
        if not file.is_file():
            raise FileNotFoundError(f"{file}: missing, but {folder / 'meta'} lists it for episode {index}")
        files[kind] = file
    return files


def fill(template: str, names: dict[str, int | str]) -> str:
    """
    Return "file-{file_index:03d}.mp4" as "file-007.mp4". Unlike str.format, it neither looks into objects nor pads to
    any width. Raises KeyError, TypeError or ValueError for a template that does not fit.
    """
    return re.sub(r"\{(\w+)(?::(\d?\dd))?\}", lambda field: format(names[field[1]], field[2] or ""), template)


def inside(folder: Path, name: str) -> Path:
    """Return folder / name. Raises ValueError if that is not in the folder."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{name!r} is not in the folder {folder}")
    return folder / name


def read_tasks(folder: Path, info: dict) -> dict[int, str]:
    """Return the instructions by their number. Raises OSError or ValueError that names the file."""
    if info["codebase_version"] == "v3.0":
        path = folder / "meta" / "tasks.parquet"
        rows = read_rows(path)
    else:
        path = folder / "meta" / "tasks.jsonl"
        rows = read_json_lines(path)

    tasks = {}
    for row in rows:
        number = row.get("task_index")
        text = row.get("task", row.get("__index_level_0__"))  # pandas' name for an index that has none
        if type(number) is not int or not isinstance(text, str):
            raise ValueError(f"{path}: expected a task_index and a task, found {str(row)[:80]}")
        if re.search("[\ud800-\udfff]", text):
            raise ValueError(f"{path}: task {text!r} has half of a character (a lone surrogate)")
        tasks[number] = text
    return tasks


def read_rows(path: Path) -> list[dict]:
    """Return the rows of a parquet file of meta/, without the statistics of each episode."""
    table = read_parquet(path, lambda name: not name.startswith("stats/"))
    try:
        return table.to_pylist()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text in UTF-8 ({error}); copy it again") from None


def read_parquet(path: Path, is_wanted: Callable[[str], bool]):
    """
    Return the columns of a parquet file whose names are wanted, a pyarrow.Table. Raises FileNotFoundError, or
    ValueError that names the file, also as soon as there are more than MAX_ROWS or MAX_BYTES.
    """
    pyarrow = import_package("pyarrow")
    parquet = import_package("pyarrow.parquet")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; copy the dataset again")
    try:
        file = parquet.ParquetFile(path, page_checksum_verification=True)
        names = [name for name in file.schema_arrow.names if is_wanted(name)]
        if file.metadata.num_rows > MAX_ROWS:
            raise ValueError(f"{file.metadata.num_rows:,} rows, at most {MAX_ROWS:,} are read at once")

        # What a file says about the size of its columns is not asked for: if it is wrong, pyarrow ends the process.
        batches = []
        num_bytes = 0
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=names):
            num_bytes += batch.nbytes
            if num_bytes > MAX_BYTES:
                raise ValueError(f"more than {MAX_BYTES:,} bytes, which are not read at once")
            batches.append(batch)
        schema = pyarrow.schema([field for field in file.schema_arrow if field.name in names])
        return pyarrow.Table.from_batches(batches, schema)
    except Exception as error:  # pyarrow raises OSError, its own errors, UnicodeDecodeError, ...
        raise ValueError(f"{path}: not a parquet file that can be read ({error}); copy it again") from None


# -----------------------------------------------------------------------------
# data/: the numbers


def read_numbers(episodes: list[Episode], standardize: Callable | None) -> dict[str, np.ndarray]:
    """
    Return the columns `action` (N, A) and `state` (N, P) float32, and `task_index`, `timestamp`, `episode_index` and
    `row`, the row in its file, (N,). Raises ValueError for numbers that are missing or not finite.
    """
    parts = []
    path = None
    columns = {}
    for episode in episodes:
        if episode.data != path:  # in v3 the next episode can be in the same file
            path = episode.data
            columns = read_columns(path)
        part = select_episode(columns, episode, standardize)
        check_numbers(part, episode)
        parts.append(part)
        for name in ("action", "state"):
            width = part[name].shape[1]
            expected = parts[0][name].shape[1]
            if width != expected:
                raise ValueError(f"{path}: {name} has {width} dimensions, in the first episode it has {expected}")
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def read_columns(path: Path) -> dict[str, np.ndarray]:
    """
    Return the columns of a parquet file, (rows, D) or (rows,). A state of width 0 stands in for a missing one. Raises
    FileNotFoundError, or ValueError that names the file.
    """
    table = read_parquet(path, lambda name: name in COLUMNS)
    columns = {STATE: np.zeros((table.num_rows, 0)), "row": np.arange(table.num_rows)}
    for name in table.column_names:
        try:
            columns[name] = np.array(list(table[name].to_numpy()), COLUMNS[name])  # a list of arrays becomes (rows, D)
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"{path}: column {name} does not hold numbers ({error})") from None
        most_axes = 2 if name in ("action", STATE) else 1
        if columns[name].ndim > most_axes:
            raise ValueError(f"{path}: column {name} has shape {columns[name].shape}, expected {most_axes} axes")

    missing = sorted(COLUMNS.keys() - columns.keys())
    if missing:
        raise ValueError(f"{path}: no column {', '.join(missing)}")
    return columns


def select_episode(
    columns: dict[str, np.ndarray], episode: Episode, standardize: Callable | None
) -> dict[str, np.ndarray]:
    """Return the rows of one episode, its action (T, A) and its state (T, P) in float32."""
    is_in_episode = columns["episode_index"] == episode.index
    part = {name: values[is_in_episode] for name, values in columns.items()}
    part["action"] = as_matrix(part["action"])
    part["state"] = as_matrix(part.pop(STATE))
    if standardize is not None:
        # Now, and not when a frame is read: a function of a config file cannot be sent to a worker process.
        part["action"] = np.asarray(standardize(part["action"]), np.float32)
    return part


def as_matrix(values: np.ndarray) -> np.ndarray:
    """Return (T, D) float32; (T,) becomes (T, 1)."""
    if values.ndim == 1:
        values = values[:, None]
    return values.astype(np.float32)


def check_numbers(part: dict[str, np.ndarray], episode: Episode):
    """Raise ValueError if an episode has not the length that meta/ says, or numbers that are not finite."""
    num_actions = len(part["action"])
    if num_actions != episode.length:
        raise ValueError(f"{episode.data}: episode {episode.index} has {num_actions} actions, not {episode.length}")
    if part["action"].ndim != 2 or part["action"].shape[1] == 0:
        raise ValueError(f"{episode.data}: actions have shape {part['action'].shape}, expected (T, A)")
    if not np.isfinite(part["timestamp"]).all():
        raise ValueError(f"{episode.data}: episode {episode.index}: a timestamp is not finite")
    numbers = np.concatenate([part["action"], part["state"]], axis=1)  # (T, A + P)
    broken = np.argwhere(~np.isfinite(numbers))
    if len(broken):
        raise ValueError(
            f"{episode.data}: episode {episode.index}: action or state is not finite at step {broken[0][0]}"
        )


# -----------------------------------------------------------------------------
# videos/: one image


@lru_cache(maxsize=2)
def read_images(path: Path, camera: str):
    """Return the images inside a parquet file, still encoded: a column of {"bytes", "path"}."""
    table = read_parquet(path, lambda name: name == camera)
    if not table.column_names:
        raise ValueError(f"{path}: no column {camera}")
    return table[camera]


def read_frame(path: Path, seconds: float, fps: float) -> np.ndarray:
    """
    Return the frame (H, W, 3) uint8 at a time of a video. Raises ValueError for a video that cannot be decoded there,
    or that has no frame within half a frame of that time.
    """
    av = import_package("av")
    nearest = None
    try:
        container = open_video(path, os.getpid())
        microseconds = int(1e6 * (seconds - 0.5 / fps))
        container.seek(max(0, microseconds))  # goes to the key frame before that
        for frame in container.decode(video=0):
            if frame.time is None:
                continue
            if nearest is None or abs(frame.time - seconds) < abs(nearest.time - seconds):
                nearest = frame
            if frame.time > seconds - 1e-4:  # timestamps are rounded
                break
    except (av.FFmpegError, OverflowError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: at {seconds:.4f} s: {error}") from None

    if nearest is None:
        raise ValueError(f"{path}: no frame at {seconds:.4f} s, and none could be decoded near it")
    if abs(nearest.time - seconds) > 0.5 / fps:
        raise ValueError(f"{path}: no frame at {seconds:.4f} s, the nearest is at {nearest.time} s")
    try:
        return nearest.to_ndarray(format="rgb24")
    except (av.FFmpegError, ValueError) as error:
        raise ValueError(f"{path}: the frame at {seconds:.4f} s is no image ({error})") from None


@lru_cache(maxsize=16)
def open_video(path: Path, process: int):
    """
    Return an open video. Each process has its own: a forked one would share its place in the file with the other.
    Raises av.FFmpegError or ValueError for what is no mp4 file (a playlist could open other files) or too large.
    """
    av = import_package("av")
    container = av.open(str(path), format="mp4")
    if not container.streams.video:
        raise ValueError(f"{path}: no video in it; copy it again")
    codec = container.streams.video[0].codec_context
    if codec is None:
        raise ValueError(f"{path}: its codec is not known; copy it again")
    codec.thread_count = 1  # the data loader has worker processes already
    codec.options = {"max_pixels": str(MAX_PIXELS)}
    if codec.width * codec.height > MAX_PIXELS:
        raise ValueError(f"{path}: {codec.width} x {codec.height} pixels; copy it again")
    return container


# -----------------------------------------------------------------------------
# Frames by number


class LeRobot(Dataset):
    """
    One split of a LeRobot folder, see formats/dataset.py. Frame [i] has the picture of one camera: (H, W, 3) uint8,
    encoded bytes or a path.

    name: under which the statistics are stored; None: the name of the folder.
    split: "train", or "val" for the last episodes (HOLD_OUT of them).
    camera: a feature of the data; None: the first one. action_chunk: K.
    standardize: a function (T, A) -> (T, A') that turns the actions of an episode into your units, the gripper last
        (1 open, 0 closed).
    gripper: False if the last dimension is no gripper; then it is normalised like the others.
    absolute: True if actions are targets, such as joint angles, and not changes; then chunks repeat the last one.
    Raises ImportError, FileNotFoundError or ValueError that name what would do.
    """

    def __init__(
        self,
        folder: str | Path,
        name: str | None = None,
        split: str = "train",
        camera: str | None = None,
        action_chunk: int = 1,
        standardize: Callable | None = None,
        gripper: bool = True,
        absolute: bool = False,
    ):
        self.folder = Path(folder).expanduser().resolve()
        self.name = name or self.folder.name
        self.action_chunk = action_chunk
        self.scheme = SCHEME
        self.bad_records = []
        self.user_code = ()

        # Read all but the images.
        info = read_info(self.folder)
        self.fps = info["fps"]
        self.camera = choose_camera(self.folder, info, camera)
        self.cameras = (self.camera,)
        self.episodes = read_episodes(self.folder, info, self.camera)
        self.tasks = read_tasks(self.folder, info)
        self.table = read_numbers(self.episodes, standardize)
        unknown_tasks = set(self.table["task_index"].tolist()) - self.tasks.keys()
        if unknown_tasks:
            raise ValueError(f"{self.folder / 'meta'}: no instruction for task_index {sorted(unknown_tasks)[:5]}")

        # Frames of all episodes stand one behind the other; a split is a range of them.
        lengths = np.array([episode.length for episode in self.episodes])
        self.ends = np.cumsum(lengths)  # (episodes,)
        self.episode_of = np.repeat(np.arange(len(lengths)), lengths)  # (N,)
        num_train_episodes = round((1 - HOLD_OUT) * len(lengths))
        num_frames = int(lengths.sum())
        num_train_frames = int(lengths[:num_train_episodes].sum())
        splits = {"train": range(num_train_frames), "val": range(num_train_frames, num_frames)}
        self.frames = splits[split]

        # What the numbers mean.
        A = self.table["action"].shape[1]
        if gripper:
            self.check_gripper()
        self.absolute_mask = (absolute,) * (A - 1) + (absolute or gripper,)
        mask = [True] * (A - 1) + [not gripper]
        self.statistics = {
            "action": {**compute_statistics([self.table["action"]]), "mask": mask},
            "num_transitions": num_frames,
            "num_trajectories": len(lengths),
            "proprio": compute_statistics([self.table["state"]]),
        }

    def check_gripper(self):
        """Raise ValueError if the gripper goes beyond [-1, 1]: its token would be clipped, and nothing would say so."""
        last = self.table["action"][:, -1]
        if np.abs(last).max() > 1.1:
            raise ValueError(
                f"{self.folder}: the last action dimension is {last.min():g} ... {last.max():g}, no gripper in [0, 1]; "
                "scale it with standardize=, or say gripper=False if it is none"
            )

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, i: int) -> dict:
        frame = self.frames[i]
        end = min(frame + self.action_chunk, self.ends[self.episode_of[frame]])
        return {
            "pictures": [self.read_image(frame)],
            "actions": self.table["action"][frame:end].copy(),
            "instruction": self.instruction(i),
            "proprio": self.table["state"][frame].copy(),
        }

    def read_image(self, frame: int) -> np.ndarray | bytes | Path:
        """Return the image of a frame of the table, as it is stored."""
        episode = self.episodes[self.episode_of[frame]]
        if episode.video is not None:
            seconds = episode.start + float(self.table["timestamp"][frame])
            return read_frame(episode.video, seconds, self.fps)
        cells = read_images(episode.data, self.camera)
        cell = cells[int(self.table["row"][frame])].as_py()
        try:
            return cell["bytes"] or inside(self.folder, cell["path"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{episode.data}: no image at row {self.table['row'][frame]} ({error})") from None

    def instruction(self, i: int) -> str:
        """Return the instruction of frame i, without reading its image."""
        return self.tasks[self.table["task_index"][self.frames[i]]]

    def all_actions(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the first action of every frame (n, A), and the episode of every frame (n,)."""
        frames = np.array(self.frames, int)
        return self.table["action"][frames], self.episode_of[frames]
