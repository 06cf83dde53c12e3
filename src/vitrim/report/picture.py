"""Draw what a plan keeps, one line per block, as SVG that uses the colors and fonts of the page.

Every head of the parent is a cell of equal width. The bars in it show the fraction of its channels that is kept:
queries and keys above, values below. A cell without bars is a removed head. If attention is replaced by a convolution,
the line is a single labeled bar. The MLP is one bar to the right of the heads. If the plan drops or merges tokens, a
bar between both shows how many leave each block.
"""

from collections.abc import Sequence
from html import escape

from vitrim.report.blocks import Fate, HeadWidths, convolution
from vitrim.report.tables import short

__all__ = ["picture"]

WIDTH = 960
TOP = 26
HEADS_AT, HEADS_WIDTH = 132, 420
TOKENS_AT, TOKENS_WIDTH = 468, 84
MLP_AT, MLP_WIDTH = 572, 168
COST_AT, COST_WIDTH = 764, 84
NUMBERS_AT = WIDTH
CROWDED = 16
"""Number of blocks above which lines are closer together."""


def picture(fates: Sequence[Fate]) -> str:
    """Return an SVG of all blocks, 960 units wide; colors are set by classes in the style of the page."""
    line, bar = (34, 24) if len(fates) <= CROWDED else (24, 16)
    most = max((fate.macs_before for fate in fates), default=0)
    widest = max((fate.hidden_before for fate in fates), default=0)
    height = TOP + line * len(fates) + 2
    tokens = any(fate.tokens < fate.tokens_before for fate in fates)
    parts = [
        f'<svg class="kept" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(_words(fates))}">',
        _heading(tokens),
    ]
    for index, fate in enumerate(fates):
        y = TOP + line * index + (line - bar) / 2
        parts.append(_block(fate, y, bar, most, widest, tokens))
    parts.append("</svg>")
    return "\n".join(parts)


def _words(fates: Sequence[Fate]) -> str:
    living = sum(head.lives for fate in fates for head in fate.heads)
    heads = sum(len(fate.heads) for fate in fates)
    kept, had = sum(fate.hidden for fate in fates), sum(fate.hidden_before for fate in fates)
    convolving = sum(fate.conv > 0 for fate in fates)
    became = f", {convolving} became convolution" if convolving else ""
    return (
        f"What was kept of {len(fates)} blocks: {living} of {heads} heads{became}, {kept:,} of {had:,} neurons; "
        "the table below the picture has the numbers of each block"
    )


def _heading(tokens: bool) -> str:
    names = [(HEADS_AT, "attention heads"), (MLP_AT, "MLP neurons"), (COST_AT, "MACs")]
    if tokens:
        names.append((TOKENS_AT, "tokens after"))
    texts = [_text(x, 12, name, "head") for x, name in names]
    return "".join([*texts, _text(NUMBERS_AT, 12, "before → after", "head end")])


def _block(fate: Fate, y: float, bar: int, most: int, widest: int, tokens: bool) -> str:
    middle = y + bar / 2 + 4
    heads = TOKENS_AT - HEADS_AT - 20 if tokens else HEADS_WIDTH
    return "".join(
        [
            f"<g><title>{escape(_sentence(fate))}</title>",
            _text(0, middle, fate.path, "path"),
            _attention(fate, y, bar, heads),
            _tokens(fate, y, bar) if tokens else "",
            _mlp(fate, y, bar, widest),
            _costs(fate, y, bar, most),
            "</g>",
        ]
    )


def _sentence(fate: Fate) -> str:
    heads = ", ".join(f"{h.qk}/{h.v}" if h.lives else "dead" for h in fate.heads)
    attention = f"heads (q/k / v) {heads}" if fate.attention == "kept" else f"attention {fate.attention}"
    attention = convolution(fate) or attention
    mlp = f"{fate.hidden} of {fate.hidden_before} neurons" if fate.mlp == "kept" else f"MLP {fate.mlp}"
    tokens = f"; {fate.tokens} of {fate.tokens_before} tokens" if fate.tokens < fate.tokens_before else ""
    return f"{fate.path}: {attention}; {mlp}{tokens}; {fate.macs_before:,} to {fate.macs:,} MACs"


