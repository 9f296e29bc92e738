"""The log of a run that is stopped and resumed, in W&B and TensorBoard (stand-ins for both)."""

import sys
import types

import pytest

from metrics import Log


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for wandb, which notes what init is called with."""
    module = types.ModuleType("wandb")
    module.calls = []
    module.init = lambda **options: module.calls.append(options)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_a_resumed_run_is_the_same_run_in_wandb(wandb, tmp_path):
    for step in (0, 5, 0):
        Log(tmp_path, 10, step, {"lr": 1}, wandb="vla")
    first, resumed, anew = wandb.calls
    assert first["id"] == resumed["id"] != anew["id"]
    assert {call["resume"] for call in wandb.calls} == {"allow"}
    assert first["project"] == "vla" and first["config"] == {"lr": 1}


def test_wandb_without_a_login(wandb, tmp_path):
    class UsageError(Exception):
        pass

    def init(**options):
        raise UsageError("No API key configured.")

    wandb.init = init
    with pytest.raises(ValueError, match="--wandb vla: No API key configured.; run `wandb login`"):
        Log(tmp_path, 10, 0, {}, wandb="vla")
    assert not (tmp_path / "wandb.txt").exists()


def test_steps_do_not_overlap_in_tensorboard(monkeypatch, tmp_path):
    calls = []
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = lambda folder, purge_step: calls.append((folder, purge_step))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    for step in (0, 5):
        Log(tmp_path, 10, step, {}, tensorboard=True)
    assert calls == [(str(tmp_path), 1), (str(tmp_path), 6)]


@pytest.mark.parametrize(
    "line", ["[]", "[" * 100_000, "{", '{"loss": 1.0}', '{"step": 1, "loss": "1"}', '{"step": null}']
)
def test_a_line_that_is_none_is_named(line, tmp_path):
    """Otherwise it would be found when the curves are drawn, after hours of training."""
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "loss": 2.0}}\n{line}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 2: "):
        Log(tmp_path, 10, 5, {})
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"st')  # cut off by a kill
    Log(tmp_path, 10, 5, {})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.0}\n'
