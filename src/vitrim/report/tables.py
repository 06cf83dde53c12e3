"""The tables of a report as rows of text. The page and the Markdown show the same cells."""

import csv
import io
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any, NamedTuple

from vitrim.report.blocks import Row, sheet, total
from vitrim.report.folder import Record, Run, number
from vitrim.words.plan import Plan
from vitrim.words.spec import Spec

__all__ = [
    "TextTable",
    "as_csv",
    "as_latex",
    "as_markdown",
    "block_table",
    "classes_of",
    "comparison",
    "everything",
    "gated",
    "markdown_text",
    "outcome",
    "plan_table",
    "provenance",
    "result",
    "scored",
    "short",
    "tried",
    "warnings",
]

DASH = "–"  # noqa: RUF001 an en dash means "no value" in a cell


class TextTable(NamedTuple):
    """A caption, a heading and rows of cells. The first column is the name of the row; the others are values."""

    caption: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def short(value: float | None) -> str:
    """Return a count with its unit prefix: ``2.30 G``, ``22.1 M``."""
    if value is None:
        return DASH
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            digits = max(0, 2 - len(str(int(abs(value) / size))) + 1)
            return f"{value / size:.{digits}f} {unit}"
    return f"{value:g}"


def percent(value: float | None, digits: int = 1) -> str:
    """Return a percentage as text: ``71.3 %``."""
    return DASH if value is None else f"{value:.{digits}f} %"


def _ratio(value: float | None) -> str:
    return DASH if value is None else f"{value:.3f}"


def _milliseconds(value: float | None) -> str:
    return DASH if value is None else f"{value:.2f} ms"


def _points(value: float) -> str:
    # Round first, so that a loss of 0.04 points is shown as +0.0 and not as -0.0.
    return f"{round(value, 1) + 0.0:+.1f}".replace("-", "\N{MINUS SIGN}") + " points"


def result(measured: Record) -> TextTable:
    """Return the table that compares parent and child."""
    batch = number(measured, "batch")
    latency = "latency" if batch is None else f"latency, batch of {batch:g}"
    rows = [
        _side_by_side(measured, "multiply-accumulates", "macs", short),
        _side_by_side(measured, "parameters", "params", short),
        _side_by_side(measured, latency, "latency", _milliseconds, "_ms"),
    ]
    mine, theirs = number(measured, "top1"), number(measured, "top1_parent")
    change = _points(mine - theirs) if mine is not None and theirs is not None else DASH
    rows.insert(2, ("top-1", percent(theirs), percent(mine), change))
    if number(measured, "miou") is not None:
        mine, theirs = number(measured, "miou"), number(measured, "miou_parent")
        change = _points(mine - theirs) if mine is not None and theirs is not None else DASH
        rows.insert(3, ("mean IoU", percent(theirs), percent(mine), change))
    agreement, distance = number(measured, "agreement"), number(measured, "distance")
    if agreement is not None:
        rows.insert(3, ("same answer as the parent", DASH, percent(agreement), DASH))
    if distance is not None:
        rows.insert(3, ("distance from the parent's outputs", DASH, f"{distance:.3f}", DASH))
    errors = [number(measured, name) for name in ("top1_parent_error", "top1_error")]
    if any(error is not None for error in errors):
        rows.insert(3, ("standard error of top-1", *(DASH if e is None else f"{e:.1f} points" for e in errors), DASH))
    return TextTable("Parent and child", ("", "parent", "child", "child / parent"), rows)


def _side_by_side(
    measured: Record, label: str, name: str, show: Callable[[float | None], str], unit: str = ""
) -> tuple[str, ...]:
    theirs, mine = number(measured, f"{name}_parent{unit}"), number(measured, f"{name}{unit}")
    return label, show(theirs), show(mine), _with_spread(measured, name)


