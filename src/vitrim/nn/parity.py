"""Check whether two models compute the same function, by their outputs and features on a random input.

Outputs alone are not sufficient: if the head is zero, as at the start of fine-tuning, all features give equal outputs.
"""

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vitrim.nn.layers import input_channels
from vitrim.nn.modes import evaluating
from vitrim.nn.segment import Segmentor
from vitrim.nn.weights import FLOATS, home_of

__all__ = ["TOLERANCES", "Difference", "Purpose", "features_of", "find_difference", "relative", "tells_images_apart"]

Purpose = Literal["adopt", "store", "export", "runtime"]

_ROUNDINGS = {kind: 8 * torch.finfo(kind).eps for kind in FLOATS}

TOLERANCES: dict[Purpose, dict[torch.dtype, float]] = {
    # Blocks of vitrim compute the same function as those of timm, in another order of operations.
    "adopt": _ROUNDINGS | {torch.float64: 1e-5, torch.float32: 1e-5},
    # The same operations in the same order: equal bits on a CPU, and a few roundings of difference on an accelerator.
    "store": _ROUNDINGS,
    # Another runtime fuses operations differently, and so rounds differently.
    "export": {torch.float32: 1e-4},
    "runtime": {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.1},
}
"""Largest allowed difference, relative to the largest entry, by purpose and by floating-point type."""

_FLOOR = 1e-6
"""Smallest divisor of a relative difference, for tensors that are zero everywhere."""


class Difference(NamedTuple):
    """A difference between two models that is too large.

    Attributes:
        what: ``logits`` or ``features``.
        apart: largest difference, relative to the largest entry.
        allowed: the tolerance from `TOLERANCES`.
    """

    what: str
    apart: float
    allowed: float


def relative(got: Any, wanted: Any) -> float:
    """Return the largest difference of two tensors, relative to the largest entry of `wanted`.

    It is infinite if shapes differ. For tuples, lists and dictionaries of tensors, it is the largest value over their
    members.
    """
    if isinstance(got, Tensor) and isinstance(wanted, Tensor):
        if got.shape != wanted.shape:
            return math.inf
        got, wanted = got.double(), wanted.double()
        return float((got - wanted).abs().max() / wanted.abs().max().clamp_min(_FLOOR))
    mine, theirs = (list(_members(value)) for value in (got, wanted))
    if len(mine) != len(theirs) or not mine:
        return math.inf
    apart = [relative(a, b) for a, b in zip(mine, theirs, strict=True)]
    return next((each for each in apart if math.isnan(each)), max(apart))


def _members(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def features_of(model: nn.Module) -> Callable[[Tensor], Any] | None:
    """Return the `forward_features` of `model`, which maps images to the features that the head reads.

    For a segmentor it is that of its backbone. None if there is none, or if it needs other arguments than the images.
    """
    owner: Any = model.backbone if isinstance(model, Segmentor) else model
    found: Callable[[Tensor], Any] | None = getattr(owner, "forward_features", None)
    if found is None:
        return None
    try:
        inspect.signature(found).bind(None)
    except TypeError:
        return None
    return found


def tells_images_apart(logits: Tensor, allowed: float) -> bool:
    """Return whether logits vary from image to image by more than 100 times `allowed`.

    If they do not, equal logits do not show that the features are equal.

    Args:
        logits: logits of several different images, ``(B, ...)``.
        allowed: tolerance, relative to the largest logit.
    """
    varied = (logits - logits.mean(dim=0, keepdim=True)).abs().max()
    return bool(varied > 100 * allowed * logits.abs().max().clamp_min(_FLOOR))


@torch.no_grad()
def find_difference(model: nn.Module, wanted: nn.Module, image: tuple[int, int], purpose: Purpose) -> Difference | None:
    """Compare the logits and the features of two models on two random images; both models are left unchanged.

    Args:
        model: the model to check, on the same device as `wanted`.
        wanted: the reference model.
        image: height and width.
        purpose: selects the tolerance.

    Returns:
        The first difference that is too large or not finite; None if both models compute the same.
    """
    device, dtype = home_of(wanted)
    allowed = TOLERANCES[purpose][dtype]
    x = torch.randn(2, input_channels(wanted), *image, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    calls = [("logits", model, wanted), ("features", features_of(model), features_of(wanted))]
    with evaluating(model, wanted):
        for what, mine, theirs in calls:
            if mine is not None and theirs is not None:
                apart = relative(mine(x), theirs(x))
                if not apart <= allowed:
                    return Difference(what, apart, allowed)
    return None
