"""
The files of an RLDS dataset, and the records in them.

    DIR/NAME/VERSION/    dataset_info.json    its splits, and how many records each of their files has
                         features.json        what is in a record: the work of rlds_index.py
                         mine-train.tfrecord-00000-of-00002, ...    the records

    find_dataset -> read_info -> find_shards -> find_records -> read_content

dataset_info.json says which files there must be. What is missing, empty, cut off, or too many is said with its name.

TFDS as in tensorflow_datasets/core/naming.py and splits.py; tfrecord as in tensorflow/core/lib/io/record_writer.h.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from files import read_json_object

MAX_RECORD = 1 << 30  # bytes of an episode; the largest of Open X-Embodiment have about a tenth of it

FORMAT = "tfrecord"
OTHER_FORMATS = ("array_record", "riegeli", "parquet")  # in which TFDS can store the same data

# How the files of a split are called; a folder of an older TFDS does not say it.
TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
PLACEHOLDERS = {"DATASET", "SPLIT", "FILEFORMAT", "SHARD_INDEX", "NUM_SHARDS", "SHARD_X_OF_Y"}

HEADER = 12  # bytes in front of the content of a record


def raise_or_skip(problem: str, on_bad: Callable[[str], None] | None):
    """Call on_bad(problem). Raises ValueError if there is no such function."""
    if on_bad is None:
        raise ValueError(f"{problem}; --skip_bad_records True goes on without it")
    on_bad(problem)


def describe(error: Exception) -> str:
    """Return the kind of an error and the beginning of its message, which can hold a whole record."""
    return f"{type(error).__name__}: {str(error)[:200]}"


# -----------------------------------------------------------------------------
# Folders


def find_dataset(data_root_dir: str | Path, name: str) -> Path:
    """Return the newest version folder of a dataset. Raises FileNotFoundError with what is there instead."""
    root = Path(data_root_dir)
    folders = [path.parent for path in (root / name).glob("*/features.json")]
    if folders:
        return max(folders, key=version_number)

    others = sorted(path.parent.parent.name for path in root.glob("*/*/features.json"))
    content = f"it has: {', '.join(others)}" if others else "no RLDS dataset is in it"
    raise FileNotFoundError(
        f"{root / name}: no dataset (DIR/{name}/VERSION/features.json is looked for) in --data_root_dir {root}; "
        f"{content}. docs/your-data.md says where to get data; `python quickstart.py` makes its own"
    )


def version_number(folder: Path) -> list[int]:
    """Return "10.0.0" as [10, 0, 0], so that it is newer than "9.0.0". A part that is no number counts as -1."""
    return [int(part) if part.isdecimal() else -1 for part in folder.name.split(".")]


@dataclass
class Split:
    """What dataset_info.json says about one split."""

    name: str
    dataset: str  # the name in the names of its files, which need not be that of the folder
    template: str  # of these names
    lengths: list[int] | None  # how many records each file has; None: it does not say


def read_info(folder: Path) -> list[Split]:
    """Return the splits of a dataset. Raises OSError or ValueError that names dataset_info.json."""
    path = folder / "dataset_info.json"
    info = read_json_object(path)
    check_format(folder, info)
    splits = []
    try:
        for entry in info["splits"]:
            lengths = entry.get("shardLengths")
            split = Split(
                name=str(entry["name"]),
                dataset=str(info.get("name") or folder.parent.name),
                template=str(entry.get("filepathTemplate") or TEMPLATE),
                lengths=None if lengths is None else [int(length) for length in lengths],
            )
            splits.append(split)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path}: its splits are not as expected ({describe(error)}); get it again") from None

    for split in splits:
        check_names(split, path)
    if len({split.name for split in splits}) < len(splits):
        raise ValueError(f"{path}: two splits have the same name; get it again")
    return splits


def check_format(folder: Path, info: dict):
    """Raise ValueError if a dataset is not stored as tfrecord files."""
    stored = str(info.get("fileFormat") or "")
    more = info.get("alternativeFileFormats")
    has_tfrecord = stored == FORMAT or (isinstance(more, list) and FORMAT in more)
    if not stored:  # an older TFDS does not say it
        names = [path.name for path in folder.iterdir()]
        others = [format for format in OTHER_FORMATS if any(f".{format}" in name for name in names)]
        has_tfrecord = not others or any(f".{FORMAT}" in name for name in names)
        stored = ", ".join(others)
    if not has_tfrecord:
        remedy = "load it with TFDS and write it with formats/write_rlds.py"
        if stored == "array_record":
            remedy = f"`python -m formats.write_rlds {folder}` writes it as {FORMAT}"
        raise ValueError(
            f"{folder / 'dataset_info.json'}: the data is stored as {stored}, only {FORMAT} is read here; {remedy}"
        )


def check_names(split: Split, path: Path):
    """Raise ValueError if a split cannot be part of the names of files, or if they would not be in its folder."""
    if not re.fullmatch(r"[\w-][\w.-]*", split.name):
        raise ValueError(f"{path}: a split cannot be called {split.name!r}; get it again")
    if not re.fullmatch(r"[^/\\]+", split.dataset):
        raise ValueError(f"{path}: a dataset cannot be called {split.dataset!r}; get it again")

    placeholders = re.findall(r"\{(.*?)\}", split.template)
    is_known = set(placeholders) <= PLACEHOLDERS and len(set(placeholders)) == len(placeholders)
    if not is_known or not re.fullmatch(r"[^/\\]*", split.template):
        raise ValueError(f"{path}: filepathTemplate {split.template!r} is not understood; expected {TEMPLATE!r}")
    num_shards = len(split.lengths or ())
    if num_shards > 1 and not {"SHARD_INDEX", "SHARD_X_OF_Y"} & set(placeholders):
        raise ValueError(f"{path}: filepathTemplate {split.template!r} gives {num_shards} files the same name")


# -----------------------------------------------------------------------------
# The files of a split


def shard_name(split: Split, dataset: str, number: int, num_shards: int) -> str:
    """Return the name of one file of a split, such as "mine-train.tfrecord-00000-of-00002"."""
    digits = max(5, len(str(num_shards)))
    index = f"{number:0{digits}}"
    count = f"{num_shards:0{digits}}"
    values = {
        "DATASET": dataset,
        "SPLIT": split.name,
        "FILEFORMAT": FORMAT,
        "SHARD_INDEX": index,
        "NUM_SHARDS": count,
        "SHARD_X_OF_Y": f"{index}-of-{count}",
    }
    return re.sub(r"\{(.*?)\}", lambda match: values[match[1]], split.template)


def shard_pattern(split: Split) -> str:
    """Return the regular expression of the files of a split, whatever the name of the dataset and their number."""
    patterns = {
        "DATASET": r"(?P<dataset>.+)",
        "SPLIT": re.escape(split.name),
        "FILEFORMAT": FORMAT,
        "SHARD_INDEX": r"\d{5,}",
        "NUM_SHARDS": r"(?P<count>\d{5,})",
        "SHARD_X_OF_Y": r"\d{5,}-of-(?P<count>\d{5,})",
    }
    parts = re.split(r"\{(.*?)\}", split.template)  # text and names of placeholders in turn
    texts = [re.escape(text) for text in parts[::2]]
    names = [patterns[name] for name in parts[1::2]] + [""]
    return "".join(text + pattern for text, pattern in zip(texts, names, strict=True))


def find_shards(folder: Path, split: Split, on_bad: Callable[[str], None] | None) -> dict[Path, int | None]:
    """
    Return the files of a split, and how many records each has (None: not known). Raises ValueError for a file that is
    missing or too many; with `on_bad` it calls on_bad(message) instead.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    matches = [re.fullmatch(shard_pattern(split), name) for name in names]
    matches = [match for match in matches if match]
    unnumbered = [name for name in names if f"-{split.name}.{FORMAT}" in name and "-of-" not in name]
    dataset = dataset_of(split, matches)

    # The names that it should have.
    lengths = split.lengths
    if lengths is None:
        lengths = [None] * (count_shards(folder, split, dataset, matches) or len(unnumbered))
    expected = {shard_name(split, dataset, i, len(lengths)): length for i, length in enumerate(lengths)}

    # Files without a number are taken in the order of their names.
    if not expected.keys() & set(names) and len(unnumbered) == len(expected):
        expected = dict(zip(unnumbered, lengths, strict=True))

    # Too many: of another number of files, or copies such as NAME.part.
    strays = []
    for name in names:
        match = re.fullmatch(shard_pattern(split) + r"(\D.*)?", name)
        if match and match.groupdict().get("dataset", dataset) == dataset and name not in expected:
            strays.append(name)
    missing = [name for name in expected if name not in names and expected[name] != 0]

    for name in strays:
        count = f"the {len(expected)} files that dataset_info.json lists"
        mixed = f"; {missing[0]} is missing: are they of different versions?" if missing else ""
        raise_or_skip(f"{folder / name}: none of {count}; remove it{mixed}", on_bad)
    for name in missing:
        share = f"{len(missing)} of the {len(expected)} files of split {split.name!r} are not there"
        content = "" if expected[name] is None else f", dataset_info.json says it has {expected[name]} episodes"
        raise_or_skip(f"{folder / name}: missing{content}; {share}, get them", on_bad)
    return {folder / name: length for name, length in expected.items() if name in names}


