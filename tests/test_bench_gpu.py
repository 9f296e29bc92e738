"""`bench gpu`: every stage runs with tiny models, a stage that stops costs only itself, and results keep their form."""

import json
import math
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from common import ROOT
from hypothesis import given
from hypothesis import strategies as st

from bench import gpu, gpu_checks
from bench.common import random_config
from bench.gpu_common import Stage, random_model
from bench.gpu_lines import Line, append_line, check_line, read_lines, result_text
from bench.gpu_train import LORA_RANK, find_largest, sample_flops
from bench.random_weights import fill_random
from bench.train_step import TEXT_TOKENS, TRAINED_TOKENS
from model import OpenVLA

LINE = Line(
    stage="actions",
    name="one by one",
    value=32.5,
    unit="actions/s",
    status="measured",
    note="",
    card="NVIDIA H200",
    versions={"torch": "2.11.0"},
    date="2026-11-27T10:00:00+00:00",
    command="python -m bench gpu",
    tiny=False,
)


def new_stage(folder, name: str = "checks") -> Stage:
    return Stage(
        name=name,
        results=str(folder / "results.jsonl"),
        device="cpu",
        tiny=True,
        command="python -m bench gpu --tiny",
        official="",
        official_python="",
    )


# -----------------------------------------------------------------------------
# All of it


