"""House rules that a machine can check: imports, sizes, configs."""

import ast
import shutil
import subprocess
import sys
from collections import defaultdict

import numpy as np
import pytest
from common import ROOT

import sample
import train
from configurator import configure
from formats import oxe
from tokenizer import make_standin
from toy import world as toy

FILES = {p.stem: p for p in ROOT.glob("*.py")}
CAPS = {"model": 450, "tokenizer": 220, "data": 450, "oxe": 900, "configurator": 120}
HEAVY = "transformers timm tensorflow tensorflow_datasets flash_attn peft dlimp libero wandb fastapi matplotlib".split()


def local_imports(path, top_level_only=True):
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    names = [n.module for n in nodes if isinstance(n, ast.ImportFrom)]
    names += [a.name for n in nodes if isinstance(n, ast.Import) for a in n.names]
    return {name for name in names if name in FILES}


def test_model_and_tokenizer_stand_alone():
    for name in ("model", "tokenizer", "configurator", "image", "oxe"):
        assert local_imports(FILES[name], top_level_only=False) == set()


def test_imports_have_no_cycle():
    done = set()
    while len(done) < len(FILES):
        free = {name for name, path in FILES.items() if name not in done and local_imports(path) <= done}
        assert free, f"a cycle among {sorted(FILES.keys() - done)}"
        done |= free


@pytest.mark.parametrize("name", sorted(CAPS))
def test_size(name):
    assert len(FILES[name].read_text().splitlines()) <= CAPS[name]


@pytest.mark.parametrize("names", [["model", "tokenizer", "image", "sample"], ["rlds", "data", "train", "oxe"]])
def test_nothing_heavy_is_imported(names):
    code = f"import sys, {', '.join(names)}; print([m for m in {HEAVY} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_configs_fit_their_script(path, monkeypatch):
    import finetune_lora
    import finetune_oft

    monkeypatch.setattr(oxe, "DATASETS", dict(oxe.DATASETS))  # a config may add a row
    text = ast.get_docstring(ast.parse(path.read_text()))
    script = next(s for s in (finetune_oft, finetune_lora, train) if f"{s.__name__}.py" in text)
    configure(script.Config, ["--config", str(path)])


def lines_of_what_runs(call) -> dict[str, int]:
    """File -> lines, without empty ones, of its functions that run during a call."""
    ran = defaultdict(set)

    def watch(frame, event, _):
        if event == "call":
            ran[frame.f_code.co_filename].add(frame.f_code.co_firstlineno)

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    out = {}
    for path in FILES.values():
        text, lines = path.read_text(), set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                if first in ran[str(path)]:
                    lines |= {i for i in range(first, node.end_lineno + 1) if text.splitlines()[i - 1].strip()}
        if lines:
            out[path.name] = len(lines)
    return out


@pytest.mark.filterwarnings("ignore:not an action")
def test_a_newcomer_has_little_to_follow(folders, tmp_path, monkeypatch):
    """What the README says of the way from a picture to an action, and from an episode to a loss."""
    monkeypatch.setattr(oxe, "DATASETS", dict(oxe.DATASETS))
    folder = shutil.copytree(folders["tiny-openvla"], tmp_path / "m")
    make_standin(folder / "tokenizer.model")
    picture = np.zeros((64, 64, 3), np.uint8)
    act = lines_of_what_runs(lambda: sample.predict_action(sample.load(folder), [picture], ["go"], "toy"))
    assert set(act) == {"sample.py", "image.py", "tokenizer.py", "model.py", "checkpoint.py"}
    assert sum(act.values()) < 700

    toy.write_rlds(tmp_path / "data", dict(train=toy.demonstrations(toy.TRAIN, 3)))
    argv = "--config toy.py --batch_size 2 --micro_batch_size 2 --num_workers 0 --max_steps 1".split()
    argv += ["--data_root_dir", str(tmp_path / "data"), "--run_dir", str(tmp_path / "run")]
    learn = lines_of_what_runs(lambda: train.train(configure(train.Config, argv)))
    path = {"configurator.py", "rlds.py", "oxe.py", "data.py", "image.py", "tokenizer.py", "model.py", "train.py"}
    assert set(learn) == path | {"metrics.py"} and sum(learn[name] for name in path) < 1400  # metrics.py writes the log
