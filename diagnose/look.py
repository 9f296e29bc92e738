"""
See a dataset before training on it: a table of what is in it, warnings, and two pictures.

    python data.py --data_root_dir DIR --data_mix bridge --out look          # every dataset of a mixture
    python -c "from look import look; from lerobot import LeRobot; look(LeRobot('~/data/my_robot'), 1.0, 'look')"

NAME-frames.png shows the first, middle and last frame of some episodes under their instruction: are the pictures
upright, from the right camera, and do the words fit? NAME-actions.png shows how the actions are spread: a dimension
without spread, or with a few far outliers, is normalised into noise or into nothing. N frames, A action dimensions.
"""

import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from image import decode, to_rgb
from tokenizer import action_mask


def look(dataset, weight: float, out: str | Path) -> list[tuple[str, bool, str]]:
    """
    Print the table and write the two pictures into the folder `out`, for any dataset as data.py describes them; returns
    (cause, whether it is probably wrong, what was found) of all that is a warning in the table or might be.
    Numbers of actions are those of dataset.statistics, which training uses; everything else is of this split.
    """
    if not len(dataset):
        print(f"{dataset.name}: no frames in this split\n")
        return [("frames", True, "no frames in this split")]
    if hasattr(dataset, "open"):  # rlds.py, lerobot.py: all numbers at once
        tables = dataset.open()
        actions, episodes = tables["action"][tables["usable"]], tables["frames"][tables["usable"], 0]  # (N, A), (N,)
    else:
        actions, episodes = np.stack([dataset[i]["actions"][0] for i in range(len(dataset))]), None
    say = getattr(dataset, "instruction", lambda i: dataset[i]["instruction"])
    said = [say(i).strip() for i in spread(len(dataset), 20_000)]
    texts, silent = Counter(filter(None, said)), said.count("") / len(said)
    stats, A = dataset.statistics["action"], actions.shape[1]
    names = [str(i) if action_mask(stats)[i] or i < A - 1 else "gripper" for i in range(A)]
    Path(out).mkdir(parents=True, exist_ok=True)
    path = str(Path(out) / dataset.name.replace("/", "_"))
    sizes, broken = draw_frames(f"{path}-frames.png", dataset, episodes)
    draw_actions(f"{path}-actions.png", dataset, actions, names)

    lengths = np.zeros(0, int) if episodes is None else np.unique(episodes, return_counts=True)[1]
    spans = f", {lengths.min()} to {lengths.max()} frames long, mean {lengths.mean():.1f}" if len(lengths) else ""
    print(f"{dataset.name}, weight {weight:g}\n  episodes      {len(lengths) or 'not known'}{spans}")
    print(f"  frames        {len(dataset):,} of {dataset.statistics['num_transitions']:,} in all splits")
    print("\n".join(f"  camera        {camera}: {', '.join(sorted(size))}" for camera, size in sizes.items()))
    print(f"  instructions  {len(texts):,} different among {len(said):,} frames; {silent:.1%} of them have none")
    for text, n in texts.most_common(5):
        print(f"                {n / len(said):6.1%}  {textwrap.shorten(text, 90)}")
    still = still_steps(actions, episodes, dataset.absolute_mask)
    keys = ("min", "q01", "mean", "q99", "max")
    print("  action        " + "".join(f"{key:>11}" for key in (*keys, "idle")))
    for i, name in enumerate(names):
        share = "-" if episodes is None and dataset.absolute_mask[i] else f"{still[:, i].mean():.1%}"  # -: not known
        print(f"    {name:<12}" + "".join(f"{stats[k][i]:>11.4g}" for k in keys) + f"{share:>11}")
    if names[-1] == "gripper":
        x = actions[:, -1]
        for n, low in zip(*np.histogram(x, 10, (min(0, x.min()), max(1, x.max()))), strict=False):
            print(f"  gripper from {low:5.2f} {n / len(x):6.1%} {'#' * round(40 * n / len(x))}".rstrip())
    print(f"  idle          {(idle := still.all(axis=1).mean()):.1%} of the steps move nothing")
    found = findings(dataset, actions, episodes, idle, lengths, silent)
    found += [("pictures", True, line) for line in broken] or [("pictures", False, "those that were drawn can be read")]
    print("\n".join(f"  warning       {line}" for _, wrong, line in found if wrong) or "  no warning")
    print(f"  pictures      {path}-frames.png, {path}-actions.png\n")
    return found


