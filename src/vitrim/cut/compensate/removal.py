"""The order in which neurons are removed, from moments.

M hidden neurons, D width of the residual stream.

Sources: Hassibi and Stork, "Second order derivatives for network pruning: Optimal Brain Surgeon", 1992 (removal and the
update of what stays); Frantar and Alistarh, "SparseGPT", 2023 (the same on a layer's Gram matrix).

The recursion touches M x M matrices M / 64 times, and most of its time is memory traffic. It runs in float32 where the
Gram matrix is no more exact than that and its condition allows it, and in float64 elsewhere.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from vitrim.cut.compensate.closed_form import TINY, damped

__all__ = ["removal_order", "removals", "working_type"]

_CHUNK = 64
"""Number of removals between two updates of the full matrices; the resulting order does not depend on it."""

_LOST = 1e-2
"""Largest relative error of the costs that float32 may leave: the condition of the matrix times the rounding of
float32. Moments of a few hundred images know the costs of neurons less well. With the usual ridge of 1e-2 of the mean
diagonal it is reached where the largest eigenvalue is a thousand times the mean."""


def removal_order(
    gram: Tensor, weight: Tensor, strength: float, at: str = "hidden", *, half: Tensor, noise: float = 0.0
) -> Tensor:
    """Return the order in which to remove neurons.

    The next neuron is always the one whose removal costs least after the remaining neurons have compensated for it.
    After each removal, the weights and the inverse of the Gram matrix are updated for the remaining neurons (Optimal
    Brain Surgeon), so the next choice takes the compensation into account.

    Of the weights w, the costs need only the products w_i' metric w_j. A removal changes them by a matrix of rank 2, as
    it changes the inverse by one of rank 1. So a step touches O(M) numbers and not O(M D), and the matrices are brought
    up to date once in a while, by matrix products.

    Args:
        gram: ``(M, M)``, float64.
        weight: weight of the layer after the neurons, ``(D, M)``, float64.
        strength: damping, as in `vitrim.cut.compensate.closed_form.refit`.
        at: path of the layer, for messages.
        half: square root of the metric, ``(D, D)``, see `vitrim.cut.compensate.closed_form.root`.
        noise: relative error of `gram`, see `working_type`.

    Returns:
        Indices of all M neurons, in order of removal, on the CPU.

    Raises:
        MethodError: if no neuron varies; the message names the path.
    """
    return torch.cat(list(removals(gram, weight, strength, at, half=half, noise=noise))).cpu()


def removals(
    gram: Tensor, weight: Tensor, strength: float, at: str = "hidden", *, half: Tensor, noise: float = 0.0
) -> Iterator[Tensor]:
    """Yield `removal_order` in parts, so that no more neurons are ordered than are removed."""
    matrix = damped(gram, max(strength, TINY), at)
    inverse, rows = _inverse(matrix), (half @ weight).mT
    kind = working_type(matrix, inverse, noise)
    products = (rows @ rows.mT).to(kind)
    inverse = inverse.to(kind)
    names = torch.arange(len(gram), device=gram.device)
    while len(names):
        count = min(_CHUNK, len(names))
        gone = _remove(inverse, products, count)
        yield names[gone]
        stay = torch.ones(len(names), dtype=torch.bool, device=gram.device)
        stay[gone] = False
        left = stay.nonzero().squeeze(1)
        names = names[left]
        inverse, products = (x.index_select(0, left).index_select(1, left) for x in (inverse, products))


def working_type(matrix: Tensor, inverse: Tensor, noise: float) -> torch.dtype:
    """Return the type in which neurons are removed: float32 if that loses nothing that the moments know, else float64.

    Args:
        matrix: the Gram matrix with its ridge, ``(M, M)``, float64.
        inverse: its inverse, float64.
        noise: relative error of the Gram matrix. It is that of float32 or more if a model computes in float32 or less;
            below that, as for a model in float64, all stays in float64.
    """
    rounding = torch.finfo(torch.float32).eps
    if noise < rounding:
        return torch.float64
    condition = torch.linalg.matrix_norm(matrix, 1) * torch.linalg.matrix_norm(inverse, 1)
    return torch.float32 if float(condition) * rounding <= _LOST else torch.float64


def _inverse(matrix: Tensor) -> Tensor:
    lower, failed = torch.linalg.cholesky_ex(matrix)
    found: Tensor = torch.linalg.inv(matrix) if bool(failed.any()) else torch.cholesky_inverse(lower)
    return found


def _remove(inverse: Tensor, products: Tensor, count: int) -> Tensor:
    """Remove the `count` cheapest neurons one after another.

    Args:
        inverse: symmetric, ``(m, m)``; brought up to date in place. Entries of removed neurons then have no meaning.
        products: likewise.
        count: number of neurons, at most m.

    Returns:
        Their indices, on the device, which the host never waits for.
    """
    size, tiny = len(inverse), torch.finfo(inverse.dtype).tiny
    diagonal, norms = inverse.diagonal().clone(), products.diagonal().clone()
    alive = torch.ones_like(diagonal, dtype=torch.bool)
    gone = torch.zeros(count, dtype=torch.long, device=inverse.device)
    # Updates since the matrices were last up to date: inverse - a' a, and products - b' c - c' b.
    a, b, c = (inverse.new_zeros(count, size) for _ in range(3))
    for step in range(count):
        costs = norms.clamp_min(0) / diagonal.clamp_min(tiny)
        index = torch.where(alive, costs, torch.inf).argmin(keepdim=True)
        done = slice(0, step)
        # Rows, which are columns, because a row is contiguous.
        row = (inverse.index_select(0, index) - a[done].index_select(1, index).mT @ a[done]).squeeze(0)
        both = c[done].index_select(1, index).mT @ b[done] + b[done].index_select(1, index).mT @ c[done]
        likeness = (products.index_select(0, index) - both).squeeze(0)
        pivot = row.index_select(0, index).clamp_min(tiny)
        a[step], b[step] = row / pivot.sqrt(), row / pivot
        c[step] = likeness - b[step] * (likeness.index_select(0, index) / 2)
        diagonal = diagonal - a[step].square()
        norms = norms - 2 * b[step] * c[step]
        alive.index_fill_(0, index, False)
        gone[step] = index.squeeze(0)
    inverse.addmm_(a.mT, a, alpha=-1)
    products.addmm_(b.mT, c, alpha=-1).addmm_(c.mT, b, alpha=-1)
    return gone
