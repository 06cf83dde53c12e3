"""Colors and markers of methods: each method has the same ones in all figures and tables of a report."""

from collections.abc import Sequence
from typing import NamedTuple

from vitrim.report.folder import Run
from vitrim.report.names import CONTROL

__all__ = ["INK", "MARKERS", "SERIES", "VARIABLES", "Look", "looks", "method_of"]

INK, SOFT, LINE = "#010101", "#020202", "#030303"
"""Placeholders of colors; see `vitrim.report.curves`."""

SERIES = ("#040404", "#050505", "#060606", "#070707", "#080808", "#090909", "#0a0a0a", "#0b0b0b")
VARIABLES = {
    INK: "var(--ink)",
    SOFT: "var(--soft)",
    LINE: "var(--line)",
    SERIES[0]: "var(--qk)",
    SERIES[1]: "var(--mlp)",
    SERIES[2]: "var(--v)",
    SERIES[3]: "var(--other)",
    SERIES[4]: "var(--conv)",
    SERIES[5]: "var(--rose)",
    SERIES[6]: "var(--leaf)",
    SERIES[7]: "var(--bark)",
}
MARKERS = "osD^vP*X"


class Look(NamedTuple):
    """How the runs of a method are drawn: a placeholder of a color, and a marker."""

    color: str
    marker: str

    @property
    def css(self) -> str:
        """The color as a variable of the page."""
        return VARIABLES[self.color]


def method_of(run: Run) -> str:
    """Return the name by which a run has its color; never empty."""
    return run.titles.method or "?"


def looks(runs: Sequence[Run]) -> dict[str, Look]:
    """Return the look of each method of `runs`; that of the control is the text's color."""
    names = sorted({method_of(run) for run in runs} - {CONTROL})
    found = {
        name: Look(SERIES[index % len(SERIES)], MARKERS[index // len(SERIES) % len(MARKERS)])
        for index, name in enumerate(names)
    }
    return found | {CONTROL: Look(INK, "o")}
