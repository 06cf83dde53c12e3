"""Build the report as one self-contained HTML page, and its tables as Markdown or CSV."""

import functools
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from vitrim.report import scenes, tables
from vitrim.report.blocks import fates
from vitrim.report.folder import Run, read_runs
from vitrim.report.groups import baseline_of, group_table, group_values
from vitrim.report.looks import looks, method_of
from vitrim.report.picture import picture
from vitrim.report.strips import strips
from vitrim.report.style import STYLE
from vitrim.report.tables import TextTable, as_markdown, markdown_text

__all__ = ["csv", "groups_csv", "html", "latex", "markdown"]

LEGEND = (
    ("qk", "queries and keys kept"),
    ("v", "values kept"),
    ("conv", "convolution in place of attention"),
    ("tokens", "tokens that leave the block"),
    ("mlp", "neurons kept"),
    ("cost", "MACs after"),
    ("whole", "the parent's"),
    ("dead", "gone"),
)


def html(folders: Sequence[Path], baseline: str | None = None) -> str:
    """Return an HTML page about one run, or about several runs with a comparison first.

    The page contains its style and pictures and loads nothing. The same folders always give the same page.

    Args:
        folders: run folders, or folders with run folders below them. Sections for files that an unfinished run has not
            written yet are left out.
        baseline: the method that the others are compared with, see `vitrim.report.groups.baseline_of`.

    Raises:
        RunError: there is no run, one cannot be read, the runs of a sweep have seen different images, or no run is of
            the baseline.
        PlanError: a ``plan.json`` is damaged.
    """
    runs = read_runs(folders)
    baseline = baseline_of(runs, baseline)
    many = _together(runs, baseline) if len(runs) > 1 else None
    page: str = _template().render(
        title=runs[0].name if many is None else f"{len(runs)} runs",
        style=_safe(STYLE),
        many=many,
        runs=[{"name": run.name, "outcome": _outcome(run), **_run(run)} for run in runs],
    )
    return page


def markdown(folders: Sequence[Path], baseline: str | None = None) -> str:
    """Return the tables of `html` as Markdown; see there for arguments and errors."""
    runs = read_runs(folders)
    baseline = baseline_of(runs, baseline)
    parts = []
    if len(runs) > 1:
        groups = group_table(runs, baseline)
        parts = ["# Runs", as_markdown(tables.comparison(runs)), f"# {groups.caption}", as_markdown(groups)]
    level = "#" if len(runs) == 1 else "##"
    for run in runs:
        parts += [f"{level} {markdown_text(run.name)}", markdown_text(_outcome(run))]
        parts += [f"**Warning:** {markdown_text(text)}." for text in tables.warnings(run.measured)]
        for table in (*_figures(run), tables.provenance(run.measured, run.parent)):
            if table is not None and table.rows:
                parts += [f"{level}# {table.caption}", as_markdown(table)]
    return "\n\n".join(parts) + "\n"


def csv(folders: Sequence[Path]) -> str:
    """Return all measured values of each run, unrounded, as comma-separated values; see `html` for the folders."""
    return tables.as_csv(tables.everything(read_runs(folders)))


def groups_csv(folders: Sequence[Path], baseline: str | None = None) -> str:
    """Return means, standard deviations and counts of each group of seeds, unrounded, as comma-separated values."""
    return tables.as_csv(group_values(read_runs(folders), baseline))


def latex(folders: Sequence[Path], baseline: str | None = None) -> str:
    """Return the table of groups in LaTeX, with the lines of the package booktabs; see `html` for the arguments."""
    return tables.as_latex(group_table(read_runs(folders), baseline))


