"""The toy world: its expert, its scenes, the dataset and the tokenizer that it writes."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from common import ROOT

import quickstart
from formats import tfrecord
from tokenizer import BLANK, Tokenizer, make_standin
from toy import world as toy


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Folder of a small dataset, and the episodes that went into it."""
    splits = dict(train=list(toy.demonstrations(toy.TRAIN, 5)), val=list(toy.demonstrations(toy.VAL, 2)))
    return toy.write_rlds(tmp_path_factory.mktemp("data"), splits, shard=2), splits


@pytest.mark.parametrize("world", [toy.World(), toy.CHANGED])
def test_expert_reaches_the_goal(world):
    assert toy.rollout(None, toy.TEST, 50, world).success.mean() >= 0.98


def test_expert_follows_the_swapped_instruction():
    result = toy.rollout(None, toy.TEST, 50, swap=True)
    assert result.success.mean() <= 0.02 and result.other.mean() >= 0.98


def test_scenes_depend_on_seed_and_index_only():
    world = toy.World()
    pictures = [toy.draw(toy.make_scene(toy.TEST, i, world), world) for i in (3, 4, 3)]
    assert (pictures[0] == pictures[2]).all() and (pictures[0] != pictures[1]).any()
    both = [{toy.make_scene(s, i, world).objects.tobytes() for i in range(200)} for s in (toy.TRAIN, toy.TEST)]
    assert len(both[0] | both[1]) == 400


@pytest.mark.parametrize(
    "action", [[0] * 6 + [1.0], [0] * 6 + [0.0], [0, 0, -0.05, 0, 0, 0, 0.0], [1, 1, 1, 0, 0, 0, 1]]
)
def test_a_blind_policy_fails(action):
    result = toy.rollout(lambda images, texts: np.tile(np.array(action, float), (len(texts), 1)), toy.TEST, 20)
    assert result.success.mean() <= 0.05 and (result.steps[~result.success] == toy.MAX_STEPS).all()


def test_a_policy_gets_pictures_and_words():
    seen = []

    def act(images, texts):
        seen.append((images.shape, images.dtype, len(texts)))
        return np.zeros((len(texts), 7))

    result = toy.rollout(act, toy.TEST, 3, record=1)
    assert seen == [((3, toy.SIZE, toy.SIZE, 3), np.uint8, 3)] * toy.MAX_STEPS
    (episode,) = result.episodes
    assert episode["image"].shape == (toy.MAX_STEPS + 1, toy.SIZE, toy.SIZE, 3)
    assert episode["action"].shape == (toy.MAX_STEPS, 7)
    scene = toy.make_scene(toy.TEST, 0, toy.World())
    assert episode["instruction"] == scene.phrase.format(scene.names[scene.named])


def test_pictures_tell_what_matters():
    """Height, open or closed, the place of things and each thing's colour and shape change the picture."""
    world = toy.World()
    scene = toy.make_scene(toy.TEST, 0, world)
    before = toy.draw(scene, world).astype(int)
    scene.gripper[2] = 0.02
    low = toy.draw(scene, world).astype(int)
    scene.is_open = False
    closed = toy.draw(scene, world).astype(int)
    assert np.abs(before - low).sum() > 10_000 and np.abs(low - closed).sum() > 10_000
    assert (toy.draw(scene, toy.World(turns=1)) == np.rot90(toy.draw(scene, world))).all()


def test_demonstrations_are_good_and_the_same_each_time(dataset):
    again = list(toy.demonstrations(toy.TRAIN, 5))
    for a, b in zip(dataset[1]["train"], again, strict=True):
        assert (a["image"] == b["image"]).all() and (a["action"] == b["action"]).all()
    actions = np.concatenate([e["action"] for e in again])
    assert set(np.unique(actions[:, 6])) == {0.0, 1.0} and np.abs(actions[:, :3]).max() <= toy.STEP.max() + 1e-6
    assert not actions[:, 3:6].any()


def test_several_processes_make_the_same_demonstrations():
    one = list(toy.demonstrations(toy.TRAIN, 9))
    two = list(toy.demonstrations(toy.TRAIN, 9, processes=2))
    for a, b in zip(one, two, strict=True):
        assert a["instruction"] == b["instruction"]
        assert all(np.array_equal(a[key], b[key]) for key in ("image", "state", "action"))


def test_detours_are_recorded_as_the_expert_sees_them():
    """Whatever moves the hand at first, the record has what would have been right there; and all ends well."""
    straight = list(toy.demonstrations(toy.TRAIN, 30, toy.World(noise=0.0, detour=0.0)))
    astray = list(toy.demonstrations(toy.TRAIN, 30, toy.World(noise=0.0, detour=1.0)))
    lengths = [np.mean([len(episode["action"]) for episode in episodes]) for episodes in (straight, astray)]
    assert lengths[1] > lengths[0] + 2

    # An expert who holds nothing, or something else, opens the gripper before it goes on.
    def opens_again(episode):
        was_closed = episode["state"][:-1, 6] == 0
        opens = episode["action"][:-1, 6] == 1
        return bool((was_closed & opens).any())

    assert not any(opens_again(episode) for episode in straight)
    assert sum(opens_again(episode) for episode in astray) > 5


