"""Groups of runs that differ only in their seed: mean, standard deviation, and paired differences."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from vitrim.report.folder import Run, number
from vitrim.report.names import CONTROL
from vitrim.report.tables import DASH, TextTable
from vitrim.words.errors import RunError
from vitrim.words.plain import did_you_mean

__all__ = ["Group", "Spread", "baseline_of", "group_numbers", "group_table", "group_values", "grouped", "spread"]

BASELINES = ("random", "magnitude")
"""Methods that others are compared with if no baseline is named, the first that is there."""

SCORES = (("top1", "top-1"), ("miou", "mean IoU"), ("agreement", "agreement"))
PLUS_MINUS, MINUS = "\N{PLUS-MINUS SIGN}", "\N{MINUS SIGN}"


class Spread(NamedTuple):
    """Mean and sample standard deviation of `size` values; the deviation of one value is None."""

    mean: float
    deviation: float | None
    size: int


class Group(NamedTuple):
    """Runs of one method with the same settings, budget, epochs, data and parent, one for each seed."""

    method: str
    budget: str
    epochs: str
    data: str
    model: str
    runs: tuple[Run, ...]


def spread(values: Sequence[float]) -> Spread | None:
    """Return mean and standard deviation; None without values."""
    if not values:
        return None
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Return the groups in the order of parent, data, epochs, budget and method; controls first."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        name = run.titles
        budget = "" if name.method == CONTROL else name.budget
        groups.setdefault((name.model, name.data, name.epochs, budget, name.method), []).append(run)
    order = sorted(groups, key=lambda key: (*key[:2], key[4] != CONTROL, *key[2:]))
    return [
        Group(method, budget, epochs, data, model, tuple(groups[model, data, epochs, budget, method]))
        for model, data, epochs, budget, method in order
    ]


def baseline_of(runs: Sequence[Run], asked: str | None) -> str | None:
    """Return the method that others are compared with, or None.

    Args:
        runs: all runs.
        asked: a method's name as the table shows it; None for the first of `BASELINES` that is there beside others.

    Raises:
        RunError: if no run is of that method.
    """
    names = sorted({run.titles.method for run in runs if run.titles.method})
    if asked is None:
        others = [name for name in names if name != CONTROL]
        return next((name for name in BASELINES if name in others and len(others) > 1), None)
    if asked not in names:
        raise RunError(f"a baseline must be the method of a run, but got '{asked}'{did_you_mean(asked, names)}")
    return asked


class Numbers(NamedTuple):
    """What is known of a group: spreads over its finished runs, each None if unknown."""

    group: Group
    finished: int
    macs: Spread | None
    score: Spread | None
    parent: Spread | None
    control: Spread | None
    baseline: Spread | None
    latency: Spread | None


def score_of(runs: Sequence[Run]) -> tuple[str, str]:
    """Return the field and the name of the score that all finished runs have."""
    done = [run for run in runs if run.finished]
    return next(
        (each for each in SCORES if done and all(number(run.measured, each[0]) is not None for run in done)), SCORES[0]
    )


def group_numbers(runs: Sequence[Run], baseline: str | None = None) -> list[Numbers]:
    """Return the numbers of every group.

    Differences are paired: from the score of a run, that of the other run with the same seed, data and parent is
    subtracted. A control is trained for as many epochs as search and training of the run take together; a run of the
    baseline has the same budget, too.
    """
    field, _ = score_of(runs)
    chosen = baseline_of(runs, baseline)
    return [_numbers(group, runs, field, chosen) for group in grouped(runs)]


def _numbers(group: Group, runs: Sequence[Run], field: str, baseline: str | None) -> Numbers:
    done = [run for run in group.runs if run.finished]

    def over(name: str) -> Spread | None:
        return spread([value for run in done if (value := number(run.measured, name)) is not None])

    def against(method: str | None, same_budget: bool) -> Spread | None:
        if method is None or method == group.method:
            return None
        pairs = [(run, _partner(run, runs, method, same_budget)) for run in done]
        return spread(
            [
                mine - theirs
                for run, other in pairs
                if other is not None
                and (mine := number(run.measured, field)) is not None
                and (theirs := number(other.measured, field)) is not None
            ]
        )

    changes = [
        mine - theirs
        for run in done
        if (mine := number(run.measured, field)) is not None
        and (theirs := number(run.measured, f"{field}_parent")) is not None
    ]
    return Numbers(
        group=group,
        finished=len(done),
        macs=over("macs_ratio"),
        score=over(field),
        parent=spread(changes),
        control=against(CONTROL, same_budget=False),
        baseline=None if group.method == CONTROL else against(baseline, same_budget=True),
        latency=over("latency_ratio"),
    )


def _partner(run: Run, runs: Sequence[Run], method: str, same_budget: bool) -> Run | None:
    mine = run.titles
    for other in runs:
        theirs = other.titles
        alike = (theirs.seed, theirs.data, theirs.model, theirs.total) == (mine.seed, mine.data, mine.model, mine.total)
        if other.finished and theirs.method == method and alike and not (same_budget and theirs.budget != mine.budget):
            return other
    return None


def group_table(runs: Sequence[Run], baseline: str | None = None) -> TextTable:
    """Return the table of groups; columns that no group has a value for are left out."""
    _, words = score_of(runs)
    chosen = baseline_of(runs, baseline)
    rows = group_numbers(runs, baseline)
    several = len({row.group.model for row in rows}) > 1
    columns: list[tuple[str, list[str]]] = [
        ("method", [row.group.method or DASH for row in rows]),
        ("model", [row.group.model if several else "" for row in rows]),
        ("budget", [row.group.budget or DASH for row in rows]),
        ("seeds", [_seeds(row) for row in rows]),
        ("MACs", [_shown(row.macs, 3) for row in rows]),
        (f"{words}, %", [_shown(row.score, 1) for row in rows]),
        ("against parent", [_shown(row.parent, 1, signed=True) for row in rows]),
        ("against control", [_shown(row.control, 1, signed=True) for row in rows]),
        (f"against {chosen}", [_shown(row.baseline, 1, signed=True) for row in rows]),
        ("latency ratio", [_shown(row.latency, 2) for row in rows]),
        ("epochs", [row.group.epochs for row in rows]),
        ("data", [row.group.data for row in rows]),
    ]
    kept = [(name, cells) for name, cells in columns if name == "method" or any(c not in ("", DASH) for c in cells)]
    lines = [tuple(cells[index] for _, cells in kept) for index in range(len(rows))]
    caption = f"Mean {PLUS_MINUS} standard deviation over seeds; differences in points, paired by seed"
    return TextTable(caption, tuple(name for name, _ in kept), lines)


def group_values(runs: Sequence[Run], baseline: str | None = None) -> TextTable:
    """Return the same numbers unrounded, with standard deviation and count of each in columns of their own."""
    chosen = baseline_of(runs, baseline)
    kinds = ("macs", "score", "parent", "control", "baseline", "latency")
    head = ["method", "model", "budget", "epochs", "data", "seeds", "finished", "score_name", "baseline_method"]
    head += [f"{kind}{part}" for kind in kinds for part in ("", "_deviation", "_count")]
    rows = []
    for row in group_numbers(runs, baseline):
        group = row.group
        cells = [group.method, group.model, group.budget, group.epochs, group.data, str(len(group.runs))]
        cells += [str(row.finished), score_of(runs)[0], chosen or ""]
        for kind in kinds:
            value: Spread | None = getattr(row, kind)
            cells += ["", "", ""] if value is None else ["" if part is None else str(part) for part in value]
        rows.append(tuple(cells))
    return TextTable("Groups of seeds", tuple(head), rows)


def _seeds(row: Numbers) -> str:
    count = len(row.group.runs)
    return str(count) if row.finished == count else f"{row.finished} of {count}"


def _shown(value: Spread | None, digits: int, signed: bool = False) -> str:
    if value is None:
        return DASH
    # Round first, so that a difference of -0.04 points is shown as +0.0 and not as -0.0.
    mean = round(value.mean, digits) + 0.0
    text = f"{mean:{'+' if signed else ''}.{digits}f}".replace("-", MINUS)
    if value.deviation is None or round(value.deviation, digits + 2) == 0:
        return text
    return f"{text} {PLUS_MINUS} {value.deviation:.{digits}f}"
