"""
What looks wrong in the numbers and words of a dataset, before any training.

    dataset -> read_numbers -> find_faults -> a Finding about each possible cause of trouble, and whether it is one

Training prints some of what is probably wrong when it starts. diagnose/look.py shows all of it, with images, and
diagnose/check.py makes verdicts of it.

Axes: N frames of the split, A action dimensions, P state dimensions.
"""

from dataclasses import dataclass

import numpy as np

from formats.dataset import RobotDataset
from normalize import action_mask, warn_constant, warn_gripper

# Causes that training warns of when it starts. The others are often as they should be: many robots cannot move in all
# dimensions, and some tasks are short.
WARN_AT_START = ("spread", "gripper", "state", "control rate", "instructions", "records")

STILL = 1e-4  # of a dimension's range: it does not move if it moves by no more than that


@dataclass
class Finding:
    """What was found about one possible cause of trouble."""

    cause: str  # spread, constant, gripper, state, idle, episodes, control rate, instructions, records, frames, images
    is_wrong: bool  # probably
    text: str


@dataclass
class Numbers:
    """The numbers and words of a dataset. Statistics cover all splits, as in training; all else is of this split."""

    dataset: RobotDataset
    actions: np.ndarray  # (N, A) in robot units
    episodes: np.ndarray | None  # (N,) the episode of every frame; None: not known
    lengths: np.ndarray  # frames of each episode; none if they are not known
    instructions: list[str]  # of some frames, spread over all
    still: np.ndarray  # (steps, A) bool, see `still_steps`

    @property
    def statistics(self) -> dict:
        return self.dataset.statistics["action"]

    @property
    def has_gripper(self) -> bool:
        """True if the last dimension is a gripper: that is the one which is not normalised."""
        return not action_mask(self.statistics)[-1]

    @property
    def dimensions(self) -> list[str]:
        """A names: 0, 1, ... and gripper."""
        names = [str(i) for i in range(self.actions.shape[1])]
        if self.has_gripper:
            names[-1] = "gripper"
        return names

    @property
    def share_idle(self) -> float:
        """The share of the steps in which nothing moves."""
        return float(self.still.all(axis=1).mean())

    @property
    def share_without_instruction(self) -> float:
        return self.instructions.count("") / len(self.instructions)


def read_numbers(dataset: RobotDataset, max_instructions: int) -> Numbers:
    """Read all actions of a dataset, and some of its instructions."""
    actions, episodes = dataset.all_actions()  # (N, A), (N,)
    lengths = np.zeros(0, int)
    if episodes is not None:
        _, lengths = np.unique(episodes, return_counts=True)
    return Numbers(
        dataset=dataset,
        actions=actions,
        episodes=episodes,
        lengths=lengths,
        instructions=[dataset.instruction(i).strip() for i in spread(len(dataset), max_instructions)],
        still=still_steps(actions, episodes, dataset.absolute_mask),
    )


def spread(n: int, most: int) -> list[int]:
    """Return at most so many numbers of range(n), evenly spread, the first and the last among them."""
    return np.unique(np.linspace(0, n - 1, most).astype(int)).tolist()


def episode_starts(episodes: np.ndarray | None, n: int) -> np.ndarray:
    """Return which of n frames have no frame of their episode before them, (n,) bool. None: all."""
    if episodes is None:
        return np.ones(n, bool)
    return np.append(True, episodes[1:] != episodes[:-1])


def still_steps(actions: np.ndarray, episodes: np.ndarray | None, absolute_mask) -> np.ndarray:
    """
    Return which dimensions do not move in which steps, (steps that count, A) bool. A step is idle if none moves.

    A relative dimension is still if |action| is at most 1e-4 of its range (max - min). An absolute one, such as the
    gripper, is still if it differs from the step before by at most that.

    The first step of an episode has no step before it, and neither has any step if the episodes are not known. Absolute
    dimensions are taken as still there. If all dimensions are absolute, such a step does not count.
    """
    absolute = np.asarray(absolute_mask)
    span = actions.max(axis=0) - actions.min(axis=0)  # (A,)

    # The first step of an episode is compared with itself.
    is_first = episode_starts(episodes, len(actions))
    previous = np.roll(actions, 1, axis=0)
    previous[is_first] = actions[is_first]

    movement = np.where(absolute, actions - previous, actions)  # (N, A)
    still = (np.abs(movement) <= STILL * span) | (span == 0)
    if not absolute.all():
        return still
    if is_first.all():
        return np.zeros((1, len(span)), bool)  # nothing counts, so nothing is called still
    return still[~is_first]


