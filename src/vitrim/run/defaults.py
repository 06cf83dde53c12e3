"""What is done if no method is named, and how long it will take."""

import time
from collections.abc import Mapping
from typing import Any

import torch

from vitrim.data import Images
from vitrim.measure.turns import waiting
from vitrim.methods import Method
from vitrim.nn.modes import evaluating
from vitrim.run.job import Job
from vitrim.train import DISTILLED, Train
from vitrim.words.budget import Budget
from vitrim.words.progress import spoken

__all__ = ["METHOD", "MINUTES", "distilled", "forecast", "minutes_for"]

METHOD = "post_training"
"""The method that keeps most without training: over three draws of images a ViT-Ti at half its MACs loses 0.1 points
(docs/methods/post_training.md)."""

MINUTES = 3.0
"""Minutes of distillation without labels that follow it for small budgets."""

SMALL = 0.5
"""Share of the parent up to which a budget is small; above, little is lost. At 0.5, 320 steps of 16 images turned a
divergence of 0.117 nats into 0.090 (paired error 0.007) on 200 training images kept apart (ViT-Ti); at 0.4, four
minutes turned 0.189 into 0.129 and at 0.3 0.441 into 0.249 on 500 validation images (means over three draws,
benchmarks/joint_minutes.jsonl)."""

_STEP = 3.0
"""Cost of a step of training, in forward passes: one forward, and a backward of twice its cost."""

_BATCH = 8


def minutes_for(budget: str) -> float | None:
    """Return the minutes of distillation that follow the default method; None where they do not help."""
    shares = [value for value in Budget.parse(budget).bounds().values() if value <= 1]
    return MINUTES if shares and min(shares) <= SMALL else None


def distilled(asked: Mapping[str, Any], minutes: float | None) -> dict[str, Any]:
    """Return the tables of a recipe that sets nothing of training, with label-free distillation for some minutes."""
    return dict(asked) if not minutes else {**asked, "train": {**DISTILLED, "minutes": minutes}}


@torch.no_grad()
def _pass(job: Job) -> float:
    """Return the seconds that the parent takes for an image: the fastest of three batches, after another one."""
    device = next(job.parent.parameters()).device
    wait = waiting(device)
    images = torch.zeros(
        _BATCH, job.input.channels, *job.input.size, device=device, dtype=next(job.parent.parameters()).dtype
    )
    with evaluating(job.parent):
        job.parent(images)
        wait()
        taken = []
        for _ in range(3):
            start = time.perf_counter()
            job.parent(images)
            wait()
            taken.append(time.perf_counter() - start)
    return min(taken) / _BATCH


def forecast(job: Job, method: Method) -> str:
    """Return a sentence on how long a run will take on this machine, by its parts; rough.

    A method says how many forward passes of an image its search takes (``passes``); training within the search is
    counted by its steps.
    """
    recipe, parts = job.recipe, dict[str, float | None]()
    one = _pass(job)
    share = min((value for value in job.budget.bounds().values() if value <= 1), default=1.0)
    counts = {name: _count(getattr(job.splits, name, None)) for name in ("train", "calibration", "validation", "test")}
    search = getattr(method, "train", None)
    passes = getattr(method, "passes", None)
    trained = _training(search, counts["train"], 1.0) if isinstance(search, Train) else 0.0
    if not job.has("plan.json"):
        looked = None if passes is None else passes(job.spec, counts["calibration"], counts["validation"])
        known = looked is not None or trained > 0
        parts["search"] = one * ((looked or 0.0) + trained) if known else None
    if not job.has("model.safetensors"):
        if recipe.train.minutes and recipe.train.epochs:
            parts["distillation"] = 60 * recipe.train.minutes
        elif recipe.train.epochs:
            parts["training"] = one * _training(recipe.train, counts["train"], share)
        elif recipe.recover != "none" and counts["calibration"]:
            parts["compensation"] = 4 * one * counts["calibration"]
    compared = counts["test"] or counts["validation"] or counts["calibration"]
    parts["measuring"] = one * (1 + share) * compared + (recipe.measure.seconds if recipe.measure.latency else 0.0)
    total = sum(seconds or 0.0 for seconds in parts.values())
    told = ", ".join(f"{name} {'unknown' if each is None else spoken(each)}" for name, each in parts.items())
    least = "at least" if None in parts.values() else "about"
    return f"this will take {least} {spoken(total)} on this machine: {told}"


def _count(images: Images | None) -> int:
    return 0 if images is None else len(images)


def _training(train: Train, images: int, share: float) -> float:
    """Return the cost of training in forward passes of the parent: student, and the teacher if there is one."""
    teacher = 0.0 if train.distill.kind == "none" else 1.0
    return train.epochs * images * train.augment.repeats * (_STEP * share + teacher)