def test_tiny(tmp_path):
    """The whole command on a CPU: every stage has its results, none has failed, and what is missing is named."""
    command = [sys.executable, "-m", "bench", "gpu", "--tiny", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = [json.loads(text) for text in (tmp_path / "results.jsonl").read_text().splitlines()]
    lines = [check_line(row) for row in rows]
    bad = [line for line in lines if line.status not in ("measured", "passed", "skipped")]
    assert not bad, (bad, (tmp_path / "log.txt").read_text()[-3000:])

    results = {}
    for line in lines:
        assert line.tiny and "gpu --tiny" in line.command and line.versions["torch"] == torch.__version__
        assert line.status != "skipped" or "need" in line.note, line
        results.setdefault(line.stage, {})[line.name] = line
    assert list(results) == list(gpu.PLANS)
    for name in ("model.generate", "one by one", "drafted, all wrong", "drafted, all right"):
        assert results["actions"][name].value > 0
        assert results["quantized"][f"4 bits, {name}"].value > 0
        assert results["quantized"][f"8 bits, {name}"].value > 0
    checks = results["checks"]
    assert sum(line.status == "passed" for line in checks.values()) == 15
    assert checks["a sharded, recomputed, compiled step = a plain one, gradients"].status == "passed"
    assert results["chunks"]["a chunk, eager"].value > 0
    assert results["lora"]["LoRA, NF4, recomputed"].value > 0
    assert results["full"]["all weights, recomputed, compiled"].value > 0
    assert results["batch"]["largest batch, kept"].value == 3

    # For people.
    tables = (tmp_path / "results.md").read_text()
    assert tables in run.stdout
    for plan in gpu.PLANS.values():
        assert f"### {plan.title}" in tables
    assert f"{len(lines)} results" in run.stdout and "0 of them failed" in run.stdout


WRONG = [
    ("--stages z --tiny", "must be some of a or checks"),
    ("--tiny --official nowhere", "give a checkout of github.com/openvla/openvla"),
    ("--device cpu", "wants an NVIDIA GPU, found cpu; --tiny"),
]


@pytest.mark.parametrize("argv, message", WRONG)
def test_refusals(argv, message, tmp_path):
    command = [sys.executable, "-m", "bench", "gpu", "--out", str(tmp_path / "out"), *argv.split()]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("error: ") and message in run.stderr
    assert "Traceback" not in run.stderr and not (tmp_path / "out").exists()


def test_stages_by_name_and_letter():
    assert gpu.choose_stages(()) == list(gpu.PLANS)
    assert gpu.choose_stages(("full", "a")) == ["checks", "full"]


# -----------------------------------------------------------------------------
# A stage that stops


STOPPING = {
    "crashes": ("os.abort()", "crashed with SIGABRT"),
    "fails": ("raise ValueError('what is wrong')", "ended with exit code 1: ValueError: what is wrong"),
    "lacks": ("import no_such_package", "exit code 1: ModuleNotFoundError: No module named 'no_such_package'"),
}


@pytest.mark.parametrize("way", STOPPING)
def test_a_stage_that_stops_keeps_its_results(way, tmp_path, monkeypatch):
    code, words = STOPPING[way]
    write_module(tmp_path, "stopping", f"write()\n{code}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    stage = new_stage(tmp_path)
    gpu.run_one(stage, "stopping", 60, tmp_path / "log.txt")
    first, second = read_lines(tmp_path / "results.jsonl")
    assert first == LINE
    assert second.status == "stopped" and words in second.note and second.stage == "checks"


def test_a_stage_that_hangs_is_ended_with_all_that_it_started(tmp_path, monkeypatch):
    sleep = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    code = f"child = {sleep}\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\ntime.sleep(600)"
    write_module(tmp_path, "hanging", code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    gpu.run_one(new_stage(tmp_path), "hanging", 4, tmp_path / "log.txt")
    (line,) = read_lines(tmp_path / "results.jsonl")
    assert line.status == "stopped" and "after its 4 seconds" in line.note
    if (tmp_path / "pid").exists():  # on a slow machine it may not have come so far
        assert is_gone(int((tmp_path / "pid").read_text()))
        assert "hanging.py" in (tmp_path / "log.txt").read_text()


def is_gone(pid: int) -> bool:
    """True if a process has ended; it may wait for its parent to notice."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(") ", 1)[1][0] == "Z"
    except FileNotFoundError:
        return True


def write_module(folder, name: str, code: str):
    """Write a stage that can write one result without PyTorch."""
    start = f"""
import json, os, subprocess, sys, time
from pathlib import Path
from bench.gpu_lines import Line, append_line

def write():
    append_line(Path(json.loads(sys.argv[1])["results"]), Line(**{asdict(LINE)!r}))

"""
    (folder / f"{name}.py").write_text(start + code)


def test_no_time_left(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "TOTAL_SECONDS", 0)
    gpu.run_stages([new_stage(tmp_path)], tmp_path)
    (line,) = read_lines(tmp_path / "results.jsonl")
    assert line.status == "stopped" and line.note.startswith("not started")


def test_a_part_that_fails_costs_only_itself(tmp_path):
    def raises(error):
        def part(stage):
            raise error

        return part

    stage = new_stage(tmp_path)
    stage.run("memory", raises(torch.OutOfMemoryError("CUDA out of memory")))
    stage.run("package", raises(ModuleNotFoundError("No module named 'peft'", name="peft")))
    stage.run("error", raises(ValueError("two\nlines")))
    stage.run("number", lambda stage: stage.write("number", math.nan, "GB"))
    stage.run("above", lambda stage: stage.check("above", 0.2, 0.1, "", ""))
    stage.run("below", lambda stage: stage.check("below", 0.1, 0.1, "", ""))
    stage.run("nan", lambda stage: stage.check("nan", math.nan, 0.1, "", ""))
    lines = {line.name: line for line in read_lines(tmp_path / "results.jsonl")}
    statuses = {name: line.status for name, line in lines.items()}
    assert statuses == {
        "memory": "out of memory",
        "package": "skipped",
        "error": "failed",
        "number": "failed",
        "above": "failed",
        "below": "passed",
        "nan": "failed",
    }
    assert lines["package"].note.endswith("pip install peft")
    assert lines["error"].note == "ValueError: two lines"


# -----------------------------------------------------------------------------
# Results


def test_line_there_and_back(tmp_path):
    append_line(tmp_path / "a", LINE)
    append_line(tmp_path / "a", LINE)
    assert read_lines(tmp_path / "a") == [LINE, LINE]
    assert read_lines(tmp_path / "none") == []
    assert result_text(LINE) == "32.5 actions/s"


@pytest.mark.parametrize(
    "change",
    [
        {"value": None},
        {"value": math.inf},
        {"value": True},
        {"value": "32.5"},
        {"status": "fine"},
        {"name": ""},
        {"versions": "2.11"},
        {"tiny": 0},
        {"colour": "red"},
    ],
)
def test_a_wrong_line_is_refused(change):
    check_line(asdict(LINE))
    with pytest.raises(ValueError):
        check_line({**asdict(LINE), **change})
    missing = asdict(LINE)
    del missing[next(iter(change.keys() & missing.keys()), "date")]
    with pytest.raises(ValueError, match="expected stage, name, value"):
        check_line(missing)


# -----------------------------------------------------------------------------
# Pieces


@given(st.integers(0, 300), st.integers(1, 128), st.integers(1, 256))
def test_find_largest(limit, first, most):
    first = min(first, most)
    tried = []

    def fits(number):
        assert 1 <= number <= most and number not in tried
        tried.append(number)
        return number <= limit

    largest = find_largest(fits, first, most)
    assert largest <= min(limit, most) < largest + max(1, most // 32) + 1
    assert largest == 0 or largest in tried


def test_random_weights_depend_on_the_name_alone():
    """Two processes get the same; a model with other tensors besides, too."""
    model = random_model("tiny", torch.float32, "cpu")
    head = model.language_model.lm_head.weight
    shell = torch.nn.ModuleDict({"language_model": torch.nn.ModuleDict({"lm_head": torch.nn.Linear(64, 32064, False)})})
    assert torch.equal(fill_random(shell)["language_model"]["lm_head"].weight, head)
    weights = [p for p in model.parameters() if p.dim() > 1]
    assert len({p.flatten()[0].item() for p in weights}) == len(weights)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert abs(head.std().item() * 64**0.5 - 1) < 0.01


def test_flops_are_those_that_pytorch_counts():
    """The formula behind MFU, on openvla-7b, against PyTorch's own counter."""
    from torch.utils.flop_counter import FlopCounterMode

    config = random_config("7b")
    with torch.device("meta"):
        model = OpenVLA(config)
        input_ids = torch.zeros(1, TEXT_TOKENS, dtype=torch.long)
        pixels = torch.zeros(1, 6, 224, 224)
    for is_frozen in (False, True):
        if is_frozen:
            model.requires_grad_(False)
            pixels.requires_grad_(True)  # as with adapters, gradients go through all layers
        with FlopCounterMode(display=False) as counter:
            hidden = model.language_model(model.embed(input_ids, pixels))
            model.language_model.lm_head(hidden[:, -TRAINED_TOKENS:]).sum().backward()
        assert 1 < counter.get_total_flops() / sample_flops(config, is_frozen) < 1.02


def test_the_checks_see_a_difference():
    """A check that never fails would be none."""
    expected = torch.tensor([[3, 1, 2]])
    logits = torch.zeros(1, 3, 8)
    logits[0, torch.arange(3), expected[0]] = 1.0
    agreement = gpu_checks.Agreement()
    agreement.add(expected, expected, logits)
    assert agreement.num_same == 1 and agreement.largest_gap == 0
    agreement.add(torch.tensor([[3, 5, 2]]), expected, logits)
    assert agreement.num_same == 1 and agreement.largest_gap > 1

    one = {"a": torch.ones(3), "b": torch.zeros(2)}
    assert gpu_checks.joint_error(one, one) == 0
    assert gpu_checks.joint_error({**one, "a": torch.ones(3) * 1.1}, one) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="other weights than expected"):
        gpu_checks.joint_error({"a": torch.ones(3)}, one)


def test_the_official_side_does_the_same_step():
    """bench/gpu_official.py cannot import these: it runs in another environment."""
    text = (ROOT / "bench" / "gpu_official.py").read_text()
    numbers = {"TEXT_TOKENS": TEXT_TOKENS, "TRAINED_TOKENS": TRAINED_TOKENS, "LORA_RANK": LORA_RANK}
    for name, number in numbers.items():
        assert f"\n{name} = {number}" in text


def test_limits_fit_into_nine_minutes():
    """The stages that matter most have time even if those before them hang."""
    assert gpu.TOTAL_SECONDS <= 540
    assert sum(plan.seconds for plan in list(gpu.PLANS.values())[:4]) < gpu.TOTAL_SECONDS
