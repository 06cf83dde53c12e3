"""Where methods come from: this package, entry points of other packages, a file given by its path, or a program.

A method of another author is recorded with a digest of its source, and a run resumes only with the same source.
"""

import hashlib
import importlib
import importlib.util
import inspect
import os
import pkgutil
import sys
import traceback
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vitrim.methods._contract import Method
from vitrim.methods._digest import digest_of, files_of
from vitrim.words.entries import Entry, entries
from vitrim.words.errors import MethodError
from vitrim.words.plain import Node, did_you_mean, dump, is_file, load, raised

__all__ = ["Origin", "is_path", "make", "names", "origin", "origin_of", "why_not_a_method"]

GROUP = "vitrim.methods"

NEEDS = ("nothing", "images", "labels")

RESERVED = ("name", "source")
"""Keys of the table ``[method]`` of a recipe that are not settings."""

_PACKAGE = "vitrim.methods"
_MEMORY = " in memory)"
"""Suffix of the name of a method that was passed as an instance and cannot be found by name."""

_PATH = "__vitrim_path__"
"""Attribute of a module that was run from a path: the path as it was given."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A method's class and where it comes from.

    Attributes:
        name: its name in a recipe; for a file, its path.
        kind: its class; the fields are the settings.
        where: ``vitrim``, name and version of a distribution, a path, or ``memory``.
        source: a digest of the source; None for methods of vitrim, whose version is recorded elsewhere.
        given: the settings, if an entry point names an instance.
    """

    name: str
    kind: type[Node]
    where: str
    source: str | None = None
    given: Mapping[str, Any] = field(default_factory=dict)


def names() -> list[str]:
    """Names of all installed methods.

    Raises:
        MethodError: if two distributions give the same name.
    """
    own = _own()
    return sorted([*own, *entries(GROUP, own, MethodError)])


def is_path(name: str) -> bool:
    """Whether a method's name is the path of its file."""
    return name.endswith(".py") or "/" in name or os.sep in name


def origin(name: str) -> Origin:
    """Find a method by its name, or by the path of its file (or of a folder with an ``__init__.py``).

    Paths are relative to the working directory. A file is executed again only after its source has changed.

    Raises:
        MethodError: if there is none, if it is not a method, or if two installed distributions give the same name.
    """
    if name.endswith(_MEMORY):
        raise MethodError(
            f"a method must have a name or a file, but {name} was passed as an instance by another program; pass the "
            "same instance to vitrim.compress"
        )
    if is_path(name):
        return _of_file(name)
    own = _own()
    others = entries(GROUP, own, MethodError)
    if name in own:
        return Origin(name=name, kind=importlib.import_module(f"{_PACKAGE}.{name}").Method, where="vitrim")
    if name not in others:
        known = sorted([*own, *others])
        near = f"; did you mean '{name}.py'?" if is_file(f"{name}.py") else did_you_mean(name, known)
        raise MethodError(f"a method must be one of {', '.join(known)} or a .py file, but got '{name}'{near}")
    return _of_entry(others[name])


def make(found: Origin, settings: Mapping[str, Any]) -> Method:
    """Make the method of `found` with `settings`; what is not given keeps its default.

    Raises:
        MethodError: if there is no such setting, or a value does not fit.
    """
    at = found.name if is_path(found.name) else f"method.{found.name}"
    method: Any = load(found.kind, {**found.given, **settings}, MethodError, at=at)
    return method  # type: ignore[no-any-return]


def origin_of(method: Any) -> Origin:
    """Find where the class of a method comes from.

    Its name is one that `origin` accepts, where there is one: that of a method of vitrim or of an entry point, or the
    path of a file that defines the class as ``Method``. For any other class, such as one of a notebook, it is a
    description in parentheses.

    Raises:
        MethodError: if it is not a method.
    """
    if isinstance(method, type):
        raise MethodError(f"a method must be a name or an instance, but got the class {method.__name__}; call it")
    kind = type(method)
    why = why_not_a_method(kind)
    if why is not None:
        raise MethodError(f"{kind.__name__}: {why}")
    own = _own()
    for name in own:
        if kind.__module__ == f"{_PACKAGE}.{name}" and origin(name).kind is kind:
            return origin(name)
    for entry in entries(GROUP, own, MethodError).values():
        if _top(entry.point.module) == _top(kind.__module__) and _of_entry(entry).kind is kind:
            return _of_entry(entry)
    path = _path_of(kind)
    if path is not None:
        return Origin(name=path, kind=kind, where=path, source=digest_of(kind))
    inside = "" if kind.__module__ == "__main__" else f"{kind.__module__}."
    return Origin(name=f"({inside}{kind.__qualname__}{_MEMORY}", kind=kind, where="memory", source=digest_of(kind))


