"""Defaults < config file < command line; whatever does not fit is an error that helps."""

import re
from dataclasses import dataclass, field
from typing import Any

import pytest

from configurator import MAX_MESSAGE, configure, fail


@dataclass
class Config:
    """Options."""

    name: str = "a"  # a name
    lr: float = 0.1
    steps: int = 5
    fast: bool = False
    image: tuple[str, ...] = ()
    limit: int | None = None
    extra: dict = field(default_factory=dict)
    mix: Any = "bridge"


def test_three_sources(tmp_path):
    file = tmp_path / "c.py"
    file.write_text("import math\nfrom pathlib import Path\nlr = 2\nsteps = 7\n_private = 1\ndef helper(): pass\n")
    cfg = configure(Config, ["--steps", "9", "--config", str(file)])
    assert (cfg.name, cfg.lr, cfg.steps) == ("a", 2.0, 9) and isinstance(cfg.lr, float)


def test_later_files_win(tmp_path):
    for i in (1, 2):
        (tmp_path / f"{i}.py").write_text(f"steps = {i}\n" + "lr = 0.5\n" * (i == 1))
    cfg = configure(Config, ["--config", str(tmp_path / "1.py"), "--config", str(tmp_path / "2.py")])
    assert (cfg.steps, cfg.lr) == (2, 0.5)


