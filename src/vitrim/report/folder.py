"""Reading a run folder: plain values only, and whatever an unfinished run has not written yet is left out."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vitrim.words.errors import RunError
from vitrim.words.plain import read_json
from vitrim.words.plan import Plan, read_plan
from vitrim.words.spec import Spec

__all__ = ["Record", "Run", "names_apart", "number", "read_runs"]

Record = dict[str, Any]


class Run(NamedTuple):
    """What a run folder says; an absent part is None or empty."""

    name: str
    measured: Record
    recipe: str | None
    parent: Spec | None
    plan: Plan | None
    trials: list[Record]
    log: list[Record]
    classes: list[Record] = []  # noqa: RUF012 a tuple's defaults are shared, and nobody changes this one
    pictures: tuple[Path, ...] = ()


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders, each named by the end of its path that no other has.

    Raises:
        RunError: if there is no folder, or one has no ``measured.json``, or a file in it is damaged.
        PlanError: if a ``plan.json`` is damaged.
    """
    if not folders:
        raise RunError("a report must have at least one run folder, but got none; name one")
    return [_read(folder, name) for folder, name in zip(folders, names_apart(folders), strict=True)]


def names_apart(folders: Sequence[str | Path]) -> list[str]:
    """Last parts of each path, one where that tells all apart and more where it does not."""
    parts = [Path(folder).resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(folder) for folder in folders]


def _read(folder: Path, name: str) -> Run:
    recipe, plan = folder / "recipe.toml", folder / "plan.json"
    parent, decided = read_plan(plan) if plan.exists() else (None, None)
    return Run(
        name=name,
        measured=_measured(folder),
        recipe=_text(recipe) if recipe.exists() else None,
        parent=parent,
        plan=decided,
        trials=_lines(folder / "trials.jsonl"),
        log=_lines(folder / "log.jsonl"),
        classes=_classes(folder / "classes.json"),
        pictures=tuple(sorted((folder / "pictures").glob("*.png"))),
    )


def _classes(path: Path) -> list[Record]:
    """The classes of a segmentation, in the order of their labels."""
    known = read_json(path, RunError) if path.exists() else []
    if not isinstance(known, list) or not all(isinstance(each, dict) for each in known):
        raise RunError(
            f"{path}: the file must hold a list of records, but holds something else; run the transfer again"
        )
    return known


def _measured(folder: Path) -> Record:
    path = folder / "measured.json"
    if not path.exists():
        raise RunError(
            f"{folder}: a run folder must hold measured.json, but it does not; "
            f"finish the run with 'vitrim run {folder / 'recipe.toml'}'"
        )
    measured = read_json(path, RunError)
    if not isinstance(measured, dict):
        raise RunError(f"{path}: the file must hold names and values, but holds a {type(measured).__name__}")
    return measured


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise RunError(f"{path}: the file must be readable, but {problem}") from None


def _lines(path: Path) -> list[Record]:
    if not path.exists():
        return []
    lines = _text(path).splitlines()
    records = []
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as problem:
            # A run that was killed, or is still writing, leaves half of a last line.
            if index == len(lines) - 1:
                break
            raise RunError(f"{path}: each line must be JSON, but line {index + 1} is not: {problem.msg}") from None
        if not isinstance(record, dict):
            raise RunError(f"{path}: each line must hold names and values, but line {index + 1} holds {line[:40]}")
        records.append(record)
    return records


def number(record: Record, name: str) -> float | None:
    """The finite number called `name`, or None where there is none."""
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value
