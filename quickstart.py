"""
The whole job in a small world, in five minutes on two CPU cores: demonstrations, training, practice, evaluation.

    python quickstart.py

This script runs four others and prints each command before it. Type them yourself to change something.
"""

import platform
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from configurator import configure
from files import read_json

RUN = Path("runs/toy")
ROOT = Path(__file__).parent


@dataclass
class Config:
    episodes: int = 12_000  # demonstrations to train on
    max_steps: int = 3000  # training steps on them
    practice: int = 16  # iterations of practice
    scenes: int = 500  # unseen scenes of the evaluation
    seed: int = 7


def main(cfg: Config):
    is_new = not RUN.exists()
    start = time.perf_counter()

    # 1. A scripted expert shows how to pick things up.
    run(f"python -m toy.world --folder runs/toy/data --episodes {cfg.episodes}")

    # 2. A small OpenVLA learns from it, with the classes, the data path and the loop of the real one.
    run(f"python train.py --config toy.py --max_steps {cfg.max_steps} --seed {cfg.seed} --run_dir runs/toy/cloned")

    # 3. It practises. The expert says what would have been right in the states that it comes into.
    practice = f"--base_checkpoint runs/toy/cloned/checkpoint --max_steps {cfg.practice} --seed {cfg.seed}"
    run(f"python finetune_rl.py --config toy_dagger.py {practice} --run_dir runs/toy")

    # 4. The policy acts in scenes that it has never seen.
    run(f"python -m toy.play --checkpoint runs/toy/checkpoint --out runs/toy --scenes {cfg.scenes}")

    print(f"\n{time.perf_counter() - start:.0f} s in all", flush=True)
    if is_new:
        print(leaderboard_line(time.perf_counter() - start, cfg))


def run(command: str):
    """Print a command and run it; `python` is the one that runs this script. If it fails, end with its exit code."""
    print(f"\n$ {command}", flush=True)
    start = time.perf_counter()
    words = shlex.split(command)
    if words[0] == "python":
        words[0] = sys.executable
    process = subprocess.Popen(words)
    while process.poll() is None:
        try:
            process.wait()
        except KeyboardInterrupt:
            pass  # Ctrl-C reaches the command, too. Training saves its state before it stops: wait for that.

    if process.returncode != 0:
        raise SystemExit(process.returncode)
    print(f"({time.perf_counter() - start:.0f} s)", flush=True)


# -----------------------------------------------------------------------------
# The line for docs/leaderboard.md


def leaderboard_line(seconds: float, cfg: Config) -> str:
    """Return a row of the table in docs/leaderboard.md: what a run from an empty folder took, and what it reached."""
    rates = read_json(RUN / "evaluation.json")
    interval = f"{rates['toy/success_low']:.1%} to {rates['toy/success_high']:.1%}"
    cells = [
        f"{seconds:.0f} s",
        f"{rates['toy/success']:.1%} ({interval}, {cfg.scenes} scenes)",
        f"{rates['toy/success_swapped']:.1%}",
        cpu_model(),
        str(cfg.seed),
        commit(),
        time.strftime("%Y-%m-%d"),
    ]
    return f"| {' | '.join(cells)} |"


def cpu_model() -> str:
    """Return the name of the processor, with AVX-512 or without where that can be told."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor() or platform.machine()
    text = path.read_text()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    name = names[0] if names else platform.machine()
    avx512 = "AVX-512" if "avx512f" in text else "no AVX-512"
    return f"{len(names)} x {name}, {avx512}"


def commit() -> str:
    """Return the commit of this folder, or "unknown" if it is no clone."""
    try:
        done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    except OSError:  # no git
        return "unknown"
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main(configure(Config))
