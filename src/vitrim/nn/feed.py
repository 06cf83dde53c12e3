"""Images in the floating type of a model, and sums that need a wider one."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

__all__ = ["exact", "fed", "precise", "summing", "uncast", "wide"]


def fed(images: Tensor, model: nn.Module) -> Tensor:
    """Move images to the device of a model and into its floating type, those of its first floating parameter.

    Loaders give float32, whatever the model computes in.

    Args:
        images: ``(B, C, h, w)``; labels and other whole numbers must not come here.
        model: any; without parameters the images stay as they are.
    """
    first = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), None)
    return images if first is None else images.to(first.device, first.dtype, non_blocking=True)


def precise(x: Tensor) -> torch.dtype:
    """Return the type for sums over many tokens: that of `x`, but at least float32.

    Counts above 256 are not whole in bfloat16, and a sum of 655 values of 100 is infinite in float16.
    """
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """`x` in float32 where its type is shorter: products summed over tokens lose or overflow in half precision."""
    return x.to(precise(x))


@contextlib.contextmanager
def uncast(device: torch.device) -> Iterator[None]:
    """Within the context, products on `device` have the type of their inputs, whatever autocast is on around it."""
    if not (torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


def summing(device: torch.device) -> torch.dtype:
    """Return the type for sums over whole data sets on `device`: float64, or float32 on Apple's, which has no other."""
    return torch.float32 if device.type == "mps" else torch.float64


def exact(x: Tensor) -> Tensor:
    """`x` in float64, on its own device, or on the CPU if that device has no float64."""
    return (x.cpu() if x.device.type == "mps" else x).double()
