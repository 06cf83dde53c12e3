"""Find and open image sources: `digits`, a folder or tar, or a name that timm's `create_dataset` accepts.

P is the number of images.
"""

import dataclasses
import difflib
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitrim.data.folders import SPLITS, Ask, Folder, Reading
from vitrim.data.hub_data import HubData, create
from vitrim.data.images import Images
from vitrim.data.labels import labels_array
from vitrim.data.shards import Shards
from vitrim.words.cache import cache_folder
from vitrim.words.errors import DataError

__all__ = ["Source", "find_source", "open_source", "splits_of", "test_images"]

_HELP = "a source is 'digits', a folder or tar of class folders, 'torch/NAME', 'hfds/NAME' or 'wds/FOLDER'"
_DIGITS_TEST = 450


class Source(Protocol):
    """A source of images. It is opened once, and all splits are read from it.

    Attributes:
        source: the source as the user gave it.
        splits: its splits, in the order `train validation test`; empty if it is not divided.
        by_names: whether classes are folders that are numbered by sorting their names. Another folder with fewer
            classes then needs a class map to get the same numbers.
    """

    source: str
    splits: tuple[str, ...]
    by_names: bool

    def images(self, split: str | None, reading: Reading) -> Images:
        """Return the images of a split; see `open_source`."""
        ...


@dataclasses.dataclass(frozen=True)
class _Pictures:
    """Images held in memory, `(P, H, W, 3)`, uint8."""

    pixels: NDArray[np.uint8]

    def __call__(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])


@dataclasses.dataclass(frozen=True)
class _Torchvision:
    dataset: Any
    name: str

    def __call__(self, index: int) -> Image.Image:
        try:
            picture: Image.Image = self.dataset[index][0]
        except OSError as problem:
            raise DataError(f"{self.name}: image {index} must decode, but {problem}") from None
        return picture.convert("RGB")


def find_source(source: str) -> Source:
    """Find a source of images and list its contents once.

    Args:
        source: `digits` (1,797 real 8x8 digits of scikit-learn, enlarged to 32x32); a folder or an uncompressed tar
            with class folders, with split folders that contain class folders, or with only images (no labels);
            `torch/NAME` (torchvision, downloaded to `$VITRIM_DATA` or `~/.cache/vitrim`); `hfds/NAME`
            (Hugging Face datasets); `wds/FOLDER` or `wds/FOLDER/PATTERN` (webdataset shards, e.g.
            `wds/shards/train-{000..009}.tar`). Any of them may name a split after a colon:
            `hfds/NAME:validation`, `hfds/NAME:train[:10%]`, `wds/FOLDER:test`.
            Then only this split is returned, regardless of the split requested later.

    Raises:
        DataError: the source is unknown, damaged or empty.
    """
    kind, slash, rest = source.partition("/")
    if slash and kind.lower() in ("torch", "hfds", "wds"):
        name, _, pinned = rest.partition(":") if kind.lower() != "wds" or not _exists(rest) else (rest, "", "")
        whole = f"{kind}/{name}"
        openers: dict[str, Callable[[str], Source]] = {"torch": _Torch, "hfds": HubData, "wds": _Wds}
        found = openers[kind.lower()](whole)
        return _Pinned(source, found, pinned) if pinned else found
    if source == "digits":
        return _Digits()
    name, colon, pinned = source.rpartition(":")
    if colon and pinned and not _exists(source) and (name == "digits" or _exists(name)):
        return _Pinned(source, find_source(name), pinned)
    if not _exists(source):
        raise DataError(f"{_short(source)}: a source must exist, but this one does not{_near(source)}; {_HELP}")
    return Folder(source)


def open_source(
    source: str,
    split: str | None = None,
    *,
    class_map: str | Mapping[str, int] = "",
    classes: int | None = None,
    class_order: str = "auto",
    ask: Ask | None = None,
    depth: int | None = None,
    skip_damaged: bool = False,
) -> Images:
    """Open a source of images.

    Args:
        source: see `find_source`.
        split: `train`, `validation` or `test`; None selects `train` of a divided source and everything of an undivided
            one. `hfds` also accepts its own split expressions.
        class_map: text file with one class name per line, or a mapping from names to numbers.
        classes: number of outputs of the model. If it is 1,000, folders named by ImageNet ids get their ImageNet label.
        class_order: `plain`, `natural` or `auto`, see `vitrim.data.folders.Reading`.
        ask: function that chooses the order for `auto`.
        depth: level of the class folders, from 1.
        skip_damaged: whether to leave out images that do not decode.

    Returns:
        Images in a fixed order.

    Raises:
        DataError: the source is unknown, damaged or empty, a class is not in the map, there is no such split, or the
            folders can be read in more than one way.
    """
    reading = Reading(class_map, classes, class_order, ask, depth, skip_damaged)
    return find_source(source).images(split, reading)


