"""From RLDS folders to batches: against the official pipeline's numbers, and against broken data."""

import dataclasses
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from common import ROOT, shared

import data
from configurator import configure
from data import Mixture, Positions, Samples, collate, make_loader, open_mixture, pad_chunk, shuffled
from formats import oxe, rlds, rlds_index, tfrecord
from formats.write_rlds import write_rlds
from image import decode, resize_lanczos3
from normalize import normalize
from tokenizer import Tokenizer


@pytest.fixture(scope="module")
def llama():
    return Tokenizer(shared("data/llama2-tokenizer/tokenizer.model"))


@pytest.fixture
def bridge():
    return rlds.RLDS(shared("data"), "bridge_orig")


def fixture(name):
    path = shared(f"facts/pipeline_fixtures/{name}")
    return json.loads(path.read_text()) if path.suffix == ".json" else np.load(path)


# ----------------------------------------------------------------------------- against the official pipeline


def test_statistics(bridge):
    for name, kinds in (("as_trained", ["action"]), ("with_proprio", ["action", "proprio"])):
        want = fixture(f"dataset_statistics_{name}.json")["bridge_orig"]
        for kind in kinds:
            assert want[kind].keys() == bridge.statistics[kind].keys()
            for key, value in want[kind].items():
                np.testing.assert_allclose(
                    bridge.statistics[kind][key], value, rtol=0, atol=1e-6, err_msg=f"{kind} {key}"
                )
        assert bridge.statistics["num_transitions"] == want["num_transitions"] == 400
        assert bridge.statistics["num_trajectories"] == want["num_trajectories"] == 50


def test_first_three_samples(bridge, llama):
    want = fixture("three_samples_bridge.npz")
    mixture = Mixture([(bridge, 1.0)], llama)
    for i in range(3):
        sample = mixture.sample(0, i)
        np.testing.assert_allclose(sample["actions"][0], want["action"][i], atol=1e-6)
        assert bridge[i]["instruction"].encode() == want["language"][i]
        difference = np.abs(sample["images"][0].astype(int) - want["image"][i])
        assert difference.max() <= 1 and (difference > 0).sum() <= 3
        assert sample["input_ids"].tolist() == want[f"input_ids_{i}"].tolist()
        assert sample["labels"].tolist() == want[f"labels_{i}"].tolist()


def test_all_trajectories_in_order(bridge):
    want, tables = fixture("ordered_trajectories_bridge.npz"), bridge.open()
    raw, proprio = (np.array(tables[k]) for k in ("action", "proprio"))
    assert np.array_equal(raw.reshape(25, 8, 7), want["action_raw_relabelled"])
    for scheme in ("normal", "bounds", "bounds_q99"):
        for kind, x in (("action", raw), ("proprio", proprio)):
            got = normalize(x, bridge.statistics[kind], scheme).reshape(25, 8, -1)
            # "normal" divides by the std an official mean that was summed in float32, in another order
            np.testing.assert_allclose(got, want[f"{kind}_{scheme}"], atol=1e-5 if scheme == "normal" else 1e-6)
    episodes = [bridge[8 * e]["instruction"].encode() for e in range(25)]
    assert episodes == want["language"].tolist()
    assert [bridge.where(i) for i in (0, 7, 8)] == [(0, 0), (0, 7), (1, 0)]


def chunk(actions, absolute_mask, future, window=1, goals=None):
    """
    Actions of an episode (T, A) -> (T, window + future, A): for each step those before it, its own and those after, as
    pad_chunk fills them up. Before the start the first one repeats. goals (T,): the last step each chunk may use.
    """
    T = len(actions)
    chunks = []
    for step in range(T):
        before = [actions[max(0, step - i)] for i in range(window - 1, 0, -1)]
        last = T - 1 if goals is None else goals[step]
        chunks.append([*before, *pad_chunk(actions[step : last + 1], absolute_mask, 1 + future)])
    return np.array(chunks)


def test_chunks_exactly():
    want = fixture("chunking.npz")
    for case in ("w1f0", "w2f3", "w1f7", "w1f3_goal", "w3f4_nomask"):
        window, future = want[f"{case}::window_future"]
        goals = want[f"{case}::goal_timestep"] if f"{case}::goal_timestep" in want else None
        absolute = np.array([False] * 6 + [case != "w3f4_nomask"])
        got = chunk(want["action"], absolute, future, window, goals)
        assert np.array_equal(got, want[f"{case}::out_action"]), case


# ----------------------------------------------------------------------------- order


