"""Gates that are drawn while they are learned, gates that a budget sees, and what a budget lets them keep.

n rungs; a rung is one thing that may be kept.

Source: He et al., "Pruning Self-attentions into Convolutional Layers in Single Path", TPAMI 2024, arXiv 2111.11802, and
the authors' code. Gates of one place are ordered: one is open only if all before it are.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["START", "budgeted", "hard", "noise", "opened", "project", "sampled", "weights"]

START = 1.5
"""Logit that every gate starts from: open with probability 0.818 (the authors' code)."""


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
    """Draw from the logistic distribution, as many as `like` has; from torch's global generator."""
    uniform = torch.rand_like(like).clamp_(torch.finfo(like.dtype).tiny, 1 - torch.finfo(like.dtype).eps)
    return torch.logit(uniform)


def sampled(logits: Tensor, drawn: Tensor) -> Tensor:
    """Open (1) with probability ``sigmoid(logits)``, else closed, with the gradient of ``sigmoid(logits + drawn)``.

    Args:
        logits: any shape.
        drawn: `noise` of the same shape.
    """
    moved = logits + drawn
    return _through((moved > 0).to(logits.dtype), moved.sigmoid())


def hard(logits: Tensor) -> Tensor:
    """Open or closed as evaluation has it: 1 where a logit is above 0."""
    return (logits > 0).to(logits.dtype)


def budgeted(logits: Tensor) -> Tensor:
    """`hard` gates with the gradient of ``sigmoid(sigmoid(logits) - 1/2)``; nothing is drawn.

    The second sigmoid is the authors'; at the start the factor is 0.0364.
    """
    return _through(hard(logits), (logits.sigmoid() - 0.5).sigmoid())


def opened(gates: Tensor) -> Tensor:
    """Which of ordered gates ``(..., 3)`` are open: the product of each with all before it."""
    return gates.cumprod(dim=-1)


def weights(open_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How much of each operation is taken where ``(I1, I2, I3)`` are open: of 1 x 1, of 3 x 3, of attention.

    At most one is 1. The gradient by ``I3`` is attention less 3 x 3, by ``I2`` 3 x 3 less 1 x 1 where attention is
    closed, by ``I1`` 1 x 1 where all after it are.
    """
    one, three, attention = open_.unbind(-1)
    rest = 1 - attention
    return rest * (1 - three) * one, rest * three, attention


def project(logits: Tensor, saves: Tensor, need: Tensor, after: Tensor) -> Tensor:
    """Keep what a budget allows: close by one threshold over all gates, then open again what still fits.

    Rungs are closed from the smallest logit up until `need` is saved, which is where bisecting a threshold on their
    sigmoid ends, without its trouble with equal gates; then those closed are opened from the largest down wherever what
    was saved too much allows it.

    Args:
        logits: ``(n,)``; of equal ones the first is closed first.
        saves: what closing each rung saves, of each of C costs, ``(n, C)``; may be negative.
        need: what to save, ``(C,)``; at most 0 for no need.
        after: for each rung the one without which it cannot be open, ``(n,)``; -1 for none.

    Returns:
        Which rungs are open, bool ``(n,)``. If closing all does not do, none is.
    """
    order = torch.argsort(logits, stable=True)
    saved = torch.cat([saves.new_zeros(1, saves.shape[1]), saves[order].cumsum(dim=0)])
    met = (saved >= need).all(dim=1).nonzero().flatten()
    count = int(met[0]) if len(met) else len(order)
    keep = torch.ones(len(order), dtype=torch.bool)
    keep[order[:count]] = False
    if not len(met):
        return keep
    spare = [float(value) for value in saved[count] - need.clamp(min=-torch.inf)]
    costs, before = saves.tolist(), after.tolist()
    closed = order[:count].flip(0).tolist()
    open_ = keep.tolist()
    for rung in closed:
        fits = all(cost <= room or cost <= 0 for cost, room in zip(costs[rung], spare, strict=True))
        if fits and (before[rung] < 0 or open_[before[rung]]):
            open_[rung] = True
            spare = [room - cost for room, cost in zip(spare, costs[rung], strict=True)]
    return torch.tensor(open_)
