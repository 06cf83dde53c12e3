"""Evaluate a model on data.

B images of a batch, P pictures in total, K classes.
"""

import time
from collections.abc import Iterable, Sized
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrim.cut.outputs import as_classes, gives_values
from vitrim.nn.device import fitting
from vitrim.nn.feed import fed, summing
from vitrim.nn.modes import evaluating
from vitrim.nn.weights import home_of
from vitrim.train import ranks
from vitrim.train.leading import together
from vitrim.train.machine import Precision, autocast, tf32_allowed
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


def reference_logits(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    precision: Precision = "fp32",
    tf32: bool = False,
) -> Tensor:
    """Return the logits of a model over a loader, as a reference for evaluating other models.

    Args:
        model: returns logits `(B, K)`.
        loader: batches in a fixed order, see `vitrim.data.eval_loader`.
        precision: see `evaluate`.
        tf32: see `evaluate`.

    Returns:
        Logits on the CPU, `(P, K)`.

    Raises:
        RunError: a batch does not fit into memory.
        WeightsError: a logit is not finite.
    """
    found = []
    device = home_of(model)[0]
    with evaluating(model), tf32_allowed(device, tf32), progress("reference", _length(loader)) as advance:
        for pictures, _ in loader:
            found.append(_forward(model, pictures, device, precision))
            advance(1)
    logits = torch.cat(found).cpu() if found else torch.zeros(0, 1)
    if not bool(torch.isfinite(logits).all()):
        raise WeightsError(_DAMAGED)
    return logits


@dataclass
class _Sums:
    """Sums over the pictures so far, on the device, so that the host need not wait for it after each batch.

    Attributes:
        hits: top-1, top-5, agreement, and logits that are not finite, int64.
        loss: summed cross-entropy.
        apart: summed squared difference from the reference, and squares of the reference.
        count: number of pictures.
        width: number of outputs; 0 before the first picture.
        unlabelled: whether a label is missing.
    """

    hits: Tensor
    loss: Tensor
    apart: Tensor
    count: int = 0
    width: int = 0
    unlabelled: bool = False

    @classmethod
    def on(cls, device: torch.device) -> "_Sums":
        return cls(
            torch.zeros(4, dtype=torch.int64, device=device),
            torch.zeros((), dtype=summing(device), device=device),
            torch.zeros(2, dtype=summing(device), device=device),
        )

    def add(self, logits: Tensor, labels: Tensor | None, theirs: Tensor | None) -> None:
        """Add one batch; `labels` are None where the outputs are not classes."""
        self.hits[3] += (~torch.isfinite(logits)).sum()
        if labels is not None:
            best = as_classes(logits).topk(min(5, as_classes(logits).shape[-1]), dim=-1).indices == labels[:, None]
            self.hits[:2] += torch.stack([best[:, 0].sum(), best.sum()])
            wide = as_classes(logits).to(self.loss.dtype)
            self.loss += F.cross_entropy(wide, labels.clamp_min(0), reduction="sum")
        if theirs is not None:
            mine, other = logits.to(self.apart.dtype), theirs.to(self.apart.dtype)
            self.apart += torch.stack([(mine - other).square().sum(), other.square().sum()])
            if labels is not None:
                self.hits[2] += (as_classes(theirs).argmax(-1) == as_classes(logits).argmax(-1)).sum()

    def over_processes(self) -> "_Sums":
        """Return the sums over the pictures of all processes."""
        hits, loss, apart = (ranks.summed(each) for each in (self.hits, self.loss, self.apart))
        count = int(ranks.summed(torch.tensor(self.count)))
        width, unlabelled = ranks.agreed(self.width, self.unlabelled)
        return _Sums(hits, loss, apart, count, int(width), bool(unlabelled))


