"""What a stopped run leaves: nothing of it runs code, nothing is lost, nothing is mixed."""

import dataclasses
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from common import ROOT, free_port
from safetensors.torch import load_file, save_file
from test_train import config, losses, run, same_weights, train_here  # noqa: F401
from torch.distributed.checkpoint import state_dict_saver

import checkpoint
import finetune_oft
import resume
import train
from configurator import configure
from distributed import start_processes
from files import atomic_write
from policy import load_policy


class Runs:
    """A pickle of it touches a file when it is read."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


class TwoFaced(Runs):
    """The same, and gives the real metadata afterwards."""

    def __init__(self, mark, real):
        self.mark = mark
        self.real = real

    def __reduce__(self):
        code = "(__import__('os').system('touch ' + mark), real)[1]"
        return eval, (code, {"mark": str(self.mark), "real": self.real})


@pytest.fixture
def step_folder(config, tmp_path):  # noqa: F811
    train_here(config("run", "--max_steps", "2"))
    return tmp_path / "run" / "checkpoints" / "step-000002"


def entry_that_runs(folder, mark):
    """Point the entry of an option of the optimizer at bytes that run code."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    key = next(key for key in metadata.storage_data if "param_groups" in key.fqn)
    content = io.BytesIO()
    torch.save(Runs(mark), content)
    info = metadata.storage_data[key]
    file = folder / info.relative_path
    size = file.stat().st_size
    with open(file, "ab") as stream:
        stream.write(content.getvalue())
    metadata.storage_data[key] = dataclasses.replace(info, offset=size, length=len(content.getvalue()))
    return pickle.dumps(metadata)


def outside_the_folder(folder, mark):
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for key, info in metadata.storage_data.items():
        metadata.storage_data[key] = dataclasses.replace(info, relative_path=f"../{info.relative_path}")
    return pickle.dumps(metadata)


@pytest.mark.parametrize(
    "attack",
    [
        lambda folder, mark: pickle.dumps(Runs(mark)),
        lambda folder, mark: pickle.dumps(TwoFaced(mark, pickle.loads((folder / ".metadata").read_bytes()))),
        lambda folder, mark: b"",
        lambda folder, mark: (folder / ".metadata").read_bytes()[:500],
        lambda folder, mark: pickle.dumps({"not": "metadata"}),
        entry_that_runs,
        outside_the_folder,
    ],
    ids=["runs", "two faces", "empty", "cut", "something else", "an entry runs", "outside"],
)
def test_a_resumed_folder_runs_no_code(step_folder, config, tmp_path, attack, capsys):  # noqa: F811
    mark = tmp_path / "mark"
    (step_folder / ".metadata").write_bytes(attack(step_folder, mark))
    with pytest.raises(SystemExit) as end:
        train.main(configure(train.Config, config("run", "--max_steps", "3")))
    error = capsys.readouterr().err
    assert end.value.code == 2 and str(step_folder) in error and error.startswith("error: ")
    assert not mark.exists()


def test_nobody_waits_for_a_pipe(step_folder):
    """In place of a file that is read, or of the lock."""
    file = step_folder / "__0_0.distcp"
    lock = step_folder.parents[1] / ".lock"
    for path in (file, lock):
        path.unlink()
        os.mkfifo(path)
    with pytest.raises(ValueError, match=f"{file}: expected a file, found a device or a pipe"):
        resume.DataOnlyReader(step_folder).read_metadata()
    with pytest.raises(ValueError, match=f"{lock}: expected a file, found a device or a pipe"):
        resume.lock_run(lock.parent)


def test_a_lock_that_is_a_link_changes_nothing(tmp_path):
    (tmp_path / "notes").write_text("mine")
    (tmp_path / ".lock").symlink_to("notes")
    resume.unlock_run(resume.lock_run(tmp_path))
    assert (tmp_path / "notes").read_text() == "mine"


def test_steps_are_sorted_by_number(tmp_path):
    for step in (999_998, 1_000_000, 999_999, 1_000_001):
        folder = tmp_path / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        (folder / "train.json").write_text("{}")
    steps = [resume.step_of(folder) for folder in resume.complete_checkpoints(tmp_path)]
    assert steps == [999_998, 999_999, 1_000_000, 1_000_001]


