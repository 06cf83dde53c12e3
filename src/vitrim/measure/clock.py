"""How long a forward pass takes here, next to a reference that runs in turn with it.

A machine's clock, its caches and its other users drift, so two models timed one after the other differ even when they
are the same. Here they take turns in the order A B B A, and their ratio is the median over neighbours: a drift that
both share falls out of it.
"""

import functools
from collections.abc import Sequence
from typing import Self

import timm
import torch
from torch import nn

from vitrim.measure.model import Image, compiled_copy, home_of, image_of, running
from vitrim.measure.turns import at_least, name_of, place_of, spread, threading, turns, waiting
from vitrim.nn.modes import evaluating
from vitrim.nn.weights import why_not_held
from vitrim.words.errors import RecipeError, WeightsError
from vitrim.words.plain import Node

__all__ = ["Latency", "latency"]


class Latency(Node):
    """Time of a forward pass, and what it was measured on.

    Times are seconds for one batch: the median, with the 10th and 90th percentile as `_low` and `_high`. `ratio` is
    the median of (model / reference) over neighbouring samples, below 1 where the model is faster, with the same
    percentiles. What needs a reference is None without one.
    """

    seconds: float
    seconds_low: float
    seconds_high: float
    images_per_second: float
    reference_seconds: float | None = None
    reference_seconds_low: float | None = None
    reference_seconds_high: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    peak_bytes: int | None = None
    """Most memory that one pass of the model held at once, weights included; only CUDA tells."""
    runs: int
    """Samples taken of each model."""
    repeats: int
    """Forward passes in one sample."""
    batch: int
    image: Image
    threads: int
    dtype: str
    device: str
    torch: str
    timm: str
    as_stored: bool = False
    """Whether the models ran as they are stored, not in the form of `vitrim.deploy.optimized`."""

    @classmethod
    def of(
        cls,
        samples: Sequence[Sequence[float]],
        *,
        batch: int,
        image: Image,
        threads: int,
        dtype: str,
        device: str,
        repeats: int = 1,
        peak_bytes: int | None = None,
        as_stored: bool = False,
    ) -> Self:
        """From samples of a model, and of its reference if there is one, that were taken in turns; seconds each."""
        return cls(
            **_summary(samples, batch),
            peak_bytes=peak_bytes,
            runs=len(samples[0]),
            repeats=repeats,
            batch=batch,
            image=image,
            threads=threads,
            dtype=dtype,
            device=device,
            torch=torch.__version__,
            timm=timm.__version__,
            as_stored=as_stored,
        )


def latency(
    model: nn.Module,
    reference: nn.Module | None = None,
    *,
    image: Image | None = None,
    batch: int = 8,
    threads: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    seconds: float = 5.0,
    runs: int = 6,
    warmup: int = 2,
    compiled: bool = False,
    as_stored: bool = False,
) -> Latency:
    """Time forward passes of `model`, in turns with `reference`.

    Adopted models run in the form of `vitrim.deploy.optimized`, any other as it is; what was given is left as it was.

    Args:
        model: the model to time.
        reference: the model to compare with, usually the parent.
        image: channels, height and width; the model's own where not given.
        batch: images in a pass, at least 1.
        threads: CPU threads while measuring; the process's setting where not given.
        dtype: floating-point type of weights and images; the model's own where not given.
        device: where to run; the model's own where not given.
        seconds: time to spend on samples, above 0; `runs` samples are taken even if they take longer.
        runs: least samples of each model, at least 2; an odd number is raised by one, to end a round of A B B A.
        warmup: passes of each model before the first sample, at least 1.
        compiled: whether `torch.compile` runs both, in copies.
        as_stored: whether adopted models run as they are stored, too.

    Raises:
        RecipeError: if a setting is out of its range, or the image size is not known.
        WeightsError: if a model is on the meta device.
    """
    at_least("batch", batch, 1)
    if threads is not None:
        at_least("threads", threads, 1)
    for one in (model, reference):
        missing = None if one is None else why_not_held(one)
        if missing is not None:
            raise WeightsError(missing)
    if dtype is not None and not dtype.is_floating_point:
        raise RecipeError(f"dtype must be a floating-point type, but got {dtype}; leave it out for the model's own")
    home, kind = home_of(model)
    place = place_of(device) if device is not None else home
    kind = dtype if dtype is not None else kind
    shape = image_of(model, image)
    given = (model,) if reference is None else (model, reference)
    models = [running(m, place, kind, as_stored=as_stored) for m in given]
    if compiled:
        models = [compiled_copy(m) for m in models]
    inputs = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)).to(place, kind)
    with evaluating(*models), torch.inference_mode(), threading(threads):
        calls = [functools.partial(m, inputs) for m in models]
        taken = turns(calls, wait=waiting(place), seconds=seconds, runs=runs, warmup=warmup)
        return Latency.of(
            taken.samples,
            peak_bytes=_peak(models[0], inputs),
            repeats=taken.repeats,
            batch=batch,
            image=shape,
            threads=torch.get_num_threads(),
            dtype=str(kind).removeprefix("torch."),
            device=name_of(place),
            as_stored=as_stored,
        )


def _summary(samples: Sequence[Sequence[float]], batch: int) -> dict[str, float]:
    low, middle, high = spread(samples[0])
    summary = {"seconds": middle, "seconds_low": low, "seconds_high": high, "images_per_second": batch / middle}
    if len(samples) == 2:
        low, middle, high = spread(samples[1])
        summary |= {"reference_seconds": middle, "reference_seconds_low": low, "reference_seconds_high": high}
        low, middle, high = spread([mine / theirs for mine, theirs in zip(*samples, strict=True)])
        summary |= {"ratio": middle, "ratio_low": low, "ratio_high": high}
    return summary


def _peak(model: nn.Module, inputs: torch.Tensor) -> int | None:
    if inputs.device.type != "cuda":
        return None
    wait = waiting(inputs.device)
    wait()
    before = torch.cuda.memory_allocated(inputs.device)
    torch.cuda.reset_peak_memory_stats(inputs.device)
    model(inputs)
    wait()
    # What else lives on the device (the reference, optimisers) is none of this model's.
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers(), inputs))
    return torch.cuda.max_memory_allocated(inputs.device) - before + held
