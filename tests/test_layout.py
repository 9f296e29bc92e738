"""House rules that a machine can check: imports, rooms, configs, and that a newcomer follows a walk in few files."""

import ast
import runpy
import shutil
import subprocess
import sys

import numpy as np
import pytest
from common import ROOT

import finetune_lora
import finetune_oft
import finetune_rl
import model
import tokenizer
import train
from configurator import configure
from policy import load_policy, predict_action
from tokenizer import make_standin
from toy import world as toy

WINGS = ("formats", "toy", "libero_sim", "robots", "speed", "diagnose", "bench")
HEAVY = "transformers timm tensorflow tensorflow_datasets flash_attn peft dlimp libero wandb fastapi matplotlib".split()

# What the root may import of the wings: data has formats, checkpoints may be quantized, and LIBERO's evaluation its
# simulator. Everything else in the wings stands on the root, not under it.
ALLOWED_FROM_ROOT = {
    "formats": None,  # None: from any file
    "speed": None,
    "libero_sim": {"eval_libero"},
}


def modules() -> dict:
    """Dotted name -> file, of the root and the wings."""
    found = {path.stem: path for path in ROOT.glob("*.py")}
    for wing in WINGS:
        for path in (ROOT / wing).glob("*.py"):
            name = wing if path.stem == "__init__" else f"{wing}.{path.stem}"
            found[name] = path
    return found


MODULES = modules()


def imported_names(path) -> set[str]:
    """Every dotted name that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def local_imports(name: str) -> set[str]:
    """The modules of this repository that a module imports, also inside functions."""
    return {other for other in imported_names(MODULES[name]) if other in MODULES} - {name}


@pytest.mark.parametrize(
    "name", ["configurator", "files", "progress", "normalize", "formats.protobuf", "formats.workers"]
)
def test_the_base_stands_alone(name):
    assert local_imports(name) == set()


def test_tokenizer_and_table_need_little():
    assert local_imports("tokenizer") == {"formats.protobuf"}
    assert local_imports("formats.dataset") == {"normalize"}
    assert local_imports("formats.oxe") == {"formats.dataset"}  # it reads no files


def test_the_model_needs_files_only():
    assert local_imports("model") == {"files", "progress"}
    assert local_imports("image") <= {"files"}


def test_both_know_the_same_number_of_bins():
    """The price of the test above."""
    assert model.NUM_ACTION_BINS == tokenizer.NUM_BINS


def test_imports_have_no_cycle():
    """Not even one that is hidden inside a function."""
    done = set()
    while len(done) < len(MODULES):
        free = {name for name in MODULES if name not in done and local_imports(name) <= done}
        assert free, f"a cycle among {sorted(MODULES.keys() - done)}"
        done |= free


def test_the_root_does_not_lean_on_its_wings():
    for name in MODULES:
        if "." in name or name in WINGS:
            continue
        for other in local_imports(name):
            wing = other.split(".")[0]
            if wing not in WINGS:
                continue
            assert wing in ALLOWED_FROM_ROOT, f"{name}.py imports {other}"
            allowed = ALLOWED_FROM_ROOT[wing]
            assert allowed is None or name in allowed, f"{name}.py imports {other}"


def test_imports_inside_functions_are_of_other_packages():
    for name, path in MODULES.items():
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for node in ast.walk(function):
                if isinstance(node, ast.ImportFrom):
                    assert node.module not in MODULES, f"{name}.{function.name} imports {node.module}"
                if isinstance(node, ast.Import):
                    for alias in node.names:
                        assert alias.name not in MODULES, f"{name}.{function.name} imports {alias.name}"


SCRIPTS = ["sample", "train", "policy", "data", "finetune_lora", "finetune_oft", "finetune_rl", "convert_weights"]
SCRIPTS += ["eval_libero"]


def test_nothing_heavy_is_imported():
    code = f"import sys, {', '.join(SCRIPTS)}, formats.rlds; print([m for m in {HEAVY} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_configs_fit_their_script(path):
    text = ast.get_docstring(ast.parse(path.read_text()))
    script = next(
        script for script in (finetune_rl, finetune_oft, finetune_lora, train) if f" {script.__name__}.py" in text
    )
    configure(script.Config, ["--config", str(path)])


def test_adapters_and_all_weights_are_compared_fairly():
    """toy/transfer.py runs both configs: they are the same run but for what trains and where it is written."""
    adapters = runpy.run_path(str(ROOT / "configs" / "toy_lora.py"))
    all_weights = runpy.run_path(str(ROOT / "configs" / "toy_full.py"))
    own = {"run_dir", "lora_rank"}
    settings = [name for name in {*adapters, *all_weights} - own if not name.startswith("__")]
    assert len(settings) > 10
    for name in settings:
        assert adapters[name] == all_weights[name], name


def files_of_what_runs(call) -> set[str]:
    """The files of this repository whose functions run during a call."""
    ran = set()

    def watch(frame, event, _):
        if event == "call":
            ran.add(frame.f_code.co_filename)

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return {name for name, path in MODULES.items() if str(path) in ran}


@pytest.mark.filterwarnings("ignore:not an action")
def test_a_newcomer_has_few_files_to_follow(folders, tmp_path):
    """The two walks that README names: from an image to an action, and from an episode to a loss."""
    folder = shutil.copytree(folders["tiny-openvla"], tmp_path / "m")
    make_standin(folder / "tokenizer.model")
    image = np.zeros((64, 64, 3), np.uint8)
    act = files_of_what_runs(lambda: predict_action(load_policy(folder), [image], ["go"], "toy"))
    walk = {"checkpoint", "policy", "image", "tokenizer", "model", "normalize"}
    assert act == walk | {"files", "progress", "hub"}

    toy.write_rlds(tmp_path / "data", {"train": toy.demonstrations(toy.TRAIN, 3)})
    argv = "--config toy.py --batch_size 2 --micro_batch_size 2 --num_workers 0 --max_steps 1".split()
    argv += ["--data_root_dir", str(tmp_path / "data"), "--run_dir", str(tmp_path / "run")]
    learn = files_of_what_runs(lambda: train.train(configure(train.Config, argv)))
    walk = {"formats.rlds", "formats.oxe", "data", "image", "normalize", "tokenizer", "model", "train"}
    around = {"configurator", "distributed", "resume", "metrics", "files", "progress", "hub", "toy", "toy.world"}
    readers = {"dataset", "faults", "protobuf", "rlds_index", "samples", "tfrecord", "user_code", "workers"}
    readers |= {"write_rlds"}  # of the toy world
    around |= {"fit_fast", "fast"}  # asked which action tokens the run has
    assert walk <= learn <= walk | around | {"formats"} | {f"formats.{name}" for name in readers}
