"""Run a recipe, stage by stage, and write a run folder.

    parent -> search -> cut -> train against the parent -> measure -> store -> report

Each stage reads the file of the stage before it, and writes its own file under a temporary name and renames it. So a
run resumes at the first missing file, also in the middle of a search or of training.
"""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitrim import report
from vitrim.cut.surgery import fold
from vitrim.deploy import store
from vitrim.deploy.transformers import as_timm
from vitrim.families import adopt
from vitrim.methods import Method
from vitrim.nn.weights import check_weights, fingerprint, home_of
from vitrim.run.child import measure_child
from vitrim.run.cutting import cut, from_first, stored
from vitrim.run.defaults import METHOD, distilled, forecast, minutes_for
from vitrim.run.images import about, write_record
from vitrim.run.job import Job, check_folder, full_disk, leaving_nothing, prepare
from vitrim.run.lock import holding
from vitrim.run.log import logger
from vitrim.run.machine import on_machine
from vitrim.run.presets import laid_under
from vitrim.run.presets import preset as read_preset
from vitrim.run.recipe import Recipe, merged, write_recipe
from vitrim.run.track import check_trackers, names_of, tracking
from vitrim.train import Start, fit, ranks
from vitrim.train.leading import led
from vitrim.words.budget import Budget
from vitrim.words.errors import BudgetError, RecipeError
from vitrim.words.plain import dump, load, write_text
from vitrim.words.plan import Plan
from vitrim.words.private import hide_passwords
from vitrim.words.progress import quiet, tell

