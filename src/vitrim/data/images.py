"""What every source becomes: pictures that can be asked for by number, and their labels.

P pictures.
"""

import io
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset

from vitrim.words.errors import DataError

__all__ = ["Images", "check_classes", "decode", "labels_of"]


class Images(Dataset[tuple[Image.Image, int]]):
    """Pictures in a fixed order, each an RGB `PIL.Image` with an integer label.

    Attributes:
        labels: one label a picture, `(P,)`; -1 where the source has none.
        classes: number of classes the labels count over; 0 when the source has no labels.
        names: class names in the order of the labels, or None where the source has none.
        source: what the user asked for, as in error texts.
        split: name of the part of the source, or None for a source that is not divided.
    """

    def __init__(
        self,
        read: Callable[[int], Image.Image],
        labels: Sequence[int] | NDArray[Any],
        *,
        classes: int,
        names: tuple[str, ...] | None = None,
        source: str = "",
        split: str | None = None,
        index: NDArray[Any] | None = None,
    ) -> None:
        """Wrap a reader.

        Args:
            read: gives the picture of a number in `[0, P)`; must survive a fork, so it holds no open file.
            labels: one label a picture, `(P,)`, -1 for none.
            classes: number of classes, 0 without labels.
            names: class names.
            source: name for error texts.
            split: part of the source.
            index: numbers to keep, `(P',)`, in their new order; None keeps all.

        Raises:
            DataError: there is no picture, or labels exceed `classes`.
        """
        everything = np.asarray(labels, dtype=np.int64)
        self._read = read
        self._index = np.arange(len(everything)) if index is None else np.asarray(index, dtype=np.int64)
        self.labels = everything[self._index]
        self.classes = classes
        self.names = names
        self.source = source
        self.split = split
        if len(self._index) == 0:
            raise DataError(f"{source}: a source must have at least one image, but has none")
        if self.labels.max() >= max(classes, 0) and self.labels.max() >= 0:
            raise DataError(f"{source}: labels must be below {classes}, but {self.labels.max()} came")
        self._everything = everything

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Return the picture (RGB) and its label.

        Raises:
            DataError: the file does not decode; the text names it.
        """
        return self._read(int(self._index[index])), int(self.labels[index])

    def pick(self, index: Sequence[int] | NDArray[Any]) -> "Images":
        """Return the pictures of these numbers, `(P',)`, in this order."""
        return Images(
            self._read,
            self._everything,
            classes=self.classes,
            names=self.names,
            source=self.source,
            split=self.split,
            index=self._index[np.asarray(index, dtype=np.int64)],
        )


def decode(data: bytes | BinaryIO, name: str) -> Image.Image:
    """Decode one picture to RGB.

    Args:
        data: the encoded picture.
        name: its file, for the error text.

    Raises:
        DataError: the picture is damaged.
    """
    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    try:
        with Image.open(stream) as image:
            return image.convert("RGB")
    except UnidentifiedImageError:
        reason = "it is not an image that Pillow can read"
    # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and zlib.error for damaged files.
    except Exception as problem:
        reason = f"{problem}".strip() or type(problem).__name__
    raise DataError(f"{name}: every image must decode, but {reason}; replace or remove this file")


def labels_of(dataset: Dataset[Any]) -> NDArray[np.int64]:
    """Return the labels of any map-style dataset of `(picture, label)`, `(P,)`, reading the pictures if it must."""
    if isinstance(dataset, Images):
        return dataset.labels
    count = len(dataset)  # type: ignore[arg-type]
    return np.asarray([int(dataset[i][1]) for i in range(count)], dtype=np.int64)


def check_classes(dataset: Dataset[Any], classes: int) -> None:
    """Check that labels and model count the same classes; data without labels fits every model.

    Args:
        dataset: what the model is to be trained or evaluated on.
        classes: outputs of the model.

    Raises:
        DataError: the counts differ.
    """
    if not isinstance(dataset, Images) or dataset.classes in (0, classes):
        return
    raise DataError(
        f"{dataset.source}: data must have the {classes} classes of the model, but has {dataset.classes}; "
        "give a class map, or a model with that head"
    )
