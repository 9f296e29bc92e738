"""
See a dataset before training on it: a table of what is in it, warnings, and two images.

    python -m diagnose.look --data_root_dir DIR --data_mix bridge      # every dataset of a mixture

Or from Python, for any dataset that formats/dataset.py describes:

    look(LeRobot("~/data/my_robot"), 1.0, "look")

NAME-frames.png shows the first, middle and last frame of some episodes under their instruction. Are the images upright,
from the right camera, and does the instruction fit? NAME-actions.png shows how the actions are spread. A dimension
without spread, or with a few far outliers, is normalised into noise or into nothing.

Axes: N frames of the split, A action dimensions, H height, W width.
"""

import math
import textwrap
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from configurator import configure, fail
from data import open_mixture
from formats.dataset import RobotDataset
from image import decode, to_rgb
from normalize import action_mask, warn_constant, warn_gripper
from progress import show_progress

MAX_INSTRUCTIONS = 20_000  # frames whose instruction is read
THUMBNAIL = 150  # pixels, the height of a frame on the sheet
SHEET_WIDTH = 1250  # pixels
STILL = 1e-4  # of a dimension's range: it does not move if it moves by no more than that
COLUMNS = ("min", "q01", "mean", "q99", "max")  # statistics in the table


@dataclass
class Config:
    data_root_dir: str = ""  # folder with one folder per dataset
    data_mix: str = "bridge"  # a mixture or a dataset of formats/oxe.py
    out: str = "look"  # folder for the images
    skip_bad_records: bool = False  # leave broken records out and count them, instead of stopping


@dataclass
class Finding:
    """What was found about one possible cause of trouble."""

    cause: str  # frames, spread, gripper, idle, episodes, control rate, instructions, records, images
    is_wrong: bool  # probably
    text: str


@dataclass
class Strip:
    """Some frames of one episode, side by side."""

    title: str
    instruction: str = ""
    thumbnails: list[Image.Image] = field(default_factory=list)


@dataclass
class Summary:
    """What is in a dataset. Statistics of actions cover all splits, as in training; all else describes this split."""

    dataset: RobotDataset
    actions: np.ndarray  # (N, A) in robot units
    episodes: np.ndarray | None  # (N,) the episode of every frame; None: not known
    lengths: np.ndarray  # frames of each episode; none if they are not known
    dimensions: list[str]  # A names: 0, 1, ... and gripper
    instructions: list[str]  # of up to MAX_INSTRUCTIONS frames
    still: np.ndarray  # (steps, A) bool, see `still_steps`
    strips: list[Strip]
    image_sizes: dict[str, set[str]]  # camera -> "640 x 480", of the frames in `strips`
    unreadable: list[str]  # a line for each image in `strips` that cannot be read

    @property
    def statistics(self) -> dict:
        return self.dataset.statistics["action"]

    @property
    def has_gripper(self) -> bool:
        return self.dimensions[-1] == "gripper"

    @property
    def share_idle(self) -> float:
        """The share of the steps in which nothing moves."""
        return float(self.still.all(axis=1).mean())

    @property
    def share_without_instruction(self) -> float:
        return self.instructions.count("") / len(self.instructions)


def look(dataset: RobotDataset, weight: float, out: str | Path) -> list[Finding]:
    """
    Print a table of what is in a dataset, and draw two images into the folder `out`. Return all that is a warning in
    the table, or might have been one.
    """
    if not len(dataset):
        print(f"{dataset.name}: no frames in this split\n")
        return [Finding("frames", True, "no frames in this split")]
    summary = summarize(dataset)
    findings = find_faults(summary)

    Path(out).mkdir(parents=True, exist_ok=True)
    stem = dataset.name.replace("/", "_")
    frames_file = Path(out) / f"{stem}-frames.png"
    actions_file = Path(out) / f"{stem}-actions.png"
    draw_frames(frames_file, summary.strips)
    draw_actions(actions_file, summary)

    print_summary(summary, weight)
    print_findings(findings)
    print(f"  images        {frames_file}, {actions_file}\n")
    return findings


# -----------------------------------------------------------------------------
# Compute


