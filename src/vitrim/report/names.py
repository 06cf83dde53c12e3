"""Names of runs, made of what was asked for; the same method has the same name and color everywhere in a report."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from vitrim.words.errors import VitrimError

__all__ = ["CONTROL", "Titles", "titles"]

CONTROL = "dense"
"""Name of the method of runs that cut nothing and only train: the control."""

_APART = ("model", "budget", "seed", "device", "measure", "task")
"""Tables and settings of a recipe that are not part of a method's name; data and epochs have columns of their own."""

_OWN = (("data", "train"), ("data", "test"), ("train", "epochs"), ("train", "minutes"), ("method", "name"))


class Titles(NamedTuple):
    """What a report calls a run.

    Attributes:
        method: the method, with the settings in which its runs differ: ``taylor (choice=free)``.
        budget: the budget as text.
        seed: the seed as text.
        epochs: epochs of training; of search and training as ``20 + 10`` if the search trains, too; or minutes.
        total: epochs and minutes of search and training together; two runs with the same total are trained alike.
        data: the training source, and how many images train and test.
        model: the parent.
        name: method, budget and seed.
    """

    method: str = ""
    budget: str = ""
    seed: str = ""
    epochs: str = ""
    total: tuple[float, float] = (0.0, 0.0)
    data: str = ""
    model: str = ""
    name: str = ""


def titles(runs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any]]]) -> list[Titles]:
    """Return what to call each of several runs.

    Args:
        runs: what was measured, the recipe, and the record of the images of each run; each may be empty.
    """
    plain = [_method(measured, recipe) for measured, recipe, _ in runs]
    flat = [dict(_leaves(recipe)) for _, recipe, _ in runs]
    found = []
    for (measured, recipe, images), method, mine in zip(runs, plain, flat, strict=True):
        alike = [other for other, name in zip(flat, plain, strict=True) if name == method]
        budget = str(measured.get("budget") or recipe.get("budget") or "")
        seed = measured.get("seed", recipe.get("seed"))
        epochs, total = _epochs(measured, recipe)
        label = method + _differing(mine, alike)
        parts = [label, "" if method == CONTROL else budget, "" if seed is None else f"seed {seed}"]
        found.append(
            Titles(
                method=label,
                budget=budget,
                seed="" if seed is None else str(seed),
                epochs=epochs,
                total=total,
                data=_data(recipe, images),
                model=str(measured.get("model") or _table(recipe, "model").get("name") or ""),
                name=", ".join(part for part in parts if part),
            )
        )
    return found


def _table(recipe: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = recipe.get(name)
    return table if isinstance(table, Mapping) else {}


def _method(measured: Mapping[str, Any], recipe: Mapping[str, Any]) -> str:
    """Return the name of a run's method; `CONTROL` if the run cuts nothing."""
    name = str(measured.get("method") or _table(recipe, "method").get("name") or "")
    if not measured:
        return CONTROL if _keeps_all(recipe.get("budget")) else name
    return CONTROL if measured.get("macs_ratio") == measured.get("params_ratio") == 1 else name


def _keeps_all(budget: Any) -> bool:
    from vitrim.words.budget import Budget  # here, because `vitrim explain` needs no budget and starts 10 ms earlier

    try:
        return set(Budget.parse(str(budget)).bounds().values()) == {1.0}
    except VitrimError:
        return False


def _leaves(table: Mapping[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*at, key))
        elif (*at, key)[0] not in _APART and (*at, key) not in _OWN and key != "workers":
            yield (*at, key), value if isinstance(value, str) else json.dumps(value, default=str)


def _differing(mine: Mapping[tuple[str, ...], str], alike: Sequence[Mapping[tuple[str, ...], str]]) -> str:
    """Return the settings in which the runs of a method differ, as text in parentheses; empty if there are none."""
    keys = [key for key in sorted({key for other in alike for key in other}) if len({o.get(key) for o in alike}) > 1]
    short = [key[-1] for key in keys]
    told = [
        f"{name if short.count(name) == 1 else '.'.join(key)}={mine[key]}"
        for key, name in zip(keys, short, strict=True)
        if key in mine
    ]
    return f" ({', '.join(told)})" if told else ""


def _epochs(measured: Mapping[str, Any], recipe: Mapping[str, Any]) -> tuple[str, tuple[float, float]]:
    train, search = _table(recipe, "train"), _table(_table(recipe, "method"), "train")
    last = _number(train.get("epochs", measured.get("epochs")))
    first, minutes = _number(search.get("epochs")), _number(train.get("minutes"))
    total = (first + last, minutes)
    if minutes and last:
        return f"{minutes:.3g} min", total
    return (f"{first:.3g} + {last:.3g}" if first else f"{last:.3g}"), total


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0


def _data(recipe: Mapping[str, Any], images: Mapping[str, Any]) -> str:
    source = _table(recipe, "data").get("train")
    named = "" if source in (None, "none") else str(source).rstrip("/").rpartition("/")[2]
    parts = _table(images, "parts")
    counts = {name: int(_number(_table(parts, name).get("images"))) for name in ("train", "validation", "test")}
    if not counts["train"]:
        return named
    told = f"{counts['train'] + counts['validation']:,} images"
    return f"{named}, {told}" + (f", {counts['test']:,} for test" if counts["test"] else "")