def _attention(fate: Fate, y: float, bar: int, width: float) -> str:
    if fate.conv:
        words = convolution(fate) if fate.reads else f"{convolution(fate)} in place of attention"
        middle = HEADS_AT + width / 2, y + bar / 2 + 4
        return _rect(HEADS_AT, y, width, bar, "conv") + _text(*middle, words, "on")
    if fate.attention != "kept":
        return _absent(HEADS_AT, y, width, bar, f"attention {fate.attention}")
    count = len(fate.heads)
    if not count:
        return _absent(HEADS_AT, y, width, bar, "no heads, output bias only")
    gap = 6 if count <= 12 else 3
    wide = (width - gap * (count - 1)) / count
    cells = [_head(head, HEADS_AT + i * (wide + gap), y, wide, bar) for i, head in enumerate(fate.heads)]
    if not any(head.lives for head in fate.heads):
        cells.append(_label(HEADS_AT + width / 2, y, bar, "all heads dead, output bias stays"))
    return "".join(cells)


def _tokens(fate: Fate, y: float, bar: int) -> str:
    left = TOKENS_WIDTH * fate.tokens / max(fate.tokens_before, 1)
    return _rect(TOKENS_AT, y, TOKENS_WIDTH, bar, "whole") + _rect(TOKENS_AT, y, left, bar, "tokens")


def _head(head: HeadWidths, x: float, y: float, wide: float, bar: int) -> str:
    if not head.lives:
        return _rect(x, y, wide, bar, "dead")
    half = bar / 2
    return "".join(
        [
            _rect(x, y, wide, bar, "whole"),
            _rect(x, y, wide * head.qk / head.qk_before, half - 0.5, "qk"),
            _rect(x, y + half + 0.5, wide * head.v / head.v_before, half - 0.5, "v"),
        ]
    )


def _mlp(fate: Fate, y: float, bar: int, widest: int) -> str:
    if fate.mlp != "kept":
        return _absent(MLP_AT, y, MLP_WIDTH, bar, f"MLP {fate.mlp}")
    wide = MLP_WIDTH * fate.hidden_before / max(widest, 1)
    if not fate.hidden:
        return _absent(MLP_AT, y, max(wide, 1), bar, "output bias only")
    return _rect(MLP_AT, y, wide, bar, "whole") + _rect(MLP_AT, y, wide * fate.hidden / fate.hidden_before, bar, "mlp")


def _costs(fate: Fate, y: float, bar: int, most: int) -> str:
    before, after = (COST_WIDTH * macs / max(most, 1) for macs in (fate.macs_before, fate.macs))
    numbers = f"{short(fate.macs_before)} → {short(fate.macs)}"
    return "".join(
        [
            _rect(COST_AT, y, before, bar, "whole"),
            _rect(COST_AT, y, after, bar, "cost"),
            _text(NUMBERS_AT, y + bar / 2 + 4, numbers, "end"),
        ]
    )


def _absent(x: float, y: float, wide: float, bar: int, words: str) -> str:
    return _rect(x, y, wide, bar, "gone") + _label(x + wide / 2, y, bar, words)


def _label(x: float, y: float, bar: int, words: str) -> str:
    return _text(x, y + bar / 2 + 4, words, "mid")


def _rect(x: float, y: float, wide: float, high: float, kind: str) -> str:
    return f'<rect class="{kind}" x="{x:.2f}" y="{y:.2f}" width="{wide:.2f}" height="{high:.2f}" rx="1.5"/>'


def _text(x: float, y: float, words: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.2f}" y="{y:.2f}">{escape(words)}</text>'