def spread(n: int, most: int) -> list[int]:
    """At most so many of range(n), the first and the last among them."""
    return np.unique(np.linspace(0, n - 1, most).astype(int)).tolist()


def still_steps(actions: np.ndarray, episodes: np.ndarray | None, absolute_mask) -> np.ndarray:
    """
    Which dimensions of which steps do not move (steps that count, A) bool. A relative dimension is still when |action|
    is at most 1e-4 of its range (max - min), an absolute one (the gripper) when it differs by at most that from the
    step before. A step is idle when all of its dimensions are still. Absolute dimensions of the first step of an
    episode, or of steps of unknown episodes, are taken as still; where all are absolute, such a step does not count.
    """
    absolute, span = np.asarray(absolute_mask), actions.max(axis=0) - actions.min(axis=0)  # (A,)
    first = np.ones(len(actions), bool) if episodes is None else np.append(True, episodes[1:] != episodes[:-1])
    before = np.where(first[:, None], actions, np.roll(actions, 1, axis=0))  # (N, A)
    still = (np.abs(np.where(absolute, actions - before, actions)) <= 1e-4 * span) | (span == 0)
    counts = ~first | (not absolute.all())
    return still[counts] if counts.any() else np.zeros((1, len(span)), bool)


def copying(actions: np.ndarray, episodes: np.ndarray | None, stats: dict, absolute_mask) -> float:
    """
    How far off repeating the last action is, as a share of how far off the mean action is; NaN if nothing tells.
    Positions, unlike movements, are like the ones before at any rate, and are left out.
    """
    low, high, mean = (np.asarray(stats[k], np.float64) for k in ("q01", "q99", "mean"))
    moving = action_mask(stats) & (high - low >= 1e-4) & ~np.asarray(absolute_mask)
    if episodes is None or not moving.any() or (episodes[1:] != episodes[:-1]).all():
        return float("nan")
    x = ((actions - mean) / np.maximum(high - low, 1e-4))[:, moving]
    return float(np.abs(np.diff(x, axis=0))[episodes[1:] == episodes[:-1]].mean() / np.abs(x).mean())


def findings(dataset, actions, episodes, idle: float, lengths: np.ndarray, silent: float) -> list[tuple]:
    """(cause, whether it is probably wrong, what was found). silent: share of frames without an instruction."""
    from data import warn_constant, warn_gripper  # data.py imports this file

    stats, bad = dataset.statistics["action"], getattr(dataset, "meta", {}).get("bad_records", [])
    masked, (low, high) = action_mask(stats), (np.asarray(stats[k]) for k in ("min", "max"))
    last = len(low) - 1 if not masked[-1] else len(low)  # the gripper's number, if there is one
    still = [i for i in range(last) if low[i] == high[i]]
    lines = warn_constant(stats) + [f"action dimension {i} never moves, it is always {low[i]:.3g}" for i in still]
    out = [("spread", True, line) for line in lines] or [("spread", False, "every dimension moves")]
    if last < len(low):
        beyond = [("gripper", True, line) for line in warn_gripper(stats)]
        out += beyond or [("gripper", *gripper(low[-1], high[-1], actions[:, -1], episodes))]
    out.append(("idle", idle > 0.3, f"{idle:.0%} of the steps are idle (nothing moves)"))
    if len(lengths):
        short = (lengths < 5).sum()
        out.append(("episodes", short > 0, f"{short} of {len(lengths)} episodes are shorter than 5 frames"))
    if not np.isnan(rate := copying(actions, episodes, stats, dataset.absolute_mask)):
        found = f"repeating the last action is {rate:.0%} as far off as the mean action"
        out.append(("control rate", rate < 0.1, found))
    return out + [
        ("words", silent > 0, f"{silent:.1%} of the frames have no instruction"),
        ("records", len(bad) > 0, f"{len(bad)} bad records are left out: {'; '.join(bad[:3])}".rstrip(": ")),
    ]


