"""Random gates for training, and deterministic gates for costs.

Source: He et al., "Pruning Self-attentions into Convolutional Layers in Single Path", TPAMI 2024, arXiv 2111.11802, and
the authors' code. Gates of one attention are ordered: one is open only if all before it are.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["START", "budgeted", "hard", "noise", "opened", "sampled", "weights"]

START = 1.5
"""Initial logit of every gate: open with probability 0.818 (the authors' code)."""


class _Through(torch.autograd.Function):
    """The value of one tensor with the gradient of another; ``hard - soft + soft`` would not be exactly 0 or 1."""

    @staticmethod
    def forward(ctx: Any, hard: Tensor, soft: Tensor) -> Tensor:
        return hard.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]


_through: Callable[[Tensor, Tensor], Tensor] = _Through.apply


def noise(like: Tensor) -> Tensor:
    """Draw from the logistic distribution in the shape of `like`, with torch's global generator."""
    uniform = torch.rand_like(like).clamp_(torch.finfo(like.dtype).tiny, 1 - torch.finfo(like.dtype).eps)
    return torch.logit(uniform)


def sampled(logits: Tensor, drawn: Tensor) -> Tensor:
    """Return gates that are open (1) with probability ``sigmoid(logits)``, with ``sigmoid(logits + drawn)``'s gradient.

    Args:
        logits: any shape.
        drawn: `noise` of the same shape.
    """
    moved = logits + drawn
    return _through((moved > 0).to(logits.dtype), moved.sigmoid())


def hard(logits: Tensor) -> Tensor:
    """Return the gates used in evaluation: 1 where a logit is above 0, else 0."""
    return (logits > 0).to(logits.dtype)


def budgeted(logits: Tensor) -> Tensor:
    """Return `hard` gates with the gradient of ``sigmoid(sigmoid(logits) - 1/2)``, without random draws.

    The second sigmoid is the authors'; at the start the factor is 0.0364.
    """
    return _through(hard(logits), (logits.sigmoid() - 0.5).sigmoid())


def opened(gates: Tensor) -> Tensor:
    """Return which of the ordered gates ``(..., 3)`` are open: the product of each with all before it."""
    return gates.cumprod(dim=-1)


def weights(open_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the weights of 1 x 1, 3 x 3 and attention for the open gates ``(I1, I2, I3)``.

    At most one is 1. The gradient with respect to ``I3`` is attention minus 3 x 3, to ``I2`` it is 3 x 3 minus 1 x 1 if
    attention is closed, and to ``I1`` it is 1 x 1 if all later gates are closed.
    """
    one, three, attention = open_.unbind(-1)
    rest = 1 - attention
    return rest * (1 - three) * one, rest * three, attention
