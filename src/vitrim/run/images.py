"""Open the images of a run, and log and record what was read."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from vitrim.data import (
    CALIBRATION,
    Images,
    Input,
    Reading,
    Splits,
    ask_model,
    check_classes,
    find_source,
    split,
    test_images,
)
from vitrim.run.recipe import DataRecipe
from vitrim.words.errors import RunError
from vitrim.words.plain import read_json, write_json
from vitrim.words.private import hide_passwords

__all__ = ["FILE", "about", "check_record", "known_order", "line_of", "open_splits", "open_test", "write_record"]

FILE = "data.json"
"""The file in a run folder that records what was read, so that a resumed run reads the same."""


def reading_of(
    data: DataRecipe, model: nn.Module, input: Input, classes: int, say: Callable[[str], None], order: str = ""
) -> Reading:
    """Return how the images of a recipe are read.

    Args:
        data: the table ``data`` of the recipe.
        model: a model that decides the order of class folders, if the recipe leaves it open and two orders differ.
        input: the model's input settings.
        classes: number of outputs of the model.
        say: called with a line about the order that the model decides.
        order: the order that an earlier run of this recipe found, or empty.
    """
    return Reading(
        class_map=data.class_map,
        classes=classes,
        class_order=order if order and data.class_order == "auto" else data.class_order,
        ask=ask_model(model, input, classes=classes, say=say),
        depth=data.depth,
        skip_damaged=data.skip_damaged,
    )


def open_splits(
    data: DataRecipe,
    train: str | Images | None,
    test: str | Images | None,
    *,
    model: nn.Module,
    input: Input,
    classes: int,
    seed: int,
    validation: float | None = None,
    calibration: int = CALIBRATION,
    order: str = "",
    say: Callable[[str], None] = lambda _: None,
) -> Splits | None:
    """Open training and test images, and log one line about each.

    Args:
        data: the table ``data`` of the recipe.
        train: opened images or a source; None to split the test images instead.
        test: opened images or a source; None for the test split of `train`, if it has one.
        model: the parent.
        input: the parent's input settings.
        classes: number of its outputs; labels are not used if there are none (`num_classes=0`).
        seed: seed of the draw of calibration and validation images.
        validation: the validation setting, in place of the recipe's.
        calibration: number of calibration images if the recipe leaves it open.
        order: numbering of the class folders that an earlier run found.
        say: called with the lines.

    Raises:
        DataError: if the images are unsuitable, or their classes do not match the model's.
    """
    first = test if train is None else train
    if first is None:
        return None
    reading = reading_of(data, model, input, classes, say, order)
    parts = split(
        first,
        test,
        calibration=calibration if data.calibration is None else data.calibration,
        validation=(data.validation if validation is None else validation) or 0.0,
        seed=seed,
        **vars(reading),
    )
    if classes == 0:
        parts = Splits(*(None if part is None else part.unlabeled() for part in _parts(parts)))  # type: ignore[arg-type]
    for part in (parts.train, parts.test):
        if part is not None:
            check_classes(part, classes)
    say(line_of(parts))
    return parts if parts.test is parts.train else replace(parts, train=parts.train.cached(data.cache))


def _parts(parts: Splits) -> tuple[Images | None, ...]:
    return parts.train, parts.calibration, parts.validation, parts.test


def open_test(
    data: DataRecipe, source: str, *, model: nn.Module, input: Input, classes: int, say: Callable[[str], None]
) -> Images:
    """Open the images that a model is measured on; never training images, unless the source names that split.

    Args:
        data: the table ``data`` of the recipe.
        source: see `vitrim.data.source.find_source`.
        model: see `open_splits`.
        input: the model's input settings.
        classes: number of its outputs.
        say: called with a line about the images.

    Raises:
        DataError: if the images are unsuitable, or their classes do not match the model's.
    """
    images = test_images(find_source(source), reading_of(data, model, input, classes, say))
    images = images.unlabeled() if classes == 0 else images
    check_classes(images, classes)
    say(images.line())
    return images


def line_of(parts: Splits) -> str:
    """Return a line on what is read: images, classes, the first three class names with numbers, files left out."""
    told = [f"{len(parts.train):,} for training"]
    for name, part in (("calibration", parts.calibration), ("validation", parts.validation)):
        if part is not None:
            told.append(f"{len(part):,} for {name}" + (" among them" if name == "calibration" else ""))
    line = f"{parts.train.line(0 if parts.validation is None else len(parts.validation))}; {', '.join(told)}"
    if parts.test is not None and parts.test is not parts.train:
        line += f"; test: {parts.test.line()}"
    return line


def about(parts: Splits | None) -> dict[str, Any] | None:
    """Return the record of a run's images: sources, counts, numbers and names of the classes, files left out."""
    if parts is None:
        return None
    return {
        "line": line_of(parts),
        "class_order": parts.train.order,
        "classes": parts.train.classes,
        "names": list(parts.train.names or ()),
        "parts": {
            name: {
                "source": part.source,
                "split": part.split,
                "images": len(part),
                "fingerprint": part.fingerprint() if name in ("train", "test") else None,
                "left_out": list(part.left_out),
            }
            for name, part in zip(("train", "calibration", "validation", "test"), _parts(parts), strict=True)
            if part is not None
        },
    }


