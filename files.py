"""
Files that are there whole or not at all.

A process can be killed at any moment, and a disk can be full. So nothing is written in place: the new content goes to
a file beside the target, is flushed to the disk, and takes the target's name in one step.

    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MAX_TEXT = 50 * 10**6  # bytes of a JSON file. Ours are far smaller; in memory one can become 25 times as large.


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """
    Give a temporary path beside `path` to write to. At the end of the block it becomes `path`; after an error it is
    removed, and `path` stays as it was. Folders on the way are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary

        # Some libraries make files that only their owner may read.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)

        # Without this, a power cut could leave the new name with no content.
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: str | Path, content):
    """Write `content` as indented JSON, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2), encoding="utf-8")


# -----------------------------------------------------------------------------
# Read files that may be broken: each error names the file


def read_json(path: str | Path):
    """Return the content of a JSON file. Raises OSError, or ValueError that names the file."""
    return parse_json(read_text(path), path)


def read_json_object(path: str | Path) -> dict:
    """Return the content of a JSON file that holds an object, {...}. Raises as `read_json`."""
    return expect_object(read_json(path), path)


def read_json_lines(path: str | Path) -> list[dict]:
    """Return the objects of a .jsonl file, one from each line that is not blank. Raises as `read_json`."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            rows.append(expect_object(parse_json(line, place), place))
    return rows


def read_text(path: str | Path, most: int | None = None) -> str:
    """
    Return the content of a text file. most: bytes that it may have, None: MAX_TEXT. Raises OSError, or ValueError if
    it is too large or not UTF-8.
    """
    path = Path(path)
    size = path.stat().st_size
    refuse_special(path)
    limit = MAX_TEXT if most is None else most
    if size > limit:
        raise ValueError(f"{path}: {size:,} bytes, such a file has at most {limit:,}; copy it again")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text in UTF-8 ({error.reason} at byte {error.start}); copy it again") from None


def refuse_special(path: str | Path):
    """Raise ValueError for a device or a pipe: reading one may wait forever, or never end."""
    path = Path(path)
    if path.is_char_device() or path.is_block_device() or path.is_fifo() or path.is_socket():
        raise ValueError(f"{path}: expected a file, found a device or a pipe; give the file itself")


def parse_json(text: str, place: str | Path):
    """Return what a JSON text says. Raises ValueError that names `place`."""
    try:
        content = json.loads(text)
        if "\\ud" in text.lower():  # the escape of half a character, which needs its other half
            json.dumps(content, ensure_ascii=False).encode()
        return content
    except ValueError as error:
        raise ValueError(f"{place}: not a JSON file ({error}); copy it again") from None
    except RecursionError:
        raise ValueError(f"{place}: not a JSON file of ours (nested too deep); copy it again") from None


def expect_object(content, place: str | Path) -> dict:
    """Return `content` if it is a dict. Raises ValueError that names `place`."""
    if not isinstance(content, dict):
        raise ValueError(f"{place}: expected a JSON object {{...}}, found {str(content)[:80]!r}; copy it again")
    return content
