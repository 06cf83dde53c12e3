"""Calibrate once and cut a model for each of several budgets: a curve of accuracy over cost."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitrim import report
from vitrim.methods import Data
from vitrim.methods.post_training.calibration import read_calibration, write_calibration
from vitrim.methods.post_training.notes import Notes
from vitrim.run.job import Job, full_disk, leaving_nothing, prepare
from vitrim.run.lock import holding
from vitrim.run.pipeline import Result, run
from vitrim.run.recipe import Recipe, merged
from vitrim.train import ranks
from vitrim.train.leading import check_shared, led
from vitrim.words.errors import DataError, RunError, VitrimError
from vitrim.words.plain import load, write_text

__all__ = ["BUDGETS", "Pareto", "pareto"]

BUDGETS = tuple(f"macs={share}" for share in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4))
FILE = "calibration.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pareto:
    """The result of `pareto`.

    Attributes:
        results: one for each budget that ended well.
        failed: each budget that did not, with the reason.
        calibration: the calibration file, from which models for further budgets can be cut.
        folder: the folder that contains all files.
    """

    results: tuple[Result, ...]
    failed: tuple[tuple[str, str], ...]
    calibration: Path
    folder: Path


def pareto(
    asked: Mapping[str, Any],
    folder: Path,
    budgets: Sequence[str] = BUDGETS,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> Pareto:
    """Calibrate once and make a model for each budget.

    Writes ``calibration.safetensors``, a run folder for each budget, ``pareto.svg`` (top-1 against MACs and latency;
    agreement with the dense model if there are no labels) and ``report.html``. Existing files are kept, so the same
    call continues a stopped one, and a call with further budgets adds them in seconds each. A budget that fails does
    not stop the others; figure and report are written of those that are finished, however the call ends.

    Args:
        asked: tables of a `vitrim.run.recipe.Recipe`; method and budget are set here.
        folder: the folder to write.
        budgets: one budget for each model.
        say: called with a line of text at the start of each stage.

    Raises:
        VitrimError: one sentence on what must hold, what came, and the way out; also if every budget fails.
    """
    if not budgets:
        raise RunError("budgets must be given, but there are none; give --budgets macs=0.7")
    whole = merged({"method": {"name": "post_training"}, "budget": budgets[0]}, asked)
    recipes = [load(Recipe, {**whole, "budget": budget}).resolved() for budget in budgets]
    path = folder / FILE
    with full_disk(folder), contextlib.ExitStack() as stack:
        led(lambda: _entered(folder, stack))
        _calibrated(recipes[0], path, say)
        results: list[Result] = []
        failed: list[tuple[str, VitrimError]] = []
        try:
            for recipe in recipes:
                say(f"-- {recipe.budget}")
                one = recipe.model_copy(update={"method": {**recipe.method, "calibration": str(path)}})
                try:
                    results.append(run(one, folder / recipe.budget.replace(",", "_"), say=say))
                except VitrimError as problem:
                    check_shared(problem)
                    say(f"{recipe.budget} failed: {problem}")
                    failed.append((recipe.budget, problem))
        finally:
            if ranks.first():
                _drawn(results, folder)
    if not results:
        raise failed[0][1]
    told = tuple((budget, str(problem)) for budget, problem in failed)
    return Pareto(results=tuple(results), failed=told, calibration=path, folder=folder)


def _entered(folder: Path, stack: contextlib.ExitStack) -> None:
    stack.enter_context(leaving_nothing(folder))
    stack.enter_context(holding(folder))


def _drawn(results: Sequence[Result], folder: Path) -> None:
    """Write figure and report of the budgets that are finished."""
    found = [result.folder for result in results if result.folder is not None]
    if found:
        write_text(folder / "pareto.svg", report.curve([result.measured for result in results]))
        write_text(folder / "report.html", report.html(found))


def _calibrated(recipe: Recipe, path: Path, say: Callable[[str], None]) -> None:
    """Write the calibration, or check the existing one."""
    method = recipe.found_method()
    if recipe.data.train is None:
        raise DataError("data must be given, but there is none and post_training needs images; give --data SRC")
    job = prepare(recipe, method, None, None, (recipe.data.train, recipe.data.test), say)
    led(lambda: _calibration(job, method, path))


def _calibration(job: Job, method: Any, path: Path) -> None:
    if path.is_file():
        read_calibration(path).check(job.parent, job.input, str(path))
        job.say(f"reading the calibration {path}")
        return
    assert job.splits is not None
    data = Data(
        train=job.splits.train,
        calibration=job.splits.calibration,
        validation=job.splits.validation,
        input=job.input,
    )
    job.say("calibrating")
    images, probe = method.images(data)
    notes = Notes(path.with_name("cells.jsonl"))
    made = method.calibrated(job.parent, data, images, probe, job.recipe.seed, notes=notes)
    write_calibration(path, made)
    notes.forget()
    job.say(f"calibrated in {made.seconds:.0f} s on {made.count} images")