def known_order(folder: Path | None) -> str:
    """Return the order of class folders that an earlier run in `folder` found, or an empty string.

    Raises:
        RunError: if its record is damaged.
    """
    if folder is None or not (folder / FILE).is_file():
        return ""
    record = read_json(folder / FILE, RunError)
    order = record.get("class_order") if isinstance(record, dict) else None
    if not isinstance(order, str):
        raise RunError(f"{folder / FILE}: the file must be what a run wrote, but is not; choose another --out")
    return order if order in ("plain", "natural") else ""


def check_record(folder: Path | None, found: Mapping[str, Any] | None) -> None:
    """Compare what was read with the run folder's record of an earlier run.

    Raises:
        RunError: if a class has another number, or a source other images.
    """
    if folder is None or found is None or not (folder / FILE).is_file():
        return
    before = read_json(folder / FILE, RunError)
    for what, get in (
        ("the order of the classes", lambda record: record["class_order"]),
        ("the classes", lambda record: record["names"]),
        ("the number of classes", lambda record: record["classes"]),
        ("the number of images", lambda record: {name: part["images"] for name, part in record["parts"].items()}),
        ("pixels or labels", _pixels(found)),
    ):
        try:
            was, now = get(before), get(found)
        except (KeyError, TypeError, AttributeError):
            raise RunError(
                f"{folder / FILE}: the file must be what a run wrote, but is not; choose another --out"
            ) from None
        if was != now:
            raise RunError(
                f"{folder}: a run must resume with the images that it began with, but {what} differ: "
                f"{_differing(was, now)}; choose another --out"
            )


def _pixels(found: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Return what reads the fingerprints of a record; those of `found` where an older version wrote none."""

    def get(record: Any) -> Any:
        return {
            name: str(record["parts"][name].get("fingerprint") or part["fingerprint"])[:8]
            for name, part in found["parts"].items()
        }

    return get


def _differing(was: Any, now: Any) -> str:
    if isinstance(was, list) and isinstance(now, list):
        longest = range(max(len(was), len(now)))
        place = next(n for n in longest if was[n : n + 1] != now[n : n + 1])
        old, new = ("".join(map(str, each[place : place + 1])) or "nothing" for each in (was, now))
        return f"number {place} was '{old}' and is '{new}'"
    return f"{was or 'none'} before, {now or 'none'} now"


def write_record(folder: Path, found: Mapping[str, Any] | None) -> None:
    """Write the record of what was read into a run folder, unless it exists."""
    if found is not None and not (folder / FILE).is_file():
        write_json(folder / FILE, hide_passwords(found))