def small_samples(n, name="mine"):
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    rows = [{"image": pixels, "action": np.linspace(0, i + 1, 7), "instruction": f"do {i}"} for i in range(n)]
    return Samples(rows, name)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 1000, 4097])
def test_shuffled_is_a_permutation(n):
    for key in (0, 12345678901234567):
        assert sorted(shuffled(i, n, key) for i in range(n)) == list(range(n))


def test_every_epoch_visits_every_frame_once(llama):
    mixture = Mixture([(small_samples(300), 1.0)], llama)
    epochs = [[mixture.locate(p)[1] for p in range(e * 300, (e + 1) * 300)] for e in range(20)]
    assert all(sorted(epoch) == list(range(300)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 20


def test_shares_of_a_mixture(llama):
    """Shares are weight x size, exact to a sample after any number of blocks; a rare dataset is not lost."""
    parts = [(small_samples(400, "a"), 1.0), (small_samples(400, "b"), 0.5), (small_samples(1, "c"), 0.01)]
    mixture = Mixture(parts, llama)
    drawn = np.array([mixture.locate(p)[0] for p in range(3000)])
    assert abs((drawn == 0).mean() - 2 / 3) < 0.02
    where = [mixture.locate(p) for p in range(3 * data.BLOCK)]
    counts = np.bincount([w for w, _, _ in where], minlength=3)
    assert np.abs(counts - mixture.shares * len(where)).max() <= 3
    for d in range(3):  # epochs within a mixture, too
        frames = [i for w, i, _ in where if w == d]
        n = len(parts[d][0])
        assert sorted(frames[:n]) == list(range(min(n, len(frames))))
    assert mixture.locate(10**12) == mixture.locate(10**12)


def test_shuffling_is_as_good_as_a_perfect_one(bridge, llama):
    """How far neighbours in the stream lie apart in the data: that of numpy's permutation, within its spread."""
    mixture = Mixture([(bridge, 1.0)], llama)
    ours = np.mean(
        [abs(np.diff([mixture.locate(p)[1] for p in range(e * 200, e * 200 + 200)])).mean() for e in range(40)]
    )
    rng = np.random.default_rng(0)
    perfect = [np.abs(np.diff(rng.permutation(200))).mean() for _ in range(40)]
    assert abs(ours - np.mean(perfect)) < 4 * np.std(perfect) / 40**0.5


def stream(parts, tokenizer, workers=0, start=0, steps=3, rank=0, world=1, batch=8, micro=4):
    mixture = Mixture(parts, tokenizer, image_size=28, image_aug=True)
    loader = make_loader(mixture, Positions(batch, micro, rank, world, start), workers)
    n = steps * batch // (micro * world)
    return [b for b, _ in zip(loader, range(n), strict=False)]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x[k], y[k]) for x, y in zip(a, b, strict=True) for k in x)


def test_workers_do_not_change_the_stream(bridge, llama):
    alone = stream([(bridge, 1.0)], llama)
    for workers in (1, 2, 4):
        assert same(alone, stream([(bridge, 1.0)], llama, workers=workers))


def test_resume_at_any_step_and_ranks(bridge, llama):
    whole = stream([(bridge, 1.0)], llama, steps=4)
    for start in range(4):
        assert same(whole[2 * start :], stream([(bridge, 1.0)], llama, start=start, steps=4 - start))
    ranks = [stream([(bridge, 1.0)], llama, rank=r, world=2, steps=4) for r in range(2)]
    assert same(whole, [batch for pair in zip(*ranks, strict=True) for batch in pair])
    positions = Positions(8, 4, start_step=3)
    other = Positions(8, 4)
    other.load_state_dict(positions.state_dict())
    assert next(iter(other)) == next(iter(positions)) == [24, 25, 26, 27]


def test_collate_pads_on_the_right(llama):
    mixture = Mixture([(small_samples(3), 1.0)], llama, image_size=14)
    samples = [mixture.sample(0, i) for i in range(3)]
    samples[1]["input_ids"], samples[1]["labels"] = samples[1]["input_ids"][:5], samples[1]["labels"][:5]
    batch = collate(samples)
    assert batch["images"].shape == (3, 1, 14, 14, 3) and batch["images"].dtype == torch.uint8
    assert batch["input_ids"][1, 5:].eq(32000).all() and batch["labels"][1, 5:].eq(-100).all()
    assert batch["lengths"].tolist()[1] == 5 and batch["actions"].shape == (3, 1, 7)


# ----------------------------------------------------------------------------- own data


