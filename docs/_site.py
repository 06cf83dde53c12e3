"""Hooks of the documentation site: grouped navigation, pictures of `benchmarks/`, and links to files outside of it."""

import os
import re
from pathlib import Path
from typing import Any

GROUPS = {
    "Start": ("index.md", "data.md", "checkpoints.md", "huggingface.md", "recipes.md", "loader.md", "expectations.md"),
    "Methods": ("spvit", "mdc", "vit_slim", "cait", "post_training"),
    "Deploy": ("deployment.md", "gpu.md", "latency.md", "many_gpus.md"),
    "Measured": ("results.md", "reliability.md"),
    "More": (),
    "Extend": ("adding.md", "architecture.md", "formats.md"),
    "Reference": ("api.md", "models.md", "logs.md", "versions.md"),
}
"""Pages of each group in order; methods by name. A method that is missing here follows, another page is in "More"."""

METHODS = "methods"
PICTURES = "benchmarks"
"""Folder beside `docs` whose SVG files the site shows."""

_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)]*)?\)")


def nav(docs: Path) -> list[Any]:
    """Return the groups of pages below `docs`; groups without a page are left out."""
    pages = sorted(path.relative_to(docs).as_posix() for path in docs.rglob("*.md"))
    methods = [page for page in pages if page.startswith(f"{METHODS}/")]
    order = GROUPS["Methods"]
    methods.sort(key=lambda page: (order.index(name) if (name := Path(page).stem) in order else len(order), page))
    known = {page for group in GROUPS.values() for page in group} | set(methods)
    found = {group: [page for page in listed if page in pages] for group, listed in GROUPS.items()}
    found |= {"Methods": methods, "More": [page for page in pages if page not in known]}
    named = {
        group: [{"Overview": page} if page == "index.md" else page for page in listed]
        for group, listed in found.items()
    }
    return [{group: listed} for group, listed in named.items() if listed]


def inside(markdown: str, page: Path, docs: Path) -> str:
    """Return `markdown` without links to files outside `docs`: they become text with the path of the file.

    Pictures of `benchmarks` are part of the site, so links to them are rewritten instead.
    """

    def kept(link: re.Match[str]) -> str:
        shown, words, target = link[1], link[2], link[3]
        if "://" in target or target.startswith(("mailto:", "/")):
            return link[0]
        path = Path(os.path.normpath(page.parent / target))
        if path.is_relative_to(docs):
            return link[0]
        name = Path(os.path.relpath(path, docs.parent)).as_posix()
        if shown:
            return f"![{words}]({Path(os.path.relpath(docs / name, page.parent)).as_posix()})"
        return f"`{name}`" if name in words else f"{words} (`{name}`)"

    return _LINK.sub(kept, markdown)


def on_config(config: Any) -> Any:
    """Fill in the navigation; called by MkDocs."""
    config.nav = nav(Path(config.docs_dir))
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pictures of `benchmarks`; called by MkDocs."""
    from mkdocs.structure.files import File

    for path in sorted((Path(config.docs_dir).parent / PICTURES).glob("*.svg")):
        files.append(File.generated(config, f"{PICTURES}/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite links; called by MkDocs for each page."""
    return inside(markdown, Path(page.file.abs_src_path), Path(config.docs_dir))
