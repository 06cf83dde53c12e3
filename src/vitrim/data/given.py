"""Convert data in memory (datasets, loaders, batches) to `Images`."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitrim.data.images import Images
from vitrim.data.labels import labels_array
from vitrim.words.errors import DataError

__all__ = ["images_of"]


def images_of(source: Any, classes: int = 0) -> str | Images | None:
    """Convert any form of data that a caller may pass.

    Args:
        source: a source string, opened images, a dataset of (picture, label) with pictures that
            `vitrim.data.pictures.as_picture` accepts, a loader of batches of such pairs, or None. Of a loader, one pass
            is kept in its order, even if it shuffles or augments.
        classes: number of outputs of the model; data in memory may contain only some of the classes.

    Returns:
        A source string, images, or None if `source` is None.

    Raises:
        DataError: the data is none of these, or a label is not a whole number.
    """
    if source is None or isinstance(source, str | Images):
        return source
    if isinstance(source, Path):
        return str(source)
    name = type(source).__name__
    if isinstance(source, DataLoader) or (isinstance(source, Iterable) and not isinstance(source, Dataset)):
        pictures, labels = _unbatch(source, name)
        held: Any = pictures
        return Images(lambda i: held[i], labels, classes=_count(source, labels, classes), source=name)
    if isinstance(source, Dataset) and hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        labels = _labels(source, name)
        names = getattr(source, "classes", None)
        count = _count(source, labels, classes)
        # torchvision's datasets have the class names in `classes`.
        class_names = tuple(map(str, names)) if isinstance(names, list | tuple) and len(names) == count else None
        items: Any = source
        return Images(lambda i: items[i][0], labels, classes=count, names=class_names, source=name)
    raise DataError(f"data must be a source, a dataset or a loader of (images, labels), but got {name}")


def _count(source: Any, labels: NDArray[np.int64], classes: int) -> int:
    """Return the number of classes: the number of class names if there are any."""
    names = getattr(source, "classes", None)
    most = int(labels.max(initial=-1)) + 1
    if not most:
        return 0
    return len(names) if isinstance(names, list | tuple) else max(most, classes)


def _labels(dataset: Any, name: str) -> NDArray[np.int64]:
    known = getattr(dataset, "targets", None)
    if known is not None and getattr(dataset, "target_transform", None) is None:
        return labels_array(known, name)
    try:
        items = [_second(dataset[i], name) for i in range(len(dataset))]
    except (TypeError, ValueError, IndexError, KeyError, RuntimeError) as problem:
        if isinstance(problem, DataError):
            raise
        raise DataError(f"a dataset must give (image, whole number) for each index, but {problem}") from None
    return labels_array(items, name)


def _second(item: Any, name: str) -> Any:
    if not isinstance(item, list | tuple) or len(item) != 2:
        raise DataError(
            f"{name}: a dataset must give (image, label) for each index, but gave a {type(item).__name__}; wrap it so "
            "that it does"
        )
    return item[1]


def _unbatch(batches: Iterable[Any], name: str) -> tuple[list[Any], NDArray[np.int64]]:
    pictures: list[Any] = []
    labels: list[Any] = []
    for batch in batches:
        if not isinstance(batch, list | tuple) or len(batch) != 2 or not isinstance(batch[0], Tensor | np.ndarray):
            raise DataError("a loader must give (images, labels), but gave something else; give a dataset instead")
        mine = list(batch[1]) if isinstance(batch[1], Iterable) else [batch[1]]
        if len(mine) != len(batch[0]):
            raise DataError(
                f"{name}: a loader must give one label per image, but gave {len(mine)} for {len(batch[0])} images"
            )
        pictures += list(batch[0])
        labels += mine
    return pictures, labels_array(labels, name)