def test_own_samples_are_normalised_by_their_own_statistics(llama):
    samples = small_samples(50)
    actions = np.stack([samples.samples[i]["action"] for i in range(50)])
    np.testing.assert_allclose(samples.statistics["action"]["q99"], np.quantile(actions, 0.99, axis=0), rtol=1e-6)
    got = Mixture([(samples, 1.0)], llama, image_size=14).sample(0, 7)
    np.testing.assert_allclose(got["actions"][0], normalize(actions[7], samples.statistics["action"]), atol=1e-6)
    generator = (row for row in samples.samples)
    assert len(Samples(generator)) == 50


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"image": np.zeros((8, 8, 3), np.uint8), "action": np.zeros(7)}, r"sample 1 has no \['instruction'\]"),
        ({"image": 0, "action": np.zeros(6), "instruction": ""}, "sample 1 has action"),
        ({"image": 0, "action": np.full(7, np.nan), "instruction": ""}, "sample 1 has action"),
    ],
)
def test_own_samples_that_do_not_fit(row, message):
    with pytest.raises(ValueError, match=message):
        Samples([small_samples(1).samples[0], row])


def test_a_row_of_my_own(tmp_path, llama):
    """An RLDS folder that no table knows, described by a row in a config file."""
    shutil.copytree(shared("data/bridge_orig"), tmp_path / "my_robot")
    row = oxe.Dataset(primary="image_1", state=("state",), standardize=lambda t: oxe.standardize("bridge_orig", t))
    mine = rlds.RLDS(tmp_path, "my_robot", row=row)
    assert len(mine) == 200 and mine[0]["proprio"].shape == (7,)
    sample = Mixture([(mine, 1.0)], llama, image_size=28).sample(0, 3)
    assert sample["images"].shape == (1, 28, 28, 3)


def readme_config(words: str) -> str:
    """The Python block of docs/your-data.md that has these words in it."""
    page = ROOT / "docs" / "your-data.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)
    return next(block for block in blocks if words in block)


def test_a_row_of_ones_own_as_in_the_docs(tmp_path, monkeypatch):
    import train

    monkeypatch.chdir(tmp_path)
    shutil.copytree(shared("data/bridge_orig"), tmp_path / "my_robot")
    row = readme_config("oxe.Dataset(").replace("front_camera", "image_1").replace("joints", "state")
    assert len(row.splitlines()) <= 10
    (tmp_path / "d.py").write_text(row)
    cfg = configure(train.Config, ["--config", "d.py"])
    dataset = open_mixture(tmp_path, cfg.data_mix)[0][0]
    assert len(dataset) == 250 and dataset[0]["proprio"].shape == (7,)  # nothing is dropped or relabelled


def test_classes_of_a_config_file_reach_the_workers(tmp_path, monkeypatch, llama):
    import train

    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.py").write_text(RECORDINGS)
    cfg = configure(train.Config, ["--config", "c.py"])
    batches = stream(open_mixture("", cfg.data_mix), llama, workers=2, steps=1)
    assert len(batches) == 2 and batches[0]["images"].shape == (4, 1, 28, 28, 3)


RECORDINGS = """
import numpy as np
from data import Samples


class Recordings:
    def __len__(self):
        return 6

    def __getitem__(self, i):
        image = np.full((20, 30, 3), i, np.uint8)
        return {"image": image, "action": np.full(7, 0.1 * i), "instruction": "go left"}


data_mix = [(Samples(Recordings(), name="my_robot"), 1.0)]
"""


def test_several_cameras_proprio_and_chunks(llama):
    dataset = rlds.RLDS(shared("data"), "bridge_orig", views=("primary", "secondary"), action_chunk=3)
    assert len(dataset) == 25 * 6  # the last two of eight steps start no chunk
    sample = Mixture([(dataset, 1.0)], llama, action_chunk=3).sample(0, 6)
    assert sample["images"].shape == (2, 224, 224, 3) and not np.array_equal(*sample["images"])
    assert dataset.where(6) == (1, 0) and sample["proprio"].shape == (8,)
    raw = np.array(dataset.open()["action"])[8:11]
    np.testing.assert_allclose(sample["actions"], normalize(raw, dataset.statistics["action"]))
    assert len(sample["labels"]) and (sample["labels"] >= 0).sum() == 3 * 7 + 1


