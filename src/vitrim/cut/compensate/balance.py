"""Divide the norm of a channel between the weights before and after it.

C channels, F features before them, D width.
"""

import torch
from torch import Tensor

__all__ = ["balanced", "ratio_of"]

_TINY = 1e-30


def balanced(inner: Tensor, outer: Tensor, ratio: float, bias: int = 0) -> tuple[Tensor, Tensor]:
    """Return the weights before and after channels, scaled so that the norms of each channel have a ratio.

    The product of both layers stays the same. What changes is how they train: a step of AdamW moves every weight by
    about the learning rate. Channels of variance 1, as `value_map` gives, have outer weights of a twentieth to
    two thirds of a ViT-Ti's usual ones.

    Args:
        inner: weights of the layer before the channels, ``(C, F)``.
        outer: weights of the layer after them, ``(D, C)``.
        ratio: of the norm of a channel's outer weights to that of its inner ones, > 0.
        bias: number of last columns of `inner` that are scaled and are not part of its norm.

    Returns:
        `inner` and `outer`; channels without weights are as they were.
    """
    before, after = inner[:, : inner.shape[1] - bias].norm(dim=1), outer.norm(dim=0)
    alive = (before > 0) & (after > 0)
    factors = torch.where(alive, (ratio * before / torch.where(alive, after, 1.0)).sqrt(), 1.0)
    return inner / factors[:, None], outer * factors


def ratio_of(inner: Tensor, outer: Tensor) -> float:
    """Return the ratio of the norm of the weights after some channels to that of those before; 1 if one is zero."""
    return float(outer.norm() / inner.norm().clamp_min(_TINY)) or 1.0
