"""Hooks of the documentation site: its pages are found because they exist, and links to files outside it stay text."""

import os
import re
from pathlib import Path
from typing import Any

FIRST = ("index.md", "data.md", "loader.md", "deployment.md", "latency.md")
LAST = ("adding.md", "api.md", "architecture.md", "results.md", "models.md", "versions.md")
METHODS = "methods"
OURS = ("spvit", "mdc", "vit_slim", "cait", "post_training")
"""Methods that lead; any other page of the folder follows in the order of the alphabet."""

_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s#]+)(#[^)]*)?\)")


def nav(docs: Path) -> list[Any]:
    """All pages below `docs`: the tour, methods, whatever else there is, and reference last."""
    pages = sorted(path.relative_to(docs).as_posix() for path in docs.rglob("*.md"))
    methods = [page for page in pages if page.startswith(f"{METHODS}/")]
    methods.sort(key=lambda page: (OURS.index(name) if (name := Path(page).stem) in OURS else len(OURS), page))
    rest = [page for page in pages if page not in (*FIRST, *LAST, *methods)]
    first, last = ([page for page in some if page in pages] for some in (FIRST, LAST))
    return [*first, *([{"Methods": methods}] if methods else []), *rest, *last]


def inside(markdown: str, page: Path, docs: Path) -> str:
    """`markdown` with links to files outside `docs` turned into text and the file's path."""

    def kept(link: re.Match[str]) -> str:
        words, target = link[1], link[2]
        if "://" in target or target.startswith(("mailto:", "/")):
            return link[0]
        path = Path(os.path.normpath(page.parent / target))
        if path.is_relative_to(docs):
            return link[0]
        name = os.path.relpath(path, docs.parent)
        return f"`{name}`" if name in words else f"{words} (`{name}`)"

    return _LINK.sub(kept, markdown)


def on_config(config: Any) -> Any:
    """Called by MkDocs: fill in the navigation."""
    config.nav = nav(Path(config.docs_dir))
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Called by MkDocs for each page."""
    return inside(markdown, Path(page.file.abs_src_path), Path(config.docs_dir))
