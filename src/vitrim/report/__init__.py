"""Reports of run folders as one self-contained page or Markdown, and tables of plans. Does not import torch."""

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vitrim.report.blocks import Row, sheet, total
from vitrim.report.folder import check_same_images, names_apart
from vitrim.report.tables import TextTable, as_markdown, classes_of, outcome, plan_table, result, warnings

if TYPE_CHECKING:
    from vitrim.report.page import csv, groups_csv, html, latex, markdown
    from vitrim.report.scenes import class_table, segmented

__all__ = [
    "Row",
    "TextTable",
    "as_markdown",
    "check_same_images",
    "class_table",
    "classes_of",
    "csv",
    "curve",
    "groups_csv",
    "html",
    "latex",
    "markdown",
    "names_apart",
    "outcome",
    "plan_table",
    "result",
    "segmented",
    "sheet",
    "times",
    "total",
    "warnings",
]

# `vitrim explain` needs none of these, and starts 15 to 20 ms earlier without them.
_LATER = dict.fromkeys(("csv", "groups_csv", "html", "latex", "markdown"), "page")
_LATER |= dict.fromkeys(("class_table", "segmented"), "scenes")


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)


def curve(records: Sequence[dict[str, Any]]) -> str:
    """Return the score-cost curve of several runs as an SVG file, see `vitrim.report.frontier`; imports matplotlib."""
    from vitrim.report.frontier import frontier as draw

    return draw(records)


def times(lines: Sequence[dict[str, Any]]) -> str:
    """Return the times of a benchmark as an SVG file, see `vitrim.report.bars`; imports matplotlib."""
    from vitrim.report.bars import bars

    return bars(lines)
