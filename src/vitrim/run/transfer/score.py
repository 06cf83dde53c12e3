"""Measure a segmentation model: predictions at the size of each scene, and their intersection over union.

K classes, (h, w) height and width of a scene, (R, C) height and width of the model's input.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrim.data import IGNORE, Input, Scenes, to_pixels
from vitrim.data.augment import normalize
from vitrim.measure.model import home_of
from vitrim.nn.copying import copied
from vitrim.nn.modes import evaluating
from vitrim.run.transfer.recipe import SceneTest
from vitrim.train import ranks
from vitrim.train.leading import together
from vitrim.words.errors import DataError, RecipeError, WeightsError
from vitrim.words.plain import Node, reason
from vitrim.words.progress import progress

__all__ = ["Scores", "score"]

Size = tuple[int, int]


class Scores(Node):
    """The scores of a segmentation model.

    Attributes:
        miou: mean of `iou` over the classes that occur in scenes or predictions, percent.
        accuracy: share of the pixels that count whose class is correct, percent.
        iou: intersection over union of each class, percent; None if it occurs in neither scenes nor predictions.
        recall: share of the pixels of each class that are found, percent; None if no scene contains the class.
        pixels: pixels of each class.
        scenes: their number.
        seconds: wall-clock time, including loading.
    """

    miou: float
    accuracy: float
    iou: tuple[float | None, ...]
    recall: tuple[float | None, ...]
    pixels: tuple[int, ...]
    scenes: int
    seconds: float


@torch.inference_mode()
def score(
    model: nn.Module,
    scenes: Scenes,
    input: Input,
    settings: SceneTest,
    *,
    keep: Sequence[int] = (),
    shared: bool = False,
) -> tuple[Scores, dict[int, Tensor]]:
    """Measure a segmentation model; it is not modified.

    Args:
        model: a segmentation model, images to logits `(B, K, R, C)`.
        scenes: the scenes to measure on.
        input: the model's input settings.
        settings: how the model is run on scenes.
        keep: numbers of the scenes whose predictions are returned.
        shared: whether all processes call this, each scoring its part of the scenes, and get the result for all.

    Returns:
        The scores, and the predictions of the scenes in `keep`, uint8 `(h, w)`.

    Raises:
        DataError: if a scene is damaged, or its classes do not match the model's.
        RecipeError: if the model cannot be run with these settings, or a package is missing.
        WeightsError: if a logit is not finite.
    """
    start = time.perf_counter()
    count: Any = getattr(model, "num_classes", None)
    if count != scenes.classes:
        raise DataError(f"{scenes.source}: must have the {count} classes of the model, but has {scenes.classes}")
    places = ranks.part(len(scenes)) if shared else range(len(scenes))
    if not shared:
        table, kept = _pass(model, scenes, input, settings, keep, places)
    else:
        table, kept = together(lambda: _pass(model, scenes, input, settings, keep, places))
        table = ranks.summed(table)
        kept = {index: best for each in ranks.gathered(kept) for index, best in each.items()}
    return _summary(table.double(), len(scenes), time.perf_counter() - start), kept


def _pass(
    model: nn.Module, scenes: Scenes, input: Input, settings: SceneTest, keep: Sequence[int], places: range
) -> tuple[Tensor, dict[int, Tensor]]:
    """Return the confusion matrix of the scenes at `places`, and the predictions of those in `keep`."""
    table = confusion(scenes.classes)
    kept: dict[int, Tensor] = {}
    with evaluating(model), progress("evaluate", len(places)) as advance:
        meet = _whole if settings.mode == "whole" else _slide
        for index, logits in meet(model, scenes, input, settings, places):
            if not torch.isfinite(logits).all():
                raise WeightsError("logits must be finite, but are not; the model's weights are damaged")
            mask = _labels(scenes, index)
            best = _resized(logits, (mask.shape[0], mask.shape[1])).argmax(0).cpu()
            table.update(best, mask)
            if index in keep:
                kept[index] = best.to(torch.uint8)
            advance(1)
    return table.compute(), kept


def confusion(classes: int) -> Any:
    """Return torchmetrics' confusion matrix, which counts pixels by true and predicted class.

    Raises:
        RecipeError: if torchmetrics is missing.
    """
    try:
        from torchmetrics.classification import MulticlassConfusionMatrix
    except ImportError:
        raise RecipeError(
            "torchmetrics must be installed to measure segmentation, but is not; run pip install 'vitrim[seg]'"
        ) from None
    return MulticlassConfusionMatrix(classes, ignore_index=IGNORE, validate_args=False)


def _labels(scenes: Scenes, index: int) -> Tensor:
    _, mask = scenes[index]
    return torch.frombuffer(bytearray(mask.tobytes()), dtype=torch.uint8).view(mask.height, mask.width).long()


def _resized(logits: Tensor, size: Size) -> Tensor:
    """Return logits `(K, R, C)` resized to the scene."""
    if tuple(logits.shape[1:]) == size:
        return logits
    return F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0]


def _pixels(model: nn.Module, scenes: Scenes, index: int, input: Input, size: Size) -> Tensor:
    """Return the model's input of a scene, `(C, *size)`, on the model's device."""
    device, dtype = home_of(model)
    picture, _ = scenes[index]
    return normalize(to_pixels(picture, input, size)[None], input)[0].to(device, dtype)


def _whole(
    model: nn.Module, scenes: Scenes, input: Input, settings: SceneTest, places: range
) -> Iterator[tuple[int, Tensor]]:
    """Yield logits `(K, R, C)` of each scene; scenes of one size together, because the model must be set to it."""
    groups: dict[Size, list[int]] = {}
    for index in places:
        groups.setdefault(_aligned(scenes.size(index), input.size, settings.align), []).append(index)
    for size, members in sorted(groups.items()):
        twin = _at(model, size, input.size)
        for first in range(0, len(members), settings.batch):
            some = members[first : first + settings.batch]
            logits = twin(torch.stack([_pixels(model, scenes, index, input, size) for index in some]))
            yield from zip(some, logits, strict=True)


def _aligned(size: Size, input: Size, align: int) -> Size:
    factor = min(input) / min(size)
    rows, columns = (max(align, -(-round(side * factor) // align) * align) for side in size)
    return rows, columns


def _at(model: Any, size: Size, own: Size) -> nn.Module:
    """Return the model, or a copy that takes images of `size`."""
    if size == own:
        return model  # type: ignore[no-any-return]
    twin = copied(model)
    try:
        twin.set_input_size(size)
    except (AssertionError, RuntimeError, TypeError, ValueError) as problem:  # timm's, and ours, which are ValueErrors
        raise RecipeError(
            f"test.mode=whole must set the model to images of {size}, but {reason(problem)}; choose test.mode=slide"
        ) from None
    return twin  # type: ignore[no-any-return]


def _slide(
    model: nn.Module, scenes: Scenes, input: Input, settings: SceneTest, places: range
) -> Iterator[tuple[int, Tensor]]:
    """Yield logits of each scene, averaged over windows."""
    for index in places:
        size = scenes.size(index)
        factor = max(want / have for want, have in zip(input.size, size, strict=True))
        rows, columns = (max(want, round(have * factor)) for want, have in zip(input.size, size, strict=True))
        whole = _pixels(model, scenes, index, input, (rows, columns))
        windows = [
            (row, column)
            for row in _starts(rows, input.size[0], settings.stride)
            for column in _starts(columns, input.size[1], settings.stride)
        ]
        yield index, _averaged(model, whole, windows, input.size, settings.batch)


def _starts(length: int, window: int, stride: float) -> list[int]:
    step = max(1, round(window * stride))
    return sorted({*range(0, length - window, step), length - window})


def _averaged(model: nn.Module, whole: Tensor, places: list[Size], window: Size, batch: int) -> Tensor:
    total: Tensor | None = None
    times = torch.zeros(whole.shape[1:], device=whole.device, dtype=whole.dtype)
    for first in range(0, len(places), batch):
        some = places[first : first + batch]
        logits = model(torch.stack([whole[:, r : r + window[0], c : c + window[1]] for r, c in some]))
        if total is None:
            total = torch.zeros(logits.shape[1], *whole.shape[1:], device=whole.device, dtype=logits.dtype)
        for (r, c), each in zip(some, logits, strict=True):
            total[:, r : r + window[0], c : c + window[1]] += each
            times[r : r + window[0], c : c + window[1]] += 1
    assert total is not None
    return total / times


def _summary(table: Tensor, scenes: int, seconds: float) -> Scores:
    """Compute the scores from a confusion matrix `(K, K)` whose rows are the true classes."""
    right, truth, said = table.diagonal(), table.sum(1), table.sum(0)
    iou = _shares(right, truth + said - right)
    present = [value for value in iou if value is not None]
    return Scores(
        miou=sum(present) / len(present),
        accuracy=float(100 * right.sum() / truth.sum()),
        iou=iou,
        recall=_shares(right, truth),
        pixels=tuple(int(each) for each in truth),
        scenes=scenes,
        seconds=seconds,
    )


def _shares(part: Tensor, whole: Tensor) -> tuple[float | None, ...]:
    return tuple(100 * a / b if b else None for a, b in zip(part.tolist(), whole.tolist(), strict=True))


def by_class(scores: Scores, names: Sequence[str], colours: Sequence[str]) -> list[Mapping[str, Any]]:
    """Return one record per class, for ``classes.json``."""
    rows = zip(names, colours, scores.iou, scores.recall, scores.pixels, strict=True)
    return [
        {"name": name, "colour": colour, "iou": iou, "recall": recall, "pixels": pixels}
        for name, colour, iou, recall, pixels in rows
    ]
