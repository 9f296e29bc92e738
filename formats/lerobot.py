"""
A LeRobot folder (v2.0, v2.1, v3.0) -> frames by number, for `data_mix` of a config. Needs `pip install pyarrow av`.

    from formats.lerobot import LeRobot
    data_mix = LeRobot("~/data/my_robot", cameras=["front", "wrist"])

    folder/meta      -> read_info, read_episodes, read_tasks: where the files of each episode are
    folder/data      -> read_numbers: actions, states, times; read once, into memory (about 100 bytes a frame)
    folder/videos    -> read_frame: one image, when it is asked for

v2 has a parquet file of numbers and an mp4 file for each episode. v3 joins many episodes into one file, and says in
meta/episodes where each begins. A frame of a video is decoded from the key frame before it. Images can also be inside
the parquet files. There a frame costs a whole row group, about an episode, so better make videos of them.
The format: https://huggingface.co/docs/lerobot/lerobot-dataset-v3.

Axes: N frames of all episodes, T steps of an episode, K steps of an action chunk, A action dimensions, P state
dimensions.
"""

import importlib
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from operator import itemgetter
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from files import read_json_lines, read_json_object
from formats.dataset import HOLD_OUT, as_names, name_actions, split_episodes
from hub import find_data, name_of_data
from normalize import SCHEME, compute_statistics

VERSIONS = ("v2.0", "v2.1", "v3.0")
ACTION = "action"
STATE = "observation.state"
INDICES = {  # columns of a parquet file in data/, besides actions and states
    "episode_index": np.int64,
    "task_index": np.int64,
    "timestamp": np.float64,
    "frame_index": np.int64,
}
OPTIONAL = {"frame_index"}
MAX_DRIFT = 0.4  # of a frame; from half a frame on the nearest image of the video is another one

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
# meta/info.json: what the dataset is


def read_info(folder: Path) -> dict:
    """Return the content of meta/info.json. Raises FileNotFoundError, or ValueError for what is not supported."""
    path = info_path(folder)
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

    fps = info.get("fps")
    if type(fps) not in (int, float) or not 0 < fps < math.inf:
        raise ValueError(f"{path}: fps is {fps!r}, expected a number above 0")
    if info.get("chunks_size") == 0:
        raise ValueError(f"{path}: chunks_size is 0, expected a whole number above 0")
    for key in ("chunks_size", "total_episodes", "total_frames"):
        number = info.get(key, 1)  # old folders lack some of them
        if type(number) is not int or number < 0:
            raise ValueError(f"{path}: {key} is {number!r}, expected a whole number above 0")
    return info


def info_path(folder: Path) -> Path:
    return folder / "meta" / "info.json"


def choose_cameras(folder: Path, info: dict, names: Sequence[str] | None) -> tuple[str, ...]:
    """
    Return the features that are meant by the names of cameras; None: the first camera. Raises ValueError with what is
    there, also for a depth map: the model wants colours.
    """
    cameras = []
    depth_maps = []
    for name, feature in info["features"].items():
        if feature["dtype"] in ("image", "video"):
            group = depth_maps if is_depth_map(feature) else cameras
            group.append(name)

    if names is None:
        if not cameras:
            raise ValueError(f"{info_path(folder)}: no camera with colours, it has {', '.join(depth_maps) or 'none'}")
        return (cameras[0],)
    if not names:
        raise ValueError(f"{info_path(folder)}: cameras= is empty, it has {', '.join(cameras) or 'none'}")

    for name in names:
        if find_keys(depth_maps, name) and not find_keys(cameras, name):
            raise ValueError(
                f"{info_path(folder)}: {name!r} is a depth map, no image in colours; "
                f"choose with cameras= from {', '.join(cameras) or 'none'}"
            )
    return tuple(choose_key(folder, cameras, name, "camera") for name in names)


def is_depth_map(feature: dict) -> bool:
    """Return whether a camera shows distances and not colours. The place where this is said has changed over time."""
    for place in ("info", "video_info"):
        details = feature.get(place)
        if isinstance(details, dict) and (details.get("is_depth_map") or details.get("video.is_depth_map")):
            return True
    return False


