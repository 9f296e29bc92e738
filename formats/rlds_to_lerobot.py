"""
An RLDS dataset as a LeRobot v3 folder, so that the viewers of that community open what you have recorded.

    python -m formats.rlds_to_lerobot --source data/libero_spatial_no_noops/1.0.0 --out libero_lerobot --fps 20

    record of a tfrecord file -> read_episode -> what formats/write_lerobot.py takes

For datasets as formats/write_rlds.py writes them: action (T, A), language_instruction, and observations that are images
or vectors. Observations of another kind, such as texts, are left out.

Axes: T steps of an episode, A dimensions of an action, S of an observation, H and W height and width of an image.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configurator import configure, fail
from formats.rlds_index import make_parser
from formats.tfrecord import find_shards, read_info, read_records
from formats.write_lerobot import write_lerobot
from formats.write_rlds import JPEG_START
from image import decode


@dataclass
class Config:
    source: str = ""  # folder of the RLDS dataset, with its dataset_info.json
    split: str = "train"
    out: str = ""  # folder for the LeRobot dataset; it must not be there yet
    fps: float = 0.0  # steps per second of the robot: 20 in LIBERO, 5 in BridgeData V2
    robot_type: str = "unknown"


def read_episodes(folder: Path, split: str) -> Iterator[dict]:
    """Yield the episodes of a split. Raises OSError, or ValueError that names the file and the record."""
    splits = {found.name: found for found in read_info(folder)}
    if split not in splits:
        raise ValueError(f"{folder}: no split {split!r}, it has {', '.join(splits)}; choose with --split")
    parser = make_parser(folder)
    for path, num_records in find_shards(folder, splits[split], None).items():
        for number, (_, record) in enumerate(read_records(path, num_records=num_records)):
            try:
                yield read_episode(parser, record)
            except (KeyError, ValueError) as error:
                raise ValueError(f"{path}, record {number}: not an episode as write_rlds writes it ({error})") from None


def read_episode(parser, record: bytes) -> dict:
    """
    Return an episode as `write_lerobot` takes it: action (T, A), instruction, and its observations by name. parser: of
    rlds_index.make_parser. Raises KeyError or ValueError for a record of another kind.
    """
    steps = parser.parse_example(record)["steps"]
    episode = {
        "action": np.asarray(steps["action"], np.float32),
        "instruction": steps["language_instruction"][0].decode(),
    }
    for name, values in steps["observation"].items():
        values = np.asarray(values)
        if values.dtype == object:  # T encoded images, or T texts
            images = read_images(values)
            if images is not None:
                episode[name] = images
        elif values.dtype.kind in "fiub":
            episode[name] = values.reshape(len(values), -1)  # (T,) becomes (T, 1)
    return episode


def read_images(encoded: np.ndarray) -> list[bytes] | np.ndarray | None:
    """Return T images: JPEGs as they are, others (T, H, W, 3) uint8. None: these are no images."""
    if all(image.startswith(JPEG_START) for image in encoded):
        return list(encoded)
    try:
        return np.stack([decode(image) for image in encoded])
    except ValueError:
        return None


def main(cfg: Config):
    if not cfg.source or not cfg.out:
        fail("give --source, the folder of an RLDS dataset, and --out, the folder for the LeRobot dataset")
    if not cfg.fps > 0:
        fail(f"--fps {cfg.fps:g}: give the steps per second of the robot: 20 in LIBERO, 5 in BridgeData V2")
    try:
        episodes = read_episodes(Path(cfg.source), cfg.split)
        print(write_lerobot(cfg.out, episodes, cfg.fps, cfg.robot_type))
    except (ImportError, ValueError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main(configure(Config))
