"""
Write episodes as a LeRobot v3 dataset, which that community's viewers and trainers open, and formats/lerobot.py reads.

    write_lerobot(folder, episodes, fps=5)  ->  folder/meta/..., folder/data/chunk-000/file-000.parquet, ...

An episode is what formats/write_rlds.py takes: action (T, A), instruction, images by the name of their camera, and
vectors by any name. Images become the features observation.images.NAME, stored as JPEG in the parquet files (a "video"
would lose more), and vectors observation.NAME. The package lerobot is not needed; pyarrow is (`pip install pyarrow`).

    episode -> convert_episode -> rows -> data/; its length, tasks and statistics -> meta/

https://huggingface.co/docs/lerobot/lerobot-dataset-v3, version v3.0 of its files.
Axes: T steps of an episode, A dimensions of an action, H and W height and width of an image.
"""

import importlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from files import write_json
from formats.write_rlds import compare_shapes, convert_episode, shapes_of
from image import decode

VERSION = "v3.0"
EPISODES_PER_FILE = 100
QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
STATISTIC_IMAGES = 20  # of an episode, from which its images' statistics are computed
INDICES = ("frame_index", "episode_index", "index", "task_index")
DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"


def write_lerobot(folder: str | Path, episodes: Iterable[dict], fps: float, robot_type: str = "unknown") -> Path:
    """
    Write a dataset, and return its folder, which appears when it is whole. Raises ValueError for an episode that does
    not fit, with its number; FileExistsError if the folder is there; ImportError without pyarrow.
    """
    folder = Path(folder)
    import_parquet()
    if folder.exists():
        raise FileExistsError(f"{folder}: exists; choose another folder, or remove it")
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)

    shapes = {}
    tasks = {}  # instruction -> task_index
    rows = []  # of meta/episodes, one for each episode
    parts = []  # tables of the episodes that are in no file yet
    num_frames = 0
    for number, episode in enumerate(episodes):
        try:
            action, observations = convert_episode(episode)
            compare_shapes(shapes, shapes_of(episode))
        except ValueError as error:
            raise ValueError(f"episode {number}: {error}") from None
        task = tasks.setdefault(episode["instruction"], len(tasks))
        columns = columns_of(action, observations, number, num_frames, task, fps)
        parts.append(columns)
        rows.append(describe_episode(columns, episode["instruction"], number, num_frames))
        num_frames += len(action)
        if len(parts) == EPISODES_PER_FILE:
            write_data(unfinished, parts, shapes, file_index=number // EPISODES_PER_FILE)
            parts = []
    if not rows:
        raise ValueError(f"{folder}: there are no episodes to write")
    if parts:
        write_data(unfinished, parts, shapes, file_index=(len(rows) - 1) // EPISODES_PER_FILE)

    write_meta(unfinished, shapes, tasks, rows, fps, robot_type)
    return unfinished.rename(folder)


def import_parquet():
    """Import pyarrow and its reader of parquet files. Raises ImportError that says what to install."""
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ImportError("a LeRobot folder needs another package: pip install pyarrow") from None


# -----------------------------------------------------------------------------
# data/


def feature_name(key: str, shape: tuple[int, ...]) -> str:
    """Return what LeRobot calls an array of an episode."""
    if key == "action":
        return key
    return f"observation.images.{key}" if len(shape) == 3 else f"observation.{key}"


def columns_of(action: np.ndarray, observations: dict, number: int, first: int, task: int, fps: float) -> dict:
    """Return the columns of one episode: name -> T values. Images stay encoded."""
    T = len(action)
    frames = np.arange(T)
    columns = {}
    for key, values in observations.items():
        shape = (0, 0, 3) if isinstance(values, list) else (0,)
        columns[feature_name(key, shape)] = values
    return {
        **columns,
        "action": action,
        "timestamp": (frames / fps).astype(np.float32),
        "frame_index": frames,
        "episode_index": np.full(T, number),
        "index": first + frames,
        "task_index": np.full(T, task),
    }


def write_data(folder: Path, parts: list[dict], shapes: dict, file_index: int):
    """Write the columns of some episodes as one file, an episode in each group of rows."""
    pyarrow, parquet = import_parquet()
    path = folder / DATA_PATH.format(chunk_index=0, file_index=file_index)
    path.parent.mkdir(parents=True, exist_ok=True)
    tables = [pyarrow.table({name: to_arrow(values) for name, values in part.items()}) for part in parts]
    schema = tables[0].schema.with_metadata({"huggingface": json.dumps(describe_columns(parts[0], shapes))})
    with parquet.ParquetWriter(path, schema) as writer:
        for table in tables:
            writer.write_table(table.replace_schema_metadata(schema.metadata))


def to_arrow(values):
    """Return a column of pyarrow: images as {"bytes", "path"}, vectors as lists of their length, or numbers."""
    pyarrow, _ = import_parquet()
    if isinstance(values, list):
        kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        return pyarrow.array([{"bytes": image, "path": None} for image in values], kind)
    if values.ndim == 2:
        kind = pyarrow.list_(pyarrow.float32(), values.shape[1])
        return pyarrow.array([row.tolist() for row in values.astype(np.float32)], kind)
    kind = pyarrow.float32() if values.dtype == np.float32 else pyarrow.int64()
    return pyarrow.array(values.tolist(), kind)


def describe_columns(columns: dict, shapes: dict) -> dict:
    """Return what the package `datasets` reads of a parquet file: which columns are images."""
    features = {}
    for name, values in columns.items():
        if isinstance(values, list):
            features[name] = {"_type": "Image"}
        elif values.ndim == 2:
            number = {"dtype": "float32", "_type": "Value"}
            features[name] = {"feature": number, "length": values.shape[1], "_type": "List"}
        else:
            features[name] = {"dtype": "int64" if name in INDICES else "float32", "_type": "Value"}
    return {"info": {"features": features}}


# -----------------------------------------------------------------------------
# meta/


def describe_episode(columns: dict, instruction: str, number: int, first: int) -> dict:
    """Return the row of an episode in meta/episodes: where it is, its instruction, its statistics."""
    T = len(columns["action"])
    row = {
        "episode_index": number,
        "tasks": [instruction],
        "length": T,
        "data/chunk_index": 0,
        "data/file_index": number // EPISODES_PER_FILE,
        "dataset_from_index": first,
        "dataset_to_index": first + T,
    }
    for name, values in columns.items():
        for key, value in statistics_of(values).items():
            row[f"stats/{name}/{key}"] = value
    return {**row, "meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}


def statistics_of(values) -> dict[str, list]:
    """Return the statistics of a column: of images (3, 1, 1) per channel in [0, 1], else (A,)."""
    if isinstance(values, list):
        chosen = np.linspace(0, len(values) - 1, min(len(values), STATISTIC_IMAGES)).astype(int)
        pixels = np.concatenate([decode(values[i]).reshape(-1, 3) for i in chosen]) / 255  # (N, 3)
        return {key: as_channels(value) for key, value in summarize(pixels, len(chosen)).items()}
    numbers = np.asarray(values, np.float64).reshape(len(values), -1)  # (T, A)
    return {key: value.tolist() for key, value in summarize(numbers, len(numbers)).items()}


def summarize(numbers: np.ndarray, count: int) -> dict[str, np.ndarray]:
    """Return the statistics of (N, A) numbers, each (A,), and how many they are, (1,)."""
    quantiles = {key: np.quantile(numbers, share, axis=0) for key, share in QUANTILES.items()}
    return {
        "min": numbers.min(0),
        "max": numbers.max(0),
        "mean": numbers.mean(0),
        "std": numbers.std(0),
        "count": np.array([count]),
        **quantiles,
    }


def as_channels(value: np.ndarray) -> list:
    """Return numbers per channel (3,) as (3, 1, 1), and a count (1,) as it is."""
    return value.reshape(3, 1, 1).tolist() if len(value) == 3 else value.tolist()


def combine(rows: list[dict], name: str) -> dict[str, list]:
    """Return the statistics of a feature over all episodes. Its quantiles are the episodes' weighted means."""
    keys = ("min", "max", "mean", "std", *QUANTILES)
    values = {key: np.array([row[f"stats/{name}/{key}"] for row in rows]) for key in keys}
    counts = np.array([row[f"stats/{name}/count"][0] for row in rows], np.float64)
    weights = counts / counts.sum()

    def average(numbers: np.ndarray) -> np.ndarray:
        return np.tensordot(weights, numbers, axes=1)

    mean = average(values["mean"])
    variance = average(values["std"] ** 2 + (values["mean"] - mean) ** 2)
    return {
        "min": values["min"].min(0).tolist(),
        "max": values["max"].max(0).tolist(),
        "mean": mean.tolist(),
        "std": np.sqrt(variance).tolist(),
        "count": [int(counts.sum())],
        **{key: average(values[key]).tolist() for key in QUANTILES},
    }


def write_meta(folder: Path, shapes: dict, tasks: dict[str, int], rows: list[dict], fps: float, robot_type: str):
    """Write info.json, stats.json, tasks.parquet and the table of episodes."""
    pyarrow, parquet = import_parquet()
    num_frames = sum(row["length"] for row in rows)
    features = {}
    for key, shape in shapes.items():
        is_image = len(shape) == 3
        features[feature_name(key, shape)] = {
            "dtype": "image" if is_image else "float32",
            "shape": list(shape),
            "names": ["height", "width", "channels"] if is_image else None,
        }
    features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
    for name in INDICES:
        features[name] = {"dtype": "int64", "shape": [1], "names": None}

    info = {
        "codebase_version": VERSION,
        "fps": fps,
        "features": features,
        "total_episodes": len(rows),
        "total_frames": num_frames,
        "total_tasks": len(tasks),
        "chunks_size": 1000,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "data_path": DATA_PATH,
        "video_path": None,
        "robot_type": robot_type,
        "splits": {"train": f"0:{len(rows)}"},
    }
    write_json(folder / "meta" / "info.json", info)
    write_json(folder / "meta" / "stats.json", {name: combine(rows, name) for name in features})

    # pandas takes the instruction as the index of this table, as the package writes it.
    columns = []
    for name, kind, stored in (("task_index", "int64", "int64"), ("task", "unicode", "object")):
        columns.append({"name": name, "field_name": name, "pandas_type": kind, "numpy_type": stored, "metadata": None})
    names = {"name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "object", "metadata": None}
    about = {"index_columns": ["task"], "column_indexes": [names], "columns": columns, "pandas_version": "2.2.0"}
    table = pyarrow.table({"task_index": list(tasks.values()), "task": list(tasks)})
    parquet.write_table(table.replace_schema_metadata({"pandas": json.dumps(about)}), folder / "meta" / "tasks.parquet")
    (folder / EPISODES_PATH).parent.mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / EPISODES_PATH)
