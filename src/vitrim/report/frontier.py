"""Plot the accuracy of a model and its compressed versions against their cost."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from vitrim.report.curves import drawn, standing
from vitrim.report.folder import Record, number
from vitrim.report.looks import INK, SERIES

__all__ = ["frontier", "frontier_plot"]

_ACROSS = (
    ("macs_ratio", "multiply-accumulates, share of the parent"),
    ("latency_ratio", "latency, share of the parent"),
)


def frontier_plot(records: Sequence[Record]) -> str | None:
    """Return a plot of top-1 against MACs and measured latency, as SVG for a page; agreement if there is no top-1.

    The result is None if fewer than two records have such a score.
    """
    key = "top1" if all(number(record, "top1") is not None for record in records) else "agreement"
    words = "top-1 in percent" if key == "top1" else "same answer as the parent, percent"
    panels = [
        (across, label, points) for across, label in _ACROSS if len(points := sorted(_points(records, across, key))) > 1
    ]
    if not panels:
        return None
    dense = {t for record in records if (t := number(record, "top1_parent")) is not None} if key == "top1" else {100.0}

    def draw(figure: Figure) -> None:
        grid = figure.subplots(1, len(panels), squeeze=False, sharey=True).flat
        for axes, (_, label, points) in zip(grid, panels, strict=True):
            axes.plot([x for x, _ in points], [y for _, y in points], color=SERIES[0], marker="o", markersize=5)
            axes.scatter([1.0] * len(dense), sorted(dense), s=60, color=INK, marker="*")
            for score in dense:
                axes.annotate("parent", (1.0, score), (-7, -3), textcoords="offset points", ha="right", fontsize=8.5)
            axes.set_xlabel(label)
            axes.margins(0.12)
        figure.axes[0].set_ylabel(words)

    return drawn(draw, f"{words} against cost, {len(records)} models", 9.2, 3.4)


def frontier(records: Sequence[Record]) -> str:
    """Return the same plot as a standalone SVG file in light colors; an empty picture if there are too few scores."""
    svg = frontier_plot(records) or '<svg class="plot" viewBox="0 0 1 1">'
    if not svg.endswith("</svg>"):
        svg += "</svg>"
    return standing(svg)


def _points(records: Sequence[Record], across: str, key: str) -> list[tuple[float, float]]:
    pairs = [(number(record, across), number(record, key)) for record in records]
    return [(x, y) for x, y in pairs if x is not None and y is not None]