def _with_spread(measured: Record, name: str) -> str:
    text = _ratio(number(measured, f"{name}_ratio"))
    low, high = number(measured, f"{name}_ratio_low"), number(measured, f"{name}_ratio_high")
    return text if low is None or high is None else f"{text} ({low:.3f} to {high:.3f})"


def comparison(runs: Sequence[Run]) -> TextTable:
    """Return the table of all runs, one row per run; the state of unfinished runs stands in place of their top-1."""
    columns: list[tuple[str, Callable[[Run], str]]] = [
        ("run", lambda run: run.titles.method or run.name),
        ("budget", lambda run: run.titles.budget),
        ("top-1", lambda run: run.state or _scored(run.measured, "top1")),
        ("parent's", lambda run: _scored(run.measured, "top1_parent")),
        ("latency ratio", lambda run: _ratio(number(run.measured, "latency_ratio"))),
        ("MACs", lambda run: short(number(run.measured, "macs"))),
        ("of parent", lambda run: _ratio(number(run.measured, "macs_ratio"))),
        ("parameters", lambda run: short(number(run.measured, "params"))),
        ("of parent", lambda run: _ratio(number(run.measured, "params_ratio"))),
        ("seed", lambda run: run.titles.seed),
        ("epochs", lambda run: run.titles.epochs),
        ("data", lambda run: run.titles.data),
        ("folder", lambda run: run.path),
    ]
    if any(number(run.measured, "miou") is not None for run in runs):
        columns.insert(3, ("mean IoU", lambda run: percent(number(run.measured, "miou"))))
    rows = [tuple(cell(run) or DASH for _, cell in columns) for run in runs]
    return TextTable("All runs", tuple(name for name, _ in columns), rows)


def _scored(measured: Record, name: str) -> str:
    return percent(number(measured, name)) + _error(measured, f"{name}_error")


def _error(measured: Record, name: str) -> str:
    error = number(measured, name)
    return "" if error is None else f" \N{PLUS-MINUS SIGN} {error:.1f}"


def everything(runs: Sequence[Run]) -> TextTable:
    """Return all measured values, unrounded: one row per run, one column per name that occurs in any run."""
    names = list(dict.fromkeys(name for run in runs for name in run.measured))
    values = [["" if (value := run.measured.get(name)) is None else str(value) for name in names] for run in runs]
    rows = [(run.path, run.name, run.state or "finished", *row) for run, row in zip(runs, values, strict=True)]
    return TextTable("All that was measured", ("run", "name", "state", *names), rows)


def block_table(run: Run) -> TextTable | None:
    """Return the table of what every block keeps, with sums; None if there is no plan yet."""
    return None if run.parent is None or run.plan is None else plan_table(run.parent, run.plan)


def tried(trials: Sequence[Record]) -> TextTable | None:
    """Return what a search has measured and what won; None without trials that have a prediction and a loss."""
    known = [t for t in trials if number(t, "predicted") is not None and number(t, "loss") is not None]
    if not known:
        return None
    timed = any(number(trial, "ratio") is not None for trial in known)
    rows = []
    for trial in known:
        name = f"{trial.get('trial', '')}: {trial.get('what', '')}"
        cells = [f"{trial[key]:.4f}" for key in ("predicted", "loss")]
        cells += [_ratio(number(trial, "ratio"))] if timed else []
        rows.append((name, *cells, "taken" if trial.get("best") else ""))
    head = ("trial", "predicted, nats", "measured, nats", *(("time of dense",) if timed else ()), "")
    why = "the least measured divergence from the dense output" + (" within the time" if timed else "")
    return TextTable(f"What was tried; what was taken has {why}", head, rows)


