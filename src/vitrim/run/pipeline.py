"""Run a recipe, stage by stage, and write a run folder.

    parent -> search -> cut -> train against the parent -> measure -> store -> report

Each stage reads the file of the stage before it, and writes its own file under a temporary name and renames it. So a
run resumes at the first missing file, also in the middle of a search or of training.
"""

import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitrim import report
from vitrim.cut.surgery import apply, fold
from vitrim.deploy import store
from vitrim.deploy.transformers import as_timm
from vitrim.families import adopt, describe
from vitrim.methods import Data, Found, Method
from vitrim.nn.weights import check_weights, fingerprint, home_of
from vitrim.run.child import measure_child
from vitrim.run.defaults import METHOD, distilled, forecast, minutes_for
from vitrim.run.found import check_budget, only_trial, recovered_by
from vitrim.run.images import about, write_record
from vitrim.run.job import Job, check_folder, full_disk, leaving_nothing, logger, prepare
from vitrim.run.latency_budget import meet, time_child
from vitrim.run.lock import holding
from vitrim.run.machine import on_machine
from vitrim.run.presets import laid_under
from vitrim.run.presets import preset as read_preset
from vitrim.run.recipe import Recipe, merged, write_recipe
from vitrim.run.track import check_trackers, names_of, tracking
from vitrim.train import Start, fit
from vitrim.train.checkpoint import check_made_from
from vitrim.words.budget import Budget
from vitrim.words.errors import BudgetError, RecipeError, RunError
from vitrim.words.plain import dump, load, write_text
from vitrim.words.plan import Plan, read_made_from, read_plan, write_plan
from vitrim.words.private import hide_passwords
from vitrim.words.progress import quiet, tell

__all__ = ["Result", "compress", "run"]

BEGUN = "start.safetensors"
"""The file in a search's folder with the state that training continues from."""


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
    epochs: float = 0,
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
        epochs: epochs to train the child with its parent as teacher; 0 does not train.
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
        "train": {"epochs": epochs, **(train or {})},
        "measure": dict(measure or {}),
        "seed": seed,
    } | ({} if device is None else {"device": device})
    asked = merged(asked, recipe or {})
    if held is not None and asked["method"]:
        raise RecipeError("settings must be those of the instance, but recipe holds a method too; leave it out")
    names = [preset] if isinstance(preset, str) else preset
    whole = laid_under(asked, {f"preset {name}": read_preset(name) for name in names})
    if method is None and sources[0] and whole["train"] == {"epochs": 0} and whole["method"]["name"] == METHOD:
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
    check_trackers(track, folder)
    recipe = on_machine(recipe.resolved(held), folder)
    home = torch.device("cpu") if parent is None else home_of(parent)[0]
    method = recipe.found_method() if held is None else held
    with full_disk(folder):
        check_folder(folder, recipe, method)
        with leaving_nothing(folder), holding(folder):
            job = prepare(recipe, method, folder, parent, data, say)
            if folder is not None and not job.has("recipe.toml"):
                write_recipe(folder / "recipe.toml", recipe)
            if folder is not None:
                write_record(folder, about(job.splits))
            if not job.has("measured.json"):
                say(forecast(job, method))
            with tracking(track, recipe, folder) as tracked:
                job = replace(job, tracked=tracked)
                plan, child, seconds, begun = _cut(job, method)
                child, seconds = _train(job, child, seconds, begun)
                measured = measure_child(job, child, seconds)
                tracked.measured(measured)
            _finish(job)
    return Result(model=child.eval().to(home), plan=plan, measured=measured, parent=job.parent.to(home), folder=folder)


