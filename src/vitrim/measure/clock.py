"""Measure the time of a forward pass, alternating with a reference model.

Clock frequency, caches and the load of a machine drift, so two equal models that are timed one after the other give
different times. Here the two models alternate in the order A B B A, and the reported ratio is the median over pairs of
neighboring samples, so that a drift common to both cancels.
"""

import functools
from collections.abc import Sequence
from typing import Self

import timm
import torch
from torch import nn

from vitrim.measure.model import Image, compiled_copy, home_of, image_of, running
from vitrim.measure.turns import at_least, name_of, percentiles, place_of, threading, turns, waiting
from vitrim.nn.device import fitting, why_not_type
from vitrim.nn.modes import evaluating
from vitrim.nn.weights import why_not_held
from vitrim.words.errors import RecipeError, WeightsError
from vitrim.words.plain import Node

__all__ = ["Latency", "latency"]


class Latency(Node):
    """Time of a forward pass, and the conditions of the measurement.

    Times are seconds for one batch: the median, with the 10th and 90th percentile as `_low` and `_high`. `ratio` is
    the median of (model / reference) over neighboring samples, with the same percentiles; it is below 1 if the model is
    faster. Fields that need a reference are None without one.
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
    """Peak memory of one forward pass in bytes, weights included; None if the device is not CUDA."""
    runs: int
    """Number of samples of each model."""
    repeats: int
    """Number of forward passes in one sample."""
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
        """Build the summary of alternating samples, in seconds, of a model and, if there is one, its reference."""
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
    """Measure the time of forward passes of `model`, alternating with `reference`.

    Adopted models run in the form of `vitrim.deploy.optimized`, any other as it is. Neither model is changed.

    Args:
        model: the model to time.
        reference: the model to compare with, usually the parent.
        image: channels, height and width; those of the model if None.
        batch: images in a forward pass, at least 1.
        threads: CPU threads while measuring; the setting of the process if None.
        dtype: floating-point type of weights and images; that of the model if None.
        device: device to run on; that of the model if None.
        seconds: time to spend on samples, above 0; `runs` samples are taken even if they take longer.
        runs: least number of samples of each model, at least 2; an odd number is raised by one, to complete a round of
            A B B A.
        warmup: forward passes of each model before the first sample, at least 1.
        compiled: whether copies of both models run with `torch.compile`.
        as_stored: whether adopted models run as they are stored, too.

    Raises:
        RecipeError: if a setting is out of its range, or the image size is not given and the model does not have one.
        RunError: if the batch does not fit into memory.
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
    missing = why_not_type(kind, place)
    if missing is not None:
        raise RecipeError(f"dtype must be one that the device has, but {missing}; use another")
    shape = image_of(model, image)
    given = (model,) if reference is None else (model, reference)
    models = [running(m, place, kind, as_stored=as_stored) for m in given]
    if compiled:
        models = [compiled_copy(m) for m in models]
    inputs = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)).to(place, kind)
    memory = fitting("batch", batch, place, "time a smaller one")
    with evaluating(*models), torch.inference_mode(), threading(threads), memory:
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
    low, middle, high = percentiles(samples[0])
    summary = {"seconds": middle, "seconds_low": low, "seconds_high": high, "images_per_second": batch / middle}
    if len(samples) == 2:
        low, middle, high = percentiles(samples[1])
        summary |= {"reference_seconds": middle, "reference_seconds_low": low, "reference_seconds_high": high}
        low, middle, high = percentiles([mine / theirs for mine, theirs in zip(*samples, strict=True)])
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
    # Other memory on the device (the reference, optimizers) does not belong to this model.
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers(), inputs))
    return torch.cuda.max_memory_allocated(inputs.device) - before + held
