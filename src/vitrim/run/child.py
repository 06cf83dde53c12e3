"""What a run's child is worth next to its parent: costs, accuracy, time, and on what they were measured."""

import datetime
import platform
from typing import Any

import timm
import torch
from torch import Tensor, nn

from vitrim import __version__
from vitrim.data import Images, eval_loader
from vitrim.families import describe
from vitrim.run.job import Job
from vitrim.run.latency_budget import clocked
from vitrim.train import evaluate, reference_logits
from vitrim.words.costs import cost_of
from vitrim.words.errors import RunError
from vitrim.words.plain import read_json, write_json

__all__ = ["judged"]


def judged(job: Job, child: nn.Module, seconds: float) -> dict[str, Any]:
    """Measure the child of a run against its parent, or read what was measured; writes ``measured.json``.

    Args:
        job: the run.
        child: as it is stored.
        seconds: what searching, cutting and training took.
    """
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
    what = "test" if images is job.splits.test else "held-out" if images is job.splits.validation else "calibration"
    job.say(f"evaluating parent and child on {len(images)} {what} images")
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
    taken = clocked(child, job.parent, settings)
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
