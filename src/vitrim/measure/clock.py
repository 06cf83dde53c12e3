"""How long a forward pass takes here, next to a reference that runs in turn with it.

A machine's clock, its caches and its other users drift, so two models timed one after the other differ even when they
are the same. Here they take turns in the order A B B A, and their ratio is the median over neighbours: a drift that
both share falls out of it.
"""

import contextlib
import copy
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Self

import timm
import torch
from torch import nn

from vitrim.errors import RecipeError
from vitrim.measure.model import Image, home_of, image_of, resting
from vitrim.plain import Node
from vitrim.progress import progress

__all__ = ["Latency", "latency"]

TICK = 0.005
"""Shortest sample in seconds; shorter passes are repeated within one sample."""


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
) -> Latency:
    """Time forward passes of `model`, in turns with `reference`.

    Both models are left as they were: where `device` or `dtype` differ from their own, copies run.

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

    Raises:
        RecipeError: if a setting is out of its range, or the image size is not known.
    """
    for name, value, least in (("batch", batch, 1), ("runs", runs, 2), ("warmup", warmup, 1)):
        _at_least(name, value, least)
    if threads is not None:
        _at_least("threads", threads, 1)
    if not 0 < seconds < math.inf:
        raise RecipeError(f"seconds must be above 0 and finite, but got {seconds}")
    home, kind = home_of(model)
    place = _place(device) if device is not None else home
    kind = dtype if dtype is not None else kind
    shape = image_of(model, image)
    models = [_at(m, place, kind) for m in ((model,) if reference is None else (model, reference))]
    if compiled:
        models = [_compiled(m) for m in models]
    inputs = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(0)).to(place, kind)
    with resting(*models), torch.inference_mode(), _threads(threads):
        passes = [_timer(m, inputs) for m in models]
        repeats = _repeats(passes, warmup)
        samples = _rounds(passes, repeats, seconds, runs)
        return Latency.of(
            samples,
            peak_bytes=_peak(models[0], inputs),
            repeats=repeats,
            batch=batch,
            image=shape,
            threads=torch.get_num_threads(),
            dtype=str(kind).removeprefix("torch."),
            device=_name(place),
        )


def _at_least(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or value < least:
        raise RecipeError(f"{name} must be a whole number of at least {least}, but got {value}")


def _place(device: torch.device | str) -> torch.device:
    """The device with its number, as parameters name it: ``cuda`` alone would equal none of theirs."""
    place = torch.device(device)
    if place.type == "cuda" and place.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return place


def _at(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    if home_of(model) == (device, dtype):
        return model
    return copy.deepcopy(model).to(device, dtype)


def _compiled(model: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    twin.compile()
    return twin


def _timer(model: nn.Module, inputs: torch.Tensor) -> Callable[[int], float]:
    """A function that runs `model` some times and returns seconds per pass."""

    def run(repeats: int) -> float:
        _wait(inputs.device)
        start = time.perf_counter()
        for _ in range(repeats):
            model(inputs)
        _wait(inputs.device)
        return (time.perf_counter() - start) / repeats

    return run


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _repeats(passes: Sequence[Callable[[int], float]], warmup: int) -> int:
    """Warm up, and return how many passes of the fastest model make a sample of `TICK`."""
    fastest = min(min(run(1) for _ in range(warmup)) for run in passes)
    return max(1, math.ceil(TICK / fastest))


def _rounds(passes: Sequence[Callable[[int], float]], repeats: int, seconds: float, runs: int) -> list[list[float]]:
    """Samples of each model, taken A B B A until time and least number are reached."""
    samples: list[list[float]] = [[] for _ in passes]
    start = now = time.perf_counter()
    with progress("timing", seconds, refresh=False) as advance:
        while len(samples[0]) < runs or now < start + seconds:
            for order in (range(len(passes)), reversed(range(len(passes)))):
                for index in order:
                    samples[index].append(passes[index](repeats))
            before, now = now, time.perf_counter()
            advance(now - before)
    return samples


def _summary(samples: Sequence[Sequence[float]], batch: int) -> dict[str, float]:
    low, middle, high = _spread(samples[0])
    summary = {"seconds": middle, "seconds_low": low, "seconds_high": high, "images_per_second": batch / middle}
    if len(samples) == 2:
        low, middle, high = _spread(samples[1])
        summary |= {"reference_seconds": middle, "reference_seconds_low": low, "reference_seconds_high": high}
        low, middle, high = _spread([mine / theirs for mine, theirs in zip(*samples, strict=True)])
        summary |= {"ratio": middle, "ratio_low": low, "ratio_high": high}
    return summary


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    """10th percentile, median and 90th percentile."""
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[0], statistics.median(values), tenths[-1]


def _peak(model: nn.Module, inputs: torch.Tensor) -> int | None:
    if inputs.device.type != "cuda":
        return None
    _wait(inputs.device)
    before = torch.cuda.memory_allocated(inputs.device)
    torch.cuda.reset_peak_memory_stats(inputs.device)
    model(inputs)
    _wait(inputs.device)
    # What else lives on the device (the reference, optimisers) is none of this model's.
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers(), inputs))
    return torch.cuda.max_memory_allocated(inputs.device) - before + held


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {_processor()}"


def _processor() -> str:
    """The processor's name as Linux tells it, else what Python knows."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine() or "unknown"


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)
