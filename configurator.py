"""
Settings of a script: a dataclass holds the defaults, a Python file overrides them, the command line has the last word.

    python train.py --config bridge.py --lr 1e-4 --image_aug False
    python train.py --config bridge.py --help       # all options, with the values that hold

A config file is plain Python: the file as given, or else the one of configs/. It assigns fields of the dataclass, at
least one; imported modules, classes and functions do not count, nor does a _private name. Unknown names, wrong types
and what is no assignment (`lr: 0.1`) end the program. A text that begins with ~ begins with the home folder.

The dataclass is also the text of --help, by its comments:

    @dataclass
    class Config:
        # Data: a comment that starts a paragraph is the title of a group
        data_root_dir: str = ""  # a comment behind a field, or between two fields, says what the field is
"""

import ast
import dataclasses
import difflib
import inspect
import io
import os
import runpy
import sys
import textwrap
import tokenize
import traceback
from pathlib import Path
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

CONFIGS = Path(__file__).parent / "configs"
MAX_MESSAGE = 3000  # characters of an error message

HOW_TO_GIVE_OPTIONS = """
Options are given as --name value; --name alone turns a True/False option on. Below, each stands with the value that
holds if you do not give it. --config FILE.py sets options by a Python file, which is looked for as given and then in
configs/; the command line has the last word.
"""
HELP_WIDTH = 100  # columns
MAX_COMMENT_COLUMN = 38  # comments of longer options start on the next line
MAX_VALUE_WIDTH = 60  # of a list or dict; longer ones are cut

# Options of the official scripts (openvla, openvla-oft) -> what they are called here, the first that a script has
OFFICIAL_NAMES = {
    "vla_path": ("base_checkpoint", "checkpoint"),
    "openvla_path": ("checkpoint",),
    "pretrained_checkpoint": ("checkpoint", "base_checkpoint"),
    "dataset_name": ("data_mix",),
    "run_root_dir": ("run_dir",),
    "learning_rate": ("lr",),
    "grad_accumulation_steps": ("micro_batch_size",),
    "max_grad_norm": ("grad_clip",),
    "num_steps_before_decay": ("decay_step",),
    "lr_warmup_steps": ("warmup_steps",),
    "save_steps": ("save_every",),
    "save_freq": ("save_every",),
    "save_interval": ("save_every",),
    "val_freq": ("val_every",),
    "use_quantization": ("quantize_base",),
    "use_l1_regression": ("head",),
    "use_diffusion": ("head",),
    "use_film": ("film",),
    "num_images_in_input": ("views",),
    "wandb_project": ("wandb",),
    "task_suite_name": ("task_suite",),
    "num_trials_per_task": ("trials",),
    "num_open_loop_steps": ("open_loop",),
    "local_log_dir": ("out",),
}


def fail(message) -> NoReturn:
    """Print one clear message and end the program with exit code 2: for what the user can fix."""
    text = str(message)
    if len(text) > MAX_MESSAGE:  # it names a value of a file, which can be of any length
        text = f"{text[: MAX_MESSAGE // 2]} ... {text[-MAX_MESSAGE // 2 :]}"
    print(f"error: {text}", file=sys.stderr)
    raise SystemExit(2)


def configure(cls: type, argv: list[str] | None = None, skip_unknown: bool = False):
    """
    Return an instance of the dataclass `cls`, filled from its defaults, config files and the command line.

    argv: the words of the command line; None: those of this program. skip_unknown: leave out what a config file assigns
    beyond the fields of `cls`, because the file is for another script, too. Ends the program after --help (exit code
    0), and with a message for options that do not fit (exit code 2).
    """
    words = list(sys.argv[1:] if argv is None else argv)
    wants_help = "-h" in words or "--help" in words
    words = [word for word in words if word not in ("-h", "--help")]
    hints = get_type_hints(cls)
    options, stray_words = split_options(words, hints)

    # Config files, in their order: later ones win.
    settings = {}
    for name, texts in options:
        if name == "config":
            settings.update(read_config_file(texts[0] if texts else ""))
    if skip_unknown:
        settings = {name: value for name, value in settings.items() if name in hints}
    for name, value in settings.items():
        settings[name] = check(value, hint_of(name, hints, "config file"), name)

    if wants_help:
        print(help_text(cls, settings))
        raise SystemExit(0)

    # The command line.
    if stray_words:
        fail(f"{stray_words[0]!r}: options are written --name value")
    for name, texts in options:
        if name != "config":
            hint = hint_of(name, hints, "command line")
            settings[name] = parse_texts(texts, hint, name)
    return cls(**{name: expand_home(value) for name, value in settings.items()})


# -----------------------------------------------------------------------------
# Command line and config files


