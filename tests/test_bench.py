"""The benchmarks run; no test looks at a time."""

import json
import subprocess
import sys

import pytest
from common import ROOT

from bench.common import write_random_checkpoint


def bench(*argv: str) -> dict:
    run = subprocess.run([sys.executable, "-m", "bench", *argv], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_infer(tmp_path):
    argv = "infer --shape tiny --dtype float32 --device cpu --actions 3 --inputs 2".split()
    row = bench(*argv, "--log", str(tmp_path / "log"), "--plot", str(tmp_path / "a.png"))
    assert set(row["ways"]) == {"model.generate", "one by one", "drafted, all wrong", "drafted, all right"}
    assert all(way["same_action"] == 1 for way in row["ways"].values())
    assert row["ways"]["drafted, all right"]["tokens_per_pass"] == 7
    assert json.loads((tmp_path / "log").read_text())["label"] == "tiny, float32" and (tmp_path / "a.png").is_file()


def test_train():
    row = bench(*"train --shape tiny --dtype float32 --device cpu --batch_size 2 --seconds 0".split())
    assert row["samples_per_s"] > 0


def test_drafts_agree_load(tmp_path):
    write_random_checkpoint(tmp_path / "m", "tiny")
    way = f"--checkpoint {tmp_path / 'm'} --dtype float32 --device cpu --inputs 3".split()
    assert bench("drafts", *way)["last action"] >= 1
    row = bench("agree", *way, "--against", str(tmp_path / "m"))
    assert row["same_actions"] == 1 and row["l1_normalised"] == 0
    assert bench("load", *way)["peak_mb"] > 0


WRONG = ["fly", "infer --shape giant", "load --checkpoint nowhere", "infer --vs offical", "infer --actions 0"]


@pytest.mark.parametrize("argv", [text.split() for text in WRONG])
def test_refusals(argv):
    run = subprocess.run([sys.executable, "-m", "bench", *argv], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and run.stderr.startswith("error: ") and "Traceback" not in run.stderr


def test_start_and_index():
    row = bench("start", "--shape", "tiny", "--processes", "1")
    assert row["peak_mb"] > row["before_mb"] > 0
    row = bench("index", "--episodes", "3")
    assert row["mb_per_s_1"] > 0 and row["mb_per_s_2"] > 0