__all__ = ["Result", "compress", "run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """The result of a run.

    Attributes:
        model: the child, in evaluation mode, on the device of the model that was given (the CPU for a name).
        plan: the plan by which the child was cut from the parent.
        measured: flat record of ``measured.json``; ``top1`` in percent, None if it could not be measured.
        parent: the parent, adopted, in evaluation mode, on the same device.
        folder: the run folder, or None.
    """

    model: nn.Module
    plan: Plan
    measured: dict[str, Any]
    parent: nn.Module
    folder: Path | None


def compress(
    model: nn.Module | str,
    data: Any = None,
    *,
    method: str | Path | Method | None = None,
    budget: str | Budget = "macs=0.5",
    epochs: float | None = None,
    seed: int = 0,
    test: Any = None,
    preset: str | Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    recover: str = "auto",
    train: Mapping[str, Any] | None = None,
    measure: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
    device: str | None = None,
    out: str | Path | None = None,
    verbose: bool = True,
    track: str | Sequence[str] = (),
) -> Result:
    """Make `model` smaller.

    Args:
        model: a timm model, an adopted model, an image model of Hugging Face transformers, or the name of one (see
            `vitrim compress`); not modified.
        data: images to search and train on: a source string (``digits``, a folder, a tar, ``torch/cifar10`` …), a
            dataset of (PIL image or ``(3, height, width)`` tensor, label), a loader of batches, or None for methods
            that need none.
        method: name of a method, see `vitrim methods`; the path of a Python file that defines one; or an instance. None
            for ``post_training``, followed, with a source by name, by some minutes of distillation without labels
            where that helps and no other training is asked for, see `vitrim.run.defaults`.
        budget: the limit on the child's cost: ``macs=0.5``, ``macs=2.3G``, ``params=12M``, or several joined by commas;
            or a `Budget` of the same bounds, without a table, because a run measures its own.
        epochs: epochs to train the child with its parent as teacher; 0 does not train. None is 0, but see `method`.
        seed: seed of all random numbers.
        test: images to measure on, in the same forms; no search uses them.
        preset: one or several presets that come with the package (`vitrim recipes`); all other arguments override them.
        settings: the method's own settings; an instance has them already.
        recover: whether to compensate for the cut in closed form, see `vitrim.run.recipe.Recipe`.
        train: further settings of training, see `vitrim.train.Train`.
        measure: how to measure, see `vitrim.run.recipe.Measure`.
        recipe: any other setting of `vitrim.run.recipe.Recipe`, such as ``{"data": {"mean": [0.5, 0.5, 0.5]}}``.
        device: where the work is done: ``cpu``, ``cuda`` or ``mps``; None is the recipe's, by default the first CUDA
            device, or the CPU if there is none.
        out: a run folder to write; a run that was stopped there continues.
        verbose: whether to print a line at the start of each stage, and to show the progress: as bars on a terminal
            and in a notebook, elsewhere as a line each minute.
        track: experiment trackers to send the run to: ``tensorboard``, ``wandb``, ``trackio``.

    Returns:
        The child, its plan and the measurements.

    Raises:
        VitrimError: one sentence on what must hold, what came, and the way out.
    """
    held = None if method is None or isinstance(method, str | Path) else method
    if held is not None and settings:
        raise RecipeError("settings must be those of the instance, but settings are given too; leave them out")
    sources = [str(source) if isinstance(source, str | Path) else None for source in (data, test)]
    asked = {
        "model": {"name": model if isinstance(model, str) else _name_in_memory(model)},
        "data": {"train": sources[0], "test": sources[1]},
        "method": {"name": str(method or METHOD), **(settings or {})} if held is None else {},
        "budget": _budget_text(budget),
        "recover": recover,
        "train": {"epochs": epochs or 0, **(train or {})},
        "measure": dict(measure or {}),
        "seed": seed,
    } | ({} if device is None else {"device": device})
    asked = merged(asked, recipe or {})
    if held is not None and asked["method"]:
        raise RecipeError("settings must be those of the instance, but recipe holds a method too; leave it out")
    names = [preset] if isinstance(preset, str) else preset
    whole = laid_under(asked, {f"preset {name}": read_preset(name) for name in names})
    if (
        method is None
        and epochs is None
        and sources[0]
        and whole["train"] == {"epochs": 0}
        and whole["method"]["name"] == METHOD
    ):
        whole = distilled(whole, minutes_for(whole["budget"]))
    resolved = load(Recipe, whole, RecipeError, at="compress")
    parent = None if isinstance(model, str) else adopt(as_timm(model))
    with contextlib.nullcontext() if verbose else quiet():
        return _run(resolved, None if out is None else Path(out), parent, (data, test), tell, held, names_of(track))


def _budget_text(budget: str | Budget) -> str:
    """Return a budget as text, as in a recipe.

    Raises:
        BudgetError: if it bounds nothing, or has a table.
    """
    if not isinstance(budget, Budget):
        return budget
    if not budget.bounds():
        raise BudgetError("a budget must bound macs, params or latency, but bounds nothing; give macs=0.5")
    if budget.table is not None:
        raise BudgetError("a budget for compress must have no table, because a run measures its own; leave table out")
    return str(budget)


def _name_in_memory(model: nn.Module) -> str:
    """Return a unique name for a model in memory, so that run folders of different models are not confused.

    Raises:
        WeightsError: naming the tensor, if it has no data or a type that models do not compute in.
    """
    check_weights(model)
    return f"({type(model).__name__} in memory, {fingerprint(model)[:8]})"


def run(
    recipe: Recipe, folder: Path, *, say: Callable[[str], None] = lambda _: None, track: Sequence[str] = ()
) -> Result:
    """Run a recipe and write its run folder, or continue a run that was stopped.

    Args:
        recipe: the recipe.
        folder: the run folder; may exist if it contains the same recipe.
        say: called with a line of text at the start of each stage.
        track: experiment trackers, see `vitrim.run.track`.

    Raises:
        VitrimError: one sentence on what must hold, what came, and the way out.
    """
    return _run(recipe, folder, None, (recipe.data.train, recipe.data.test), say, track=track)


def _run(
    recipe: Recipe,
    folder: Path | None,
    parent: nn.Module | None,
    data: tuple[Any, Any],
    say: Callable[[str], None],
    held: Method | None = None,
    track: Sequence[str] = (),
) -> Result:
    if not ranks.first():
        folder, say, track = None, _silent, ()
    ranks.join()
    home = torch.device("cpu") if parent is None else home_of(parent)[0]
    with full_disk(folder), contextlib.ExitStack() as stack:
        recipe = led(lambda: _entered(recipe, folder, held, track, stack))
        method = recipe.found_method() if held is None else held
        job = prepare(recipe, method, folder, parent, data, say)
        led(lambda: _begin(job, method))
        with tracking(track, recipe, folder) as tracked:
            job = replace(job, tracked=tracked)
            plan, child, seconds, begun = cut(job, method)
            child, seconds = _train(job, child, seconds, begun)
            measured = measure_child(job, child, seconds)
            tracked.measured(measured)
        _finish(job)
    return Result(model=child.eval().to(home), plan=plan, measured=measured, parent=job.parent.to(home), folder=folder)


def _silent(text: str) -> None:
    """Print nothing: of several processes, the first does."""


def _entered(
    recipe: Recipe, folder: Path | None, held: Method | None, track: Sequence[str], stack: contextlib.ExitStack
) -> Recipe:
    """Return the recipe with all its settings, and hold its folder until `stack` ends."""
    check_trackers(track, folder)
    recipe = on_machine(recipe.resolved(held), folder)
    check_folder(folder, recipe, recipe.found_method() if held is None else held)
    stack.enter_context(leaving_nothing(folder))
    stack.enter_context(holding(folder))
    return recipe


def _begin(job: Job, method: Method) -> None:
    """Write what a resumed run compares itself with."""
    if job.folder is not None:
        if not job.has("recipe.toml"):
            write_recipe(job.folder / "recipe.toml", job.recipe)
        write_record(job.folder, about(job.splits))
    if not job.has("measured.json"):
        job.say(forecast(job, method))


def _train(job: Job, child: nn.Module, seconds: float, begun: Start | None) -> tuple[nn.Module, float]:
    """Train the child, or read an earlier run's; return it, and `seconds` plus the time of all parts of training."""
    path = job.file("model.safetensors")
    known = path if path is not None and path.is_file() else None
    if led(lambda: known is not None):
        return from_first(job, lambda: stored(job, known))
    start, before = time.perf_counter(), 0.0
    settings = job.recipe.train
    if settings.epochs and job.splits is not None:
        who = "its parent" if job.recipe.teacher is None else job.recipe.teacher.name
        job.say(f"training the child for epochs={settings.epochs:g} with {who} as teacher")
        fitted = fit(
            child,
            job.splits.train,
            settings,
            input=job.input,
            seed=job.recipe.seed,
            teacher=job.teacher,
            folder=job.file("training"),
            log=job.tracked.logging(logger(job.file("log.jsonl"))),
            validation=job.splits.validation,
            stage="train",
            start=begun,
            device=home_of(job.parent)[0],
        )
        child = fitted.ema if fitted.ema is not None else fitted.model
        before = fitted.seconds
    child = fold(child.eval())
    seconds += max(time.perf_counter() - start, before)
    if path is not None:
        store.save(child, path, provenance={"recipe": hide_passwords(dump(job.recipe)), "seconds": seconds})
    return child, seconds


def _finish(job: Job) -> None:
    """Write the report and delete the files that only a resumed run would need."""
    if job.folder is None:
        return
    if not job.has("report.html"):
        write_text(job.folder / "report.html", report.html([job.folder]))
    (job.folder / "cut.safetensors").unlink(missing_ok=True)
    for half in job.folder.glob(".*.*.*"):  # a temporary file of a killed run
        half.unlink()
    for name in ("search", "training"):
        scraps = job.folder / name
        # Keep the study of trials, because it is a result that other tools read.
        for path in sorted(scraps.rglob("*"), reverse=True) if scraps.is_dir() else []:
            if path.suffix != ".db":
                path.unlink() if path.is_file() else path.rmdir()
        if scraps.is_dir() and not any(scraps.iterdir()):
            scraps.rmdir()