def splits_of(source: str) -> tuple[str, ...]:
    """Return the splits a source is divided into, in the order `train validation test`; empty if it is not divided.

    Args:
        source: see `find_source`.

    Raises:
        DataError: the source is unknown or damaged.
    """
    return find_source(source).splits


def test_images(found: Source, reading: Reading) -> Images:
    """Return the images on which to evaluate a model; never training images, unless the source names that split.

    Args:
        found: a source. If it is divided, its `test` split is used, or `validation` if there is no `test` split or the
            test images have no labels.
        reading: how to read the source.

    Raises:
        DataError: the source is divided and has neither split, or it cannot be read.
    """
    if not found.splits:
        return found.images(None, reading)
    if not {"test", "validation"} & set(found.splits):
        raise DataError(
            f"{found.source}: images to measure on must not be training images, but there is only a train split; to "
            f"measure on that, name it as {found.source}:train"
        )
    images = found.images("test" if "test" in found.splits else "validation", reading)
    if images.split == "test" and not images.classes and "validation" in found.splits:
        return found.images("validation", reading)
    return images


test_images.__test__ = False  # type: ignore[attr-defined]


class _Pinned:
    """A source restricted to the split that the user named."""

    def __init__(self, source: str, found: Source, split: str) -> None:
        self.source = source
        self.splits: tuple[str, ...] = ()
        self.by_names = found.by_names
        self._found, self._split = found, split

    def images(self, split: str | None, reading: Reading) -> Images:
        return self._found.images(self._split, reading)


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # a name that is too long, or contains a null character
        return False


def _short(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."


def _near(source: str) -> str:
    path = Path(source)
    try:
        neighbors = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    except (OSError, ValueError):
        neighbors = []
    if path.name == source:
        neighbors.append("digits")
    near = difflib.get_close_matches(path.name[:200], neighbors, n=1)
    return f"; did you mean '{near[0] if path.name == source else path.parent / near[0]}'?" if near else ""


@functools.cache
def _digit_arrays() -> tuple[NDArray[np.uint8], NDArray[np.int64], dict[str, NDArray[np.int64]]]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    # The source has gray levels from 0 to 16.
    small = (digits.images * (255 / 16)).round().astype(np.uint8)
    large = [Image.fromarray(each).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB") for each in small]
    labels = digits.target.astype(np.int64)
    places = np.arange(len(labels))
    train, test = train_test_split(places, test_size=_DIGITS_TEST, stratify=labels, random_state=0)
    return np.stack([np.asarray(each) for each in large]), labels, {"train": np.sort(train), "test": np.sort(test)}


class _Digits:
    by_names = False
    source = "digits"
    splits: tuple[str, ...] = ("train", "test")

    def images(self, split: str | None, reading: Reading) -> Images:
        pixels, labels, places = _digit_arrays()
        if split is not None and split not in places:
            raise DataError(f"digits: split must be train or test, but is '{split}'")
        _no_map("digits", reading)
        names = tuple(str(digit) for digit in range(10))
        return Images(
            _Pictures(pixels),
            labels,
            classes=10,
            names=names,
            source="digits",
            split=split or "train",
            index=places[split or "train"],
            fixed=True,
        )


class _Torch:
    by_names = False
    splits: tuple[str, ...] = ("train", "test")

    def __init__(self, source: str) -> None:
        self.source = source

    def images(self, split: str | None, reading: Reading) -> Images:
        _no_map(self.source, reading)
        chosen = split or "train"
        if chosen not in SPLITS:
            raise DataError(f"{self.source}: split must be one of {', '.join(SPLITS)}, but is '{chosen}'")
        root = cache_folder("VITRIM_DATA")
        # torchvision's datasets have two parts. timm returns the first for `train`, and the second for any other name.
        part = "train" if chosen == "train" else "validation"
        dataset = create(self.source, root=str(root), split=part, download=True)
        labels = _torch_labels(dataset, self.source)
        names = tuple(str(name) for name in getattr(dataset, "classes", ())) or None
        count = len(names) if names else int(labels.max()) + 1
        read = _Torchvision(dataset, self.source)
        return Images(read, labels, classes=count, names=names, source=self.source, split=chosen, fixed=True)


def _torch_labels(dataset: Any, source: str) -> NDArray[np.int64]:
    for field in ("targets", "labels"):
        if getattr(dataset, field, None) is not None:
            return labels_array(getattr(dataset, field), source)
    return labels_array((dataset[index][1] for index in range(len(dataset))), source)


class _Wds:
    by_names = False

    def __init__(self, source: str) -> None:
        self.source = source
        self._shards = Shards(source, Path(source.partition("/")[2]))
        self.splits = self._shards.splits

    def images(self, split: str | None, reading: Reading) -> Images:
        return self._shards.images(split, reading)


def _no_map(source: str, reading: Reading) -> None:
    if reading.class_map:
        raise DataError(
            f"{source}: a class map must be used with folders, tars, hfds or wds, but was given with this source"
        )
