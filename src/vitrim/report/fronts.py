"""Plots of several runs: accuracy against each cost with its Pareto front, and the training curves."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from vitrim.report.curves import drawn, legend, series, thinned
from vitrim.report.folder import Run, number
from vitrim.report.looks import INK, LINE, SOFT, Look, looks, method_of
from vitrim.report.tables import short

__all__ = ["courses", "front", "fronts"]

_COSTS = (("macs", "multiply-accumulates"), ("params", "parameters"), ("latency", "measured latency"))
_PLACE = ("device", "runtime", "threads", "batch", "dtype")
"""Fields that must be equal for all runs before their times are shown on one axis."""
_NEAR = 0.02
"""Share of the width or height of all points within which two are drawn around one another."""
NAMED = 12
"""Largest number of lines that are easy to distinguish."""
_SCORES = (
    ("top1", "top-1 in percent", "Top-1"),
    ("miou", "mean IoU in percent", "Mean IoU"),
    ("agreement", "same answer as the parent, percent", "Agreement"),
)


class _Point(NamedTuple):
    cost: float
    score: float
    run: Run
    place: int


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the Pareto front of (cost, score): points for which no other costs at most as much and scores as high."""
    best: list[tuple[float, float]] = []
    for cost, score in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or score > best[-1][1]:
            best.append((cost, score))
    return best


def fronts(runs: Sequence[Run]) -> str | None:
    """Return plots of top-1 against MACs, parameters and latency, one panel each; mean IoU or agreement without top-1.

    The number next to a point is the position of the run in `runs`, from 1. Runs at about the same place are drawn as
    rings around one another, with all their numbers.

    Costs are relative to the parent if all parents have the same cost, and absolute otherwise. Times of different
    machines or settings are always relative. The result is None if fewer than two runs have a score.
    """
    done = [run for run in runs if run.finished]
    key, label, title = next(
        (s for s in _SCORES if all(number(r.measured, s[0]) is not None for r in done)), _SCORES[-1]
    )
    known = looks(runs)
    panels = [(name, words, shares, found) for name, words, shares, found in _panels(runs, key) if len(found) > 1]
    if not panels:
        return None

    def draw(figure: Figure) -> None:
        grid = figure.subplots(1, len(panels), squeeze=False, sharey=True).flat
        for axes, (name, words, shares, found) in zip(grid, panels, strict=True):
            _panel(axes, found, known)
            if shares:
                _parents(axes, found, key)
            axes.set_xlabel(words + (", of the parent" if shares else ", ms of a batch" if name == "latency" else ""))
            if not shares and name != "latency":
                axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
            axes.xaxis.set_major_locator(MaxNLocator(4))
        figure.axes[0].set_ylabel(label)
        legend(figure)

    return drawn(draw, f"{title} against cost of {len(done)} runs", 9.2, 3.7)


def _panels(runs: Sequence[Run], key: str) -> list[tuple[str, str, bool, list[_Point]]]:
    alike = len({tuple(str(run.measured.get(f"{name}_parent")) for name in ("macs", "params")) for run in runs}) == 1
    one_place = len({tuple(str(run.measured.get(name)) for name in _PLACE) for run in runs}) == 1
    panels = []
    for name, words in _COSTS:
        shares = alike or (name == "latency" and not one_place)
        field = f"{name}_ratio" if shares else "latency_ms" if name == "latency" else name
        found = [
            _Point(cost, score, run, place)
            for place, run in enumerate(runs, 1)
            if (cost := number(run.measured, field)) is not None and (score := number(run.measured, key)) is not None
        ]
        panels.append((name, words, shares, found))
    return panels


