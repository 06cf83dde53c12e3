"""Whether a device computes, how much memory it has free, and one sentence for a batch that does not fit it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from vitrim.words.errors import RunError
from vitrim.words.plain import reason

__all__ = ["fitting", "free_bytes", "why_not_here", "why_not_type"]

_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current"))
"""Bytes that a container may use, and uses (cgroup v2); the machine may have more."""


def why_not_here(device: torch.device | str) -> str | None:
    """Return one phrase on why nothing can be computed on `device`; None if it can.

    One number is added there: a driver that is too old, or a card for which this PyTorch has no kernels, is found only
    by that.
    """
    try:
        place = torch.device(device)
        if place.type == "meta":
            return "meta holds no values"
        if float(torch.zeros(1, device=place).add_(1).sum()) == 1:
            return None
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError) as problem:
        return reason(problem)
    return "it does not add 1 to 0"


def why_not_type(kind: torch.dtype, device: torch.device) -> str | None:
    """Return one phrase on why `device` cannot compute in `kind`; None if it can."""
    if device.type == "cuda" and kind == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        return f"{torch.cuda.get_device_name(device)} has no bf16"
    if device.type == "mps" and kind == torch.float64:
        return "mps has no float64"
    return None


def free_bytes(device: torch.device) -> int:
    """Return the bytes that are free on `device`: of a CUDA device its own, else those of the machine or container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):
        most, used = (int(path.read_text(encoding="utf-8")) for path in _LIMITS)
        free = min(free, max(0, most - used))
    return free


@contextlib.contextmanager
def fitting(setting: str, images: int, device: torch.device, way: str) -> Iterator[None]:
    """Turn PyTorch's error about memory that is used up into one sentence.

    Args:
        setting: what the user sets, such as ``train.batch``.
        images: number of images that were tried at once.
        device: where.
        way: the way out, such as ``lower it``.

    Raises:
        RunError: in place of PyTorch's error.
    """
    try:
        yield
    except RuntimeError as problem:  # torch.OutOfMemoryError is one
        if not _is_memory(problem):
            raise
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"the {device.type}"
        raise RunError(
            f"{setting} must fit into the memory of {name}, but {images} images at a time do not; {way}"
        ) from None


def _is_memory(problem: RuntimeError) -> bool:
    return isinstance(problem, torch.OutOfMemoryError) or "can't allocate memory" in str(problem)
