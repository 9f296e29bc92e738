"""
Broken files of every kind: each ends in one ValueError or OSError that names a path, or changes nothing.

    small valid files -> mutations, the same ones in every run -> the real readers, in one process with limits

The process may take 2 GB more than it has at its start, and a case 10 seconds. A reader may accept a mutation if it
returns what it returns for the valid file, or if no one could tell: see `Kind.free`.
"""

import faulthandler
import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from common import GOLDENS, ROOT, make_folder
from mutations import usual_mutations
from PIL import Image

import checkpoint
import convert_weights
import files
import image
import lora
import resume
from formats import lerobot, oxe, prismatic_run, rlds, rlds_index, tfrecord
from formats.write_rlds import write_rlds
from libero_sim import jobs, regenerate
from policy import load_policy
from tokenizer import make_standin

GB = 1 << 30
SECONDS_PER_CASE = 10
DESCRIBED = "a JSON value that a person could have meant"


@pytest.mark.parametrize(
    ("group", "num_cases"),
    [("datasets", 300), ("checkpoints", 100), ("runs", 50)],  # so many cases, at least
)
def test_broken_files(group, num_cases, tmp_path):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENVLA_CACHE": str(tmp_path / "cache")}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    words = [sys.executable, __file__, group, str(tmp_path)]
    run = subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["failures"] == []
    if find_spec("pyarrow") and find_spec("av") and find_spec("h5py"):
        assert result["cases"] >= num_cases


# -----------------------------------------------------------------------------
# What a mutation does not meet by chance


