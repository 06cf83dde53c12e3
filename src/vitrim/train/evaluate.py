"""Evaluate a model on data.

B images of a batch, P pictures in total, K classes.
"""

import time
from collections.abc import Iterable, Sized

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrim.cut.outputs import as_classes, gives_values
from vitrim.nn.feed import fed
from vitrim.nn.modes import evaluating
from vitrim.words.errors import DataError, WeightsError
from vitrim.words.plain import Node
from vitrim.words.progress import progress

__all__ = ["Evaluated", "evaluate", "reference_logits"]


class Evaluated(Node):
    """Result of an evaluation.

    Attributes:
        top1: percentage of pictures whose label is the predicted class; None without labels.
        top5: percentage of pictures whose label is among the five largest logits; None without labels, or with one
            output.
        loss: mean cross-entropy with the labels, nats; None without labels.
        agreement: percentage of pictures for which the reference predicts the same class; None without a reference, or
            if the outputs are not classes.
        distance: Euclidean norm of the difference from the reference's outputs, divided by the norm of these outputs;
            None without a reference, or if the outputs are classes.
        count: number of pictures.
        seconds: wall-clock time, including loading.
    """

    top1: float | None
    top5: float | None
    loss: float | None
    agreement: float | None
    count: int
    seconds: float
    distance: float | None = None


def reference_logits(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the logits of a model over a loader, as a reference for evaluating other models.

    Args:
        model: returns logits `(B, K)`.
        loader: batches in a fixed order, see `vitrim.data.eval_loader`.

    Returns:
        Logits on the CPU, `(P, K)`.

    Raises:
        WeightsError: a logit is not finite.
    """
    found = []
    with evaluating(model), progress("reference", _length(loader)) as advance:
        for pictures, _ in loader:
            found.append(_forward(model, pictures).cpu())
            advance(1)
    return torch.cat(found)


def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    reference: nn.Module | Tensor | None = None,
    classes: int | None = None,
) -> Evaluated:
    """Evaluate a model; its train or eval modes are restored.

    Args:
        model: returns logits `(B, K)` in eval mode. With one output and labels, the output is the logit of the second
            of two classes. Without a head (`num_classes` is 0), labels are not used.
        loader: batches of pictures `(B, C, h, w)` and labels `(B,)`, -1 for no label, in a fixed order.
        reference: another model, or the result of `reference_logits` for this loader.
        classes: number of classes of the data, which K must equal; None accepts any K.

    Raises:
        DataError: K differs, a label is not below K, there is no picture, or the reference has another number of
            pictures.
        WeightsError: a logit is not finite.
    """
    other = reference if isinstance(reference, nn.Module) else None
    start = time.perf_counter()
    hits = torch.zeros(4, dtype=torch.float64)
    count = 0
    headless = getattr(model, "num_classes", None) == 0
    unlabelled, width = headless, 0
    apart = torch.zeros(2, dtype=torch.float64)
    with evaluating(model, other), progress("evaluate", _length(loader)) as advance:
        for pictures, labels in loader:
            logits = _forward(model, pictures)
            width = logits.shape[-1]
            if not headless:
                _check_batch(logits, labels, classes)
                unlabelled |= bool((labels < 0).any())
                hits[:3] += _score(as_classes(logits), labels)
            theirs = _theirs(other, reference, pictures, count, len(labels))
            if theirs is not None:
                mine, theirs = logits.cpu(), theirs.cpu()
                if not headless:
                    hits[3] += (as_classes(theirs).argmax(-1) == as_classes(mine).argmax(-1)).sum()
                apart += torch.stack([(mine - theirs).double().square().sum(), theirs.double().square().sum()])
            count += len(labels)
            advance(1)
    if count == 0:
        raise DataError("evaluation must have at least one image, but the loader gave none")
    if isinstance(reference, Tensor) and len(reference) != count:
        raise DataError(f"the reference must be of the {count} images of the loader, but has {len(reference)}")
    top1, top5, loss, agreement = (hits / count).tolist()
    values = gives_values(0 if headless else width, labeled=not unlabelled)
    distance = float((apart[0] / apart[1].clamp_min(torch.finfo(torch.float64).tiny)).sqrt())
    return Evaluated(
        top1=None if unlabelled else 100 * top1,
        top5=None if unlabelled or width == 1 else 100 * top5,
        loss=None if unlabelled else loss,
        agreement=None if reference is None or values else 100 * agreement,
        count=count,
        seconds=time.perf_counter() - start,
        distance=distance if values and reference is not None else None,
    )


@torch.inference_mode()
def _forward(model: nn.Module, pictures: Tensor) -> Tensor:
    logits: Tensor = model(fed(pictures, model))
    if not torch.isfinite(logits).all():
        raise WeightsError("logits must be finite, but are not; the model's weights are damaged")
    return logits


def _length(loader: Iterable[tuple[Tensor, Tensor]]) -> int:
    return len(loader) if isinstance(loader, Sized) else 0


def _check_batch(logits: Tensor, labels: Tensor, classes: int | None) -> None:
    width = logits.shape[-1]
    if classes is not None and width != classes:
        raise DataError(f"the model must have the {classes} classes of the data, but has {width}")
    if int(labels.max()) >= max(2, width):
        raise DataError(f"labels must be below the {width} classes of the model, but {int(labels.max())} came")


def _score(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the number of top-1 hits and top-5 hits, and the summed loss, `(3,)` on the CPU."""
    labels = labels.to(logits.device)
    best = logits.topk(min(5, logits.shape[-1]), dim=-1).indices == labels[:, None]
    loss = F.cross_entropy(logits.double(), labels.clamp_min(0), reduction="sum")
    return torch.stack([best[:, 0].sum(), best.sum(), loss]).double().cpu()


def _theirs(
    other: nn.Module | None, reference: nn.Module | Tensor | None, pictures: Tensor, start: int, size: int
) -> Tensor | None:
    if other is not None:
        return _forward(other, pictures)
    if not isinstance(reference, Tensor):
        return None
    if start + size > len(reference):
        raise DataError(f"the reference must be of every image of the loader, but ends at {len(reference)}")
    return reference[start : start + size]
