"""Many processes, sharded from the start; saving beside training; compiled blocks."""

import shutil
import subprocess
import sys
import threading

import pytest
import sharded_start
import torch
import torch.distributed.checkpoint as dcp
from common import ROOT
from test_train import config, finished, losses, run, train_here  # noqa: F401 (config is a fixture)
from torch.distributed.checkpoint import state_dict_saver

from resume import Saver, complete_checkpoints, load_checkpoint
from tokenizer import make_standin


def test_sharded_start_is_the_plain_one(folders, tmp_path):
    """1, 2, 3 and 4 processes start every recipe bit for bit alike, and each continues what the one before saved."""
    tokenizer = tmp_path / "tokenizer.model"
    make_standin(tokenizer)
    base = str(folders["tiny-openvla"])
    sharded_start.main(base, str(tokenizer), "none", str(tmp_path / "1"))
    for processes in (2, 3, 4):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        runs = [str(tmp_path / str(processes - 1)), str(tmp_path / str(processes))]
        command = [*launch, str(ROOT / "tests" / "sharded_start.py"), base, str(tokenizer), *runs]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    sharded_start.main(base, str(tokenizer), str(tmp_path / "4"), str(tmp_path / "again"))


# ----------------------------------------------------------------------------- saving beside training

ABOUT = {"config": {}, "statistics": {}}


@pytest.fixture
def model_and_optimizer():
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture
def slow_disk(monkeypatch):
    """An event: until it is set, nothing is written."""
    may_write = threading.Event()
    save = state_dict_saver.save
    monkeypatch.setattr(state_dict_saver, "save", lambda *a, **k: may_write.wait(30) and save(*a, **k))
    yield may_write
    may_write.set()


def test_what_is_saved_is_the_state_of_its_step(tmp_path, model_and_optimizer, slow_disk):
    model, optimizer = model_and_optimizer
    with Saver(tmp_path, keep=2) as saver:
        saver.save(1, model, optimizer, ABOUT)
        weight = model.weight.detach().clone()
        moment = optimizer.state[model.weight]["exp_avg"].clone()

        # Training goes on while the disk is slow.
        model(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        assert not complete_checkpoints(tmp_path), "what is not written must not count"
        saver.check()  # nothing is wrong
        slow_disk.set()
    assert not torch.equal(model.weight, weight)
    assert load_checkpoint(tmp_path / "checkpoints" / "step-000001", model, optimizer) == 1
    assert torch.equal(model.weight, weight)
    assert torch.equal(optimizer.state[model.weight]["exp_avg"], moment)


def test_one_at_a_time_and_the_oldest_go(tmp_path, model_and_optimizer):
    with Saver(tmp_path, keep=2) as saver:
        for step in (8, 9, 10, 11):
            saver.save(step, *model_and_optimizer, ABOUT)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-000010", "step-000011"]
    assert not list((tmp_path / "checkpoints").glob(".step-*"))


def test_a_checkpoint_is_whole_also_if_training_fails(tmp_path, model_and_optimizer, slow_disk):
    with pytest.raises(ZeroDivisionError), Saver(tmp_path, keep=2) as saver:
        saver.save(1, *model_and_optimizer, ABOUT)
        slow_disk.set()
        raise ZeroDivisionError
    assert len(complete_checkpoints(tmp_path)) == 1


def test_a_failed_save_is_said_at_the_next_step(tmp_path, model_and_optimizer, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state_dict_saver, "save", full)
    saver = Saver(tmp_path, keep=2)
    saver.save(1, *model_and_optimizer, ABOUT)
    while not saver.published.done():
        pass
    with pytest.raises(OSError, match="the disk is full.*continues from the checkpoint before"):
        saver.check()
    assert not complete_checkpoints(tmp_path)
    saver.wait()  # it is said once


def test_older_checkpoints_load(tmp_path, model_and_optimizer):
    """They were written by dcp.save, while training stood still."""
    model, optimizer = model_and_optimizer
    with Saver(tmp_path, keep=1) as saver:
        saver.save(1, model, optimizer, ABOUT)
    new = tmp_path / "checkpoints" / "step-000001"
    old = tmp_path / "checkpoints" / "step-000002"
    weights, moments = sharded_start.state_of(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=old)
    shutil.copy(new / "train.json", old)
    before = model.weight.detach().clone()
    torch.nn.init.zeros_(model.weight)
    load_checkpoint(old, model, optimizer)
    assert torch.equal(model.weight, before)


# ----------------------------------------------------------------------------- compiled blocks


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler: apt-get install g++")
def test_compiled_blocks_are_the_plain_ones(config, tmp_path):  # noqa: F811
    """Also with recomputation, and with blocks that are sharded."""
    options = ("--max_steps", "3", "--log_every", "1")
    train_here(config("plain", *options))
    train_here(config("compiled", *options, "--compile", "True"))
    finished(run(config("sharded", *options, "--compile", "True", "--micro_batch_size", "2"), processes=2))
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    assert losses(tmp_path / "sharded") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
