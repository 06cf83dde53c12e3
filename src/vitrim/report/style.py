"""The style sheet of the page, which is ``templates/page.css``."""

from pathlib import Path

__all__ = ["STYLE"]

STYLE = (Path(__file__).parent / "templates" / "page.css").read_text(encoding="utf-8")
