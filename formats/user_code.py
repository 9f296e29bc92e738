"""
What a function of the user is made of, as a fingerprint: it changes when the results of the function may change.

An index holds what a standardise function made of the data. If the function, or anything that it uses, is edited later,
the index is stale. For instance, of `scaled` in a config file that has

    SCALE = 0.001

    def in_metres(action):
        return action * SCALE

    def scaled(trajectory):
        return {**trajectory, "action": in_metres(trajectory["action"])}

the fingerprint covers both functions and 0.001. It follows functions and values through other files, closures, default
arguments, functools.partial, methods and objects. Code of installed packages counts by its name only.

What cannot be followed, such as an open file or a lock, is refused: nobody could tell whether the index still fits.
"""

import dis
import functools
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType

import numpy as np

# Where Python and installed packages are. Their code is not looked into.
PYTHON = str(Path(sysconfig.get_path("stdlib")).resolve())
PACKAGES = {"site-packages", "dist-packages"}

PLAIN = (type(None), type(Ellipsis), bool, int, float, complex, str, bytes, range)


def fingerprint_of(function: Callable, purpose: str) -> str:
    """
    Return 64 hex digits that change with the source of a function and of all that it uses.

    purpose: "standardize" or "keep_frames", for the message. Raises ValueError if it uses something that cannot be
    followed.
    """
    digest = hashlib.sha256()
    walk = Walk()
    try:
        for part in walk.parts_of(function):
            digest.update(f"{len(part)}:{part};".encode("utf-8", "surrogatepass"))
    except Exception as error:  # objects that cannot be copied raise what they like
        name = str(getattr(function, "__qualname__", function))
        raise ValueError(
            f"{purpose}={name:.80}: it uses {walk.place or 'what'}, which cannot be compared with that of a later run, "
            f"so a change would go unnoticed ({error!s:.120}); let it use numbers, texts, arrays and functions, and "
            "open files inside the function"
        ) from None
    return digest.hexdigest()


class Walk:
    """One walk through all that a function uses. Each object is looked into once."""

    def __init__(self):
        self.seen = {}  # id -> (number in the order of the walk, the object, which so keeps its id)
        self.place = ""  # what is looked into now, for messages

    def parts_of(self, value) -> Iterator[str]:
        """Yield texts that together say what a value is. They are the same in each process."""
        if isinstance(value, PLAIN):
            yield f"{type(value).__name__} {value!r}"
            return
        if id(value) in self.seen:
            yield f"seen {self.seen[id(value)][0]}"
            return
        self.seen[id(value)] = (len(self.seen), value)

        if isinstance(value, FunctionType):
            yield from self.parts_of_function(value)
        elif isinstance(value, type):
            yield from self.parts_of_class(value)
        elif isinstance(value, ModuleType):
            yield f"module {value.__name__}"
        elif isinstance(value, MethodType):
            yield from self.parts_of_all("method", value.__func__, value.__self__)
        elif isinstance(value, staticmethod | classmethod):
            yield from self.parts_of_all("method", value.__func__)
        elif isinstance(value, property):
            yield from self.parts_of_all("property", value.fget, value.fset)
        elif isinstance(value, functools.partial):
            yield from self.parts_of_all("partial", value.func, value.args, value.keywords)
        elif isinstance(value, functools.cached_property):
            yield from self.parts_of_all("property", value.func)
        elif isinstance(value, list | tuple):
            yield from self.parts_of_all(f"{type(value).__name__} of {len(value)}", *value)
        elif isinstance(value, dict):
            yield from self.parts_of_all(f"dict of {len(value)}", *value.keys(), *value.values())
        elif isinstance(value, set | frozenset):
            yield from sorted("".join(Walk().parts_of(element)) for element in value)
        elif isinstance(value, np.ndarray) and not value.dtype.hasobject:
            yield f"array {value.dtype.str} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
        elif type(value).__module__ == "torch" and type(value).__name__ == "Tensor":  # its copies are not all alike
            yield from self.parts_of_all("tensor", value.numpy(force=True))
        elif isinstance(value, re.Pattern):
            yield f"pattern {value.pattern!r} {value.flags}"
        elif callable(getattr(value, "__wrapped__", None)):  # functools.cache and its like
            yield from self.parts_of_all("wrapped", value.__wrapped__)
        elif isinstance(value, BuiltinFunctionType | np.ufunc):
            yield f"builtin {getattr(value, '__module__', '')}.{value.__name__}"
        else:
            yield from self.parts_of_object(value)

    def parts_of_all(self, kind: str, *values) -> Iterator[str]:
        yield kind
        for value in values:
            yield from self.parts_of(value)

    def parts_of_named(self, name: str, value) -> Iterator[str]:
        """Yield the parts of a value that has a name in the user's code."""
        self.place = f"{name} ({type(value).__name__})"
        yield name
        yield from self.parts_of(value)

    def parts_of_object(self, value) -> Iterator[str]:
        """Yield the parts of any other object: of what a copy of it would be made from."""
        yield from self.parts_of(type(value))
        reduced = value.__reduce_ex__(4)
        if isinstance(reduced, str):
            yield reduced
            return
        _, *content = reduced
        for part in content:
            if isinstance(part, Iterator):  # what it holds, of a list or a dict
                part = list(part)
            yield from self.parts_of(part)

    def parts_of_class(self, cls: type) -> Iterator[str]:
        yield f"class {cls.__qualname__}"
        if is_installed_module(cls.__module__):
            yield cls.__module__
            return
        for base in cls.__bases__:
            yield from self.parts_of(base)
        for name, member in vars(cls).items():
            is_code = isinstance(member, FunctionType | staticmethod | classmethod | property)
            is_made_by_python = name.startswith(("__", "_abc_")) or inspect.isdatadescriptor(member)
            if is_code or not is_made_by_python:
                yield from self.parts_of_named(name, member)

    def parts_of_function(self, function: FunctionType) -> Iterator[str]:
        """Yield the source of a function, and the parts of what it uses."""
        if is_installed(function.__code__.co_filename):
            yield f"function {function.__module__}.{function.__qualname__}"
            yield from self.parts_of(getattr(function, "__wrapped__", None))  # what it decorates
            return
        yield source_of(function.__code__)
        yield from self.parts_of_all("defaults", function.__defaults__, function.__kwdefaults__)
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        for name, cell in cells:
            yield from self.parts_of_named(name, content_of(cell))

        names = names_in(function.__code__)
        for name in names["globals"]:
            if name in function.__globals__:
                value = function.__globals__[name]
                yield from self.parts_of_named(name, value)
                yield from self.parts_in_module(value, names["attributes"])
        for name, level in names["imports"]:
            module = import_users_module(name, level, function.__globals__.get("__package__"))
            yield from self.parts_in_module(module, names["attributes"])

    def parts_in_module(self, module, attributes: list[str]) -> Iterator[str]:
        """Yield the parts of what code with these names in it may use of a module of the user, and of its modules."""
        waiting = [module]
        done = set()
        while waiting:
            module = waiting.pop()
            if not isinstance(module, ModuleType) or module.__name__ in done or is_installed_module(module.__name__):
                continue
            done.add(module.__name__)
            for name in attributes:
                if name in vars(module):
                    value = vars(module)[name]
                    yield from self.parts_of_named(f"{module.__name__}.{name}", value)
                    waiting.append(value)


