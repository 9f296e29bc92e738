"""
The whole job in a small world, in five to eight minutes on two CPU cores: demonstrations, training, evaluation.

    python quickstart.py

This script runs three others and prints each command before it. Type them yourself to change something.
"""

import shlex
import subprocess
import sys
import time
from dataclasses import dataclass

from configurator import configure


@dataclass
class Config:
    episodes: int = 4000  # demonstrations to train on
    max_steps: int = 3000  # training steps
    scenes: int = 200  # unseen scenes of the evaluation


def main(cfg: Config):
    # 1. A scripted expert shows how to pick things up.
    run(f"python -m toy.world --folder runs/toy/data --episodes {cfg.episodes}")

    # 2. A small OpenVLA learns from it, with the classes, the data path and the loop of the real one.
    run(f"python train.py --config toy.py --max_steps {cfg.max_steps}")

    # 3. The policy acts in scenes that it has never seen.
    run(f"python -m toy.play --checkpoint runs/toy/checkpoint --out runs/toy --scenes {cfg.scenes}")


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


if __name__ == "__main__":
    main(configure(Config))
