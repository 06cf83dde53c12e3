"""Numbers of classes from a class map or from ImageNet's own labels."""

import operator
from collections.abc import Iterable, Mapping
from pathlib import Path

from timm.data import ImageNetInfo

from vitrim.words.errors import DataError
from vitrim.words.plain import reason

__all__ = ["IMAGENET", "check_map", "imagenet_numbers", "read_map"]

IMAGENET = 1000
_MOST_BYTES = 2**24


def imagenet_numbers(names: Iterable[str], classes: int | None) -> dict[str, int] | None:
    """Return ImageNet's class numbers by WordNet id if a model has 1,000 outputs and all names are ids, else None."""
    if classes != IMAGENET:
        return None
    known = {name: number for number, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}
    return known if known.keys() >= set(names) else None


def read_map(source: str, class_map: str | Mapping[str, int]) -> dict[str, int]:
    """Read names and their numbers.

    Args:
        source: second folder in which a relative path is searched, after the working directory.
        class_map: a text file with one class name per line, numbered from 0, UTF-8 with or without a byte order mark;
            lines after the last name may be blank. Or a mapping from names to numbers; several names may share one.

    Raises:
        DataError: there is no such file, a line is blank, a name occurs twice, or a number is not a whole number of at
            least 0.
    """
    return _read(source, class_map) if isinstance(class_map, str) else check_map(class_map)


def check_map(given: Mapping[str, int]) -> dict[str, int]:
    """Return names with their numbers as plain integers.

    Raises:
        DataError: a number is not a whole number of at least 0, or the map is empty.
    """
    found = {}
    for name, number in given.items():
        try:
            value = -1 if isinstance(number, bool) else operator.index(number)
        except TypeError:
            value = -1
        if value < 0:
            raise DataError(f"class map: '{name}' must have a whole number of at least 0, but has {number!r}")
        found[str(name)] = value
    if not found:
        raise DataError("a class map must name at least one class, but is empty")
    return found


def _read(source: str, class_map: str) -> dict[str, int]:
    path = next((path for path in (Path(class_map), Path(source) / class_map) if _is_file(path)), None)
    if path is None:
        raise DataError(f"{class_map}: the class map must exist and be a file, but it does not")
    if path.suffix.lower() != ".txt":
        raise DataError(
            f"{class_map}: a class map must be a .txt with one class name per line, but has another extension"
        )
    lines = [line.strip() for line in _text(path, class_map).split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise DataError(f"{class_map}: a class map must name at least one class, but is empty")
    if "" in lines:
        raise DataError(
            f"{class_map}: every line of a class map must name a class, but line {lines.index('') + 1} is blank; "
            "remove it, or name the class of that number"
        )
    numbers: dict[str, int] = {}
    for number, name in enumerate(lines):
        if name in numbers:
            raise DataError(
                f"{class_map}: every class must have one line, but '{name}' has lines {numbers[name] + 1} and "
                f"{number + 1}"
            )
        numbers[name] = number
    return numbers


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or contains a null character
        return False


def _text(path: Path, class_map: str) -> str:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise DataError(f"{class_map}: a class map must have at most 16 MiB, but has {path.stat().st_size:,} bytes")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as problem:
        raise DataError(f"{class_map}: a class map must be UTF-8 text, but {problem.reason}") from None
    except OSError as problem:
        raise DataError(f"{class_map}: the class map must be readable, but {reason(problem)}") from None
