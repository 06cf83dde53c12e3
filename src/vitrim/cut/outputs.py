"""Interpretation of a model's outputs: class logits, one logit of two classes, or values.

B images, K outputs.

With K >= 2, outputs are class logits and are compared by their softmax. With labeled images, one output is the logit of
the second of two classes (binary cross-entropy is the cross-entropy of logits (0, z)). Without labels, one output may
also be the value of a regression. Features (`num_classes=0`) and such values are compared by their squared distance. A
softmax over them would have no meaning. Over one output it is constant, so every loss and gradient is exactly zero.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrim.nn.feed import fed
from vitrim.words.errors import MethodError

__all__ = ["as_classes", "divergence", "gives_values", "logits_of", "own_loss"]


def gives_values(classes: int, labeled: bool) -> bool:
    """Return whether a model's outputs are values and not class logits.

    Args:
        classes: number of classes in the model's spec; 0 for a model without a head.
        labeled: whether the images have labels.
    """
    return classes == 0 or (classes == 1 and not labeled)


def as_classes(logits: Tensor) -> Tensor:
    """Return class logits, `(B, K)` with K >= 2; one logit z, `(B, 1)`, becomes (0, z)."""
    return F.pad(logits, (1, 0)) if logits.shape[-1] == 1 else logits


def own_loss(outputs: Tensor, *, values: bool, draw: torch.Generator) -> Tensor:
    """Return a loss whose mean squared gradient is the curvature of the distance from the model's own output.

    For classes, it is the cross-entropy with labels drawn from the model's own softmax (the Fisher matrix, the
    second-order term of the Kullback-Leibler divergence). For values, it is their product with a normal vector (the
    Gauss-Newton matrix of half the squared distance).

    Args:
        outputs: with their autograd graph, `(B, K)`; values may have any shape `(B, ...)`.
        values: see `gives_values`.
        draw: random generator on the CPU.

    Returns:
        The sum over images, scalar.

    Raises:
        MethodError: if the outputs are not a tensor with one row for each image, or are not finite.
    """
    if (
        not isinstance(outputs, Tensor)
        or outputs.dim() < 2
        or not outputs.numel()
        or (outputs.dim() > 2 and not values)
    ):
        raise MethodError(
            "a model must return a tensor with one row of outputs for each image, but it does not; "
            "wrap it in a module that does"
        )
    if not bool(torch.isfinite(outputs).all()):
        raise MethodError(
            "logits must be finite on the calibration images, but some are NaN or infinite; "
            "check weights and normalization"
        )
    if values:
        direction = torch.randn(outputs.shape, generator=draw).to(outputs.device, outputs.dtype)
        return (outputs * direction).sum()
    logits = as_classes(outputs)
    chances = logits.detach().float().softmax(dim=-1).cpu()
    labels = torch.multinomial(chances, 1, generator=draw).squeeze(1).to(logits.device)
    return F.cross_entropy(logits, labels, reduction="sum")


@torch.no_grad()
def logits_of(model: nn.Module, images: Sequence[Tensor]) -> Tensor:
    """Compute logits, ``(P, K)`` on the CPU."""
    return torch.cat([model(fed(x, model)).float().cpu() for x in images])


def divergence(dense: Tensor, logits: Tensor) -> float:
    """Return the mean Kullback-Leibler divergence from the dense output, in nats.

    Raises:
        MethodError: if it is not finite.
    """
    ours, theirs = logits.double().log_softmax(-1), dense.double().log_softmax(-1)
    found = float(F.kl_div(ours, theirs, reduction="batchmean", log_target=True))
    if not found < float("inf"):
        raise MethodError("logits must be finite on the calibration images, but some are NaN; check weights and images")
    return found
