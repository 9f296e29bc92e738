"""The WidowX evaluation against a robot that is not there: protocol, outcomes, errors, resuming."""

import json
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from common import with_tokenizer

from policy import load_policy, predict_action
from robots import widowx


class Robot:
    """The client of bridge_data_robot, as far as it is used; everything that it is told is in `calls`."""

    calls: list = []
    silent = broken = False
    status = 1  # that all calls answer: success

    def __init__(self, host, port):
        self.calls.append(("connect", host, port))

    def init(self, settings):
        self.calls.append(("init", settings))
        return 1

    def reset(self):
        self.calls.append(("reset",))
        return 1

    def move(self, pose, duration, blocking):
        self.calls.append(("move", np.array(pose), blocking))
        return 1

    def step_action(self, action, blocking):
        if Robot.broken:
            raise RuntimeError("the arm hangs")
        self.calls.append(("step", np.array(action), blocking))
        return Robot.status

    def get_observation(self):
        if Robot.silent:
            return None
        picture = np.full((480, 640, 3), len(self.calls) % 256, np.uint8)
        return dict(full_image=picture, image=np.zeros(3 * 256 * 256), state=np.arange(7.0))


@pytest.fixture
def folder(folders, tmp_path):
    return with_tokenizer(shutil.copytree(folders["tiny-openvla"], tmp_path / "m"))


@pytest.fixture
def evaluate(folder, tmp_path, monkeypatch):
    """evaluate(answers, ...) -> the rows; answers: what the person types."""
    service = types.ModuleType("widowx_envs.widowx_env_service")
    service.WidowXClient, service.WidowXConfigs = Robot, types.SimpleNamespace(DefaultEnvParams={"move_duration": 0.2})
    monkeypatch.setitem(sys.modules, "widowx_envs", types.ModuleType("widowx_envs"))
    monkeypatch.setitem(sys.modules, "widowx_envs.widowx_env_service", service)
    monkeypatch.setattr(Robot, "calls", [])
    monkeypatch.setattr(Robot, "silent", False)
    monkeypatch.setattr(Robot, "broken", False)
    monkeypatch.setattr(Robot, "status", 1)

    def run(answers: list[str], **options):
        left = iter(answers)
        monkeypatch.setattr("builtins.input", lambda question: next(left))
        options = dict(episodes=2, max_steps=3, frequency=1000.0, dtype="float32") | options
        widowx.main(widowx.Config(checkpoint=str(folder), out=str(tmp_path / "out"), **options))
        assert next(left, None) is None, "more was to be typed"
        return [json.loads(line) for line in (tmp_path / "out" / "episodes.jsonl").read_text().splitlines()]

    return run


pytestmark = pytest.mark.filterwarnings("ignore:not an action")


def test_protocol(evaluate, folder, tmp_path, capsys):
    rows = evaluate(["lift the pot", "", "y", "", "", "n"])
    assert [(r["instruction"], r["success"], r["steps"], r["error"]) for r in rows] == [
        ("lift the pot", True, 3, ""),
        ("lift the pot", False, 3, ""),
    ]
    kinds = [call[0] for call in Robot.calls]
    assert kinds == ["connect", "init", *["reset", "move", "step", "step", "step"] * 2]
    settings, move = Robot.calls[1][1], Robot.calls[3]
    assert settings["return_full_image"] and settings["move_duration"] == 0.2 and len(settings["start_state"]) == 7
    assert move[2] is True and np.allclose(move[1][:3, 3], [0.3, -0.09, 0.26])
    assert "1 of 2" in capsys.readouterr().out

    policy = load_policy(folder, torch.float32)  # the same picture, by the same steps
    policy.processor.trained_on = ("lanczos3",)
    steps = [json.loads(line) for line in (tmp_path / "out" / "episode-001.jsonl").read_text().splitlines()]
    picture = np.full((480, 640, 3), 4, np.uint8)
    want = predict_action(policy, [picture], ["lift the pot"], "bridge_orig")[0]
    np.testing.assert_allclose(steps[0]["action"], want, atol=1e-9)
    np.testing.assert_array_equal(steps[0]["action"], Robot.calls[4][1])
    assert (tmp_path / "out" / "episode-001.gif").is_file() and steps[0]["state"] == list(range(7))


def test_again_and_resume(evaluate):
    """r does an episode again; a later call goes on where the last one ended."""
    assert len(evaluate(["a", "", "r", "", "", "y"], episodes=1)) == 1
    rows = evaluate(["", "", "n", "b", "", "y"], episodes=3)
    assert [(r["episode"], r["instruction"], r["success"]) for r in rows] == [
        (1, "a", True),
        (2, "a", False),
        (3, "b", True),
    ]


def test_errors_are_no_outcome(evaluate, capsys):
    Robot.broken = True
    rows = evaluate(["go", "", "n"], episodes=1)
    assert rows[0]["error"] == "RuntimeError: the arm hangs" and rows[0]["steps"] == 1
    assert "0 of 0" in capsys.readouterr().out


@pytest.mark.parametrize("status, reason", [(0, "no connection"), (2, "could not be carried out")])
def test_a_robot_that_does_not_obey(evaluate, status, reason):
    """Its answers are numbers; anything but success is an error of the robot, not a failure of the policy."""
    Robot.status = status
    (row,) = evaluate(["go", "", "n"], episodes=1)
    assert reason in row["error"] and row["steps"] == 1


def test_stopped_by_hand(evaluate, monkeypatch):
    def stop(self, action, blocking):
        raise KeyboardInterrupt

    monkeypatch.setattr(Robot, "step_action", stop)
    (row,) = evaluate(["go", "", "y"], episodes=1)
    assert row["success"] and row["steps"] == 1 and row["error"] == ""


def test_another_protocol(evaluate, capsys):
    evaluate(["go", "", "y"], episodes=1)
    with pytest.raises(SystemExit):
        evaluate([], episodes=2, max_steps=4)
    assert "another protocol" in capsys.readouterr().err


def test_refusals(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "widowx_envs", None)
    wrong = ((dict(checkpoint=""), "--checkpoint"), (dict(checkpoint=str(folder)), "bridge_data_robot"))
    wrong += (
        (dict(checkpoint=str(folder), dtype="fp16"), "float16"),
        (dict(checkpoint=str(folder), unnorm_key="x"), "x"),
    )
    for options, reason in wrong:
        with pytest.raises(SystemExit):
            widowx.main(widowx.Config(out=str(tmp_path / "out"), **options))
        assert reason in capsys.readouterr().err


def test_silent_robot(monkeypatch):
    monkeypatch.setattr(Robot, "silent", True)
    with pytest.raises(ConnectionError, match="no observation"):
        widowx.observe(Robot("h", 1), patience=0.0)
