"""Reports of run folders as one self-contained page or Markdown, and tables of plans. Does not import torch."""

from collections.abc import Sequence
from typing import Any

from vitrim.report.blocks import Row, sheet, total
from vitrim.report.folder import names_apart
from vitrim.report.page import csv, html, markdown
from vitrim.report.scenes import class_table, segmented
from vitrim.report.tables import TextTable, as_markdown, outcome, plan_table, result, warnings

__all__ = [
    "Row",
    "TextTable",
    "as_markdown",
    "class_table",
    "csv",
    "curve",
    "html",
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


def curve(records: Sequence[dict[str, Any]]) -> str:
    """Return the score-cost curve of several runs as an SVG file, see `vitrim.report.frontier`; imports matplotlib."""
    from vitrim.report.frontier import frontier as draw

    return draw(records)


def times(lines: Sequence[dict[str, Any]]) -> str:
    """Return the times of a benchmark as an SVG file, see `vitrim.report.bars`; imports matplotlib."""
    from vitrim.report.bars import bars

    return bars(lines)