def split_options(words: list[str], hints: dict) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """
    Return the options, each with the texts that follow it, and the words that belong to no option.

        --lr=1 --image a.png b.png c  ->  [("lr", ["1"]), ("image", ["a.png", "b.png", "c"])], []

    An option takes one text, or all up to the next option if its field is a tuple.
    """
    options = []
    stray_words = []
    room = 0  # how many texts the last option still takes
    for word in words:
        if word.startswith("--"):
            name, equals, text = word.removeprefix("--").partition("=")
            if equals:
                options.append((name, [text]))
                room = 0
            else:
                is_tuple = get_origin(hints.get(name)) is tuple
                options.append((name, []))
                room = len(words) if is_tuple else 1
        elif room > 0:
            _, texts = options[-1]
            texts.append(word)
            room -= 1
        else:
            stray_words.append(word)
    return options, stray_words


def read_config_file(name: str) -> dict:
    """Return what a config file assigns. Ends the program if it is none, fails, or assigns nothing."""
    path = find_config_file(name)
    check_assignments(path)
    try:
        assigned = runpy.run_path(str(path))
    except (ValueError, OSError) as error:  # of a dataset that it opens
        fail(f"--config {name}: {error}")
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        place = f", line {lines[-1]}" if lines else ""
        fail(f"--config {path}{place}: {type(error).__name__}: {error}")

    settings = {key: value for key, value in assigned.items() if is_setting(key, value)}
    if not settings:
        fail(f"--config {path}: assigns no option; write lines such as lr = 1e-4")
    return settings


def find_config_file(name: str) -> Path:
    """Return the file as given, or else the one of that name in configs/. Says which, if there are both."""
    if not name:
        fail("--config needs a file, such as --config bridge.py")
    given = Path(name).expanduser()
    shipped = CONFIGS / name
    is_shipped = shipped.is_file() and "/" not in name and os.sep not in name
    if given.is_file():
        if is_shipped and not shipped.samefile(given):
            print(f"--config {name}: the file {given.absolute()} is taken, not {shipped}", file=sys.stderr)
        return given
    if is_shipped:
        return shipped
    known = sorted(config.name for config in CONFIGS.glob("*.py"))
    fail(f"--config {name}: no such file here or in configs/, which has {', '.join(known)}")


def check_assignments(path: Path):
    """End the program if a config file is no Python (YAML, for example), or has `lr: 0.1` where lr = 0.1 is meant."""
    if path.suffix in (".yaml", ".yml", ".json", ".toml"):
        fail(f"--config {path}: a config file is Python, lines such as lr = 1e-4; this is a {path.suffix} file")
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError) as error:
        fail(f"--config {path}: is no Python ({error}); a config file has lines such as lr = 1e-4")
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and node.value is None:
            name = ast.unparse(node.target)
            value = ast.unparse(node.annotation)
            fail(f"--config {path}, line {node.lineno}: `{name}: {value}` assigns nothing; write {name} = {value}")


def is_setting(name: str, value) -> bool:
    """Return whether a name of a config file is meant as an option: not what it imports, defines or calls _private."""
    if name.startswith("_"):
        return False
    return not (inspect.ismodule(value) or inspect.isclass(value) or inspect.isroutine(value))


# -----------------------------------------------------------------------------
# Names and types


def hint_of(name: str, hints: dict, source: str):
    """Return the type of a field. Ends the program if there is no such field; suggests one that is spelled like it."""
    if name in hints:
        return hints[name]
    similar = difflib.get_close_matches(name, hints, n=1)
    ours = official_name(name, hints)
    if ours:
        advice = f": here it is --{ours}"
    elif similar:
        advice = f", did you mean {similar[0]!r}?"
    else:
        advice = "; --help lists them"
    fail(f"{source}: unknown option {name!r}{advice}")


def official_name(name: str, hints: dict) -> str:
    """Return which field of this script an option of the official scripts is, also --vla.NAME; "" if none."""
    last_part = name.rpartition(".")[2]
    names = (last_part, *OFFICIAL_NAMES.get(last_part, ()))
    return next((candidate for candidate in names if candidate in hints), "")


def parse_texts(texts: list[str], hint, name: str):
    """Return what follows an option on the command line as a value of the field's type."""
    if not texts and bool in allowed_types(hint):
        texts = ["True"]
    if not texts:
        fail(f'--{name} needs a value; is a variable of the shell empty? Nothing is --{name} ""')
    if get_origin(hint) is tuple:
        element = get_args(hint)[0]
        return tuple(parse(text, element, name) for text in texts)
    return parse(texts[0], hint, name)


def parse(text: str, hint, name: str):
    """Return a text as a value of the type `hint`."""
    if hint is str:
        return text
    if hint is bool:
        spellings = {"true": "True", "false": "False", "1": "True", "0": "False"}
        text = spellings.get(text.lower(), text)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    return check(value, hint, name)