def scored(trials: Sequence[Record]) -> TextTable | None:
    """Return the best trials of a search by their scores on held-out images; None without trials that have scores."""
    known = [t for t in trials if number(t, "score") is not None]
    if not known:
        return None
    best = sorted(known, key=lambda trial: (-trial["score"], number(trial, "trial") or 0))[:_SHOWN]
    counts = [name for name in ("heads", "neurons", "tokens") if any(_counts(trial, name) for trial in best)]
    rows = []
    for trial in best:
        kept = [_counts(trial, name) for name in counts]
        cells = [
            ", ".join(map(str, k)) if name == "tokens" else f"{sum(k):,}" for name, k in zip(counts, kept, strict=True)
        ]
        costs = (short(number(trial, name)) for name in ("macs", "params"))
        rows.append((str(trial.get("trial", "")), judged(trial), *costs, *cells, "taken" if trial.get("best") else ""))
    head = ("trial", "held-out images", "MACs", "parameters", *counts, "")
    return TextTable(f"The best {len(best)} of {len(known)} trials", head, rows)


def _counts(trial: Record, name: str) -> list[int]:
    value = trial.get(name)
    return value if isinstance(value, list) and all(isinstance(count, int) for count in value) else []


def judged(trial: Record) -> str:
    """Return what a trial was measured by and its value, as text: ``loss 1.2345 nats``, ``top1 71.30 %``."""
    value, name = trial["score"], str(trial.get("measure", "score"))
    if name in ("loss", "divergence"):
        return f"{name} {-value:.4f} nats"
    return f"{name} {value:.2f} %" if name in ("top1", "agreement") else f"{name} {value:.4f}"


def gated(trials: Sequence[Record]) -> TextTable | None:
    """Return what a search that trains gates told of each block; None without records of blocks."""
    known = [t for t in trials if isinstance(t.get("path"), str)]
    plain = (bool, int, float, str)
    names = [n for n in dict.fromkeys(name for t in known for name in t) if n != "path"]
    names = [name for name in names if all(t.get(name) is None or isinstance(t[name], plain) for t in known)]
    if not known or not names:
        return None
    rows = [(t["path"], *(_cell(t.get(name)) for name in names)) for t in known]
    return TextTable("What the search tells of each block", ("block", *names), rows)


def _cell(value: Any) -> str:
    if value is None:
        return DASH
    if isinstance(value, float):
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


_SHOWN = 10
"""Number of trials in the table of the best ones."""


def plan_table(parent: Spec, plan: Plan) -> TextTable:
    """Return the table of what every block keeps of `parent`, with sums; with tokens if the plan drops some."""
    rows = sheet(parent, plan)
    drops = any(block.tokens is not None for block in plan.blocks())
    head = ("block", "heads", "q/k widths", "v widths", "neurons", *["tokens"] * drops, "MACs before", "after", "share")
    return TextTable("Every block", head, [_line(row, drops) for row in (*rows, total(rows))])


def _line(row: Row, drops: bool) -> tuple[str, ...]:
    share = DASH if row.share is None else f"{100 * row.share:.1f} %"
    tokens = [row.tokens] * drops
    return row.path, row.heads, row.qk, row.v, row.hidden, *tokens, f"{row.macs_before:,}", f"{row.macs:,}", share


def classes_of(count: int, names: Sequence[str] | None) -> str:
    """Return the number of classes with the names of the first ones: ``10: ant; bee; cat; dog; eel; …``."""
    if names is None:
        return "none, the model gives features" if count == 0 else f"{count:,}"
    return f"{count:,}: {'; '.join(names[:_FIRST])}" + ("; …" if count > _FIRST else "")


_FIRST = 5


def provenance(measured: Record, parent: Spec | None = None) -> TextTable:
    """Return the table of all measured values and settings that the other tables do not show, and of the classes."""
    shown = {"top1", "top1_parent", "agreement", "latency_ms", "latency_parent_ms", "miou", "accuracy", "macs_head"}
    shown |= {"top1_error", "top1_parent_error", "distance", "warnings"}
    for name in ("macs", "params", "latency"):
        shown |= {name, f"{name}_parent", f"{name}_ratio", f"{name}_ratio_low", f"{name}_ratio_high"}
    rows = [(str(key), _plain(value)) for key, value in measured.items() if key not in shown]
    names = None if parent is None else parent.host.pretrained.get("label_names")
    if parent is not None and isinstance(names, list | tuple) and len(names) == parent.classes:
        rows.insert(0, ("classes", classes_of(parent.classes, [str(name) for name in names])))
    return TextTable("Settings and origin", ("", "value"), rows)


