"""List the files of an uncompressed tar by byte range, reading only its headers.

Nothing is extracted. A tar is read once from header to header. Only the names and byte ranges of the images are kept in
memory, regardless of the sizes that headers claim and of the number of other members.
"""

import dataclasses
import io
import os
import tarfile
from array import array
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitrim.data.decode import decode, is_image, why_not_whole
from vitrim.data.leftout import LeftOut
from vitrim.data.listing import HIDDEN, Listing, Maker, is_hidden, why_left_out
from vitrim.data.names import Names, tree_key
from vitrim.words.errors import DataError
from vitrim.words.plain import reason

__all__ = ["TarImages", "file_ranges", "list_tar", "read_range"]

_END = 1024
# Limit for long names and pax headers, which are read into memory whole. In real archives they take some hundred bytes.
_HEADER_BYTES = 2**20
_LONGEST_NAME = 1024
_Range = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class TarImages:
    """Decodes the images of a tar by byte range. No open file is shared, so workers may fork at any time.

    Attributes:
        tar: path of the tar.
        names: paths of the images in the tar.
        ranges: start and size of each in bytes, int64 `(P, 2)`.
    """

    tar: str
    names: Names
    ranges: NDArray[np.int64]

    def __call__(self, index: int) -> Image.Image:
        """Decode the image at an index in `[0, P)`.

        Raises:
            DataError: the image is damaged, or the tar cannot be read.
        """
        start, size = (int(value) for value in self.ranges[index])
        return decode(read_range(self.tar, start, size), f"{self.tar}:{self.names[index]}")


