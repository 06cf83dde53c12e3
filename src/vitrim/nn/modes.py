"""Context managers that restore training flags, ``requires_grad``, the device and the random state, or need no data."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitrim.nn.weights import home_of

__all__ = ["evaluating", "modes_kept", "moved_to", "random_state_kept", "without_data"]


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


_WRITES = frozenset(
    [getattr(Tensor, f"{name}_") for name in "add clamp div erfinv fill mul normal sub uniform zero".split()]
    + [getattr(nn.init, f"{name}_") for name in "constant kaiming_uniform normal uniform".split()]
)
"""Functions that change the values of a tensor in place and nothing else: all that initial weights are made with."""


class _Unwritten(TorchFunctionMode):
    """Does not write to tensors on the meta device: they have no values, and PyTorch takes up to 5 ms for a tensor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WRITES and args and isinstance(args[0], Tensor) and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def without_data() -> Iterator[None]:
    """Build modules on the meta device, where no tensor has data, and skip what would initialize their weights."""
    with torch.device("meta"), _Unwritten():
        yield