def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    reference: nn.Module | Tensor | None = None,
    classes: int | None = None,
    precision: Precision = "fp32",
    tf32: bool = False,
    shared: bool = False,
) -> Evaluated:
    """Evaluate a model, on its device; its train or eval modes are restored.

    Args:
        model: returns logits `(B, K)` in eval mode. With one output and labels, the output is the logit of the second
            of two classes. Without a head (`num_classes` is 0), labels are not used.
        loader: batches of pictures `(B, C, h, w)` and labels `(B,)`, -1 for no label, in a fixed order.
        reference: another model, or the result of `reference_logits` for this loader.
        classes: number of classes of the data, which K must equal; None accepts any K.
        precision: ``fp32`` computes in the type of the weights; ``bf16`` and ``fp16`` by autocast.
        tf32: whether products in float32 may use TF32 on CUDA.
        shared: whether all processes call this, each with its own pictures (`vitrim.train.ranks.part`), and get the
            result for all pictures.

    Raises:
        DataError: K differs, a label is not below K, there is no picture, or the reference has another number of
            pictures.
        RunError: a batch does not fit into memory.
        WeightsError: a logit is not finite.
    """
    start = time.perf_counter()
    headless = getattr(model, "num_classes", None) == 0
    if shared:
        sums = together(lambda: _pass(model, loader, reference, classes, precision, tf32)).over_processes()
    else:
        sums = _pass(model, loader, reference, classes, precision, tf32)
    count, unlabelled = sums.count, sums.unlabelled or headless
    if count == 0:
        raise DataError("evaluation must have at least one image, but the loader gave none")
    *hits, damaged = sums.hits.tolist()
    if damaged:
        raise WeightsError(_DAMAGED)
    top1, top5, agreement = (hit / count for hit in hits)
    values = gives_values(0 if headless else sums.width, labeled=not unlabelled)
    apart = sums.apart.cpu().double()
    distance = float((apart[0] / apart[1].clamp_min(torch.finfo(torch.float64).tiny)).sqrt())
    return Evaluated(
        top1=None if unlabelled else 100 * top1,
        top5=None if unlabelled or sums.width == 1 else 100 * top5,
        loss=None if unlabelled else float(sums.loss) / count,
        agreement=None if reference is None or values else 100 * agreement,
        count=count,
        seconds=time.perf_counter() - start,
        distance=distance if values and reference is not None else None,
    )


def _pass(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    reference: nn.Module | Tensor | None,
    classes: int | None,
    precision: Precision,
    tf32: bool,
) -> _Sums:
    """Return the sums over the pictures of a loader."""
    other = reference if isinstance(reference, nn.Module) else None
    device = home_of(model)[0]
    sums = _Sums.on(device)
    headless = getattr(model, "num_classes", None) == 0
    if isinstance(reference, Tensor):
        reference = reference.to(device)
    with evaluating(model, other), tf32_allowed(device, tf32), progress("evaluate", _length(loader)) as advance:
        for pictures, labels in loader:
            logits = _forward(model, pictures, device, precision)
            sums.width = logits.shape[-1]
            if not headless:
                _check_batch(logits, labels, classes)
                sums.unlabelled |= bool((labels < 0).any())
            theirs = _theirs(other, reference, pictures, sums.count, device, precision)
            sums.add(logits, None if headless else labels.to(device, non_blocking=True), theirs)
            sums.count += len(labels)
            advance(1)
    if isinstance(reference, Tensor) and len(reference) != sums.count:
        raise DataError(f"the reference must be of the {sums.count} images of the loader, but has {len(reference)}")
    return sums


_DAMAGED = "logits must be finite, but are not; the model's weights are damaged"


@torch.inference_mode()
def _forward(model: nn.Module, pictures: Tensor, device: torch.device, precision: str) -> Tensor:
    with fitting("a batch", len(pictures), device, "give smaller ones"), autocast(device, precision):
        logits: Tensor = model(fed(pictures, model))
    return logits


def _length(loader: Iterable[tuple[Tensor, Tensor]]) -> int:
    return len(loader) if isinstance(loader, Sized) else 0


def _check_batch(logits: Tensor, labels: Tensor, classes: int | None) -> None:
    width = logits.shape[-1]
    if classes is not None and width != classes:
        raise DataError(f"the model must have the {classes} classes of the data, but has {width}")
    if int(labels.max()) >= max(2, width):
        raise DataError(f"labels must be below the {width} classes of the model, but {int(labels.max())} came")


def _theirs(
    other: nn.Module | None,
    reference: nn.Module | Tensor | None,
    pictures: Tensor,
    start: int,
    device: torch.device,
    precision: str,
) -> Tensor | None:
    if other is not None:
        return _forward(other, pictures, home_of(other)[0], precision).to(device)
    if not isinstance(reference, Tensor):
        return None
    if start + len(pictures) > len(reference):
        raise DataError(f"the reference must be of every image of the loader, but ends at {len(reference)}")
    return reference[start : start + len(pictures)]