@functools.cache
def _template() -> Any:
    # jinja2 is imported only here, as matplotlib in `_plots`: `vitrim explain` uses this package without it.
    jinja2 = importlib.import_module("jinja2")
    return jinja2.Environment(
        loader=jinja2.PackageLoader("vitrim.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    ).get_template("page.html")


def _safe(markup: str | None) -> Any:
    """Mark text of our own as HTML that is not escaped, such as SVG; None stays None."""
    return None if not markup else importlib.import_module("markupsafe").Markup(markup)


def _together(runs: Sequence[Run], baseline: str | None) -> dict[str, Any]:
    """Return what the page shows about several runs before each of them."""
    groups, known = group_table(runs, baseline), looks(runs)
    cuts = [(run.name, fates(run.parent, run.plan)) for run in runs if run.parent is not None and run.plan is not None]
    plots = _plots("fronts")
    return {
        "comparison": _table(
            tables.comparison(runs),
            "small",
            links=[f"run-{i}" for i in range(len(runs))],
            colors=[known[method_of(run)].css for run in runs],
        ),
        "groups": _table(groups, "small"),
        "copies": [
            ("All runs in Markdown", tables.as_markdown(tables.comparison(runs))),
            ("Over seeds in Markdown", tables.as_markdown(groups)),
            ("Over seeds in LaTeX", tables.as_latex(groups)),
            ("All that was measured, as CSV", tables.as_csv(tables.everything(runs))),
        ],
        "fronts": _safe(plots.fronts(runs)),
        "strips": _safe(strips(cuts)) if cuts else None,
        "courses": _safe(plots.courses(runs)),
    }


def _segments(run: Run) -> bool:
    return run.measured.get("task") == "segmentation"


def _outcome(run: Run) -> str:
    if not run.finished:
        return f"{run.titles.method or run.name} is {run.state}."
    return scenes.spoken(run.measured) if _segments(run) else tables.outcome(run.measured)


def _figures(run: Run) -> list[TextTable | None]:
    """Return the tables of the results of a run."""
    if not run.finished:
        return [tables.block_table(run)]
    if _segments(run):
        return [scenes.segmented(run.measured), scenes.class_table(run.classes)]
    return [tables.result(run.measured), tables.block_table(run), *_tables_of_trials(run)]


def _tables_of_trials(run: Run) -> list[TextTable]:
    """Return what a search has tried, and what it says about the blocks."""
    found = (tables.tried(run.trials), tables.scored(run.trials), tables.gated(run.trials))
    return [table for table in found if table is not None]


def _run(run: Run) -> dict[str, Any]:
    """Return what the page shows about one run; values that it does not have are None or empty."""
    segments = _segments(run)
    result = scenes.segmented(run.measured) if segments else tables.result(run.measured) if run.finished else None
    provenance = tables.provenance(run.measured, run.parent)
    return {
        "warnings": tables.warnings(run.measured),
        "result": None if result is None else _table(result, "result"),
        "classes": _table(scenes.class_table(run.classes), "small") if segments else None,
        "colors": scenes.colors(run),
        "scenes": scenes.gallery(run) if segments else [],
        **({"blocks": None} if segments else _kept(run)),
        "course": _safe(_plots().curves(run.log)),
        "trials": _safe(_plots().trials(run.trials)),
        "tables_of_trials": [_table(table, "small") for table in _tables_of_trials(run)],
        "facts": _table(provenance, "facts small", headless=True) if provenance.rows else None,
        "recipe": run.recipe,
    }


def _kept(run: Run) -> dict[str, Any]:
    """Return the picture of what a plan keeps, its legend, and the table of blocks."""
    table = tables.block_table(run)
    if table is None or run.parent is None or run.plan is None:
        return {"blocks": None}
    blocks = fates(run.parent, run.plan)
    absent = {"conv"} if not any(fate.conv for fate in blocks) else set()
    absent |= {"tokens"} if not any(fate.tokens < fate.tokens_before for fate in blocks) else set()
    return {
        "blocks": _table(table, "small sums"),
        "kept": _safe(picture(blocks)),
        "legend": [(kind, words) for kind, words in LEGEND if kind not in absent],
    }


def _plots(name: str = "curves") -> ModuleType:
    # matplotlib is imported only here. `vitrim explain` uses this package without plots, and importing matplotlib would
    # take longer than the whole command may take.
    return importlib.import_module(f"vitrim.report.{name}")


def _table(
    table: TextTable, kind: str, headless: bool = False, links: Sequence[str] = (), colors: Sequence[str] = ()
) -> Mapping[str, Any]:
    """Return a table as the template takes it.

    Args:
        table: the table.
        kind: classes of its style.
        headless: whether to leave the heading out.
        links: ids of the sections that the rows link to, with the rows' numbers before.
        colors: a color of each row, shown before its name.
    """
    rows = [
        {
            "name": row[0],
            "cells": row[1:],
            "link": links[place] if links else None,
            "color": colors[place] if colors else None,
        }
        for place, row in enumerate(table.rows)
    ]
    return {"kind": kind, "caption": table.caption, "head": () if headless else table.head, "rows": rows}
