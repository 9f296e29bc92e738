"""
What a robot dataset is to the rest of the code: frames by number, and statistics.

RLDS folders (rlds.py), LeRobot folders (lerobot.py) and your own samples (samples.py) all look like this, and nothing
else is asked of them. A class of your own with these attributes works as well; it needs no base class.

Axes: n frames of a split, A action dimensions, K actions of a chunk, P state dimensions.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from normalize import UNITS

HOLD_OUT = 0.05  # share of the episodes that is not trained on, where a dataset has no validation split

END_EFFECTOR = tuple(UNITS)  # the names of an end-effector action's dimensions


class RobotDataset(Protocol):
    """One split of one dataset."""

    name: str  # the unnorm_key of a policy trained on it
    # {"action": {"mean", "std", "max", "min", "q01", "q99", "mask"}, "proprio": likewise if there is a state,
    # "num_transitions", "num_trajectories"}, as in dataset_statistics.json
    statistics: dict
    # (A,): True for a set point, repeated beyond the end of an episode; False for a change, which is 0 there
    absolute_mask: Sequence[bool]
    scheme: str  # which statistics become -1 and +1, see normalize.SCHEMES
    action_names: tuple[str, ...]  # (A,): END_EFFECTOR, or names without units
    cameras: tuple[str, ...]  # names of the pictures of a frame, in their order
    action_chunk: int  # K, the most actions that a frame gives
    bad_records: list[str]  # what was left out because it could not be read
    user_code: tuple  # functions and classes of the user that a worker process needs

    def select(self, split: str, action_chunk: int, hold_out: float) -> "RobotDataset":
        """
        Return this data as another split ("train", or "val": the last `hold_out` of the episodes, where the data has
        none of its own), with chunks of K actions. The last K - 1 frames of an episode start none. Raises ValueError if
        there is no such split or chunk.
        """

    def __len__(self) -> int:
        """Return the number of frames that can start a training sample."""

    def __getitem__(self, i: int) -> dict:
        """
        Return frame i: `pictures`, one for each camera, as stored (encoded bytes, a path, or an array (H, W, 3) uint8);
        `actions` (up to K, A) float32 in robot units, from this step on; `instruction`, a str; `proprio` (P,) float32,
        the robot's state, P = 0 without one.
        """

    def instruction(self, i: int) -> str:
        """Return the instruction of frame i, without reading its pictures."""

    def all_actions(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the first action of every frame (n, A), and the episode of every frame (n,) or None if unknown."""


# -----------------------------------------------------------------------------
# What the rooms beside this file share


def as_names(names: str | Sequence[str]) -> tuple[str, ...]:
    """Return names as a tuple; one name is a tuple of one."""
    return (names,) if isinstance(names, str) else tuple(names)


def name_actions(num_dims: int, gripper: bool, absolute: bool) -> tuple[str, ...]:
    """
    Return the names of an action's dimensions: those of the end effector for seven of which six are changes and the
    last is a gripper, else numbers.
    """
    if num_dims == len(END_EFFECTOR) and gripper and not absolute:
        return END_EFFECTOR
    names = [str(i) for i in range(num_dims)]
    if gripper:
        names[-1] = "gripper"
    return tuple(names)


def split_episodes(num_episodes: int, split: str, hold_out: float) -> range:
    """Return the episodes of "train" or "val" of data without splits of its own: val is the last `hold_out` of them."""
    cut = round((1 - hold_out) * num_episodes)
    parts = {"train": range(cut), "val": range(cut, num_episodes)}
    if split not in parts:
        raise ValueError(f"split {split!r}: must be train or val")
    return parts[split]