def why_not_a_method(kind: Any) -> str | None:
    """Return why `kind` is not a class of methods, as a sentence; None if it is one."""
    if not isinstance(kind, type) or not issubclass(kind, Node):
        return "a method must be a class derived from vitrim.words.plain.Node, whose fields are its settings"
    lacking = [name for name in ("needs", "sentence", "search") if not hasattr(kind, name)]
    if lacking:
        return f"a method must have needs, sentence and search, but has no {' and no '.join(lacking)}; add it"
    lacking = sorted(getattr(kind, "__abstractmethods__", ()))
    if lacking:
        return f"a method must define {' and '.join(lacking)}, but does not; add it"
    needs, sentence, search = (getattr(kind, name) for name in ("needs", "sentence", "search"))
    if needs not in NEEDS:
        return f"needs must be one of {', '.join(NEEDS)}, but is {needs!r}"
    if not isinstance(sentence, str) or not sentence.strip():
        return f"sentence must say what the method does, but is {sentence!r}"
    taken = [name for name in RESERVED if name in kind.model_fields]
    if taken:
        return f"a setting must not be called {' or '.join(RESERVED)}, but '{taken[0]}' is; rename it"
    try:
        inspect.signature(search).bind(None, None, None, None, seed=0, teacher=None, folder=None, log=None)
    except (TypeError, ValueError) as problem:
        return f"search must take (model, data, budget, *, seed, teacher, folder, log), but {problem}"
    return None


def _own() -> list[str]:
    return [m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]) if not m.name.startswith("_")]


def _top(module: str) -> str:
    return module.partition(".")[0]


def _of_entry(entry: Entry) -> Origin:
    value = entry.load(MethodError)
    kind, given = _read(value, f"{entry.point.value} of {entry.distribution}")
    file = Path(str(getattr(sys.modules[entry.point.module], "__file__", None)))
    source = f"{entry.distribution} {digest_of(kind, *(files_of(file.resolve()) if file.is_file() else ()))}"
    return Origin(name=entry.point.name, kind=kind, where=entry.distribution, source=source, given=given)


def _of_file(name: str) -> Origin:
    try:
        path = Path(name).expanduser()
        file = path / "__init__.py" if path.is_dir() else path
    except (OSError, ValueError, RuntimeError):  # a name that no file can have, or the home of nobody
        file = Path(name)
    if not is_file(file):
        raise MethodError(
            f"{name}: a method's file must exist, but {file.absolute()} does not; relative paths are relative to "
            "the working directory"
        )
    kind, given = _read(_module(file.resolve(), name), name)
    return Origin(name=name, kind=kind, where=name, source=digest_of(kind, *files_of(file.resolve())), given=given)


def _read(value: Any, at: str) -> tuple[type[Node], Mapping[str, Any]]:
    """Return the class and the settings that a module with a ``Method``, a class or an instance gives."""
    if isinstance(value, types.ModuleType):
        value = getattr(value, "Method", None)
        if value is None or value is Method:
            raise MethodError(f"{at}: a method's module must define a class of its own called Method, but does not")
    kind = value if isinstance(value, type) else type(value)
    why = why_not_a_method(kind)
    if why is not None:
        raise MethodError(f"{at}: {why}")
    return kind, {} if isinstance(value, type) else dump(value)


def _module(file: Path, at: str) -> types.ModuleType:
    """Import a file as a module of its own, again only after its source has changed.

    It is compiled from the bytes that were read, since Python tells ``.pyc`` files apart by whole seconds only.
    """
    try:
        code = file.read_bytes()
        state = hashlib.sha256(b" ".join([str(file).encode(), *(part.read_bytes() for part in files_of(file))]))
    except OSError as problem:
        raise MethodError(f"{at}: a method's file must be readable, but {problem}") from None
    name = f"vitrim_method_{state.hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None:
        raise MethodError(f"{at}: a method's file must be Python, but is not called .py; rename it")
    module = importlib.util.module_from_spec(spec)
    setattr(module, _PATH, at)
    sys.modules[name] = module
    try:
        exec(compile(code, str(file), "exec"), module.__dict__)
    # Another author's code may raise anything.
    except (Exception, SystemExit) as problem:
        sys.modules.pop(name)
        raise MethodError(_broken(problem, file, at)) from problem
    return module


def _broken(problem: BaseException, file: Path, at: str) -> str:
    """Return a sentence that says what a file raised, and in which line."""
    lines = [line for name, line in _lines(problem) if Path(name) == file]
    where = f"line {lines[-1]} " if lines else "it "
    return f"{at}: a method's file must run as Python, but {where}raises {raised(problem)}"


def _lines(problem: BaseException) -> list[tuple[str, int | None]]:
    if isinstance(problem, SyntaxError):
        return [(problem.filename or "", problem.lineno)]
    return [(frame.filename, frame.lineno) for frame in traceback.extract_tb(problem.__traceback__)]


def _path_of(kind: type[Node]) -> str | None:
    """A path by which `origin` finds `kind` again; None if there is none."""
    module = sys.modules.get(kind.__module__)
    if module is None or kind.__module__ == "__main__" or getattr(module, "Method", None) is not kind:
        return None
    given: str | None = getattr(module, _PATH, None)
    file = getattr(module, "__file__", None)
    # A module of a package may need the package around it.
    if given is not None or file is None or module.__package__ or not Path(file).is_file():
        return given
    path = Path(file).resolve()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
