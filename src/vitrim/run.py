"""One straight line from a recipe to a run folder.

    parent -> search -> cut -> train against the parent -> measure -> store -> report

Each stage writes its file beside and renames it, and reads what the one before wrote; so a run resumes at the first
missing file, also in the middle of a search or of training.
"""

import datetime
import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from vitrim import __version__, report, store
from vitrim.budget import SLACK
from vitrim.compensate import recovered
from vitrim.contract import Data, Found, Method
from vitrim.costs import cost_of
from vitrim.data import Images, eval_loader
from vitrim.errors import BudgetError, MethodError, RecipeError, RunError
from vitrim.families import adopt, describe
from vitrim.job import Job, check_folder, full_disk, leaving_nothing, logger, prepare
from vitrim.measure import latency
from vitrim.plain import dump, load, read_json, write_json, write_text
from vitrim.plan import Plan, read_plan, write_plan
from vitrim.recipe import Recipe, merged, write_recipe
from vitrim.spec import Spec, folded
from vitrim.surgery import apply, fold
from vitrim.train import Start, evaluate, fit, reference_logits

__all__ = ["Result", "compress", "run"]

BEGUN = "start.safetensors"
"""In the folder of a search: what the training goes on from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What came of a run.

    Attributes:
        model: the child, in evaluation mode.
        plan: what was cut from the parent.
        measured: flat record of ``measured.json``; ``top1`` in percent, None where it could not be measured.
        parent: the parent, adopted, in evaluation mode.
        folder: where the files lie, if anywhere.
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
    method: str = "taylor",
    budget: str = "macs=0.5",
    epochs: float = 0,
    seed: int = 0,
    test: Any = None,
    settings: Mapping[str, Any] | None = None,
    recover: str = "none",
    train: Mapping[str, Any] | None = None,
    measure: Mapping[str, Any] | None = None,
    recipe: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
) -> Result:
    """Make `model` smaller.

    Args:
        model: a timm model, an adopted model, or the name of one (see `vitrim compress`); left as it was.
        data: images to search and train on: a source string (``digits``, a folder, a tar, ``torch/cifar10`` …), a
            dataset of (PIL image or ``(3, height, width)`` tensor, label), a loader of batches, or None for methods
            that need none.
        method: name of a method, see `vitrim methods`.
        budget: what the child may cost: ``macs=0.5``, ``macs=2.3G``, ``params=12M``, or several joined by commas.
        epochs: how long to train the child with its parent as teacher; 0 cuts only.
        seed: of everything random.
        test: images to measure on, in the same forms; no search sees them.
        settings: the method's own settings.
        recover: ``ridge`` compensates what was cut in closed form, see `vitrim.recipe.Recipe`.
        train: further settings of training, see `vitrim.train.Train`.
        measure: how to measure, see `vitrim.recipe.Measure`.
        recipe: any other setting of `vitrim.recipe.Recipe`, such as ``{"data": {"mean": [0.5, 0.5, 0.5]}}``.
        out: a run folder to write; a run that was stopped there goes on.

    Returns:
        The child, its plan and what was measured.

    Raises:
        VitrimError: one sentence on what must hold, what came, and the way out.
    """
    sources = [str(source) if isinstance(source, str | Path) else None for source in (data, test)]
    asked = {
        "model": {"name": model if isinstance(model, str) else _portrait(model)},
        "data": {"train": sources[0], "test": sources[1]},
        "method": {"name": method, **(settings or {})},
        "budget": budget,
        "recover": recover,
        "train": {"epochs": epochs, **(train or {})},
        "measure": dict(measure or {}),
        "seed": seed,
    }
    resolved = load(Recipe, merged(asked, recipe or {}), RecipeError, at="compress")
    parent = None if isinstance(model, str) else adopt(model)
    return _run(resolved, None if out is None else Path(out), parent, (data, test), lambda _: None)


def _portrait(model: nn.Module) -> str:
    """A name that tells a model in memory from another, so that no run folder is taken for the other's."""
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return f"({type(model).__name__} in memory, {digest.hexdigest()[:8]})"


def run(recipe: Recipe, folder: Path, *, say: Callable[[str], None] = lambda _: None) -> Result:
    """Carry out a recipe and write its run folder, or go on with a run that was stopped.

    Args:
        recipe: what to do.
        folder: where to write; may exist if it holds the same recipe.
        say: receives a line about each stage as it starts.

    Raises:
        VitrimError: one sentence on what must hold, what came, and the way out.
    """
    return _run(recipe, folder, None, (recipe.data.train, recipe.data.test), say)


