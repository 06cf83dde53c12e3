"""Choose the residual width together with all other widths, from a score for every channel.

D width of a stage, H heads, K channels of a head.

The cost of a layer is the product of the residual width and the layer's own, so no list of rungs can hold both. Widths
are tried one after the other: each is cut, the other axes are filled to the budget at the costs that they have at that
width, and the choice with the least loss is taken.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from torch import Tensor

from vitrim.cut.ladders import ALIGN
from vitrim.cut.spend import Array
from vitrim.words.budget import SLACK, Budget
from vitrim.words.errors import BudgetError, MethodError
from vitrim.words.plan import BlockPlan, Kept, Plan
from vitrim.words.spec import Attention, Spec

__all__ = ["best_of", "fill_with_width"]

_TRIES = 12
"""Widths that are tried at first, evenly apart; then those between the best one and its neighbors."""

_LEAST = 4
"""The smallest width that is tried is this part of the parent's."""

Rank = tuple[int, float]
"""0 and the loss of a plan that spends the budget; 1 and minus the share that another one spends. The least wins."""


def best_of(values: Array, count: int) -> Kept:
    """Return the indices of the `count` largest values, increasing; of equal values the first are kept."""
    order = np.argsort(-values, kind="stable")[:count]
    return tuple(int(i) for i in np.sort(order))