# -----------------------------------------------------------------------------
# Code


def source_of(code: CodeType) -> str:
    """Return the source of a piece of code; its byte code if there is no file with it."""
    try:
        return inspect.getsource(code)
    except (OSError, TypeError, IndexError):
        constants = [constant for constant in code.co_consts if not inspect.iscode(constant)]
        inner = [source_of(constant) for constant in code.co_consts if inspect.iscode(constant)]
        parts = Walk().parts_of_all(code.co_name, code.co_code, code.co_names, constants, inner)
        return " ".join(parts)


def content_of(cell):
    """Return the value of a variable of the function around; None if it has none yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def names_in(code: CodeType) -> dict[str, list]:
    """
    Return the names in the byte code of a function and of the functions inside it: of globals; of imported modules,
    each with its number of dots in front; and of what may be attributes of modules, as in getattr(module, "name").
    """
    names = {"globals": {}, "imports": {}, "attributes": {}}  # dicts keep the order
    waiting = [code]
    while waiting:
        code = waiting.pop()
        arguments = []
        for instruction in dis.get_instructions(code):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                names["globals"][instruction.argval] = None
            elif instruction.opname == "IMPORT_NAME":  # it follows those that load the dots and the imported names
                names["imports"][instruction.argval, arguments[-2]] = None
            arguments.append(instruction.argval)
        names["attributes"].update(dict.fromkeys(code.co_names))
        for constant in code.co_consts:
            if inspect.iscode(constant):
                waiting.append(constant)
            elif isinstance(constant, str):
                names["attributes"][constant] = None
    return {kind: list(group) for kind, group in names.items()}


def is_installed(file: str) -> bool:
    """Return True for files of Python and of installed packages, False for those of the user."""
    if file.startswith("<frozen"):
        return True
    path = Path(file).resolve()
    return path.is_relative_to(PYTHON) or not PACKAGES.isdisjoint(path.parts)


@functools.cache
def is_installed_module(name: str) -> bool:
    """Return True for modules of Python and of installed packages. A file that is run, not imported, is the user's."""
    module = sys.modules.get(name)
    if module is None or name in ("__main__", "__mp_main__"):
        return False
    file = getattr(module, "__file__", None)
    if file is None:
        is_folder = hasattr(module, "__path__")
        return not is_folder  # built into Python
    return is_installed(file)


def import_users_module(name: str, dots: int, package: str | None) -> ModuleType | None:
    """Return the module that a function imports when it runs; None for one of an installed package."""
    try:
        if dots:
            name = importlib.util.resolve_name("." * dots + name, package)
        spec = importlib.util.find_spec(name.partition(".")[0])
        if spec is None:
            return None
        is_folder = spec.origin is None
        is_users_file = not is_folder and Path(spec.origin).is_file() and not is_installed(spec.origin)
        return importlib.import_module(name) if is_folder or is_users_file else None
    except (ImportError, ValueError):
        return None
