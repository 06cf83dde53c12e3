"""Random gates for training, and deterministic gates for costs.

Source: He et al., "Pruning Self-attentions into Convolutional Layers in Single Path", TPAMI 2024, arXiv 2111.11802, and
the authors' code. Gates of one attention are ordered: one is open only if all before it are.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "START",
    "SURE",
    "budgeted",
    "densities",
    "hard",
    "noise",
    "opened",
    "sampled",
    "spread",
    "weights",
]

START = 1.5
"""Initial logit of every gate in the authors' code: open with probability 0.818."""

SURE = 4.0
"""Initial logit for short searches: open with probability 0.982. A drawn network is then 0.3 nats from the dense model,
where it is 8 nats away at `START` (ViT-Ti, no training)."""


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


def densities(losses: Sequence[float], saves: Sequence[float]) -> list[float]:
    """Return the loss of closing each gate of an attention for each unit of cost that it saves.

    A gate that costs more than the one after it, which can only be closed later, is closed together with that one; both
    get the density of the pair.

    Args:
        losses: additional loss of closing each gate, in the order in which they close, at least 0.
        saves: what closing it saves; may be negative.
    """
    groups: list[tuple[float, float, int]] = []
    for loss, save in zip(losses, saves, strict=True):
        groups.append((loss, save, 1))
        while len(groups) > 1 and _density(groups[-2]) >= _density(groups[-1]):
            (a, b, c), (d, e, f) = groups[-2:]
            groups[-2:] = [(a + d, b + e, c + f)]
    return [_density(group) for group in groups for _ in range(group[2])]


def _density(group: tuple[float, float, int]) -> float:
    loss, save, _ = group
    return loss / save if save > 0 else math.inf


def spread(start: float, density: Tensor, saves: Tensor) -> Tensor:
    """Return initial logits from ``start / 2`` to ``3 / 2 start``, in the order of the losses of closing each gate.

    Gates that start together cross zero together under AdamW, whose steps have one size: a search then falls past its
    budget within a few steps. The logit of a gate is `start` if half of all that can be saved costs less than it.

    Args:
        start: mean logit, weighted by `saves`.
        density: loss for each unit of cost saved, ``(n,)``; of equal ones the first gets the lower logit.
        saves: cost saved by closing each gate, ``(n,)``.
    """
    order = torch.argsort(density, stable=True)
    weight = saves.clamp_min(0)[order].double()
    ends = weight.cumsum(0) / weight.sum().clamp_min(1e-300)
    share = torch.empty_like(ends)
    share[order] = ends - weight / weight.sum().clamp_min(1e-300) / 2
    return start * (0.5 + share)
