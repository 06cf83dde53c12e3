"""Run folders to one self-contained page or to Markdown, and a plan to rows; no torch."""

from collections.abc import Sequence
from typing import Any

from vitrim.report.blocks import Row, sheet, total
from vitrim.report.page import html, markdown
from vitrim.report.tables import Table, plan_table, result

__all__ = ["Row", "Table", "frontier", "html", "markdown", "plan_table", "result", "sheet", "total"]


def frontier(records: Sequence[dict[str, Any]]) -> str:
    """See `vitrim.report.frontier.frontier`; matplotlib is loaded only here."""
    from vitrim.report.frontier import frontier as draw

    return draw(records)
