"""Presets: default settings for a kind of data, overridden by the settings of a recipe or command."""

from collections.abc import Iterator, Mapping
from typing import Any

from vitrim import methods
from vitrim.run.recipe import found_method, merged
from vitrim.run.shipped import path_of
from vitrim.words.errors import RecipeError, VitrimError
from vitrim.words.plain import read_toml

__all__ = ["laid_under", "preset", "remark"]

Keys = tuple[str, ...]


def preset(name: str) -> dict[str, Any]:
    """Return the settings of a preset that comes with the package.

    Raises:
        RecipeError: if there is no preset of that name.
    """
    return read_toml(path_of("presets", name))


def laid_under(asked: Mapping[str, Any], presets: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return `asked` merged over `presets`: settings of `asked` override those of the presets.

    Settings of the presets that the method does not have are left out, such as ``method.train`` if it does not train
    while it searches. If search and child share one learning rate schedule, those of the presets' ``train`` that
    must equal the search's are left out.

    Args:
        asked: tables of a `vitrim.run.recipe.Recipe`.
        presets: tables of settings, by name; messages use these names.

    Raises:
        RecipeError: if two presets give different values for one setting.
    """
    said: dict[Keys, tuple[str, Any]] = {}
    under: dict[str, Any] = {}
    for name, table in presets.items():
        for path, value in leaves(table):
            before, known = said.setdefault(path, (name, value))
            if known != value:
                raise RecipeError(
                    f"presets must agree, but {'.'.join(path)} is {known!r} in {before} and {value!r} in {name}; leave "
                    "one of them out"
                )
        under = merged(under, table)
    if "method" in under:
        known = _fields(asked)
        under["method"] = {name: value for name, value in under["method"].items() if name in known}
    whole = merged(under, asked)
    shared, mine = _shared(whole), _table(asked, "train")
    if shared and isinstance(whole.get("train"), Mapping):
        whole["train"] = {name: value for name, value in whole["train"].items() if name in mine or name not in shared}
    return whole


def remark(asked: Mapping[str, Any], presets: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return a sentence on the settings of `presets` that `asked` overrides, or None if there are none."""
    mine = dict(leaves(asked))
    other = [
        f"{'.'.join(path)} is {mine[path]!r} as asked, not {value!r} as in {name}"
        for name, table in presets.items()
        for path, value in leaves(table)
        if path in mine and mine[path] != value
    ]
    return "; ".join(other) or None


def leaves(table: Mapping[str, Any], at: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Yield every value of nested tables with its path of keys."""
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from leaves(value, (*at, key))
        else:
            yield (*at, key), value


def _table(asked: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = asked.get(name)
    return table if isinstance(table, Mapping) else {}


def _fields(asked: Mapping[str, Any]) -> Mapping[str, Any]:
    name = _table(asked, "method").get("name")
    return methods.settings_of(name).model_fields if name in methods.names() else {}


def _shared(whole: Mapping[str, Any]) -> tuple[str, ...]:
    try:
        shared: tuple[str, ...] = getattr(found_method(whole.get("method")), "shared", ())
    except VitrimError:
        return ()  # reading the recipe reports the error
    return shared
