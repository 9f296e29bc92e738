"""
RLDS folders (TFDS tfrecords) -> frames by number, without TensorFlow.

Open X-Embodiment is stored as RLDS: an episode is one record of about 2 MB, its pictures encoded. The first run reads
every record once, verifies it, standardises it (oxe.py) and writes an index: standardised actions and states, and for
each frame the place of its pictures in the files. From then on a frame costs one read of one picture (20 to 100 kB at
a known place; no episode is read or parsed for the sake of one frame), so the order of frames is free, and memory does
not grow with the data: the index is memory-mapped. Where scattered reads are slow (network), copy the data first.

    frames = RLDS("~/data", "bridge_orig")
    frames[0]["pictures"], frames[0]["actions"], frames[0]["instruction"], frames.statistics["action"]["q01"]

The index lies beside the data (or in a cache folder) under the name of a fingerprint of the files, so edited data is
indexed anew. RLDS: https://arxiv.org/abs/2111.02767; statistics as in prismatic/vla/datasets/rlds/utils/data_utils.py
of github.com/openvla/openvla.

Axes: T steps of an episode, N all frames, K steps of an action chunk, A action dimensions, P state dimensions.
"""

import hashlib
import inspect
import json
import os
import re
import shutil
import tempfile
import zlib
from pathlib import Path

import numpy as np

from formats import oxe
from model import write_json
from tokenizer import normalize

HOLD_OUT = 0.05  # of the episodes of a dataset without a validation split: not trained on
NO_BAR = lambda files, title: files  # noqa: E731


# -----------------------------------------------------------------------------
# Find and read


def find_dataset(data_root_dir: str | Path, name: str) -> Path:
    """The newest version folder of a dataset. Raises FileNotFoundError with what is there instead."""
    root = Path(data_root_dir)
    found = (p.parent for p in (root / name).glob("*/features.json"))
    versions = sorted(found, key=lambda p: [int(n) if n.isdecimal() else -1 for n in p.name.split(".")])
    if not versions:
        have = sorted(p.parent.parent.name for p in root.glob("*/*/features.json"))
        where = f"it has: {', '.join(have)}" if have else "no RLDS dataset is in it"
        raise FileNotFoundError(
            f"{root / name}: no dataset (DIR/{name}/VERSION/features.json is looked for) in --data_root_dir {root}; "
            f"{where}. README.md says where to get data; `python train.py` without options makes its own"
        )
    return versions[-1]


def read_records(path: Path, on_bad=None):
    """
    (offset, bytes) of each record of a tfrecord file; its two checksums are verified (crc32c, rotated and offset).
    Raises ValueError for a broken record, or calls on_bad(message) and goes on where that is possible.
    """
    import google_crc32c

    def intact(data: bytes, stored: bytes) -> bool:
        crc = google_crc32c.value(data)
        return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF == int.from_bytes(stored, "little")

    def bad(what: str):
        message = f"{path}: record {number} at byte {offset}: {what}; get the file again, or --skip_bad_records"
        if on_bad is None:
            raise ValueError(message)
        on_bad(message)

    size, offset, number = path.stat().st_size, 0, -1
    with open(path, "rb") as f:
        while offset < size:
            number += 1
            f.seek(offset)
            head = f.read(12)
            length = int.from_bytes(head[:8], "little")
            if len(head) < 12 or not intact(head[:8], head[8:]):
                return bad("its length has a wrong checksum, so the rest of the file cannot be read")
            if offset + 16 + length > size:
                return bad(f"cut off, {size - offset:,} bytes of {16 + length:,}")
            record = f.read(length)
            if intact(record, f.read(4)):
                yield offset + 12, record
            else:
                bad("wrong checksum")
            offset += 16 + length