def _plain(value: object) -> str:
    if value is None:
        return DASH
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def outcome(measured: Record) -> str:
    """Return the result of a run in one sentence."""
    who = str(measured.get("method", "the run"))
    share = number(measured, "macs_ratio")
    kept = "a smaller model" if share is None else f"a model with {100 * share:.1f} % of the multiply-accumulates"
    model = str(measured.get("model") or "")
    model = model.rpartition("/")[2] if model.endswith(".safetensors") else model
    parts = [f"{who} made {kept}" + (f" of {model}" if model else "")]
    mine, theirs = number(measured, "top1"), number(measured, "top1_parent")
    if mine is not None:
        against = "" if theirs is None else f", {_points(mine - theirs)} against its parent"
        parts.append(f"top-1 is {percent(mine)}{_measured_on(measured)}{against}")
    ratio = number(measured, "latency_ratio")
    if ratio is not None:
        device = measured.get("device")
        parts.append(f"a batch takes {ratio:.2f} of the parent's time" + (f" on {device}" if device else ""))
    return "; ".join(parts) + "."


def _measured_on(measured: Record) -> str:
    """Return the standard error of top-1, and the number and source of the test images; empty if unknown."""
    count, source = number(measured, "test_images"), measured.get("test_source")
    text = _error(measured, "top1_error")
    if count is not None and isinstance(source, str):
        text += f" on {count:,.0f} images of {source}"
    return text


def warnings(measured: Record) -> list[str]:
    """Return the warnings of a run, one sentence each."""
    text = measured.get("warnings")
    return [line for line in text.splitlines() if line.strip()] if isinstance(text, str) else []


def as_markdown(table: TextTable) -> str:
    """Return a table in Markdown, with escaped cells."""
    rule = ("---", *("---:" for _ in table.head[1:]))
    lines = [table.head, rule, *table.rows]
    return "\n".join("| " + " | ".join(map(markdown_text, cells)) + " |" for cells in lines)


def markdown_text(text: str) -> str:
    """Return text escaped so that it stays in one cell and is not read as markup."""
    flat = " ".join(text.split())
    return "".join(f"\\{sign}" if sign in "\\`*_[]|#" else sign for sign in escape(flat, quote=False))


def as_csv(table: TextTable) -> str:
    """Return a table as comma-separated values with a heading; cells that look like a formula are quoted."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for cells in (table.head, *table.rows):
        writer.writerow([f"'{cell}" if _runs(cell) else cell for cell in cells])
    return text.getvalue()


def _runs(cell: str) -> bool:
    """Return whether a spreadsheet would evaluate this cell; a number with a sign is only a number."""
    return cell[:1] in tuple("=+-@\t\r") and not _NUMBER.fullmatch(cell)


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


def as_latex(table: TextTable) -> str:
    """Return a table in LaTeX, to be used with the package booktabs; cells are escaped."""
    head, *rows = [" & ".join(map(_latex_text, cells)) + r" \\" for cells in (table.head, *table.rows)]
    columns = "l" + "r" * (len(table.head) - 1)
    lines = [f"% {table.caption}", rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\N{PLUS-MINUS SIGN}": r"$\pm$",
    "\N{MINUS SIGN}": r"$-$", DASH: "--", "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}",
} | {sign: f"\\{sign}" for sign in "&%$#_{}"}  # fmt: skip


def _latex_text(text: str) -> str:
    return "".join(_LATEX.get(sign, sign) for sign in " ".join(text.split()))
