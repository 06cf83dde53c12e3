"""Read run folders. Files that an unfinished run has not written yet are left out."""

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
    """The contents of a run folder; a part that is missing is None or empty."""

    name: str
    measured: Record
    recipe: str | None
    parent: Spec | None
    plan: Plan | None
    trials: list[Record]
    log: list[Record]
    classes: list[Record] = []  # noqa: RUF012 the default is shared by all instances, but never changed
    pictures: tuple[Path, ...] = ()


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders. Each is named by the shortest end of its path that distinguishes the folders.

    Raises:
        RunError: there is no folder, or one has no ``measured.json``, or a file in it is damaged.
        PlanError: a ``plan.json`` is damaged.
    """
    if not folders:
        raise RunError("a report must have at least one run folder, but got none; name one")
    return [_read(folder, name) for folder, name in zip(folders, names_apart(folders), strict=True)]


def names_apart(folders: Sequence[str | Path]) -> list[str]:
    """Return the last part of each path, or as many last parts as are needed to distinguish the paths."""
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
    """Return the classes of a segmentation, in the order of their labels."""
    known = read_json(path, RunError) if path.exists() else []
    if not isinstance(known, list) or not all(isinstance(each, dict) for each in known):
        raise RunError(
            f"{path}: the file must contain a list of records, but contains something else; run the transfer again"
        )
    return known


def _measured(folder: Path) -> Record:
    path = folder / "measured.json"
    if not path.exists():
        raise RunError(
            f"{folder}: a run folder must contain measured.json, but does not; "
            f"finish the run with 'vitrim run {folder / 'recipe.toml'}'"
        )
    measured = read_json(path, RunError)
    if not isinstance(measured, dict):
        raise RunError(f"{path}: the file must contain names and values, but contains a {type(measured).__name__}")
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
            # The last line may be incomplete if the run was killed or is still writing.
            if index == len(lines) - 1:
                break
            raise RunError(f"{path}: each line must be JSON, but line {index + 1} is not: {problem.msg}") from None
        if not isinstance(record, dict):
            raise RunError(
                f"{path}: each line must contain names and values, but line {index + 1} contains {line[:40]}"
            )
        records.append(record)
    return records


def number(record: Record, name: str) -> float | None:
    """Return the value of `name` if it is a finite number, else None."""
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value
