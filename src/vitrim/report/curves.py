"""Line and scatter plots, drawn by matplotlib as SVG that uses the colors and fonts of the page.

matplotlib draws in placeholder colors, which are then replaced by the variables of the page. So one drawing is readable
on a light and on a dark page.
"""

import io
import itertools
import re
import warnings
from collections.abc import Callable, Sequence
from html import escape
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from vitrim.report.folder import Record, number
from vitrim.report.looks import INK, LINE, SERIES, SOFT, VARIABLES
from vitrim.report.style import STYLE
from vitrim.report.tables import short

__all__ = ["curves", "drawn", "legend", "series", "standing", "thinned", "trials"]

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.labelcolor": SOFT,
    "lines.linewidth": 1.6,
    "text.color": INK,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}
LETTERS = 115
"""Number of characters of a legend line that fit below a figure, including the markers."""
_JUDGED: tuple[tuple[str, Callable[[float, float], float]], ...] = (("score", max), ("loss", min))
"""By what a search judges its trials, and which of two is the better one."""
_LOSSES = ("loss", "divergence")
"""Measures whose negative is a score (`measure` of a record)."""
POINTS = 300
"""Largest number of points of a curve; more are averaged, to keep the page of a long run small."""


def curves(log: Sequence[Record]) -> str | None:
    """Return plots of loss and top-1 over the steps of each stage, one panel each; None if there are neither."""
    stages: dict[str, list[Record]] = {}
    for line in log:
        stages.setdefault(str(line.get("stage", "")), []).append(line)
    panels = [(_losses, name, lines) for name, lines in stages.items() if series(lines, "loss")]
    panels += [(_scores, name, lines) for name, lines in stages.items() if series(lines, "top1")]
    if not panels:
        return None
    columns = len(panels) if len(panels) <= 3 else 2
    rows = -(-len(panels) // columns)

    def draw(figure: Figure) -> None:
        grid = list(figure.subplots(rows, columns, squeeze=False).flat)
        for (panel, name, lines), axes in zip(panels, grid, strict=False):
            panel(axes, name, lines)
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        for axes in grid[len(panels) :]:
            axes.set_axis_off()

    words = "Curves over steps: " + ", ".join(f"{panel.__name__.strip('_')} of {name}" for panel, name, _ in panels)
    return drawn(draw, words, 9.2, 2.6 * rows)


def trials(records: Sequence[Record]) -> str | None:
    """Return plots of the scores of trials, or of their losses if they have no scores; None with neither.

    A score that is minus a loss is drawn as this loss.

    The first shows the score of each trial in its order, and the best so far. If the trials differ in MACs by more than
    2 %, a second one shows the scores against MACs.
    """
    name, better = next(
        (each for each in _JUDGED if any(number(record, each[0]) is not None for record in records)), _JUDGED[0]
    )
    scored = [(record, score) for record in records if (score := number(record, name)) is not None]
    if not scored:
        return None
    measure = str(scored[0][0].get("measure", name))
    sign = -1 if name == "score" and measure in _LOSSES else 1
    name, better = (measure, min) if sign < 0 else (measure, better)
    found = [(number(record, "trial"), number(record, "macs"), sign * score) for record, score in scored]
    order = [(float(place) if trial is None else trial, score) for place, (trial, _, score) in enumerate(found)]
    order.sort()
    costs = [(macs, score) for _, macs, score in found if macs is not None]
    apart = len(costs) == len(found) and max(costs)[0] > 1.02 * min(costs)[0]

    def draw(figure: Figure) -> None:
        first, *rest = figure.subplots(1, 1 + apart, squeeze=False, sharey=True).flat
        _dots(first, order)
        best = list(itertools.accumulate((score for _, score in order), better))
        first.step([x for x, _ in order], best, where="post", color=SERIES[1], label="best so far")
        first.set_xlabel("trial")
        first.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        first.set_ylabel(name)
        first.legend(loc="best")
        for axes in rest:
            _dots(axes, costs)
            axes.set_xlabel("multiply-accumulates")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))

    return drawn(draw, f"{name.capitalize()} of {len(found)} trials", 9.2, 2.6)


def _dots(axes: Any, points: Sequence[tuple[float, float]]) -> None:
    axes.scatter([x for x, _ in points], [y for _, y in points], s=18, color=SERIES[0], alpha=0.75, linewidths=0)


def _losses(axes: Any, name: str, lines: Sequence[Record]) -> None:
    axes.set_title(f"loss, {name}")
    found = [(key, points) for key in ("loss", "task", "penalty") if (points := series(lines, key))]
    if not any(value for key, points in found for _, value in points if key == "penalty"):
        found = found[:1]  # without a penalty the task is the loss
    for color, (key, points) in zip(SERIES, found, strict=False):
        axes.plot(*thinned(points), color=color, label=key, alpha=1.0 if key == "loss" else 0.75)
    if len(found) > 1:
        axes.legend(loc="best")


def _scores(axes: Any, name: str, lines: Sequence[Record]) -> None:
    axes.set_title(f"top-1 in percent, {name}")
    axes.set_ylabel("held-out images")
    axes.plot(*thinned(series(lines, "top1")), color=SERIES[2], marker="o", markersize=3)


def series(lines: Sequence[Record], key: str) -> list[tuple[float, float]]:
    """Return the points (step, value) of the lines that have `key`; a line without a step uses its index.

    A stage logs steps, and a mean at the end of each epoch. If there are steps, only these are used. A run that was
    killed and resumed logs some steps twice; the last record is used.
    """
    points: dict[float, float] = {}
    steps = [line for line in lines if line.get("event") == "step" and number(line, key) is not None]
    for index, line in enumerate(steps or lines):
        value, step = number(line, key), number(line, "step")
        if value is not None:
            points[float(index) if step is None else step] = value
    return sorted(points.items())


def thinned(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Return means over groups of consecutive points of equal size, at most `POINTS` groups."""
    size = -(-len(points) // POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [fmean(x for x, _ in group) for group in groups], [fmean(y for _, y in group) for group in groups]


def legend(figure: Figure) -> None:
    """Add one legend for all panels below the figure."""
    named: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    columns = max(1, min(len(named), LETTERS // (max(map(len, named)) + 7)))
    figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=columns)


def drawn(draw: Callable[[Figure], None], words: str, wide: float, high: float) -> str:
    """Draw a figure of `wide` x `high` inches, and return it as SVG to be embedded in a page."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": words}), warnings.catch_warnings():
        # matplotlib measures text in a font that may lack glyphs that the browser has.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=(wide, high), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return _adopted(text.getvalue(), words)


def _adopted(svg: str, words: str) -> str:
    """Return an inline SVG without prolog, metadata, global style, group names and sizes, in the colors of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\n?", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace("xlink:href=", "href=")
    svg = re.sub(r"font: (?:[\w.]+ )?([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    for color, variable in VARIABLES.items():
        svg = svg.replace(color, variable)
    box = re.search(r'viewBox="[^"]*"', svg)
    start = f'<svg class="plot" {box[0] if box else ""} role="img" aria-label="{escape(words)}">'
    return re.sub(r"<svg[^>]*>", lambda _: start, svg, count=1).strip()


def standing(svg: str) -> str:
    """Return an SVG of `drawn` as a standalone file, in the colors of a light page."""
    colors = dict(re.findall(r"(--[\w-]+): (#[0-9a-fA-F]{6})", STYLE.split("@media", 1)[0]))
    svg = re.sub(r"var\((--[\w-]+)\)", lambda found: colors[found[1]], svg)
    start = '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" '
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + svg.replace("<svg ", start, 1) + "\n"
