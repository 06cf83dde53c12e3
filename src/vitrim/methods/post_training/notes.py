"""Numbers that a long search has measured, kept in a file, so that a search that was stopped goes on from there."""

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Notes"]


class Notes:
    """Lists of numbers by name, one JSON line each; a line that a killed run left half written is ignored.

    Floats are written so that they are read back to the same bits.

    Args:
        path: the file; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self.path, self.known = path, dict[str, list[Any]]()
        self.broken = False
        if path is None or not path.is_file():
            return
        text = path.read_text(encoding="utf-8")
        self.broken = bool(text) and not text.endswith("\n")
        for line in text.splitlines():
            with contextlib.suppress(ValueError):
                name, values = json.loads(line)
                self.known[name] = values

    def of(self, name: str, made: Callable[[], Sequence[Any]]) -> list[Any]:
        """Return the numbers that are known by `name`, or make and write them."""
        if name not in self.known:
            self.known[name] = list(made())
            if self.path is not None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as lines:
                    lines.write("\n" * self.broken + json.dumps([name, self.known[name]]) + "\n")
                self.broken = False
        return self.known[name]

    def forget(self) -> None:
        """Delete the file, once its numbers are stored elsewhere."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
