"""Compare the child of a run with its parent: costs, accuracy and time, and the conditions of the measurements."""

import datetime
import platform
from typing import Any

import timm
import torch
from torch import Tensor, nn

from vitrim import __version__
from vitrim.cut.outputs import as_classes
from vitrim.data import Images, eval_loader
from vitrim.families import describe
from vitrim.measure.turns import place_of
from vitrim.nn.weights import home_of
from vitrim.run.images import line_of
from vitrim.run.job import Job
from vitrim.run.latency_budget import time_child
from vitrim.run.remarks import chance_of, remarks, standard_error
from vitrim.train import evaluate, ranks, reference_logits
from vitrim.train.leading import led, together
from vitrim.words.costs import cost_of
from vitrim.words.errors import RunError
from vitrim.words.plain import read_json, write_json
from vitrim.words.private import hide_passwords

__all__ = ["measure_child"]


def measure_child(job: Job, child: nn.Module, seconds: float) -> dict[str, Any]:
    """Measure the child of a run against its parent and write ``measured.json``, or read it if it exists.

    Of several processes, each evaluates its part of the images, and the first measures time.

    Args:
        job: the run.
        child: the child as it is stored.
        seconds: time that searching, cutting and training took.
    """
    path = job.file("measured.json")
    known: dict[str, Any] | None = led(
        lambda: read_json(path, RunError) if path is not None and path.is_file() else None
    )
    if known is not None:
        return known
    accuracy = _accuracy(job, child)
    return led(lambda: _measured(job, child, seconds, accuracy))


def _measured(job: Job, child: nn.Module, seconds: float, accuracy: dict[str, Any]) -> dict[str, Any]:
    parent, cost = cost_of(job.spec), cost_of(describe(child))
    times, path = _time(job, child), job.file("measured.json")
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
        **accuracy,
        **times,
        "warnings": "\n".join(remarks(accuracy | times, tested_on_training=_tested_on_training(job))) or None,
        "vitrim": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    if path is not None:
        path.with_name("report.html").unlink(missing_ok=True)
        write_json(path, hide_passwords(measured))
    return measured


def _accuracy(job: Job, child: nn.Module) -> dict[str, Any]:
    """Return the top-1 of both on the test images, and how often they agree; only agreement without a test split."""
    unknown: dict[str, Any] = dict.fromkeys(
        "top1 top1_error top1_parent top1_parent_error agreement agreement_error distance".split()
    )
    unknown |= {"data": None, "test_images": 0, "test_source": None, "compared_images": 0, "chance": None}
    if job.splits is None:
        return unknown
    unknown["data"] = line_of(job.splits)
    images = job.splits.test or job.splits.validation or job.splits.calibration
    if images is None:
        return unknown
    what = "test" if images is job.splits.test else "held-out" if images is job.splits.validation else "calibration"
    job.say(f"evaluating parent and child on {len(images)} {what} images")
    settings, device = job.recipe.train, home_of(child)[0]
    mine = ranks.part(len(images))
    loader = eval_loader(images, job.input, workers=settings.workers, device=device, places=mine)
    # On a CPU, models are measured in the type of their weights, in which they will run there.
    how: dict[str, Any] = {"precision": "fp32" if device.type == "cpu" else settings.precision, "tf32": settings.tf32}
    theirs = together(lambda: reference_logits(job.parent, loader, **how))
    after = evaluate(child, loader, reference=theirs, shared=True, **how)
    found = unknown | {
        "agreement": after.agreement,
        "agreement_error": standard_error(after.agreement, after.count),
        "distance": after.distance,
        "compared_images": after.count,
    }
    if job.splits.test is None:
        return found
    parents = None if after.top1 is None else _top1(theirs, images, mine)
    return found | {
        "top1": after.top1,
        "top1_error": standard_error(after.top1, after.count),
        "top1_parent": parents,
        "top1_parent_error": standard_error(parents, after.count),
        "test_images": after.count,
        "test_source": images.label + (f" ({images.split})" if images.split else ""),
        "chance": None if after.top1 is None else chance_of(images.labels),
    }


def _tested_on_training(job: Job) -> bool:
    """Return whether training and test images are the same source without splits."""
    if job.splits is None or job.splits.test is None or not job.trains:
        return False
    train, test = job.splits.train, job.splits.test
    return job.recipe.data.train is not None and (train.source, train.split) == (test.source, test.split)


def _top1(logits: Tensor, images: Images, mine: range) -> float:
    """Return the top-1 of all processes, each with the logits of its images."""
    labels = torch.as_tensor(images.labels[mine.start : mine.stop])
    right = ranks.summed((as_classes(logits).argmax(dim=-1) == labels).sum())
    return 100 * float(right.double() / len(images))


def _time(job: Job, child: nn.Module) -> dict[str, Any]:
    settings = job.recipe.measure
    if not settings.latency:
        return dict.fromkeys(_TIMES) | {"device": str(place_of(home_of(child)[0]))}
    job.say("timing parent and child in turns")
    taken = time_child(child, job.parent, settings)
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
        "runtime": settings.runtime,
    }


_TIMES = (
    "latency_ms latency_parent_ms latency_ratio latency_ratio_low latency_ratio_high device threads batch dtype runtime"
).split()
