"""Replace every ``auto`` of a recipe's training tables by what fits the machine, so that its record says what ran."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from vitrim.nn.device import why_not_here
from vitrim.train import Train, ranks
from vitrim.train.machine import settled
from vitrim.words.errors import RecipeError
from vitrim.words.plain import Node, dump, load, read_toml

__all__ = ["device_of", "on_machine"]

R = TypeVar("R", bound=Node)

_OPEN = ("precision", "workers", "channels_last")
"""Settings of `Train` that may be ``auto``."""


def on_machine(recipe: R, folder: Path | None = None) -> R:
    """Return `recipe` with no ``auto`` left in ``train`` and ``method.train``.

    Args:
        recipe: a recipe of any kind that trains.
        folder: its run folder. What a run began with there stands for ``auto``, so that it goes on with the same values
            on a machine with another number of cores or another device.

    Raises:
        RecipeError: a device is not on this machine, or lacks the precision that is asked for.
    """
    known = {} if folder is None or not (folder / "recipe.toml").is_file() else read_toml(folder / "recipe.toml")
    fields: Any = recipe
    device = device_of(fields.device)
    found: dict[str, Any] = {"train": _on(fields.train, known.get("train"), device)}
    method = getattr(recipe, "method", {})
    inner = method.get("train") if isinstance(method, Mapping) else None
    if isinstance(inner, Mapping) and set(inner) == set(Train.model_fields):
        before = known.get("method")
        before = before.get("train") if isinstance(before, Mapping) else None
        table = dump(_on(load(Train, inner, RecipeError, at="method.train"), before, device))
        found["method"] = {**method, "train": table}
    return recipe.model_copy(update=found)


def _on(settings: Train, known: Any, device: torch.device) -> Train:
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched != "no" and settings.precision not in ("auto", launched):
        raise RecipeError(
            f"train.precision must be {launched} as accelerate was launched with, but is {settings.precision}; leave "
            "one of them out"
        )
    before = known if isinstance(known, Mapping) else {}
    began = {name: before[name] for name in _OPEN if getattr(settings, name) == "auto" and name in before}
    if settings.precision == "auto" and "precision" not in began and launched != "no":
        began["precision"] = launched
    return settled(settings.model_copy(update=began), device)


def device_of(name: str) -> torch.device:
    """Return the device called `name`; ``auto`` is the first CUDA device, or the CPU if there is none.

    Of several processes, each has a card of its own, see `vitrim.train.ranks.place`.

    Raises:
        RecipeError: if this machine has no such device.
    """
    if name == "auto" and ranks.count() > 1:
        return ranks.accelerator().device  # type: ignore[no-any-return]
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    problem = why_not_here(name)
    if problem is not None:
        raise RecipeError(f"device must be one of this machine's, but got '{name}': {problem}; use cpu or auto")
    return ranks.place(torch.device(name))
