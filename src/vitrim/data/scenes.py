"""Scenes: pictures with a mask that gives the class of every pixel.

B images, (h, w) height and width of the input, K classes that are not ignored.

A source is a folder or an uncompressed tar. It contains `images/*.jpg` with `masks/*.png` of the same stem and size,
either in split folders (`train val test`) or directly, and `classes.txt` with one name per line. A mask is 8-bit
(grayscale or palette). Its values are line numbers of that file, from 0; 255 is ignored.
"""

import dataclasses
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from vitrim.data.decode import decode, is_image
from vitrim.data.folders import SPLITS, choose_split
from vitrim.data.images import spread
from vitrim.data.names import natural_key
from vitrim.data.tars import file_ranges
from vitrim.words.errors import DataError
from vitrim.words.plain import reason
from vitrim.words.progress import progress

__all__ = ["IGNORE", "Scenes", "open_scenes", "scene_splits"]

IGNORE = 255
"""Mask value of pixels that are ignored in training and evaluation."""

_INVALID = 254
_KNOWN = {name: split for split, names in SPLITS.items() for name in names}


@dataclasses.dataclass(frozen=True)
class _Store:
    """Files of a folder or tar by relative name. No file is kept open, so workers may fork at any time."""

    root: Path
    ranges: dict[str, tuple[int, int]] | None

    def names(self) -> list[str]:
        if self.ranges is not None:
            return list(self.ranges)
        return [path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if path.is_file()]

    def read(self, name: str) -> bytes:
        at = self.root if self.ranges is not None else self.root / name
        start, size = (0, -1) if self.ranges is None else self.ranges[name]
        try:
            with at.open("rb") as stream:
                stream.seek(start)
                return stream.read(size)
        except OSError as problem:
            raise DataError(f"{at}: every file must be readable, but {reason(problem)}") from None


class Scenes(Dataset[tuple[Image.Image, Image.Image]]):
    """Scenes in a fixed order, each an RGB picture and a mask of the same size, mode ``L``.

    The values of a mask are below `classes`, or `IGNORE`.

    Attributes:
        names: names of the classes that are not ignored, in the order of the mask values.
        classes: K, their number.
        source: the source as the user gave it, for error messages.
        split: name of the split, or None.
    """

    def __init__(
        self,
        store: _Store,
        pairs: Sequence[tuple[str, str]],
        table: NDArray[np.uint8],
        names: tuple[str, ...],
        source: str,
        split: str | None,
    ) -> None:
        self._store, self._pairs, self._table = store, tuple(pairs), table
        self.names, self.classes, self.source, self.split = names, len(names), source, split

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> tuple[Image.Image, Image.Image]:
        """Return a picture and its mask.

        Raises:
            DataError: a file does not decode, the mask has another size than the picture, or a value is not a class.
        """
        name, mask = self._pairs[index]
        picture = decode(self._store.read(name), f"{self.source}: {name}")
        return picture, Image.fromarray(self._mask(mask, picture.size))

    def line(self) -> str:
        """Return a one-line summary: scenes, classes, the first three class names with their numbers."""
        numbered = [f"{number} '{name}'" for number, name in enumerate(self.names)]
        first = ", ".join([*numbered[:3], *(["..."] if len(numbered) > 3 else [])])
        part = f" ({self.split})" if self.split else ""
        source = self.source.rstrip("/").rpartition("/")[2]
        return f"{len(self):,} scenes of {source}{part}, {self.classes:,} classes ({first})"

    def fingerprint(self) -> str:
        """Return a hash of the files of up to `vitrim.data.images.SAMPLE` scenes, evenly spread, and of the classes.

        Raises:
            DataError: a file cannot be read.
        """
        digest = hashlib.sha256(repr((len(self), self.names)).encode() + self._table.tobytes())
        for index in spread(len(self)):
            for name in self._pairs[index]:
                digest.update(hashlib.sha256(self._store.read(name)).digest())
        return digest.hexdigest()

    def name(self, index: int) -> str:
        """Return the file of a picture, relative to the source."""
        return self._pairs[index][0]

    def size(self, index: int) -> tuple[int, int]:
        """Return the height and width of a picture, read from its header."""
        name = self._pairs[index][0]
        try:
            with Image.open(io.BytesIO(self._store.read(name))) as image:
                return image.height, image.width
        except OSError as problem:
            raise DataError(f"{self.source}: {name}: every image must decode, but {problem}") from None

    def pick(self, index: Sequence[int]) -> "Scenes":
        """Return the scenes at these indices, in this order."""
        pairs = [self._pairs[int(place)] for place in index]
        return Scenes(self._store, pairs, self._table, self.names, self.source, self.split)

    def checked(self) -> NDArray[np.int64]:
        """Read every mask once and return the number of pixels of each class, `(K,)`.

        Raises:
            DataError: a mask has another size than its image, a value that is not a class, or only ignored pixels.
        """
        pixels = np.zeros(256, dtype=np.int64)
        with progress(f"masks of {self.split or self.source}", len(self)) as advance:
            for index, (name, mask) in enumerate(self._pairs):
                rows, columns = self.size(index)
                counted = np.bincount(self._mask(mask, (columns, rows)).reshape(-1), minlength=256)
                if not counted[: self.classes].any():
                    raise DataError(
                        f"{self.source}: {mask}: a mask must have a pixel of a class that counts, but all of its "
                        f"pixels are ignored; remove it and {name}"
                    )
                pixels += counted
                advance(1)
        return pixels[: self.classes]

    def _mask(self, name: str, size: tuple[int, int]) -> NDArray[np.uint8]:
        at = f"{self.source}: {name}"
        try:
            with Image.open(io.BytesIO(self._store.read(name))) as image:
                mode, values = image.mode, np.asarray(image)
        # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and zlib.error for damaged files.
        except Exception as problem:
            reason = str(problem).strip() or type(problem).__name__
            raise DataError(f"{at}: every mask must decode, but {reason}; replace this file") from None
        if mode not in ("L", "P"):
            raise DataError(f"{at}: a mask must be 8-bit gray or palette, one label per pixel, but its mode is {mode}")
        if (values.shape[1], values.shape[0]) != size:
            raise DataError(
                f"{at}: a mask must have the size of its image, {size[0]} x {size[1]}, but has "
                f"{values.shape[1]} x {values.shape[0]}; scale both alike (masks without interpolation)"
            )
        labels: NDArray[np.uint8] = self._table[values]
        if (labels == _INVALID).any():
            wrong = int(values[labels == _INVALID].max())
            lines = int((self._table != _INVALID).sum()) - 1
            raise DataError(
                f"{at}: a label must be one of the {lines} lines of classes.txt (0 to {lines - 1}) or {IGNORE} for "
                f"ignored pixels, but {wrong} came; add the class or correct the mask"
            )
        return labels


