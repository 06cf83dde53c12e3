"""Build the report as one self-contained HTML page, and its tables as Markdown or CSV."""

import importlib
from collections.abc import Sequence
from html import escape
from pathlib import Path
from types import ModuleType

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
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    body = _alone(runs[0]) if len(runs) == 1 else _together(runs, baseline)
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            '<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)} · vitrim</title>",
            f"<style>{STYLE}</style></head>",
            f"<body><main>\n{body}\n</main></body>",
            "</html>\n",
        ]
    )


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


def _alone(run: Run) -> str:
    sentence = escape(_outcome(run))
    return f'<header><h1>{escape(run.name)}</h1>\n<p class="outcome">{sentence}</p></header>\n{_run(run)}'


def _together(runs: Sequence[Run], baseline: str | None) -> str:
    groups, known = group_table(runs, baseline), looks(runs)
    parts = [
        f"<header><h1>{len(runs)} runs</h1>",
        '<p class="outcome">Each run is a smaller model made from a parent; the sections below describe them one by '
        "one.</p></header>",
        _table(
            tables.comparison(runs),
            "small",
            links=[f"run-{i}" for i in range(len(runs))],
            colors=[known[method_of(run)].css for run in runs],
        ),
        "<h3>Over seeds</h3>",
        f'<p class="note">{groups.caption}.</p>',
        _table(groups, "small"),
        _copies(runs, groups),
    ]
    many = _plots("fronts")
    if plot := many.fronts(runs):
        words = (
            '<p class="note">Numbers refer to rows of the table; the gray line joins the runs on the Pareto front.</p>'
        )
        parts += ["<h3>Accuracy against cost</h3>", words, _figure(plot)]
    cuts = [(run.name, fates(run.parent, run.plan)) for run in runs if run.parent is not None and run.plan is not None]
    if cuts:
        parts += [
            "<h3>What is kept of every block</h3>",
            '<figure><figcaption><span class="key cost">multiply-accumulates kept</span><span class="key whole">the '
            f'parent\'s</span></figcaption><div class="wide">{strips(cuts)}</div></figure>',
        ]
    if plot := many.courses(runs):
        parts += ["<h3>Training of all</h3>", _figure(plot)]
    for index, run in enumerate(runs):
        top = f'<section id="run-{index}">\n<h2>{escape(run.name)}</h2>\n<p class="outcome">{escape(_outcome(run))}</p>'
        parts += [top, _run(run), "</section>"]
    return "\n".join(parts)


def _copies(runs: Sequence[Run], groups: TextTable) -> str:
    """Return both tables as text to copy, and all measured values as CSV, unrounded."""
    rest = "".join(
        f"<details><summary>{words}</summary><pre>{escape(text)}</pre></details>"
        for words, text in (
            ("All runs in Markdown", tables.as_markdown(tables.comparison(runs))),
            ("Over seeds in Markdown", tables.as_markdown(groups)),
            ("Over seeds in LaTeX", tables.as_latex(groups)),
            ("All that was measured, as CSV", tables.as_csv(tables.everything(runs))),
        )
    )
    return f'<div class="copies">{rest}</div>'


def _figure(plot: str) -> str:
    return f'<figure><div class="wide">{plot}</div></figure>'


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


def _run(run: Run) -> str:
    if _segments(run):
        figures, classes = scenes.segmented(run.measured), scenes.class_table(run.classes)
        first = [_table(figures, "result"), "<h3>Every class</h3>", _table(classes, "small"), *scenes.gallery(run)]
    else:
        first = [*([_table(tables.result(run.measured), "result")] if run.finished else []), *_kept(run)]
    remarks = tables.warnings(run.measured)
    first = [*(f'<p class="warning"><strong>Warning:</strong> {escape(text)}.</p>' for text in remarks), *first]
    return "\n".join([*first, *_course(run), *_origin(run)])


def _kept(run: Run) -> list[str]:
    table = tables.block_table(run)
    if table is None or run.parent is None or run.plan is None:
        return []
    blocks = fates(run.parent, run.plan)
    absent = {"conv"} if not any(fate.conv for fate in blocks) else set()
    absent |= {"tokens"} if not any(fate.tokens < fate.tokens_before for fate in blocks) else set()
    shown = [(kind, words) for kind, words in LEGEND if kind not in absent]
    keys = "".join(f'<span class="key {kind}">{words}</span>' for kind, words in shown)
    drawn = picture(blocks)
    return [
        "<h3>What was kept</h3>",
        f'<figure><figcaption>{keys}</figcaption><div class="wide">{drawn}</div></figure>',
        f"<details><summary>Numbers of every block</summary>{_table(table, 'small sums')}</details>",
    ]


def _course(run: Run) -> list[str]:
    parts = []
    if plot := _plots().curves(run.log):
        parts += ["<h3>Course of search and training</h3>", _figure(plot)]
    plot, found = _plots().trials(run.trials), _tables_of_trials(run)
    shown = [*([_figure(plot)] if plot else ()), *(_table(table, "small") for table in found)]
    return [*parts, *(["<h3>Trials</h3>", *shown] if shown else ())]


def _plots(name: str = "curves") -> ModuleType:
    # matplotlib is imported only here. `vitrim explain` uses this package without plots, and importing matplotlib would
    # take longer than the whole command may take.
    return importlib.import_module(f"vitrim.report.{name}")


def _origin(run: Run) -> list[str]:
    parts = []
    table = tables.provenance(run.measured, run.parent)
    if table.rows:
        parts += ["<h3>Settings and origin</h3>", _table(table, "facts small", headless=True)]
    if run.recipe is not None:
        parts.append(f"<details><summary>Recipe, as resolved</summary><pre>{escape(run.recipe)}</pre></details>")
    return parts


def _table(
    table: TextTable, kind: str, headless: bool = False, links: Sequence[str] = (), colors: Sequence[str] = ()
) -> str:
    """Return a table as HTML.

    Args:
        table: the table.
        kind: classes of its style.
        headless: whether to leave the heading out.
        links: ids of the sections that the rows link to, with the rows' numbers before.
        colors: a color of each row, shown before its name.
    """
    head = "".join(f'<th scope="col">{escape(cell)}</th>' if cell else "<td></td>" for cell in table.head)
    names = [escape(row[0]) for row in table.rows]
    if links:
        names = [
            f'<span class="place">{place}</span><a href="#{link}">{name}</a>'
            for place, (link, name) in enumerate(zip(links, names, strict=True), 1)
        ]
    if colors:
        names = [
            f'<i class="swatch" style="background:{color}"></i>{name}'
            for color, name in zip(colors, names, strict=True)
        ]
    rows = "\n".join(
        f'<tr><th scope="row">{name}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for name, row in zip(names, table.rows, strict=True)
    )
    top = "" if headless else f"<thead><tr>{head}</tr></thead>\n"
    return (
        f'<div class="wide"><table class="{kind}"><caption>{escape(table.caption)}</caption>\n'
        f"{top}<tbody>\n{rows}\n</tbody></table></div>"
    )
