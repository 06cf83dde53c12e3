"""Walk a folder once and list the images below it.

Links to folders are followed, and each real folder is read once. A link to a parent folder, or to a folder that is
already part of the source, is skipped. Files that are not images are counted by reason. P is the number of images, F
the number of folders that contain images.
"""

import dataclasses
import os
import stat
from array import array
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitrim.data.decode import IMAGE_ENDINGS, decode, ending, is_image, read_whole
from vitrim.data.leftout import LeftOut
from vitrim.data.names import Names, natural_key
from vitrim.words.errors import DataError
from vitrim.words.plain import reason

__all__ = ["Listing", "Maker", "is_hidden", "list_folder", "why_left_out"]

_SERVICE = frozenset({"__macosx", "__pycache__", "@eadir", "$recycle.bin", "system volume information", "lost+found"})
_DEEPEST = 32

HIDDEN = "hidden or service files and folders"


@dataclasses.dataclass(frozen=True, eq=False)
class Listing:
    """The images of a folder or tar, in a fixed order.

    Attributes:
        names: paths of the images relative to the source, separated by "/", `(P,)`.
        folders: paths of the folders that contain images, in order of their first image, `(F,)`; "" is the source
            itself.
        folder: number of the folder of each image, int32 `(P,)`.
        read: function that decodes the image at an index in `[0, P)`.
        empty: paths of the folders without subfolders and without images, with the number of files in them.
        left_out: files and folders that are not read.
    """

    names: Names
    folders: tuple[str, ...]
    folder: NDArray[np.int32]
    read: Callable[[int], Image.Image]
    empty: dict[str, int]
    left_out: LeftOut


class Maker:
    """Builds a listing image by image, folder by folder."""

    def __init__(self) -> None:
        self.names = Names()
        self.left_out = LeftOut()
        self.empty: dict[str, int] = {}
        self._folders: dict[str, int] = {}
        self._folder = array("i")

    def add(self, folder: str, name: str) -> None:
        """Add the image `name` of `folder`."""
        self.names.append(f"{folder}/{name}" if folder else name)
        self._folder.append(self._folders.setdefault(folder, len(self._folders)))

    def listing(self, read: Callable[[int], Image.Image]) -> Listing:
        """Return the listing of all images added so far."""
        folder = np.frombuffer(self._folder, dtype=np.int32) if self._folder else np.zeros(0, dtype=np.int32)
        return Listing(self.names, tuple(self._folders), folder, read, self.empty, self.left_out)


def is_hidden(name: str) -> bool:
    """Whether a name is hidden or is a service file or folder: `.ipynb_checkpoints`, `._x.png`, `__MACOSX`."""
    return name.startswith(".") or name.lower() in _SERVICE


def why_left_out(name: str) -> tuple[str, str]:
    """Return why a regular file that is not read as an image is left out, and its file extension."""
    kind = ending(name)
    if kind in IMAGE_ENDINGS:
        return "images that this Pillow cannot read", kind
    return "files that are no images by their names", kind or "no ending"


@dataclasses.dataclass(frozen=True)
class _Files:
    root: str
    names: Names

    def __call__(self, index: int) -> Image.Image:
        path = Path(self.root, self.names[index])
        return decode(read_whole(path), str(path))


def list_folder(root: Path) -> Listing:
    """List the images below a folder, each folder sorted as timm sorts it.

    Raises:
        DataError: a folder cannot be read, or folders are nested more than 32 deep.
    """
    walk = _Walk(str(root))
    walk.folder("", os.path.realpath(root), 0)
    return walk.maker.listing(_Files(str(root), walk.maker.names))


class _Walk:
    def __init__(self, root: str) -> None:
        self.root = root
        self.real = os.path.realpath(root)
        self.maker = Maker()
        self.seen: set[tuple[int, int]] = set()

    def folder(self, at: str, real: str, depth: int) -> bool:
        """List the folder `at`, whose path without links is `real`; return whether it contains an image."""
        path = os.path.join(self.root, at)  # noqa: PTH118
        if depth > _DEEPEST:
            raise DataError(
                f"{path}: folders must be nested at most {_DEEPEST} deep, but are deeper; name one further in"
            )
        files, folders, others = self._entries(at, path, real)
        found = bool(files)
        # Files and folders are sorted together: `a.png`, `b/`, `c.png`.
        entries: list[tuple[str, str, str | None]] = [(natural_key(name), name, None) for name in files]
        entries += [(natural_key(f"{name}/"), name, inside) for name, inside in folders.items()]
        del files
        entries.sort()
        for _, name, inside in entries:
            if inside is None:
                self.maker.add(at, name)
            else:
                found |= self.folder(f"{at}/{name}" if at else name, inside, depth + 1)
        if not found and not folders:
            self.maker.empty[at] = others
        return found

    def _entries(self, at: str, path: str, real: str) -> tuple[list[str], dict[str, str], int]:
        """Return the images of a folder, its subfolders with their real paths, and the number of other files."""
        files: list[str] = []
        folders: dict[str, str] = {}
        others = 0
        try:
            here = Path(path).stat()
            self.seen.add((here.st_dev, here.st_ino))
            with os.scandir(path) as entries:
                for entry in entries:
                    if is_hidden(entry.name):
                        self._leave(HIDDEN, at, entry.name)
                    elif entry.is_dir(follow_symlinks=False):
                        self._take(folders, at, entry, os.path.join(real, entry.name), linked=False)  # noqa: PTH118
                    elif entry.is_file(follow_symlinks=False):
                        others += self._file(files, at, entry.name)
                    else:
                        others += self._other(files, folders, at, real, entry)
        except OSError as problem:
            raise DataError(f"{path}: every folder must be readable, but {reason(problem)}") from None
        return files, folders, others

    def _file(self, files: list[str], at: str, name: str) -> int:
        if is_image(name):
            files.append(name)
            return 0
        why, kind = why_left_out(name)
        self._leave(why, at, name, kind)
        return 1

    def _take(self, folders: dict[str, str], at: str, entry: os.DirEntry[str], real: str, *, linked: bool) -> None:
        about = entry.stat()
        if (about.st_dev, about.st_ino) in self.seen:
            self._leave(
                "links to folders that are read anyway" if linked else "folders that a link led to before",
                at,
                entry.name,
            )
            return
        folders[entry.name] = real

    def _other(self, files: list[str], folders: dict[str, str], at: str, real: str, entry: os.DirEntry[str]) -> int:
        """Handle a link, or an entry that is neither file nor folder; return 1 if it counts as a skipped file."""
        if entry.is_symlink():
            try:
                about = entry.stat()
            except OSError:  # the target is missing, or the link leads to itself
                self._leave("broken links", at, entry.name)
                return 1
            if stat.S_ISREG(about.st_mode):
                return self._file(files, at, entry.name)
            if stat.S_ISDIR(about.st_mode):
                target = os.path.realpath(entry.path)
                if _within(target, self.real) or _within(self.real, target) or _within(real, target):
                    self._leave("links to folders that are read anyway", at, entry.name)
                else:
                    self._take(folders, at, entry, target, linked=True)
                return 0
        self._leave("pipes, sockets or devices", at, entry.name)
        return 1

    def _leave(self, why: str, at: str, name: str, kind: str = "") -> None:
        self.maker.left_out.add(why, f"{at}/{name}" if at else name, kind)


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")