def scene_splits(source: str) -> tuple[str, ...]:
    """Return the splits a source is divided into, in the order `train validation test`; empty if it is not divided.

    Raises:
        DataError: there is no such source, or it is damaged.
    """
    return _divided(_open(source).names())


def open_scenes(source: str, split: str | None = None, *, ignore: Sequence[str] = ()) -> Scenes:
    """Open a folder or tar of images and masks.

    Args:
        source: its path.
        split: `train`, `validation` or `test`; None selects `train` of a divided source and everything of an undivided
            one. If there is no `test`, `validation` is returned for it.
        ignore: names in `classes.txt` whose pixels are ignored in training and evaluation.

    Raises:
        DataError: the source is missing, damaged or empty, has an image without mask or a mask without image, or its
            `classes.txt` is missing or malformed.
    """
    store = _open(source)
    names = store.names()
    wanted = choose_split(source, _divided(names), split)
    pairs = _pairs(source, names, wanted)
    classes = _classes(source, store, names)
    unknown = [name for name in ignore if name not in classes]
    if unknown:
        raise DataError(f"{source}: a class to ignore must be in classes.txt, but '{unknown[0]}' is not")
    counted = tuple(name for name in classes if name not in ignore)
    if len(counted) < 2:
        raise DataError(f"{source}: at least 2 classes must count, but there are {len(counted)}")
    table = np.full(256, _INVALID, dtype=np.uint8)
    for value, name in enumerate(classes):
        table[value] = IGNORE if name in ignore else counted.index(name)
    table[IGNORE] = IGNORE
    return Scenes(store, pairs, table, counted, source, wanted)


def _open(source: str) -> _Store:
    root = Path(source)
    if root.is_dir():
        return _Store(root, None)
    if not root.is_file():
        raise DataError(
            f"{source}: a source must exist, but this one does not; give a folder or tar of images and masks"
        )
    return _Store(root, file_ranges(root))


def _divided(names: Sequence[str]) -> tuple[str, ...]:
    first = {parts[0].lower() for parts in (PurePosixPath(name).parts for name in names) if len(parts) > 2}
    found = {_KNOWN[name] for name in first & _KNOWN.keys()}
    return tuple(split for split in SPLITS if split in found)


def _pairs(source: str, names: Sequence[str], split: str | None) -> list[tuple[str, str]]:
    images: dict[str, str] = {}
    masks: dict[str, str] = {}
    for name in names:
        path = PurePosixPath(name)
        *above, kind = path.parts[:-1] or ("",)
        if _KNOWN.get(above[0].lower() if len(above) == 1 else "") != split or len(above) != (split is not None):
            continue
        if kind == "images" and is_image(path.name):
            _add(source, images, path)
        elif kind == "masks" and path.suffix.lower() == ".png":
            _add(source, masks, path)
    lone = sorted(images.keys() ^ masks.keys(), key=natural_key)
    if not images or not masks:
        raise DataError(
            f"{source}: images must be in {f'{split}/' if split else ''}images/ and masks (.png) in masks/, but "
            f"there are {len(images)} and {len(masks)}"
        )
    if lone:
        has, lacks = ("image", "mask") if lone[0] in images else ("mask", "image")
        raise DataError(f"{source}: every {has} must have a {lacks} of the same stem, but '{lone[0]}' has none")
    return [(images[stem], masks[stem]) for stem in sorted(images, key=natural_key)]


def _add(source: str, found: dict[str, str], path: PurePosixPath) -> None:
    if path.stem in found:
        raise DataError(f"{source}: a stem must name one file, but '{found[path.stem]}' and '{path}' share theirs")
    found[path.stem] = str(path)


def _classes(source: str, store: _Store, names: Sequence[str]) -> tuple[str, ...]:
    if "classes.txt" not in names:
        raise DataError(f"{source}: must have a classes.txt with one class name per line, but has none")
    try:
        lines = store.read("classes.txt").decode("utf-8").splitlines()
    except UnicodeDecodeError as problem:
        raise DataError(f"{source}: classes.txt must be UTF-8 text, but {problem.reason}") from None
    found = tuple(line.strip() for line in lines if line.strip())
    if not 0 < len(found) < _INVALID or len(set(found)) != len(found):
        raise DataError(
            f"{source}: classes.txt must have 1 to {_INVALID - 1} different names, but has {len(found)} lines with "
            f"{len(set(found))} different ones"
        )
    return found