def dataset_of(split: Split, matches: list[re.Match]) -> str:
    """Return the name in the names of a split's files: that of dataset_info.json, or the only one that is there."""
    names = {match.groupdict().get("dataset", split.dataset) for match in matches}
    if split.dataset in names or len(names) != 1:
        return split.dataset
    return names.pop()


def count_shards(folder: Path, split: Split, dataset: str, matches: list[re.Match]) -> int:
    """Return of how many files a split says it is, in their names. Raises ValueError if they do not agree."""
    groups = [match.groupdict() for match in matches]
    own = [group for group in groups if group.get("dataset", dataset) == dataset]
    counts = {int(group.get("count", len(own))) for group in own}
    if len(counts) > 1:
        raise ValueError(
            f"{folder}: files of split {split.name!r} say that there are {' and '.join(map(str, sorted(counts)))} of "
            "them; remove those of the older version"
        )
    return counts.pop() if counts else 0


# -----------------------------------------------------------------------------
# The records of a file


@dataclass
class Place:
    """Where a record is. What is wrong with it, if it cannot be read."""

    path: Path
    number: int  # of the record in its file
    offset: int  # where it begins, in bytes
    length: int  # of its content, in bytes; 0 if it cannot be read
    problem: str = ""

    @property
    def content(self) -> int:
        """Where its content begins."""
        return self.offset + HEADER


