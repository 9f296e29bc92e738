"""Your own frames and episodes as a dataset, and all that data_mix may be."""

import json
import subprocess
import sys

import numpy as np
import pytest
from common import ROOT

from data import Samples, name_of_mixture, open_mixture, parse_mixture
from formats import oxe
from formats.dataset import END_EFFECTOR
from formats.faults import find_faults, read_numbers
from normalize import warn_gripper


def frame(rng, A=7, **more):
    action = rng.normal(size=A).astype(np.float32)
    action[-1] = rng.integers(2)
    return {"image": rng.integers(0, 255, (28, 28, 3), dtype=np.uint8), "action": action, "instruction": "go", **more}


def episodes(lengths=(5, 7, 4), A=7, **more):
    rng = np.random.default_rng(0)
    return [[frame(rng, A, **more) for _ in range(T)] for T in lengths]


def test_episodes_become_chunks_that_end_with_them():
    given = episodes()
    dataset = Samples(given).select("train", 3, 0.0)
    assert len(dataset) == 3 + 5 + 2
    starts = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (1, 3), (1, 4), (2, 0), (2, 1)]
    for i, (episode, step) in enumerate(starts):
        actions = np.stack([frame["action"] for frame in given[episode][step : step + 3]])
        np.testing.assert_array_equal(dataset[i]["actions"], actions)
        np.testing.assert_array_equal(dataset[i]["pictures"][0], given[episode][step]["image"])
    actions, numbers = dataset.all_actions()
    assert numbers.tolist() == [episode for episode, _ in starts]
    np.testing.assert_array_equal(actions, [given[episode][step]["action"] for episode, step in starts])


def test_frames_are_episodes_of_unknown_order():
    frames = [frame for episode in episodes() for frame in episode]
    dataset = Samples(frames)
    assert len(dataset) == 16 and dataset.all_actions()[1] is None
    assert dataset.statistics == {**Samples(episodes()).statistics, "num_trajectories": 0}
    with pytest.raises(ValueError, match="give Samples a list of episodes"):
        dataset.select("train", 4, 0.0)
    with pytest.raises(ValueError, match="no frame to train on: 3 episodes of up to 7 frames"):
        Samples(episodes()).select("train", 9, 0.0)


def test_splits_are_whole_episodes_without_overlap():
    dataset = Samples(episodes((5,) * 20))
    train = dataset.select("train", 1, 0.1)
    val = dataset.select("val", 1, 0.1)
    assert (len(train), len(val)) == (90, 10)
    assert train.statistics == val.statistics == dataset.statistics
    assert not set(train.frames) & set(val.frames)
    assert len(Samples(episodes((5,) * 20), episodes=range(4))) == 20


def test_cameras_states_and_actions_by_name():
    given = episodes(front=np.zeros((8, 8, 3), np.uint8), joints=np.arange(3.0), hand=np.array(0.5))
    dataset = Samples(given, cameras=("front", "image"), state=("joints", "hand"), action=("joints", "action"))
    first = dataset[0]
    np.testing.assert_array_equal(first["proprio"], [0, 1, 2, 0.5])
    np.testing.assert_array_equal(first["actions"][0], [0, 1, 2, *given[0][0]["action"]])
    assert [image.shape for image in first["pictures"]] == [(8, 8, 3), (28, 28, 3)]
    assert dataset.action_names[-1] == "gripper" and len(dataset.statistics["proprio"]["q01"]) == 4
    assert len(Samples(episodes(state=np.ones(2)))[0]["proprio"]) == 2  # found by itself
    assert len(Samples(episodes(state=np.ones(2)), state=())[0]["proprio"]) == 0


@pytest.mark.parametrize(
    "options, absolute, normalised, names",
    [
        ({}, [False] * 6 + [True], [True] * 6 + [False], END_EFFECTOR),
        ({"gripper": False}, [False] * 7, [True] * 7, tuple("0123456")),
        ({"absolute": True}, [True] * 7, [True] * 6 + [False], (*"012345", "gripper")),
    ],
)
def test_what_the_robot_is_like(options, absolute, normalised, names):
    """The same words, and the same meaning, for frames and for a row of RLDS."""
    dataset = Samples(episodes(), **options)
    row = oxe.Dataset(name="mine", **options)
    assert list(dataset.absolute_mask) == list(row.action_masks(7)[0]) == absolute
    assert dataset.statistics["action"]["mask"] == list(row.action_masks(7)[1]) == normalised
    assert dataset.action_names == row.action_names(7) == names


def test_standardize_sees_an_episode():
    def changes(actions):
        return np.diff(actions, axis=0, append=actions[-1:])

    dataset = Samples(episodes(), standardize=changes)
    np.testing.assert_array_equal(dataset[4]["actions"], np.zeros((1, 7)))  # the last step of the first episode
    with pytest.raises(ValueError, match=r"episode 0.*\(5, A\)"):
        Samples(episodes(), standardize=lambda actions: actions[1:])