def read_trajectory(parser, record: bytes, row: oxe.Dataset, rng: np.random.Generator) -> dict:
    """One record -> standardised trajectory, nested dict of arrays with leading axis T; pictures stay encoded."""
    episode = parser.parse_example(record)
    steps = dict(episode.pop("steps"))
    T = len(steps["action"] if not isinstance(steps["action"], dict) else next(iter(steps["action"].values())))
    if T == 0:
        raise ValueError("an empty episode")
    steps["traj_metadata"] = {k: repeat(v, T) for k, v in episode.items()}
    trajectory = oxe.standardize(row, steps, rng)
    action = np.asarray(trajectory["action"], np.float32)
    if action.ndim != 2 or action.shape[1] != row.action_dim:
        raise ValueError(f"action has shape {action.shape}, {row.action_encoding} means (T, {row.action_dim})")
    if not np.isfinite(action).all():
        raise ValueError(f"action {np.argwhere(~np.isfinite(action))[0].tolist()} (step, dimension) is not finite")
    if not len(action):
        raise ValueError("no step is left of this episode after its standardise function")
    return {**trajectory, "action": action}


def repeat(tree, T: int):
    """Episode metadata, once per step."""
    return (
        {k: repeat(v, T) for k, v in tree.items()} if isinstance(tree, dict) else np.repeat(np.array(tree)[None], T, 0)
    )


def get_key(observation: dict, path: str, what: str):
    """observation["a"]["b"] for "a/b", or the key as it stands. Raises ValueError with the keys that are there."""
    tree = observation
    for part in [path] if path in tree else path.split("/"):
        if part not in tree:
            raise ValueError(f"no {what} {path!r} in the observation, which has {sorted(observation)}; mend its row")
        tree = tree[part]
    return tree


def proprio_of(trajectory: dict, keys: tuple, T: int) -> np.ndarray:
    """The robot's state (T, P) float32: the columns that a row names, one column of zeros for each None."""
    observation = trajectory["observation"]
    columns = [np.zeros((T, 1)) if k is None else get_key(observation, k, "state") for k in keys]
    return np.concatenate([np.asarray(c, np.float32).reshape(T, -1) for c in columns] or [np.zeros((T, 0))], axis=1)


# -----------------------------------------------------------------------------
# Index and statistics: one pass over all records, then memory-mapped


def fingerprint(folder: Path, row: oxe.Dataset) -> str:
    """Changes when a file of the dataset, its row or the source of its standardise function does."""
    files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.iterdir()) if p.is_file()]
    parts = files, str(row.images), row.state, row.action_encoding, source_of(row.standardize)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def source_of(function) -> str:
    """The source of a function and of what it uses of its file: functions, numbers, texts."""
    found, todo = {}, [function]
    while todo:
        f = getattr(todo[-1], "func", todo[-1])  # of a functools.partial
        found[f"{f.__module__}.{f.__qualname__}"] = inspect.getsource(f) + repr(getattr(todo.pop(), "keywords", ""))
        for code in [f.__code__, *(c for c in f.__code__.co_consts if inspect.iscode(c))]:
            for name in code.co_names:
                value = f.__globals__.get(name)
                if inspect.isfunction(value) and value.__module__ == f.__module__:
                    if f"{value.__module__}.{value.__qualname__}" not in found:
                        todo.append(value)
                elif isinstance(value, int | float | str | tuple | list | dict | np.ndarray):
                    found[name] = repr(value)
    return re.sub(r" at 0x[0-9a-f]+", "", repr(sorted(found.items())))  # functions in a table: by name only


def open_index(folder: Path, name: str, row: oxe.Dataset, skip_bad_records: bool = False, progress=NO_BAR) -> Path:
    """
    The folder with a dataset's index; made by `write_index` if there is none for these very files, beside the data or,
    where that is read-only, in OPENVLA_CACHE (default: .cache/openvla in the home folder).
    """
    key = f"{name}-{fingerprint(folder, row)}"
    home = Path(os.environ.get("OPENVLA_CACHE") or Path.home() / ".cache" / "openvla")
    places = [folder / ".index" / key, home / key]
    for place in places:
        if (place / "index.json").is_file():
            return place
    writable = os.access(folder, os.W_OK) and folder.stat().st_mode & 0o222  # root may, but should not
    place = places[0] if writable else places[1]
    place.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=place.parent))
    try:
        write_index(work, folder, name, row, skip_bad_records, progress)
        try:
            work.rename(place)
        except OSError:  # another process was faster
            if not (place / "index.json").is_file():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return place