def test_json(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    for content, message in {
        b"[]": "expected a JSON object",
        b"[" * 100_000: "nested too deep",
        b'{"\xff": 1}': "not text in UTF-8",
        b'{"\\uD800": 1}': "surrogates not allowed",
        b"{" + b" " * 100 + b"}": "at most 50",
    }.items():
        path.write_bytes(content)
        if len(content) == 102:
            monkeypatch.setattr(files, "MAX_TEXT", 50)
        with pytest.raises(ValueError, match=f"{path}: .*{message}"):
            files.read_json_object(path)
    path.write_text(r'"\ud83d\ude00"')
    assert files.read_json(path) == "😀"


def test_nobody_waits_for_a_pipe(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    os.mkfifo(tmp_path / "a.tfrecord")
    os.mkfifo(tmp_path / "a.npz")
    with pytest.raises(ValueError, match="found a device or a pipe"):
        files.read_json(tmp_path / "a.json")
    with pytest.raises(ValueError, match="not a file"):
        list(tfrecord.read_records(tmp_path / "a.tfrecord"))
    with pytest.raises(FileNotFoundError, match="a.npz"):
        jobs.read_arrays(tmp_path / "a.npz", ("actions",))
    for name, read in {
        "a.png": image.to_rgb,
        "a.safetensors": checkpoint.read_layout,
        "a.pt": checkpoint.open_pt,
        "b.pt": lambda path: checkpoint.fingerprint_files([path]),
        ".metadata": lambda path: resume.DataOnlyReader(path.parent).read_metadata(),
    }.items():
        os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}: expected a file, found a device or a pipe"):
            read(tmp_path / name)


def test_a_pickle_of_eight_bytes_takes_no_memory():
    """It gives an object the number 2**24. Python's unpickler in C makes a table of so many numbers, and more."""
    tracemalloc.start()
    resume.DataOnlyUnpickler(io.BytesIO(b"\x80\x02]r" + struct.pack("<I", 2**24) + b".")).load()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**7


def test_check_of_an_adapter_without_its_config(tmp_path, capsys):
    """The name is there, but a folder or a link that leads nowhere has it."""
    shutil.copytree(GOLDENS / "tiny-lora", tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").unlink()
    (tmp_path / "a" / "adapter_config.json").symlink_to("nowhere")
    assert not convert_weights.check(tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").unlink()
    (tmp_path / "a" / "adapter_config.json").mkdir()
    assert not convert_weights.check(tmp_path / "a")
    assert capsys.readouterr().out.count(str(tmp_path / "a" / "adapter_config.json")) == 2


@pytest.mark.parametrize("file", ["preprocessor_config.json", "tokenizer.model"])
def test_what_a_run_brings_is_not_replaced_by_that_of_its_base(file, tmp_path):
    """A link that leads nowhere is refused, as a broken file is; and neither is copied into a merged folder."""
    base = make_checkpoint(tmp_path) / "model"
    run = shutil.copytree(GOLDENS / "tiny-lora", tmp_path / "run")
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    (run / file).symlink_to("blob")
    with pytest.raises(FileNotFoundError, match=f"{run / file}: "):
        load_policy(run)

    (run / "blob").write_text("{")
    with pytest.raises(ValueError, match=f"{run / file}: "):
        load_policy(run)
    with pytest.raises(ValueError, match=f"{run / file}: "):
        lora.merge(run, tmp_path / "merged")
    shutil.copy(run / "blob", base / file)
    with pytest.raises(ValueError, match=f"{base / file}: "):
        convert_weights.quantize_folder(base, tmp_path / "quantized", bits=8)
    assert not (tmp_path / "merged").exists() and not (tmp_path / "quantized").exists()


def test_a_record_of_three_gigabytes_is_not_read(tmp_path):
    """Its length has the right checksum, and the file is as long as it says (it has a hole)."""
    path = tmp_path / "a.tfrecord"
    length = struct.pack("<Q", 3 * GB)
    path.write_bytes(length + struct.pack("<I", tfrecord.masked_crc32c(length)))
    os.truncate(path, 3 * GB + 16)
    with pytest.raises(ValueError, match=f"{path}: record 0 at byte 0: it has 3,221,225,472 bytes"):
        list(tfrecord.read_records(path))


def test_no_module_that_features_json_names_is_imported(tmp_path):
    version = make_rlds(tmp_path)
    features = version / "features.json"
    features.write_text(features.read_text().replace("tensorflow_datasets.core.features.scalar", "antigravity", 1))
    with pytest.raises(ValueError, match=r"features.json: feature class 'antigravity.Scalar' is none of TensorFlow"):
        read_rlds(tmp_path)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("missing", r"mine-train.tfrecord-00001-of-00002: missing, dataset_info.json says it has 2 episodes"),
        ("empty", "train.tfrecord-00001-of-00002: 0 records, dataset_info.json says 2"),
        ("twice", "00001-of-00002.part: none of the 2 files that dataset_info.json lists"),
    ],
)
def test_shards(tmp_path, damage, message):
    shard = sorted(make_rlds(tmp_path).glob("*-train.tfrecord*"))[1]
    if damage == "missing":
        shard.unlink()
    elif damage == "empty":
        shard.write_bytes(b"")
    else:
        shutil.copy(shard, f"{shard}.part")
    with pytest.raises(ValueError, match=message):
        read_rlds(tmp_path)
    left = read_rlds(tmp_path, skip_bad_records=True)
    assert left[1] == [left[1][0]] and re.search(message, left[1][0])
    assert len(left) - 2 == (12 if damage == "twice" else 6)  # frames: four episodes or two, three starts in each


def test_a_damaged_index_is_made_anew(tmp_path):
    version = make_rlds(tmp_path)
    expected = digest(read_rlds(tmp_path))
    index = next((version / ".index").iterdir())
    for path in index.iterdir():
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        assert digest(read_rlds(tmp_path)) == expected
    (index / "text").unlink()
    assert digest(read_rlds(tmp_path)) == expected
    assert [path.name for path in index.parent.iterdir()] == [index.name]


def test_an_index_in_a_folder_of_another_user(tmp_path, monkeypatch):
    """What is found out about it later goes to the cache."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("OPENVLA_CACHE", str(cache))
    version = make_rlds(tmp_path)
    expected = digest(read_rlds(tmp_path))
    index = next((version / ".index").iterdir())
    for path in index.glob("usable*"):
        path.unlink()
    index.chmod(0o555)
    assert digest(read_rlds(tmp_path)) == expected
    assert not list(index.glob("usable*")) and list((cache / index.name).glob("usable*"))

    # A damaged one cannot be replaced, so a new one is made in the cache.
    (index / "text").write_bytes(b"")
    assert digest(read_rlds(tmp_path)) == expected
    assert (cache / index.name / "index.json").is_file()


def test_leftovers_of_a_killed_indexing_go_after_a_day(tmp_path):
    place = make_rlds(tmp_path) / ".index"
    for name in ("tmpold", "tmpnew"):
        (place / name).mkdir(parents=True)
        (place / name / "text").write_bytes(b"take")
    yesterday = time.time() - 2 * rlds_index.DAY
    for path in (place / "tmpold" / "text", place / "tmpold"):
        os.utime(path, (yesterday, yesterday))
    read_rlds(tmp_path)
    assert not (place / "tmpold").exists() and (place / "tmpnew").exists()


def test_names_of_files_in_a_lerobot_folder():
    names = {"episode_index": 7, "video_key": "front"}
    assert lerobot.fill("{video_key}/{episode_index:03d}.mp4", names) == "front/007.mp4"
    assert lerobot.fill("{episode_index.__class__}{episode_index:999999999d}", names).startswith("{episode_index._")
    for name in ("../a.mp4", "/a.mp4", "a/../../b.mp4"):
        with pytest.raises(ValueError, match="is not in the folder"):
            lerobot.inside(Path("/data"), name)


def test_a_parquet_file_that_would_fill_the_memory(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow", reason="needs `pip install pyarrow av`")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"a": [0] * 1000}), tmp_path / "a.parquet")  # 1 kB, whatever the number of rows
    monkeypatch.setattr(lerobot, "MAX_ROWS", 999)
    with pytest.raises(ValueError, match="a.parquet: .*1,000 rows, at most 999"):
        lerobot.read_rows(tmp_path / "a.parquet")
    monkeypatch.setattr(lerobot, "MAX_ROWS", 1000)
    monkeypatch.setattr(lerobot, "MAX_BYTES", 7999)
    with pytest.raises(ValueError, match="a.parquet: .*more than 7,999 bytes"):
        lerobot.read_rows(tmp_path / "a.parquet")


def test_nothing_in_a_recorded_episode_is_unpickled(tmp_path):
    path = tmp_path / "task00_trial000.npz"
    np.savez(path, initial_state=np.zeros(9), actions=np.array([print], object))
    with pytest.raises(ValueError, match=f"{path}: no recorded episode"):
        regenerate.read_demonstration({"trial": 0, "source": str(path)})
    np.savez(path, initial_state=np.zeros(9), actions=np.full((3, 7), np.nan))
    with pytest.raises(ValueError, match=f"{path}: actions are float64"):
        regenerate.read_demonstration({"trial": 0, "source": str(path)})


# -----------------------------------------------------------------------------
# Kinds of files


@dataclass
class Kind:
    """A folder with valid files, some of which are broken one at a time, and the function that reads the folder."""

    name: str
    folder: Path
    files: list[str]
    read: Callable[[Path], object]  # returns all that was read
    share: float = 1.0  # of the mutations that are tried
    free: str = ""  # why a mutation may change what is read: nothing in the file tells


def frames_of(dataset) -> list:
    return [dataset.statistics, dataset.bad_records, *(dataset[i] for i in range(len(dataset)))]


def make_rlds(root: Path, name: str = "mine") -> Path:
    """Write a dataset of five episodes in three files, and return its folder."""
    rng = np.random.default_rng(0)

    def episode(i: int) -> dict:
        return {
            "image": rng.integers(0, 255, (4, 28, 28, 3), np.uint8),
            "state": rng.normal(size=(4, 2)).astype("<f4"),
            "action": rng.uniform(-1, 1, (4, 7)).astype("<f4"),
            "instruction": f"take {i}",
        }

    splits = {"train": [episode(i) for i in range(4)], "test": [episode(9)]}
    return write_rlds(root, splits, name, shard=2)


def read_rlds(folder: Path, **options) -> list:
    row = oxe.Dataset(primary="image", state=("state",))
    return frames_of(rlds.RLDS(folder, "mine", row=row, hold_out=0.0, action_chunk=2, **options))


def dataset_kinds(root: Path) -> list[Kind]:
    rng = np.random.default_rng(0)
    version = make_rlds(root / "rlds")
    shards = sorted(str(path.relative_to(root / "rlds")) for path in version.glob("*.tfrecord*"))
    about = ["mine/1.0.0/features.json", "mine/1.0.0/dataset_info.json"]

    # The index: of files with times that a copy keeps, so that it belongs to the copy as well.
    indexed = shutil.copytree(root / "rlds", root / "indexed")
    read_rlds(indexed)
    index = sorted(str(path.relative_to(indexed)) for path in indexed.glob("mine/1.0.0/.index/*/*"))

    kinds = [
        Kind("rlds records", root / "rlds", shards, read_rlds),
        Kind("rlds json", root / "rlds", about, read_rlds, free="a feature's dtype, a split's name"),
        Kind("rlds index", indexed, index, read_rlds, share=0.6),
    ]

    (root / "run" / "episodes").mkdir(parents=True)
    recording = "episodes/task00_trial003.npz"
    np.savez(root / "run" / recording, initial_state=np.zeros(9), actions=rng.normal(size=(5, 7)))

    def read_recording(folder: Path) -> tuple:
        return regenerate.read_demonstration({"trial": 3, "source": str(folder / recording)})

    kinds.append(Kind("npz", root / "run", [recording], read_recording))

    if find_spec("h5py"):
        import h5py

        (root / "raw").mkdir()
        with h5py.File(root / "raw" / "demo.hdf5", "w") as file:
            file["data/demo_0/states"] = rng.normal(size=(4, 9))
            file["data/demo_0/actions"] = rng.normal(size=(4, 7))

        def read_raw(folder: Path) -> tuple:
            return regenerate.read_demonstration({"trial": 0, "source": str(folder / "demo.hdf5")})

        kinds.append(Kind("hdf5", root / "raw", ["demo.hdf5"], read_raw, free="its numbers have no checksum"))

    if find_spec("pyarrow") and find_spec("av"):
        kinds += lerobot_kinds(root)
    return kinds


def lerobot_kinds(root: Path) -> list[Kind]:
    import test_lerobot

    def read(folder: Path) -> list:
        lerobot.open_video.cache_clear()
        lerobot.read_images.cache_clear()
        frames = []
        for frame in frames_of(lerobot.LeRobot(folder, name="mine")):
            for i, picture in enumerate(frame.get("pictures", []) if isinstance(frame, dict) else []):
                frame["pictures"][i] = str(picture) if isinstance(picture, Path) else picture
            frames.append(frame)
        return frames

    kinds = []
    for version, kind in (("v2.1", "video"), ("v3.0", "video"), ("v3.0", "image")):
        folder = test_lerobot.make(root / f"{version} {kind}", version, kind)
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        files = [file for file in files if "wrist" not in file]
        share = 0.35 if kind == "video" else 0.2
        no_checksum = "parquet without page checksums, mp4, JSON"
        kinds.append(Kind(f"lerobot {version} {kind}", folder, files, read, share=share, free=no_checksum))
    return kinds


def read_policy(folder: Path) -> list:
    policy = load_policy(folder / "model")
    return [policy.model.state_dict(), policy.norm_stats, policy.processor.__dict__]


def make_checkpoint(root: Path) -> Path:
    """Write a small checkpoint to root/whole/model, and return root/whole."""
    whole = root / "whole"
    make_folder("tiny-openvla", whole / "model")
    make_standin(whole / "model" / "tokenizer.model")
    return whole


def checkpoint_kinds(root: Path) -> list[Kind]:
    whole = make_checkpoint(root)
    names = sorted(path.name for path in (whole / "model").glob("*.json") if path.name != "generation_config.json")
    shard = "model/model-00001-of-00003.safetensors"

    adapted = shutil.copytree(whole, root / "adapted")
    (adapted / "model").rename(adapted / "base")
    shutil.copytree(GOLDENS / "tiny-lora", adapted / "model")
    config = adapted / "model" / "adapter_config.json"
    adapter = ["model/adapter_config.json", "model/adapter_model.safetensors"]
    base = str(adapted / "base")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": base}))

    convert_weights.hf_to_prismatic(whole / "model", root / "prismatic" / "run")
    prismatic = root / "prismatic"
    run_files = sorted(str(path.relative_to(prismatic)) for path in prismatic.rglob("*") if path.is_file())

    def read_run(folder: Path) -> list:
        run = prismatic_run.find_run(folder / "run")
        return [prismatic_run.open_run(run.weights), run.config, run.statistics]

    (root / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (28, 28, 3), np.uint8)
    for ending in ("png", "jpg"):
        Image.fromarray(pixels).save(root / "images" / f"a.{ending}")

    def read_images(folder: Path) -> list:
        return [image.to_rgb(folder / "a.png"), image.to_rgb(folder / "a.jpg")]

    return [
        Kind("checkpoint", whole, [shard, *(f"model/{name}" for name in names)], read_policy, 0.25, DESCRIBED),
        Kind("adapter", adapted, adapter, read_policy, 0.5, DESCRIBED),
        Kind("training run", prismatic, run_files, read_run, 0.5, DESCRIBED),
        Kind("images", root / "images", ["a.png", "a.jpg"], read_images, 1.0, "JPEG has no checksum"),
    ]


def run_kinds(root: Path) -> list[Kind]:
    """What OFT and a run that goes on read."""
    oft = shutil.copytree(make_checkpoint(root), root / "oft")
    shutil.copytree(GOLDENS / "tiny-oft" / "l1", oft / "model", dirs_exist_ok=True)
    record = {"action_chunk": 8, "num_images": 2, "proprio_dim": 8, "head": "l1"}
    (oft / "model" / "oft_config.json").write_text(json.dumps(record))
    oft_parts = ["model/oft_config.json"]
    oft_parts += sorted(f"model/{path.name}" for path in (GOLDENS / "tiny-oft" / "l1").iterdir())

    def model_and_optimizer() -> tuple:
        model = torch.nn.Linear(3, 3)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(3)).sum().backward()
        optimizer.step()
        return model, optimizer

    model, optimizer = model_and_optimizer()
    with resume.Saver(root / "resumed", keep=1) as saver:
        saver.save(1, model, optimizer, {"config": {}, "statistics": {}})
    step = next((root / "resumed" / "checkpoints").iterdir())
    saved = sorted(str(path.relative_to(root / "resumed")) for path in step.iterdir())

    def read_resumed(folder: Path) -> list:
        model, optimizer = model_and_optimizer()
        return [resume.load_checkpoint(folder / "checkpoints" / step.name, model, optimizer), model.state_dict()]

    return [
        Kind("oft", oft, oft_parts, read_policy, 0.25, DESCRIBED),
        Kind("resume folder", root / "resumed", saved, read_resumed, 0.5, DESCRIBED),
    ]


# -----------------------------------------------------------------------------
# Run the cases, in a process of their own


def digest(content) -> str:
    """A text that is the same for the same content: nested lists and dicts of arrays, tensors and texts."""
    if isinstance(content, dict):
        return "{" + ", ".join(f"{key}: {digest(value)}" for key, value in content.items()) + "}"
    if isinstance(content, list | tuple):
        return "[" + ", ".join(digest(value) for value in content) + "]"
    if hasattr(content, "detach"):
        content = content.detach().float().numpy()
    if isinstance(content, np.ndarray):
        return f"{content.dtype}{content.shape}{hashlib.sha256(np.ascontiguousarray(content)).hexdigest()}"
    return repr(content)


def try_case(kind: Kind, folder: Path, expected: str) -> str:
    """Read a folder with a broken file. Returns what is wrong with how that went, or ""."""
    try:
        result = digest(kind.read(folder))
    except (ValueError, OSError) as error:
        message = str(error)
        if str(folder) not in message:
            return f"{type(error).__name__} without a path: {message[:200]}"
        return "" if len(message) < 1500 else f"a message of {len(message)} characters"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "" if kind.free or result == expected else "accepted, and something else was read"


def run_cases(group: str, root: Path):
    """Try all cases of a group, and print a line of JSON: how many there were, and which failed."""
    kinds = {"datasets": dataset_kinds, "checkpoints": checkpoint_kinds, "runs": run_kinds}[group](root)
    for kind in kinds:
        digest(kind.read(kind.folder))  # imports what reading needs

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * GB, used + 2 * GB))
    failures = []
    num_cases = 0
    for kind in kinds:
        expected = digest(kind.read(kind.folder))
        for file in kind.files:
            content = (kind.folder / file).read_bytes()
            rng = random.Random(f"{kind.name} {file}")
            versions = usual_mutations(file, content, rng)
            chosen = [name for name in versions if rng.random() < kind.share]
            for name in [*chosen, "a folder", "missing"]:
                folder = root / "case"
                shutil.copytree(kind.folder, folder)
                status = (folder / file).stat()
                (folder / file).unlink()
                if name == "a folder":
                    (folder / file).mkdir()
                elif name != "missing":
                    (folder / file).write_bytes(versions[name])
                    os.utime(folder / file, ns=(status.st_atime_ns, status.st_mtime_ns))

                print(f"{kind.name}: {file}: {name}", file=sys.stderr, flush=True)
                faulthandler.dump_traceback_later(SECONDS_PER_CASE, exit=True)
                start = time.perf_counter()
                problem = try_case(kind, folder, expected)
                faulthandler.cancel_dump_traceback_later()
                print(f"    {time.perf_counter() - start:.2f} s {problem}", file=sys.stderr, flush=True)
                num_cases += 1
                if problem:
                    failures.append(f"{kind.name}: {file}: {name}: {problem}")
                shutil.rmtree(folder)
    print(json.dumps({"cases": num_cases, "failures": failures}))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    run_cases(sys.argv[1], Path(sys.argv[2]))
