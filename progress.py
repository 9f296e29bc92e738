"""
How far long work has come: a bar on a terminal; a line now and then where the output goes to a file or a job's log.

    for path in show_progress(paths, "indexing", "file"): ...
    policy = load_policy(folder, progress=show_progress)       # functions that take `progress` are silent by default
"""

import sys
import time
from collections.abc import Collection, Iterable, Iterator

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 20.0


def show_progress(items: Iterable, title: str, unit: str = "", total: int | None = None) -> Iterator:
    """
    Yield the items, and show how many have been done, on stderr. total: their number, if `items` does not know it.
    """
    if total is None and isinstance(items, Collection):
        total = len(items)
    if sys.stderr.isatty():
        yield from tqdm(items, title, total, unit=f" {unit}", leave=False)
        return

    start = time.monotonic()
    last_line = start
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - last_line > SECONDS_BETWEEN_LINES:
            last_line = now
            print(progress_line(title, unit, done, total, now - start), file=sys.stderr, flush=True)
        yield item


def progress_line(title: str, unit: str, done: int, total: int | None, seconds: float) -> str:
    """Return a line such as "indexing: 120 of 400 MB, 12 MB/s, 23 s left"."""
    if not total:
        return f"{title}: {done} {unit}, {seconds:.0f} s"
    left = f", {done / seconds:.3g} {unit}/s, {seconds / done * (total - done):.0f} s left" if done else ""
    return f"{title}: {done} of {total} {unit}{left}"


def no_progress(items: Iterable, title: str = "", unit: str = "", total: int | None = None) -> Iterable:
    """Return the items as they are: the silent default of functions that take `progress`."""
    return items