def without(key):
    given = episodes()
    del given[1][2][key]
    return given


def with_wrong(key, value):
    given = episodes(state=np.zeros(3))
    given[1][2][key] = value
    return given


@pytest.mark.parametrize(
    "given, options, message",
    [
        ([], {}, "no samples"),
        ([3, 4], {}, "sample 0 is 3; give dicts"),
        ([[]], {}, "give dicts"),
        ([*episodes(), []], {}, "episode 3 has no frames"),
        (without("image"), {}, r"episode 1, frame 2 has no \['image'\].*cameras="),
        (without("action"), {}, r"episode 1, frame 2 has no \['action'\]"),
        (with_wrong("instruction", 3), {}, "episode 1, frame 2 has instruction 3"),
        (with_wrong("action", np.zeros(6)), {}, r"episode 1, frame 2 has action .*\(7,\)"),
        (with_wrong("state", np.full(3, np.nan)), {}, "episode 1, frame 2 has state .*nan"),
        (episodes(), {"cameras": "front"}, r"no \['front'\]"),
        (episodes(), {"episodes": [0, 3]}, "name some of 0 to 2"),
        (episodes(), {"episodes": [0, 0]}, "each once"),
        (episodes()[0], {"episodes": [0]}, "needs episodes"),
    ],
)
def test_what_does_not_fit_is_named(given, options, message):
    with pytest.raises(ValueError, match=message):
        Samples(given, **options)


def test_data_mix_as_a_person_writes_it():
    mine = Samples(episodes(), name="mine")
    row = oxe.Dataset(name="rows")
    for data_mix in (mine, [mine], (mine, 1.0), [(mine, 1)], [[mine, 1.0]]):
        assert parse_mixture(data_mix) == [(mine, 1.0)]
    assert parse_mixture(["bridge_orig", (row, 2), mine]) == [("bridge_orig", 1.0), (row, 2.0), (mine, 1.0)]
    assert name_of_mixture("bridge") == "bridge" and name_of_mixture([mine, row]) == "mine+rows"


@pytest.mark.parametrize(
    "data_mix, message",
    [
        ([], "data_mix is empty"),
        ([3], "data_mix: 3 is no dataset, it lacks name"),
        ({"bridge": 1}, "is no dataset.*each alone or as"),
        (["bridge_oirg"], "nearest: bridge_orig"),
        ([oxe.Dataset()], "needs a name"),
        ([Samples(episodes()), Samples(episodes())], "2 datasets have the name 'mine'; set name="),
    ],
)
def test_data_mix_that_is_none(data_mix, message):
    with pytest.raises(ValueError, match=message):
        open_mixture("", data_mix)


def test_a_gripper_in_metres_is_told():
    given = episodes((30,))
    for i, sample in enumerate(given[0]):
        sample["action"][-1] = 0.08 * (i // 5 % 2)
    dataset = Samples(given)
    (line,) = warn_gripper(dataset.statistics["action"])
    assert "0 ... 0.08" in line and "standardize=" in line and "gripper=False" in line
    wrong = [finding.cause for finding in find_faults(read_numbers(dataset, 100)) if finding.is_wrong]
    assert wrong == ["gripper"]
    assert not warn_gripper(Samples(given, gripper=False).statistics["action"])


MINE = """
import numpy as np
from data import Samples

rng = np.random.default_rng(0)
def frame(t):
    return {"left": np.zeros((28, 28, 3), np.uint8), "action": rng.normal(size=14), "instruction": "" if t else "fold",
            "state": np.ones(2)}
data_mix = Samples([[frame(t) for t in range(9)] for _ in range(3)], name="arms", cameras="left", gripper=False,
                   absolute=True)
random_model = {}  # an option of train.py
"""


def test_look_shows_ones_own_data(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    command = [sys.executable, "-m", "diagnose.look", "--config", tmp_path / "mine.py", "--out", tmp_path / "look"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "arms, weight 1" in done.stdout and "gripper" not in done.stdout
    assert "state dimension 0 never changes" in done.stdout and "of the frames have no instruction" in done.stdout
    assert (tmp_path / "look" / "arms-frames.png").is_file()


def test_actions_of_other_robots_have_no_metres(tmp_path):
    from policy import action_dimensions

    stats = {"action": {"q01": [0.0] * 7}}
    assert action_dimensions(stats)[0] == ("dx", "m")
    names = list(Samples(episodes(), absolute=True).action_names)
    recorded = json.loads(json.dumps({**stats, "action_names": names}))
    assert action_dimensions(recorded) == [*((str(i), "") for i in range(6)), ("gripper", "")]
