"""The grid of a sweep: from a recipe and lists of values to one recipe and one name for each run."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vitrim import methods
from vitrim.run.recipe import Recipe, found_method, merged, overrides
from vitrim.train import Train
from vitrim.words.errors import MethodError, RecipeError
from vitrim.words.plain import did_you_mean, dump, load

__all__ = ["Planned", "controls", "grid", "values_of"]

LONGEST = 120
"""Largest number of characters of a run's name; file systems allow 255 bytes."""

_OPEN, _CLOSE = "[{", "]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """One run of a sweep.

    Attributes:
        name: its name, and that of its folder.
        recipe: its resolved recipe.
        others: the settings in its name other than method, budget and seed, as ``key=value``.
        control: whether it trains the uncut model.
    """

    name: str
    recipe: Recipe
    others: tuple[str, ...] = ()
    control: bool = False


def values_of(pair: str) -> tuple[str, list[str]]:
    """Divide ``key=value,value`` into the key and its values, as text.

    Commas within brackets and quotes do not divide, so a budget of two bounds is one value if it is quoted:
    ``budget="macs=0.5,params=0.5",macs=0.7``.

    Raises:
        RecipeError: if there is no ``=``, or no value between two commas.
    """
    key, equals, text = pair.partition("=")
    values = list(_divided(text)) if equals else []
    if not key.strip() or not values or not all(values):
        raise RecipeError(f"a setting of a sweep must look like seed=0,1,2, but got '{pair}'")
    return key.strip(), values


def _divided(text: str) -> Iterator[str]:
    depth, quoted, start = 0, False, 0
    for place, sign in enumerate(text):
        if sign == '"':
            quoted = not quoted
        elif not quoted:
            depth += (sign in _OPEN) - (sign in _CLOSE)
            if sign == "," and depth <= 0:
                yield text[start:place].strip()
                start = place + 1
    yield text[start:].strip()


def grid(base: Mapping[str, Any], pairs: Sequence[str], at: str = "recipe") -> list[Planned]:
    """Return one run for every combination of values, with resolved recipes; equal recipes are one run.

    A setting ``method.NAME`` is given to the methods that have it. If a run's method is not the recipe's own, the
    recipe's settings of the method are left out.

    Args:
        base: tables of a `vitrim.run.recipe.Recipe`.
        pairs: settings with their values, see `values_of`.
        at: what to call the recipe in error messages.

    Raises:
        RecipeError: if a setting or value is not valid, or a setting is given twice.
        MethodError: if no method of the sweep has a setting.
    """
    axes: dict[str, list[str]] = {}
    for pair in pairs:
        key, values = values_of(pair)
        if key in axes:
            raise RecipeError(f"a setting of a sweep must be given once, but {key} is given twice; list all its values")
        axes[key] = values
    combinations = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    _check_known(base, axes, combinations)
    planned: dict[str, Planned] = {}
    for chosen in combinations:
        recipe = _recipe(base, chosen, at)
        method = recipe.method["name"]
        others = tuple(
            f"{key}={value}"
            for key, value in chosen.items()
            if key not in ("method.name", "budget", "seed") and _applies(key, method)
        )
        short = re.split(r"[/\\]", method)[-1].removesuffix(".py")
        name = _joined(short, recipe.budget.replace(",", "+"), f"seed={recipe.seed}", *others)
        planned.setdefault(_text(recipe), Planned(name=name, recipe=recipe, others=others))
    return _apart(list(planned.values()))


def _method_of(base: Mapping[str, Any], chosen: Mapping[str, str]) -> Any:
    own = base.get("method")
    return chosen.get("method.name", own.get("name") if isinstance(own, Mapping) else None)


def _setting(key: str) -> str | None:
    """Return NAME of a key ``method.NAME`` or ``method.NAME.more``; None for other keys and for the method's name."""
    first, _, rest = key.partition(".")
    return rest.partition(".")[0] if first == "method" and rest not in ("", "name") else None


def _applies(key: str, method: str) -> bool:
    setting = _setting(key)
    return setting is None or setting in methods.settings_of(method).model_fields


def _check_known(
    base: Mapping[str, Any], axes: Mapping[str, Sequence[str]], combinations: Sequence[Mapping[str, str]]
) -> None:
    names = list(dict.fromkeys(_method_of(base, chosen) for chosen in combinations))
    known = [name for name in names if isinstance(name, str)]
    for key in axes:
        setting = _setting(key)
        if setting is not None and known and not any(_applies(key, name) for name in known):
            fields = sorted({field for name in known for field in methods.settings_of(name).model_fields})
            raise MethodError(
                f"{key}: a setting must be one of a method of the sweep, but {', '.join(known)} "
                f"{'has' if len(known) == 1 else 'have'} none called '{setting}'{did_you_mean(setting, fields)}"
            )


def _recipe(base: Mapping[str, Any], chosen: Mapping[str, str], at: str) -> Recipe:
    method = _method_of(base, chosen)
    own = base.get("method")
    if isinstance(own, Mapping) and own.get("name") != method:
        base = {**base, "method": {"name": method}}
    named = [f"{key}={value}" for key, value in chosen.items() if not isinstance(method, str) or _applies(key, method)]
    return load(Recipe, merged(base, overrides(named, base)), RecipeError, at=at).resolved()


def controls(planned: Sequence[Planned]) -> list[Planned]:
    """Return the runs that train the uncut models of `planned` alike, one for each different training.

    A control has the data, the seed and the training settings of its runs. It is trained for as many epochs as search
    and training of a run take together. Runs that train nothing have no control.

    Raises:
        RecipeError: if no run trains anything.
    """
    found: dict[str, Planned] = {}
    for one in planned:
        recipe = one.recipe
        epochs = recipe.train.epochs + searched(recipe)
        if not epochs:
            continue
        table = dump(recipe) | {"method": {"name": "magnitude"}, "budget": "macs=1", "recover": "none"}
        table["train"] = {**table["train"], "epochs": epochs}
        control = load(Recipe, table, RecipeError, at=one.name).resolved()
        kept = tuple(other for other in one.others if not other.startswith(("method.", "recover=")))
        name = _joined("dense", f"seed={recipe.seed}", *kept)
        found.setdefault(_text(control), Planned(name=name, recipe=control, others=kept, control=True))
    if not found:
        raise RecipeError(
            "a control must be trained, but no run of this sweep trains; leave --control out and compare with the "
            "parent, or set train.epochs"
        )
    return _apart(list(found.values()))


def searched(recipe: Recipe) -> float:
    """Return the number of epochs that the search of a recipe trains for; 0 if it does not train."""
    train = getattr(found_method(recipe.method), "train", None)
    return train.epochs if isinstance(train, Train) else 0.0


def _joined(*parts: str) -> str:
    text = "_".join(re.sub(r"[^\w.=+-]+", "-", part).strip(".") for part in parts)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _apart(planned: list[Planned]) -> list[Planned]:
    """Return the runs with a digest of the recipe added to names that occur more than once."""
    names = [one.name for one in planned]
    return [
        one
        if names.count(one.name) == 1
        else replace(one, name=f"{one.name}-{hashlib.sha256(_text(one.recipe).encode()).hexdigest()[:8]}")
        for one in planned
    ]


def _text(recipe: Recipe) -> str:
    return json.dumps(dump(recipe), sort_keys=True)