def test_tfds_opens_the_dataset(dataset):
    tfds = pytest.importorskip("tensorflow_datasets")
    folder, splits = dataset
    builder = tfds.builder_from_directory(str(folder))
    assert {k: v.num_examples for k, v in builder.info.splits.items()} == dict(train=5, val=2)
    for split, episodes in splits.items():
        files = sorted(folder.glob(f"toy-{split}.tfrecord-*"))
        assert [f.name for f in files] == sorted(builder.info.splits[split].filenames)
        records = [r for f in files for _, r in tfrecord.read_records(f)]
        for record, episode in zip(records, episodes, strict=True):
            steps = list(builder.info.features.deserialize_example_np(record)["steps"])
            T = len(episode["action"])
            for key, values in (("action", episode["action"]), ("reward", np.arange(T) == T - 1)):
                assert np.array_equal([s[key] for s in steps], values)
            assert np.array_equal([s["observation"]["state"] for s in steps], episode["state"])
            assert [s["is_first"] for s in steps] == [True] + [False] * (T - 1)
            assert [s["is_last"] for s in steps] == [s["is_terminal"] for s in steps] == [False] * (T - 1) + [True]
            assert {s["language_instruction"] for s in steps} == {episode["instruction"].encode()}
            error = np.stack([s["observation"]["image"] for s in steps]).astype(int) - episode["image"][:T]
            assert np.abs(error).mean() < 2  # JPEG


def test_a_flipped_byte_is_noticed(dataset, tmp_path):
    data = bytearray(sorted(dataset[0].glob("toy-train*"))[0].read_bytes())
    data[len(data) // 3] ^= 1
    (tmp_path / "broken").write_bytes(data)
    with pytest.raises(ValueError, match="wrong checksum"):
        list(tfrecord.read_records(tmp_path / "broken"))


def test_a_dataset_replaces_an_older_one_whole(tmp_path):
    def breaks():
        yield from toy.demonstrations(toy.VAL, 1)
        raise KeyboardInterrupt

    folder = toy.write_rlds(tmp_path, dict(train=toy.demonstrations(toy.VAL, 1)))
    before = {f.name: hashlib.md5(f.read_bytes()).hexdigest() for f in folder.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        toy.write_rlds(tmp_path, dict(train=breaks()))
    assert {f.name: hashlib.md5(f.read_bytes()).hexdigest() for f in folder.iterdir()} == before
    toy.write_rlds(tmp_path, dict(train=toy.demonstrations(toy.VAL, 2)))
    assert b'"2"' in (folder / "dataset_info.json").read_bytes()


def test_each_word_is_a_token(tmp_path):
    make_standin(tmp_path / "tokenizer.model", toy.WORDS)
    tokenizer = Tokenizer(tmp_path)
    sp = tokenizer.sp
    assert [sp.id_to_piece(i) for i in (0, 1, 2, 3, 258)] == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    text = "In: What action should the robot take to pick up the red cube?\nOut:"
    ids = tokenizer.encode(text)
    assert ids[0] == 1 and 13 in ids and len(ids) == 1 + len(text.split()) + 2  # "?" and the line end
    for world in (toy.World(), toy.CHANGED):
        scene = toy.make_scene(0, 0, world)
        assert len(tokenizer.encode(scene.phrase.format(scene.names[0]))) <= 6
    for words in (text, "Ünïcödé, 中文 and a blank  \t", "grab the pink star"):
        assert tokenizer.decode(tokenizer.encode(words)) == words
    assert max(max(tokenizer.encode(chr(c))) for c in range(1, 0x2FFF)) < 31744  # action ids never come from text
    assert tokenizer.encode_prompt("lift the red ball")[-1] == BLANK == sp.piece_to_id("▁")


def test_quickstart_stops_at_a_command_that_fails(capfd):
    with pytest.raises(SystemExit) as end:
        quickstart.run("python -c 'raise SystemExit(3)'")
    assert end.value.code == 3 and "$ python -c" in capfd.readouterr().out


MAKE_DATA = "python -m toy.world --folder {data_root_dir} --episodes 6 --validation 0"


def test_two_processes_in_an_empty_folder(tmp_path):
    """The first process makes the demonstrations and the tokenizer, the other one waits for them."""
    options = "--config toy.py --max_steps 2 --batch_size 4 --micro_batch_size 2 --num_workers 0".split()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(ROOT / "train.py"), *options, "--make_data", MAKE_DATA]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("6 demonstrations in") == 1
    assert (tmp_path / "runs/toy/checkpoint/config.json").is_file()


def test_data_that_cannot_be_made(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "--config", "toy.py", "--make_data", "python -c 'exit(3)'"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "exit code 3" in done.stderr and "Traceback" not in done.stderr
