"""Plain values: frozen, compared with ``==``, read and written as JSON or TOML, strict about every key.

All words of the house (spec, plan, budget, settings) are a `Node`. No torch here: ``vitrim explain`` answers at once.
"""

import contextlib
import difflib
import json
import os
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from vitrim.words.errors import RecipeError, VitrimError

__all__ = [
    "Node",
    "check_place",
    "did_you_mean",
    "dump",
    "load",
    "read_json",
    "read_toml",
    "write_json",
    "write_text",
    "writing",
]

T = TypeVar("T", bound="Node")

NONE = "none"


class Node(BaseModel):
    """A frozen value with named fields; an unknown field is an error.

    Where the default of a field is itself a node, a table given for that field is laid over this default, at every
    depth: what the table does not name keeps the value of the field's default, not that of the inner class. A table
    that names another kind of a union than the default's (field `kind`) is taken by itself. Lists are never merged, nor
    are tables of free keys (``dict`` fields). A whole dump names every key, so that it reads as itself. Where a field
    may be None, ``"none"`` stands for it.
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
    """The value of a field as it was meant: a table over the field's default, ``"none"`` where None may stand."""
    field = kind.model_fields.get(name)
    if field is None:
        return value
    if isinstance(value, str):
        # TOML has no word for None.
        return None if value == NONE and type(None) in get_args(field.annotation) else value
    return _overlaid(field.default, value) if isinstance(field.default, Node) else value


def _overlaid(default: Node, given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `default` with those of `given` in their place, at every depth; nothing is validated here."""
    fields = type(default).model_fields
    if "kind" in fields and "kind" in given and given["kind"] not in get_args(fields["kind"].annotation):
        return dict(given)  # another kind of a union
    whole = {name: getattr(default, name) for name in fields}
    for name, value in given.items():
        mine = whole.get(name)
        whole[name] = _overlaid(mine, value) if isinstance(mine, Node) and isinstance(value, Mapping) else value
    return whole


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return ``"; did you mean 'near'?"``, or the list of options where none is near."""
    known = sorted(options)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean '{near[0]}'?"
    return f"; known are {', '.join(known)}" if known else ""


def dump(node: Node) -> dict[str, Any]:
    """Return `node` as plain JSON values; `load` is its inverse."""
    return node.model_dump(mode="json")


def load(kind: type[T], data: Any, error: type[VitrimError] = RecipeError, at: str = "$") -> T:
    """Read a `kind` from plain values.

    Args:
        kind: the class of node to read.
        data: what `dump` returned, or what a JSON or TOML file held.
        error: the class of error to raise.
        at: path of `data` inside its file, for messages.

    Raises:
        error: naming the path, what must hold, what came, and the near field name.
    """
    try:
        return kind.model_validate(data)
    except ValidationError as problem:
        raise error(_sentence(kind, problem, at)) from None


def _sentence(kind: type[Node], problem: ValidationError, at: str) -> str:
    first = problem.errors(include_url=False)[0]
    *outer, last = [str(part) for part in first["loc"]] or [""]
    owner, way = _owner(kind, outer)
    if first["type"] == "extra_forbidden":
        near = did_you_mean(last, owner.model_fields)
        return f"{'.'.join([at, *way])}: {owner.__name__.strip('_')} has no field '{last}'{near}"
    path = ".".join([at, *way, last]).rstrip(".")
    if first["type"] == "missing":
        return f"{path}: this field is required, but it is missing"
    if first["type"] == "model_type":
        return f"{path}: this must be a table of names and values, but got {first['input']!r}"
    text = first["msg"].removeprefix("Value error, ")
    text = text[:1].lower() + text[1:]
    came = "" if first["type"] == "value_error" else f", but got {first['input']!r}"
    return f"{path}: {text}{came}"


def _owner(kind: type[Node], place: list[str]) -> tuple[type[Node], list[str]]:
    """The node class at `place` and the way to it, without the tags by which pydantic tells kinds of nodes apart."""
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
        inner = [t for t in _types(field.annotation) if isinstance(t, type) and issubclass(t, Node)]
        choices = {t.model_fields["kind"].default: t for t in inner if len(inner) > 1}
        owner = inner[0] if inner else owner
    return owner, way


def _types(annotation: Any) -> Iterator[Any]:
    arguments = getattr(annotation, "__args__", ())
    if not arguments or (isinstance(annotation, type) and not hasattr(annotation, "__origin__")):
        yield annotation
    for argument in arguments:
        yield from _types(argument)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, and rename it to `path` when the block ends well.

    A reader therefore sees the old file or the new one, never half of one; a failed block leaves nothing behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    beside = Path(name)
    try:
        yield beside
        # Last, for a writer may have put a private file of its own in place.
        beside.chmod(0o644)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def check_place(path: Path, error: type[VitrimError] = RecipeError) -> None:
    """Refuse a file that could not be written, before the work whose result is to lie there.

    Folders that are missing are no reason, `writing` makes them.

    Raises:
        error: naming the place.
    """
    place = path.absolute()
    if place.is_dir():
        raise error(f"{path}: a file must be named to write to, but this is a folder; name a file in it")
    above = next(folder for folder in place.parents if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as problem:
        reason = (problem.strerror or str(problem)).lower()
        raise error(f"{path}: the place must be writable, but is not: {reason}; choose another place") from None


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in one step."""
    with writing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write plain values to `path` as JSON in one step."""
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def read_json(path: Path, error: type[VitrimError] = RecipeError) -> Any:
    """Read a JSON file; `error` names the file and the line that is wrong."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path}: the file must exist, but it does not") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise error(f"{path}: the file must be readable, but {problem}") from None
    except json.JSONDecodeError as problem:
        raise error(f"{path}: the file must be JSON, but line {problem.lineno} is not: {problem.msg}") from None


def read_toml(path: Path, error: type[VitrimError] = RecipeError) -> dict[str, Any]:
    """Read a TOML file; `error` names the file and the place that is wrong."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise error(f"{path}: the file must exist, but it does not") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise error(f"{path}: the file must be readable, but {problem}") from None
    except tomllib.TOMLDecodeError as problem:
        raise error(f"{path}: the file must be TOML, but {problem}") from None
