"""RLDS folders as people have them: nothing missing, nothing stale, indexed by all cores; and the writer of our own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from common import ROOT

from formats import oxe, rlds_index, tfrecord
from formats.rlds import RLDS
from formats.user_code import fingerprint_of
from formats.write_rlds import array_feature, dict_feature, encode_episode, write_rlds, write_tfrecord
from image import decode, encode_jpeg
from progress import no_progress

ROW = oxe.Dataset(primary="image", state=("state",))


def episode(number: int, T: int = 6) -> dict:
    rng = np.random.default_rng(number)
    action = rng.uniform(-1, 1, (T, 7)).astype(np.float32)
    action[:, 6] = np.arange(T) % 2
    return {
        "action": action,
        "image": rng.integers(0, 256, (T, 32, 32, 3), np.uint8),
        "state": rng.normal(size=(T, 3)).astype(np.float32),
        "instruction": f"take {number}",
    }


def write(root: Path, num_episodes: int = 8, shard: int = 2, **splits) -> Path:
    splits = splits or {"train": [episode(i) for i in range(num_episodes)]}
    return write_rlds(root, splits, "mine", shard=shard)


def read(root: Path, row: oxe.Dataset = ROW, **options) -> RLDS:
    return RLDS(root, "mine", row=row, hold_out=0.0, **options)


def edit_info(folder: Path, of_train: dict | None = None, **changes):
    """Change dataset_info.json, and what it says about its first split. None removes an entry."""
    path = folder / "dataset_info.json"
    info = {**json.loads(path.read_text()), **changes}
    info["splits"][0].update(of_train or {})
    path.write_text(json.dumps({key: value for key, value in info.items() if value is not None}))


def edit_steps(folder: Path, edit):
    """Let a function change the features of the steps in features.json."""
    path = folder / "features.json"
    content = json.loads(path.read_text())
    sequence = content["featuresDict"]["features"]["steps"]["sequence"]
    edit(sequence["feature"]["featuresDict"]["features"])
    path.write_text(json.dumps(content))


def instructions(dataset: RLDS) -> list[str]:
    return list(dict.fromkeys(dataset.instruction(i) for i in range(len(dataset))))


# ----------------------------------------------------------------------------- files


def test_files_of_another_number_are_stale(tmp_path):
    folder = write(tmp_path)
    old = folder / "mine-train.tfrecord-00000-of-00002"
    shutil.copy(folder / "mine-train.tfrecord-00000-of-00004", old)
    with pytest.raises(ValueError, match=f"{old}: none of the 4 files that dataset_info.json lists; remove it"):
        read(tmp_path)
    assert len(read(tmp_path, skip_bad_records=True)) == 48

    # The other way round: the information is of another version than all files.
    old.unlink()
    for path in folder.glob("*-of-00004"):
        path.rename(str(path).replace("-of-00004", "-of-00005"))
    with pytest.raises(ValueError, match="00000-of-00005: none of the 4 .* are they of different versions?"):
        read(tmp_path)


def test_names_of_splits_that_end_alike(tmp_path):
    names = ("train", "pretrain", "a-train", "test", "latest")
    write(tmp_path, **{name: [episode(i)] for i, name in enumerate(names)})
    for i, name in enumerate(names):
        assert instructions(read(tmp_path, oxe.Dataset(train_split=name))) == [f"take {i}"]


def test_names_as_dataset_info_says_them(tmp_path):
    """The documented placeholders; the name of the dataset is not that of its folder."""
    folder = write(tmp_path)
    for path in folder.glob("*.tfrecord*"):
        path.rename(folder / f"train.of.old_name.{path.name[-14:-9]}.tfrecord")
    (folder / "train.of.mine.00000.tfrecord").write_bytes(b"of another dataset")
    template = "{SPLIT}.of.{DATASET}.{SHARD_INDEX}.{FILEFORMAT}"
    edit_info(folder, name="old_name", of_train={"filepathTemplate": template})
    assert len(read(tmp_path)) == 48

    (folder / "train.of.old_name.00003.tfrecord").unlink()
    with pytest.raises(ValueError, match="train.of.old_name.00003.tfrecord: missing"):
        read(tmp_path)
    for template in ("../{SPLIT}-{SHARD_X_OF_Y}", "{SPLIT.__class__}", "{SPLIT}.tfrecord", "{A}-{SHARD_X_OF_Y}"):
        edit_info(folder, of_train={"filepathTemplate": template})
        with pytest.raises(ValueError, match="dataset_info.json: filepathTemplate"):
            read(tmp_path)


@pytest.mark.parametrize("lengths", [["2", "2", "2", "2"], None])
def test_folders_of_older_versions(tmp_path, lengths):
    """Without a template, a format, a name; the files have another name than the folder; or no lengths are known."""
    folder = write(tmp_path)
    edit_info(folder, name=None, fileFormat=None, of_train={"filepathTemplate": "", "shardLengths": lengths})
    assert len(read(tmp_path)) == 48
    for path in folder.glob("*.tfrecord*"):
        path.rename(folder / path.name.replace("mine", "old_name"))
    assert len(read(tmp_path)) == 48
    (folder / "old_name-train.tfrecord-00002-of-00004").unlink()
    with pytest.raises(ValueError, match="old_name-train.tfrecord-00002-of-00004: missing"):
        read(tmp_path)
    if lengths is None:
        shutil.copy(
            folder / "old_name-train.tfrecord-00000-of-00004", folder / "old_name-train.tfrecord-00000-of-00001"
        )
        with pytest.raises(ValueError, match="say that there are 1 and 4 of them"):
            read(tmp_path)


def test_files_without_a_number(tmp_path):
    folder = write(tmp_path, shard=8)
    next(folder.glob("*.tfrecord*")).rename(folder / "anything-train.tfrecord")
    assert len(read(tmp_path)) == 48


@pytest.mark.parametrize("said", ["array_record", None])
def test_another_format_is_named(tmp_path, said):
    """ArrayRecord can be converted. Beside tfrecord, as TFDS leaves both in one folder, it does no harm."""
    folder = write(tmp_path, shard=4)
    expected = read(tmp_path)[40]["pictures"]
    for path in folder.glob("*.tfrecord*"):
        to_array_record(path)
    edit_info(folder, fileFormat=said)
    with pytest.raises(ValueError, match=f"stored as array_record, .*`python -m formats.write_rlds {folder}`"):
        read(tmp_path)

    words = [sys.executable, "-m", "formats.write_rlds", str(folder)]
    run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert read(tmp_path)[40]["pictures"] == expected
    edit_info(folder, fileFormat="array_record", alternativeFileFormats=["tfrecord"])
    assert len(read(tmp_path)) == 48
    edit_info(folder, fileFormat="riegeli")
    edit_info(folder, alternativeFileFormats=None)
    with pytest.raises(ValueError, match="stored as riegeli"):
        read(tmp_path)


def to_array_record(path: Path):
    module = pytest.importorskip("array_record.python.array_record_module", reason="needs `pip install array_record`")
    writer = module.ArrayRecordWriter(str(path).replace("tfrecord", "array_record"), "group_size:1")
    for _, record in tfrecord.read_records(path):
        writer.write(record)
    writer.close()
    path.unlink()


def test_the_converter_of_array_record_wants_a_folder(tmp_path):
    for words, message in (([], "give the version folder"), ([str(write(tmp_path))], "no ArrayRecord files")):
        run = subprocess.run(
            [sys.executable, "-m", "formats.write_rlds", *words], cwd=ROOT, capture_output=True, text=True
        )
        assert run.returncode == 2 and message in run.stderr and "Traceback" not in run.stderr


def test_a_pointer_of_git_lfs(tmp_path):
    folder = write(tmp_path, shard=8)
    path = next(folder.glob("*.tfrecord*"))
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(ValueError, match=f"{path}: .*pointer of Git LFS, `git lfs pull` gets the data"):
        read(tmp_path)


def test_every_kind_of_bad_file_can_be_skipped(tmp_path):
    folder = write(tmp_path, num_episodes=16)
    files = sorted(folder.glob("*.tfrecord*"))
    files[0].unlink()
    files[0].mkdir()
    files[1].write_bytes(b"")
    files[2].write_bytes(files[2].read_bytes()[:-5])
    content = bytearray(files[3].read_bytes())
    content[5] ^= 1
    files[3].write_bytes(content)
    content = bytearray(files[4].read_bytes())
    content[1000] ^= 1
    files[4].write_bytes(content)
    files[5].unlink()
    files[5].symlink_to(tmp_path / "nowhere")
    files[6].write_text("version https://git-lfs.github.com/spec/v1\n")  # the length that it seems to have is huge
    with pytest.raises(ValueError, match="--skip_bad_records True goes on without it"):
        read(tmp_path)
    dataset = read(tmp_path, skip_bad_records=True)
    assert instructions(dataset) == ["take 4", "take 9", "take 14", "take 15"]
    for path in files[:7]:
        assert any(message.startswith(str(path)) for message in dataset.bad_records), path


# ----------------------------------------------------------------------------- splits and layouts


def test_a_dataset_without_a_train_split(tmp_path):
    write(tmp_path, success=[episode(i) for i in range(3)], failure=[episode(9)])
    with pytest.raises(ValueError, match="no split called 'train', .* success, failure; .*train_split='success'"):
        read(tmp_path)
    row = oxe.Dataset(train_split="success", val_split="failure")
    assert instructions(read(tmp_path, row)) == ["take 0", "take 1", "take 2"]
    assert instructions(read(tmp_path, row, split="val")) == ["take 9"]


def test_some_episodes(tmp_path):
    write(tmp_path)
    row = oxe.Dataset(episodes=(1, 5))
    dataset = read(tmp_path, row)
    assert instructions(dataset) == ["take 1", "take 5"] and dataset.statistics["num_trajectories"] == 2
    with pytest.raises(ValueError, match=r"episodes=\[8\]: split 'train' has 8, counted from 0"):
        read(tmp_path, oxe.Dataset(episodes=(1, 8)))


def test_an_action_that_is_a_dict(tmp_path):
    """As RT-1 has it."""
    folder = write(tmp_path, num_episodes=1)
    action = episode(0)["action"]
    example = encode_episode({**episode(0), "position": action[:, :3], "rot": action[:, 3:]})
    names = {b"observation/position": b"action/worldposition", b"observation/rot": b"action/rotation"}
    for key, renamed in names.items():
        example = example.replace(b"steps/" + key, b"steps/" + renamed)  # of the same length
    write_tfrecord(next(folder.glob("*.tfrecord*")), [example])

    def edit(features):
        features["action"] = dict_feature({"worldposition": array_feature((3,)), "rotation": array_feature((4,))})

    edit_steps(folder, edit)
    with pytest.raises(ValueError, match=r'tfrecord.*its action is a dict; .*action=\("action/rotation", "act'):
        read(tmp_path)
    row = oxe.Dataset(action=("action/worldposition", "action/rotation"))
    np.testing.assert_array_equal(read(tmp_path, row)[0]["actions"][0], action[0])


def test_pixels_that_are_no_encoded_image(tmp_path, monkeypatch):
    monkeypatch.setattr("formats.write_rlds.encode_jpeg", lambda image: zlib.compress(image.tobytes()))
    folder = write(tmp_path, num_episodes=1)
    tensor = {"shape": {"dimensions": ["32", "32", "3"]}, "dtype": "uint8", "encoding": "zlib"}
    name = "tensorflow_datasets.core.features.tensor_feature.Tensor"

    def edit(features):
        observations = features["observation"]["featuresDict"]["features"]
        observations["image"] = {"pythonClassName": name, "tensor": tensor}

    edit_steps(folder, edit)
    with pytest.raises(ValueError, match="tfrecord.*camera 'image' .*not stored as JPEG or PNG.*tfds.features.Image"):
        read(tmp_path)


def narrow_states(trajectory):
    is_second = trajectory["language_instruction"][0] == b"take 1"
    state = trajectory["observation"]["state"]
    return oxe.updated(trajectory, observation={"state": state[:, :2] if is_second else state})


def test_states_of_different_length(tmp_path):
    write(tmp_path, num_episodes=2)
    row = oxe.Dataset(state=("state",), standardize=narrow_states)
    with pytest.raises(ValueError, match="episode at byte .*: proprio has 2 dimensions, those before it 3"):
        read(tmp_path, row)
    assert instructions(read(tmp_path, row, skip_bad_records=True)) == ["take 0"]


def test_why_no_frame_is_left(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match="at most 6 steps, --action_chunk 7 needs as many"):
        read(tmp_path, action_chunk=7)
    with pytest.raises(ValueError, match="keep_frames of its row drops all"):
        read(tmp_path, oxe.Dataset(keep_frames=lambda trajectory: np.zeros(6, bool)))
    write(tmp_path, train=[{**episode(0), "instruction": ""}])
    with pytest.raises(ValueError, match="none of its episodes has an instruction"):
        read(tmp_path)


# ----------------------------------------------------------------------------- the writer


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ">f8", np.int64, np.uint8, bool, list])
def test_the_writer_casts(tmp_path, dtype):
    values = np.arange(18).reshape(6, 3) / (2 if np.dtype(dtype if dtype is not list else "f8").kind == "f" else 1)
    state = values.tolist() if dtype is list else values.astype(dtype)
    write(tmp_path, train=[{**episode(0), "state": state, "action": episode(0)["action"].astype(np.float64)}])
    dataset = read(tmp_path)
    for i in range(6):
        np.testing.assert_array_equal(dataset[i]["proprio"], np.asarray(state[i], np.float32))
        np.testing.assert_array_equal(dataset[i]["actions"][0], episode(0)["action"][i])


def test_the_writer_leaves_out_what_follows_the_last_action(tmp_path):
    longer = {**episode(0, T=7), "action": episode(0)["action"]}
    jpegs = {**episode(1), "image": [encode_jpeg(image) for image in episode(1)["image"]]}
    write(tmp_path, train=[longer, jpegs])
    dataset = read(tmp_path)
    assert len(dataset) == 12
    np.testing.assert_array_equal(dataset[5]["proprio"], longer["state"][5])
    assert dataset[11]["pictures"][0] == jpegs["image"][5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"action": np.zeros((0, 7))}, r"action: expected \(T, A\) with at least one step, found \(0, 7\)"),
        ({"action": np.zeros(6)}, r"action: expected \(T, A\)"),
        ({"action": np.full((6, 7), np.nan)}, "action: it has numbers that are not finite"),
        ({"action": np.zeros((5, 7))}, None),
        ({"action": np.zeros((4, 7))}, "image: 6 steps, but there are 4 actions"),
        ({"state": np.zeros((3, 3))}, "state: 3 steps, but there are 6 actions"),
        ({"state": np.full((6, 3), 1e300)}, "state: float64 numbers that float32 cannot hold"),
        ({"state": np.full((6, 3), 2**24 + 1)}, "state: int64 numbers that float32 cannot hold"),
        ({"state": np.zeros((6, 3), complex)}, "state: expected numbers .* found dtype complex128"),
        ({"state": {"joints": np.zeros((6, 3))}}, "state: expected numbers .* found dtype object"),
        ({"state": [[1, 2, 3], [1, 2]]}, "state: expected an array of numbers"),
        ({"state": 0.5}, "state: 0 steps"),
        ({"image": np.zeros((6, 32, 32, 3))}, r"image: expected images .* uint8, found \(6, 32, 32, 3\) float64"),
        ({"image": np.zeros((6, 32, 32, 1), np.uint8)}, "image: expected images"),
        ({"image": [b"pixels"] * 6}, "image: expected JPEGs, found other bytes"),
        ({"instruction": b"take it"}, "instruction: expected a str, found b'take it'"),
        ({"state": np.zeros((6, 4))}, r"state: expected \(3,\) at each step, as in the first episode, found \(4,\)"),
        ({"image": np.zeros((6, 8, 8, 3), np.uint8)}, r"image: expected \(32, 32, 3\) at each step"),
        ({"wrist": np.zeros((6, 2))}, r"wrist: expected no such key at each step, .*found \(2,\)"),
    ],
)
def test_the_writer_refuses(tmp_path, changes, message):
    episodes = [episode(0), {**episode(1), **changes}]
    if message is None:
        write(tmp_path, train=episodes)
        return
    with pytest.raises(ValueError, match=f"train, episode 1: {message}"):
        write(tmp_path, train=episodes)
    assert not (tmp_path / "mine" / "1.0.0").exists()


def test_the_writer_needs_all_keys(tmp_path):
    for key in ("action", "instruction"):
        broken = episode(0)
        broken.pop(key)
        with pytest.raises(ValueError, match=rf"train, episode 0: it has no \['{key}'\]"):
            write(tmp_path, train=[broken])
    later = episode(1)
    later.pop("state")
    with pytest.raises(ValueError, match="train, episode 1: state: expected .*found no such key"):
        write(tmp_path, train=[episode(0), later])
    with pytest.raises(ValueError, match="there are no episodes"):
        write(tmp_path, train=[])
    with pytest.raises(ValueError, match="a split cannot be called 'a/b'"):
        write(tmp_path, **{"a/b": [episode(0)]})


# ----------------------------------------------------------------------------- a stale index

FUNCTIONS = """
import functools
import numpy as np
import helper
from helper import units
from formats import oxe
SCALE = 1.0
NAMES = {"a", "b", "c", "d"}
class Times:
    def __init__(self, k): self.k = k
    def __call__(self, t): return times(t, self.k)
    def method(self, t): return times(t, self.k)
