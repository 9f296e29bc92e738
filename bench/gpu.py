"""
`python -m bench gpu`: all that is worth knowing about one GPU, in at most nine minutes.

    python -m bench gpu --out DIR
    python -m bench gpu --out DIR --official openvla --official_python venv/bin/python
    python -m bench gpu --out DIR --stages checks actions
    python -m bench gpu --out DIR --tiny               # every stage with tiny models on the CPU: does the script work?

Each stage is a process of its own with a time limit, so that a crash or a hang costs that stage only. Results go to
DIR/results.jsonl, one line each, as soon as they are known (bench/gpu_lines.py); what the stages print goes to
DIR/log.txt. At the end this prints all results as tables, and writes them to DIR/results.md. Another run into the same
folder adds to it.

All weights are random, and made on the GPU. No file is read but the code.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.common import Config
from bench.gpu_common import ROOT, Stage
from bench.gpu_lines import FAILED, STOPPED, Line, read_lines, result_text, table
from files import atomic_write
from policy import pick_device

RESULTS = "results.jsonl"
LOG = "log.txt"
TABLES = "results.md"
TOTAL_SECONDS = 530  # of all stages together: nine minutes, less what starting and reporting take
LEAST_SECONDS = 20  # a stage is not started with less
SECONDS_TO_PRINT = 5  # where it was, for a stage that is stopped
SLOWNESS = 4  # how much longer all may take in a try-out on a CPU, which may have other work


@dataclass
class Plan:
    """What is known of a stage before it runs."""

    title: str
    module: str  # that runs it
    seconds: int  # the most that it may take


# In the order in which they run: the most valuable first
PLANS = {
    "checks": Plan("a. Is it right on a GPU?", "bench.gpu_checks", seconds=150),
    "actions": Plan("b. How fast is an action of 7B in bfloat16?", "bench.gpu_infer", seconds=120),
    "chunks": Plan("c. How fast is a chunk of OFT?", "bench.gpu_infer", seconds=60),
    "quantized": Plan("d. How fast and how large is 7B in 8 and 4 bits?", "bench.gpu_infer", seconds=80),
    "lora": Plan("e. How fast does LoRA train 7B?", "bench.gpu_train", seconds=140),
    "full": Plan("f. How fast do all weights of 1.3B train?", "bench.gpu_train", seconds=100),
    "batch": Plan("g. Which batch fits?", "bench.gpu_train", seconds=80),
}
LETTERS = dict(zip("abcdefg", PLANS, strict=True))


def bench_gpu(cfg: Config):
    """Run the stages, and print the tables. Raises ValueError for options that cannot be right, before any work."""
    names = choose_stages(cfg.stages)
    device = choose_device(cfg)
    check_official(cfg)
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    num_earlier = len(read_lines(out / RESULTS))

    stages = []
    for name in names:
        stage = Stage(
            name=name,
            results=str((out / RESULTS).absolute()),
            device=device,
            tiny=cfg.tiny,
            command=shlex.join(["python", "-m", "bench", *sys.argv[1:]]),
            official=str(Path(cfg.official).absolute()) if cfg.official else "",
            official_python=cfg.official_python,
        )
        stages.append(stage)
    run_stages(stages, out)

    lines = read_lines(out / RESULTS)[num_earlier:]
    tables = make_tables(lines)
    with atomic_write(out / TABLES) as temporary:
        temporary.write_text(tables, encoding="utf-8")
    print(tables)
    num_bad = sum(line.status in (FAILED, STOPPED) for line in lines)
    print(f"{len(lines)} results in {out / RESULTS}, {num_bad} of them failed or stopped; {out / LOG} has the details")


# -----------------------------------------------------------------------------
# Options


def choose_stages(wanted: tuple[str, ...]) -> list[str]:
    """Return names of stages in the order in which they run. Raises ValueError for a name that is none."""
    names = [LETTERS.get(word, word) for word in wanted]
    for name in names:
        if name not in PLANS:
            known = ", ".join(f"{letter} or {stage}" for letter, stage in LETTERS.items())
            raise ValueError(f"--stages {name}: must be some of {known}")
    return [name for name in PLANS if name in names or not names]


def choose_device(cfg: Config) -> str:
    """Return cuda, or cpu for a try-out. Raises ValueError where there is no GPU."""
    if cfg.tiny and cfg.device == "auto":
        return "cpu"
    device = pick_device(cfg.device)
    if device == "cpu" and cfg.tiny:
        return device
    if not device.startswith("cuda"):
        raise ValueError(f"bench gpu wants an NVIDIA GPU, found {device}; --tiny tries the script out on a CPU")
    return device


def check_official(cfg: Config):
    """Raise ValueError if --official is given and is no checkout of the official code."""
    if cfg.official and not (Path(cfg.official) / "prismatic" / "extern" / "hf").is_dir():
        raise ValueError(f"--official {cfg.official}: give a checkout of github.com/openvla/openvla")


# -----------------------------------------------------------------------------
# Run


def run_stages(stages: list[Stage], out: Path):
    """Run the stages one after the other, and print what each has found."""
    slowness = 1 if stages[0].on_gpu else SLOWNESS
    end = time.monotonic() + slowness * TOTAL_SECONDS
    for stage in stages:
        plan = PLANS[stage.name]
        print(f"{plan.title} ({stage.name})", flush=True)
        num_earlier = len(read_lines(out / RESULTS))
        left = end - time.monotonic()
        start = time.monotonic()
        if left < LEAST_SECONDS:
            write_stopped(stage, "not started: the time for all stages is used up")
        else:
            run_one(stage, plan.module, min(slowness * plan.seconds, left), out / LOG)

        for line in read_lines(out / RESULTS)[num_earlier:]:
            print(f"  {line.name}: {result_text(line)}", flush=True)
        print(f"  {time.monotonic() - start:.0f} s", flush=True)


def run_one(stage: Stage, module: str, seconds: float, log: Path):
    """Run a stage in a process of its own, at most for some seconds. If it stops early, that is a result, too."""
    command = [sys.executable, "-m", module, json.dumps(asdict(stage))]
    # What it prints is there when it crashes, and Python says where it was.
    settings = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    with open(log, "a+", encoding="utf-8", errors="replace") as output:
        print(f"===== {stage.name}", file=output, flush=True)
        log_start = output.tell()
        # A group of its own, so that the processes that a stage starts end with it.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **settings},
            stdout=output,
            stderr=output,
            preexec_fn=os.setpgrp,
        )
        try:
            code = wait(process, seconds)
        finally:
            end_group(process)

        if code is None:
            write_stopped(stage, f"stopped after its {seconds:.0f} seconds; {log.name} says where it was")
        elif code < 0:
            write_stopped(stage, f"crashed with {signal.Signals(-code).name}; {log.name} says where it was")
        elif code > 0:
            output.seek(log_start)
            write_stopped(stage, f"ended with exit code {code}: {last_line(output.read())}")


def wait(process: subprocess.Popen, seconds: float) -> int | None:
    """Return the exit code of a process, or None if it ran longer: then it has printed where it was, and is ending."""
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGABRT)
    try:
        process.wait(timeout=SECONDS_TO_PRINT)
    except subprocess.TimeoutExpired:
        pass  # not even that: `end_group` follows
    return None


def end_group(process: subprocess.Popen):
    """End a process and those that it has started, if they are still there."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def last_line(text: str) -> str:
    """Return the last line of what a stage has printed; of a Python error it is the message."""
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it printed nothing"


def write_stopped(stage: Stage, why: str):
    """Write that a stage did not come to its end."""
    stage.write("the rest of this stage", None, "", why, STOPPED)


# -----------------------------------------------------------------------------
# Report


def make_tables(lines: list[Line]) -> str:
    """Return the results of a run in Markdown, with a table for each stage."""
    if not lines:
        return "no results\n"
    first = lines[0]
    found = ", ".join(f"{name} {version}" for name, version in first.versions.items())
    parts = [f"{first.date[:10]}, {first.card}, {found}. `{first.command}`\n"]
    if first.tiny:
        parts.append("This is a try-out with tiny models: the figures mean nothing.\n")
    for name, plan in PLANS.items():
        of_stage = [line for line in lines if line.stage == name]
        if of_stage:
            parts.append(table(plan.title, of_stage))
    return "\n".join(parts)
