"""Which source is meant: `digits`, a folder or tar, or a name that timm's `create_dataset` knows.

P pictures.
"""

import dataclasses
import difflib
import functools
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from timm.data import create_dataset

from vitrim.data.folders import SPLITS, folder_splits, open_folder
from vitrim.data.images import Images, decode
from vitrim.words.errors import DataError

__all__ = ["open_source", "splits_of"]

_HELP = "a source is 'digits', a folder or tar of class folders, 'torch/NAME', 'hfds/NAME' or 'wds/FOLDER'"
_DIGITS_TEST = 450
# Decoded pictures of a web dataset stay in memory, since a shard can only be read from its beginning.
_MEMORY = 4 * 2**30


@dataclasses.dataclass(frozen=True)
class _Pictures:
    """Pictures held in memory, `(P, H, W, 3)` or a tuple of `P` such without the first axis, uint8."""

    pixels: Any

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


@dataclasses.dataclass(frozen=True)
class _Reader:
    """A random-access timm reader, which gives a stream of encoded bytes for a number."""

    reader: Any
    name: str

    def __call__(self, index: int) -> Image.Image:
        with self.reader[index][0] as stream:
            return decode(stream.read(), f"{self.name}: image {index}")


def open_source(
    source: str,
    split: str | None = None,
    *,
    class_map: str | Mapping[str, int] = "",
    classes: int | None = None,
) -> Images:
    """Open a source of pictures.

    Args:
        source: `digits` (1,797 real 8x8 digits of scikit-learn, enlarged to 32x32); a folder or an uncompressed tar,
            of class folders, of split folders with class folders, or of pictures alone (no labels); `torch/NAME`
            (torchvision, downloaded to `$VITRIM_DATA` or `~/.cache/vitrim`); `hfds/NAME` (Hugging Face datasets);
            `wds/FOLDER` or `wds/FOLDER/PATTERN` (webdataset shards, e.g. `wds/shards/train-{000..009}.tar`).
        split: `train`, `validation` or `test`; None takes `train` of a divided source, else everything. `hfds` takes
            any split expression of its own.
        class_map: text file with one class name a line, or names with their numbers.
        classes: outputs of the model; with 1,000 of them, folders named by ImageNet wnids find their ImageNet label.

    Returns:
        Pictures in a fixed order.

    Raises:
        DataError: unknown, damaged or empty source, class outside the map, no such split.
    """
    kind, slash, _ = source.partition("/")
    opener = _OPENERS.get(kind.lower()) if slash else None
    if opener is not None:
        return opener(source, split, class_map)
    if source == "digits":
        return _digits(split)
    if not Path(source).exists():
        raise DataError(f"{source}: a source must exist, but this one does not{_near(source)}; {_HELP}")
    return open_folder(source, split, class_map=class_map, classes=classes)


def splits_of(source: str) -> tuple[str, ...]:
    """Return the splits a source is known to be divided into, in the order `train validation test`.

    Args:
        source: as in `open_source`.

    Returns:
        Empty for a source that is not divided, or that only opening can tell (`hfds`, `wds`).

    Raises:
        DataError: the source is damaged.
    """
    kind, slash, _ = source.partition("/")
    if source == "digits":
        return ("train", "test")
    if slash and kind.lower() == "torch":
        return ("train", "test")
    if (slash and kind.lower() in _OPENERS) or not Path(source).exists():
        return ()
    return folder_splits(source)


def _near(source: str) -> str:
    path = Path(source)
    beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    if path.name == source:
        beside.append("digits")
    near = difflib.get_close_matches(path.name, beside, n=1)
    return f"; did you mean '{near[0] if path.name == source else path.parent / near[0]}'?" if near else ""


@functools.cache
def _digit_arrays() -> tuple[NDArray[np.uint8], NDArray[np.int64], dict[str, NDArray[np.int64]]]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    # Sixteen grey levels in the source.
    small = (digits.images * (255 / 16)).round().astype(np.uint8)
    large = [Image.fromarray(each).resize((32, 32), Image.Resampling.BICUBIC).convert("RGB") for each in small]
    labels = digits.target.astype(np.int64)
    places = np.arange(len(labels))
    train, test = train_test_split(places, test_size=_DIGITS_TEST, stratify=labels, random_state=0)
    return np.stack([np.asarray(each) for each in large]), labels, {"train": np.sort(train), "test": np.sort(test)}


def _digits(split: str | None) -> Images:
    pixels, labels, places = _digit_arrays()
    if split is not None and split not in places:
        raise DataError(f"digits: split must be train or test, but is '{split}'")
    names = tuple(str(digit) for digit in range(10))
    return Images(
        _Pictures(pixels),
        labels,
        classes=10,
        names=names,
        source="digits",
        split=split or "train",
        index=places[split or "train"],
    )


