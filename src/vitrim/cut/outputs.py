"""What a model's outputs are compared by: classes, one logit, or values that stand for no classes.

B images, K outputs.

With K >= 2 outputs are class logits, told apart by a softmax. One output is the logit of the second of two classes
where the images have labels (the binary cross-entropy is the cross-entropy of logits (0, z)); without labels it may as
well be a regression's value. Features (`num_classes=0`) and such values are compared by their squared distance. A
softmax over them would mean nothing, and over one output it is constant: every loss and every gradient of it is exactly
zero.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from vitrim.words.errors import MethodError

__all__ = ["as_classes", "gives_values", "own_loss"]


def gives_values(classes: int, labeled: bool) -> bool:
    """Whether a model's outputs stand for no classes.

    Args:
        classes: of the model's spec; 0 for a model without a head.
        labeled: whether the images have labels.
    """
    return classes == 0 or (classes == 1 and not labeled)


def as_classes(logits: Tensor) -> Tensor:
    """Class logits, `(B, K)` with K >= 2: one logit z, `(B, 1)`, becomes (0, z)."""
    return F.pad(logits, (1, 0)) if logits.shape[-1] == 1 else logits


def own_loss(outputs: Tensor, *, values: bool, draw: torch.Generator) -> Tensor:
    """A loss whose gradient, squared and averaged over draws, is the curvature of the distance from the model's output.

    For classes: the cross-entropy with labels drawn from the model's own softmax (the Fisher matrix, second-order term
    of the Kullback-Leibler divergence). For values: their product with a normal vector (the Gauss-Newton matrix of half
    the squared distance).

    Args:
        outputs: with their graph, `(B, K)`; values may have any shape `(B, ...)`.
        values: see `gives_values`.
        draw: on the CPU.

    Returns:
        The sum over images, scalar.

    Raises:
        MethodError: the outputs are no tensor of one row an image, or not finite.
    """
    if (
        not isinstance(outputs, Tensor)
        or outputs.dim() < 2
        or not outputs.numel()
        or (outputs.dim() > 2 and not values)
    ):
        raise MethodError("a model must give one row of outputs an image to be compared by them, but gives none")
    if not bool(torch.isfinite(outputs).all()):
        raise MethodError(
            "logits must be finite on the calibration images, but some are NaN or infinite; "
            "check weights and normalisation"
        )
    if values:
        direction = torch.randn(outputs.shape, generator=draw).to(outputs.device, outputs.dtype)
        return (outputs * direction).sum()
    logits = as_classes(outputs)
    chances = logits.detach().float().softmax(dim=-1).cpu()
    labels = torch.multinomial(chances, 1, generator=draw).squeeze(1).to(logits.device)
    return F.cross_entropy(logits, labels, reduction="sum")