def gripper(low: float, high: float, said: np.ndarray, episodes: np.ndarray | None) -> tuple[bool, str]:
    """The finding about it: 0 is closed, 1 open, and most robots begin open."""
    if low == high:
        return True, f"the gripper never moves, it is always {low:.3g}"
    first = said > 0.5 if episodes is None else said[np.append(True, episodes[1:] != episodes[:-1])] > 0.5
    where = "of the frames" if episodes is None else "of the episodes at their start"
    return episodes is not None and first.mean() < 0.5, f"the gripper is open (1) in {first.mean():.0%} {where}"


def draw_frames(path: str, dataset, episodes: np.ndarray | None) -> tuple[dict[str, set], list[str]]:
    """Draw the sheet. Returns the sizes of the pictures of each camera, and a line for each that cannot be read."""
    cameras = getattr(dataset, "views", None) or [getattr(dataset, "camera", "image")] * 9
    alone = np.arange(len(dataset)) if episodes is None else episodes  # without known episodes: single frames
    _, starts, lengths = np.unique(alone, return_index=True, return_counts=True)
    sizes, broken, cells, tall = {}, [], [], 150  # pixels
    for e in spread(len(starts), 24 if episodes is None else 8):
        s, n, text, pictures = int(starts[e]), int(lengths[e]), "", []
        for i in dict.fromkeys((s, s + n // 2, s + n - 1)):
            frame = dataset[i]
            text = text or frame["instruction"]
            for camera, picture in zip(cameras, frame["pictures"], strict=False):
                try:
                    rgb = decode(picture) if isinstance(picture, bytes) else to_rgb(picture)
                    sizes.setdefault(camera, set()).add(f"{rgb.shape[1]} x {rgb.shape[0]}")
                except (ValueError, OSError) as error:
                    broken.append(f"frame {i}, {camera}: {error}")
                    rgb = np.full((tall, tall, 3), 160, np.uint8)
                pictures.append(Image.fromarray(rgb).resize((round(tall * rgb.shape[1] / rgb.shape[0]), tall)))
        cells.append((f"frame {s}" if episodes is None else f"episode {e}, {n} frames", text, pictures))
    width, height = max(sum(p.width + 4 for p in pictures) for _, _, pictures in cells) + 16, tall + 68
    columns = max(1, 1250 // width)
    sheet = Image.new("RGB", (columns * width, -(-len(cells) // columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for k, (title, text, pictures) in enumerate(cells):
        x, y = 8 + k % columns * width, 8 + k // columns * height
        draw.text((x, y), title, "grey", ImageFont.load_default(12))
        lines = textwrap.wrap(text or "(no instruction)", width // 8, max_lines=2, placeholder=" ...")
        draw.multiline_text((x, y + 15), "\n".join(lines), "black", ImageFont.load_default(14), spacing=2)
        for picture in pictures:
            sheet.paste(picture, (x, y + 52))
            x += picture.width + 4
    sheet.save(path)
    return sizes, broken


def draw_actions(path: str, dataset, actions: np.ndarray, names: list[str]):
    """A histogram for each dimension, from a little below q01 to a little above q99 (dashed); the rest at its ends."""
    from matplotlib.figure import Figure  # without pyplot there is no window, whatever the backend

    rows, columns = -(-len(names) // 4), min(4, len(names))
    figure = Figure(figsize=(3.2 * columns, 2.4 * rows), layout="tight")
    for i, name in enumerate(names):
        axis = figure.add_subplot(rows, columns, i + 1, title=f"action {name}", yticks=[])
        low, high = (dataset.statistics["action"][key][i] for key in ("q01", "q99"))
        margin = 0.1 * (high - low) or 0.5
        axis.hist(actions[:, i].clip(low - margin, high + margin), 50, range=(low - margin, high + margin))
        axis.vlines((low, high), *axis.get_ylim(), color="black", linestyle="--", linewidth=0.8)
        axis.locator_params(axis="x", nbins=5)
    figure.suptitle(f"{dataset.name}: actions of {len(actions):,} frames, q01 and q99 dashed")
    figure.savefig(path, dpi=100)