def _cut(job: Job, method: Method) -> tuple[Plan, nn.Module, float, Start | None]:
    """Search and cut, or read an earlier cut; also return the seconds it took and the state training continues from."""
    start = time.perf_counter()
    plan_file, cut_file = job.file("plan.json"), job.file("cut.safetensors")
    for stored in ("model.safetensors", "cut.safetensors"):
        path = job.file(stored)
        if path is not None and path.is_file() and job.has("plan.json") and plan_file is not None:
            parent, plan = read_plan(plan_file)
            if parent != job.spec:
                raise RunError(
                    f"{plan_file}: the plan must be for {job.recipe.model.name}, but was made for another model; "
                    "choose another --out"
                )
            check_made_from(read_made_from(plan_file), _made_from(job), str(plan_file), "choose another --out")
            return plan, *_stored(job, path), _begun(job)
    job.say(f"searching with {job.recipe.method['name']} for {job.budget}")
    data = None
    # Without training images the splits are parts of the test images, which no search may use.
    if job.splits is not None and job.trains:
        data = Data(
            train=job.splits.train,
            calibration=job.splits.calibration,
            validation=job.splits.validation,
            input=job.input,
        )
    found, child = _found(job, method, data)
    check_budget(job, describe(child))
    trials = found.trials or (only_trial(found),)
    job.tracked.trials(trials)
    if plan_file is not None and cut_file is not None:
        lines = "".join(json.dumps(hide_passwords(dict(trial))) + "\n" for trial in trials)
        write_text(plan_file.with_name("trials.jsonl"), lines)
        write_plan(plan_file, job.spec, found.plan, _made_from(job))
        if found.start is not None:
            found.start.save(plan_file.with_name("search") / BEGUN)
        store.save(child, cut_file, provenance={"seconds": time.perf_counter() - start})
        # Continue with what a resumed run would read, including which weights are frozen.
        return found.plan, *_stored(job, cut_file), _begun(job)
    return found.plan, child, time.perf_counter() - start, found.start


def _made_from(job: Job) -> dict[str, str]:
    """Return fingerprints of the parent's weights, of another teacher's, and of the images that a search may use."""
    found = {"model": fingerprint(job.parent)}
    if job.teacher is not job.parent:
        found["teacher"] = fingerprint(job.teacher)
    if job.splits is not None and job.trains:
        found["images"] = job.splits.train.fingerprint()
    return found


def _found(job: Job, method: Method, data: Data | None) -> tuple[Found, nn.Module]:
    """Return the method's result, and the child that is cut by it."""
    log, searches = job.tracked.logging(logger(job.file("log.jsonl"))), 0

    def search(budget: Budget) -> Found:
        nonlocal searches
        # A search for another budget must not continue from the state of this one.
        folder = job.file("search" if not searches else f"search/again-{searches}")
        searches += 1
        return method.search(
            job.parent, data, budget, seed=job.recipe.seed, teacher=job.teacher, folder=folder, log=log
        )

    def cut(found: Found) -> nn.Module:
        return apply(found.parent, found.plan, grafts=recovered_by(job, found))

    if job.budget.latency is None:
        found = search(job.budget)
        return found, cut(found)
    met = meet(
        job.parent,
        job.budget,
        search,
        lambda found: apply(found.parent, found.plan, grafts=found.grafts),  # weights do not change the time
        lambda child: time_child(fold(child.eval()), job.parent, job.recipe.measure),
        plans_by_time=getattr(method, "plans_by_time", False),
        say=job.say,
    )
    record = {"stage": "latency", "predicted": met.predicted, "measured": met.ratio, "children": met.measured}
    if log is not None:
        log(record)
    return replace(met.found, trials=(*met.found.trials, record)), cut(met.found)


def _begun(job: Job) -> Start | None:
    """Return the state that a search stored for the training to continue from, or None."""
    folder = job.file("search")
    return Start.load(folder / BEGUN) if folder is not None and (folder / BEGUN).is_file() else None


def _stored(job: Job, path: Path) -> tuple[nn.Module, float]:
    seconds = store.given(path).get("seconds")
    known = float(seconds) if isinstance(seconds, int | float) else 0.0
    return store.load(path).to(next(job.parent.parameters()).device), known


def _train(job: Job, child: nn.Module, seconds: float, begun: Start | None) -> tuple[nn.Module, float]:
    """Train the child, or read an earlier run's; return it, and `seconds` plus the time of all parts of training."""
    path = job.file("model.safetensors")
    if path is not None and path.is_file():
        return _stored(job, path)
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
