"""
A LeRobot folder (v2.0, v2.1, v3.0) -> frames by number, for `data_mix` of a config; needs `pip install pyarrow av`.

    from formats.lerobot import LeRobot
    data_mix = [(LeRobot("~/data/my_robot", camera="observation.images.front"), 1.0)]

v2 has a parquet file of numbers and an mp4 file per episode; v3 joins many episodes into one and says in meta/episodes
where each begins. Numbers are read once, into memory (about 100 bytes a frame); a picture when it is asked for, by
decoding from the key frame before it. Pictures inside parquet are read a file at a time: better make videos of them.
The format: https://huggingface.co/docs/lerobot/lerobot-dataset-v3 (here, `import lerobot` is this file, not theirs).

Axes: N all frames, T steps of an episode, K steps of an action chunk, A action dimensions, P state dimensions.
"""

import importlib
import json
import os
from functools import lru_cache
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from formats.rlds import HOLD_OUT


class LeRobot(Dataset):
    """
    One split of a LeRobot folder: [i] -> dict of `pictures` [(H, W, 3) uint8 array, encoded bytes or path], `actions`
    (up to K, A) float32 from this step to the end of its episode, `instruction` str, `proprio` (P,) float32.

    split: "train", or "val" for the last episodes (rlds.HOLD_OUT). camera: a feature of the data, default the first.
    standardize: (T, A) -> (T, A'), the actions of an episode into your units, gripper last, 1 open and 0 closed.
    gripper=False: the last dimension is none, so normalise it too. absolute=True: actions are targets (joint angles),
    not changes; chunks repeat the last. Raises ImportError, FileNotFoundError, ValueError that name what would do.
    """

    def __init__(self, folder, name=None, split="train", camera=None, action_chunk=1, standardize=None, gripper=True,
                 absolute=False):  # fmt: skip
        self.folder = Path(folder).expanduser().resolve()
        self.name, self.action_chunk = name or self.folder.name, action_chunk
        self.info, self.camera, self.episodes, self.tasks = read_meta(self.folder, camera)
        self.table = read_numbers(self.episodes, standardize)
        lengths = np.array([e["length"] for e in self.episodes])
        self.episode, self.ends = np.repeat(np.arange(len(lengths)), lengths), np.cumsum(lengths)  # (N,), (episodes,)
        cut = int(lengths[: round((1 - HOLD_OUT) * len(lengths))].sum())
        self.frames = {"train": range(cut), "val": range(cut, len(self.episode))}[split]
        last, A = self.table["action"][:, -1], self.table["action"].shape[1]
        if gripper and np.abs(last).max() > 1.1:  # ids would clip it to [-1, 1] without a word
            found = f"the last action dimension is {last.min():g} ... {last.max():g}, no gripper in [0, 1]"
            raise ValueError(f"{self.folder}: {found}; scale it with standardize=, or say gripper=False if it is none")
        self.absolute_mask = (absolute,) * (A - 1) + (absolute or gripper,)
        action = moments(self.table["action"]) | {"mask": [True] * (A - 1) + [not gripper]}
        self.statistics = dict(action=action, num_transitions=len(last), num_trajectories=len(lengths))
        self.statistics["proprio"] = moments(self.table["state"])

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, i: int) -> dict:
        frame = self.frames[i]
        e, end = self.episodes[self.episode[frame]], min(frame + self.action_chunk, self.ends[self.episode[frame]])
        if "video" in e:
            picture = read_frame(e["video"], e["start"] + float(self.table["timestamp"][frame]), self.info["fps"])
        else:
            cell = read_pictures(e["data"], self.camera)[int(self.table["row"][frame])].as_py()
            picture = cell["bytes"] or self.folder / cell["path"]
        actions, proprio = self.table["action"][frame:end].copy(), self.table["state"][frame].copy()
        return dict(pictures=[picture], actions=actions, instruction=self.instruction(i), proprio=proprio)

    def instruction(self, i: int) -> str:
        """Of frame i, without reading its picture."""
        return self.tasks[self.table["task_index"][self.frames[i]]]

    def open(self) -> dict:
        """As of rlds.RLDS, for look.py: `action` (N, A), `frames` (N, 1) episode numbers, `usable` frames (n,)."""
        return dict(action=self.table["action"], frames=self.episode[:, None], usable=np.array(self.frames))


def moments(x: np.ndarray) -> dict:
    """(N, D) -> what dataset_statistics.json holds for it, lists of D numbers; over all splits, as in rlds.py."""
    low, q01, q99, high = np.quantile(x.astype(np.float64), (0, 0.01, 0.99, 1), axis=0).tolist()
    mean, std = x.mean(0, np.float64).tolist(), x.std(0, np.float64).tolist()
    return dict(mean=mean, std=std, max=high, min=low, q01=q01, q99=q99)


