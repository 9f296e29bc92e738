"""
How files are broken: a file's content -> {what was done: the broken content}.

    usual_mutations      bytes cut, flipped and replaced; values of JSON replaced by others
    special_mutations    what a reader of this format may trip over: headers that lie, few bytes that become many, code

tests/test_broken_files.py and tests/broken_corpus.py give them to the readers and to the scripts.
"""

import contextlib
import io
import json
import random
import struct
import tempfile
import zipfile
import zlib
from pathlib import Path

import numpy as np

from formats.tfrecord import masked_crc32c


def usual_mutations(name: str, content: bytes, rng: random.Random) -> dict[str, bytes]:
    """Return broken versions of any file, by its name."""
    breakers = {".json": broken_json, ".jsonl": broken_lines}
    return breakers.get(Path(name).suffix, broken_bytes)(content, rng)


def special_mutations(name: str, content: bytes, rng: random.Random) -> dict[str, bytes]:
    """Return broken versions that are made for this format; none if the name is of no format known here."""
    for part, breaker in SPECIAL.items():
        if part in name:
            return breaker(content, rng)
    return {}


# -----------------------------------------------------------------------------
# Usual ones


def broken_bytes(content: bytes, rng: random.Random) -> dict[str, bytes]:
    """Broken versions of any file."""
    size = len(content)
    versions = {"empty": b"", "one byte less": content[:-1], "half": content[: size // 2], "noise": rng.randbytes(999)}
    versions["zeros"] = bytes(size)
    versions["twice"] = content + content
    for _ in range(4):
        at = rng.randrange(size)
        flipped = content[at] ^ (1 << rng.randrange(8))
        versions[f"flip at {at}"] = content[:at] + bytes([flipped]) + content[at + 1 :]
    for at in (0, rng.randrange(size), max(0, size - 40)):
        versions[f"huge number at {at}"] = content[:at] + b"\xff" * 7 + b"\x7f" + content[at + 8 :]
        versions[f"block lost at {at}"] = content[:at] + content[at + 64 :]
    return versions


def broken_json(content: bytes, rng: random.Random) -> dict[str, bytes]:
    """Broken versions of a JSON file: other types, huge numbers, missing keys, deep nesting, wrong UTF-8."""
    versions = {
        "empty": b"",
        "half": content[: len(content) // 2],
        "not UTF-8": b'{"\xff\xfe": 1}',
        "deep": b"[" * 100_000,
        "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        "a list": b"[]",
        "null": b"null",
        "no keys": b"{}",
        "long number": b'{"a": ' + b"9" * 10_000 + b"}",
    }
    values = [None, True, -1, 10**30, 1e300, float("nan"), "x", "../../../etc/passwd", "\ud800", [], {}, [[[]]]]
    for number in range(16):
        tree = json.loads(content)
        parent, key = rng.choice(places(tree))
        if number % 4 == 0:
            del parent[key]
            versions[f"without {key}"] = json.dumps(tree).encode()
        else:
            value = rng.choice(values)
            parent[key] = value
            versions[f"{key} = {value!r}"] = json.dumps(tree).encode()
    return versions


def places(tree) -> list[tuple]:
    """(container, key) of every value in a JSON tree."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else []
    return [(tree, key) for key in keys] + [place for key in keys for place in places(tree[key])]


def broken_lines(content: bytes, rng: random.Random) -> dict[str, bytes]:
    """Broken versions of a .jsonl file: of one of its lines."""
    lines = content.splitlines()
    number = rng.randrange(len(lines))
    end = b"\n" if content.endswith(b"\n") else b""
    versions = {"line lost": b"\n".join(lines[:number] + lines[number + 1 :]) + end}
    for name, line in broken_json(lines[number], rng).items():
        versions[f"line {number}: {name}"] = b"\n".join([*lines[:number], line, *lines[number + 1 :]]) + end
    return versions


# -----------------------------------------------------------------------------
# Special ones


def special_json(content: bytes, rng: random.Random) -> dict[str, bytes]:
    """Values and encodings that a reader may trip over."""
    text = content.decode().strip()
    last_line = text.splitlines()[-1] if "\n{" in text else text
    versions = {"byte order mark": b"\xef\xbb\xbf" + content, "UTF-16": text.encode("utf-16")}
    for value in (10**9, -(10**9), 0.5, "/etc/passwd", "../../../../../../etc/passwd", "a" * 10**6, [0] * 10**5):
        tree = json.loads(last_line)
        chosen = places(tree)
        if value == 10**9:
            chosen = [(parent, key) for parent, key in chosen if type(parent[key]) is int] or chosen
        parent, key = rng.choice(chosen)
        parent[key] = value
        versions[f"{key} = {str(value)[:40]}"] = content.replace(last_line.encode(), json.dumps(tree).encode())
        versions[f"{key} = {str(value)[:40]}, twice"] = text.replace(
            "{", f'{{"{key}": {json.dumps(value)},', 1
        ).encode()
    return versions


def special_safetensors(content: bytes, rng: random.Random) -> dict[str, bytes]:
    """Headers that lie."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    name = rng.choice([name for name in header if name != "__metadata__"])

    def with_header(text: str) -> bytes:
        return struct.pack("<Q", len(text)) + text.encode() + content[8 + length :]

    entry = header[name]
    start, end = entry["data_offsets"]
    changes = {
        "dtype": ["I64", "F8_E4M3", "X", 7],
        "shape": [[10**12], [-1, -1], [2**63, 2], entry["shape"][:-1], "x"],
        "data_offsets": [[0, 10**15], [end, start], [0, end - start], [-8, end], [start]],
    }
    versions = {
        "header of 2**60 bytes": struct.pack("<Q", 2**60) + content[8:],
        "header of blanks": with_header("{" + " " * 90_000_000 + "}"),
        "duplicate tensor": with_header(json.dumps(header).replace("{", f'{{"{name}": {json.dumps(entry)}, ', 1)),
        "tensor of another name": with_header(json.dumps({**header, "../a": header.pop(name)})),
    }
    empty = json.dumps({"dtype": "F32", "shape": [0], "data_offsets": [end, end]})
    versions["million tensors"] = with_header("{" + ", ".join(f'"{i}": {empty}' for i in range(1_000_000)) + "}")
    for key, values in changes.items():
        for value in values:
            versions[f"{name}: {key} = {value}"] = with_header(json.dumps({**header, name: {**entry, key: value}}))
    return versions


def special_png(content: bytes, rng: random.Random) -> dict[str, bytes]:
    """The header says that the image is huge, with a right checksum."""
    versions = {"PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"}
    for side in (0, 9000, 60_000, 2**31 - 1):
        header = content[12:16] + struct.pack(">II", side, side) + content[24:29]
        checked = header + struct.pack(">I", zlib.crc32(header))
        versions[f"side of {side}"] = content[:12] + checked + content[33:]
    return versions


def special_jpeg(content: bytes, rng: random.Random) -> dict[str, bytes]:
    at = content.index(b"\xff\xc0") + 5
    return {f"side of {n}": content[:at] + struct.pack(">HH", n, n) + content[at + 4 :] for n in (0, 9000, 65_000)}


def special_records(content: bytes, rng: random.Random) -> dict[str, bytes]:
    """The first record is huge, or is no example, with right checksums."""
    versions = {}
    for size in (0, 2**31, 2**40, 2**64 - 1):
        length = struct.pack("<Q", size)
        versions[f"{size} bytes"] = length + struct.pack("<I", masked_crc32c(length)) + content[12:]
    noise = rng.randbytes(500)
    length = struct.pack("<Q", len(noise))
    record = length + struct.pack("<I", masked_crc32c(length)) + noise + struct.pack("<I", masked_crc32c(noise))
    versions["noise with checksum"] = record + content
    return versions


def special_parquet(content: bytes, rng: random.Random) -> dict[str, bytes]:
    """Few bytes that become many in memory."""
    import pyarrow as pa
    from pyarrow import parquet

    table = parquet.read_table(io.BytesIO(content))
    versions = {}
    for times in (2, 100_000):
        buffer = io.BytesIO()
        with parquet.ParquetWriter(buffer, table.schema) as writer:
            for _ in range(times // 1000 or 1):
                writer.write_table(pa.concat_tables([table] * min(times, 1000)).combine_chunks())
        versions[f"{times} times the rows"] = buffer.getvalue()
    column = rng.choice(table.column_names)
    for name, changed in {
        f"without {column}": table.drop_columns([column]),
        f"{column} twice": table.append_column(column, table[column]),
        f"{column} is text": table.set_column(0, column, pa.array(["x"] * len(table))),
        f"{column} is null": table.set_column(0, column, pa.nulls(len(table))),
        "no rows": table.slice(0, 0),
    }.items():
        buffer = io.BytesIO()
        with contextlib.suppress(pa.ArrowInvalid):
            parquet.write_table(changed, buffer)
            versions[name] = buffer.getvalue()
    return versions


CODE = b"cposix\nsystem\n(S'touch code_was_run'\ntR."


def special_pickle(content: bytes, rng: random.Random) -> dict[str, bytes]:
    """Code, and few bytes that become many."""
    return {
        "code": CODE,
        "memo of 4 GB": b"\x80\x02]r" + struct.pack("<I", 2**28) + b".",
        "bytes of 2**40": b"\x80\x04\x8e" + struct.pack("<Q", 2**40),
        "deep": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "a dict": b"\x80\x02}.",
    }


def special_zip(content: bytes, rng: random.Random) -> dict[str, bytes]:
    """The pickle in a file of torch.save is another one."""
    versions = {"code without zip": CODE}
    if not content.startswith(b"PK"):
        return versions
    for name, text in special_pickle(b"", rng).items():
        buffer = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(buffer, "w") as target:
            for member in source.namelist():
                target.writestr(member, text if member.endswith("data.pkl") else "3")
        versions[name] = buffer.getvalue()
    return versions


def special_npz(content: bytes, rng: random.Random) -> dict[str, bytes]:
    """Arrays that are no numbers, have another shape, or a huge one of which nothing is there."""
    wrong = {
        "objects": np.array([print], object),
        "texts": np.array(["x"]),
        "NaN": np.full((5, 7), np.nan),
        "no steps": np.zeros((0, 7)),
        "six numbers": np.zeros((5, 6)),
        "complex": np.zeros((5, 7), complex),
        "zeros of 4 GB": np.broadcast_to(np.uint8(0), (1, 7)),
    }
    versions = {}
    for name, actions in wrong.items():
        buffer = io.BytesIO()
        np.savez_compressed(buffer, initial_state=np.zeros(92), actions=actions)
        versions[name] = buffer.getvalue()
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**12, 7)})
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("actions.npy", header.getvalue())
        archive.writestr("initial_state.npy", header.getvalue())
    versions["zeros of 4 GB"] = buffer.getvalue()
    return versions


def special_hdf5(content: bytes, rng: random.Random) -> dict[str, bytes]:
    """Datasets that are huge but have no bytes, lie in another file, or are none."""
    import h5py

    def written(add) -> bytes:
        with tempfile.NamedTemporaryFile() as temporary:
            with h5py.File(temporary.name, "w") as file:
                file["data/demo_0/states"] = np.zeros((4, 92))
                add(file["data/demo_0"])
            return Path(temporary.name).read_bytes()

    def huge(group):
        group.create_dataset("actions", (10**9, 7), "f8", chunks=(1000, 7))

    def elsewhere(group):
        group["actions"] = h5py.ExternalLink("/etc/passwd", "/data")

    def loop(group):
        group["actions"] = h5py.SoftLink("/data/demo_0/actions")

    def texts(group):
        group["actions"] = ["x"] * 4

    def a_group(group):
        group.create_group("actions")

    return {add.__name__: written(add) for add in (huge, elsewhere, loop, texts, a_group)}


SPECIAL = {  # part of a name -> breaker; the first that matches
    ".json": special_json,
    ".safetensors": special_safetensors,
    ".png": special_png,
    ".jpg": special_jpeg,
    ".parquet": special_parquet,
    ".metadata": special_pickle,
    ".distcp": special_zip,
    ".pt": special_zip,
    ".npz": special_npz,
    ".hdf5": special_hdf5,
    ".tfrecord": special_records,
}