def _run(
    recipe: Recipe, folder: Path | None, parent: nn.Module | None, data: tuple[Any, Any], say: Callable[[str], None]
) -> Result:
    recipe = recipe.resolved()
    method = recipe.found_method()
    with full_disk(folder):
        check_folder(folder, recipe)
        job = prepare(recipe, method, folder, parent, data, say)
        with leaving_nothing(folder):
            if folder is not None and not job.has("recipe.toml"):
                write_recipe(folder / "recipe.toml", recipe)
            plan, child, seconds, begun = _cut(job, method)
            child, seconds = _train(job, child, seconds, begun)
            measured = _measure(job, child, seconds)
            _finish(job)
    return Result(model=child.eval(), plan=plan, measured=measured, parent=job.parent, folder=folder)


def _cut(job: Job, method: Method) -> tuple[Plan, nn.Module, float, Start | None]:
    """Search and cut, or read what an earlier run cut; with the seconds that it took and what training goes on from."""
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
            return plan, *_stored(job, path), _begun(job)
    job.say(f"searching with {job.recipe.method['name']} for {job.budget}")
    data = None
    # Without training images the splits are the test images', which no search sees.
    if job.splits is not None and job.trains:
        data = Data(
            train=job.splits.train,
            calibration=job.splits.calibration,
            validation=job.splits.validation,
            input=job.input,
        )
    found = method.search(
        job.parent,
        data,
        job.budget,
        seed=job.recipe.seed,
        teacher=job.teacher,
        folder=job.file("search"),
        log=logger(job.file("log.jsonl")),
    )
    child = apply(found.parent, found.plan, grafts=_recovered(job, found, data))
    _check_budget(job, describe(child))
    if plan_file is not None and cut_file is not None:
        lines = "".join(json.dumps(dict(trial)) + "\n" for trial in found.trials)
        write_text(plan_file.with_name("trials.jsonl"), lines)
        write_plan(plan_file, job.spec, found.plan)
        if found.start is not None:
            found.start.save(plan_file.with_name("search") / BEGUN)
        store.save(child, cut_file, provenance={"seconds": time.perf_counter() - start})
        # What a resumed run would read is what this one goes on with, down to which weights are frozen.
        return found.plan, *_stored(job, cut_file), _begun(job)
    return found.plan, child, time.perf_counter() - start, found.start


def _begun(job: Job) -> Start | None:
    """What a search left for the training to go on from, if it did."""
    folder = job.file("search")
    return Start.load(folder / BEGUN) if folder is not None and (folder / BEGUN).is_file() else None


def _recovered(job: Job, found: Found, data: Data | None) -> Mapping[str, Tensor]:
    """The grafts of the child, with what `recover` makes of the weights that are slices."""
    if job.recipe.recover == "none":
        return found.grafts
    if data is None or data.calibration is None:
        raise MethodError("recover=ridge must see images, but no data was given; give --data SRC or leave it out")
    if found.grafts:
        raise MethodError(
            "recover=ridge must find weights that are slices of the parent's, but "
            f"{job.recipe.method['name']} makes its own; leave it out"
        )
    job.say("compensating in closed form")
    images = [x for x, _ in eval_loader(data.calibration, data.input, batch=32)]
    return recovered(found.parent, found.plan, images, seed=job.recipe.seed)


def _stored(job: Job, path: Path) -> tuple[nn.Module, float]:
    seconds = store.provenance(path).get("given", {}).get("seconds", 0.0)
    return store.load(path).to(next(job.parent.parameters()).device), float(seconds)


def _check_budget(job: Job, child: Spec) -> None:
    # Convolutions are trained with all they are mixed from, and folded before they are stored.
    parent, cost = cost_of(job.spec), cost_of(folded(child))
    if not job.budget.admits(cost, parent):
        raise BudgetError(f"what {job.recipe.method['name']} finds must cost at most {job.budget}, but costs {cost}")
    if job.budget.spent(cost, parent) < 1 - SLACK:
        raise MethodError(
            f"what {job.recipe.method['name']} finds must spend at least {1 - SLACK:.0%} of {job.budget}, but spends "
            f"{job.budget.spent(cost, parent):.1%}; choose finer widths with method.choice=free"
        )


