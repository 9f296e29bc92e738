"""
RLDS folders (TFDS tfrecords) -> frames by number, without TensorFlow.

    frames = RLDS("~/data", "bridge_orig")
    frames[0]["pictures"], frames[0]["actions"], frames[0]["instruction"], frames.statistics["action"]["q01"]

Open X-Embodiment is stored as RLDS: an episode is one record of about 2 MB, with its images encoded.

    first run    tfrecord files -> tfrecord.py: records -> rlds_index.py: an index
    later        frame number -> index: action, state, and the places of instruction and images -> one read per image

The first run reads every record once, verifies it, standardises it and writes an index. From then on a frame costs one
read of one image: 20 to 100 kB at a known place. No episode is read or parsed for the sake of one frame. So the order
of frames is free. Memory does not grow with the data, because the index is memory-mapped. Where scattered reads are
slow (a network drive), copy the data to a local disk first.

RLDS: https://arxiv.org/abs/2111.02767.

Axes: T steps of an episode, N frames of all episodes, K steps of an action chunk, P state dimensions.
"""

import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from files import atomic_write, read_json_object
from formats import oxe
from formats.dataset import HOLD_OUT
from formats.rlds_index import cache_folder, can_write, open_index, open_tables
from formats.tfrecord import find_dataset
from formats.user_code import fingerprint_of
from normalize import SCHEME, normalize
from progress import no_progress

# -----------------------------------------------------------------------------
# Which frames a split has


def read_usable(path: Path) -> np.ndarray | None:
    """Return the memory-mapped numbers that `write_usable` wrote. None: they are missing or damaged."""
    size = path.stat().st_size if path.is_file() else 0
    if size == 0 or size % 8:
        return None
    numbers = np.memmap(path, "<i8", "r")
    frames = numbers[:-1]
    return frames if zlib.crc32(frames) == numbers[-1] else None


def choose_episodes(splits: dict, split: str, hold_out: float, row: oxe.Dataset) -> tuple[str, int, int]:
    """
    Return the split of the files that a split is taken from, its first episode there, and the end of its episodes.

    The rule: where the files have a val split, train and val are as in the files; where they have none, val is the last
    `hold_out` of the train episodes, and train is the rest. The row says what these two are called in the files.
    """
    stored = {"train": row.train_split, "val": row.val_split}.get(split, split)
    if split != "train" and has_frames(splits, stored):
        return stored, 0, splits[stored]["episodes"]

    train = row.train_split
    if train not in splits:
        raise ValueError(
            f"no split called {train!r}, dataset_info.json names {', '.join(splits)}; name the one to train on in the "
            f"dataset's row, such as train_split={next(iter(splits), '')!r}"
        )
    num_episodes = splits[train]["episodes"]
    cut = num_episodes
    if not has_frames(splits, row.val_split):
        cut = round((1 - hold_out) * num_episodes)
    if split == "train":
        return train, 0, cut
    return train, cut, num_episodes


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
        self.data_root_dir = data_root_dir
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
        num_dims = self.meta["action_dim"]
        self.absolute_mask, _ = self.row.action_masks(num_dims)
        self.action_names = self.row.action_names(num_dims)
        self.scheme = self.row.scheme
        self.user_code = (self.row.standardize, self.row.keep_frames)

        # The frames of this split.
        self.keep_frames = ""  # which ones the row keeps
        if self.row.keep_frames:
            self.keep_frames = fingerprint_of(self.row.keep_frames, "keep_frames")
        try:
            episodes = choose_episodes(self.meta["splits"], split, hold_out, self.row)
        except ValueError as error:
            raise ValueError(f"{self.folder}: {error}") from None
        self.stored_split, self.first_episode, self.end_episode = episodes
        self.opened = None
        self.length = len(self.open()["usable"])
        if self.length == 0 and split == "train":
            raise ValueError(f"{self.folder}: no frame of split {split!r} can be used; {self.why_empty()}")

    def select(self, split: str, action_chunk: int, hold_out: float) -> "RLDS":
        """Return another split of the same data, with chunks of another length."""
        skip_bad_records = bool(self.bad_records)
        return RLDS(
            self.data_root_dir,
            self.name,
            split=split,
            row=self.row,
            views=self.cameras,
            action_chunk=action_chunk,
            skip_bad_records=skip_bad_records,
            hold_out=hold_out,
        )

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
        if self.keep_frames:
            name += f"-{self.keep_frames[:8]}"
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

    def why_empty(self) -> str:
        """Return why this split has no usable frame."""
        episodes = self.open()["episodes"][self.first_episode : self.end_episode]  # file, first frame, T, instruction
        if not len(episodes):
            return "it has no episodes"
        with_instruction = episodes[episodes[:, 3] == 1]
        if not len(with_instruction):
            return "none of its episodes has an instruction"
        longest = int(with_instruction[:, 2].max())
        if longest < self.action_chunk:
            return f"its episodes have at most {longest} steps, --action_chunk {self.action_chunk} needs as many"
        return "keep_frames of its row drops all"

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
        import google_crc32c

        tables = self.open()
        places = tables["frames"][frame].tolist()
        column = 3 + 3 * self.meta["views"].index(camera)
        offset, length, crc = places[column : column + 3]
        file = int(tables["episodes"][places[0], 0])

        size = os.fstat(tables["files"][file]).st_size
        image = os.pread(tables["files"][file], min(length, size), offset)
        if google_crc32c.value(image) != crc:
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