def check(value, hint, name: str):
    """Return the value, if it is of the type `hint`; an int is taken for a float. Ends the program if it is not."""
    allowed = allowed_types(hint)
    if type(value) is int and float in allowed and int not in allowed:
        return float(value)
    if Any in allowed or type(value) in allowed:
        return value
    fail(f"{name} must be {getattr(hint, '__name__', hint)}, got {value!r}")


def expand_home(value):
    """Return a value with ~ at the beginning of a text, or of texts of a tuple, as the home folder."""
    if isinstance(value, str) and value.startswith("~"):
        return os.path.expanduser(value)
    if isinstance(value, tuple):
        return tuple(expand_home(element) for element in value)
    return value


def allowed_types(hint) -> list:
    """Return the types that a hint stands for: `int | None` -> [int, NoneType], `tuple[str, ...]` -> [tuple]."""
    is_union = get_origin(hint) in (Union, UnionType)
    members = get_args(hint) if is_union else [hint]
    return [get_origin(member) or member for member in members]


# -----------------------------------------------------------------------------
# Help: one list of all fields, whichever class of the chain has them


def help_text(cls: type, settings: dict) -> str:
    """
    Return the docstring of the script, and its options in groups, each with its value and its comment.
    settings: values that config files set; the others are the defaults of the dataclass.
    """
    groups = group_options(cls, settings)
    longest = 0
    for group in groups.values():
        for option, _ in group:
            longest = max(longest, len(option))
    column = min(longest + 2, MAX_COMMENT_COLUMN)

    docstring = inspect.getdoc(inspect.getmodule(cls)) or ""
    paragraphs = [docstring, textwrap.fill(HOW_TO_GIVE_OPTIONS.strip(), HELP_WIDTH)]
    for title, group in groups.items():
        lines = [title] if title else []
        for option, comment in group:
            lines.append(option_lines(option, comment, column))
        paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs)


def group_options(cls: type, settings: dict) -> dict[str, list[tuple[str, str]]]:
    """
    Return title of a group -> its options as ("  --name value", comment).

    A field that derived classes define again stays in the group of the class that defined it first. Its comment is that
    of the class that commented it last.
    """
    titles = {}
    comments = {}
    for base in reversed(cls.__mro__):  # derived classes come after those that they derive from
        if dataclasses.is_dataclass(base):
            base_titles, base_comments = read_comments(base)
            titles = {**base_titles, **titles}
            comments = {**comments, **base_comments}

    groups = {}
    for field in dataclasses.fields(cls):
        value = settings[field.name] if field.name in settings else default_of(field)
        option = f"  --{field.name} {value_text(value)}"
        group = groups.setdefault(titles[field.name], [])
        group.append((option, comments.get(field.name, "")))
    return groups


def read_comments(cls: type) -> tuple[dict[str, str], dict[str, str]]:
    """
    Return the title of the group and the comment of each field that the source of this class defines. A field without a
    comment is missing from the second dict.
    """
    source = textwrap.dedent(inspect.getsource(cls))
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comment_at = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    class_node = ast.parse(source).body[0]

    titles = {}
    comments = {}
    title = ""
    previous_end = class_node.lineno  # last line of the field before
    for node in class_node.body:
        if not isinstance(node, ast.AnnAssign):
            continue
        name = node.target.id
        lines_above = [line for line in range(previous_end + 1, node.lineno) if line in comment_at]
        lines_behind = [line for line in range(node.lineno, node.end_lineno + 1) if line in comment_at]

        # Directly below another field, comments are of this field. With a blank line between, they are a title.
        is_title = lines_above and (not titles or lines_above[0] > previous_end + 1)
        if is_title:
            title = " ".join(comment_at[line] for line in lines_above)
            lines_above = []
        titles[name] = title
        comment = " ".join(comment_at[line] for line in lines_above + lines_behind)
        if comment:
            comments[name] = comment
        previous_end = node.end_lineno
    return titles, comments


def default_of(field: dataclasses.Field):
    """Return the default of a field, or MISSING."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def value_text(value) -> str:
    """Return a value as it is written on the command line."""
    if value is dataclasses.MISSING:
        return "(must be given)"
    if isinstance(value, str):
        needs_quotes = value == "" or " " in value
        return f'"{value}"' if needs_quotes else value
    if isinstance(value, tuple) and value:
        return " ".join(value_text(element) for element in value)
    text = repr(value)
    if len(text) > MAX_VALUE_WIDTH:
        text = text[: MAX_VALUE_WIDTH - 3] + "..."
    return text


def option_lines(option: str, comment: str, column: int) -> str:
    """Return an option with its comment, which is wrapped in a column of its own."""
    if not comment:
        return option
    lines = textwrap.wrap(comment, HELP_WIDTH - column, break_on_hyphens=False)
    if len(option) + 2 > column:
        lines.insert(0, option)  # too long: the comment starts below it
    else:
        lines[0] = option.ljust(column) + lines[0]
    return f"\n{' ' * column}".join(lines)
