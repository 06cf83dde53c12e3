"""Search what to cut, and cut: on the first of several processes, and together where the search trains."""

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import nn

from vitrim.cut.surgery import apply, fold
from vitrim.deploy import store
from vitrim.families import describe
from vitrim.methods import Data, Found, Method
from vitrim.nn.weights import fingerprint, home_of
from vitrim.run.found import check_budget, only_trial, recovered_by
from vitrim.run.job import Job
from vitrim.run.latency_budget import meet, time_child
from vitrim.run.log import logger
from vitrim.train import Start, ranks
from vitrim.train.checkpoint import check_made_from
from vitrim.train.leading import follow, leading, led
from vitrim.words.budget import Budget
from vitrim.words.errors import RunError
from vitrim.words.plain import write_text
from vitrim.words.plan import Plan, read_made_from, read_plan, write_plan
from vitrim.words.private import hide_passwords

__all__ = ["BEGUN", "cut", "from_first", "stored"]

BEGUN = "start.safetensors"
"""The file in a search's folder with the state that training continues from."""


def cut(job: Job, method: Method) -> tuple[Plan, nn.Module, float, Start | None]:
    """Search and cut, or read an earlier cut; also return the seconds it took and the state training continues from.

    Of several processes, the first does so, and the others get what it returns. A search that trains is called on all.
    """
    if not ranks.first():
        follow(
            lambda budget: method.search(job.parent, _images(job), budget, seed=job.recipe.seed, teacher=job.teacher)
        )
    else:
        with leading() as order:
            made = _cut(job, method, order if _is_shared(method) else lambda _: None)
    plan, seconds, files = led(lambda: (made[0], made[2], _packed(made[1], made[3]) if ranks.count() > 1 else {}))
    if ranks.first():
        return made
    child, begun = _unpacked(job, files)
    return plan, child, seconds, begun


def from_first(job: Job, make: Callable[[], tuple[nn.Module, float]]) -> tuple[nn.Module, float]:
    """Return on all processes the child and seconds that `make` returns on the first."""
    made = [make()] if ranks.first() else []
    files, seconds = led(lambda: (_packed(made[0][0], None) if ranks.count() > 1 else {}, made[0][1]))
    return made[0] if made else (_unpacked(job, files)[0], seconds)


def _is_shared(method: Method) -> bool:
    """Return whether every process calls the search of a method: because it trains, or says so."""
    return bool(getattr(method, "together", hasattr(method, "train")))


def _packed(child: nn.Module, begun: Start | None) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as place:
        store.save(child, Path(place) / store.FILE)
        if begun is not None:
            begun.save(Path(place) / BEGUN)
        return {path.name: path.read_bytes() for path in Path(place).iterdir()}


def _unpacked(job: Job, files: Mapping[str, bytes]) -> tuple[nn.Module, Start | None]:
    with tempfile.TemporaryDirectory() as place:
        for name, data in files.items():
            (Path(place) / name).write_bytes(data)
        child = store.load(Path(place) / store.FILE).to(home_of(job.parent)[0])
        return child, Start.load(Path(place) / BEGUN) if BEGUN in files else None


def _cut(job: Job, method: Method, order: Callable[[Budget], None]) -> tuple[Plan, nn.Module, float, Start | None]:
    start = time.perf_counter()
    plan_file, cut_file = job.file("plan.json"), job.file("cut.safetensors")
    for name in ("model.safetensors", "cut.safetensors"):
        path = job.file(name)
        if path is not None and path.is_file() and job.has("plan.json") and plan_file is not None:
            parent, plan = read_plan(plan_file)
            if parent != job.spec:
                raise RunError(
                    f"{plan_file}: the plan must be for {job.recipe.model.name}, but was made for another model; "
                    "choose another --out"
                )
            check_made_from(read_made_from(plan_file), _made_from(job), str(plan_file), "choose another --out")
            return plan, *stored(job, path), _begun(job)
    job.say(f"searching with {job.recipe.method['name']} for {job.budget}")
    found, child = _found(job, method, order)
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
        return found.plan, *stored(job, cut_file), _begun(job)
    return found.plan, child, time.perf_counter() - start, found.start


def _made_from(job: Job) -> dict[str, str]:
    """Return fingerprints of the parent's weights, of another teacher's, and of the images that a search may use."""
    found = {"model": fingerprint(job.parent)}
    if job.teacher is not job.parent:
        found["teacher"] = fingerprint(job.teacher)
    if job.splits is not None and job.trains:
        found["images"] = job.splits.train.fingerprint()
    return found


def _images(job: Job) -> Data | None:
    """Return the images of a search; none if the splits are parts of the test images, which no search may use."""
    if job.splits is None or not job.trains:
        return None
    parts = job.splits
    return Data(train=parts.train, calibration=parts.calibration, validation=parts.validation, input=job.input)


def _found(job: Job, method: Method, order: Callable[[Budget], None]) -> tuple[Found, nn.Module]:
    """Return the method's result, and the child that is cut by it.

    Args:
        job: the run.
        method: what searches.
        order: called with the budget of each search, which other processes take part in.
    """
    log, searches, data = job.tracked.logging(logger(job.file("log.jsonl"))), 0, _images(job)

    def search(budget: Budget) -> Found:
        nonlocal searches
        # A search for another budget must not continue from the state of this one.
        folder = job.file("search" if not searches else f"search/again-{searches}")
        searches += 1
        order(budget)
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


def stored(job: Job, path: Path | None) -> tuple[nn.Module, float]:
    """Return a child that was stored, on the parent's device, and the seconds that making it took."""
    assert path is not None
    seconds = store.given(path).get("seconds")
    known = float(seconds) if isinstance(seconds, int | float) else 0.0
    return store.load(path).to(next(job.parent.parameters()).device), known