def write_index(out: Path, folder: Path, name: str, row: oxe.Dataset, skip_bad_records: bool, progress):
    """
    Per split: `SPLIT.action` (T, A) and `SPLIT.proprio` (T, P) float32 of all frames; `SPLIT.frames` int64, per frame
    the episode, the place (offset, length) of its instruction in `text`, and per view the place (offset, length) and
    crc32 of its encoded picture; `SPLIT.episodes` int64: file, first frame, number of frames, 1 if it has instructions.
    """
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.example_parser import ExampleParserNp

    info = json.loads((folder / "dataset_info.json").read_text())
    parser = ExampleParserNp(tfds.features.FeaturesDict.from_config(str(folder)).get_serialized_info())
    views = {view: key for view, key in row.images.items() if key}
    rng = np.random.default_rng(zlib.crc32(name.encode()))  # DROID: which of its two cameras an episode shows
    splits, bad, size = {}, [], 0
    with open(out / "text", "wb") as text:
        for split in [s["name"] for s in info["splits"]]:
            files = sorted(folder.glob(f"*-{split}.tfrecord*"))
            tables = [open(out / f"{split}.{kind}", "wb") for kind in ("action", "proprio", "frames", "episodes")]
            episodes = frames = 0
            for number, path in enumerate(progress(files, f"indexing {name} {split}")):
                for offset, record in read_records(path, bad.append if skip_bad_records else None):
                    try:
                        trajectory = read_trajectory(parser, record, row, rng)
                        T = len(trajectory["action"])
                        instructions = np.broadcast_to(trajectory.get("language_instruction", b""), T).tolist()
                        proprio = proprio_of(trajectory, row.state, T)
                        columns = [np.full(T, episodes), *write_text(text, instructions)]
                        for key in views.values():
                            pictures = get_key(trajectory["observation"], key, "camera")
                            columns += locate(
                                record, [p if isinstance(p, bytes) else bytes(p) for p in pictures], offset
                            )
                    except (ValueError, KeyError) as error:
                        message = f"{path}: episode at byte {offset}: {error.args[0]}"
                        if not skip_bad_records:
                            raise ValueError(message) from None
                        bad.append(message)
                        continue
                    labelled = any(instructions)
                    rows = (trajectory["action"], proprio, np.stack(columns, 1), [[number, frames, T, labelled]])
                    for table, values, dtype in zip(tables, rows, ("<f4", "<f4", "<i8", "<i8"), strict=True):
                        table.write(np.asarray(values, dtype).tobytes())
                    episodes, frames, size = episodes + 1, frames + T, proprio.shape[1]
            for table in tables:
                table.close()
            splits[split] = dict(episodes=episodes, frames=frames, files=[p.name for p in files])
    if not any(s["frames"] for s in splits.values()):
        raise ValueError(f"{folder}: no usable episode in {splits}" + "".join(f"\n{m}" for m in bad[:3]))
    totals = {kind: sum(split[kind] for split in splits.values()) for kind in ("episodes", "frames")}
    meta = dict(name=name, views=list(views), splits=splits, action_dim=row.action_dim, proprio_dim=size, **totals)
    meta |= dict(bad_records=bad, statistics=statistics(out, meta, row))
    write_json(out / "index.json", meta)


