"""
What a run has done so far, and what came of it.

    out/protocol.json     what the result depends on; a folder holds episodes of one protocol only
    out/episodes.jsonl    one line per episode, written as soon as it ends
    out/warnings.json     what is wrong with the simulator, see check_simulator
    out/report.md         success rates with 95 % intervals, beside the published ones
    out/grid.png          the last image of each episode

A row of episodes.jsonl has "task" and "trial"; and "instruction", "success", "steps", "seconds", or "error".
"""

import json
import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from files import atomic_write, expect_object, parse_json, read_json_object, read_text, write_json
from libero_sim.jobs import episode_file
from libero_sim.simulator import IMAGE_SIZE, SUITES
from metrics import wilson

# Success in per cent, 500 episodes: README of openvla (LoRA; mean of three seeds), Table I of arXiv 2502.19645.
PUBLISHED = {
    "OpenVLA": {"libero_spatial": 84.7, "libero_object": 88.4, "libero_goal": 79.2, "libero_10": 53.7},
    "OpenVLA-OFT": {"libero_spatial": 97.6, "libero_object": 98.4, "libero_goal": 97.9, "libero_10": 94.5},
}

SPENT = ("start", "policy", "simulator")  # what a row counts seconds of
TILE = 96  # pixels, side of an episode's image in the grid
GREEN = (30, 150, 60)
RED = (200, 40, 40)


def warn(message: str):
    print(f"warning: {message}", file=sys.stderr)


# -----------------------------------------------------------------------------
# The folder of a run


def open_run(out: Path, protocol: dict):
    """
    Write protocol.json. Raises ValueError if there is another one, which says what has changed, or if there are
    episodes without one.
    """
    path = out / "protocol.json"
    protocol = json.loads(json.dumps(protocol))  # tuples become lists, as they do in the file
    if path.is_file():
        before = read_json_object(path)
        changes = []
        for key, value in protocol.items():
            if before.get(key) != value:
                changes.append(f"{key}: {before.get(key)!r} there, {value!r} now")
        if changes:
            raise ValueError(f"{out} holds episodes of another run; choose another --out.\n" + "\n".join(changes))
    elif (out / "episodes.jsonl").exists():
        raise ValueError(f"{path}: missing, so no one can tell how the episodes were played; choose another --out")
    write_json(path, protocol)


def read_rows(path: Path) -> list[dict]:
    """
    Read the rows of episodes.jsonl, the last one of each episode, in order of task and trial. A line that a kill cut
    off is removed from the file. Raises ValueError for any other damage.
    """
    if not path.exists():
        return []
    text = read_text(path)
    whole_lines = text[: text.rfind("\n") + 1]
    if whole_lines != text:
        with atomic_write(path) as temporary:
            temporary.write_text(whole_lines, encoding="utf-8")

    rows = {}
    for number, line in enumerate(whole_lines.split("\n")[:-1], start=1):
        place = f"{path}, line {number}"
        row = expect_object(parse_json(line, place), place)
        if not is_row(row):
            raise ValueError(f"{place}: not an episode: {line[:80]!r}; remove the line")
        rows[row["task"], row["trial"]] = row
    return [rows[key] for key in sorted(rows)]


def is_row(row: dict) -> bool:
    """True if a row has all that is read of it: of an episode, of a replayed demonstration, or of one with an error."""
    kinds = {"task": int, "trial": int}
    if "error" in row:
        kinds.update(error=str)
    elif "noops" in row:
        kinds.update(success=bool, steps=int, noops=int)
    else:
        kinds.update(instruction=str, success=bool, steps=int, seconds=dict)
    if any(type(row.get(key)) is not kind for key, kind in kinds.items()):
        return False

    numbers = [row[key] for key, kind in kinds.items() if kind is int]
    if "seconds" in kinds:
        numbers += [row["seconds"].get(key) for key in SPENT]
    return all(type(number) in (int, float) and 0 <= number < math.inf for number in numbers)


def append_row(path: Path, row: dict):
    """Add a row to episodes.jsonl. After this it survives a kill, or a power cut."""
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


# -----------------------------------------------------------------------------
# The report