def masked_crc32c(data: bytes) -> int:
    """Return the checksum of a tfrecord file: crc32c, rotated by 15 bits, plus a constant."""
    import google_crc32c

    crc = google_crc32c.value(data)
    rotated = crc >> 15 | crc << 17
    return (rotated + 0xA282EAD8) & 0xFFFFFFFF


def has_checksum(data: bytes, checksum: bytes) -> bool:
    """Return True if `checksum`, as stored in a tfrecord file, is that of `data`."""
    return masked_crc32c(data) == int.from_bytes(checksum, "little")


def find_records(path: Path, num_records: int | None = None) -> Iterator[Place]:
    """
    Yield the place of each record of a tfrecord file, whose parts are

        length of the content (8 bytes), checksum of the length (4), content, checksum of the content (4)

    It reads no content. A record whose length is broken is yielded with its problem, and so is the file if there are
    not `num_records` in it.
    """
    try:
        if not path.is_file():
            raise OSError("not a file")
        file = os.open(path, os.O_RDONLY)
    except OSError as error:
        yield Place(path, 0, 0, 0, f"{path}: cannot be read ({error.strerror or error}); get it again")
        return

    number = 0
    offset = 0
    try:
        size = os.fstat(file).st_size
        while offset < size:
            header = os.pread(file, HEADER, offset)
            length = int.from_bytes(header[:8], "little")
            end = offset + HEADER + length + 4

            problem = ""
            if len(header) < HEADER or not has_checksum(header[:8], header[8:]):
                problem = "its length has a wrong checksum, so the rest of the file cannot be read"
                end = size
                if header.startswith(b"version http"):
                    problem = "the file is a pointer of Git LFS, `git lfs pull` gets the data"
            elif length > MAX_RECORD:
                problem = f"it has {length:,} bytes, an episode has at most {MAX_RECORD:,}"
            elif end > size:
                problem = f"cut off, {size - offset:,} bytes of {end - offset:,}"
            if problem:
                yield Place(path, number, offset, 0, bad_record(path, number, offset, problem))
            else:
                yield Place(path, number, offset, length)
            offset = end
            number += 1
    finally:
        os.close(file)

    if num_records is not None and number != num_records:
        problem = f"{path}: {number} records, dataset_info.json says {num_records}; get the file again"
        yield Place(path, number, size, 0, problem)


def bad_record(path: Path, number: int, offset: int, problem: str) -> str:
    """Return the message for a record that cannot be used because its file is broken."""
    return f"{path}: record {number} at byte {offset}: {problem}; get the file again"


def read_content(file: BinaryIO, place: Place) -> bytes:
    """Return the content of a record. Raises ValueError if it is broken."""
    if place.problem:
        raise ValueError(place.problem)
    file.seek(place.content)
    content = file.read(place.length)
    if not has_checksum(content, file.read(4)):
        raise ValueError(bad_record(place.path, place.number, place.offset, "wrong checksum"))
    return content


def read_records(
    path: Path, on_bad: Callable[[str], None] | None = None, num_records: int | None = None
) -> Iterator[tuple[int, bytes]]:
    """
    Yield (offset, content) of each record of a tfrecord file. Raises ValueError for a broken record, or if there are
    not `num_records` of them. With `on_bad` it calls on_bad(message) instead, and goes on with the next record.
    """
    file = None
    try:
        for place in find_records(path, num_records):
            if place.problem:
                raise_or_skip(place.problem, on_bad)
                continue
            file = file or open(path, "rb")
            try:
                content = read_content(file, place)
            except ValueError as error:
                raise_or_skip(str(error), on_bad)
                continue
            yield place.content, content
    finally:
        if file:
            file.close()
