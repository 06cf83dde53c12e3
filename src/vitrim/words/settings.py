"""Describe the settings of a node: names, types, defaults, and meanings from its docstring. Does not import torch."""

import inspect
import re
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from vitrim.words.plain import NONE, Node, dump

__all__ = ["Setting", "settings_of"]


class Setting(NamedTuple):
    """One setting, as text. `name` is what ``--set`` takes after the table, such as ``train.lr``."""

    name: str
    kind: str
    default: str
    meaning: str


def settings_of(kind: type[Node], default: Node | None = None, at: str = "") -> list[Setting]:
    """Return the settings of a class of nodes, those of nodes within it after the setting that holds them.

    Args:
        kind: the class.
        default: an instance whose values are the defaults, if they are not those of the class.
        at: what comes before each name.
    """
    meanings = _meanings(kind)
    found: list[Setting] = []
    for name, field in kind.model_fields.items():
        value = getattr(default, name) if default is not None else field.get_default(call_default_factory=True)
        if isinstance(value, Node):
            found.append(Setting(f"{at}{name}", "table", "", meanings.get(name, "")))
            found += settings_of(type(value), value, f"{at}{name}.")
        else:
            found.append(Setting(f"{at}{name}", _kind(field), _value(value), meanings.get(name, "")))
    return found


def _value(value: Any) -> str:
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return NONE
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    return str(dump(value)) if isinstance(value, Node) else str(value)


def _kind(field: FieldInfo) -> str:
    """Return the type of a field in words, with its range: ``number >= 0``, ``one of a, b``."""
    return _spoken(field.annotation, list(field.metadata))


def _spoken(kind: Any, limits: list[Any]) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _spoken(inner[0], [*inner[1:], *limits])
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_spoken(part, limits if part is not type(None) else []) for part in inner))
    if origin in (tuple, list):
        parts = [part for part in inner if part is not Ellipsis]
        return f"list of {_spoken(parts[0], limits)}" if parts else "list"
    if origin is dict or kind is dict:
        return "table"
    names = {bool: "true or false", int: "whole number", float: "number", str: "text", type(None): NONE}
    text = names.get(kind, getattr(kind, "__name__", str(kind)))
    return text + (_range(limits) if kind in (int, float) else "")


def _range(limits: list[Any]) -> str:
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    # A constraint is one of annotated_types, or a field that holds several.
    flat = [part for limit in limits for part in getattr(limit, "metadata", None) or [limit]]
    told = [f"{sign} {_value(value)}" for name, sign in signs.items() for part in flat
            if (value := getattr(part, name, None)) is not None]  # fmt: skip
    return f" {', '.join(dict.fromkeys(told))}" if told else ""


def _meanings(kind: type[Node]) -> dict[str, str]:
    """Return what the docstrings of a class and its bases say of each field in their section ``Attributes``."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if issubclass(base, Node) and base is not Node and base.__doc__:
            for names, meaning in _attributes(inspect.cleandoc(base.__doc__)):
                found |= dict.fromkeys((name.strip() for name in names.split(",")), meaning)
    return found


def _attributes(doc: str) -> Iterator[tuple[str, str]]:
    lines = doc.splitlines()
    start = next((index for index, line in enumerate(lines) if line.strip() == "Attributes:"), len(lines))
    names, words = "", list[str]()
    for line in [*lines[start + 1 :], "end"]:
        if line and not line.startswith(" "):
            break
        entry = re.fullmatch(r" {4}([\w, ]+): (.*)", line)
        if entry is None:
            words.append(line.strip())
            continue
        if names:
            yield names, _flat(words)
        names, words = entry[1], [entry[2]]
    if names:
        yield names, _flat(words)


def _flat(words: list[str]) -> str:
    return " ".join(word for word in words if word).replace("``", "`").replace("`", "")
