"""Time several functions alternately, in the order A B C C B A, so that a drift of the machine affects all equally."""

import contextlib
import ctypes
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vitrim.nn.device import why_not_here
from vitrim.words.errors import RecipeError
from vitrim.words.progress import progress

__all__ = [
    "TICK",
    "Timer",
    "Turns",
    "at_least",
    "keeping_memory",
    "name_of",
    "percentiles",
    "place_of",
    "threading",
    "timer",
    "turns",
    "waiting",
]

TICK = 0.005
"""Least duration of a sample in seconds; shorter calls are repeated within one sample."""

_TRIM, _MMAP = -1, -3
"""Options of glibc's `mallopt`: trim threshold and mmap threshold."""

Timer = Callable[[int], float]
"""Repeats a call the given number of times and returns the seconds for one call."""


class Turns(NamedTuple):
    """Result of `turns`."""

    samples: list[list[float]]
    """Seconds for one call, one list for each function; samples with equal index were taken in the same half round."""
    repeats: int
    """Number of calls in one sample."""


def turns(
    calls: Sequence[Callable[[], Any]],
    *,
    wait: Callable[[], None] = lambda: None,
    seconds: float = 5.0,
    runs: int = 6,
    warmup: int = 2,
) -> Turns:
    """Time functions alternately.

    Args:
        calls: the functions to time.
        wait: function that returns when all submitted work is done, see `waiting`.
        seconds: time to spend, above 0; `runs` samples of each function are taken even if they take longer.
        runs: least number of samples of each function, at least 2; an odd number is raised by one, to complete a round.
        warmup: calls of each function before the first sample, at least 1.

    Raises:
        RecipeError: if a setting is out of its range.
    """
    at_least("runs", runs, 2)
    at_least("warmup", warmup, 1)
    if isinstance(seconds, bool) or not isinstance(seconds, Real) or not 0 < seconds < math.inf:
        raise RecipeError(f"seconds must be above 0 and finite, but got {seconds}")
    with keeping_memory():
        return _taken([timer(call, wait) for call in calls], seconds, runs, warmup)


def _taken(timers: Sequence[Timer], seconds: float, runs: int, warmup: int) -> Turns:
    fastest = min(min(one(1) for _ in range(warmup)) for one in timers)
    repeats = max(1, math.ceil(TICK / fastest))
    samples: list[list[float]] = [[] for _ in timers]
    start = now = time.perf_counter()
    with progress("timing", seconds, refresh=False) as advance:
        while len(samples[0]) < runs or now < start + seconds:
            for order in (range(len(timers)), reversed(range(len(timers)))):
                for index in order:
                    samples[index].append(timers[index](repeats))
            before, now = now, time.perf_counter()
            advance(now - before)
    return Turns(samples, repeats)


@contextlib.contextmanager
def keeping_memory() -> Iterator[None]:
    """Within the context, let glibc keep freed memory instead of returning it to the system; must not be nested.

    Otherwise, depending on what the process did before, tensors of several megabytes may be returned to the system and
    allocated again page by page in every forward pass. DeiT-S (batch of 8, 2 threads) took 0.54 s without this, with
    20 % between the 10th and the 90th percentile, and 0.45 s with it, with 2 %. Servers get the same effect from
    jemalloc or tcmalloc, and ONNX Runtime and OpenVINO from their own arenas. Other C libraries are not changed.
    """
    library = ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
    if library is None:
        yield
        return
    library.mallopt(_MMAP, 2**30)
    library.mallopt(_TRIM, 2**31 - 1)
    try:
        yield
    finally:
        # These are the largest values that glibc sets by itself. The values before cannot be read, and they change
        # with use.
        library.mallopt(_MMAP, 2**25)
        library.mallopt(_TRIM, 2**26)
        library.malloc_trim(0)


def timer(call: Callable[[], Any], wait: Callable[[], None]) -> Timer:
    """Return a function that repeats `call` and returns the seconds for one call."""

    def run(repeats: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        wait()
        return (time.perf_counter() - start) / repeats

    return run


def waiting(device: torch.device) -> Callable[[], None]:
    """Return a function that synchronizes `device`."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()

    return wait


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the 10th percentile, median and 90th percentile of at least two values."""
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[0], statistics.median(values), tenths[-1]


@contextlib.contextmanager
def threading(count: int | None) -> Iterator[None]:
    """Run with `count` CPU threads within the context; with the setting of the process if None."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def at_least(name: str, value: int, least: int) -> None:
    """Raise if a setting is below its range.

    Raises:
        RecipeError: if `value` is not an integer of at least `least`; the message names the setting.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise RecipeError(f"{name} must be a whole number of at least {least}, but got {value}")


def place_of(device: torch.device | str) -> torch.device:
    """Return the device with its index, because ``cuda`` does not equal the ``cuda:0`` of a parameter.

    Raises:
        RecipeError: if this machine has no such device, or the device cannot compute (``meta``).
    """
    problem = why_not_here(device)
    if problem is not None:
        raise RecipeError(
            f"device must be one of this machine's, but got '{device}': {problem}; use cpu, or leave it out"
        )
    place = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if str(place) == "cuda" else place


def name_of(device: torch.device) -> str:
    """Return the name of the hardware behind `device`, such as ``cpu, AMD EPYC`` or ``NVIDIA H100``."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {_processor()}"


def _processor() -> str:
    """Return the name of the processor from ``/proc/cpuinfo``, else from Python's `platform`."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine() or "unknown"
