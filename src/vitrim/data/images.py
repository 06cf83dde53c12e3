"""Images by index with their labels: the common form of all sources.

P is the number of images.
"""

import hashlib
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

__all__ = ["SAMPLE", "Images", "check_classes", "labels_of", "spread"]

_THREADS = 4
_BLOCK = 256
_SHOWN = 3

SAMPLE = 256
"""Images whose pixels count in a fingerprint: all of a small set, and 2 s of decoding of a large one."""


def spread(count: int) -> list[int]:
    """Return up to `SAMPLE` indices below `count`, evenly spread, the first and the last among them."""
    return [int(place) for place in np.unique(np.linspace(0, count - 1, min(count, SAMPLE)).round())]


class Images(Dataset[tuple[Image.Image, int]]):
    """Images in a fixed order, each an RGB `PIL.Image` with an integer label.

    Attributes:
        labels: one label per image, `(P,)`; -1 if the source has none.
        classes: number of classes; 0 if the source has no labels.
        names: class names in the order of the labels, or None if the source has none.
        source: the source as the user gave it, for error messages.
        split: name of the split, or None if the source is not divided.
        left_out: phrases that describe the files of the source that are not read, and why.
        order: how the classes are numbered: `plain` or `natural` order of their folders, `map`, `imagenet`, or empty
            if the source itself numbers them.
        fixed: whether an image is the same each time it is read; if not, reading it may draw random numbers.
        cache: share of the free memory of a device that prepared images may take while a model is trained on them, in
            `[0, 1]`; None for the default of `vitrim.data.train_loader`.
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
        cache: float | None = None,
    ) -> None:
        """Wrap a reader.

        Args:
            read: function that returns the image at an index in `[0, P)`; must survive a fork, so it must not keep a
                file open.
            labels: one label per image, `(P,)`, -1 for no label.
            classes: number of classes, 0 without labels.
            names: class names.
            source: name for error messages.
            split: name of the split.
            index: indices to keep, `(P',)`, in their new order; None keeps all.
            left_out: phrases that describe what is not read.
            order: how the classes are numbered.
            fixed: whether `read` always returns the same image for an index.
            cache: see above.

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
        self.cache = cache
        if len(self._index) == 0:
            raise DataError(f"{source}: a source must have at least one image, but has none")
        if self.labels.min() < -1:
            label_of(int(self.labels.min()), source)
        if self.labels.max() >= max(classes, 0) and self.labels.max() >= 0:
            raise DataError(f"{source}: labels must be below {classes}, but {self.labels.max()} came")
        self._everything = everything
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Return the image and its label.

        Raises:
            DataError: the file does not decode; the message names it.
        """
        return self._read(int(self._index[index])), int(self.labels[index])

    def pick(self, index: Sequence[int] | NDArray[Any]) -> "Images":
        """Return the images at these indices, `(P',)`, in this order."""
        return self._with(index=self._index[np.asarray(index, dtype=np.int64)])

    def cached(self, share: float) -> "Images":
        """Return the same images, of which training may keep as many on its device as fit into `share`, see `cache`."""
        return self._with(cache=share)

    def unlabeled(self) -> "Images":
        """Return the same images without labels."""
        return self._with(labels=np.full_like(self._everything, -1), classes=0, names=None, order="")

    def without_damaged(self) -> "Images":
        """Decode every image once and return those that decode; the others are counted and the first is named.

        Raises:
            DataError: no image decodes.
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
        listed = (*self.left_out, *left_out.sentences())
        return self._with(index=self._index[good], left_out=listed)

    def _why_damaged(self, place: int) -> str | None:
        """Return the error message of an image that does not decode, or None if it decodes."""
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
            "cache": self.cache,
        }
        return Images(self._read, **(same | changes))

    def fingerprint(self) -> str:
        """Return a hash of the images, as 64 hexadecimal digits: a run goes on with equal ones alone.

        It is a hash of the labels of all images and of the pixels of some (`spread`). A change to other images than
        these is not noticed, nor are pixels of a source that is not `fixed`, since they may differ at each read.

        Raises:
            DataError: one of them is damaged.
        """
        if self._fingerprint is None:
            digest = hashlib.sha256(self.labels.tobytes())
            with ThreadPoolExecutor(_THREADS) as threads:
                for pixels in threads.map(self._pixels, spread(len(self)) if self.fixed else []):
                    digest.update(hashlib.sha256(pixels).digest())
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def _pixels(self, place: int) -> bytes:
        image: Image.Image = self._read(int(self._index[place]))
        return f"{image.mode} {image.size}".encode() + image.tobytes()

    def line(self, more: int = 0) -> str:
        """Return a one-line summary: images, classes, the first three class names with numbers, and what was not read.

        Args:
            more: number of images of the source that are not in this object, added to the count.

        Example: "1,347 images of digits (train), 10 classes (0 '0', 1 '1', 2 '2', ...); nothing left out".
        """
        part = f" ({self.split})" if self.split else ""
        if not self.classes:
            classes = "no labels"
        elif self.names is None:
            classes = f"{self.classes:,} classes without names"
        else:
            listed = [f"{number} '{name}'" for number, name in enumerate(self.names) if name]
            dots = ["..."] if len(listed) > _SHOWN else []
            order = f" in {self.order} order" if self.order in ("plain", "natural") else ""
            classes = f"{self.classes:,} classes{order} ({', '.join([*listed[:_SHOWN], *dots])})"
        left = f"left out: {'; '.join(self.left_out)}" if self.left_out else "nothing left out"
        count = len(self) + more
        return f"{count:,} {'image' if count == 1 else 'images'} of {self.label}{part}, {classes}; {left}"

    @property
    def label(self) -> str:
        """Name of the source for reports: a path is shortened to its last part."""
        kind, slash, rest = self.source.partition("/")
        # Names on the Hub are owner/name. Anything longer is a path.
        if slash and kind.lower() in ("torch", "hfds") and rest.count("/") < 2 and not rest.startswith(("/", ".")):
            return self.source
        last = self.source.rstrip("/").rpartition("/")[2]
        return f"{kind}/{last}" if slash and kind.lower() in ("wds", "hfds") else last or "data in memory"


def labels_of(dataset: Dataset[Any]) -> NDArray[np.int64]:
    """Return the labels of any map-style dataset of `(image, label)`, `(P,)`; may have to read the images."""
    if isinstance(dataset, Images):
        return dataset.labels
    count = len(dataset)  # type: ignore[arg-type]
    return labels_array((dataset[i][1] for i in range(count)), type(dataset).__name__)


def check_classes(dataset: Dataset[Any], classes: int) -> None:
    """Raise if data and model have different numbers of classes; data without labels fits every model.

    Args:
        dataset: data that the model is to be trained or evaluated on.
        classes: number of outputs of the model; a single output is the logit of the second of two classes.

    Raises:
        DataError: the numbers of classes differ.
    """
    if not isinstance(dataset, Images) or dataset.classes in (0, classes) or (dataset.classes, classes) == (2, 1):
        return
    raise DataError(
        f"{dataset.source}: data must have the {classes} classes of the model, but has {dataset.classes}; "
        "give a class map, or a model with that head"
    )