def locate(record: bytes, pictures: list[bytes], offset: int) -> list[np.ndarray]:
    """Where encoded pictures stand in the file: offsets, lengths, crc32s, each (T,) int64."""
    places, at = [], 0
    for picture in pictures:
        at = record.find(picture, at)
        if not picture or at < 0:
            raise ValueError("an empty picture, or pictures that are not stored as encoded bytes")
        places.append((offset + at, len(picture), zlib.crc32(picture)))
    return list(np.array(places, np.int64).T)


def write_text(file, instructions: list[bytes]) -> list[np.ndarray]:
    """Append each different instruction of an episode once: offsets and lengths, each (T,) int64."""
    places = {}
    for instruction in dict.fromkeys(instructions):
        places[instruction] = (file.tell(), len(instruction))
        file.write(instruction)
    return list(np.array([places[i] for i in instructions], np.int64).T)


def statistics(out: Path, meta: dict, row: oxe.Dataset) -> dict:
    """
    What dataset_statistics.json holds for one dataset: mean, std, max, min, q01, q99 per dimension, over all splits
    and before the language filter, as for the released checkpoints. Of an action, the gripper is masked out.
    """
    result: dict = {}
    for kind, width in (("action", meta["action_dim"]), ("proprio", meta["proprio_dim"])):
        tables = [open_table(out / f"{split}.{kind}", "<f4", width) for split in meta["splits"]]
        mean = sum(np.add.reduce(t, axis=0) for t in tables) / np.float32(meta["frames"])  # float32, as officially
        rows = []
        for i in range(width):  # a column at a time: the table of a large dataset does not fit into memory
            x = np.concatenate([t[:, i] for t in tables]).astype(np.float64)
            rows.append((mean[i], x.std(), x.max(), x.min(), *np.quantile(x, (0.01, 0.99))))
        names = ("mean", "std", "max", "min", "q01", "q99")
        result[kind] = {name: [float(row[i]) for row in rows] for i, name in enumerate(names)}
    result["action"]["mask"] = list(row.action_normalization_mask)
    return result | dict(num_transitions=meta["frames"], num_trajectories=meta["episodes"])


def open_table(path: Path, dtype: str, width: int) -> np.ndarray:
    """A file of numbers as a memory-mapped (rows, width) array."""
    if path.stat().st_size == 0:
        return np.zeros((0, width), dtype)
    return np.memmap(path, dtype, "r").reshape(-1, width)


# -----------------------------------------------------------------------------
# Frames by number


