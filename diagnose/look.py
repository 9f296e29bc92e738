"""
See a dataset before training on it: a table of what is in it, warnings, and two images.

    python -m diagnose.look --data_root_dir DIR --data_mix bridge      # every dataset of a mixture
    python -m diagnose.look --config mine.py                           # your own data: the config file of train.py

NAME-frames.png shows the first, middle and last frame of some episodes under their instruction. Are the images upright,
from the right camera, and does the instruction fit? NAME-actions.png shows how the actions are spread. A dimension
without spread, or with a few far outliers, is normalised into noise or into nothing.

Axes: N frames of the split, H height, W width of an image.
"""

import math
import textwrap
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from configurator import configure, fail
from data import needs_folder, open_mixture
from formats.dataset import RobotDataset
from formats.faults import Finding, Numbers, find_faults, read_numbers, spread
from image import decode, to_rgb
from progress import show_progress

MAX_INSTRUCTIONS = 20_000  # frames whose instruction is read
THUMBNAIL = 150  # pixels, the height of a frame on the sheet
SHEET_WIDTH = 1250  # pixels
COLUMNS = ("min", "q01", "mean", "q99", "max")  # statistics in the table


@dataclass
class Config:
    data_root_dir: str = ""  # folder with one folder per dataset
    data_mix: Any = "bridge"  # a mixture or a dataset of formats/oxe.py; or your own, as in a config file of train.py
    views: tuple[str, ...] = ("primary",)  # cameras of datasets of formats/oxe.py
    out: str = "look"  # folder for the images
    skip_bad_records: bool = False  # leave broken records out and count them, instead of stopping


@dataclass
class Strip:
    """Some frames of one episode, side by side."""

    title: str
    instruction: str = ""
    thumbnails: list[Image.Image] = field(default_factory=list)


@dataclass
class Images:
    """Some frames from all over a dataset."""

    strips: list[Strip]
    sizes: dict[str, set[str]]  # camera -> "640 x 480", of the frames in `strips`
    unreadable: list[str]  # a line for each image in `strips` that cannot be read


def look(dataset: RobotDataset, weight: float, out: str | Path) -> list[Finding]:
    """
    Print a table of what is in a dataset, and draw two images into the folder `out`. Return all that is a warning in
    the table, or might have been one.
    """
    if not len(dataset):
        print(f"{dataset.name}: no frames in this split\n")
        return [Finding("frames", True, "no frames in this split")]
    numbers = read_numbers(dataset, MAX_INSTRUCTIONS)
    images = read_images(dataset, numbers.episodes)
    findings = find_faults(numbers)
    findings += [Finding("images", True, line) for line in images.unreadable]
    if not images.unreadable:
        findings.append(Finding("images", False, "those that were drawn can be read"))

    Path(out).mkdir(parents=True, exist_ok=True)
    stem = dataset.name.replace("/", "_")
    frames_file = Path(out) / f"{stem}-frames.png"
    actions_file = Path(out) / f"{stem}-actions.png"
    draw_frames(frames_file, images.strips)
    draw_actions(actions_file, numbers)

    print_numbers(numbers, images, weight)
    print_findings(findings)
    print(f"  images        {frames_file}, {actions_file}\n")
    return findings


# -----------------------------------------------------------------------------
# Read some frames


def read_images(dataset: RobotDataset, episodes: np.ndarray | None) -> Images:
    """Read frames from all over a dataset. episodes: (N,) the episode of every frame; None: not known."""
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
    return Images(strips, sizes, unreadable)


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


def draw_actions(path: str | Path, numbers: Numbers):
    """Draw a histogram for each dimension, from a little below q01 to a little above q99. The rest is at its ends."""
    from matplotlib.figure import Figure  # without pyplot there is no window, whatever the backend

    A = len(numbers.dimensions)
    columns = min(4, A)
    rows = math.ceil(A / 4)
    figure = Figure(figsize=(3.2 * columns, 2.4 * rows), layout="tight")
    for i, name in enumerate(numbers.dimensions):
        axis = figure.add_subplot(rows, columns, i + 1, title=f"action {name}", yticks=[])
        q01 = numbers.statistics["q01"][i]
        q99 = numbers.statistics["q99"][i]
        margin = 0.1 * (q99 - q01) or 0.5
        limits = (q01 - margin, q99 + margin)
        axis.hist(numbers.actions[:, i].clip(*limits), 50, range=limits)
        axis.vlines((q01, q99), *axis.get_ylim(), color="black", linestyle="--", linewidth=0.8)
        axis.locator_params(axis="x", nbins=5)
    figure.suptitle(f"{numbers.dataset.name}: actions of {len(numbers.actions):,} frames, q01 and q99 dashed")
    figure.savefig(path, dpi=100)


# -----------------------------------------------------------------------------
# Print


def print_numbers(numbers: Numbers, images: Images, weight: float):
    """Print the table."""
    dataset = numbers.dataset
    print(f"{dataset.name}, weight {weight:g}")
    print_episodes(numbers.lengths)
    print(f"  frames        {len(dataset):,} of {dataset.statistics['num_transitions']:,} in all splits")
    for camera, sizes in images.sizes.items():
        print(f"  camera        {camera}: {', '.join(sorted(sizes))}")
    print_instructions(numbers)
    print_actions(numbers)
    if numbers.has_gripper:
        print_gripper(numbers.actions[:, -1])
    print(f"  idle          {numbers.share_idle:.1%} of the steps move nothing")


def print_episodes(lengths: np.ndarray):
    if not len(lengths):
        print("  episodes      not known")
        return
    frames = f"{lengths.min()} to {lengths.max()} frames long, mean {lengths.mean():.1f}"
    print(f"  episodes      {len(lengths)}, {frames}")


def print_instructions(numbers: Numbers):
    """Print how many there are, and the five most frequent ones."""
    n = len(numbers.instructions)
    counts = Counter(text for text in numbers.instructions if text)
    silent = f"{numbers.share_without_instruction:.1%} of them have none"
    print(f"  instructions  {len(counts):,} different among {n:,} frames; {silent}")
    for text, count in counts.most_common(5):
        print(f"                {count / n:6.1%}  {textwrap.shorten(text, 90)}")


def print_actions(numbers: Numbers):
    """Print a line of statistics for each dimension."""
    titles = (*COLUMNS, "idle")
    print("  action        " + "".join(f"{title:>11}" for title in titles))
    for i, name in enumerate(numbers.dimensions):
        columns = "".join(f"{numbers.statistics[key][i]:>11.4g}" for key in COLUMNS)
        idle = f"{numbers.still[:, i].mean():.1%}"
        if numbers.episodes is None and numbers.dataset.absolute_mask[i]:
            idle = "-"  # not known
        print(f"    {name:<12}{columns}{idle:>11}")


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
    try:
        if not cfg.data_root_dir and needs_folder(cfg.data_mix):
            fail("--data_root_dir DIR is missing, the folder that holds the datasets; or show your own: --config FILE")
        mixture = open_mixture(
            cfg.data_root_dir,
            cfg.data_mix,
            views=cfg.views,
            skip_bad_records=cfg.skip_bad_records,
            progress=show_progress,
        )
        for dataset, weight in mixture:
            look(dataset, weight, cfg.out)
    except (ValueError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main(configure(Config, skip_unknown=True))  # a config file of train.py has more options
