"""Plot the time per batch of models in each runtime: one panel per batch size, with the spread as a line."""

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from vitrim.report.curves import drawn, legend, standing
from vitrim.report.folder import Record, number
from vitrim.report.looks import INK, SERIES, SOFT

__all__ = ["bars"]

HIGH = 0.3
"""Height of a bar in inches."""


def bars(lines: Sequence[Record]) -> str:
    """Return the milliseconds per batch, grouped by runtime, as an SVG file.

    Args:
        lines: records with ``model``, ``runtime``, ``batch``, ``seconds``, ``seconds_low``, ``seconds_high`` and
            ``ratio`` (see `vitrim.deploy.bench.Timed`).
    """
    models = list(dict.fromkeys(str(line["model"]) for line in lines))
    batches = list(dict.fromkeys(line["batch"] for line in lines))

    def draw(figure: Figure) -> None:
        grid = figure.subplots(1, len(batches), squeeze=False).flat
        for axes, batch in zip(grid, batches, strict=True):
            _panel(axes, [line for line in lines if line["batch"] == batch], models)
            axes.set_title(f"batch of {batch}")
            axes.set_xlabel("milliseconds of a batch")
        legend(figure)

    rows = max(sum(line["batch"] == batch for line in lines) for batch in batches)
    words = f"Milliseconds of a batch for {len(models)} models, by runtime"
    return standing(drawn(draw, words, 9.2, 1.3 + HIGH * (rows + 2)))


def _panel(axes: Any, lines: Sequence[Record], models: Sequence[str]) -> None:
    runtimes = list(dict.fromkeys(str(line["runtime"]) for line in lines))
    ticks, y = [], 0.0
    for runtime in runtimes:
        mine = [line for line in lines if line["runtime"] == runtime]
        ticks.append(y + (len(mine) - 1) / 2)
        for line in mine:
            _bar(axes, y, line, models.index(str(line["model"])))
            y += 1
        y += 0.6
    axes.set_yticks(ticks, runtimes)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.3)


def _bar(axes: Any, y: float, line: Record, index: int) -> None:
    low, middle, high = (1e3 * (number(line, name) or 0.0) for name in ("seconds_low", "seconds", "seconds_high"))
    color, hatch = SERIES[index % len(SERIES)], ("", "//", "..", "xx")[index // len(SERIES) % 4]
    axes.barh(
        y,
        middle,
        height=0.8,
        color=color,
        hatch=hatch,
        edgecolor=INK,
        linewidth=0,
        label=str(line["model"]).lstrip("_"),
    )
    axes.plot([low, high], [y, y], color=INK, linewidth=1.2)
    ratio = number(line, "ratio")
    words = f"{middle:.1f}" + ("" if ratio is None or ratio == 1 else f"  ({ratio:.2f})")
    axes.annotate(
        words, (max(high, middle), y), (5, 0), textcoords="offset points", va="center", fontsize=8, color=SOFT
    )
