"""Whether two models are the same function: outputs and features on one random input, by one table of tolerances.

Outputs alone would not tell. Behind a head of zeros, with which fine-tuning starts, all features look alike.
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
    # Our blocks compute what timm's do, in an order of their own.
    "adopt": _ROUNDINGS | {torch.float64: 1e-5, torch.float32: 1e-5},
    # The same numbers in the same order: bit for bit on a CPU, and a few roundings on an accelerator.
    "store": _ROUNDINGS,
    # Another runtime fuses, and so rounds, otherwise.
    "export": {torch.float32: 1e-4},
    "runtime": {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.1, torch.bfloat16: 0.1},
}
"""Largest difference that is allowed, relative to the largest entry, by purpose and by type."""

_FLOOR = 1e-6
"""Least scale of a relative difference, for what is zero everywhere."""


class Difference(NamedTuple):
    """Where two models part.

    Attributes:
        what: ``logits`` or ``features``.
        apart: largest difference, relative to the largest entry.
        allowed: what `TOLERANCES` allows.
    """

    what: str
    apart: float
    allowed: float


def relative(got: Any, wanted: Any) -> float:
    """Largest difference of two tensors, relative to the largest entry of `wanted`; infinite if shapes differ.

    Of tuples, lists and dictionaries of tensors, the largest of their members.
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
    """What maps images alone to the features that the head of `model` reads; None if there is no `forward_features`.

    A segmentor's features are those of its backbone.
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
    """Whether logits vary from image to image by much more than `allowed`; where not, they say little of the features.

    Args:
        logits: of several different images, ``(B, ...)``.
        allowed: relative to the largest logit.
    """
    varied = (logits - logits.mean(dim=0, keepdim=True)).abs().max()
    return bool(varied > 100 * allowed * logits.abs().max().clamp_min(_FLOOR))


@torch.no_grad()
def find_difference(model: nn.Module, wanted: nn.Module, image: tuple[int, int], purpose: Purpose) -> Difference | None:
    """Compare the logits and the features of two models on two random images; both are left as they were.

    Args:
        model: the model that is held against the other, on the same device.
        wanted: what is right.
        image: height and width.
        purpose: names the tolerance.

    Returns:
        The first that is too far apart or not finite; None if both models are the same.
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