def test_validation_split_of_a_dataset_without_one(tmp_path):
    folder = shutil.copytree(shared("data/bridge_orig"), tmp_path / "bridge_orig") / "1.0.0"
    os.chmod(folder, 0o755)
    info = json.loads((folder / "dataset_info.json").read_text())
    info["splits"] = [s for s in info["splits"] if s["name"] == "train"]
    os.chmod(folder / "dataset_info.json", 0o644)
    (folder / "dataset_info.json").write_text(json.dumps(info))
    train, val = (rlds.RLDS(tmp_path, "bridge_orig", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (24 * 8, 8)  # 95 % of 25 episodes, and the rest
    assert train.where(0)[0] == 0 and val.where(0)[0] == 24


# ----------------------------------------------------------------------------- broken data


@pytest.fixture
def copy(tmp_path):
    """A dataset that may be broken, and its train file."""
    folder = shutil.copytree(shared("data/bridge_orig"), tmp_path / "bridge_orig") / "1.0.0"
    for path in (folder, *folder.iterdir()):
        os.chmod(path, 0o755)
    return tmp_path, folder / "bridge_dataset-train.tfrecord-00000-of-00001"


def test_index_is_reused_and_edited_data_is_noticed(copy, monkeypatch):
    root, file = copy
    monkeypatch.setenv("OPENVLA_CACHE", str(root / "cache"))
    first = rlds.RLDS(root, "bridge_orig").index
    assert first.parent.parent == file.parent
    monkeypatch.setattr(rlds_index, "write_index", lambda *_: pytest.fail("indexed again"))
    assert rlds.RLDS(root, "bridge_orig").index == first
    os.utime(file, ns=(1, 1))
    with pytest.raises(pytest.fail.Exception, match="indexed again"):
        rlds.RLDS(root, "bridge_orig")


SCALE = 1.0


def scaled(trajectory):
    return {**trajectory, "action": in_metres(trajectory["action"])}


def in_metres(action):
    return action * SCALE


def every_second(trajectory):
    return np.arange(len(trajectory["action"])) % STRIDE == 0


STRIDE = 2


def test_index_follows_what_its_functions_use(tmp_path, monkeypatch):
    """A constant of a standardise function, one that keep_frames uses, the kind of action, the bad records."""
    from toy import world as toy

    write_rlds(tmp_path, dict(train=toy.demonstrations(toy.TRAIN, 3)), name="mine")
    row = oxe.Dataset(primary="image", standardize=scaled, state=(), keep_frames=every_second)

    def read(**options):
        return rlds.RLDS(tmp_path, "mine", row=row, hold_out=0.0, **options)

    first = read()
    monkeypatch.setitem(globals(), "SCALE", 10.0)
    np.testing.assert_allclose(
        read().statistics["action"]["q99"][:3], np.multiply(first.statistics["action"]["q99"][:3], 10)
    )
    frames = len(read())
    monkeypatch.setitem(globals(), "STRIDE", 5)
    assert len(read()) < frames
    index = read().index
    rlds_index.write_meta(index, json.loads((index / "index.json").read_text()) | {"bad_records": ["file 3: cut off"]})
    with pytest.raises(ValueError, match="file 3: cut off; 1 bad records were left out"):
        read()
    assert len(read(skip_bad_records=True)) < frames

    # Cameras that are exchanged in half of the episodes are another index, too.
    swapped = dataclasses.replace(row, swap_images=("image", "image"))
    assert rlds_index.fingerprint(index.parent.parent, swapped) != rlds_index.fingerprint(index.parent.parent, row)


def two_arms(trajectory):
    return {**trajectory, "action": np.concatenate([trajectory["action"]] * 2, axis=1)}


def test_keep_frames_sees_actions_as_training_does(tmp_path):
    """For two arms: minimum and maximum become -1 and 1, not q01 and q99."""
    from toy import world as toy

    shown = []

    def look(trajectory):
        shown.append(trajectory["action"])
        return np.ones(len(trajectory["action"]), bool)

    write_rlds(tmp_path, dict(train=toy.demonstrations(toy.TRAIN, 3)), name="mine")
    row = oxe.Dataset(state=(), standardize=two_arms, action_encoding="JOINT_POS_BIMANUAL", keep_frames=look)
    dataset = rlds.RLDS(tmp_path, "mine", row=row, hold_out=0.0)
    actions = np.stack([dataset[i]["actions"][0] for i in range(len(dataset))])
    expected = normalize(actions, dataset.statistics["action"], "bounds")
    np.testing.assert_array_equal(np.concatenate(shown), expected)


def test_the_newest_version_is_the_largest_number(tmp_path):
    for version in ("9.0.0", "10.0.0", "1.2.0"):
        (tmp_path / "mine" / version).mkdir(parents=True)
        (tmp_path / "mine" / version / "features.json").touch()
    assert tfrecord.find_dataset(tmp_path, "mine").name == "10.0.0"


def test_functions_of_a_config_file_go_to_workers(tmp_path, llama):
    from toy import world as toy

    write_rlds(tmp_path, dict(train=toy.demonstrations(toy.TRAIN, 3)), name="mine")
    (tmp_path / "c.py").write_text(
        "from formats import oxe\ndef turned(t):\n    return {**t, 'action': 1 - t['action']}\n"
        "row = oxe.Dataset(primary='image', state=(), standardize=turned)\n"
    )
    row = runpy.run_path(str(tmp_path / "c.py"))["row"]
    parts = [(rlds.RLDS(tmp_path, "mine", row=row), 1.0)]
    assert len(stream(parts, llama, workers=2, steps=1)) == 2


def flip(path: Path, at: int):
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize(("damage", "frames"), [("flip", 192), ("cut", 192), ("length", 0)])
def test_broken_records(copy, damage, frames):
    root, file = copy
    if damage == "flip":
        flip(file, 5000)
        message = "record 0 at byte 0: wrong checksum"
    elif damage == "length":
        flip(file, 1)
        message = "record 0 at byte 0: its length"
    else:
        file.write_bytes(file.read_bytes()[:-1000])
        message = "record 24 at byte .*: cut off"
    with pytest.raises(ValueError, match=f"{file.name}: {message}"):
        rlds.RLDS(root, "bridge_orig")
    if frames:
        dataset = rlds.RLDS(root, "bridge_orig", skip_bad_records=True)
        assert len(dataset) == frames and len(dataset.meta["bad_records"]) == 1


def test_picture_that_changed_after_indexing(copy):
    root, file = copy
    dataset = rlds.RLDS(root, "bridge_orig")
    places = dataset.open()["frames"][0].tolist()
    stat = file.stat()
    flip(file, places[3] + 100)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(ValueError, match="primary image at byte .* has changed"):
        rlds.RLDS(root, "bridge_orig")[0]


@pytest.mark.parametrize(
    ("standardize", "message"),
    [
        (lambda t: {**t, "action": t["action"][:, :5]}, r"action has shape \(10, 5\), EEF_POS means \(T, 7\)"),
        (lambda t: {**t, "action": t["action"] * np.nan}, r"action \[0, 0\] \(step, dimension\) is not finite"),
        (lambda t: {**t, "action": t["action"][:0]}, "no step is left"),
        (lambda t: {**t, "observation": {}}, "no camera 'image_0' in the observation, which has"),
        (lambda t: t["nothing"], "nothing"),
    ],
)
def test_trajectories_that_do_not_fit(copy, standardize, message):
    root, file = copy
    row = oxe.Dataset(primary="image_0", standardize=standardize)
    with pytest.raises(ValueError, match=message) as error:
        rlds.RLDS(root, "bridge_orig", row=row)
    assert file.name in str(error.value) and "episode at byte" in str(error.value)


def test_pictures_that_will_not_decode(llama):
    samples = Samples([{"image": b"\xff\xd8 not really", "action": np.zeros(7), "instruction": "x"}])
    with pytest.raises(ValueError, match="mine: frame 0: a JPEG of 13 bytes"):
        Mixture([(samples, 1.0)], llama).sample(0, 0)


def test_names_that_do_not_exist(tmp_path):
    with pytest.raises(ValueError, match="bridge_orig"):
        open_mixture(tmp_path, "bridge_orgi")
    with pytest.raises(FileNotFoundError, match="no RLDS dataset is in it"):
        open_mixture(tmp_path, "bridge")
    with pytest.raises(ValueError, match="no 'wrist' camera; its row in oxe.py names primary, secondary"):
        open_mixture(shared("data"), "bridge", views=("wrist",))


# ----------------------------------------------------------------------------- what it needs


def test_no_tensorflow_after_a_batch():
    code = (
        "import sys, data, numpy as np\n"
        "from tokenizer import Tokenizer\n"
        f"parts = data.open_mixture({str(shared('data'))!r}, 'bridge')\n"
        f"mixture = data.Mixture(parts, Tokenizer({str(shared('data/llama2-tokenizer'))!r}))\n"
        "batch = next(iter(data.make_loader(mixture, data.Positions(2, 2))))\n"
        "print(batch['images'].shape[0], [m for m in ('tensorflow', 'transformers') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "2 []", run.stderr


def test_one_read_per_frame(bridge, monkeypatch):
    """A frame costs the bytes of its picture and its words, not those of its episode."""
    read = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda f, n, at: read.append(n) or pread(f, n, at))
    picture = bridge[100]["pictures"][0]
    assert sum(read) < len(picture) + 200
    assert np.array_equal(resize_lanczos3(decode(picture), 224).shape, (224, 224, 3))
