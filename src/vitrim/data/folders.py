"""Folders and tars of class folders, read through timm, checked by us.

timm's dataset skips a damaged picture with a log line and takes its neighbour, and drops a class that is missing from a
class map in silence; both would change a result without a word. So timm lists the files and we decode them.

Layouts: `<class>/*.jpg`, `<split>/<class>/*.jpg`, or pictures without class folders, which have no labels. The leaf
folder is the class. Class numbers count over all splits, so that a class missing from one of them shifts nothing.
"""

import dataclasses
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from timm.data import ImageNetInfo, create_dataset
from timm.data.readers.class_map import load_class_map
from timm.data.readers.img_extensions import get_img_extensions
from timm.utils.misc import natural_key

from vitrim.data.images import Images, decode
from vitrim.words.errors import DataError
from vitrim.words.plain import reason

__all__ = ["IMAGENET", "SPLITS", "choose_split", "folder_splits", "open_folder", "tar_ranges"]

SPLITS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation", "eval"),
    "test": ("test", "testing"),
}
IMAGENET = 1000
_TAR_END = 1024


@dataclasses.dataclass(frozen=True)
class _Files:
    paths: tuple[str, ...]

    def __call__(self, index: int) -> Image.Image:
        path = Path(self.paths[index])
        try:
            data = path.read_bytes()
        except OSError as problem:
            raise DataError(f"{path}: every image must be readable, but {reason(problem)}") from None
        return decode(data, str(path))


@dataclasses.dataclass(frozen=True)
class _Members:
    """Pictures in a tar, by byte range: no open file is shared, so workers may fork at any moment."""

    tar: str
    names: tuple[str, ...]
    ranges: tuple[tuple[int, int], ...]

    def __call__(self, index: int) -> Image.Image:
        start, size = self.ranges[index]
        try:
            with Path(self.tar).open("rb") as stream:
                stream.seek(start)
                data = stream.read(size)
        except OSError as problem:
            raise DataError(f"{self.tar}: the tar must be readable, but {reason(problem)}") from None
        return decode(data, f"{self.tar}:{self.names[index]}")


@dataclasses.dataclass(frozen=True)
class _Listing:
    """The pictures of a folder or tar: `paths` relative to it, and the reader that decodes them by place."""

    paths: tuple[PurePosixPath, ...]
    read: _Files | _Members
    empty: tuple[str, ...]


def folder_splits(source: str) -> tuple[str, ...]:
    """Return the splits that a folder or tar is divided into (`train validation test`), or none.

    Raises:
        DataError: the source is damaged or has no image.
    """
    listing = _list(source)
    return _splits(listing.paths)


def open_folder(
    source: str,
    split: str | None,
    *,
    class_map: str | Mapping[str, int] = "",
    classes: int | None = None,
) -> Images:
    """Open a folder or a tar of class folders.

    Args:
        source: path of the folder or `.tar`.
        split: `train`, `validation` or `test` of a divided source; None takes `train` there, else everything. `test`
            falls back on `validation`, as ImageNet is laid out. Any source may serve whole as `train`.
        class_map: text file with one class name a line, or names with their numbers.
        classes: outputs of the model; with 1,000 of them, folders named by ImageNet wnids find their ImageNet label.

    Raises:
        DataError: nothing there, a damaged tar, an empty class, a class outside the map, no such split.
    """
    listing = _list(source)
    divided = _splits(listing.paths)
    wanted = choose_split(source, divided, split)
    labels, names, count = _label(source, listing, divided, class_map, classes)
    index = None
    if wanted is not None:
        inside = [place for place, path in enumerate(listing.paths) if path.parts[0].lower() in SPLITS[wanted]]
        index = np.asarray(inside, dtype=np.int64)
    return Images(listing.read, labels, classes=count, names=names, source=source, split=wanted, index=index)


def _list(source: str) -> _Listing:
    root = Path(source)
    listing = _list_tar(root) if root.is_file() else _list_folder(root)
    if not listing.paths:
        kinds = " ".join(get_img_extensions())
        raise DataError(f"{source}: a source must have at least one image ({kinds}), but has none")
    return listing


def _list_folder(root: Path) -> _Listing:
    try:
        reader: Any = create_dataset("", root=str(root), search_split=False).reader
    except RuntimeError:  # timm found no image
        return _Listing((), _Files(()), ())
    paths = tuple(str(path) for path, _ in reader.samples)
    relative = tuple(PurePosixPath(Path(path).relative_to(root).as_posix()) for path in paths)
    return _Listing(relative, _Files(paths), _empty_folders(root, relative))


def _empty_folders(root: Path, paths: tuple[PurePosixPath, ...]) -> tuple[str, ...]:
    filled = {str(parent) for path in {path.parent for path in paths} for parent in (path, *path.parents)}
    empty = []
    for place, folders, _ in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        relative = Path(place).relative_to(root).as_posix()
        if not folders and relative not in filled:
            empty.append(relative)
    return tuple(sorted(empty))


