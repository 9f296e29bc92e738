"""
Robot units <-> [-1, 1], and the statistics that say how.

    actions of all frames (N, A) -> compute_statistics -> {"q01": [...], "q99": [...], ...}, one number per dimension
    action (A,), metres and radians -> normalize -> [-1, 1] -> unnormalize -> metres and radians

A policy answers with numbers in [-1, 1]; only the statistics of its training data turn them into movements. With those
of another dataset the same answer is another movement.

prismatic/vla/datasets/rlds/utils/data_utils.py of github.com/openvla/openvla. Axes: N frames, A dimensions.
"""

from collections.abc import Sequence

import numpy as np

# Scheme -> the statistics that become -1 and +1. `normalize` knows a third one, "normal", by mean and deviation.
SCHEMES = {"bounds_q99": ("q01", "q99"), "bounds": ("min", "max")}
SCHEME = "bounds_q99"  # of all datasets but ALOHA

# The dimensions of an end-effector action and their units: changes of position and rotation, and the gripper, 1 open,
# 0 closed.
UNITS = {"dx": "m", "dy": "m", "dz": "m", "droll": "rad", "dpitch": "rad", "dyaw": "rad", "gripper": ""}


# -----------------------------------------------------------------------------
# There and back


def normalize(x: np.ndarray, stats: dict, scheme: str = SCHEME) -> np.ndarray:
    """
    Robot units (..., A) -> [-1, 1], clipped, float32.

    Dimensions outside stats["mask"] (the gripper) stay as they are; without a mask all are normalised. A dimension that
    never changes becomes 0. With scheme "normal" the result is (x - mean) / std, and is not clipped.
    """
    x = np.asarray(x, np.float32)
    mask = action_mask(stats)
    if scheme == "normal":
        mean = np.asarray(stats["mean"], np.float32)
        std = np.asarray(stats["std"], np.float32)
        return np.where(mask, (x - mean) / (std + np.float32(1e-8)), x)

    low_key, high_key = SCHEMES[scheme]
    low = np.asarray(stats[low_key])
    high = np.asarray(stats[high_key])
    span = (high - low + 1e-8).astype(np.float32)  # the difference in float64, unlike the rest: as officially
    y = 2 * (x - low.astype(np.float32)) / span - 1
    y = np.where(mask, np.clip(y, -1, 1), x)

    if "min" in stats and "max" in stats:  # a checkpoint may have only the figures that are needed to act
        is_constant = np.asarray(stats["min"]) == np.asarray(stats["max"])
        y = np.where(is_constant, np.float32(0), y)
    return y


def unnormalize(y: np.ndarray, stats: dict, scheme: str = SCHEME) -> np.ndarray:
    """[-1, 1] (..., A) -> robot units, float64. Dimensions outside stats["mask"] (the gripper) stay as they are."""
    low_key, high_key = SCHEMES[scheme]
    y = np.asarray(y, np.float64)
    low = np.asarray(stats[low_key], np.float64)
    high = np.asarray(stats[high_key], np.float64)
    return np.where(action_mask(stats), 0.5 * (y + 1) * (high - low) + low, y)


def action_mask(stats: dict) -> np.ndarray:
    """Return which dimensions are normalised, (A,) bool."""
    if "mask" in stats:
        return np.asarray(stats["mask"], bool)
    return np.ones(len(stats["q01"]), bool)


# -----------------------------------------------------------------------------
# Statistics


def compute_statistics(tables: Sequence[np.ndarray]) -> dict[str, list[float]]:
    """
    Return mean, std, max, min, q01 and q99 of each dimension over all rows of some (N, A) tables, which may be
    memory-mapped.
    """
    num_rows = sum(len(table) for table in tables)
    mean = sum(np.add.reduce(table, axis=0) for table in tables) / np.float32(num_rows)  # in float32, as officially
    statistics = {"mean": [float(value) for value in mean], "std": [], "max": [], "min": [], "q01": [], "q99": []}

    # One column at a time: the whole table of a large dataset does not fit into memory.
    for i in range(tables[0].shape[1]):
        column = np.concatenate([table[:, i] for table in tables]).astype(np.float64)
        statistics["std"].append(float(column.std()))
        statistics["max"].append(float(column.max()))
        statistics["min"].append(float(column.min()))
        q01, q99 = np.quantile(column, (0.01, 0.99))
        statistics["q01"].append(float(q01))
        statistics["q99"].append(float(q99))
    return statistics


def warn_constant(stats: dict) -> list[str]:
    """Return a line for each normalised dimension that hardly moves: dividing by q99 - q01 would blow its noise up."""
    span = np.asarray(stats["q99"]) - np.asarray(stats["q01"])
    is_constant = np.asarray(stats["min"]) == np.asarray(stats["max"])
    hardly_moves = (span < 1e-4) & action_mask(stats) & ~is_constant
    return [f"action dimension {i} hardly moves (q99 - q01 = {span[i]:.1e})" for i in np.flatnonzero(hardly_moves)]


def warn_gripper(stats: dict) -> list[str]:
    """
    Return a line if the gripper, which is not normalised, goes beyond 0 and 1, so that all of it would fall into one
    bin; or if it never reaches 0.5, from where on a robot opens it.
    """
    has_gripper = not action_mask(stats)[-1]
    low = stats["min"][-1]
    high = stats["max"][-1]
    is_beyond = low < -0.01 or high > 1.01
    never_opens = low < high < 0.5
    if not has_gripper or not (is_beyond or never_opens):
        return []
    return [
        f"the gripper is {low:.3g} ... {high:.3g}, but should be 0 (closed) ... 1 (open): scale it with standardize=, "
        f"or say gripper=False if the last dimension is none"
    ]