def repetition_error(numbers: Numbers) -> float | None:
    """
    Return how far off repeating the last action is, as a share of how far off the mean action is. None if that cannot
    be told. Positions are left out: unlike movements, they are always like the ones before.
    """
    stats = numbers.statistics
    low = np.asarray(stats["q01"], np.float64)
    high = np.asarray(stats["q99"], np.float64)
    mean = np.asarray(stats["mean"], np.float64)
    is_movement = action_mask(stats) & (high - low >= 1e-4) & ~np.asarray(numbers.dataset.absolute_mask)
    has_previous = ~episode_starts(numbers.episodes, len(numbers.actions))
    if not is_movement.any() or not has_previous.any():
        return None

    scaled = (numbers.actions - mean) / np.maximum(high - low, 1e-4)
    scaled = scaled[:, is_movement]
    changes = np.abs(np.diff(scaled, axis=0))[has_previous[1:]]
    return float(changes.mean() / np.abs(scaled).mean())


# -----------------------------------------------------------------------------
# Find faults


def find_faults(numbers: Numbers) -> list[Finding]:
    """Return a finding, or several, about each possible cause of trouble."""
    bad = numbers.dataset.bad_records
    records = f"{len(bad)} bad records are left out"
    if bad:
        records += f": {'; '.join(bad[:3])}"
    idle = numbers.share_idle
    silent = numbers.share_without_instruction

    findings = find_constant_dimensions(numbers) + find_constant_states(numbers)
    if numbers.has_gripper:
        findings += find_gripper_faults(numbers)
    findings.append(Finding("idle", idle > 0.3, f"{idle:.0%} of the steps are idle (nothing moves)"))
    if len(numbers.lengths):
        short = int((numbers.lengths < 5).sum())
        text = f"{short} of {len(numbers.lengths)} episodes are shorter than 5 frames"
        findings.append(Finding("episodes", short > 0, text))
    repetition = repetition_error(numbers)
    if repetition is not None:
        text = f"repeating the last action is {repetition:.0%} as far off as the mean action"
        findings.append(Finding("control rate", repetition < 0.1, text))
    findings.append(Finding("instructions", silent > 0, f"{silent:.1%} of the frames have no instruction"))
    findings.append(Finding("records", len(bad) > 0, records))
    return findings


def find_constant_dimensions(numbers: Numbers) -> list[Finding]:
    """Report dimensions that hardly or never move. Whether the gripper does is told by `find_gripper_faults`."""
    stats = numbers.statistics
    findings = [Finding("spread", True, line) for line in warn_constant(stats)]
    for i, name in enumerate(numbers.dimensions):
        low = stats["min"][i]
        if name != "gripper" and low == stats["max"][i]:
            findings.append(Finding("constant", True, f"action dimension {i} never moves, it is always {low:.3g}"))
    if not findings:
        findings.append(Finding("spread", False, "every dimension moves"))
    return findings


def find_constant_states(numbers: Numbers) -> list[Finding]:
    """Report dimensions of the robot's state that never change: a policy that gets them learns nothing from them."""
    stats = numbers.dataset.statistics.get("proprio") or {"min": [], "max": []}
    findings = []
    for i, (low, high) in enumerate(zip(stats["min"], stats["max"], strict=True)):
        if low == high and low != 0:  # zeros are the padding that some datasets have
            findings.append(Finding("state", True, f"state dimension {i} never changes, it is always {low:.3g}"))
    if not findings:
        findings.append(Finding("state", False, f"{len(stats['min'])} dimensions, each changes or is padding"))
    return findings


def find_gripper_faults(numbers: Numbers) -> list[Finding]:
    """Report a gripper that is scaled otherwise, never moves or seems to be turned: most robots begin with it open."""
    stats = numbers.statistics
    beyond = warn_gripper(stats)
    if beyond:
        return [Finding("gripper", True, line) for line in beyond]
    low = stats["min"][-1]
    if low == stats["max"][-1]:
        return [Finding("gripper", True, f"the gripper never moves, it is always {low:.3g}")]

    is_open = numbers.actions[:, -1] > 0.5
    if numbers.episodes is None:
        return [Finding("gripper", False, f"the gripper is open (1) in {is_open.mean():.0%} of the frames")]
    share = is_open[episode_starts(numbers.episodes, len(is_open))].mean()
    text = f"the gripper is open (1) in {share:.0%} of the episodes at their start"
    return [Finding("gripper", bool(share < 0.5), text)]
