"""What a call changes for a while and puts back: training flags, wanted gradients, the random state."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

__all__ = ["evaluating", "modes_kept", "random_state_kept"]


@contextlib.contextmanager
def modes_kept(*models: nn.Module | None) -> Iterator[None]:
    """Give every module its own training flag back at the end; flags of modules differ where a part is frozen."""
    flags = [(module, module.training) for model in models if model is not None for module in model.modules()]
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextlib.contextmanager
def evaluating(*models: nn.Module | None, frozen: bool = False) -> Iterator[None]:
    """Put models in evaluation mode, and give every module its own mode back at the end.

    Args:
        models: the models; None is passed over.
        frozen: whether no parameter asks for a gradient meanwhile, either; those that did ask for it again at the end.
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
    """Put PyTorch's random state back at the end: the CPU's, and that of `device` where it is a CUDA device."""
    with torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else []):
        yield
