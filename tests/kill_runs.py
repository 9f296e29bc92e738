"""
Kill training runs at random moments until each has ended by itself, and compare what they leave with runs that nobody
touched. Tiny models and data, on Linux: a quarter of an hour on two free cores.

    python tests/kill_runs.py --kills 40
    python tests/kill_runs.py --kills 1 --kinds train --signals 0
    python tests/kill_runs.py --kills 20 --kinds train torchrun --signals 0 --during save

Every file of the two run folders has to be the same: weights, optimizer, export, losses. Ten seconds after a signal no
process of the run may live. A run under torchrun loses its launcher or one of its ranks. SIGTERM, SIGINT and SIGUSR1 go
to the process group, as from a terminal; under torchrun also to every process, as from Slurm. Exit code 1 if anything
is wrong.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
MARK = "KILL_RUNS_FOLDER"  # environment variable of all processes of a run, also of those in sessions of their own

CONFIG = """
import numpy as np

from data import Samples

_rng = np.random.default_rng(0)
_rows = []
for _i in range(24):
    _image = _rng.integers(0, 255, (28, 28, 3), dtype=np.uint8)
    _rows.append({"image": _image, "action": _rng.normal(size=7), "instruction": f"do {_i % 3}"})
data_mix = [(Samples(_rows), 1.0)]
batch_size = 4
micro_batch_size = 4
lr = 3e-3
warmup_steps = 2
num_workers = 2
log_every = 1
save_every = 1
export_every_save = True
max_steps = 12
random_model = {
    "vision_configs": [{"embed_dim": 16, "depth": 3, "num_heads": 2, "img_size": 28, "mlp_dim": 32}] * 2,
    "text_config": {
        "vocab_size": 32064,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
}
"""

TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2"
ADAPTERS = "--config c.py --random_model {} --base_checkpoint ../base/run/checkpoint --lora_rank 4 --lora_dropout 0.1"
OFT = "--views primary --action_chunk 1 --use_proprio False --micro_batch_size 2"
KINDS = {  # name -> arguments of Python; each run has a folder of its own as its working directory
    "train": f"{ROOT}/train.py --config c.py",
    "torchrun": f"{TORCHRUN} {ROOT}/train.py --config c.py --micro_batch_size 1",
    "lora": f"{ROOT}/finetune_lora.py {ADAPTERS}",
    "oft": f"{ROOT}/finetune_oft.py {ADAPTERS} {OFT}",
}
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
SECONDS_TO_END = 10  # for all processes of a run, after a kill
NOT_COMPARED = {"curves.png", ".lock", ".metadata"}  # .metadata holds ids of its own
TIMINGS = {"samples_per_s", "tokens_per_s", "s_per_step", "data_wait_ms", "tflops", "memory_gb", "save_s", "val_s"}


@dataclass
class Strike:
    """One signal that a run was sent, and what became of it."""

    kind: str
    signal: str
    target: str
    phase: str
    code: int  # of the main process
    seconds: float  # until no process lived
    alive: int  # processes that lived on
    is_saved: bool  # the last step in the log


# -----------------------------------------------------------------------------
# Runs and their processes


def start(kind: str, folder: Path) -> subprocess.Popen:
    """Start a run of one kind in a folder of its own. Its output is added to log.txt."""
    folder.mkdir(exist_ok=True)
    (folder / "c.py").write_text(CONFIG)
    with open(folder / "log.txt", "a") as log:
        return subprocess.Popen(
            [sys.executable, *KINDS[kind].split(), "--run_dir", "run"],
            cwd=folder,
            env={**os.environ, MARK: str(folder), "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def run_to_the_end(kind: str, folder: Path):
    """Run without any signal. Raises RuntimeError if the run fails."""
    code = start(kind, folder).wait(timeout=300)
    if code:
        raise RuntimeError(f"{kind} ended with {code}, see {folder / 'log.txt'}")


def living(folder: Path) -> list[int]:
    """Return the ids of all processes of a run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = path.read_bytes().split(b"\0")
        except OSError:  # it has ended, or is another user's
            continue
        if f"{MARK}={folder}".encode() in variables:
            found.append(int(path.parent.name))
    return found


def ranks_of(launcher: int) -> list[int]:
    """Return the ids of the processes that torchrun has started, rank 0 first."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    return sorted(int(child) for child in children)


def wait_until_gone(folder: Path) -> tuple[float, int]:
    """Wait until no process of a run lives. Returns the seconds, and how many lived too long; these are killed."""
    begin = time.monotonic()
    while living(folder) and time.monotonic() - begin < SECONDS_TO_END:
        time.sleep(0.1)
    seconds = time.monotonic() - begin
    left = living(folder)
    for process in left:
        os.kill(process, signal.SIGKILL)
    return seconds, len(left)


# -----------------------------------------------------------------------------
# What is in a run folder


def newest_step(run: Path) -> int:
    return max((int(path.parent.name[5:]) for path in run.glob("checkpoints/step-*/train.json")), default=0)


def logged_steps(run: Path) -> list[int]:
    if not (run / "metrics.jsonl").is_file():
        return []
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    return [json.loads(line)["step"] for line in lines if line.endswith("\n")]


def is_exported(run: Path) -> bool:
    return any((run / path).is_file() for path in ("export.json", "checkpoint/model.safetensors.index.json"))


def is_saving(run: Path, begin: float) -> bool:
    """True while a checkpoint of the run that was started at time `begin` is being written."""
    with contextlib.suppress(FileNotFoundError):  # it got its final name in this moment
        return any(path.stat().st_mtime >= begin for path in run.glob("checkpoints/.step-*"))
    return False


def phase_of(run: Path, before: int, begin: float) -> str:
    """Return what a run did last, from what it left. before: its newest step when it was started, at time `begin`."""
    if is_saving(run, begin):
        return "save"
    newest = newest_step(run)
    if newest > before and not is_exported(run):
        return "export"

    # A run that is killed may leave a line of the log without its step.
    log = run / "metrics.jsonl"
    has_logged = log.is_file() and log.stat().st_mtime >= begin
    if newest > before or (has_logged and max(logged_steps(run), default=0) > newest):
        return "steps"
    return "start-up"


def differences(expected: Path, found: Path) -> list[str]:
    """Return the files of two run folders that are not the same."""
    names = set()
    for folder in (expected, found):
        names |= {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    names = sorted(name for name in names if name.name not in NOT_COMPARED)
    return [str(name) for name in names if content(expected / name) != content(found / name)]


def content(path: Path):
    """Return what has to be the same of a file: all its bytes, if it holds no names, times or orders of its own."""
    if not path.is_file():
        return None
    if path.suffix in (".pt", ".safetensors"):
        tensors = torch.load(path, weights_only=True) if path.suffix == ".pt" else load_file(path)
        return {name: (tensor.dtype, tensor.shape, tensor.numpy().tobytes()) for name, tensor in tensors.items()}
    if path.name == "metrics.jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]
    if path.name == "train.json":
        record = json.loads(path.read_text())
        del record["config"]["data_mix"]  # an object, which has no lasting name
        return record
    if path.name == "export.json":  # fingerprints of whole files: `check_loads` compares them
        return sorted(json.loads(path.read_text()))
    return path.read_bytes()


def check_loads(folder: Path) -> list[str]:
    """Return what convert_weights.py finds wrong with an export."""
    export = "run/checkpoint" if (folder / "run" / "checkpoint").is_dir() else "run"
    command = [sys.executable, str(ROOT / "convert_weights.py"), "check", export]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return [done.stdout + done.stderr] if done.returncode else []


# -----------------------------------------------------------------------------
# Kill


def strike(kind: str, folder: Path, number: signal.Signals, target: str, wait: float, during: str) -> Strike | None:
    """
    Start a run, send it a signal after some seconds, and look what is left. The seconds of SIGKILL begin with the run,
    those of the others with its first step. during: "save" waits further, until a checkpoint is being written.
    None: the run has ended before.
    """
    run = folder / "run"
    before = newest_step(run)
    begin = time.time()
    process = start(kind, folder)
    while number != signal.SIGKILL and process.poll() is None and phase_of(run, before, begin) == "start-up":
        time.sleep(0.05)
    try:
        code = process.wait(wait)
    except subprocess.TimeoutExpired:
        code = None
    while during == "save" and code is None and not is_saving(run, begin):
        time.sleep(0.001)
        code = process.poll()
    if code is not None:
        if code:
            raise RuntimeError(f"{kind} ended with {code}, see {folder / 'log.txt'}")
        return None

    target = send(process, folder, number, target)
    seconds, alive = wait_until_gone(folder)
    code = process.wait()
    phase = phase_of(run, before, begin)
    is_saved = newest_step(run) == max(logged_steps(run), default=0)
    return Strike(kind, number.name, target, phase, code, seconds, alive, is_saved)


def send(process: subprocess.Popen, folder: Path, number: signal.Signals, target: str) -> str:
    """Send a signal to the main process, its group, every process, or a rank. Returns which of them it was."""
    if target == "group":
        os.killpg(process.pid, number)
        return target
    if target == "every":
        for one in living(folder):
            os.kill(one, number)
        return target
    ranks = ranks_of(process.pid) if target.startswith("rank") else []
    victim, target = (ranks[int(target[-1])], target) if len(ranks) == 2 else (process.pid, "main")
    os.kill(victim, number)
    return target


def torture(
    kind: str, folder: Path, plan: list, seconds: float, rng: random.Random, during: str
) -> tuple[list, list[str]]:
    """
    Send a kind of run the signals of a plan, [(signal, target)], one after another. Where a run ends before it gets
    its signal, the next one begins in another folder. Returns strikes, and what was wrong.
    """
    expected = folder / f"{kind}-whole" / "run"
    strikes = []
    problems = []
    for number in range(1000):
        killed = folder / f"{kind}-{number}"
        while plan:
            share = 1 if plan[0][0] == signal.SIGKILL else 0.3
            hit = strike(kind, killed, *plan[0], rng.uniform(0, seconds * share), during)
            if not hit:
                break
            print(hit, flush=True)
            strikes.append(hit)
            plan = plan[1:]
        run_to_the_end(kind, killed)
        problems += [f"{killed}: {name} differs" for name in differences(expected, killed / "run")]
        problems += check_loads(killed)
        if not plan:
            break
    return strikes, problems


def wrong_with(hit: Strike) -> str:
    """Return what is wrong with what a signal left, or ""."""
    if hit.alive:
        return f"{hit.alive} processes lived on"
    if hit.signal == "SIGKILL":
        return ""
    number = signal.Signals[hit.signal]
    codes = {0, 128 + number, -number}  # 0 and -number: so late that all was saved and written
    if hit.kind == "torchrun":
        codes.add(1)  # the launcher's own
    if hit.code not in codes:
        return f"exit code {hit.code}"
    return "" if hit.is_saved else "its last step is not saved"


def plan_for(kind: str, kills: int, has_signals: bool, rng: random.Random) -> list:
    """Return [(signal, target)] for a kind of run."""
    is_torchrun = kind == "torchrun"
    targets = ["main", "rank 0", "rank 1"] if is_torchrun else ["main"]
    plan = [(signal.SIGKILL, rng.choice(targets)) for _ in range(kills)]
    if has_signals:
        groups = ["group", "every"] if is_torchrun else ["group"]
        plan += [(number, target) for number in SIGNALS for target in groups]
    return plan


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40, help="SIGKILLs, over all kinds")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--signals", type=int, default=1, help="0: no SIGTERM, SIGINT and SIGUSR1 besides")
    parser.add_argument("--during", default="", choices=["save"], help="strike while a checkpoint is being written")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", default="", help="keep the runs in this new folder")
    args = parser.parse_args()

    rng = random.Random(args.seed)
    folder = Path(args.folder or tempfile.mkdtemp(prefix="kill_runs-")).resolve()
    folder.mkdir(exist_ok=True)
    run_to_the_end("train", folder / "base")  # what the adapters start from

    strikes = []
    problems = []
    for i, kind in enumerate(args.kinds):
        begin = time.monotonic()
        run_to_the_end(kind, folder / f"{kind}-whole")
        seconds = time.monotonic() - begin
        share, rest = divmod(args.kills, len(args.kinds))
        kills = share + 1 if i < rest else share
        found = torture(kind, folder, plan_for(kind, kills, bool(args.signals), rng), seconds, rng, args.during)
        strikes += found[0]
        problems += found[1]
    problems += [f"{hit}: {wrong_with(hit)}" for hit in strikes if wrong_with(hit)]

    print_table(strikes)
    print("\n".join(problems) or "every run left the files of its undisturbed run, no process lived on")
    if problems:
        sys.exit(1)
    if not args.folder:
        shutil.rmtree(folder)


def print_table(strikes: list[Strike]):
    """Print a line for each kind of run and each signal: when it came, and what became of the processes."""
    print("| run | signal to | times | in start-up, steps, save, export | exit codes | all ended after |")
    print("|---|---|---|---|---|---|")
    for row in sorted({(hit.kind, hit.signal, hit.target) for hit in strikes}):
        hits = [hit for hit in strikes if (hit.kind, hit.signal, hit.target) == row]
        phases = Counter(hit.phase for hit in hits)
        counts = ", ".join(str(phases[phase]) for phase in ("start-up", "steps", "save", "export"))
        codes = " ".join(str(code) for code in sorted({hit.code for hit in hits}))
        slowest = max(hit.seconds for hit in hits)
        kind, name, target = row
        print(f"| {kind} | {name} to {target} | {len(hits)} | {counts} | {codes} | {slowest:.1f} s |")


if __name__ == "__main__":
    main()
