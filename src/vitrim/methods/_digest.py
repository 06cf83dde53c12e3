"""Digest of the source of a class: a run resumes only with the method that it began with."""

import hashlib
import inspect
import sys
import types
from collections.abc import Iterator
from pathlib import Path

__all__ = ["digest_of", "files_of"]

_OTHERS = frozenset(sys.stdlib_module_names) | {"vitrim", "pydantic", "typing_extensions"}
"""Packages whose classes are not part of a method's own source."""


def digest_of(kind: type, *more: Path) -> str:
    """Return ``sha256:`` and the digest of the files that define `kind` and the classes that it derives from.

    For one file it is the SHA-256 of its bytes, as ``sha256sum`` prints it; for several, the SHA-256 of their digests.
    For a class without a file, such as one of a notebook, the bytecode of its functions is hashed. Files of vitrim and
    modules that are only imported do not count.

    Args:
        kind: the class.
        more: further files to include.
    """
    files, codes = set(more), list[str]()
    for base in kind.__mro__:
        if base.__module__.partition(".")[0] in _OTHERS:
            continue
        file = getattr(sys.modules.get(base.__module__), "__file__", None)
        if file is not None and Path(file).is_file():
            files |= set(files_of(Path(file).resolve()))
        else:
            codes += _functions(base)
    parts = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)]
    if codes:
        parts.append(hashlib.sha256("\n".join(codes).encode()).hexdigest())
    return f"sha256:{parts[0] if len(parts) == 1 else hashlib.sha256(' '.join(parts).encode()).hexdigest()}"


def files_of(file: Path) -> list[Path]:
    """Return the Python files of a module: its own, or all below the folder of a package."""
    return sorted(file.parent.rglob("*.py")) if file.name == "__init__.py" else [file]


def _functions(kind: type) -> Iterator[str]:
    for name, value in sorted(vars(kind).items()):
        function = getattr(value, "wrapped", value)  # a validator of pydantic
        function = getattr(function, "fget", None) or getattr(function, "__func__", function)
        code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
        if isinstance(code, types.CodeType):
            yield name
            yield from _told(code)


def _told(code: types.CodeType) -> Iterator[str]:
    """Yield the code of a function without its position in the file; `marshal` may not encode equal constants alike."""
    yield f"{code.co_code.hex()} {code.co_names} {code.co_varnames}"
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _told(constant)
        else:
            yield repr(sorted(constant, key=repr) if isinstance(constant, frozenset) else constant)
