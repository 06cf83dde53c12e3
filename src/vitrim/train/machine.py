"""Settings that fit the machine: what ``auto`` stands for on a device, and how a pass is computed there."""

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import nn

from vitrim.data.inputs import workers_for
from vitrim.nn.device import why_not_type
from vitrim.train.settings import Train
from vitrim.words.errors import RecipeError, RunError
from vitrim.words.plain import reason

__all__ = [
    "Precision",
    "autocast",
    "compiling",
    "in_layout",
    "multiplies_bf16",
    "settled",
    "statistics",
    "tf32_allowed",
]

Precision = Literal["fp32", "bf16", "fp16"]

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def settled(settings: Train, device: torch.device) -> Train:
    """Return the settings with every ``auto`` replaced by what fits `device`.

    ``precision``: bf16 on a CUDA device that has it, and where training is limited by minutes on a CPU that multiplies
    tiles of bf16; else fp32. ``workers``: see `vitrim.data.inputs.workers_for`.
    ``channels_last``: on CUDA.

    Raises:
        RecipeError: the device lacks the precision that is asked for.
    """
    missing = None if settings.precision == "auto" else why_not_type(TYPES[settings.precision], device)
    if missing is not None:
        raise RecipeError(f"train.precision must be one that the device has, but {missing}; use fp32, or auto")
    found: dict[str, Any] = {}
    if settings.precision == "auto":
        fast = device.type == "cuda" or (settings.minutes is not None and multiplies_bf16(device))
        found["precision"] = "bf16" if fast and why_not_type(torch.bfloat16, device) is None else "fp32"
    if settings.workers == "auto":
        found["workers"] = workers_for(device)
    if settings.channels_last == "auto":
        found["channels_last"] = device.type == "cuda"
    return settings.model_copy(update=found) if found else settings


def multiplies_bf16(device: torch.device) -> bool:
    """Return whether `device` is a CPU whose matrix units multiply bf16 (AMX).

    There a step of distillation of a ViT-Ti takes half the time of one in float32 (0.90 s against 1.79 s for 16 images,
    one thread of an Intel Xeon), so that twice as many fit into the same minutes.
    """
    if device.type != "cpu":
        return False
    told: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(told.get("amx_tile") and told.get("amx_bf16"))


@contextlib.contextmanager
def statistics(device: torch.device, precision: str) -> Iterator[None]:
    """Return a context for activations and their moments in `precision`; the process's setting is restored.

    With ``bf16``, layers run under autocast, and products that leave it (`vitrim.nn.feed.uncast`) sum in float32 what
    they multiply in bf16 where a CPU has tiles for it: a Gram matrix of 3,456 columns takes half the time.
    """
    before = torch.get_float32_matmul_precision()
    fast = precision == "bf16" and multiplies_bf16(device)
    try:
        if fast:
            torch.set_float32_matmul_precision("medium")
        with autocast(device, precision):
            yield
    finally:
        if fast:
            torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def tf32_allowed(device: torch.device, allowed: bool) -> Iterator[None]:
    """Let products in float32 round their inputs to 10 bits on CUDA (TF32); the process's setting is restored."""
    if not allowed or device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which layers compute in `precision` on `device`; weights keep their type."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, TYPES[precision])


@contextlib.contextmanager
def compiling(asked: bool) -> Iterator[None]:
    """Turn what PyTorch's compiler raises inside a `with` block into one sentence.

    Raises:
        RunError: there is no C++ compiler or no Triton, or an operator cannot be compiled.
    """
    try:
        yield
    except Exception as problem:
        if not asked or not type(problem).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        cause = getattr(problem, "inner_exception", problem)
        raise RunError(
            f"train.compile must be able to compile this model here, but says: {reason(cause)}; leave it out"
        ) from problem


@contextlib.contextmanager
def in_layout(model: nn.Module | None, channels_last: bool) -> Iterator[None]:
    """Store the weights of convolutions with channels last inside a `with` block, and as before at the end."""
    if model is None or not channels_last:
        yield
        return
    model.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        model.to(memory_format=torch.contiguous_format)