def summarize(dataset: RobotDataset) -> Summary:
    """Read all actions, many instructions and a few images of a dataset."""
    actions, episodes = dataset.all_actions()  # (N, A), (N,)
    lengths = np.zeros(0, int)
    if episodes is not None:
        _, lengths = np.unique(episodes, return_counts=True)

    dimensions = [str(i) for i in range(actions.shape[1])]
    if not action_mask(dataset.statistics["action"])[-1]:
        dimensions[-1] = "gripper"

    strips, image_sizes, unreadable = read_strips(dataset, episodes)
    return Summary(
        dataset=dataset,
        actions=actions,
        episodes=episodes,
        lengths=lengths,
        dimensions=dimensions,
        instructions=[dataset.instruction(i).strip() for i in spread(len(dataset), MAX_INSTRUCTIONS)],
        still=still_steps(actions, episodes, dataset.absolute_mask),
        strips=strips,
        image_sizes=image_sizes,
        unreadable=unreadable,
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


def repetition_error(summary: Summary) -> float | None:
    """
    Return how far off repeating the last action is, as a share of how far off the mean action is. None if that cannot
    be told. Positions are left out: unlike movements, they are always like the ones before.
    """
    stats = summary.statistics
    low = np.asarray(stats["q01"], np.float64)
    high = np.asarray(stats["q99"], np.float64)
    mean = np.asarray(stats["mean"], np.float64)
    is_movement = action_mask(stats) & (high - low >= 1e-4) & ~np.asarray(summary.dataset.absolute_mask)
    has_previous = ~episode_starts(summary.episodes, len(summary.actions))
    if not is_movement.any() or not has_previous.any():
        return None

    scaled = (summary.actions - mean) / np.maximum(high - low, 1e-4)
    scaled = scaled[:, is_movement]
    changes = np.abs(np.diff(scaled, axis=0))[has_previous[1:]]
    return float(changes.mean() / np.abs(scaled).mean())


# -----------------------------------------------------------------------------
# Read some frames


def read_strips(
    dataset: RobotDataset, episodes: np.ndarray | None
) -> tuple[list[Strip], dict[str, set[str]], list[str]]:
    """
    Read frames from all over the dataset. Return them as strips, with the sizes of each camera's images, and a line for
    each image that cannot be read.
    """
    strips = []
    sizes = {}
    unreadable = []
    for title, numbers in choose_frames(len(dataset), episodes):
        strip = Strip(title)
        for i in numbers:
            frame = dataset[i]
            strip.instruction = strip.instruction or frame["instruction"]
            for camera, picture in zip(dataset.cameras, frame["pictures"], strict=False):
                try:
                    image = decode_picture(picture)
                    sizes.setdefault(camera, set()).add(f"{image.shape[1]} x {image.shape[0]}")
                except (ValueError, OSError) as error:
                    unreadable.append(f"frame {i}, {camera}: {error}")
                    image = np.full((THUMBNAIL, THUMBNAIL, 3), 160, np.uint8)  # grey
                strip.thumbnails.append(make_thumbnail(image))
        strips.append(strip)
    return strips, sizes, unreadable


def choose_frames(num_frames: int, episodes: np.ndarray | None) -> list[tuple[str, list[int]]]:
    """
    Return (title, numbers of frames) for each strip: the first, middle and last frame of eight episodes. If the
    episodes are not known, 24 single frames.
    """
    if episodes is None:
        return [(f"frame {i}", [i]) for i in spread(num_frames, 24)]

    _, starts, lengths = np.unique(episodes, return_index=True, return_counts=True)
    chosen = []
    for episode in spread(len(starts), 8):
        first = int(starts[episode])
        length = int(lengths[episode])
        numbers = {first, first + length // 2, first + length - 1}  # fewer than three of a short episode
        chosen.append((f"episode {episode}, {length} frames", sorted(numbers)))
    return chosen


def decode_picture(picture) -> np.ndarray:
    """Return a picture of a frame, as it is stored, as (H, W, 3) uint8."""
    if isinstance(picture, bytes):
        return decode(picture)
    return to_rgb(picture)


def make_thumbnail(image: np.ndarray) -> Image.Image:
    height, width = image.shape[:2]
    return Image.fromarray(image).resize((round(THUMBNAIL * width / height), THUMBNAIL))


# -----------------------------------------------------------------------------
# Find faults


def find_faults(summary: Summary) -> list[Finding]:
    """Return a finding, or several, about each possible cause of trouble."""
    bad = summary.dataset.bad_records
    records = f"{len(bad)} bad records are left out"
    if bad:
        records += f": {'; '.join(bad[:3])}"
    idle = summary.share_idle
    silent = summary.share_without_instruction

    findings = find_constant_dimensions(summary)
    if summary.has_gripper:
        findings += find_gripper_faults(summary)
    findings.append(Finding("idle", idle > 0.3, f"{idle:.0%} of the steps are idle (nothing moves)"))
    if len(summary.lengths):
        short = int((summary.lengths < 5).sum())
        text = f"{short} of {len(summary.lengths)} episodes are shorter than 5 frames"
        findings.append(Finding("episodes", short > 0, text))
    repetition = repetition_error(summary)
    if repetition is not None:
        text = f"repeating the last action is {repetition:.0%} as far off as the mean action"
        findings.append(Finding("control rate", repetition < 0.1, text))
    findings.append(Finding("instructions", silent > 0, f"{silent:.1%} of the frames have no instruction"))
    findings.append(Finding("records", len(bad) > 0, records))
    findings += [Finding("images", True, line) for line in summary.unreadable]
    if not summary.unreadable:
        findings.append(Finding("images", False, "those that were drawn can be read"))
    return findings


def find_constant_dimensions(summary: Summary) -> list[Finding]:
    """Report dimensions that hardly or never move. Whether the gripper does is told by `find_gripper_faults`."""
    stats = summary.statistics
    lines = warn_constant(stats)
    for i, name in enumerate(summary.dimensions):
        low = stats["min"][i]
        if name != "gripper" and low == stats["max"][i]:
            lines.append(f"action dimension {i} never moves, it is always {low:.3g}")
    if not lines:
        return [Finding("spread", False, "every dimension moves")]
    return [Finding("spread", True, line) for line in lines]


def find_gripper_faults(summary: Summary) -> list[Finding]:
    """Report a gripper that is scaled otherwise, never moves or seems to be turned: most robots begin with it open."""
    stats = summary.statistics
    beyond = warn_gripper(stats)
    if beyond:
        return [Finding("gripper", True, line) for line in beyond]
    low = stats["min"][-1]
    if low == stats["max"][-1]:
        return [Finding("gripper", True, f"the gripper never moves, it is always {low:.3g}")]

    is_open = summary.actions[:, -1] > 0.5
    if summary.episodes is None:
        return [Finding("gripper", False, f"the gripper is open (1) in {is_open.mean():.0%} of the frames")]
    share = is_open[episode_starts(summary.episodes, len(is_open))].mean()
    text = f"the gripper is open (1) in {share:.0%} of the episodes at their start"
    return [Finding("gripper", bool(share < 0.5), text)]


# -----------------------------------------------------------------------------
# Draw


def draw_frames(path: str | Path, strips: list[Strip]):
    """Draw the strips in columns, each under its title and its instruction."""
    widest = 0
    for strip in strips:
        strip_width = sum(thumbnail.width + 4 for thumbnail in strip.thumbnails)
        widest = max(widest, strip_width)
    width = widest + 16
    height = THUMBNAIL + 68
    columns = max(1, SHEET_WIDTH // width)
    rows = math.ceil(len(strips) / columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    pen = ImageDraw.Draw(sheet)

    for i, strip in enumerate(strips):
        row, column = divmod(i, columns)
        x = 8 + column * width
        y = 8 + row * height
        pen.text((x, y), strip.title, "grey", ImageFont.load_default(12))
        instruction = strip.instruction or "(no instruction)"
        lines = textwrap.wrap(instruction, width // 8, max_lines=2, placeholder=" ...")
        pen.multiline_text((x, y + 15), "\n".join(lines), "black", ImageFont.load_default(14), spacing=2)
        for thumbnail in strip.thumbnails:
            sheet.paste(thumbnail, (x, y + 52))
            x += thumbnail.width + 4
    sheet.save(path)


def draw_actions(path: str | Path, summary: Summary):
    """Draw a histogram for each dimension, from a little below q01 to a little above q99. The rest is at its ends."""
    from matplotlib.figure import Figure  # without pyplot there is no window, whatever the backend

    A = len(summary.dimensions)
    columns = min(4, A)
    rows = math.ceil(A / 4)
    figure = Figure(figsize=(3.2 * columns, 2.4 * rows), layout="tight")
    for i, name in enumerate(summary.dimensions):
        axis = figure.add_subplot(rows, columns, i + 1, title=f"action {name}", yticks=[])
        q01 = summary.statistics["q01"][i]
        q99 = summary.statistics["q99"][i]
        margin = 0.1 * (q99 - q01) or 0.5
        limits = (q01 - margin, q99 + margin)
        axis.hist(summary.actions[:, i].clip(*limits), 50, range=limits)
        axis.vlines((q01, q99), *axis.get_ylim(), color="black", linestyle="--", linewidth=0.8)
        axis.locator_params(axis="x", nbins=5)
    figure.suptitle(f"{summary.dataset.name}: actions of {len(summary.actions):,} frames, q01 and q99 dashed")
    figure.savefig(path, dpi=100)


# -----------------------------------------------------------------------------
# Print


def print_summary(summary: Summary, weight: float):
    """Print the table."""
    dataset = summary.dataset
    print(f"{dataset.name}, weight {weight:g}")
    print_episodes(summary.lengths)
    print(f"  frames        {len(dataset):,} of {dataset.statistics['num_transitions']:,} in all splits")
    for camera, sizes in summary.image_sizes.items():
        print(f"  camera        {camera}: {', '.join(sorted(sizes))}")
    print_instructions(summary)
    print_actions(summary)
    if summary.has_gripper:
        print_gripper(summary.actions[:, -1])
    print(f"  idle          {summary.share_idle:.1%} of the steps move nothing")


def print_episodes(lengths: np.ndarray):
    if not len(lengths):
        print("  episodes      not known")
        return
    frames = f"{lengths.min()} to {lengths.max()} frames long, mean {lengths.mean():.1f}"
    print(f"  episodes      {len(lengths)}, {frames}")


def print_instructions(summary: Summary):
    """Print how many there are, and the five most frequent ones."""
    n = len(summary.instructions)
    counts = Counter(text for text in summary.instructions if text)
    silent = f"{summary.share_without_instruction:.1%} of them have none"
    print(f"  instructions  {len(counts):,} different among {n:,} frames; {silent}")
    for text, count in counts.most_common(5):
        print(f"                {count / n:6.1%}  {textwrap.shorten(text, 90)}")


def print_actions(summary: Summary):
    """Print a line of statistics for each dimension."""
    titles = (*COLUMNS, "idle")
    print("  action        " + "".join(f"{title:>11}" for title in titles))
    for i, name in enumerate(summary.dimensions):
        numbers = "".join(f"{summary.statistics[key][i]:>11.4g}" for key in COLUMNS)
        idle = f"{summary.still[:, i].mean():.1%}"
        if summary.episodes is None and summary.dataset.absolute_mask[i]:
            idle = "-"  # not known
        print(f"    {name:<12}{numbers}{idle:>11}")


def print_gripper(values: np.ndarray):
    """Print a histogram."""
    limits = (min(0, values.min()), max(1, values.max()))
    counts, edges = np.histogram(values, 10, limits)
    for count, low in zip(counts, edges[:-1], strict=True):
        bar = "#" * round(40 * count / len(values))
        print(f"  gripper from {low:5.2f} {count / len(values):6.1%} {bar}".rstrip())


def print_findings(findings: list[Finding]):
    """Print those that are probably wrong."""
    wrong = [finding for finding in findings if finding.is_wrong]
    for finding in wrong:
        print(f"  warning       {finding.text}")
    if not wrong:
        print("  no warning")


def main(cfg: Config):
    if not cfg.data_root_dir:
        fail("--data_root_dir DIR is missing: the folder that holds the datasets")
    try:
        mixture = open_mixture(
            cfg.data_root_dir, cfg.data_mix, skip_bad_records=cfg.skip_bad_records, progress=show_progress
        )
        for dataset, weight in mixture:
            look(dataset, weight, cfg.out)
    except (ValueError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main(configure(Config))