def test_forms():
    argv = "--name=3 --lr 1e-4 --fast --image a.png b.png --limit 4 --extra {'a':1}".split()
    cfg = configure(Config, argv)
    assert cfg == Config("3", 1e-4, 5, True, ("a.png", "b.png"), 4, {"a": 1})
    assert configure(Config, ["--fast", "False", "--lr=0"]).fast is False
    assert configure(Config, ["--name", "x=y"]).name == "x=y" and configure(Config, ["--limit", "None"]).limit is None
    assert configure(Config, ["--mix", "oxe"]).mix == "oxe"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--stepps", "3"], "did you mean 'steps'"),
        (["--steps", "1.5"], "steps must be int, got 1.5"),
        (["--fast", "maybe"], "fast must be bool"),
        (["steps"], "--name value"),
        (["--config", "none.py"], "no such file"),
        (["--limit", "x"], "limit must be"),
        (["--name", "--steps", "3"], "--name needs a value"),
        (["--steps", "3", "--name"], "--name needs a value"),
        (["--image"], "--image needs a value"),
        (["--limit"], "--limit needs a value"),
        (["--config"], "--config needs a file"),
        (["--learning_rate", "1"], "unknown option 'learning_rate': here it is --lr"),
        (["--vla.data_mix", "x"], "; --help lists them"),
        (["--vla.steps", "3"], "here it is --steps"),
    ],
)
def test_errors(argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        configure(Config, argv)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_unknown_name_in_a_file(tmp_path, capsys):
    (tmp_path / "c.py").write_text("lrr = 1\n")
    with pytest.raises(SystemExit):
        configure(Config, ["--config", str(tmp_path / "c.py")])
    assert "did you mean 'lr'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.py", "", "assigns no option"),
        ("b.py", "import math\n_lr = 1\n", "assigns no option"),
        ("c.py", "steps = 1\nlr: 0.1\n", "line 2: `lr: 0.1` assigns nothing; write lr = 0.1"),
        ("d.yaml", "lr: 0.1\n", "a config file is Python"),
        ("e.py", "- lr\n: 0.1\n", "is no Python"),
        ("f.py", '{"lr": 0.1}', "assigns no option"),
        ("g.py", "steps = 1\nlr = lrr\n", "line 2: NameError: name 'lrr' is not defined"),
        ("h.py", "steps = 1\nimport nowhere\n", "line 2: ModuleNotFoundError"),
        ("i.py", "lr = 1\0", "is no Python"),
    ],
)
def test_config_files_that_are_none(tmp_path, name, text, message, capsys):
    (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as end:
        configure(Config, ["--config", str(tmp_path / name)])
    err = capsys.readouterr().err
    assert end.value.code == 2 and message in err and name in err and "Traceback" not in err


def test_annotated_assignments_count(tmp_path):
    (tmp_path / "c.py").write_text("lr: float = 0.2\n")
    assert configure(Config, ["--config", str(tmp_path / "c.py")]).lr == 0.2


def test_the_working_directory_comes_before_configs(tmp_path, monkeypatch, capsys):
    import train

    monkeypatch.chdir(tmp_path)
    (tmp_path / "bridge.py").write_text("lr = 0.123\n")
    assert configure(train.Config, ["--config", "./bridge.py"]).lr == 0.123
    assert capsys.readouterr().err == ""
    assert configure(train.Config, ["--config", "bridge.py"]).lr == 0.123
    assert f"{tmp_path / 'bridge.py'} is taken" in capsys.readouterr().err
    (tmp_path / "bridge.py").unlink()
    assert configure(train.Config, ["--config", "bridge.py"]).lr != 0.123
    assert capsys.readouterr().err == ""
    with pytest.raises(SystemExit):  # a path is that file, and no other
        configure(train.Config, ["--config", "./bridge.py"])


def test_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert configure(Config, ["--name=~/runs/x"]).name == f"{tmp_path}/runs/x"
    assert configure(Config, ["--image", "~/a.png", "b~.png"]).image == (f"{tmp_path}/a.png", "b~.png")
    (tmp_path / "c.py").write_text("name = '~/y'\n")
    assert configure(Config, ["--config=~/c.py"]).name == f"{tmp_path}/y"


@pytest.mark.parametrize(
    ("script", "theirs", "ours"),
    [
        ("train", "vla_path", "base_checkpoint"),
        ("train", "dataset_name", "data_mix"),
        ("train", "run_root_dir", "run_dir"),
        ("train", "save_steps", "save_every"),
        ("train", "vla.learning_rate", "lr"),
        ("sample", "pretrained_checkpoint", "checkpoint"),
        ("eval_libero", "task_suite_name", "task_suite"),
    ],
)
def test_official_names(script, theirs, ours, capsys):
    import importlib

    with pytest.raises(SystemExit):
        configure(importlib.import_module(script).Config, [f"--{theirs}", "x"])
    assert f"unknown option '{theirs}': here it is --{ours}\n" in capsys.readouterr().err


def help_of(cls, argv, capsys):
    with pytest.raises(SystemExit) as end:
        configure(cls, argv)
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_shows_every_field(capsys):
    out = help_of(Config, ["--help"], capsys)
    assert all(name in out for name in Config.__dataclass_fields__) and "a name" in out
    assert out.startswith("Defaults < config file < command line")  # the docstring of the script


@dataclass
class Base:
    # Data
    folder: str = ""  # where the data is
    # share of it that is
    # not trained on
    hold_out: float = 0.05

    # Training: the title of
    # a group may be long
    batch_size: int = 256  # samples per step
    lr: float = 1e-3
    words: tuple[str, ...] = ("a", "b c")  # not "# a comment"
    sizes: dict = field(default_factory=lambda: {i: i for i in range(100)})


@dataclass
class Derived(Base):
    """A docstring."""

    # Adapters
    rank: int = 32

    # Other defaults
    batch_size: int = 64
    lr: float = 5e-4  # commented here only
    folder: str = "data"  # another comment


def test_help_is_one_list_of_all_classes(tmp_path, capsys):
    out = help_of(Derived, ["-h"], capsys)
    options = out[out.index("\nData\n") + 1 :].rstrip()
    sizes = repr(Derived().sizes)[:57] + "..."
    assert options.splitlines() == [
        "Data",
        "  --folder data                       another comment",
        "  --hold_out 0.05                     share of it that is not trained on",
        "",
        "Training: the title of a group may be long",
        "  --batch_size 64                     samples per step",
        "  --lr 0.0005                         commented here only",
        '  --words a "b c"                     not "# a comment"',
        f"  --sizes {sizes}",
        "",
        "Adapters",
        "  --rank 32",
    ]

    file = tmp_path / "c.py"
    file.write_text("batch_size = 48\nlr = 1\n")
    out = help_of(Derived, ["--config", str(file), "--help", "--lr"], capsys)
    assert "--batch_size 48  " in out and out.count("--batch_size") == 1 and "--lr 1.0 " in out and "--rank 32" in out


def test_help_of_a_wrong_config_file(capsys):
    with pytest.raises(SystemExit) as end:
        configure(Config, ["--config", "none.py", "--help"])
    assert end.value.code == 2 and "no such file" in capsys.readouterr().err


def test_help_of_the_recipes(capsys):
    import finetune_oft

    out = help_of(finetune_oft.Config, ["--config", "libero_oft.py", "--help"], capsys)
    assert out.count("--batch_size") == out.count("\nData\n") == 1
    assert "--batch_size 64 " in out and "samples per step, over all processes" in out
    assert "--data_mix libero_spatial_no_noops" in out
    assert out.index("\nOptimization\n") < out.index("--batch_size") < out.index("\nRun\n")
    assert "Other defaults" not in out  # its fields stay in their groups
    options = out[out.index("\nData\n") :]
    assert max(map(len, options.splitlines())) <= 100
    assert set(finetune_oft.Config.__dataclass_fields__) == set(re.findall(r"^  --(\w+)", options, re.M))


@pytest.mark.parametrize(
    "option",
    ["--grad_clip -1", "--grad_clip=-1e999", "--lr -1e-4", "--lr 1e999", "--warmup_steps -1", "--num_workers -1"]
    + ["--beta2 1.0", "--seed -1", "--val_every -5", "--action_chunk 0", "--hold_out 1"],
)
def test_numbers_that_cannot_be_right(option):
    import train

    cfg = configure(train.Config, option.split())
    name = option.replace("=", " ").split()[0]
    with pytest.raises(ValueError, match=f"{name} .*must be"):
        train.check_config(cfg, world=1)


def test_no_validation_batches():
    import train

    with pytest.raises(ValueError, match="--val_batches 0: must be 1 or more"):
        train.check_config(configure(train.Config, ["--val_batches", "0", "--val_every", "10"]), world=1)
    good = "--val_batches 0 --grad_clip 0 --lr 0 --base_checkpoint x --data_root_dir x".split()
    train.check_config(configure(train.Config, good), world=1)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SLURM_NTASKS": "2"}, "Slurm has 2 tasks.*torchrun"),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "4"}, "Slurm has 4 tasks"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK is set, but not MASTER_ADDR, MASTER_PORT: .*torchrun"),
        ({}, ""),
        ({"SLURM_NTASKS": "1"}, ""),
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, ""),
        ({"SLURM_NTASKS": "4", "RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, ""),
    ],
)
def test_processes_that_nobody_joined(environment, message, monkeypatch):
    from distributed import check_environment

    for name in ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if not message:
        check_environment()
        return
    with pytest.raises(ValueError, match=message):
        check_environment()


def test_a_message_is_never_pages_long(capsys):
    with pytest.raises(SystemExit):
        fail("a.json: the value is " + "x" * 10**6 + ", it must be a number")
    error = capsys.readouterr().err
    assert error.startswith("error: a.json: the value is xxx") and error.endswith("it must be a number\n")
    assert len(error) < MAX_MESSAGE + 50