def _open_torch(source: str, split: str | None, class_map: str | Mapping[str, int]) -> Images:
    _no_map(source, class_map)
    chosen = split or "train"
    if chosen not in SPLITS:
        raise DataError(f"{source}: split must be one of {', '.join(SPLITS)}, but is '{chosen}'")
    root = Path(os.environ.get("VITRIM_DATA", "~/.cache/vitrim")).expanduser()
    # torchvision's sets have two parts, which timm calls train and everything else.
    part = "train" if chosen == "train" else "validation"
    dataset = _create(source, root=str(root), split=part, download=True)
    labels = _torch_labels(dataset)
    names = tuple(str(name) for name in getattr(dataset, "classes", ())) or None
    count = len(names) if names else int(labels.max()) + 1
    return Images(_Torchvision(dataset, source), labels, classes=count, names=names, source=source, split=chosen)


def _torch_labels(dataset: Any) -> NDArray[np.int64]:
    for field in ("targets", "labels"):
        if getattr(dataset, field, None) is not None:
            return np.asarray(getattr(dataset, field), dtype=np.int64)
    return np.asarray([int(dataset[index][1]) for index in range(len(dataset))], dtype=np.int64)


def _open_hfds(source: str, split: str | None, class_map: str | Mapping[str, int]) -> Images:
    chosen = split or "train"
    reader = _create(source, split=chosen, class_map=class_map or None).reader
    column = reader.dataset.column_names
    if reader.label_key in column:
        given = [-1 if label is None else label for label in reader.dataset[reader.label_key]]
        labels = [reader.class_to_idx[reader._source_names[label]] for label in given] if class_map else given
    else:
        labels = [-1] * len(reader)
    names = tuple(sorted(reader.class_to_idx, key=reader.class_to_idx.__getitem__)) or None
    count = max(labels) + 1 if names is None else max(reader.class_to_idx.values()) + 1
    return Images(_Reader(reader, source), labels, classes=count, names=names, source=source, split=chosen)


def _open_wds(source: str, split: str | None, class_map: str | Mapping[str, int]) -> Images:
    root, shards = _shards(source, split)
    stream = _create("wds/", root=root, split=shards, class_map=class_map or None)
    pixels, labels = _drain(source, stream)
    count = max(labels) + 1
    return Images(_Pictures(pixels), labels, classes=count, source=source, split=split)


def _shards(source: str, split: str | None) -> tuple[str, str]:
    """Folder and shard expression: as given, by the folder's own index, or all shards named after the split."""
    path = Path(source.partition("/")[2])
    if path.suffix == ".tar" or "{" in path.name:
        return str(path.parent), path.name
    if not path.is_dir():
        raise DataError(f"{source}: the folder of shards must exist, but it does not")
    if (path / "_info.json").exists() or (path / "info.json").exists():
        return str(path), split or "train"
    found = sorted(each.name for each in path.glob("*.tar"))
    names = [name for name in found if split is None or name.startswith(split)]
    if not names:
        wanted = "a shard" if split is None else f"a shard whose name starts with '{split}'"
        raise DataError(f"{source}: the folder must hold {wanted}, but holds {len(found)} other .tar files")
    return str(path), "::".join(names)


def _drain(source: str, stream: Iterable[tuple[Image.Image, Any]]) -> tuple[tuple[NDArray[np.uint8], ...], list[int]]:
    pixels: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    size = 0
    for picture, label in stream:
        array = np.asarray(picture.convert("RGB"))
        size += array.nbytes
        if size > _MEMORY:
            raise DataError(
                f"{source}: a web dataset must fit {_MEMORY >> 30} GiB once decoded, but holds more; "
                "unpack it into class folders"
            )
        pixels.append(array)
        labels.append(-1 if label is None else int(label))
    if not pixels:
        raise DataError(f"{source}: a source must have at least one image, but has none")
    return tuple(pixels), labels


def _no_map(source: str, class_map: str | Mapping[str, int]) -> None:
    if class_map:
        raise DataError(f"{source}: a class map must go with folders, tars, hfds or wds, but came with this source")


def _create(source: str, **arguments: Any) -> Any:
    """Call timm's `create_dataset`; whatever its many back ends raise becomes one sentence."""
    given = {name: value for name, value in arguments.items() if value is not None}
    try:
        return create_dataset(source, **given)
    except ImportError as problem:
        raise DataError(f"{source}: its library must be installed, but {problem}") from None
    except Exception as problem:
        text = " ".join(str(problem).split()) or type(problem).__name__
        raise DataError(f"{source}: timm must be able to open this source, but {text}") from problem


_OPENERS: dict[str, Callable[[str, str | None, str | Mapping[str, int]], Images]] = {
    "torch": _open_torch,
    "hfds": _open_hfds,
    "wds": _open_wds,
}
