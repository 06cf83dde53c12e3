"""Names of files and classes: how they are sorted, and a million of them in little memory.

P names.
"""

import re
from array import array
from collections.abc import Iterable

import numpy as np

__all__ = ["ORDERS", "Names", "natural_key", "sort_classes", "tree_key"]

ORDERS = ("plain", "natural")
"""Both ways in which programs number class folders."""

_DIGITS = re.compile(r"\d+")
# Characters that a run of digits may have; a longer one is compared as text.
_LONGEST = 1000


def _number(run: re.Match[str]) -> str:
    text = run[0]
    digits = str(int(text)) if len(text) <= _LONGEST else text
    # The length first, so that text compares as the numbers do; below every character that a name may hold.
    return f"\0{chr(len(digits))}{digits}"


def natural_key(name: str) -> str:
    """A text by which names sort as timm's `natural_key` sorts them: runs of digits as numbers, without regard to case.

    One string takes a third of the memory of timm's list of pieces, which counts where a folder holds a million files.
    """
    return _DIGITS.sub(_number, name.lower())


def tree_key(path: str) -> str:
    """A text by which whole paths sort as a folder is walked: level by level, each as `natural_key` says.

    Names that are equal to it (`01` and `1`, `Cat` and `cat`) are sorted plainly.
    """
    *folders, name = path.split("/")
    return "".join(natural_key(f"{folder}/") + folder for folder in folders) + f"{natural_key(name)}\0\0{name}"


def sort_classes(names: Iterable[str], order: str) -> list[str]:
    """Sort names of classes, whose places are their numbers.

    Args:
        names: different names.
        order: `plain`: by code point, as torchvision, Keras and Hugging Face datasets number class folders;
            `natural`: as timm does.
    """
    plain = sorted(names)
    return sorted(plain, key=natural_key) if order == "natural" else plain


class Names:
    """Many paths in one text: a million take their characters and 8 bytes each, and worker processes share them.

    A list of strings would take 70 bytes more for each, and each worker a copy of its own as soon as it counts
    references.
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
        """The name of a number in `[0, P)`."""
        start = self._ends[index - 1] if index else 0
        return bytes(self._text[start : self._ends[index]]).decode("utf-8", "surrogatepass")

    @property
    def nbytes(self) -> int:
        """Bytes that the names take."""
        return len(self._text) + np.dtype(np.int64).itemsize * len(self._ends)
