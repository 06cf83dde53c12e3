"""The commands that list or report what exists, without measuring anything."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from vitrim.cli.shared import app, print_table, say, show_table


@app.command()
def explain(plan: Annotated[Path, typer.Argument(help="plan.json of a run folder.")]) -> None:
    """Show what a plan keeps in each block, and the cost of the result."""
    from vitrim.report import plan_table
    from vitrim.words.plan import read_plan

    table = plan_table(*read_plan(plan))
    show_table(str(plan), table.head, table.rows)


@app.command("report")
def report_(
    folders: Annotated[list[Path], typer.Argument(help="Run folders, or folders with run folders below them.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="HTML file to write; without it, Markdown is printed.")
    ] = None,
    csv: Annotated[
        Path | None,
        typer.Option("--csv", help="CSV file to write, all measurements unrounded; FILE.seeds.csv gets the means."),
    ] = None,
    latex: Annotated[
        Path | None, typer.Option("--latex", help="LaTeX file to write: means and deviations over seeds.")
    ] = None,
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="Method to compare with. Default: random or magnitude, if there.")
    ] = None,
) -> None:
    """Report on runs, finished or not, as one HTML page, as Markdown, CSV or LaTeX; runs are grouped over seeds."""
    from vitrim import report
    from vitrim.words.errors import RunError
    from vitrim.words.plain import check_place, write_text

    seeds = None if csv is None else csv.with_suffix(".seeds.csv")
    for place in (out, csv, seeds, latex):
        if place is not None:
            check_place(place, RunError)
    written: list[tuple[Path, str]] = []
    if csv is not None and seeds is not None:
        written += [(csv, report.csv(folders)), (seeds, report.groups_csv(folders, baseline))]
    if latex is not None:
        written.append((latex, report.latex(folders, baseline)))
    if out is not None:
        written.append((out, report.html(folders, baseline)))
    for path, text in written:
        write_text(path, text)
        say(f"wrote {path}")
    if not written:
        sys.stdout.write(report.markdown(folders, baseline))


@app.command("methods")
def methods_(
    name: Annotated[str | None, typer.Argument(help="Method, or its .py file, whose settings to show.")] = None,
) -> None:
    """List the methods, or show the settings of one: type, default and meaning."""
    from vitrim import methods
    from vitrim.words.errors import MethodError

    if name is not None:
        _settings_of(name)
        return
    table = Table(box=None, pad_edge=False)
    for column in ("method", "from", "needs", "what it does", "settings"):
        table.add_column(column)
    for name in methods.names():
        try:
            found = methods.origin(name)
        except MethodError as problem:  # of another author: the others are listed all the same
            table.add_row(*map(Text, (name, "-", "-", str(problem), "-")))
            continue
        kind: Any = found.kind
        table.add_row(*map(Text, (name, found.where, kind.needs, kind.sentence, ", ".join(kind.model_fields))))
    print_table(table)


def _settings_of(name: str) -> None:
    from vitrim import methods
    from vitrim.words.settings import settings_of

    found = methods.origin(name)
    default: Any = methods.get(name) if found.given else None
    kind: Any = found.kind
    rows = [[f"method.{each.name}", each.kind, each.default, each.meaning] for each in settings_of(kind, default)]
    show_table(
        f"{name}: {kind.sentence}; needs {kind.needs}; from {found.where}",
        ["--set", "type", "default", "meaning"],
        rows,
        left=True,
    )


@app.command("recipes")
def recipes_(
    name: Annotated[str | None, typer.Argument(help="Recipe or preset to print as TOML.")] = None,
) -> None:
    """List the recipes and presets that come with vitrim, or print one of them."""
    from vitrim.run.shipped import Kind, about, names, text_of

    if name is not None:
        sys.stdout.write(text_of(name))
        return
    uses: dict[Kind, str] = {"recipes": "vitrim run NAME", "presets": "--preset NAME"}
    for kind, how in uses.items():
        table = Table(title=f"{kind}: {how}", title_justify="left", box=None, pad_edge=False, show_header=False)
        for each in names(kind):
            table.add_row(Text(each), Text(about(kind, each)))
        print_table(table)


@app.command("models")
def models_(
    pattern: Annotated[str, typer.Argument(help="A timm name or a pattern such as 'deit*'.")] = "*",
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON record per line.")] = False,
) -> None:
    """List timm models with their cost, and whether vitrim can cut them."""
    from vitrim.deploy.parent import known_models

    rows = []
    for known in known_models(pattern):
        if json_:
            sys.stdout.write(json.dumps(known) + "\n")
            continue
        cost = (
            [f"{known['macs'] / 1e9:.4f} G", f"{known['params'] / 1e6:.3f} M"]
            if known["reason"] is None
            else ["-", "-"]
        )
        rows.append([str(known["name"]), *cost, str(known["reason"] or "yes")])
    if not json_:
        show_table("", ["model", "MACs", "parameters", "can be cut"], rows)
