"""What every source becomes: images that can be asked for by number, and their labels.

P images.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from vitrim.data.labels import label_of, labels_array
from vitrim.data.leftout import LeftOut
from vitrim.words.errors import DataError
from vitrim.words.progress import progress

__all__ = ["Images", "check_classes", "labels_of"]

_THREADS = 4
_BLOCK = 256
_SHOWN = 3


class Images(Dataset[tuple[Image.Image, int]]):
    """Images in a fixed order, each an RGB `PIL.Image` with an integer label.

    Attributes:
        labels: one label an image, `(P,)`; -1 where the source has none.
        classes: number of classes the labels count over; 0 when the source has no labels.
        names: class names in the order of the labels, or None where the source has none.
        source: what the user asked for, as in error texts.
        split: name of the part of the source, or None for a source that is not divided.
        left_out: phrases that say what the source holds besides, and why it is not read.
        order: how the classes are numbered: `plain` or `natural` order of their folders, `map`, `imagenet`, or empty
            where the source itself numbers them.
        fixed: whether the image of a number is the same whenever it is read; else it may draw random numbers.
    """

    def __init__(
        self,
        read: Callable[[int], Any],
        labels: Sequence[int] | NDArray[Any],
        *,
        classes: int,
        names: tuple[str, ...] | None = None,
        source: str = "",
        split: str | None = None,
        index: NDArray[Any] | None = None,
        left_out: tuple[str, ...] = (),
        order: str = "",
        fixed: bool = False,
    ) -> None:
        """Wrap a reader.

        Args:
            read: gives the image of a number in `[0, P)`; must survive a fork, so it holds no open file.
            labels: one label an image, `(P,)`, -1 for none.
            classes: number of classes, 0 without labels.
            names: class names.
            source: name for error texts.
            split: part of the source.
            index: numbers to keep, `(P',)`, in their new order; None keeps all.
            left_out: what the source holds besides.
            order: how the classes are numbered.
            fixed: whether `read` always gives the same image for a number.

        Raises:
            DataError: there is no image, or a label is below -1 or not below `classes`.
        """
        everything = np.asarray(labels, dtype=np.int64)
        self._read = read
        self._index = np.arange(len(everything)) if index is None else np.asarray(index, dtype=np.int64)
        self.labels = everything[self._index]
        self.classes = classes
        self.names = names
        self.source = source
        self.split = split
        self.left_out = left_out
        self.order = order
        self.fixed = fixed
        if len(self._index) == 0:
            raise DataError(f"{source}: a source must have at least one image, but has none")
        if self.labels.min() < -1:
            label_of(int(self.labels.min()), source)
        if self.labels.max() >= max(classes, 0) and self.labels.max() >= 0:
            raise DataError(f"{source}: labels must be below {classes}, but {self.labels.max()} came")
        self._everything = everything

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Return the image and its label.

        Raises:
            DataError: the file does not decode; the text names it.
        """
        return self._read(int(self._index[index])), int(self.labels[index])

    def pick(self, index: Sequence[int] | NDArray[Any]) -> "Images":
        """Return the images of these numbers, `(P',)`, in this order."""
        return self._with(index=self._index[np.asarray(index, dtype=np.int64)])

    def unlabeled(self) -> "Images":
        """Return the same images without labels."""
        return self._with(labels=np.full_like(self._everything, -1), classes=0, names=None, order="")

    def without_damaged(self) -> "Images":
        """Decode every image once and return those that decode; what is left out is counted and the first named.

        Raises:
            DataError: none decodes.
        """
        good = np.ones(len(self), dtype=bool)
        left_out = LeftOut()
        with progress(f"decoding {self.source}", len(self)) as advance, ThreadPoolExecutor(_THREADS) as threads:
            for start in range(0, len(self), _BLOCK):
                block = range(start, min(start + _BLOCK, len(self)))
                for place, problem in zip(block, threads.map(self._why_damaged, block), strict=True):
                    if problem is not None:
                        good[place] = False
                        left_out.add("damaged images", problem.partition(": every image")[0])
                advance(len(block))
        if good.all():
            return self
        if not good.any():
            raise DataError(f"{self.source}: a source must have an image that decodes, but none of {len(self):,} does")
        told = (*self.left_out, *left_out.sentences())
        return self._with(index=self._index[good], left_out=told)

    def _why_damaged(self, place: int) -> str | None:
        """What is said of an image that does not decode, or None."""
        try:
            self._read(int(self._index[place]))
        except DataError as problem:
            return str(problem)
        return None

    def _with(self, **changes: Any) -> "Images":
        same: dict[str, Any] = {
            "labels": self._everything,
            "classes": self.classes,
            "names": self.names,
            "source": self.source,
            "split": self.split,
            "index": self._index,
            "left_out": self.left_out,
            "order": self.order,
            "fixed": self.fixed,
        }
        return Images(self._read, **(same | changes))

    def line(self, more: int = 0) -> str:
        """What was read, in one line: images, classes, the first three class names with their numbers, what was not.

        With `more`, that many images of the source that are not among these are counted, too.

        "1,347 images of digits (train), 10 classes (0 '0', 1 '1', 2 '2', ...); nothing left out".
        """
        part = f" ({self.split})" if self.split else ""
        if not self.classes:
            classes = "no labels"
        elif self.names is None:
            classes = f"{self.classes:,} classes without names"
        else:
            told = [f"{number} '{name}'" for number, name in enumerate(self.names) if name]
            dots = ["..."] if len(told) > _SHOWN else []
            order = f" in {self.order} order" if self.order in ("plain", "natural") else ""
            classes = f"{self.classes:,} classes{order} ({', '.join([*told[:_SHOWN], *dots])})"
        left = f"left out: {'; '.join(self.left_out)}" if self.left_out else "nothing left out"
        count = len(self) + more
        return f"{count:,} {'image' if count == 1 else 'images'} of {self.label}{part}, {classes}; {left}"

    @property
    def label(self) -> str:
        """The source as reports tell it: without the folders that a path leads through."""
        kind, slash, rest = self.source.partition("/")
        # Names of the Hub are owner/name; anything longer is a path.
        if slash and kind.lower() in ("torch", "hfds") and rest.count("/") < 2 and not rest.startswith(("/", ".")):
            return self.source
        last = self.source.rstrip("/").rpartition("/")[2]
        return f"{kind}/{last}" if slash and kind.lower() in ("wds", "hfds") else last or "data in memory"


def labels_of(dataset: Dataset[Any]) -> NDArray[np.int64]:
    """Return the labels of any map-style dataset of `(image, label)`, `(P,)`, reading the images if it must."""
    if isinstance(dataset, Images):
        return dataset.labels
    count = len(dataset)  # type: ignore[arg-type]
    return labels_array((dataset[i][1] for i in range(count)), type(dataset).__name__)


def check_classes(dataset: Dataset[Any], classes: int) -> None:
    """Check that labels and model count the same classes; data without labels fits every model.

    Args:
        dataset: what the model is to be trained or evaluated on.
        classes: outputs of the model; one output is the logit of the second of two classes.

    Raises:
        DataError: the counts differ.
    """
    if not isinstance(dataset, Images) or dataset.classes in (0, classes) or (dataset.classes, classes) == (2, 1):
        return
    raise DataError(
        f"{dataset.source}: data must have the {classes} classes of the model, but has {dataset.classes}; "
        "give a class map, or a model with that head"
    )
