"""Compute what a plan keeps of each block, and the cost of each block before and after.

This module imports neither torch nor matplotlib, so that ``vitrim explain`` starts fast.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

from vitrim.words.costs import block_cost, cost_of
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Attention, Block, Conv, Spec

__all__ = ["HOST", "Fate", "HeadWidths", "Row", "convolution", "fates", "sheet", "total"]

HOST = "stem and head"
"""Path of the row for everything outside the blocks."""


class HeadWidths(NamedTuple):
    """Channels of one head of the parent, before and after, of queries and keys, and of values."""

    qk: int
    qk_before: int
    v: int
    v_before: int

    @property
    def lives(self) -> bool:
        """Whether the head is kept."""
        return self.v > 0


class Fate(NamedTuple):
    """What a plan does to one block.

    `heads` lists every head of the parent; it is empty if the parent has no attention. `attention` and `mlp` are
    ``"kept"``, ``"skipped"`` if the plan removes the branch, or ``"none"`` if the parent has no such branch. `conv` is
    the side of the kernel if attention is replaced by a convolution, else 0; then `reads` says whether prefix tokens
    keep the attention.
    """

    path: str
    attention: str
    heads: tuple[HeadWidths, ...]
    mlp: str
    hidden: int
    hidden_before: int
    macs_before: int
    macs: int
    params_before: int
    params: int
    tokens: int
    tokens_before: int
    conv: int = 0
    reads: bool = False


class Row(NamedTuple):
    """One row of the table of a plan; `share` is macs after divided by macs before, None if there were none before."""

    path: str
    heads: str
    qk: str
    v: str
    hidden: str
    macs_before: int
    macs: int
    share: float | None
    params_before: int
    params: int
    tokens: str = ""


def fates(parent: Spec, plan: Plan) -> list[Fate]:
    """Return what the plan does to every block of `parent`.

    Raises:
        PlanError: the plan does not fit `parent`.
    """
    child = plan.child(parent)
    return [
        _fate(path, block, decision, after)
        for (path, _, _), block, decision, after in zip(
            parent.blocks(), _places(parent), plan.blocks(), _places(child), strict=True
        )
    ]


class _Place(NamedTuple):
    """A block with its cost, and the number of tokens that leave it."""

    block: Block
    cost: tuple[int, int]
    tokens: int


def _places(spec: Spec) -> list[_Place]:
    return [
        _Place(block, block_cost(block, stage, arriving), flow.leaves.total)
        for (_, stage, block), arriving, flow in zip(spec.blocks(), spec.arrivals(), spec.flows(), strict=True)
    ]


def _fate(path: str, place: _Place, plan: BlockPlan, child: _Place) -> Fate:
    block, before, after = place.block, place.cost, child.cost
    had = block.hidden or 0
    kept = had if plan.hidden is None else len(plan.hidden)
    return Fate(
        path=path,
        attention=_branch(isinstance(block.mixer, Attention), plan.mixer is not None),
        heads=_heads(block, plan),
        mlp=_branch(block.hidden is not None, plan.mlp is not None),
        hidden=0 if plan.mlp is not None else kept,
        hidden_before=had,
        macs_before=before[0],
        macs=after[0],
        params_before=before[1],
        params=after[1],
        tokens=child.tokens,
        tokens_before=place.tokens,
        conv=child.block.mixer.kernel if isinstance(child.block.mixer, Conv) else 0,
        reads=isinstance(child.block.mixer, Conv) and child.block.mixer.heads is not None,
    )


def _branch(had: bool, skipped: bool) -> str:
    if not had:
        return "none"
    return "skipped" if skipped else "kept"


def _heads(block: Block, plan: BlockPlan) -> tuple[HeadWidths, ...]:
    mixer = block.mixer
    if not isinstance(mixer, Attention):
        return ()
    if plan.mixer is not None:
        return tuple(HeadWidths(0, qk, 0, v) for qk, v in zip(mixer.qk, mixer.v, strict=True))
    kept_qk, kept_v = plan.heads(mixer)
    return tuple(
        HeadWidths(len(kq), q, len(kv), v) for kq, q, kv, v in zip(kept_qk, mixer.qk, kept_v, mixer.v, strict=True)
    )


def sheet(parent: Spec, plan: Plan) -> list[Row]:
    """Return one row per block and a last one for stem and head; their sums are the cost of parent and child.

    Raises:
        PlanError: the plan does not fit `parent`.
    """
    return [*(_row(fate) for fate in fates(parent, plan)), _host_row(parent, plan)]


def _row(fate: Fate) -> Row:
    living = [head for head in fate.heads if head.lives]
    hidden = f"{fate.hidden:,} of {fate.hidden_before:,}" if fate.mlp == "kept" else fate.mlp
    kept = fate.attention == "kept"
    return Row(
        path=fate.path,
        heads=f"{len(living)} of {len(fate.heads)}" if kept else convolution(fate) or fate.attention,
        qk=widths([head.qk for head in living]) if kept else "",
        v=widths([head.v for head in living]) if kept else "",
        hidden=hidden,
        macs_before=fate.macs_before,
        macs=fate.macs,
        share=_share(fate.macs, fate.macs_before),
        params_before=fate.params_before,
        params=fate.params,
        tokens=f"{fate.tokens} of {fate.tokens_before}",
    )


def convolution(fate: Fate) -> str:
    """Return a description of the convolution that replaces attention; empty if there is none."""
    if not fate.conv:
        return ""
    return f"{fate.conv} x {fate.conv} convolution" + (", prefix tokens attend" if fate.reads else "")


def _host_row(parent: Spec, plan: Plan) -> Row:
    child = plan.child(parent)
    (macs_before, params_before), (macs, params) = (_host_cost(spec) for spec in (parent, child))
    stages = zip(plan.widths(), child.stages, parent.stages, strict=True)
    streams = [f"{after.width} of {before.width}" for kept, after, before in stages if kept is not None]
    width = f"residual width {', '.join(streams)}" if streams else ""
    return Row(HOST, width, "", "", "", macs_before, macs, _share(macs, macs_before), params_before, params)


def _host_cost(spec: Spec) -> tuple[int, int]:
    """Return macs and params outside the blocks; the macs of a head may depend on the tokens after the last block."""
    whole, blocks = cost_of(spec), [place.cost for place in _places(spec)]
    return whole.macs - sum(macs for macs, _ in blocks), whole.params - sum(params for _, params in blocks)


def total(rows: Sequence[Row]) -> Row:
    """Return the sum of all rows."""
    before, after = sum(row.macs_before for row in rows), sum(row.macs for row in rows)
    params_before, params = sum(row.params_before for row in rows), sum(row.params for row in rows)
    return Row("total", "", "", "", "", before, after, _share(after, before), params_before, params)


def _share(after: int, before: int) -> float | None:
    return after / before if before else None


def widths(values: Sequence[int]) -> str:
    """Return the widths of heads in order, equal neighbors grouped: ``2x64 + 48``; a range if that is too long."""
    if not values:
        return "0"
    runs = [(value, len(list(group))) for value, group in groupby(values)]
    if len(runs) > 4:
        return f"{min(values)} to {max(values)}, sum {sum(values)}"
    return " + ".join(f"{count}x{value}" if count > 1 else str(value) for value, count in runs)
