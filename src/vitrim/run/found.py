"""Check what a search found against the budget, record it, and compensate for the cut."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitrim.cut.compensate import recovered
from vitrim.cut.surgery import apply
from vitrim.data import Images, Splits, eval_loader
from vitrim.families import describe
from vitrim.methods import Found
from vitrim.nn.feed import fed
from vitrim.nn.modes import evaluating
from vitrim.run.job import Job
from vitrim.words.budget import SLACK
from vitrim.words.costs import Cost, cost_of
from vitrim.words.errors import BudgetError, MethodError
from vitrim.words.progress import progress
from vitrim.words.spec import Spec, folded

__all__ = ["check_budget", "only_trial", "recovered_by"]


def check_budget(job: Job, child: Spec) -> None:
    """Check that a child meets the budget of a run, and uses it up to 2 %.

    Raises:
        BudgetError: if it costs more.
        MethodError: if it costs less.
    """
    # Convolutions are trained together with the weights they are mixed from, and folded before they are stored.
    parent, cost = cost_of(job.spec), cost_of(folded(child))
    if job.budget.latency is not None:
        # The time was measured, so the other bounds need not be used up.
        others = job.budget.model_copy(update={"latency": None})
        if others.bounds() and not others.admits(cost, parent):
            raise BudgetError(f"what {job.recipe.method['name']} finds must cost at most {others}, but costs {cost}")
        return
    if not job.budget.admits(cost, parent):
        raise BudgetError(f"what {job.recipe.method['name']} finds must cost at most {job.budget}, but costs {cost}")
    if job.budget.spent(cost, parent) < 1 - SLACK:
        raise MethodError(
            f"what {job.recipe.method['name']} finds must spend at least {1 - SLACK:.0%} of {job.budget}, but spends "
            f"{job.budget.spent(cost, parent):.1%}; {_way_out(job, cost, parent)}"
        )


def _way_out(job: Job, cost: Cost, parent: Cost) -> str:
    """Return the way out if a budget is not used up: finer widths if the method has a choice, else a lower budget."""
    if job.recipe.method.get("choice", "free") != "free":
        return "choose finer widths with method.choice=free"
    shares = {
        name: math.ceil(1000 * getattr(cost, name) / getattr(parent, name)) / 1000 for name in job.budget.bounds()
    }
    return f"ask for what it reaches, --budget {','.join(f'{name}={share:g}' for name, share in shares.items())}"


def only_trial(found: Found) -> Mapping[str, Any]:
    """Return the record of a method that tries one plan alone."""
    cost = cost_of(folded(found.plan.child(describe(found.parent))))
    return {"trial": 0, "macs": cost.macs, "params": cost.params, "best": True}


def recovered_by(job: Job, found: Found) -> Mapping[str, Tensor]:
    """Return the grafts of the child, with the weights that `recover` computes for sliced layers.

    With ``auto``, a cut that cannot be compensated, or whose outputs do not come nearer to the uncut model's on other
    images, is left as it is, with a line that says why.

    Raises:
        MethodError: with ``ridge``, if there are no images or too few, or the method sets the weights itself.
    """
    how, splits = job.recipe.recover, job.splits
    if how == "none" or (how == "auto" and (job.recipe.train.epochs or found.grafts or found.start)):
        return found.grafts
    if splits is None or splits.calibration is None or not job.trains:
        if how == "auto":
            job.say("there are no images, so the cut is not compensated")
            return found.grafts
        raise MethodError("recover=ridge must have images, but no data was given; give --data SRC or leave it out")
    if found.grafts:
        raise MethodError(
            "recover=ridge must find weights that are slices of the parent's, but "
            f"{job.recipe.method['name']} makes its own; leave it out"
        )
    if any(stage.width is not None for stage in found.plan.stages):
        why = "a cut of the residual width cannot be compensated in closed form"
        if how == "auto":
            job.say(why)
            return found.grafts
        raise MethodError(f"recover=ridge must find the residual width whole, but {why}; leave it out")
    job.say("compensating in closed form" + (" (--recover none leaves it out)" if how == "auto" else ""))
    images, others = (splits.calibration, None) if how == "ridge" else _apart(splits, splits.calibration)
    batches = [x for x, _ in eval_loader(images, job.input, batch=32)]
    try:
        with progress("compensation", len(found.plan.blocks())) as advance:
            grafts = recovered(found.parent, found.plan, batches, seed=job.recipe.seed, advance=advance)
    except MethodError as problem:
        if how != "auto":
            raise
        job.say(f"the cut is not compensated: {problem}")
        return found.grafts
    if others is not None and not _nearer(found, grafts, eval_loader(others, job.input, batch=32)):
        job.say("the cut is not compensated, because that does not bring its outputs nearer to the uncut model's")
        return found.grafts
    return grafts


_JUDGED = 80
"""Number of images on which the outputs of a compensated child are compared."""


def _apart(splits: Splits, calibration: Images) -> tuple[Images, Images]:
    """Return images to fit with, and others to compare on: held-out or training images, else some of the former."""
    if splits.validation is not None:
        return calibration, splits.validation.pick(np.arange(min(_JUDGED, len(splits.validation))))
    count = len(calibration)
    if len(splits.train) >= 2 * count:  # most of them are not used in the fit
        return calibration, splits.train.pick(np.linspace(0, len(splits.train) - 1, _JUDGED).astype(np.int64))
    keep = max(1, count - min(_JUDGED, max(1, count // 5)))
    return calibration.pick(np.arange(keep)), calibration.pick(np.arange(min(keep, count - 1), count))


@torch.no_grad()
def _nearer(found: Found, grafts: Mapping[str, Tensor], batches: Iterable[tuple[Tensor, Tensor]]) -> bool:
    """Return whether the outputs of a child with `grafts` are nearer to the uncut model's, in mean square.

    Compensation helps wherever a cut costs accuracy (docs/methods/post_training.md), but it adds noise where images are
    few and a cut costs next to nothing, such as in a model of random weights whose outputs hardly vary.
    """
    children = [apply(found.parent, found.plan, grafts=some) for some in ({}, grafts)]
    sums = [0.0, 0.0]
    with evaluating(found.parent, *children):
        for x, _ in batches:
            images = fed(x, found.parent)
            whole = found.parent(images)
            for index, child in enumerate(children):
                sums[index] += float((child(images) - whole).float().square().sum())
    return sums[1] < sums[0]