def read_meta(folder: Path, camera: str | None) -> tuple[dict, str, list[dict], dict[int, str]]:
    """info.json; the camera; per episode `index`, `length`, parquet file `data`, `video`, its `start` there; tasks."""
    path = folder / "meta" / "info.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: not a LeRobot dataset, it has no meta/info.json")
    info = json.loads(path.read_text(encoding="utf-8"))
    if info.get("codebase_version") not in (known := ("v2.0", "v2.1", "v3.0")):
        raise ValueError(f"{path}: codebase_version is {info.get('codebase_version')}, known are {', '.join(known)}")
    if "action" not in info["features"]:
        raise ValueError(f"{path}: no feature 'action', it has {', '.join(info['features'])}")
    cameras = [key for key, f in info["features"].items() if f["dtype"] in ("image", "video")]
    if not cameras or camera not in [None, *cameras]:
        raise ValueError(f"{path}: no camera {camera or ''}, it has {', '.join(cameras) or 'none'}")
    camera, v3, episodes = camera or cameras[0], info["codebase_version"] == "v3.0", []
    lists = sorted(path.parent.glob("episodes/*/*.parquet")) or [path.parent / f"episodes{'' if v3 else '.jsonl'}"]
    places = [("data", "data"), ("video", f"videos/{camera}")][: 1 + (info["features"][camera]["dtype"] == "video")]
    for row in sorted((row for file in lists for row in read_rows(file)), key=lambda row: row["episode_index"]):
        index, start = row["episode_index"], row.get(f"videos/{camera}/from_timestamp", 0.0)  # in v2 always 0
        episodes.append(dict(index=index, length=row["length"], start=start))
        names = dict(video_key=camera, episode_index=index, episode_chunk=index // info.get("chunks_size", 1000))
        for kind, prefix in places:
            names |= {key: row[f"{prefix}/{key}"] for key in ("chunk_index", "file_index") if v3}
            episodes[-1][kind] = file = folder / info[f"{kind}_path"].format(**names)
            if not file.is_file():
                raise FileNotFoundError(f"{file}: missing, but {path.parent} lists it for episode {index}")
    tasks = read_rows(path.parent / ("tasks.parquet" if v3 else "tasks.jsonl"))
    text = "task" if "task" in tasks[0] else "__index_level_0__"  # pandas' name of an index that has none
    return info, camera, episodes, {row["task_index"]: row[text] for row in tasks}


def read_rows(path: Path) -> list[dict]:
    """Rows of a .jsonl or .parquet file of meta/, without the statistics of each episode."""
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    file = need("pyarrow.parquet").ParquetFile(path)
    return file.read([name for name in file.schema_arrow.names if not name.startswith("stats/")]).to_pylist()


def read_numbers(episodes: list[dict], standardize) -> dict[str, np.ndarray]:
    """The columns action (N, A) and state (N, P) float32; task_index, timestamp, row of its file (N,). ValueError."""
    wanted = {"episode_index", "timestamp", "task_index", "action", "observation.state"}
    parts, path, t = [], None, {}
    for e in episodes:
        if e["data"] != path:  # in v3 the next episode is in the same file
            path, file = e["data"], need("pyarrow.parquet").ParquetFile(e["data"])
            t = {"observation.state": np.zeros((n := file.metadata.num_rows, 0)), "row": np.arange(n)}
            for name in wanted & set(file.schema_arrow.names):
                t[name] = np.array(list(file.read([name])[name].to_numpy()))  # lists become (rows, D)
            if missing := wanted - t.keys():
                raise ValueError(f"{path}: no column {', '.join(sorted(missing))}")
        part = {name: x[t["episode_index"] == e["index"]] for name, x in t.items()}
        part |= {name: np.column_stack([part[name]]).astype(np.float32) for name in ("action", "observation.state")}
        if standardize is not None:  # here, and not kept: a function of a config file cannot go to a worker
            part["action"] = np.asarray(standardize(part["action"]), np.float32)
        if len(part["action"]) != e["length"]:
            raise ValueError(f"{path}: episode {e['index']} has {len(part['action'])} actions, not {e['length']}")
        if bad := np.argwhere(~np.isfinite(np.hstack([part["action"], part["observation.state"]]))).tolist():
            raise ValueError(f"{path}: episode {e['index']}: action or state is not finite at step {bad[0][0]}")
        parts.append(part)
    return {name.removeprefix("observation."): np.concatenate([part[name] for part in parts]) for name in t}


@lru_cache(maxsize=2)
def read_pictures(path: Path, camera: str):
    """The pictures inside a parquet file, still encoded: per row `bytes` or `path`."""
    return need("pyarrow.parquet").ParquetFile(path).read([camera])[camera]


def read_frame(path: Path, seconds: float, fps: float) -> np.ndarray:
    """The frame (H, W, 3) uint8 at a time of a video. Raises ValueError if none is within half a frame of it."""
    try:
        container, best = open_video(path, os.getpid()), None
        container.seek(max(0, int(1e6 * (seconds - 0.5 / fps))))  # microseconds; goes to the key frame before it
        for frame in container.decode(video=0):
            best = min((f for f in (best, frame) if f), key=lambda f: abs(f.time - seconds))
            if frame.time > seconds - 1e-4:  # timestamps are rounded
                break
    except need("av").FFmpegError as error:
        raise ValueError(f"{path}: at {seconds:.4f} s: {error}") from None
    if best is None or abs(best.time - seconds) > 0.5 / fps:
        raise ValueError(f"{path}: no frame at {seconds:.4f} s, the nearest is at {best and best.time} s")
    return best.to_ndarray(format="rgb24")


@lru_cache(maxsize=16)
def open_video(path: Path, process: int):  # of this process alone: a forked one would share its place in the file
    container = need("av").open(str(path))
    container.streams.video[0].codec_context.thread_count = 1  # there are workers already
    return container


def need(package: str):
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ImportError("a LeRobot folder needs two more packages: pip install pyarrow av") from None
