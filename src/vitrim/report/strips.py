"""Draw what several runs keep of every block: one line per run, cells filled by the fraction of the block's MACs."""

from collections.abc import Sequence
from html import escape

from vitrim.report.blocks import Fate

__all__ = ["strips"]

WIDTH, LABEL, HIGH, GAP = 960, 200, 26, 10
TOP = 18
LONGEST = 30
"""Number of characters of a name that fit next to its line."""


def strips(runs: Sequence[tuple[str, Sequence[Fate]]]) -> str:
    """Return the picture as SVG.

    Args:
        runs: name of each run, and what it keeps of each block of the parent.
    """
    most = max(len(blocks) for _, blocks in runs)
    wide = (WIDTH - LABEL) / most
    lines = [_line(name, blocks, TOP + i * (HIGH + GAP), wide) for i, (name, blocks) in enumerate(runs)]
    step = -(-most // 24)
    numbers = [f'<text class="mid" x="{LABEL + (i + 0.5) * wide:.1f}" y="11">{i}</text>' for i in range(0, most, step)]
    words = f"Share of the multiply-accumulates that {len(runs)} runs keep of each block"
    return (
        f'<svg class="kept" viewBox="0 0 {WIDTH} {TOP + len(runs) * (HIGH + GAP)}" role="img" '
        f'aria-label="{escape(words)}">{"".join(numbers)}{"".join(lines)}</svg>'
    )


def _line(name: str, blocks: Sequence[Fate], y: float, wide: float) -> str:
    short = name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"
    cells = [_cell(fate, LABEL + i * wide, y, wide - 3) for i, fate in enumerate(blocks)]
    return f'<text class="path" x="0" y="{y + HIGH / 2 + 4:.1f}">{escape(short)}</text>{"".join(cells)}'


def _cell(fate: Fate, x: float, y: float, wide: float) -> str:
    share = fate.macs / fate.macs_before if fate.macs_before else 0.0
    high = HIGH * min(share, 1.0)
    kind = "whole" if fate.macs else "gone"
    return (
        f"<g><title>{escape(fate.path)}: {100 * share:.0f} % of its multiply-accumulates</title>"
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{HIGH}" rx="2"/>'
        f'<rect class="cost" x="{x:.1f}" y="{y + HIGH - high:.1f}" width="{wide:.1f}" height="{high:.1f}" rx="2"/></g>'
    )