def _list_tar(root: Path) -> _Listing:
    members = _members(root)
    if not any(Path(name).suffix.lower() in get_img_extensions() for name, _ in members) and not any(
        name.endswith(".tar") for name, _ in members
    ):
        return _Listing((), _Members(str(root), (), ()), ())
    reader: Any = create_dataset("", root=str(root), search_split=False).reader
    names, ranges = [], []
    for info, _, child in reader.samples:
        prefix = "" if child is None else str(PurePosixPath(child.name).with_suffix("")) + "/"
        names.append(str(PurePosixPath(prefix + info.path)))
        ranges.append((info.offset_data + (0 if child is None else child.offset_data), info.size))
    paths = tuple(PurePosixPath(name) for name in names)
    filled = {str(parent) for path in paths for parent in path.parents}
    folders = {str(PurePosixPath(name)) for name, is_folder in members if is_folder}
    inner = {str(parent) for name in folders for parent in PurePosixPath(name).parents}
    empty = tuple(sorted(folders - filled - inner))
    return _Listing(paths, _Members(str(root), tuple(names), tuple(ranges)), empty)


def tar_ranges(root: Path) -> dict[str, tuple[int, int]]:
    """Start and size in bytes of each file of an uncompressed tar, by its name.

    Raises:
        DataError: the file is no tar, or damaged.
    """
    _members(root)
    with tarfile.open(root, "r:") as tar:
        files = [info for info in tar if info.isfile()]
        return {PurePosixPath(info.path).as_posix(): (info.offset_data, info.size) for info in files}


def _members(root: Path) -> list[tuple[str, bool]]:
    """Name of each member and whether it is a folder; a damaged tar is an error here, not at picture 40,000."""
    if root.suffix.lower() != ".tar":
        raise DataError(f"{root}: data must be a folder or an uncompressed .tar, but this file is neither")
    try:
        with tarfile.open(root, "r:") as tar:
            members = [(info.path, info.isdir(), info.offset_data + info.size) for info in tar]
    except (tarfile.TarError, EOFError, OSError) as problem:
        raise DataError(f"{root}: the tar must be whole, but {problem}; fetch it again") from None
    size = root.stat().st_size
    with root.open("rb") as stream:
        stream.seek(max(0, size - _TAR_END))
        ended = not any(stream.read())
    if any(end > size for _, _, end in members) or not ended:
        raise DataError(f"{root}: the tar must be whole, but it ends before its end mark; fetch it again")
    return [(name, is_folder) for name, is_folder, _ in members]


def _splits(paths: tuple[PurePosixPath, ...]) -> tuple[str, ...]:
    first = {path.parts[0].lower() if len(path.parts) > 1 else "" for path in paths}
    known = {name: split for split, names in SPLITS.items() for name in names}
    # A class may be called "train": a source is divided only if every folder of it is a split.
    if not first <= known.keys():
        return ()
    return tuple(split for split in SPLITS if split in {known[name] for name in first})


def choose_split(source: str, divided: tuple[str, ...], split: str | None) -> str | None:
    """The split that is meant, of those that a source is divided into; None for all of an undivided one.

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


def _label(
    source: str,
    listing: _Listing,
    divided: tuple[str, ...],
    class_map: str | Mapping[str, int],
    classes: int | None,
) -> tuple[np.ndarray[Any, Any], tuple[str, ...] | None, int]:
    bare = 2 if divided else 1
    flat = [path for path in listing.paths if len(path.parts) <= bare]
    if len(flat) == len(listing.paths):
        return np.full(len(flat), -1), None, 0
    if flat:
        raise DataError(f"{source}: every image must lie in a class folder, but '{flat[0]}' does not")
    if listing.empty:
        raise DataError(f"{source}: every class folder must hold an image, but '{listing.empty[0]}' is empty")
    leaves = [path.parent.name for path in listing.paths]
    mapping = _mapping(source, sorted(set(leaves), key=natural_key), class_map, classes)
    names: list[str] = [""] * (max(mapping.values()) + 1)
    for name, number in mapping.items():
        names[number] = name
    return np.asarray([mapping[leaf] for leaf in leaves]), tuple(names), len(names)


def _mapping(
    source: str, found: list[str], class_map: str | Mapping[str, int], classes: int | None
) -> Mapping[str, int]:
    if not class_map:
        imagenet = ImageNetInfo("imagenet-1k").label_names() if classes == IMAGENET else []
        known = set(imagenet)
        chosen = imagenet if known and known.issuperset(found) else found
        return {name: number for number, name in enumerate(chosen)}
    mapping = _read_map(source, class_map) if isinstance(class_map, str) else class_map
    unknown = [name for name in found if name not in mapping]
    if unknown:
        raise DataError(f"{source}: every class must be in the class map, but '{unknown[0]}' is not")
    return mapping


def _read_map(source: str, class_map: str) -> Mapping[str, int]:
    path = Path(class_map)
    if not path.exists() and not (Path(source) / class_map).exists():
        raise DataError(f"{class_map}: the class map must exist, but it does not")
    if path.suffix.lower() != ".txt":
        raise DataError(f"{class_map}: a class map must be a .txt with one class name a line, but has another ending")
    mapping: dict[str, int] = load_class_map(class_map, source)
    if not mapping:
        raise DataError(f"{class_map}: a class map must name at least one class, but is empty")
    return mapping