def times(t, k): return oxe.updated(t, np.concatenate([t["action"][:, :6] * k, t["action"][:, 6:]], 1))
def by_helper(t): return times(t, units(1.0))
def by_module(t): return times(t, helper.K)
def by_constant(t): return times(t, SCALE * len(NAMES) / 4)
def by_import(t):
    import helper as inner
    return times(t, getattr(inner, "K"))
def closed(k):
    def inner(t): return times(t, k)
    return inner
def scaled(k, t): return times(t, k)
def by_default(t, k=SCALE): return times(t, k)
def decorated(function):
    @functools.wraps(function)
    def wrapper(t): return times(function(t), SCALE)
    return wrapper
@decorated
def plain(t): return t
@functools.cache
def cached(): return SCALE
def by_cache(t): return times(t, cached())
def nested(t): return [(lambda: [times(t, SCALE) for _ in range(1)][0])() for _ in range(1)][0]
"""
HELPER = "K = 1.0\ndef units(a): return a * 1.0\n"
WAYS = {
    "a helper in another file": "functions.by_helper",
    "a constant of another file": "functions.by_module",
    "a module that it imports itself": "functions.by_import",
    "a constant": "functions.by_constant",
    "a closure": "functions.closed(functions.SCALE)",
    "a partial argument": "partial(functions.scaled, functions.SCALE)",
    "a default argument": "functions.by_default",
    "an object": "functions.Times(functions.SCALE)",
    "a method": "functions.Times(functions.SCALE).method",
    "a decorator": "functions.plain",
    "a cached function": "functions.by_cache",
    "a function inside a function": "functions.nested",
}
LOOK = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, sys.argv[1]]
from functools import partial
from pathlib import Path
import functions
from formats import oxe
from formats.rlds import RLDS
for function in ({", ".join(WAYS.values())}):
    dataset = RLDS(sys.argv[1], "mine", row=oxe.Dataset(standardize=function))
    print(dataset.index.name, dataset.statistics["action"]["max"][0])
"""