def test_a_second_run_in_the_folder_is_refused(config, tmp_path, capsys):  # noqa: F811
    (tmp_path / "run").mkdir()
    code = (
        "import pathlib, resume, sys; lock = resume.lock_run(pathlib.Path(sys.argv[1])); print(1, flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    other = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(SystemExit) as end:
        train.main(configure(train.Config, config("run")))
    assert end.value.code == 2 and "another run is writing into this folder" in capsys.readouterr().err
    other.kill()
    other.wait()
    train_here(config("run", "--max_steps", "1"))  # a kill leaves no lock
    train_here(config("run", "--max_steps", "2"))  # nor does a run that has ended


def test_a_stop_changes_no_later_line_of_the_log(config, tmp_path):  # noqa: F811
    """Stopped between two lines: the sums since the last one are kept."""
    options = ("--log_every", "4", "--max_steps", "8")
    train_here(config("whole", *options))
    calls = []

    def build(cfg, datasets):
        trainee = train.build(cfg, datasets)
        real = trainee.model.loss

        def loss(batch):
            calls.append(1)
            if len(calls) == 6:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(batch)

        trainee.model.loss = loss
        return trainee

    with pytest.raises(SystemExit) as end:
        train_here(config("cut", *options), build=build)
    assert end.value.code == 143
    train_here(config("cut", *options))
    wanted = ("step", "loss", "action_accuracy", "l1_loss")
    lines = {}
    for name in ("whole", "cut"):
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        lines[name] = [[row[key] for key in wanted] for row in rows]
    assert lines["whole"] == lines["cut"] and len(lines["cut"]) == 2
    assert same_weights(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_the_whole_job_saves(config, tmp_path, number):  # noqa: F811
    """As a terminal, systemd or Slurm sends it: to the workers and their server, too. No process is left."""
    options = ("--num_workers", "2", "--max_steps", "100000", "--save_every", "100000")
    command = [sys.executable, str(ROOT / "train.py"), *config("run", *options)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and not losses_so_far(tmp_path / "run"):
        time.sleep(0.05)
    os.killpg(process.pid, number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "resume with: python" in out
    assert len(resume.complete_checkpoints(tmp_path / "run")) == 1
    assert gone(process.pid)


def test_nothing_lives_on_after_a_kill(config, tmp_path):  # noqa: F811
    command = [sys.executable, str(ROOT / "train.py"), *config("run", "--num_workers", "2", "--max_steps", "100000")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and not losses_so_far(tmp_path / "run"):
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert gone(process.pid)


def test_the_ranks_end_with_their_launcher(config, tmp_path):  # noqa: F811
    """torchrun starts each in a session of its own. Without it they save, and end."""
    process = run(config("run", "--micro_batch_size", "2", "--max_steps", "100000", "--save_every", "100000"), 2)
    while process.poll() is None and not losses_so_far(tmp_path / "run"):
        time.sleep(0.05)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    assert len(ranks) == 2 and all(gone(int(rank)) for rank in ranks)
    assert len(resume.complete_checkpoints(tmp_path / "run")) == 1


def test_torchrun_that_has_ended_is_said(monkeypatch):
    values = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    values |= {"TORCHELASTIC_RUN_ID": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="torchrun does not answer at 127.0.0.1"):
        start_processes()


def losses_so_far(folder) -> list:
    return losses(folder) if (folder / "metrics.jsonl").is_file() else []


def gone(session: int, seconds: float = 30) -> bool:
    """True once no process of a session lives any more."""
    if not Path("/proc/self/stat").is_file():
        pytest.skip("looks at /proc")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        alive = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, sid = path.read_text().rpartition(")")[2].split()[:4]
            except OSError:
                continue
            if int(sid) == session and state != "Z":
                alive.append(path)
        if not alive:
            return True
        time.sleep(0.2)
    return False


def test_the_resume_command_can_be_pasted(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--run_dir", "runs/my run"])
    assert train.resume_command().endswith("train.py --run_dir 'runs/my run'")
    for name, value in {"RANK": "0", "LOCAL_WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    assert train.resume_command() == "torchrun --nproc-per-node 4 --standalone train.py --run_dir 'runs/my run'"


def test_a_full_disk_keeps_the_checkpoint_before(config, tmp_path, monkeypatch, capsys):  # noqa: F811
    train_here(config("whole"))
    real, calls = state_dict_saver.save, []

    def save(state, checkpoint_id, **options):
        calls.append(1)
        real(state, checkpoint_id=checkpoint_id, **options)
        if len(calls) == 3:
            raise RuntimeError("unexpected pos 704 vs 598") from OSError(28, "No space left on device")

    monkeypatch.setattr(state_dict_saver, "save", save)
    with pytest.raises(SystemExit) as end:
        train.main(configure(train.Config, config("full", "--save_every", "1")))
    assert end.value.code == 2 and "the disk is full" in capsys.readouterr().err
    names = sorted(path.name for path in (tmp_path / "full" / "checkpoints").iterdir())
    assert names == ["step-000001", "step-000002"]  # and no leftover
    train_here(config("full", "--save_every", "1"))
    assert same_weights(tmp_path / "whole", tmp_path / "full")


def test_leftovers_of_a_kill_are_swept(config, tmp_path):  # noqa: F811
    train_here(config("run", "--max_steps", "1"))
    half = tmp_path / "run" / "checkpoints" / ".step-000002"
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"half of a fi")
    (tmp_path / "run" / "checkpoint" / ".model.safetensors.99.tmp").write_bytes(b"half of a fi")
    train_here(config("run", "--max_steps", "2"))
    assert not [path for path in (tmp_path / "run").rglob(".*") if path.name != ".lock" and path.name != ".metadata"]


def test_files_have_the_mode_that_the_umask_gives(tmp_path):
    before = os.umask(0o022)
    try:
        with atomic_write(tmp_path / "a") as temporary:
            temporary.touch(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_an_oft_export_is_whole_or_refused(config, tmp_path, monkeypatch):  # noqa: F811
    """Killed between adapter and head: the mixture is not loaded, and the same command makes the folder whole."""
    train_here(config("base", "--max_steps", "1"))
    options = ["--random_model", "{}", "--base_checkpoint", str(tmp_path / "base" / "checkpoint"), "--lora_rank", "4"]
    options += ["--views", "primary", "--action_chunk", "1", "--use_proprio", "False", "--save_every", "1"]
    argv = config("oft", *options, "--max_steps", "2")
    train.train(configure(finetune_oft.Config, argv), finetune_oft.build)
    want = load_file(tmp_path / "oft" / "adapter_model.safetensors")
    load_policy(tmp_path / "oft")

    # The adapter of another step beside this head, as a kill would leave it.
    shutil.copytree(tmp_path / "oft", tmp_path / "cut")
    changed = {name: tensor + 1 for name, tensor in want.items()}
    metadata = {"format": "pt", "record": checkpoint.EXPORT_RECORD}
    save_file(changed, tmp_path / "cut" / "adapter_model.safetensors", metadata)
    with pytest.raises(ValueError, match="its export is not complete, or is being written"):
        load_policy(tmp_path / "cut")

    # Killed inside the last export.
    (tmp_path / "oft" / checkpoint.EXPORT_RECORD).unlink()
    with pytest.raises(ValueError, match="its export is not complete"):
        load_policy(tmp_path / "oft")
    train.train(configure(finetune_oft.Config, argv), finetune_oft.build)
    load_policy(tmp_path / "oft")
    again = load_file(tmp_path / "oft" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], want[name]) for name in want)


@pytest.mark.parametrize("ending", ["raise SystemExit(3)", "raise KeyError('an error of our own')", ""])
@pytest.mark.parametrize("own_class", [False, True], ids=["forkserver", "fork"])
def test_no_end_of_python_waits_for_workers(ending, own_class, tmp_path):
    """They ignore SIGTERM, with which multiprocessing ends what is left, and the loader may still live then."""
    samples = "Own()" if own_class else "[frame] * 8"
    (tmp_path / "code.py").write_text(f"""
import numpy as np
from data import Mixture, Positions, Samples, make_loader
import sys
from tokenizer import PROMPT, Tokenizer, make_standin

frame = {{"image": np.zeros((8, 8, 3), np.uint8), "action": np.ones(7), "instruction": "go"}}

class Own(list):
    def __len__(self):
        return 8
    def __getitem__(self, i):
        return frame

Own.__module__ = "of a config file"
if __name__ == "__main__":  # the server of the workers reads this file, too
    make_standin("tokenizer.model")
    mixture = Mixture([(Samples({samples}), 1.0)], Tokenizer("tokenizer.model", PROMPT), image_size=28)
    batches = iter(make_loader(mixture, Positions(4, 4), num_workers=2))
    next(batches)
    sys.modules["keeps"] = batches  # until the very end
    {ending}
""")
    command = [sys.executable, "code.py"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == (3 if "3" in ending else 1 if ending else 0), done.stderr
    assert done.stderr.count("Traceback") == ("KeyError" in ending)
