"""Frozen values with named fields: compared with ``==``, read and written as JSON or TOML, unknown keys are errors.

Specs, plans, budgets and settings are subclasses of `Node`. This module does not import torch, so that commands that
need no model, such as ``vitrim explain``, start fast.
"""

import contextlib
import difflib
import errno
import json
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator

from vitrim.words.errors import RecipeError, VitrimError
from vitrim.words.parsing import LONGEST_TOML, parse_json, parse_toml, read_regular, shown

__all__ = [
    "Frozen",
    "FrozenDict",
    "Node",
    "check_place",
    "did_you_mean",
    "dump",
    "followed",
    "is_file",
    "load",
    "raised",
    "read_json",
    "read_toml",
    "reason",
    "types_of",
    "why_not_valid",
    "write_json",
    "write_text",
    "writing",
]

T = TypeVar("T", bound="Node")

NONE = "none"

_LONGEST_NAME = 200
"""Characters of a name that is compared with others; comparing takes the square of the length."""

_LONGEST_SENTENCE = 1000


class Node(BaseModel):
    """A frozen value with named fields; an unknown field is an error.

    If the default of a field is itself a node, a table given for that field is merged into this default, at every
    depth: keys that are missing in the table keep the value of the field's default, not the default of the inner
    class. A table that selects another kind of a union than the default (field `kind`) is not merged. Lists and tables
    with free keys (``dict`` fields) are never merged. A full dump contains every key, so reading it gives an equal
    value. If a field may be None, ``"none"`` is read as None.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _lay_over_defaults(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        read = {key: _read(cls, key, value) for key, value in data.items() if isinstance(value, str | Mapping)}
        return {**data, **read} if read else data


def _read(kind: type[Node], name: str, value: Any) -> Any:
    """Return the value to validate: a table merged into the field's default, None for ``"none"`` if None is allowed."""
    field = kind.model_fields.get(name)
    if field is None:
        return value
    if isinstance(value, str):
        # TOML has no value for None.
        return None if value == NONE and type(None) in get_args(field.annotation) else value
    return _overlaid(field.default, value) if isinstance(field.default, Node) else value


