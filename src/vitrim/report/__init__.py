"""Run folders to one self-contained page or to Markdown, and a plan to rows; no torch."""

from collections.abc import Sequence
from typing import Any

from vitrim.report.blocks import Row, sheet, total
from vitrim.report.page import html, markdown
from vitrim.report.scenes import class_table, segmented
from vitrim.report.tables import Table, plan_table, result

__all__ = [
    "Row",
    "Table",
    "class_table",
    "curve",
    "html",
    "markdown",
    "plan_table",
    "result",
    "segmented",
    "sheet",
    "total",
]


def curve(records: Sequence[dict[str, Any]]) -> str:
    """The curve of several runs as an SVG file, see `vitrim.report.frontier`; matplotlib is loaded only here."""
    from vitrim.report.frontier import frontier as draw

    return draw(records)