class RLDS:
    """
    One split of one dataset: len() usable frames, [i] -> dict of `pictures` (encoded bytes, one per view), `actions`
    (up to K, A) float32 in robot units from this step on, `instruction` str, `proprio` (P,) float32.

    split: "train" or "val"; where the data has no val split, the last `hold_out` of the episodes are it. Not usable:
    episodes without any instruction, frames that the row's `keep_frames` drops, and the last K - 1 frames of an episode
    (OFT).
    Raises FileNotFoundError or ValueError with the names that would do.
    """

    def __init__(self, data_root_dir, name: str, split="train", row: oxe.Dataset | None = None, views=("primary",),
                 action_chunk: int = 1, skip_bad_records=False, progress=NO_BAR, hold_out=HOLD_OUT):  # fmt: skip
        self.name, self.row, self.views, self.action_chunk = name, row or oxe.lookup(name), tuple(views), action_chunk
        self.folder = find_dataset(Path(data_root_dir).expanduser(), name)
        if missing := [view for view in views if not self.row.images.get(view)]:
            have = [view for view, key in self.row.images.items() if key]
            raise ValueError(
                f"{name} has no {missing[0]!r} camera; its row in oxe.py names {', '.join(have) or 'none'}"
            )
        self.index = open_index(self.folder, name, self.row, skip_bad_records, progress)
        self.meta = json.loads((self.index / "index.json").read_text())
        if (bad := self.meta["bad_records"]) and not skip_bad_records:
            raise ValueError(f"{bad[0]}; {len(bad)} bad records were left out of the index by --skip_bad_records True")
        self.statistics, self.absolute_mask = self.meta["statistics"], self.row.absolute_action_mask
        splits = self.meta["splits"]
        self.split = split if splits.get(split, {}).get("frames") else "train"
        n = splits[self.split]["episodes"]
        cut = n if splits.get("val", {}).get("frames") else round((1 - hold_out) * n)
        self.episode_range = (0, cut) if split == "train" else (0 if self.split == split else cut, n)
        self.opened = None
        self.length = len(self.open()["usable"])
        if not self.length and split == "train":
            raise ValueError(f"{self.folder}: no frame of split {split!r} can be used; has it instructions?")

    def open(self) -> dict:
        """The memory-mapped index and the files; opened late, so that each worker process has its own."""
        if self.opened is None:
            tables = dict(action=("<f4", self.meta["action_dim"]), proprio=("<f4", self.meta["proprio_dim"]))
            tables |= dict(frames=("<i8", 3 + 3 * len(self.meta["views"])), episodes=("<i8", 4))
            self.opened = {k: open_table(self.index / f"{self.split}.{k}", *v) for k, v in tables.items()}
            files = self.meta["splits"][self.split]["files"]
            self.opened["files"] = [
                os.open(path, os.O_RDONLY) for path in (*(self.folder / f for f in files), self.index / "text")
            ]
            self.opened["usable"] = self.find_usable()
        return self.opened

    def __getstate__(self):
        return self.__dict__ | {"opened": None}  # goes to a worker without open files

    def find_usable(self) -> np.ndarray:
        """Numbers of the frames that may start a sample (memory-mapped; found once per split and chunk length)."""
        first, last = self.episode_range
        rule = f"-{zlib.crc32(source_of(self.row.keep_frames).encode()):x}" if self.row.keep_frames else ""
        path = self.index / f"usable-{self.split}-{first}-{last}-{self.action_chunk}{rule}"
        if not path.is_file():
            tmp = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                f = open(tmp, "wb")
            except PermissionError:  # another user's index
                raise PermissionError(f"{path.parent} cannot be written; ask its owner, or copy the data") from None
            with f:
                for e in range(first, last):
                    _, start, T, labelled = self.opened["episodes"][e]
                    keep = np.arange(start, start + max(T - self.action_chunk + 1, 0)) if labelled else np.zeros(0, int)
                    if self.row.keep_frames and len(keep):
                        action = normalize(self.opened["action"][start : start + T], self.statistics["action"])
                        keep = keep[self.row.keep_frames({"action": action})[: len(keep)]]
                    f.write(keep.astype("<i8").tobytes())
            tmp.replace(path)
        return open_table(path, "<i8", 1)[:, 0]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> dict:
        tables = self.open()
        frame = int(tables["usable"][i])
        episode, text_at, text_length, *places = tables["frames"][frame].tolist()
        file, first, T, _ = tables["episodes"][episode].tolist()
        text = os.pread(tables["files"][-1], text_length, text_at)
        pictures = []
        for view in self.views:
            k = 3 * self.meta["views"].index(view)
            at, length, crc = places[k : k + 3]
            picture = os.pread(tables["files"][file], length, at)
            if zlib.crc32(picture) != crc:
                path = self.folder / self.meta["splits"][self.split]["files"][file]
                raise ValueError(
                    f"{path}: the {view} picture at byte {at} has changed since it was indexed; get it again"
                )
            pictures.append(picture)
        end = min(frame + self.action_chunk, first + T)
        return dict(
            pictures=pictures,
            actions=np.array(tables["action"][frame:end]),
            instruction=text.decode("utf-8", "replace"),
            proprio=np.array(tables["proprio"][frame]) if self.meta["proprio_dim"] else np.zeros(0, np.float32),
        )

    def where(self, i: int) -> tuple[int, int]:
        """Episode and step of usable frame i."""
        frame = int(self.open()["usable"][i])
        episode = int(self.open()["frames"][frame, 0])
        return episode, frame - int(self.open()["episodes"][episode, 1])
