"""Defaults < config file < command line; whatever does not fit is an error that helps."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from configurator import configure


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


def test_help_shows_every_field(capsys):
    with pytest.raises(SystemExit) as end:
        configure(Config, ["--help"])
    out = capsys.readouterr().out
    assert end.value.code == 0 and all(name in out for name in Config.__dataclass_fields__) and "# a name" in out
