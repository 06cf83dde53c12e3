"""Context managers that restore training flags, ``requires_grad``, the device and the random state."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from vitrim.nn.weights import home_of

__all__ = ["evaluating", "modes_kept", "moved_to", "random_state_kept"]


@contextlib.contextmanager
def modes_kept(*models: nn.Module | None) -> Iterator[None]:
    """Restore the training flag of every module at the end; flags can differ between modules if a part is frozen."""
    flags = [(module, module.training) for model in models if model is not None for module in model.modules()]
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextlib.contextmanager
def moved_to(device: torch.device, *models: nn.Module | None) -> Iterator[None]:
    """Move models to `device`, in place, and back to where each was at the end."""
    homes = [(model, home_of(model)[0]) for model in models if model is not None]
    try:
        for model, _ in homes:
            model.to(device)
        yield
    finally:
        for model, home in homes:
            model.to(home)


@contextlib.contextmanager
def evaluating(*models: nn.Module | None, frozen: bool = False) -> Iterator[None]:
    """Put models in evaluation mode, and restore the mode of every module at the end.

    Args:
        models: the models; None is ignored.
        frozen: whether ``requires_grad`` is also set to false for all parameters, and restored at the end.
    """
    present = [model for model in models if model is not None]
    wanted = [p for model in present for p in model.parameters() if frozen and p.requires_grad]
    with modes_kept(*present):
        try:
            for model in present:
                model.eval()
            for parameter in wanted:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in wanted:
                parameter.requires_grad_(True)


@contextlib.contextmanager
def random_state_kept(device: torch.device | None = None) -> Iterator[None]:
    """Restore PyTorch's random state at the end: that of the CPU, and of `device` if it is a CUDA device."""
    with torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else []):
        yield
