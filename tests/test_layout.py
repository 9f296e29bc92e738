"""House rules that a machine can check: imports, sizes, configs."""

import ast
import subprocess
import sys

import pytest
from common import ROOT

from configurator import configure

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
    import oxe
    import train

    monkeypatch.setattr(oxe, "DATASETS", dict(oxe.DATASETS))  # a config may add a row
    text = ast.get_docstring(ast.parse(path.read_text()))
    script = next(s for s in (finetune_oft, finetune_lora, train) if f"{s.__name__}.py" in text)
    configure(script.Config, ["--config", str(path)])
