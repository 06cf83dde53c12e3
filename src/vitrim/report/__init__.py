"""Run folders to one self-contained page or to Markdown, and a plan to rows; no torch."""

from vitrim.report.blocks import Row, sheet, total
from vitrim.report.page import html, markdown

__all__ = ["Row", "html", "markdown", "sheet", "total"]