def fill_with_width(
    spec: Spec,
    scores: Mapping[str, Tensor],
    budget: Budget,
    fill: Callable[[Spec, Mapping[str, Tensor], Budget], Plan],
    by: Literal["score", "density"],
) -> Plan:
    """Choose what to keep, the residual width included, so that the child is within `budget`.

    All stages keep the same share of their width, in steps of `ALIGN` channels, and each keeps its best channels.

    Args:
        spec: the parent.
        scores: by path of an axis, as for `vitrim.cut.fill.fill`; those of streams are named ``stages.0.width``.
        budget: upper bounds on the cost of the child.
        fill: fills the axes of blocks.
        by: ``density``: scores add up, so the sum of what is lost is least. ``score``: they are ranks, so the sum of
            the mean ranks lost from the streams and from the other axes is least; both then lose about the same share.

    Raises:
        BudgetError: if no width meets the budget, or it bounds time by a table of one residual width.
        MethodError: if scores do not fit the streams.
    """
    if budget.latency is not None and budget.table is not None and not budget.table.narrows:
        raise BudgetError(
            "a plan that cuts the residual width must be made by a table with times at two of them, but this table of "
            "times knows one; make it with width=True, or bound macs"
        )
    streams = _checked(spec, scores)
    others = {path: values for path, values in scores.items() if path not in streams}
    ranked = {path: values.detach().cpu().double().numpy().reshape(-1) for path, values in others.items()}
    top = spec.stages[0].width
    tried: dict[int, tuple[Rank, Plan] | BudgetError | None] = {}

    def loss(width: int) -> Rank:
        if width not in tried:
            tried[width] = _at(spec, width, streams, others, ranked, budget, fill, by)
        found = tried[width]
        return found[0] if isinstance(found, tuple) else (2, 0.0)

    step = max(ALIGN, round(top / _TRIES / ALIGN) * ALIGN)
    coarse = [top, *range((top - 1) // step * step, max(top // _LEAST, 1) - 1, -step)]
    best = min(coarse, key=loss)
    for width in range((best - step) // ALIGN * ALIGN + ALIGN, min(best + step, top), ALIGN):
        if width >= max(top // _LEAST, 1):
            loss(width)
    good = [found for found in tried.values() if isinstance(found, tuple)]
    if not good:
        refused = tried[min(coarse)]
        why = refused if isinstance(refused, BudgetError) else "no choice of the other widths spends it"
        raise BudgetError(f"at the smallest residual width that is tried, {min(coarse)} of {top} channels: {why}")
    return min(good, key=lambda found: found[0])[1]


def _checked(spec: Spec, scores: Mapping[str, Tensor]) -> dict[str, Array]:
    """Return the scores of the streams, after checking sizes and values."""
    sizes = {f"stages.{index}.width": stage.width for index, stage in enumerate(spec.stages)}
    found: dict[str, Array] = {}
    for path in sizes:
        values: Any = scores[path].detach().cpu().double().numpy().reshape(-1) if path in scores else np.zeros(0)
        if len(values) != sizes[path]:
            raise MethodError(
                f"{path}: scores must fit the {sizes[path]} channels of the stream, but got {len(values)}"
            )
        if not np.isfinite(values).all():
            raise MethodError(f"{path}: scores must be finite, but some are NaN or infinite; check weights and data")
        found[path] = values
    return found


def _narrow(spec: Spec, width: int, streams: Mapping[str, Array]) -> Plan:
    """Return the plan that cuts the streams alone, to `width` channels of the first stage."""
    kept: list[Kept | None] = []
    for stage, values in zip(spec.stages, streams.values(), strict=True):
        count = round(stage.width * width / spec.stages[0].width / ALIGN) * ALIGN
        kept.append(None if width == spec.stages[0].width else best_of(values, min(max(count, 1), stage.width)))
    return Plan.of(spec, [BlockPlan()] * len(spec.blocks()), kept)


def _at(
    spec: Spec,
    width: int,
    streams: Mapping[str, Array],
    others: Mapping[str, Tensor],
    ranked: Mapping[str, Array],
    budget: Budget,
    fill: Callable[[Spec, Mapping[str, Tensor], Budget], Plan],
    by: Literal["score", "density"],
) -> tuple[Rank, Plan] | BudgetError | None:
    """Return rank and plan at one residual width, why it does not meet the budget, or None if it is not spent."""
    parent = budget.cost(spec)
    plan = _narrow(spec, width, streams)
    small = plan.child(spec)
    try:
        cost = budget.cost(small)
        over = {name: float(limit) for name, limit in budget.limits(parent).items() if limit < getattr(cost, name)}
        if over:
            plan = plan.then(fill(small, others, budget.bounded(over)), spec)
            cost = budget.cost(plan.child(spec))
    except BudgetError as problem:
        return problem
    spent = budget.spent(cost, parent)
    if not budget.admits(cost, parent) or (budget.latency is None and spent < 1 - SLACK):
        return None
    if spent < 1 - SLACK:  # times come in steps: it may be that nothing spends them
        return (1, -spent), plan
    inside = sum(_lost(spec, plan, ranked).values())
    stream = sum(
        0.0 if kept is None else float(values.sum() - values[list(kept)].sum())
        for kept, values in zip(plan.widths(), streams.values(), strict=True)
    )
    if by == "score":
        inside /= max(sum(map(len, ranked.values())), 1)
        stream /= max(sum(map(len, streams.values())), 1)
    return (0, inside + stream), plan


def _lost(spec: Spec, plan: Plan, ranked: Mapping[str, Array]) -> dict[str, float]:
    """Return the sum of the scores of the channels that a plan cuts from each axis of the blocks."""
    lost: dict[str, float] = {}
    for (path, _, block), decision in zip(spec.blocks(), plan.blocks(), strict=True):
        groups: dict[str, tuple[tuple[int, ...], tuple[Kept, ...]]] = {}
        if isinstance(block.mixer, Attention):
            qk, v = decision.heads(block.mixer)
            groups = {"qk": (block.mixer.qk, qk), "v": (block.mixer.v, v)}
        if decision.hidden is not None and block.hidden:
            groups["hidden"] = ((block.hidden,), (decision.hidden,))
        for name, (sizes, kept) in groups.items():
            values = ranked.get(f"{path}.{name}")
            if values is None:
                continue
            starts = np.cumsum([0, *sizes[:-1]])
            places = [int(start) + i for start, own in zip(starts, kept, strict=True) for i in own]
            lost[f"{path}.{name}"] = float(values.sum() - values[places].sum())
    return lost
