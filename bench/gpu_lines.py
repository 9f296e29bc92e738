"""
The results of `python -m bench gpu`: one JSON object a line, written as soon as it is known.

    {"stage": "actions", "name": "drafted, all right", "value": 61.2, "unit": "actions/s", "status": "measured", ...}

A line stands for itself: it says on which card, with which versions, when and by which command it was made. This file
needs nothing but Python, so that results can be read where PyTorch is missing or broken.
"""

import json
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from files import read_json_lines

MEASURED = "measured"  # a figure
PASSED = "passed"  # a check: the value is what was compared with a limit, which the note names
FAILED = "failed"  # a check beyond its limit, or an error
SKIPPED = "skipped"  # the note says what is missing
OUT_OF_MEMORY = "out of memory"
STOPPED = "stopped"  # the whole stage crashed or took too long; what it had written stays
STATUSES = (MEASURED, PASSED, FAILED, SKIPPED, OUT_OF_MEMORY, STOPPED)
WITH_VALUE = (MEASURED, PASSED)


@dataclass
class Line:
    """One result."""

    stage: str
    name: str
    value: float | None  # None where nothing could be measured
    unit: str
    status: str  # one of STATUSES
    note: str  # how it was measured, or why not
    card: str  # the GPU, or what stands in for it
    versions: dict[str, str]  # of Python, PyTorch, CUDA and this code
    date: str  # ISO 8601, with the time zone
    command: str  # which started the run
    tiny: bool  # True: a try-out with tiny models, whose figures mean nothing


TYPES = {
    "stage": str,
    "name": str,
    "value": (float, int, type(None)),
    "unit": str,
    "status": str,
    "note": str,
    "card": str,
    "versions": dict,
    "date": str,
    "command": str,
    "tiny": bool,
}


def check_line(row: dict) -> Line:
    """Return a row as a Line. Raises ValueError if a field is missing, unknown or of another type."""
    names = [field.name for field in fields(Line)]
    if sorted(row) != sorted(names):
        raise ValueError(f"a result has the fields {', '.join(sorted(row))}; expected {', '.join(names)}")
    for name, allowed in TYPES.items():
        value = row[name]
        is_number = allowed is TYPES["value"]
        if not isinstance(value, allowed) or (is_number and isinstance(value, bool)):
            raise ValueError(f"{name} of a result is {value!r}, of type {type(value).__name__}")

    line = Line(**row)
    if line.status not in STATUSES:
        raise ValueError(f"status of a result is {line.status!r}; expected one of {', '.join(STATUSES)}")
    if line.status in WITH_VALUE and (line.value is None or not math.isfinite(line.value)):
        raise ValueError(f"{line.stage}, {line.name}: {line.status}, but its value is {line.value}")
    for name, text in (("name", line.name), ("date", line.date), ("card", line.card)):
        if not text:
            raise ValueError(f"{name} of a result is empty: {row}")
    return line


def append_line(file: Path, line: Line):
    """Write a result behind those of a file, in one piece, and flush it to the disk: this process may crash next."""
    check_line(asdict(line))
    text = json.dumps(asdict(line), allow_nan=False) + "\n"
    with open(file, "a", encoding="utf-8") as results:
        results.write(text)
        results.flush()
        os.fsync(results.fileno())


def read_lines(file: Path) -> list[Line]:
    """Return the results of a file, none if there is no such file. Raises ValueError that names a broken line."""
    if not file.is_file():
        return []
    return [check_line(row) for row in read_json_lines(file)]


# -----------------------------------------------------------------------------
# For people


def table(title: str, lines: list[Line]) -> str:
    """Return the results of one stage as docs/benchmarks.md shows them, in Markdown."""
    rows = [f"### {title}", "", "| what | result | how |", "|---|---|---|"]
    for line in lines:
        note = line.note.replace("|", "/")  # a column ends with it
        rows.append(f"| {line.name} | {result_text(line)} | {note} |")
    return "\n".join(rows) + "\n"


def result_text(line: Line) -> str:
    """Return value, unit and status of a result in a few words."""
    if line.value is None:
        return line.status
    text = f"{number_text(line.value)} {line.unit}".strip()
    if line.status == MEASURED:
        return text
    return f"{line.status}: {text}"


def number_text(value: float) -> str:
    """Return a number with three digits, or all digits before the point."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