def _overlaid(default: Node, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `default`, replaced by those of `given` at every depth; nothing is validated here."""
    fields = type(default).model_fields
    if "kind" in fields and "kind" in given and given["kind"] not in get_args(fields["kind"].annotation):
        return dict(given)  # another kind of a union
    whole = {name: getattr(default, name) for name in fields}
    for name, value in given.items():
        mine = whole.get(name)
        whole[name] = _overlaid(mine, value) if isinstance(mine, Node) and isinstance(value, Mapping) else value
    return whole


class FrozenDict(dict[str, Any]):
    """A table of names and plain values that cannot be changed, so it can be hashed and shared."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("a frozen table cannot be changed; copy it to a dict, change that, and build a new value")

    __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = _refuse

    def __copy__(self) -> "FrozenDict":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "FrozenDict":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenDict, (dict(self),)


def _frozen(value: Any) -> Any:
    """Return the same plain value with lists as tuples and tables as frozen tables, at every depth."""
    if isinstance(value, Mapping):
        return FrozenDict({str(key): _frozen(inner) for key, inner in value.items()})
    return tuple(_frozen(inner) for inner in value) if isinstance(value, list | tuple) else value


Frozen = Annotated[dict[str, Any], AfterValidator(_frozen)]
"""Type of a field that holds a table of plain values, frozen at every depth."""


def reason(problem: BaseException) -> str:
    """Return the first line of an error, at most 200 characters, to be used inside a sentence.

    For an `OSError` it is the cause without the file name, because the sentence names the file.
    """
    if isinstance(problem, OSError) and problem.strerror:
        return problem.strerror.lower()
    lines = (line.strip().rstrip(".") for line in str(problem).splitlines())
    return next((line[:200] for line in lines if line), type(problem).__name__)


def raised(problem: BaseException) -> str:
    """Name an error of another author's code and give the first line of its message, to be used inside a sentence."""
    return f"{type(problem).__name__}, which says {(str(problem).splitlines() or ['nothing more'])[0]}"


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return ``"; did you mean 'near'?"``, or the list of options if none is similar to `name`."""
    known = sorted(options)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6) if len(name) <= _LONGEST_NAME else []
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known are {', '.join(known)}" if known else ""


def dump(node: Node) -> dict[str, Any]:
    """Return `node` as plain JSON values; `load` is its inverse."""
    return node.model_dump(mode="json")


def load(kind: type[T], data: Any, error: type[VitrimError] = RecipeError, at: str = "$") -> T:
    """Read a node of class `kind` from plain values.

    Args:
        kind: the class of node to read.
        data: the result of `dump`, or the contents of a JSON or TOML file.
        error: the class of error to raise.
        at: path of `data` inside its file, for messages.

    Raises:
        error: if the data is not valid. The message names the path, what must hold, what came, and for an unknown
            field a similar field name.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as problem:
        raise error(why_not_valid(kind, problem, at)) from None


def why_not_valid(kind: type[Node], problem: ValidationError, at: str) -> str:
    """Return one sentence about the first validation error of a `kind`.

    Args:
        kind: the class that was validated.
        problem: the error that pydantic raised.
        at: path of the value inside its file, for the sentence.
    """
    first = problem.errors(include_url=False)[0]
    *outer, last = [str(part) for part in first["loc"]] or [""]
    owner, way = _owner(kind, outer)
    if first["type"] == "extra_forbidden":
        near = did_you_mean(last, owner.model_fields)
        return f"{'.'.join([at, *way])}: {owner.__name__.strip('_')} has no field {shown(last)}{near}"
    path = ".".join([at, *way, last]).rstrip(".")
    if first["type"] == "missing":
        return f"{path}: this field is required, but it is missing"
    if first["type"] == "model_type":
        return f"{path}: this must be a table of names and values, but got {shown(first['input'])}"
    text = first["msg"].removeprefix("Value error, ")[:_LONGEST_SENTENCE]
    text = text[:1].lower() + text[1:]
    came = "" if first["type"] == "value_error" else f", but got {shown(first['input'])}"
    return f"{path}: {text}{came}"


def _owner(kind: type[Node], place: list[str]) -> tuple[type[Node], list[str]]:
    """Return the node class at `place` and its path, without the tags that pydantic adds for the kinds of a union."""
    owner = kind
    choices: dict[str, type[Node]] = {}
    way: list[str] = []
    for part in place:
        if part in choices:
            owner, choices = choices[part], {}
            continue
        way.append(part)
        field = owner.model_fields.get(part)
        if field is None:
            continue
        inner = [t for t in types_of(field.annotation) if isinstance(t, type) and issubclass(t, Node)]
        choices = {t.model_fields["kind"].default: t for t in inner if len(inner) > 1}
        owner = inner[0] if inner else owner
    return owner, way


def types_of(annotation: Any) -> Iterator[Any]:
    """Yield the types, and the values of literals, that an annotation is made of, in order."""
    arguments = getattr(annotation, "__args__", ())
    if not arguments or (isinstance(annotation, type) and not hasattr(annotation, "__origin__")):
        yield annotation
    for argument in arguments:
        yield from types_of(argument)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, and rename it to `path` if the block raises nothing.

    A reader therefore sees the old file or the new one, never half of one; a failed block leaves nothing behind. As
    with `open`, a symbolic link is followed, a new file has the mode that the umask of the process leaves, and a file
    that is replaced keeps its mode.

    Raises:
        OSError: if the path cannot be written to.
    """
    path = followed(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    # The operating system applies the umask. Reading the umask would require setting it for all threads for a moment.
    handle = os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        mode = stat.S_IMODE(os.fstat(handle).st_mode)
        os.close(handle)
        with contextlib.suppress(OSError):
            mode = stat.S_IMODE(path.stat().st_mode)
        yield beside
        # The mode is set last because the block may have replaced the temporary file with one of another mode.
        beside.chmod(mode)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def followed(path: Path) -> Path:
    """Return the target of a symbolic link at `path`, which need not exist; return `path` if it is not a link.

    Raises:
        OSError: if the links form a loop.
    """
    if not path.is_symlink():
        return path
    end = Path(os.path.realpath(path))
    if end.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return end


def is_file(path: str | Path) -> bool:
    """Return whether a path names a file; False for a text that no file can be named by, such as one of 300 letters."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def check_place(path: Path, error: type[VitrimError] = RecipeError) -> None:
    """Raise `error` if a file could not be written to `path`; to be called before the work whose result it will hold.

    Missing folders are allowed because `writing` creates them.

    Raises:
        error: if `path` is a folder or cannot be written to; the message names it.
    """
    try:
        place = followed(path.absolute())
        folder = place.is_dir()
        if not folder:
            with tempfile.TemporaryFile(dir=next(above for above in place.parents if above.exists())):
                pass
    except OSError as problem:
        said = reason(problem)
        raise error(f"{path}: the place must be writable, but is not: {said}; choose another place") from None
    if folder:
        raise error(f"{path}: a file must be named to write to, but this is a folder; name a file in it")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with writing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write plain values to `path` as JSON, atomically."""
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def read_json(path: Path, error: type[VitrimError] = RecipeError) -> Any:
    """Read a JSON file; raise `error` with the file and the line if it is not valid."""
    return parse_json(read_regular(path, error), error, str(path))


def read_toml(path: Path, error: type[VitrimError] = RecipeError) -> dict[str, Any]:
    """Read a TOML file; raise `error` with the file and the position if it is not valid."""
    return parse_toml(read_regular(path, error, LONGEST_TOML), error, str(path))
