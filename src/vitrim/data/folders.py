"""Read folders and tars of class folders: find the splits, the classes, and the number of each class.

Files are listed and decoded here and not by timm's dataset. timm skips a damaged image with a log line and returns the
next one, drops a class that is missing from a class map, follows circular links without end, and recognizes only three
file extensions.

Layouts: `<class>/*.jpg`, `<split>/<class>/*.jpg`, or images without class folders, which have no labels. Classes are
numbered over all splits, so a class that is missing from one split does not shift the numbers of the others.

F is the number of folders that contain images.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitrim.data.class_map import imagenet_numbers, read_map
from vitrim.data.decode import readable_endings
from vitrim.data.images import Images
from vitrim.data.listing import Listing, list_folder
from vitrim.data.names import ORDERS, sort_classes
from vitrim.data.tars import list_tar
from vitrim.words.errors import DataError

__all__ = ["SPLITS", "Ask", "Folder", "Reading", "choose_split", "split_of"]

SPLITS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "eval"),
    "test": ("test", "testing"),
}
_KNOWN = {name: split for split, names in SPLITS.items() for name in names}
_SHOWN = 3

Ask = Callable[[Mapping[str, Images]], str]
"""A function that chooses the order of the class folders, given the training images labeled in each order."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """Options for reading a source that can be read in more than one way.

    Attributes:
        class_map: text file with one class name per line, or a mapping from names to numbers; empty for no map.
        classes: number of outputs of the model. If it is 1,000, folders named by ImageNet ids get their ImageNet label.
        class_order: how class folders are numbered: `plain` (by code point, as torchvision, Keras and Hugging Face
            datasets do), `natural` (as timm does: digits as numbers, ignoring case), or `auto`. If the two orders
            differ, `auto` uses the order that `ask` returns.
        ask: function that chooses the order for `auto`. If it is None, `auto` raises for folders whose orders differ.
        depth: level of the class folders, from 1, below the source or its split folder; None if only one level is
            possible.
        skip_damaged: decode every image once and leave out those that do not decode.
    """

    class_map: str | Mapping[str, int] = ""
    classes: int | None = None
    class_order: str = "auto"
    ask: Ask | None = None
    depth: int | None = None
    skip_damaged: bool = False


def split_of(name: str) -> str | None:
    """Return the split that a folder name denotes, or None."""
    return _KNOWN.get(name.lower())


def choose_split(source: str, divided: tuple[str, ...], split: str | None) -> str | None:
    """Return the split to read from a source divided into `divided`; None means all of an undivided source.

    Raises:
        DataError: there is no such split.
    """
    if split is not None and split not in SPLITS:
        raise DataError(f"{source}: split must be one of {', '.join(SPLITS)}, but is '{split}'")
    if not divided:
        if split in (None, "train"):
            return None
        raise DataError(f"{source}: must have a folder '{split}' to give that split, but it is not divided")
    wanted = split or ("train" if "train" in divided else divided[0])
    if wanted == "test" and "test" not in divided:
        wanted = "validation"
    if wanted not in divided:
        raise DataError(f"{source}: must have a split '{split}', but has {', '.join(divided)}")
    return wanted


class Folder:
    """A folder or an uncompressed tar. It is listed once, and every split is read from that listing.

    Attributes:
        source: its path as the user gave it.
        splits: its splits, in the order `train validation test`; empty if it is not divided.
        by_names: always True: classes are numbered by their names.
    """

    by_names = True

    def __init__(self, source: str) -> None:
        """List the images.

        Raises:
            DataError: the source is damaged, has no image, or its splits cannot be distinguished from classes.
        """
        root = Path(source)
        self.source = source
        self._listing = list_tar(root) if root.is_file() else list_folder(root)
        if not self._listing.folders:
            kinds = " ".join(sorted(readable_endings()))
            left = "".join(f"; left out: {text}" for text in self._listing.left_out.sentences())
            raise DataError(f"{source}: a source must have at least one image ({kinds}), but has none{left}")
        self._parts = [tuple(path.split("/")) if path else () for path in self._listing.folders]
        self._split, self._strip = _divide(source, self._listing, self._parts)
        self._below = [parts[self._strip :] for parts in self._parts]
        self.splits = tuple(split for split in SPLITS if split in self._split)

    def images(self, split: str | None, reading: Reading) -> Images:
        """Return the images of a split.

        Args:
            split: `train`, `validation` or `test`; None selects `train` of a divided source and everything of an
                undivided one. If there is no `test`, `validation` is returned for it, as in the usual
                ImageNet layout. For an undivided source, `train` selects everything.
            reading: how to read the source.

        Raises:
            DataError: a class is empty or not in the map, there is no such split, or the classes can be read in more
                than one way.
        """
        listing = self._listing
        wanted = choose_split(self.source, self.splits, split)
        taken = np.asarray([divided is not None or not self.splits for divided in self._split])
        inside = np.asarray([divided == wanted or not self.splits for divided in self._split])
        index = None if inside.all() else np.flatnonzero(inside[listing.folder])
        phrases = listing.left_out.sentences()
        level = self._level([b for b, t in zip(self._below, taken, strict=True) if t], reading.depth)

        def made(labels: NDArray[np.int64], count: int, names: tuple[str, ...] | None, order: str) -> Images:
            return Images(
                listing.read, labels, classes=count, names=names, source=self.source, split=wanted, index=index,
                left_out=phrases, order=order, fixed=True,
            )  # fmt: skip

        if level is None:
            found = made(np.full(len(listing.names), -1), 0, None, "")
        else:
            leaves = [b[level] if t else "" for b, t in zip(self._below, taken, strict=True)]
            self._check_empty(level)
            classes = {leaf for leaf, t in zip(leaves, taken, strict=True) if t}
            found = self._numbered(classes, leaves, reading, made)
        return found.without_damaged() if reading.skip_damaged else found

    def _numbered(
        self,
        classes: set[str],
        leaves: list[str],
        reading: Reading,
        made: Callable[[NDArray[np.int64], int, tuple[str, ...] | None, str], Images],
    ) -> Images:
        def of(mapping: Mapping[str, int], order: str) -> Images:
            names = [""] * (max(mapping.values()) + 1)
            for name, number in mapping.items():
                names[number] = name
            # Folders outside the split folders belong to no split, so their label does not matter.
            by_folder = np.asarray([mapping.get(leaf, -1) for leaf in leaves], dtype=np.int64)
            return made(by_folder[self._listing.folder], len(names), tuple(names), order)

        if reading.class_map:
            mapping = read_map(self.source, reading.class_map)
            unknown = sorted(classes - mapping.keys())
            if unknown:
                raise DataError(f"{self.source}: every class must be in the class map, but '{unknown[0]}' is not")
            return of(mapping, "map")
        known = imagenet_numbers(classes, reading.classes)
        if known is not None:
            return of(known, "imagenet")
        sorted_ = {order: sort_classes(classes, order) for order in ORDERS}
        given = {order: of({name: n for n, name in enumerate(names)}, order) for order, names in sorted_.items()}
        if reading.class_order in ORDERS:
            return given[reading.class_order]
        if reading.class_order != "auto":
            raise DataError(f"class_order must be auto, plain or natural, but is '{reading.class_order}'")
        if sorted_["plain"] == sorted_["natural"]:
            return given["plain"]
        if reading.ask is None:
            raise DataError(_why_unsure(self.source, given))
        return given[reading.ask(given)]

    def _level(self, below: list[tuple[str, ...]], depth: int | None) -> int | None:
        """Return the position of the class in the path below the split, or None for images without class folders."""
        lengths = {len(parts) for parts in below}
        if lengths == {0} and depth is None:
            return None
        if min(lengths) < (depth or 1):
            place = next(n for n, parts in enumerate(self._below) if parts in below and len(parts) < (depth or 1))
            stray = self._listing.names[int(np.argmax(self._listing.folder == place))]
            deep = "a class folder" if depth in (None, 1) else f"{depth} folders, as set by data.depth"
            raise DataError(f"{self.source}: every image must be in {deep}, but '{stray}' is not")
        _check_class_first(self.source, below)
        if depth is not None:
            return depth - 1
        wrappers = 0
        while min(lengths) > wrappers + 1 and len({parts[wrappers] for parts in below}) == 1:
            wrappers += 1
        if lengths != {wrappers + 1}:
            raise DataError(_why_not_one_level(self.source, below, wrappers))
        return wrappers

    def _check_empty(self, level: int) -> None:
        """Raise if a class folder has no images, because its number or the numbers after it would be wrong."""
        for path, files in sorted(self._listing.empty.items()):
            parts = path.split("/")
            inside = not self.splits or split_of("".join(parts[self._strip - 1 : self._strip])) in self.splits
            if inside and len(parts) == self._strip + level + 1:
                held = "is empty" if not files else f"contains none that can be read ({files:,} other files)"
                raise DataError(
                    f"{self.source}: every class folder must contain an image, but '{path}' {held}; remove it or add "
                    "images"
                )


def _divide(source: str, listing: Listing, parts: list[tuple[str, ...]]) -> tuple[list[str | None], int]:
    """Return the split of each folder, `(F,)`, and the number of path parts that come before the classes.

    The split is None for all folders of an undivided source, and for folders next to the split folders, which are not
    read.
    """
    base = _wrappers(parts)
    first = [path[base] if len(path) > base else "" for path in parts]
    names = sorted({name for name in first if split_of(name) is not None})
    kinds = {split_of(name) for name in names}
    others = [path for path, name in zip(parts, first, strict=True) if split_of(name) is None]
    if not names:
        return [None] * len(parts), 0
    if others and len(kinds) == 1:
        # A class may be called "train". A single folder of that name is a split only if it contains class folders.
        if not any(len(path) > base + 1 for path, name in zip(parts, first, strict=True) if name in names):
            return [None] * len(parts), 0
        if any(len(path) > base + 1 for path in others):
            other = next(path[base] for path in others if len(path) > base + 1)
            raise DataError(
                f"{source}: '{names[0]}' must be a split or a class, but may be either next to '{other}'; name "
                f"{source.rstrip('/')}/{'/'.join((*parts[0][:base], names[0]))} itself, or move one of them away"
            )
    for split in sorted(kinds, key=str):
        mine = [name for name in names if split_of(name) == split]
        if len(mine) > 1:
            raise DataError(f"{source}: a split must have one folder, but {' and '.join(mine)} are both {split}")
    counts = np.bincount(listing.folder, minlength=len(parts))
    for path, name, count in zip(parts, first, counts, strict=True):
        if split_of(name) is None:
            kind = f"{name}/" if name else "no folder"
            listing.left_out.add(
                "images next to the split folders", "/".join(path) or "the source itself", kind, int(count)
            )
    return [split_of(name) for name in first], base + 1


def _wrappers(parts: list[tuple[str, ...]]) -> int:
    """Return the number of nested folders that enclose all class or split folders."""
    base = 0
    while all(len(path) > base + 1 for path in parts):
        names = {path[base] for path in parts}
        if len(names) > 1 or split_of(next(iter(names))) is not None:
            break
        base += 1
    return base


def _check_class_first(source: str, below: list[tuple[str, ...]]) -> None:
    """Raise if split folders are inside class folders, because training and test images would then be mixed."""
    for level in range(1, min(map(len, below))):
        kinds = {split_of(parts[level]) for parts in below}
        if None not in kinds and len(kinds) > 1:
            raise DataError(
                f"{source}: splits must be above classes, as in train/cat/1.jpg, but here they are below, as in "
                f"{'/'.join(below[0])}; move them"
            )


def _why_not_one_level(source: str, below: list[tuple[str, ...]], wrappers: int) -> str:
    least, most = min(map(len, below)), max(map(len, below))
    ways = []
    for level in range(wrappers, least):
        found = sorted({parts[level] for parts in below})
        some = ", ".join([*found[:_SHOWN], *(["..."] if len(found) > _SHOWN else [])])
        ways.append(f"data.depth={level + 1} gives {len(found):,} classes ({some})")
    deep = "/".join(next(parts for parts in below if len(parts) == most))
    flat = "/".join(next(parts for parts in below if len(parts) == least))
    came = f"'{deep}' has {most} levels of folders" + (f" and '{flat}' has {least}" if least < most else "")
    return f"{source}: classes must be folders of one level, but {came}; {', '.join(ways)}"


def _why_unsure(source: str, given: Mapping[str, Images]) -> str:
    return (
        f"{source}: the numbers of the classes must be known, but its folders can be numbered in two ways: "
        f"{numbering(given['plain'])} in plain order (torchvision, Keras, Hugging Face), "
        f"{numbering(given['natural'])} in natural order (timm); set data.class_order=plain or natural, or a "
        "data.class_map"
    )


def numbering(images: Images) -> str:
    """Return the first three classes with their numbers: "0 '1', 1 '10', 2 '2'"."""
    names = images.names or ()
    phrases = [f"{number} '{name}'" for number, name in enumerate(names) if name][:_SHOWN]
    return ", ".join(phrases)