def report(rows: list[dict], protocol: dict, warnings: Iterable[str] = ()) -> str:
    """Return the report as Markdown: success per task and in all. Episodes that ended in an error are counted apart."""
    tried = [row for row in rows if "error" not in row]
    errors = [row for row in rows if "error" in row]

    title = f"# {protocol['task_suite']}: {protocol['policy']} {protocol.get('checkpoint', '')}".rstrip()
    lines = [title, ""]
    lines += [f"**Warning:** {text}\n" for text in warnings]
    if errors:
        lines += error_lines(errors, len(rows))
    lines += success_table(tried)
    lines += ["", *published_table()]
    lines += time_lines(tried)

    facts = [f"{key} {value}" for key, value in protocol.items() if key != "weights"]
    lines += ["", "Protocol: " + ", ".join(facts) + ".", ""]
    return "\n".join(lines)


def error_lines(errors: list[dict], num_rows: int) -> list[str]:
    """Return the last lines of the first errors."""
    lines = [f"**{len(errors)} of {num_rows} episodes ended in an error and count as nothing:**", ""]
    for row in errors[:10]:
        last_line = row["error"].strip().rpartition("\n")[2]
        lines.append(f"- task {row['task']}, trial {row['trial']}: {last_line}")
    return [*lines, "", "The same command again repeats them.", ""]


def success_table(tried: list[dict]) -> list[str]:
    lines = [
        "| task | instruction | success | rate | 95 % interval | steps |",
        "| ---: | --- | ---: | ---: | --- | ---: |",
    ]
    for task in sorted({row["task"] for row in tried}):
        of_task = [row for row in tried if row["task"] == task]
        lines.append(rate_line(str(task), of_task[0]["instruction"], of_task))
    if tried:
        lines.append(rate_line("all", "", tried))
    return lines


def rate_line(task: str, instruction: str, rows: list[dict]) -> str:
    """Return a line of the table: the successes among these episodes, their rate, and its Wilson interval."""
    n = len(rows)
    successes = sum(row["success"] for row in rows)
    low, high = wilson(successes, n)
    steps = np.mean([row["steps"] for row in rows])
    cells = [
        task,
        instruction,
        f"{successes} of {n}",
        f"{successes / n:.1%}",
        f"{low:.1%} to {high:.1%}",
        f"{steps:.0f}",
    ]
    return table_line(cells)


def published_table() -> list[str]:
    lines = [
        table_line(["published (500 episodes each)", *SUITES]),
        "| --- |" + " ---: |" * len(SUITES),
    ]
    for name, figures in PUBLISHED.items():
        cells = [f"{figures[suite]} %" if suite in figures else "" for suite in SUITES]
        lines.append(table_line([name, *cells]))
    return lines


def table_line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def time_lines(tried: list[dict]) -> list[str]:
    """Return where the simulators' processes spent their time."""
    steps = sum(row["steps"] for row in tried)
    spent = {}
    for key in SPENT:
        spent[key] = sum(row["seconds"][key] for row in tried)
    total = sum(spent.values())
    if total == 0:
        return []
    shares = ", ".join(f"{key} {seconds / total:.0%}" for key, seconds in spent.items())
    return ["", f"Where a process spends its time: {steps} steps in {total:.0f} s, of which {shares}."]


# -----------------------------------------------------------------------------
# The grid of last images


def save_grid(path: Path, out: Path, rows: list[dict]):
    """Draw the last image of each episode that has a video: a row for each task, framed in green (success) or red."""
    filmed = [row for row in rows if "error" not in row and episode_file(out, row, ".gif").is_file()]
    if not filmed:
        return

    tasks = sorted({row["task"] for row in filmed})
    trials = sorted({row["trial"] for row in filmed})
    grid = Image.new("RGB", (TILE * len(trials), TILE * len(tasks)), "white")
    for row in filmed:
        video = episode_file(out, row, ".gif")
        try:
            tile = make_tile(video, row["success"])
        except Exception as error:  # PIL raises all kinds for broken files
            warn(f"{video} cannot be read ({error!s:.200}), it is left out of the grid")
            continue
        left = TILE * trials.index(row["trial"]) + 1
        top = TILE * tasks.index(row["task"]) + 1
        grid.paste(tile, (left, top))
    with atomic_write(path) as temporary:
        grid.save(temporary, "PNG")


def make_tile(video: Path, success: bool) -> Image.Image:
    """Return the last image of a video, without the text below it, in a frame."""
    with Image.open(video, formats=("GIF",)) as frames:
        frames.seek(frames.n_frames - 1)
        last = frames.convert("RGB").crop((0, 0, IMAGE_SIZE, IMAGE_SIZE))
    tile = Image.new("RGB", (TILE - 2, TILE - 2), GREEN if success else RED)
    tile.paste(last.resize((TILE - 8, TILE - 8)), (3, 3))
    return tile
