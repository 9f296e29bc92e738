"""
Settings of a script: a dataclass holds the defaults, a Python file overrides them, the command line has the last word.

    python train.py --config bridge.py --lr 1e-4 --image_aug False

A config file is plain Python, found here or in configs/: each public name that it assigns must be a field of the
dataclass (imported modules, classes and functions are not counted). Unknown names and wrong types end the program.
"""

import difflib
import inspect
import runpy
import sys
from ast import literal_eval
from pathlib import Path
from types import NoneType
from typing import Any, NoReturn, get_args, get_origin, get_type_hints


def fail(message) -> NoReturn:
    """One clear message and exit code 2: for what the user can mend."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def configure(cls, argv: list[str] | None = None):
    """An instance of the dataclass `cls`, filled from the command line. --help prints script and field comments."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "-h" in words or "--help" in words:
        fields = "\n".join(inspect.getsource(c) for c in cls.__mro__[:-1])
        print(f"{inspect.getdoc(inspect.getmodule(cls))}\n\nOptions (--name value):\n\n{fields}")
        raise SystemExit(0)
    hints = get_type_hints(cls)
    settings: dict[str, Any] = {}
    options: dict[str, Any] = {}
    while words:
        word = words.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            fail(f"{word!r}: options are written --name value")
        values = [value] if equals else []
        many = get_origin(hints.get(key)) is tuple
        while not equals and words and not words[0].startswith("--") and (many or not values):
            values.append(words.pop(0))
        if key == "config":
            settings |= read_config_file(values[0] if values else "")
        else:
            hint = hint_of(key, hints, "command line")
            texts = values or ["True" if hint is bool else ""]
            options[key] = (
                tuple(parse(t, get_args(hint)[0], key) for t in texts) if many else parse(texts[0], hint, key)
            )
    for key, value in settings.items():
        settings[key] = check(value, hint_of(key, hints, "config file"), key)
    return cls(**(settings | options))


def read_config_file(name: str) -> dict:
    """What a config file assigns. Looked for in the folder configs/ beside this file, then as given."""
    path = next((p for p in (Path(__file__).parent / "configs" / name, Path(name)) if p.is_file()), None)
    if path is None:
        known = sorted(p.name for p in (Path(__file__).parent / "configs").glob("*.py"))
        fail(f"--config {name}: no such file here or in configs/, which has {', '.join(known)}")
    try:
        found = runpy.run_path(str(path))
    except (ValueError, OSError) as error:  # of a dataset that it opens
        fail(f"--config {name}: {error}")
    return {k: v for k, v in found.items() if k[0] != "_" and not inspect.ismodule(v) and not inspect.isroutine(v)
            and not inspect.isclass(v)}  # fmt: skip


def hint_of(key: str, hints: dict, where: str):
    if key not in hints:
        near = difflib.get_close_matches(key, hints, 1)
        fail(f"{where}: unknown option {key!r}" + (f", did you mean {near[0]!r}?" if near else "; --help lists them"))
    return hints[key]


def parse(text: str, hint, key: str):
    """The text of an option as a value of its type."""
    if hint is str:
        return text
    if hint is bool:
        text = {"true": "True", "false": "False", "1": "True", "0": "False"}.get(text.lower(), text)
    try:
        value = literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    return check(value, hint, key)


def check(value, hint, key: str):
    """The value, if it is of the field's type; an int will do for a float."""
    kinds = tuple(
        get_origin(kind) or kind for kind in (get_args(hint) if get_origin(hint) is not tuple else ()) or [hint]
    )
    if type(value) is int and float in kinds and int not in kinds:
        return float(value)
    if Any in kinds or type(value) in kinds or (value is None and NoneType in kinds):
        return value
    fail(f"{key} must be {getattr(hint, '__name__', hint)}, got {value!r}")
