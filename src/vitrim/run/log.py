"""Append records to the log of a run, as lines of JSON."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vitrim.words.plain import write_text
from vitrim.words.private import hide_passwords

__all__ = ["logger"]


def logger(path: Path | None) -> Callable[[Mapping[str, Any]], None] | None:
    """Return a function that appends records to `path`.

    A run that was killed may have left half a line, and repeats the records after its last checkpoint; the first record
    of each stage removes both.
    """
    if path is None:
        return None
    known: set[Any] = set()

    def write(record: Mapping[str, Any]) -> None:
        if record.get("stage") not in known:
            known.add(record.get("stage"))
            _rewind(path, record)
        with path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(hide_passwords(dict(record))) + "\n")

    return write


def _rewind(path: Path, record: Mapping[str, Any]) -> None:
    """Remove from a log the records that will be repeated from `record` on, and a broken last line."""
    before = path.read_text(encoding="utf-8") if path.is_file() else ""
    kept = []
    for line in before.splitlines(keepends=True):
        try:
            known = json.loads(line) if line.endswith("\n") else None
        except (ValueError, RecursionError):
            continue
        again = isinstance(known, dict) and known.get("stage") == record.get("stage")
        if known is not None and not (again and known.get("step", 0) >= record.get("step", 0)):
            kept.append(line)
    if "".join(kept) != before:
        write_text(path, "".join(kept))