def _train(job: Job, child: nn.Module, seconds: float, begun: Start | None) -> tuple[nn.Module, float]:
    """Train the child, or read what an earlier run trained; `seconds` grow by those of every part of the training."""
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
            log=logger(job.file("log.jsonl")),
            stage="train",
            start=begun,
        )
        child = fitted.ema if fitted.ema is not None else fitted.model
        before = fitted.seconds
    child = fold(child.eval())
    seconds += max(time.perf_counter() - start, before)
    if path is not None:
        store.save(child, path, provenance={"recipe": dump(job.recipe), "seconds": seconds})
    return child, seconds


def _measure(job: Job, child: nn.Module, seconds: float) -> dict[str, Any]:
    path = job.file("measured.json")
    if path is not None and path.is_file():
        known: dict[str, Any] = read_json(path, RunError)
        return known
    parent, cost = cost_of(job.spec), cost_of(describe(child))
    measured: dict[str, Any] = {
        "model": job.recipe.model.name,
        "method": job.recipe.method["name"],
        "budget": str(job.budget),
        "epochs": job.recipe.train.epochs,
        "seed": job.recipe.seed,
        "macs": cost.macs,
        "params": cost.params,
        "macs_parent": parent.macs,
        "params_parent": parent.params,
        "macs_ratio": cost.macs / parent.macs,
        "params_ratio": cost.params / parent.params,
        "seconds": seconds,
        **_accuracy(job, child),
        **_time(job, child),
        "vitrim": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    if path is not None:
        path.with_name("report.html").unlink(missing_ok=True)
        write_json(path, measured)
    return measured


def _accuracy(job: Job, child: nn.Module) -> dict[str, Any]:
    """Top-1 of both on the test images, and how often they agree; agreement alone where there is no test split."""
    unknown = {"top1": None, "top1_parent": None, "agreement": None, "test_images": 0}
    if job.splits is None:
        return unknown
    images = job.splits.test or job.splits.validation or job.splits.calibration
    if images is None:
        return unknown
    job.say(f"evaluating parent and child on {len(images)} images")
    loader = eval_loader(images, job.input)
    theirs = reference_logits(job.parent, loader)
    after = evaluate(child, loader, reference=theirs)
    if job.splits.test is None:
        return unknown | {"agreement": after.agreement}
    return {
        "top1": after.top1,
        "top1_parent": None if after.top1 is None else _top1(theirs, images),
        "agreement": after.agreement,
        "test_images": after.count,
    }


def _top1(logits: Tensor, images: Images) -> float:
    labels = torch.as_tensor(images.labels)
    return 100 * float((logits.argmax(dim=-1) == labels).double().mean())


def _time(job: Job, child: nn.Module) -> dict[str, Any]:
    settings = job.recipe.measure
    if not settings.latency:
        return dict.fromkeys(_TIMES) | {"device": str(next(child.parameters()).device)}
    job.say("timing parent and child in turns")
    taken = latency(child, job.parent, batch=settings.batch, threads=settings.threads, seconds=settings.seconds)
    return {
        "latency_ms": 1e3 * taken.seconds,
        "latency_parent_ms": 1e3 * (taken.reference_seconds or 0.0),
        "latency_ratio": taken.ratio,
        "latency_ratio_low": taken.ratio_low,
        "latency_ratio_high": taken.ratio_high,
        "device": taken.device,
        "threads": taken.threads,
        "batch": taken.batch,
        "dtype": taken.dtype,
    }


_TIMES = (
    "latency_ms latency_parent_ms latency_ratio latency_ratio_low latency_ratio_high device threads batch dtype".split()
)


def _finish(job: Job) -> None:
    """Write the report and clear away what only a stopped run would need."""
    if job.folder is None:
        return
    if not job.has("report.html"):
        write_text(job.folder / "report.html", report.html([job.folder]))
    (job.folder / "cut.safetensors").unlink(missing_ok=True)
    for half in job.folder.glob(".*.*.*"):  # what a killed run was writing
        half.unlink()
    for name in ("search", "training"):
        scraps = job.folder / name
        # A study of trials is a result, which other tools read.
        for path in sorted(scraps.rglob("*"), reverse=True) if scraps.is_dir() else []:
            if path.suffix != ".db":
                path.unlink() if path.is_file() else path.rmdir()
        if scraps.is_dir() and not any(scraps.iterdir()):
            scraps.rmdir()
