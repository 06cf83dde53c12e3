"""Names of files and classes: sort orders, and compact storage for millions of names.

P is the number of names.
"""

import re
from array import array
from collections.abc import Iterable

import numpy as np

__all__ = ["ORDERS", "Names", "natural_key", "sort_classes", "tree_key"]

ORDERS = ("plain", "natural")
"""The two orders in which common programs number class folders."""

_DIGITS = re.compile(r"\d+")
# Longest run of digits, in characters, that is compared as a number. A longer run is compared as text.
_LONGEST = 1000


def _number(run: re.Match[str]) -> str:
    text = run[0]
    digits = str(int(text)) if len(text) <= _LONGEST else text
    # The length comes first, so that the texts compare like the numbers. The null character sorts before all others.
    return f"\0{chr(len(digits))}{digits}"


def natural_key(name: str) -> str:
    """Return a sort key that orders names like timm's `natural_key`: runs of digits as numbers, ignoring case.

    One string takes a third of the memory of timm's list of parts, which matters for a folder with a million files.
    """
    return _DIGITS.sub(_number, name.lower())


def tree_key(path: str) -> str:
    """Return a sort key that orders paths as a folder walk does: level by level, each level by `natural_key`.

    Names with equal natural keys (`01` and `1`, `Cat` and `cat`) are sorted by code point.
    """
    *folders, name = path.split("/")
    return "".join(natural_key(f"{folder}/") + folder for folder in folders) + f"{natural_key(name)}\0\0{name}"


def sort_classes(names: Iterable[str], order: str) -> list[str]:
    """Sort class names; the position of a name is its class number.

    Args:
        names: distinct names.
        order: `plain`: by code point, as torchvision, Keras and Hugging Face datasets number class folders;
            `natural`: as timm does.
    """
    plain = sorted(names)
    return sorted(plain, key=natural_key) if order == "natural" else plain


class Names:
    """Many paths in one buffer. Each path takes its characters and 8 bytes, and worker processes share the buffer.

    A list of strings would take 70 bytes more per path. Each worker would also get its own copy, because reference
    counts are written to the pages that hold the strings.
    """

    def __init__(self) -> None:
        self._text = bytearray()
        self._ends = array("q")

    def append(self, name: str) -> None:
        """Add a name at the end."""
        self._text += name.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._text))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        """Return the name at `index` in `[0, P)`."""
        start = self._ends[index - 1] if index else 0
        return bytes(self._text[start : self._ends[index]]).decode("utf-8", "surrogatepass")

    @property
    def nbytes(self) -> int:
        """Memory used by the names, in bytes."""
        return len(self._text) + np.dtype(np.int64).itemsize * len(self._ends)