def choose_numbers(
    folder: Path, info: dict, action: str | Sequence[str], state: str | Sequence[str] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the features whose numbers, joined, are the action and the state. Raises ValueError with what is there."""
    numeric = [name for name, feature in info["features"].items() if feature["dtype"] not in ("image", "video")]
    if state is None:
        state = [STATE] if STATE in numeric else []
    action_keys = tuple(choose_key(folder, numeric, name, "action") for name in as_names(action))
    state_keys = tuple(choose_key(folder, numeric, name, "state") for name in as_names(state))
    if not action_keys:
        raise ValueError(f"{info_path(folder)}: action= is empty, it has {', '.join(numeric) or 'none'}")
    return action_keys, state_keys


def choose_key(folder: Path, keys: list[str], name: str, purpose: str) -> str:
    """
    Return the one of some features that a name means. Raises ValueError with what is there. purpose: what for,
    "camera", "action" or "state"; also the option to choose it with.
    """
    found = find_keys(keys, name)
    if len(found) == 1:
        return found[0]
    problem = f"more than one {purpose} {name!r}" if found else f"no {purpose} {name!r}"
    raise ValueError(f"{info_path(folder)}: {problem}, it has {', '.join(keys) or 'none'}; choose with {purpose}=")


def find_keys(keys: list[str], name: str) -> list[str]:
    """Return the key that is `name`, or else those whose last part it is: "front" for "observation.images.front"."""
    if name in keys:
        return [name]
    return [key for key in keys if key.rpartition(".")[2] == name]


# -----------------------------------------------------------------------------
# meta/episodes: which episodes there are, and where


@dataclass
class Clip:
    """The part of a video that shows one episode."""

    file: Path
    start: float  # seconds from the beginning of the video
    end: float  # infinite where meta/ does not say


@dataclass
class Episode:
    """Where the frames of one episode are."""

    index: int
    length: int  # T
    data: Path  # parquet file with the numbers; in v3 also with those of other episodes
    videos: dict[str, Clip]  # of each camera; none: the images are inside the parquet file


def read_episodes(
    folder: Path, info: dict, cameras: tuple[str, ...], chosen: Iterable[int] | None
) -> tuple[list[Episode], dict[str, range]]:
    """
    Return the episodes in their order, and the splits of `read_splits`. chosen: the numbers of the episodes to use;
    None: all. Raises FileNotFoundError for a file that should be there, and ValueError if meta/ contradicts itself.
    """
    path = folder / "meta" / "episodes.jsonl"
    if info["codebase_version"] == "v3.0":
        path = folder / "meta" / "episodes"
        rows = []
        for table in find_tables(path):
            rows.extend(read_rows(table))
    else:
        rows = read_json_lines(path)
    check_rows(rows, path)
    check_totals(rows, info, path)
    rows.sort(key=itemgetter("episode_index"))
    splits = read_splits(folder, info, rows)

    if chosen is not None:
        rows = choose_rows(rows, set(chosen), path)
    known_files = {}
    episodes = [locate_episode(folder, info, cameras, row, known_files) for row in rows]
    for camera in cameras:
        check_clips(episodes, camera, info["fps"], path)
    return episodes, splits


def find_tables(path: Path) -> list[Path]:
    """Return the files chunk-000/file-000.parquet and so on of meta/episodes. Raises FileNotFoundError for a gap."""
    tables = sorted(path.glob("*/*.parquet"))
    if not tables:
        raise FileNotFoundError(f"{path}: no parquet file in it; copy the dataset again")
    for place in [*tables, *{table.parent for table in tables}]:
        numbered = re.fullmatch(r"(chunk-|file-)(\d{1,6})(|\.parquet)", place.name)
        if numbered and int(numbered[2]) > 0:
            before = place.with_name(f"{numbered[1]}{int(numbered[2]) - 1:03d}{numbered[3]}")
            if not before.exists():
                raise FileNotFoundError(f"{before}: missing, but there is {place.name}; copy the dataset again")
    return tables


def check_rows(rows: list[dict], path: Path):
    """Raise ValueError if an episode that meta/ lists has no number or length, or the number of another one."""
    numbers = set()
    for row in rows:
        for key in ("episode_index", "length"):
            if type(row.get(key)) is not int or row[key] < 0:
                raise ValueError(f"{path}: an episode has {key} {row.get(key)!r}, expected a whole number")
        if row["episode_index"] in numbers:
            raise ValueError(f"{path}: episode {row['episode_index']} is listed twice; remove one of them")
        numbers.add(row["episode_index"])
    if not numbers:
        raise ValueError(f"{path}: no episode is listed; copy the dataset again")


def check_totals(rows: list[dict], info: dict, path: Path):
    """
    Raise ValueError if the list of episodes was cut off, or does not belong to this info.json. Episodes may have been
    taken out of the middle, with or without a change of the totals.
    """
    num_episodes = len(rows)
    last = max(row["episode_index"] for row in rows)
    has_gaps = num_episodes < last + 1
    expected = info.get("total_episodes", num_episodes)
    is_whole = num_episodes == expected or (has_gaps and last + 1 == expected)
    if not is_whole:
        raise ValueError(
            f"{path}: {num_episodes} episodes are listed, the last is number {last}, but meta/info.json says "
            f"total_episodes {expected}; copy meta/ again, or correct total_episodes"
        )

    num_frames = sum(row["length"] for row in rows)
    expected = info.get("total_frames", num_frames)
    is_whole = num_frames == expected or (has_gaps and num_frames < expected)
    if not is_whole:
        raise ValueError(
            f"{path}: the episodes have {num_frames} frames, but meta/info.json says total_frames {expected}; "
            "copy meta/ again, or correct total_frames"
        )


def choose_rows(rows: list[dict], chosen: set[int], path: Path) -> list[dict]:
    """Return the rows of the episodes with these numbers. Raises ValueError for a number that is not listed."""
    numbers = {row["episode_index"] for row in rows}
    unknown = chosen - numbers
    if unknown:
        raise ValueError(
            f"{path}: no episode {sorted(unknown)[0]}, which episodes= names; {len(numbers)} are listed, "
            f"{min(numbers)} to {max(numbers)}"
        )
    if not chosen:
        raise ValueError(f"{path}: episodes= is empty; {len(numbers)} are listed, {min(numbers)} to {max(numbers)}")
    return [row for row in rows if row["episode_index"] in chosen]


def locate_episode(
    folder: Path, info: dict, cameras: tuple[str, ...], row: dict, known_files: dict[str, Path]
) -> Episode:
    """
    Return where an episode is. row: what meta/ says about it. known_files: those that were seen to exist. Raises
    FileNotFoundError or ValueError.
    """
    videos = {}
    for camera in cameras:
        if info["features"][camera]["dtype"] == "video":
            file = find_file(folder, info, row, camera, known_files)
            start, end = find_times(folder, info, row, camera)
            videos[camera] = Clip(file, start, end)
    data = find_file(folder, info, row, None, known_files)
    return Episode(row["episode_index"], row["length"], data, videos)


def find_file(folder: Path, info: dict, row: dict, camera: str | None, known_files: dict[str, Path]) -> Path:
    """
    Return the file with the video of an episode, or with its numbers (camera None). Raises FileNotFoundError, or
    ValueError if it is not said where the file is.
    """
    kind = "data"
    prefix = "data"  # of the row's keys that number the files of v3
    if camera is not None:
        kind = "video"
        prefix = f"videos/{camera}"

    index = row["episode_index"]
    names = {"video_key": camera, "episode_index": index, "episode_chunk": index // info.get("chunks_size", 1000)}
    if info["codebase_version"] == "v3.0":
        for key in ("chunk_index", "file_index"):
            number = row.get(f"{prefix}/{key}")
            if type(number) is not int:
                raise ValueError(not_finished(folder, index, f"{prefix}/{key}", number))
            names[key] = number

    template = info.get(f"{kind}_path")
    try:
        name = fill(template, names)
        path = known_files.get(name) or inside(folder, name)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{info_path(folder)}: {kind}_path {template!r} gives no file for episode {index} ({error})"
        ) from None
    if name not in known_files:
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: missing, but {folder / 'meta'} lists it for episode {index}; copy the dataset again, or "
                "leave the episode out with episodes="
            )
        known_files[name] = path
    return path


def find_times(folder: Path, info: dict, row: dict, camera: str) -> tuple[float, float]:
    """Return where in its video an episode begins and ends, in seconds. Raises ValueError if that is not said."""
    if info["codebase_version"] != "v3.0":
        return 0.0, math.inf  # v2 has a video for each episode
    start = row.get(f"videos/{camera}/from_timestamp")
    end = row.get(f"videos/{camera}/to_timestamp", math.inf)
    for key, seconds in (("from_timestamp", start), ("to_timestamp", end)):
        if not isinstance(seconds, int | float) or math.isnan(seconds):
            raise ValueError(not_finished(folder, row["episode_index"], f"videos/{camera}/{key}", seconds))
    return start, end


def not_finished(folder: Path, index: int, key: str, value) -> str:
    """Return what is wrong if meta/episodes of v3 does not say where an episode is."""
    return (
        f"{folder / 'meta' / 'episodes'}: episode {index} has {key} {value!r}, which does not say where it is. Was the "
        "recording not finished (batch_encoding_size above 1, no finalize)? Finish it with the package that wrote it, "
        "or leave the episode out with episodes="
    )


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


def check_clips(episodes: list[Episode], camera: str, fps: float, path: Path):
    """Raise ValueError if two episodes are said to be in the same place of a video: one would show the other."""
    clips = []
    for episode in episodes:
        if camera in episode.videos:
            clip = episode.videos[camera]
            clips.append((str(clip.file), clip.start, episode.index, episode.length))
    clips.sort()
    for (file, start, index, length), (next_file, next_start, next_index, _) in pairwise(clips):
        frames_between = (next_start - start) * fps
        if file == next_file and frames_between < length - 1.5:  # one frame less is a matter of rounding
            raise ValueError(
                f"{path}: episode {index} has {length} frames from {start:.4f} s of {file}, but episode {next_index} "
                f"begins there at {next_start:.4f} s; copy meta/ again"
            )


def read_splits(folder: Path, info: dict, rows: list[dict]) -> dict[str, range]:
    """
    Return the numbers of the episodes of each split of info.json; {} if all are "train". Raises ValueError if an
    episode is in no split.
    """
    splits = info.get("splits") or {}
    ranges = {}
    try:
        for name, text in splits.items():
            first, end = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text).groups()
            ranges[name] = range(int(first), int(end))
    except (AttributeError, TypeError):
        raise ValueError(f'{info_path(folder)}: splits are {splits!r}, expected {{"train": "FIRST:END"}}') from None

    is_all = ranges == {"train": range(len(rows))}  # also if the numbers of the episodes have gaps
    if not ranges or is_all:
        return {}
    for row in rows:
        number = row["episode_index"]
        is_in_one = any(number in numbers for numbers in ranges.values())
        if not is_in_one:
            raise ValueError(
                f"{info_path(folder)}: episode {number} is in none of the splits {splits}, {len(rows)} are listed; "
                f'correct it, for example {{"train": "0:{rows[-1]["episode_index"] + 1}"}}'
            )
    return ranges


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
        if tasks.get(number, text) != text:
            raise ValueError(f"{path}: task {number} is both {tasks[number]!r} and {text!r}; copy it again")
        tasks[number] = text
    return tasks


# -----------------------------------------------------------------------------
# Parquet files


def read_rows(path: Path) -> list[dict]:
    """Return the rows of a parquet file of meta/, without the statistics of each episode."""
    table = read_parquet(path, lambda name: not name.startswith("stats/"))
    try:
        return table.to_pylist()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text in UTF-8 ({error}); copy it again") from None


def read_parquet(path: Path, is_wanted: Callable[[str], bool], row_group: int | None = None):
    """
    Return the columns of a parquet file whose names are wanted, a pyarrow.Table. row_group: only this part of the file.
    Raises FileNotFoundError, or ValueError that names the file, also as soon as there are more than MAX_ROWS or
    MAX_BYTES.
    """
    pyarrow = import_package("pyarrow")
    parquet = import_package("pyarrow.parquet")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; copy the dataset again")
    try:
        file = parquet.ParquetFile(path, page_checksum_verification=True)
        names = [name for name in file.schema_arrow.names if is_wanted(name)]
        groups = range(file.num_row_groups) if row_group is None else [row_group]
        num_rows = sum(file.metadata.row_group(group).num_rows for group in groups)
        if num_rows > MAX_ROWS:
            raise ValueError(f"{num_rows:,} rows, at most {MAX_ROWS:,} are read at once")

        # What a file says about the size of its columns is not asked for: if it is wrong, pyarrow ends the process.
        batches = []
        num_bytes = 0
        for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=groups, columns=names, use_threads=False):
            num_bytes += batch.nbytes
            if num_bytes > MAX_BYTES:
                raise ValueError(f"more than {MAX_BYTES:,} bytes, which are not read at once")
            batches.append(batch)
        schema = pyarrow.schema([field for field in file.schema_arrow if field.name in names])
        return pyarrow.Table.from_batches(batches, schema)
    except Exception as error:  # pyarrow raises OSError, its own errors, UnicodeDecodeError, ...
        raise ValueError(f"{path}: not a parquet file that can be read ({error}); copy it again") from None


def read_row_groups(path: Path) -> np.ndarray:
    """Return the parts that a parquet file is stored in, and can be read in: the number of the first row of each."""
    parquet = import_package("pyarrow.parquet")
    try:
        metadata = parquet.read_metadata(path)
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        return np.cumsum([0, *sizes[:-1]])
    except Exception as error:
        raise ValueError(f"{path}: not a parquet file that can be read ({error}); copy it again") from None


# -----------------------------------------------------------------------------
# data/: the numbers


def read_numbers(
    episodes: list[Episode],
    action: tuple[str, ...],
    state: tuple[str, ...],
    fps: float,
    standardize: Callable | None,
) -> dict[str, np.ndarray]:
    """
    Return the columns `action` (N, A) and `state` (N, P) float32, and `task_index`, `timestamp` and `row`, the row in
    its file, (N,). Raises ValueError for numbers that are missing or not finite, and for times that do not fit.
    """
    episodes_of = {}  # in v3 many episodes are in one file, which is read once
    for episode in episodes:
        episodes_of.setdefault(episode.data, []).append(episode)

    part_of = {}
    for path, members in episodes_of.items():
        columns = read_columns(path, action, state)
        rows_of = group_rows(columns.pop("episode_index"))
        for episode in members:
            rows = rows_of.get(episode.index, np.zeros(0, int))
            part = {name: values[rows] for name, values in columns.items()}
            check_length(part["action"], episode)
            if standardize is not None:
                # Now, and not when a frame is read: a function of a config file cannot be sent to a worker process.
                part["action"] = np.asarray(standardize(part["action"]), np.float32)
            check_numbers(part, episode)
            check_times(part, episode, fps)
            part.pop("frame_index", None)
            part_of[episode.index] = part

    parts = [part_of[episode.index] for episode in episodes]
    for episode, part in zip(episodes, parts, strict=True):
        for name in ("action", "state"):
            width = part[name].shape[1]
            expected = parts[0][name].shape[1]
            if width != expected:
                raise ValueError(
                    f"{episode.data}: {name} has {width} dimensions, in the first episode it has {expected}"
                )
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def read_columns(path: Path, action: tuple[str, ...], state: tuple[str, ...]) -> dict[str, np.ndarray]:
    """
    Return the numbers of a parquet file: `action` (rows, A) and `state` (rows, P), joined from their features, and the
    columns of INDICES and `row` (rows,). Raises FileNotFoundError, or ValueError that names the file.
    """
    dtypes = {**INDICES, **dict.fromkeys([*action, *state], np.float32)}
    table = read_parquet(path, lambda name: name in dtypes)
    missing = sorted(dtypes.keys() - set(table.column_names) - OPTIONAL)
    if missing:
        raise ValueError(f"{path}: no column {', '.join(missing)}; copy it again, or choose with action= and state=")

    columns = {}
    for name in table.column_names:
        try:
            columns[name] = as_array(table[name], dtypes[name])
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"{path}: column {name} does not hold numbers ({error})") from None
        if name in INDICES and columns[name].ndim != 1:
            raise ValueError(f"{path}: column {name} has shape {columns[name].shape}, expected one number a row")

    numbers = {name: columns[name] for name in INDICES if name in columns}
    numbers["row"] = np.arange(table.num_rows)
    numbers["action"] = join(columns, action, table.num_rows)
    numbers["state"] = join(columns, state, table.num_rows)
    return numbers


def as_array(column, dtype: type) -> np.ndarray:
    """
    Return a pyarrow column of numbers as (rows,), and one of lists of D numbers as (rows, D). Raises ValueError or
    TypeError for anything else.
    """
    pyarrow = import_package("pyarrow")
    array = column.combine_chunks()
    shape = (len(array),)
    is_list = pyarrow.types.is_list(array.type) or pyarrow.types.is_large_list(array.type)
    if is_list or pyarrow.types.is_fixed_size_list(array.type):
        if array.null_count:
            raise ValueError(f"{array.null_count} rows are empty")
        lengths = np.unique(array.value_lengths().to_numpy(zero_copy_only=False))
        if len(lengths) > 1:
            raise ValueError(f"rows of {lengths[0]} to {lengths[-1]} numbers")
        shape = (len(array), int(lengths.sum()))  # there is one length, or no row
        array = array.flatten()
    if array.null_count:
        raise ValueError(f"{array.null_count} numbers are missing")

    values = array.to_numpy(zero_copy_only=False)
    is_cut = dtype is np.int64 and values.dtype.kind == "f" and not np.array_equal(values, np.rint(values))
    if is_cut:
        raise ValueError("expected whole numbers")
    return values.astype(dtype).reshape(shape)


def join(columns: dict[str, np.ndarray], keys: tuple[str, ...], num_rows: int) -> np.ndarray:
    """Return the columns of these keys side by side, (rows, D) float32. Without keys D is 0."""
    parts = [np.zeros((num_rows, 0), np.float32)]
    for key in keys:
        values = columns[key]
        parts.append(values if values.ndim == 2 else values[:, None])  # (rows,) becomes (rows, 1)
    return np.concatenate(parts, axis=1)


def group_rows(episode_index: np.ndarray) -> dict[int, np.ndarray]:
    """Return the rows of each episode, in their order. episode_index: the episode of each row of a file."""
    order = np.argsort(episode_index, kind="stable")
    numbers, starts = np.unique(episode_index[order], return_index=True)
    return dict(zip(numbers.tolist(), np.split(order, starts[1:]), strict=False))


def check_length(action: np.ndarray, episode: Episode):
    """Raise ValueError if an episode has not the length that meta/ says."""
    if len(action) != episode.length:
        raise ValueError(
            f"{episode.data}: episode {episode.index} has {len(action)} actions, not {episode.length} as meta/ says; "
            "copy both again, or leave the episode out with episodes="
        )


def check_numbers(part: dict[str, np.ndarray], episode: Episode):
    """Raise ValueError if an episode has actions of another shape than (T, A), or numbers that are not finite."""
    check_length(part["action"], episode)
    if part["action"].ndim != 2 or part["action"].shape[1] == 0:
        raise ValueError(f"{episode.data}: actions have shape {part['action'].shape}, expected (T, A)")
    if not np.isfinite(part["timestamp"]).all():
        raise ValueError(f"{episode.data}: episode {episode.index}: a timestamp is not finite")
    for name in ("action", "state"):
        broken = np.argwhere(~np.isfinite(part[name]))
        if len(broken):
            raise ValueError(
                f"{episode.data}: episode {episode.index}: action or state is not finite at step {broken[0][0]}; "
                "leave the episode out with episodes="
            )


def check_times(part: dict[str, np.ndarray], episode: Episode, fps: float):
    """
    Raise ValueError if a timestamp is more than MAX_DRIFT from where the video has the frame of its step. (The official
    package, v2, wants neighbours to be 1 / fps apart to 1e-4 s, and in all versions an image to be within 1e-4 s.)
    """
    if not episode.videos or not episode.length:
        return  # nothing looks at the times
    frames = part["timestamp"] * fps
    errors = np.abs(frames - np.arange(episode.length))
    if "frame_index" in part:
        # Where the first frames of an episode were cut off, the others keep their numbers and their video.
        errors = np.minimum(errors, np.abs(frames - part["frame_index"]))
    worst = int(errors.argmax())
    if errors[worst] > MAX_DRIFT:
        raise ValueError(
            f"{episode.data}: episode {episode.index}: the timestamp of step {worst} is "
            f"{part['timestamp'][worst]:.4f} s, {errors[worst]:.1f} frames from where {fps} frames a second put it, so "
            "its video would show another frame; write frame_index / fps as timestamp, or leave the episode out with "
            "episodes="
        )

    for clip in episode.videos.values():
        last = clip.start + part["timestamp"].max()
        if last > clip.end + 0.5 / fps:
            raise ValueError(
                f"{episode.data}: episode {episode.index} ends at {last:.4f} s of {clip.file}, but meta/ says that its "
                f"part of the video ends at {clip.end:.4f} s; copy both again, or leave the episode out with episodes="
            )


# -----------------------------------------------------------------------------
# videos/: one image


@lru_cache(maxsize=2)
def read_images(path: Path, cameras: tuple[str, ...], row_group: int):
    """Return the images of a row group of a parquet file, still encoded: columns of {"bytes", "path"}."""
    table = read_parquet(path, lambda name: name in cameras, row_group)
    for camera in cameras:
        if camera not in table.column_names:
            raise ValueError(f"{path}: no column {camera}")
    return table


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
    One split of a LeRobot folder, see formats/dataset.py. Frame [i] has the pictures of the cameras: (H, W, 3) uint8,
    encoded bytes or a path.

    folder: on this machine, or hf:owner/name, a repository of the hub (hub.py).
    name: under which the statistics are stored; None: the name of the folder, or of the repository.
    camera: a feature of the data, or the last part of its name; None: the first one that is no depth map.
    cameras: several of them, in the order in which the model gets the images.
    standardize: a function (T, A) -> (T, A') that turns the actions of an episode into your units, the gripper last
        (1 open, 0 closed).
    gripper: False if the last dimension is no gripper; then it is normalised, too.
    absolute: True if actions are targets, such as joint angles, and not changes.
    action, state: the features with the numbers; several are joined. state None: observation.state if there is one,
        and () for no state.
    episodes: the numbers of the episodes to use; None: all.
    split, action_chunk, hold_out: see `select` of formats/dataset.py, which training calls with its own options.
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
        cameras: Sequence[str] | None = None,
        action: str | Sequence[str] = ACTION,
        state: str | Sequence[str] | None = None,
        episodes: Iterable[int] | None = None,
        hold_out: float = HOLD_OUT,
    ):
        self.folder = find_data(folder).expanduser().resolve()
        self.name = name or name_of_data(folder) or self.folder.name
        self.scheme = SCHEME
        self.bad_records = []
        self.user_code = ()
        check_options(camera, cameras, episodes)
        if camera is not None:
            cameras = camera

        # Read all but the images.
        info = read_info(self.folder)
        self.fps = info["fps"]
        self.cameras = choose_cameras(self.folder, info, None if cameras is None else as_names(cameras))
        action_keys, state_keys = choose_numbers(self.folder, info, action, state)
        self.episodes, self.splits = read_episodes(self.folder, info, self.cameras, episodes)
        self.tasks = read_tasks(self.folder, info)
        self.table = read_numbers(self.episodes, action_keys, state_keys, self.fps, standardize)
        unknown_tasks = set(self.table["task_index"].tolist()) - self.tasks.keys()
        if unknown_tasks:
            raise ValueError(
                f"{self.folder / 'meta'}: no instruction for task_index {sorted(unknown_tasks)[:5]}; copy meta/ again"
            )

        # Frames of all episodes stand one behind the other.
        lengths = np.array([episode.length for episode in self.episodes])
        self.ends = np.cumsum(lengths)  # (episodes,)
        self.episode_of = np.repeat(np.arange(len(lengths)), lengths)  # (N,)
        self.action_chunk = action_chunk
        self.frames = self.find_frames(split, action_chunk, hold_out)
        self.row_groups = self.find_row_groups()

        # What the numbers mean.
        A = self.table["action"].shape[1]
        if gripper:
            self.check_gripper()
        self.action_names = name_actions(A, gripper, absolute)
        self.absolute_mask = (absolute,) * (A - 1) + (absolute or gripper,)
        mask = [True] * (A - 1) + [not gripper]
        self.statistics = {
            "action": {**compute_statistics([self.table["action"]]), "mask": mask},
            "num_transitions": int(lengths.sum()),
            "num_trajectories": len(lengths),
        }
        if self.table["state"].shape[1] > 0:
            self.statistics["proprio"] = compute_statistics([self.table["state"]])

    def find_frames(self, split: str, action_chunk: int, hold_out: float) -> np.ndarray:
        """Return the frames of a split that may start a chunk, (n,): the last K - 1 of an episode start none."""
        if action_chunk < 1:
            raise ValueError(f"{self.folder}: action_chunk={action_chunk}: must be 1 or more")
        if not 0 <= hold_out <= 1:
            raise ValueError(f"{self.folder}: hold_out={hold_out}: must be a share of the episodes, 0 to 1")
        steps_left = self.ends[self.episode_of] - np.arange(len(self.episode_of))
        can_start = steps_left >= action_chunk
        is_in_split = np.isin(self.episode_of, self.choose_episodes(split, hold_out))
        frames = np.flatnonzero(can_start & is_in_split)
        if len(frames) == 0 and split == "train":
            longest = max(episode.length for episode in self.episodes)
            raise ValueError(
                f"{self.folder}: no frame to train on: {len(self.episodes)} episodes of up to {longest} frames, "
                f"hold_out {hold_out:g}, chunks of {action_chunk} actions; choose a smaller hold_out or action_chunk"
            )
        return frames

    def choose_episodes(self, split: str, hold_out: float) -> list[int]:
        """
        Return the positions of the episodes of a split in self.episodes. The rule is that of RLDS: where info.json has
        a val split, train and val are as there; else val is the last `hold_out` of the train episodes.
        """
        numbers = [episode.index for episode in self.episodes]
        if split != "train" and self.splits.get(split):
            return [i for i, number in enumerate(numbers) if number in self.splits[split]]

        train = list(range(len(numbers)))
        if self.splits:
            train = [i for i, number in enumerate(numbers) if number in self.splits.get("train", ())]
        if self.splits.get("val"):
            hold_out = 0.0
        return [train[i] for i in split_episodes(len(train), split, hold_out)]

    def select(self, split: str, action_chunk: int, hold_out: float) -> "LeRobot":
        """Return the same data as another split, with chunks of another length, without reading it again."""
        other = copy(self)
        other.action_chunk = action_chunk
        other.frames = self.find_frames(split, action_chunk, hold_out)
        return other

    def find_row_groups(self) -> dict[Path, np.ndarray]:
        """Return the first rows of the row groups of each file that holds images."""
        files = {episode.data for episode in self.episodes if len(episode.videos) < len(self.cameras)}
        return {path: read_row_groups(path) for path in files}

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
        return {
            "pictures": [self.read_image(frame, camera) for camera in self.cameras],
            "actions": self.table["action"][frame : frame + self.action_chunk].copy(),
            "instruction": self.instruction(i),
            "proprio": self.table["state"][frame].copy(),
        }

    def read_image(self, frame: int, camera: str) -> np.ndarray | bytes | Path:
        """Return the image of a frame of the table, as it is stored."""
        episode = self.episodes[self.episode_of[frame]]
        if camera in episode.videos:
            clip = episode.videos[camera]
            return read_frame(clip.file, clip.start + float(self.table["timestamp"][frame]), self.fps)

        row = int(self.table["row"][frame])
        starts = self.row_groups[episode.data]
        group = int(np.searchsorted(starts, row, side="right")) - 1
        inside_parquet = tuple(name for name in self.cameras if name not in episode.videos)
        table = read_images(episode.data, inside_parquet, group)
        try:
            cell = table[camera][row - int(starts[group])].as_py()
            return cell["bytes"] or inside(self.folder, cell["path"])
        except (IndexError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{episode.data}: no image at row {row} ({error})") from None

    def instruction(self, i: int) -> str:
        """Return the instruction of frame i, without reading its image."""
        return self.tasks[self.table["task_index"][self.frames[i]]]

    def all_actions(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the first action of every frame (n, A), and the episode of every frame (n,)."""
        return self.table["action"][self.frames], self.episode_of[self.frames]


def check_options(camera: str | None, cameras: Sequence[str] | None, episodes: Iterable[int] | None):
    """Raise ValueError for options that contradict each other, or make no sense."""
    if camera is not None and cameras is not None:
        raise ValueError(f"camera={camera!r} and cameras={cameras!r}: give one of them")
    if isinstance(episodes, int):
        raise ValueError(f"episodes={episodes}: must be several numbers, such as [{episodes}] or range({episodes})")
