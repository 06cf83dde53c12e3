"""Run folders to one self-contained page or to Markdown, and a plan to rows; no torch."""

from vitrim.report.blocks import Row, sheet, total
from vitrim.report.page import html, markdown
from vitrim.report.tables import Table, plan_table, result

__all__ = ["Row", "Table", "html", "markdown", "plan_table", "result", "sheet", "total"]
