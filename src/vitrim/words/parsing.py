"""Read JSON, TOML and text that may come from a stranger: bounded in size, depth and numbers, one sentence if refused.

The parsers of Python follow whatever nesting a text has until their stack ends, and convert numbers of any length. So
sizes are checked first, and depth and numbers before anything else sees the values.
"""

import json
import reprlib
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vitrim.words.errors import VitrimError

__all__ = ["DEEPEST", "parse_json", "parse_toml", "read_regular", "shown", "why_not_plain"]

DEEPEST = 64
"""Levels of tables and lists; a spec has 8."""

LONGEST = 64 * 2**20
"""Bytes of a text; the plan of a model with 40 blocks takes less than 1 MiB."""

LONGEST_TOML = 2**20
"""Bytes of a TOML file, which is written by hand."""

_BITS = 63
_SHOWN = 80

_short = reprlib.Repr()
_short.maxlevel, _short.maxstring, _short.maxother, _short.maxlong = 3, _SHOWN, _SHOWN, 40


def shown(value: Any) -> str:
    """Return a value as text for a sentence, shortened in the middle to about 80 characters."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 8 * _BITS:
        return f"a number of {value.bit_length():,} bits"
    text = _short.repr(value)
    return text if len(text) <= 4 * _SHOWN else f"{text[: 4 * _SHOWN]}..."


def why_not_plain(value: Any) -> str | None:
    """Return why parsed values are not such as vitrim writes, to end a sentence; None if they are."""
    level: list[Any] = [value]
    for _ in range(DEEPEST + 1):
        inner: list[Any] = []
        for each in level:
            # Most values are numbers, tens of thousands in a plan; `Mapping` takes 20 times as long to ask about.
            if isinstance(each, int):
                if each.bit_length() > _BITS:
                    return f"whole numbers must have at most {_BITS} bits, but one has {each.bit_length():,}"
            elif isinstance(each, list | tuple):
                inner += each
            elif isinstance(each, Mapping):
                inner += each.values()
        if not inner:
            return None
        level = inner
    return f"tables and lists must be nested at most {DEEPEST} deep, but are deeper"


def parse_json(text: str, error: type[VitrimError], at: str) -> Any:
    """Return the value of a JSON text.

    Args:
        text: the text.
        error: the class of error to raise.
        at: where the text comes from, for messages.

    Raises:
        error: if it is not JSON, is larger than `LONGEST`, nested too deep, or has numbers of more than 63 bits.
    """
    if len(text) > LONGEST:
        raise error(f"{at}: the text must have at most {LONGEST:,} characters, but has {len(text):,}")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as problem:
        raise error(f"{at}: the file must be JSON, but line {problem.lineno} is not: {problem.msg}") from None
    except RecursionError:
        raise error(f"{at}: {_too_deep()}") from None
    except ValueError:  # Python's bound on the digits of a number
        raise error(f"{at}: whole numbers must have at most {_BITS} bits, but one has thousands of digits") from None
    return _plain(value, error, at)


def parse_toml(text: str, error: type[VitrimError], at: str) -> dict[str, Any]:
    """Return the table of a TOML text; see `parse_json`.

    Raises:
        error: as for `parse_json`.
    """
    try:
        value = tomllib.loads(text)
    except tomllib.TOMLDecodeError as problem:
        raise error(f"{at}: the file must be TOML, but {str(problem)[:200]}") from None
    except RecursionError:
        raise error(f"{at}: {_too_deep()}") from None
    except ValueError:
        raise error(f"{at}: numbers and dates must be valid, but one is not") from None
    return dict(_plain(value, error, at))


def _too_deep() -> str:
    return f"tables and lists must be nested at most {DEEPEST} deep, but are deeper"


def _plain(value: Any, error: type[VitrimError], at: str) -> Any:
    wrong = why_not_plain(value)
    if wrong is not None:
        raise error(f"{at}: {wrong}")
    return value


def read_regular(path: Path, error: type[VitrimError], longest: int = LONGEST) -> str:
    """Return the text of a regular file in UTF-8.

    Raises:
        error: if the file is missing, is a pipe, device or folder (reading one could take forever), is larger than
            `longest` bytes, cannot be read, or is not text.
    """
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise error(f"{path}: the file must be readable, but is a folder, a pipe or a device")
        if about.st_size > longest:
            raise error(f"{path}: the file must have at most {longest:,} bytes, but has {about.st_size:,}")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise error(f"{path}: the file must exist, but it does not") from None
    except UnicodeDecodeError:
        raise error(f"{path}: the file must be readable, but is not text in UTF-8") from None
    except (OSError, ValueError) as problem:  # a name with a null character is a ValueError
        if isinstance(problem, VitrimError):
            raise
        said = getattr(problem, "strerror", None) or str(problem)
        raise error(f"{shown(str(path))}: the file must be readable, but {said.lower()}") from None
