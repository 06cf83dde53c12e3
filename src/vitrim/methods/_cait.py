"""Parts of `vitrim.methods.cait`: where neighbours are merged."""

from collections.abc import Sequence
from typing import Literal

from vitrim.errors import MethodError
from vitrim.plan import BlockPlan, Plan
from vitrim.spec import NO_WINDOWS, GridMerge, Spec

__all__ = ["Merge", "merge_plan", "thirds"]

Merge = tuple[int, Literal["w", "h"]]
"""After which block, counted from 1, and which axis is halved."""


def thirds(spec: Spec) -> tuple[Merge, ...]:
    """Columns after a third of the blocks, rows after two thirds, as far as the grid allows it: ours, not published."""
    depth, (rows, columns) = len(spec.blocks()), spec.stages[0].grid
    sites: list[Merge] = [(round(depth / 3), "w"), (round(2 * depth / 3), "h")]
    return tuple(
        site for site, places in zip(sites, (columns, rows), strict=True) if places > 1 and 0 < site[0] < depth
    )


def merge_plan(
    spec: Spec,
    merges: Sequence[Merge],
    form: Literal["linear", "mean", "channel"] = "linear",
    size_bias: bool = False,
) -> Plan:
    """The plan that merges neighbours, and cuts nothing else.

    Args:
        spec: the parent.
        merges: where. A merge after block p acts at the input of block p + 1.
        form: see `vitrim.steps.GridMerge`.
        size_bias: see there.

    Raises:
        MethodError: if tokens of the model cannot be merged, or a site is none.
        PlanError: if the grid does not allow so many merges.
    """
    if merges and any(stage.window is not None for stage in spec.stages):
        raise MethodError(f"merges must be empty for this model: {NO_WINDOWS}")
    depth = len(spec.blocks())
    sites = [after for after, _ in merges]
    if any(not 0 < after < depth for after in sites) or len(set(sites)) < len(sites):
        raise MethodError(f"merges must stand between two of {depth} blocks, after 1 to {depth - 1}, but got {sites}")
    steps = {after: GridMerge(axis=axis, form=form, size_bias=size_bias) for after, axis in merges}
    plan = Plan.of(spec, [BlockPlan(tokens=steps.get(index)) for index in range(depth)])
    plan.child(spec)
    return plan
