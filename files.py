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


def read_json(path: str | Path):
    """Return the content of a JSON file. Raises FileNotFoundError, or ValueError that names the file."""
    text = Path(path).read_text(encoding="utf-8")
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error}); copy it again") from None