def read_range(tar: str, start: int, size: int) -> bytes:
    """Read `size` bytes of a file from offset `start`.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with Path(tar).open("rb") as stream:
            stream.seek(start)
            return stream.read(size)
    except OSError as problem:
        raise DataError(f"{tar}: the tar must be readable, but {reason(problem)}") from None


class _Part(io.RawIOBase):
    """A byte range of an open file as a file object. A read of more than `_HEADER_BYTES` raises."""

    def __init__(self, stream: Any, start: int, size: int) -> None:
        self._stream, self._start, self._size, self._at = stream, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._at)
        wanted = left if size < 0 else min(size, left)
        if wanted > _HEADER_BYTES:
            raise tarfile.ReadError(f"a header claims {size:,} bytes")
        self._stream.seek(self._start + self._at)
        data: bytes = self._stream.read(wanted)
        self._at += len(data)
        return data


def _members(root: Path, start: int = 0, size: int | None = None) -> Iterator[tarfile.TarInfo]:
    """Yield each member of a tar, or of the tar at offset `start` in another; `offset_data` counts from the file start.

    Raises:
        DataError: the tar is damaged or ends early. The check is here so that it does not fail at image 40,000.
    """
    size = root.stat().st_size - start if size is None else size
    try:
        with root.open("rb") as stream, tarfile.open(fileobj=_Part(stream, start, size), mode="r:") as tar:
            while (info := tar.next()) is not None:
                if info.offset_data + info.size > size and info.isreg() and not info.issparse():
                    raise tarfile.ReadError(f"'{_short(info.path)}' ends after the end of the file")
                info.offset_data += start
                yield info
                tar.members.clear()  # type: ignore[attr-defined] # tarfile keeps each member, 1.5 kB of it
        with root.open("rb") as stream:
            stream.seek(start + max(0, size - _END))
            if any(stream.read(min(_END, size))):
                raise tarfile.ReadError("it ends before its end mark")
    # A pax header may claim a size that is not a number, or that is larger than the system can seek to.
    except (tarfile.TarError, EOFError, OSError, ValueError, OverflowError) as problem:
        raise DataError(f"{root}: the tar must be whole, but {reason(problem)}; fetch it again") from None


def _short(name: str) -> str:
    return name if len(name) <= 80 else f"{name[:77]}..."


def _check_tar(root: Path) -> None:
    if root.suffix.lower() != ".tar":
        raise DataError(f"{root}: data must be a folder or an uncompressed .tar, but this file is neither")


def file_ranges(root: Path) -> dict[str, tuple[int, int]]:
    """Return start and size in bytes of each regular file of an uncompressed tar, by name.

    If a name occurs more than once, the last file counts.

    Raises:
        DataError: the file is not a tar, or is damaged.
    """
    _check_tar(root)
    return {
        PurePosixPath(info.path).as_posix(): (info.offset_data, info.size)
        for info in _members(root)
        if info.isreg() and not info.issparse()
    }


class _Found:
    """The members of a tar by kind: images by name, folders, and files that are left out."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images: dict[str, _Range] = {}
        self.folders: set[str] = set()
        self.others: dict[str, int] = {}
        self.left_out = LeftOut()

    def add(self, info: tarfile.TarInfo, prefix: str, nested: bool) -> None:
        name = prefix + PurePosixPath(info.path).as_posix().lstrip("/")
        if len(name) > _LONGEST_NAME:
            self.left_out.add(f"members whose names have more than {_LONGEST_NAME:,} characters", name)
        elif any(is_hidden(part) for part in name.split("/") if part != ".."):
            # A hidden folder is reported through the files in it.
            if not info.isdir():
                self.left_out.add(HIDDEN, name)
        elif info.isdir():
            if name != ".":
                self.folders.add(name)
        elif info.islnk():
            self._link(info, name, prefix)
        elif info.issym():
            self._leave("links", name)
        elif not info.isreg():
            self._leave("pipes, sockets or devices", name)
        elif info.issparse():
            self._leave("sparse files", name)
        else:
            self._file(info, name, nested)

    def _link(self, info: tarfile.TarInfo, name: str, prefix: str) -> None:
        """Handle a hard link, which is another name of an earlier file."""
        target = self.images.get(prefix + PurePosixPath(info.linkname).as_posix())
        if target is None or not is_image(name):
            self._leave("links", name)
        else:
            self._image(name, target)

    def _file(self, info: tarfile.TarInfo, name: str, nested: bool) -> None:
        if name.lower().endswith(".tar") and not nested:
            for inner in _members(self.root, info.offset_data, info.size):
                self.add(inner, f"{name[:-4]}/", nested=True)
            return
        if not is_image(name):
            left, kind = why_left_out(name)
            self._leave(left, name, kind)
            return
        why = why_not_whole(info.size)
        if why is not None:
            raise DataError(f"{self.root}:{_short(name)}: every image must be readable, but {why}; remove it")
        self._image(name, (info.offset_data, info.size))

    def _image(self, name: str, place: _Range) -> None:
        if name in self.images:
            self.left_out.add("members that a later member of the same name replaces", name)
        self.images[name] = place

    def _leave(self, why: str, name: str, kind: str = "") -> None:
        self.left_out.add(why, name, kind)
        folder = name.rpartition("/")[0]
        self.others[folder] = self.others.get(folder, 0) + 1


def list_tar(root: Path) -> Listing:
    """List the images of an uncompressed tar in folder order; tars inside it are read as folders, one level deep.

    Raises:
        DataError: the file is not a tar, is damaged, or contains an image of more than 1 GiB.
    """
    _check_tar(root)
    found = _Found(root)
    for info in _members(root):
        found.add(info, "", nested=False)
    maker, ranges = Maker(), array("q")
    maker.left_out = found.left_out
    for name in sorted(found.images, key=tree_key):
        folder, _, file = name.rpartition("/")
        maker.add(folder, file)
        ranges.extend(found.images[name])
    maker.empty = _empty(found)
    places = np.frombuffer(ranges, dtype=np.int64).reshape(-1, 2) if ranges else np.zeros((0, 2), dtype=np.int64)
    return maker.listing(TarImages(str(root), maker.names, places))


def _empty(found: _Found) -> dict[str, int]:
    """Return the folders that contain no image and no other folder, with the number of their files."""
    filled = {folder for name in found.images for folder in _above(name)}
    folders = found.folders | set(found.others)
    inner = {folder for name in folders for folder in _above(name)}
    return {name: found.others.get(name, 0) for name in sorted(folders - filled - inner) if name}


def _above(name: str) -> Iterator[str]:
    while name := name.rpartition("/")[0]:
        yield name