def _panel(axes: Any, found: Sequence[_Point], known: Mapping[str, Look]) -> None:
    best = front([(point.cost, point.score) for point in found])
    axes.plot(*zip(*best, strict=True), color=LINE, linewidth=5, solid_capstyle="round", label="Pareto front", zorder=1)
    for points in _together(found):
        for ring, point in enumerate(points):
            _mark(axes, point, known, ring)
        numbers = ", ".join(str(point.place) for point in points)
        at = (points[0].cost, points[0].score)
        axes.annotate(numbers, at, (5 + 2 * len(points), 2), textcoords="offset points", fontsize=7.5, color=SOFT)
    axes.margins(0.12)


def _together(found: Sequence[_Point]) -> list[list[_Point]]:
    """Return the points in groups that lie so close together that their markers would hide each other."""
    wide, high = (max(each) - min(each) or 1.0 for each in zip(*((p.cost, p.score) for p in found), strict=True))
    groups: list[list[_Point]] = []
    for point in found:
        for group in groups:
            if abs(point.cost - group[0].cost) <= _NEAR * wide and abs(point.score - group[0].score) <= _NEAR * high:
                group.append(point)
                break
        else:
            groups.append([point])
    return groups


def _mark(axes: Any, point: _Point, known: Mapping[str, Look], ring: int) -> None:
    """Draw a run as a filled marker, or as a ring around `ring` others at the same place."""
    method = method_of(point.run)
    look = known[method]
    # matplotlib leaves labels that start with an underscore out of the legend.
    how: dict[str, Any] = {"marker": look.marker, "label": method.lstrip("_") or "?", "zorder": 3}
    if ring:
        how |= {"facecolors": "none", "edgecolors": look.color, "linewidths": 1.4}
    else:
        how |= {"color": look.color, "linewidths": 0}
    axes.scatter([point.cost], [point.score], s=(34**0.5 + 4.5 * ring) ** 2, **how)


def _parents(axes: Any, found: Sequence[_Point], key: str) -> None:
    scores = {t for point in found if (t := number(point.run.measured, f"{key}_parent")) is not None}
    scores = {100.0} if key == "agreement" else scores
    if scores:
        axes.scatter([1.0] * len(scores), sorted(scores), s=60, color=INK, marker="*", label="parent", zorder=3)


def courses(runs: Sequence[Run]) -> str | None:
    """Return plots of training loss and top-1, one line per run; None if fewer than two runs logged one of them.

    All runs of one method have the same color; with more than `NAMED` runs they have the same style, too.
    """
    logs = [(run, [line for line in run.log if line.get("stage") == "train"]) for run in runs]
    panels: list[tuple[str, list[tuple[Run, list[tuple[float, float]]]]]] = []
    for key, words in (("loss", "loss"), ("top1", "top-1 in percent")):
        found = [(run, points) for run, lines in logs if (points := series(lines, key))]
        if len(found) > 1:
            panels.append((words, found))
    if not panels:
        return None
    names = list(dict.fromkeys(_named(run, len(runs)) for run in runs))
    known, dashes = looks(runs), _dashes(runs)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(1, len(panels), squeeze=False).flat
        for axes, (words, found) in zip(grid, panels, strict=True):
            for run, points in found:
                color, label = known[method_of(run)].color, _named(run, len(runs)).lstrip("_") or "?"
                axes.plot(*thinned(points), color=color, linestyle=dashes[_named(run, len(runs))], label=label)
            axes.set_title(words)
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        legend(figure)

    lines = -(-len(names) // 4)
    return drawn(draw, f"Training of {max(len(found) for _, found in panels)} runs over steps", 9.2, 3.0 + 0.2 * lines)


def _dashes(runs: Sequence[Run]) -> dict[str, str]:
    """Return the style of each line, which tells the runs of a method apart."""
    found: dict[str, str] = {}
    counts: dict[str, int] = {}
    for run in runs:
        name = _named(run, len(runs))
        if name not in found:
            index = counts[method_of(run)] = counts.get(method_of(run), -1) + 1
            found[name] = ("-", "--", ":", "-.")[index % 4]
    return found


def _named(run: Run, count: int) -> str:
    return run.name if count <= NAMED else method_of(run)