def look(root: Path, hash_seed: int) -> list[tuple[str, float]]:
    """The index and the largest action that a new process gets with each of the functions."""
    env = {**os.environ, "PYTHONHASHSEED": str(hash_seed), "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run([sys.executable, "-c", LOOK, str(root)], env=env, capture_output=True, text=True, cwd=root)
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    return [(name, float(largest)) for name, largest in lines]


def test_the_index_follows_a_function_wherever_it_goes(tmp_path):
    write(tmp_path, num_episodes=2)
    (tmp_path / "functions.py").write_text(FUNCTIONS)
    (tmp_path / "helper.py").write_text(HELPER)
    before = look(tmp_path, hash_seed=1)
    assert look(tmp_path, hash_seed=2) == before  # the same in each process

    # Each file is edited alone, and what does not depend on it keeps its index.
    (tmp_path / "helper.py").write_text(HELPER.replace("1.0", "50.0"))
    between = look(tmp_path, hash_seed=3)
    (tmp_path / "functions.py").write_text(FUNCTIONS.replace("SCALE = 1.0", "SCALE = 50.0"))
    after = look(tmp_path, hash_seed=4)
    for way, old, middle, new in zip(WAYS, before, between, after, strict=True):
        assert new[1] == pytest.approx(50 * old[1]), way
        is_in_helper = way in list(WAYS)[:3]
        assert (old[0] != middle[0]) == is_in_helper and (middle[0] != new[0]) != is_in_helper, way


LOCK = threading.Lock()
TABLE = {"big": np.zeros(10_000), "names": {"a", "b", "c"}}


def uses_a_lock(trajectory):
    with LOCK:
        return trajectory


def uses_a_table(trajectory):
    return oxe.updated(trajectory, trajectory["action"] + TABLE["big"][0])


def test_what_cannot_be_followed_is_refused(tmp_path):
    write(tmp_path, num_episodes=1)
    with pytest.raises(ValueError, match=r"standardize=uses_a_lock: it uses LOCK \(lock\), which cannot be compared"):
        read(tmp_path, oxe.Dataset(standardize=uses_a_lock))
    with pytest.raises(ValueError, match="keep_frames=uses_a_lock: it uses LOCK"):
        read(tmp_path, oxe.Dataset(keep_frames=uses_a_lock))


def test_every_number_of_a_table_counts(monkeypatch):
    before = fingerprint_of(uses_a_table, "standardize")
    table = np.zeros(10_000)
    monkeypatch.setitem(TABLE, "big", table)
    assert fingerprint_of(uses_a_table, "standardize") == before
    table[5000] = 1
    assert fingerprint_of(uses_a_table, "standardize") != before


def test_code_of_packages_counts_by_its_name():
    assert fingerprint_of(np.sin, "standardize") != fingerprint_of(np.cos, "standardize")
    assert fingerprint_of(partial(np.add, 1), "standardize") != fingerprint_of(partial(np.add, 2), "standardize")
    for name in ("bridge_orig", "droid", "libero_spatial_no_noops"):
        assert fingerprint_of(oxe.lookup(name).standardize, "standardize")


# ----------------------------------------------------------------------------- all cores


def with_half_of_the_episodes(trajectory):
    first = int(trajectory["language_instruction"][0].split()[1])
    return trajectory if first % 2 else oxe.updated(trajectory, trajectory["action"] * np.nan)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("standardize", [oxe.identity, with_half_of_the_episodes, lambda trajectory: trajectory])
def test_any_number_of_processes_makes_the_same_index(tmp_path, monkeypatch, standardize):
    monkeypatch.setattr(rlds_index, "MAX_BATCH", 2)
    episodes = [{**episode(i), "wrist": episode(i)["image"][:, ::-1]} for i in range(9)]
    folder = write(tmp_path, shard=4, train=episodes, val=episodes[:1])
    broken = sorted(folder.glob("*-train*"))[1]
    content = bytearray(broken.read_bytes())
    content[1000] ^= 1
    broken.write_bytes(content)
    row = oxe.Dataset(wrist="wrist", state=("state",), standardize=standardize, swap_images=("image", "wrist"))
    made = []
    for num_processes in (1, 2, 3):
        out = tmp_path / str(num_processes)
        out.mkdir()
        rlds_index.write_index(out, folder, "mine", row, True, no_progress, num_processes)
        made.append(files_of(out))
    assert made[0] == made[1] == made[2] and len(made[0]) == 2 * 4 + 2
    meta = json.loads(made[0]["index.json"])
    num_bad = len(meta["bad_records"])
    assert meta["episodes"] == 10 - num_bad and num_bad == (6 if standardize is with_half_of_the_episodes else 1)


def test_which_camera_an_episode_shows_is_drawn_as_ever(tmp_path):
    """One draw for each episode, in their order."""
    episodes = [episode(i) for i in range(12)]
    folder = write(tmp_path, train=[{**e, "other": np.zeros_like(e["image"])} for e in episodes])
    row = oxe.Dataset(swap_images=("image", "other"))
    out = tmp_path / "out"
    out.mkdir()
    rlds_index.write_index(out, folder, "mine", row, False, no_progress, 2)
    tables = rlds_index.open_tables(out, json.loads((out / "index.json").read_text()), "train")
    rng = np.random.default_rng(zlib.crc32(b"mine"))
    for e in range(12):
        frame = tables["frames"][6 * e].tolist()
        file = sorted(folder.glob("*.tfrecord*"))[int(tables["episodes"][e, 0])]
        image = decode(file.read_bytes()[frame[3] : frame[3] + frame[4]])
        assert (image.max() == 0) == (rng.random() <= 0.5)


def test_progress_counts_megabytes(tmp_path, monkeypatch):
    monkeypatch.setattr(rlds_index, "MB", 1000)
    folder = write(tmp_path)
    calls = []

    def progress(items, title, unit, total=None):
        items = list(items)
        calls.append((title, unit, total, len(items)))
        return items

    out = tmp_path / "out"
    out.mkdir()
    rlds_index.write_index(out, folder, "mine", ROW, False, progress, 2)
    size = sum(path.stat().st_size for path in folder.glob("*.tfrecord*"))
    (title, unit, total, count) = calls[0]
    assert (title, unit, total) == ("indexing mine train", "MB", size // 1000 + 1)
    assert total - 1 <= count <= total


SLOW = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from formats import oxe, rlds_index
from progress import no_progress
rlds_index.MAX_BATCH = 2
started = Path(sys.argv[1])
def slow(trajectory):
    (started / str(os.getpid())).touch()
    if sys.argv[2] == "wait":
        time.sleep(600)
    elif sys.argv[2] == "raise":
        raise ValueError("the user's mistake")
    else:
        os.kill(os.getpid(), 9)
    return trajectory
if __name__ == "__main__":
    folder = started.parent / "mine" / "1.0.0"
    try:
        rlds_index.open_index(folder, "mine", oxe.Dataset(standardize=slow), num_processes=2)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {{error}}")
"""


def start_slow(tmp_path: Path, what: str) -> tuple[subprocess.Popen, Path]:
    """Index 40 episodes in two processes, which leave files named after them when they begin, and then do `what`."""
    write(tmp_path, num_episodes=40, shard=40)
    started = tmp_path / "started"
    started.mkdir()
    (tmp_path / "slow.py").write_text(SLOW)
    words = [sys.executable, "-u", str(tmp_path / "slow.py"), str(started), what]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True), started


def wait_until(condition, seconds: float = 60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="several processes index on Linux only")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_indexing_leaves_no_process_and_nothing_half(tmp_path, number):
    process, started = start_slow(tmp_path, "wait")
    wait_until(lambda: len(list(started.iterdir())) == 2)
    workers = [int(path.name) for path in started.iterdir()]
    assert process.pid not in workers
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as Ctrl-C does
    else:
        process.send_signal(number)
    process.wait(30)
    wait_until(lambda: not any(is_running(pid) for pid in workers))
    places = [path for path in (tmp_path / "mine" / "1.0.0" / ".index").iterdir() if not path.name.startswith("tmp")]
    assert places == []
    assert len(read(tmp_path)) == 240


@pytest.mark.skipif(sys.platform != "linux", reason="several processes index on Linux only")
def test_a_process_that_is_killed_is_said(tmp_path):
    process, _ = start_slow(tmp_path, "die")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in error
    assert "the process that indexes it from byte 0 on was killed; is there too little memory?" in error
    assert list((tmp_path / "mine" / "1.0.0" / ".index").iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="several processes index on Linux only")
def test_processes_end_with_an_error(tmp_path):
    process, started = start_slow(tmp_path, "raise")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 1 and "episode at byte 12: the user's mistake" in error and "Traceback" not in error
    assert not any(is_running(int(path.name)) for path in started.iterdir())


# ----------------------------------------------------------------------------- as TFDS reads it


def tfds_or_skip():
    pytest.importorskip("tensorflow", reason="needs tensorflow, beside tensorflow-datasets")
    import tensorflow_datasets as tfds

    return tfds


def same_as_tfds(tfds, folder: Path, dataset: RLDS):
    """Compare all frames of a dataset, none of which is dropped, with what TFDS reads from the same folder."""
    builder = tfds.builder_from_directory(folder)
    camera = dataset.row.images["primary"]
    skip = {"steps": {"observation": {camera: tfds.decode.SkipDecoding()}}}
    i = 0
    for stored in builder.as_dataset("train", decoders=skip):
        for step in stored["steps"].as_numpy_iterator():
            frame = dataset[i]
            states = [np.ravel(step["observation"][key]) for key in dataset.row.state]
            assert frame["pictures"] == [step["observation"][camera]]
            assert frame["instruction"].encode() == step["language_instruction"]
            np.testing.assert_array_equal(frame["actions"][0], np.float32(step["action"]))
            np.testing.assert_array_equal(frame["proprio"], np.float32(np.concatenate(states)))
            i += 1
    assert i == len(dataset) > 0


def test_tfds_reads_what_we_write(tmp_path):
    tfds = tfds_or_skip()
    folder = write(tmp_path)
    same_as_tfds(tfds, folder, read(tmp_path))


def test_we_read_what_tfds_writes(tmp_path):
    """Numbers of all kinds, nested and scalar ones, beside information about the episode."""
    tfds = tfds_or_skip()
    steps = {
        "observation": {
            "image": tfds.features.Image(shape=(32, 32, 3), encoding_format="jpeg"),
            "wrist": tfds.features.Image(shape=(32, 32, 3), encoding_format="png"),
            "state": tfds.features.Tensor(shape=(3,), dtype=np.float64),
            "arm": {"joints": tfds.features.Tensor(shape=(2, 2), dtype=np.float32)},
            "gripper": tfds.features.Scalar(dtype=np.float32),
            "is_closed": tfds.features.Scalar(dtype=np.bool_),
            "count": tfds.features.Scalar(dtype=np.int32),
        },
        "action": tfds.features.Tensor(shape=(7,), dtype=np.float32),
        "language_instruction": tfds.features.Text(),
        "is_first": np.bool_,
    }
    features = tfds.features.FeaturesDict(
        {"steps": tfds.features.Dataset(steps), "episode_metadata": {"file_path": tfds.features.Text()}}
    )

    def episode_as_tfds(number: int) -> dict:
        e = episode(number)
        steps = [
            {
                "observation": {
                    "image": e["image"][t],
                    "wrist": e["image"][t],
                    "state": e["state"][t].astype(np.float64),
                    "arm": {"joints": np.full((2, 2), t + 0.5, np.float32)},
                    "gripper": np.float32(t / 10),
                    "is_closed": bool(t % 2),
                    "count": 100 * number + t,
                },
                "action": e["action"][t],
                "language_instruction": e["instruction"],
                "is_first": t == 0,
            }
            for t in range(6)
        ]
        return {"steps": steps, "episode_metadata": {"file_path": f"episode {number}"}}

    class Mine(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = tmp_path

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(5):
                yield i, episode_as_tfds(i)

    builder = Mine(data_dir=str(tmp_path), file_format="tfrecord")
    builder.download_and_prepare()
    folder = Path(builder.data_dir)
    state = ("state", "gripper", "is_closed", "count")
    same_as_tfds(tfds, folder, read(tmp_path, oxe.Dataset(state=state)))
    same_as_tfds(tfds, folder, read(tmp_path, oxe.Dataset("wrist", state=state)))
    joints = read(tmp_path, oxe.Dataset(state=("arm/joints",)))
    assert joints[3]["proprio"].tolist() == [3.5] * 4


def test_offsets_of_records(tmp_path):
    """`find_records` reads no content, `read_records` all of it."""
    path = next(write(tmp_path, num_episodes=3, shard=3).glob("*.tfrecord*"))
    places = list(tfrecord.find_records(path, 3))
    content = path.read_bytes()
    records = list(tfrecord.read_records(path))
    assert [place.content for place in places] == [offset for offset, _ in records]
    assert [content[place.content : place.content + place.length] for place in places] == [r for _, r in records]
