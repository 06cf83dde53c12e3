"""Read run folders. Files that an unfinished run has not written yet are left out."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vitrim.report.names import Titles, titles
from vitrim.words.errors import RecipeError, RunError
from vitrim.words.parsing import parse_json, read_regular
from vitrim.words.plain import read_json, read_toml
from vitrim.words.plan import Plan, read_plan
from vitrim.words.spec import Spec

__all__ = ["Record", "Run", "check_same_images", "names_apart", "number", "read_runs"]

Record = dict[str, Any]

SWEEP = "sweep.json"
"""The file in a folder of runs that belong together and must have seen the same images."""

_STAGES = (("model.safetensors", "measuring"), ("plan.json", "training"), ("recipe.toml", "searching"))
"""A file that the stage before wrote, and the stage."""

LONGEST_LOG = 2**30
"""Bytes of a log. A record of a step takes about 150, so that this is seven million steps."""

LARGEST = 1e18
"""Numbers beyond are not shown: no cost, time or loss has them, and no plot can scale to them."""


class Run(NamedTuple):
    """The contents of a run folder; a part that is missing is None or empty.

    `name` tells a run from all others of a report by what was asked for; `path` is the shortest end of its folder's
    path that does. `state` is empty for a finished run, else the stage that it has reached. `settings` is the recipe.
    """

    name: str
    measured: Record
    recipe: str | None
    parent: Spec | None
    plan: Plan | None
    trials: list[Record]
    log: list[Record]
    classes: list[Record] = []  # noqa: RUF012 the default is shared by all instances, but never changed
    pictures: tuple[Path, ...] = ()
    path: str = ""
    settings: Record = {}  # noqa: RUF012 see classes
    state: str = ""
    titles: Titles = Titles()

    @property
    def finished(self) -> bool:
        """Whether the run has measured its model."""
        return not self.state


def read_runs(places: Sequence[Path]) -> list[Run]:
    """Read run folders, and all run folders below the other folders.

    Raises:
        RunError: there is no folder, or no run in one, or a file is damaged; or the runs of a sweep have seen different
            images.
        PlanError: a ``plan.json`` is damaged.
    """
    if not places:
        raise RunError("a report must have at least one run folder, but got none; name one")
    folders = [folder for place in places for folder in _runs_in(place)]
    for place in places:
        check_same_images(place)
    runs = [_read(folder, path) for folder, path in zip(folders, names_apart(folders), strict=True)]
    named = titles([(run.measured, run.settings, _images(folder)) for run, folder in zip(runs, folders, strict=True)])
    names = [title.name for title in named]
    return [
        run._replace(
            titles=title,
            name=title.name if title.name and names.count(title.name) == 1 else f"{title.name} ({run.path})".strip(),
        )
        for run, title in zip(runs, named, strict=True)
    ]


def _is_run(folder: Path) -> bool:
    return (folder / "measured.json").is_file() or (folder / "recipe.toml").is_file()


def _runs_in(place: Path) -> list[Path]:
    if not place.is_dir():
        raise RunError(f"{place}: a run folder must exist, but there is {'a file' if place.exists() else 'none'} here")
    if _is_run(place):
        return [place]
    found = list(_below(place))
    if not found:
        raise RunError(
            f"{place}: a folder of runs must contain a run (a folder with recipe.toml or measured.json), but contains "
            "none; make one with 'vitrim run RECIPE --out FOLDER'"
        )
    return found


def _below(place: Path) -> Iterator[Path]:
    """Yield the run folders below a folder, in the order of their names, and look for none inside a run folder."""
    for here, inner, _ in os.walk(place):
        folder = Path(here)
        if _is_run(folder):
            inner.clear()
            yield folder
        inner.sort()


def _images(folder: Path) -> Record:
    """Return the record of the images that a run has read; empty if there is none."""
    path = folder / "data.json"
    known = read_json(path, RunError) if path.is_file() else {}
    if not isinstance(known, dict):
        raise RunError(f"{path}: the file must contain names and values, but contains something else")
    return known


def check_same_images(place: Path) -> None:
    """Check that the runs of a sweep that name the same sources have seen the same images.

    Args:
        place: a folder; one without ``sweep.json`` is not checked.

    Raises:
        RunError: naming two runs and what differs.
    """
    if not (place / SWEEP).is_file():
        return
    first: dict[str, tuple[Path, dict[str, Any]]] = {}
    for folder in _below(place):
        record = _images(folder)
        parts = record.get("parts")
        if not isinstance(parts, Mapping) or not (folder / "recipe.toml").is_file():
            continue
        asked = dict(read_toml(folder / "recipe.toml").get("data", {}))
        for free in ("calibration", "validation"):
            asked.pop(free, None)
        found = _seen(record, parts)
        other, before = first.setdefault(json.dumps(asked, sort_keys=True, default=str), (folder, found))
        for what, value in found.items():
            if before[what] is not None and value is not None and before[what] != value:
                raise RunError(
                    f"{place}: the runs of a sweep must have seen the same images, but {other.name} and {folder.name} "
                    f"differ in {what}: {_brief(before[what])} and {_brief(value)}; restore the images and run one of "
                    "them again in a new folder"
                )


def _seen(record: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, Any]:
    def of(name: str, key: str) -> Any:
        part = parts.get(name)
        return part.get(key) if isinstance(part, Mapping) else None

    kept, held = of("train", "images"), of("validation", "images")
    return {
        "the number of training images": None if kept is None else kept + (held or 0),
        "the number of test images": of("test", "images"),
        "the test images": of("test", "fingerprint"),
        "the classes": record.get("names"),
        "the order of the classes": record.get("class_order"),
    }


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def names_apart(folders: Sequence[str | Path]) -> list[str]:
    """Return the last part of each path, or as many last parts as are needed to distinguish the paths."""
    parts = [Path(folder).resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(folder) for folder in folders]


def _read(folder: Path, path: str) -> Run:
    recipe, plan = folder / "recipe.toml", folder / "plan.json"
    parent, decided = read_plan(plan) if plan.exists() else (None, None)
    log = _lines(folder / "log.jsonl")
    return Run(
        name=path,
        measured=_measured(folder),
        recipe=_text(recipe) if recipe.exists() else None,
        parent=parent,
        plan=decided,
        trials=_lines(folder / "trials.jsonl"),
        log=log,
        classes=_classes(folder / "classes.json"),
        pictures=tuple(sorted((folder / "pictures").glob("*.png"))),
        path=path,
        settings=_settings(recipe),
        state=_state(folder, log),
    )


def _settings(recipe: Path) -> Record:
    # The text of a recipe that is no TOML is shown all the same.
    try:
        return read_toml(recipe, RecipeError) if recipe.exists() else {}
    except RecipeError:
        return {}


def _state(folder: Path, log: Sequence[Record]) -> str:
    """Return the stage that an unfinished run has reached, with its last step; empty for a finished run."""
    if (folder / "measured.json").is_file():
        return ""
    stage = next(words for name, words in _STAGES if (folder / name).is_file())
    step = next((line["step"] for line in reversed(log) if isinstance(line.get("step"), int)), None)
    return f"not finished: {stage}" + (f", step {step:,}" if step is not None and stage != "measuring" else "")


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
        return {}
    measured = read_json(path, RunError)
    if not isinstance(measured, dict):
        raise RunError(f"{path}: the file must contain names and values, but contains a {type(measured).__name__}")
    return measured


def _text(path: Path) -> str:
    return read_regular(path, RunError, LONGEST_LOG)


def _lines(path: Path) -> list[Record]:
    if not path.exists():
        return []
    lines = _text(path).splitlines()
    records = []
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            record = parse_json(line, RunError, f"{path}: line {index + 1}")
        except RunError:
            # The last line may be incomplete if the run was killed or is still writing.
            if index == len(lines) - 1:
                break
            raise
        if not isinstance(record, dict):
            raise RunError(
                f"{path}: each line must contain names and values, but line {index + 1} contains {line[:40]}"
            )
        records.append(record)
    return records


def number(record: Record, name: str) -> float | None:
    """Return the value of `name` if it is a number of at most `LARGEST`, else None."""
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= LARGEST:
        return None
    return value
