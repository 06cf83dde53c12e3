"""Choose the widths of every block from a score for every channel, so that the model fits a budget as well as possible.

H heads, K channels of a head, M hidden neurons.

For every width that is chosen independently there is a *ladder* of allowed widths. Each rung removes a few channels,
those with the lowest scores, and saves some cost. `vitrim.cut.spend` spends the budget on them. Savings are
proportional to the number of channels, so a list of 46,000 rungs (DeiT-B) takes about a second.
"""

import functools
import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from torch import Tensor

from vitrim.cut.fill_width import best_of, fill_with_width
from vitrim.cut.ladders import ALIGN, Choice, Widths, hidden_rate, ladders_of
from vitrim.cut.spend import Array, Ladders, spend
from vitrim.words.budget import SLACK, Budget, Price
from vitrim.words.errors import MethodError
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Attention, Spec

__all__ = ["ALIGN", "Choice", "Scored", "fill", "quantiles"]


def fill(
    spec: Spec,
    scores: Mapping[str, Tensor],
    budget: Budget,
    *,
    choice: Choice = "even",
    by: Literal["score", "density"] = "density",
) -> Plan:
    """Choose what to keep so that the child is within `budget`, never over and at most 2 % under.

    Args:
        spec: the parent.
        scores: by path of an axis (``stages.0.blocks.3.hidden``, ``….qk``, ``….v``, ``stages.0.width``), one number for
            each channel, all heads concatenated; larger is more valuable. An axis without scores is not cut.
        budget: upper bounds on the cost of the child.
        choice: which widths are allowed.
        by: order of rungs. ``density``: by lost score for each saved share of the budget, for scores that are additive
            (an estimate of the loss). ``score``: by the mean score only, for ranks; where time is bounded, as
            ``density``.

    Returns:
        A plan whose child is within `budget`. In each head and MLP the channels with the highest scores are kept.

    Raises:
        BudgetError: if the budget cannot be reached; the message names the smallest possible.
        MethodError: if a score is not finite or scores do not fit the axes.
    """
    return spend(spec, Scored(scores, choice=choice, by=by), budget)


class Scored(Ladders[Widths]):
    """Channels with a score each: those with the lowest scores are cut first.

    Args:
        scores: see `fill`.
        choice: see `fill`.
        by: see `fill`.
    """

    def __init__(
        self,
        scores: Mapping[str, Tensor],
        *,
        choice: Choice = "even",
        by: Literal["score", "density"] = "density",
    ) -> None:
        self.scores, self.choice, self.by = scores, choice, by
        self.ranked = {path: values.detach().cpu().double().numpy() for path, values in scores.items()}

    def spent(self, spec: Spec, budget: Budget) -> Plan:
        """See `Options.spent`; if residual streams have scores, their widths are chosen, too."""
        if not any(path.endswith(".width") for path in self.scores):
            return super().spent(spec, budget)
        rest = functools.partial(fill, choice=self.choice, by=self.by)
        return fill_with_width(spec, self.scores, budget, rest, self.by)

    def ladders(self, spec: Spec, budget: Budget) -> list[Widths]:
        """See `Ladders.ladders`.

        Raises:
            MethodError: if a score is not finite or scores do not fit the axes.
        """
        return list(ladders_of(spec, _checked(spec, self.scores), self.choice, budget))

    def row(self, ladders: Sequence[Widths], need: Array) -> list[tuple[int, int]]:
        """See `Ladders.row`."""
        return _row(ladders, need, self.by)

    def plan(self, spec: Spec, ladders: Sequence[Widths]) -> Plan:
        """See `Ladders.plan`."""
        return _plan(spec, ladders, self.ranked)

    def finished(self, spec: Spec, ladders: Sequence[Widths], budget: Budget) -> Plan:
        """See `Ladders.finished`: single neurons are restored."""
        plan = self.plan(spec, ladders)
        # First as many as steps of 8 may leave out. What is left then, savings did not foresee: the last head of a
        # block takes more along than the others.
        for most in (ALIGN - 1, sys.maxsize):
            plan = _top_up(spec, plan, self.ranked, budget, most)
        return plan


def quantiles(scores: Mapping[str, Tensor], kinds: Mapping[str, str]) -> dict[str, Tensor]:
    """Return, for each score, its position in the ranking of its kind, from 0 to 1.

    With quantiles as scores, `fill` keeps the same share of every kind. The ViT-Slim paper sets its budgets this way
    (sec. 2.3 of its text: one list for each kind, over all blocks). Ties keep the order of the axes.

    Args:
        scores: by path of an axis.
        kinds: by path of an axis, the name of the list in which it is ranked.
    """
    ranked: dict[str, Tensor] = {}
    for kind in sorted(set(kinds.values())):
        paths = [path for path in scores if kinds[path] == kind]
        flat = np.concatenate([scores[path].cpu().double().numpy() for path in paths])
        places = np.empty(len(flat))
        places[np.argsort(flat, kind="stable")] = (np.arange(len(flat)) + 0.5) / len(flat)
        start = 0
        for path in paths:
            size = scores[path].numel()
            ranked[path] = scores[path].new_tensor(places[start : start + size]).double()
            start += size
    return ranked


def _checked(spec: Spec, scores: Mapping[str, Tensor]) -> dict[str, list[Array]]:
    """Return the scores of each axis as one array for each head, after checking sizes and values."""
    groups: dict[str, tuple[int, ...]] = {}
    for path, _, block in spec.blocks():
        if isinstance(block.mixer, Attention):
            groups |= {f"{path}.qk": block.mixer.qk, f"{path}.v": block.mixer.v}
        if block.hidden:
            groups[f"{path}.hidden"] = (block.hidden,)
    split: dict[str, list[Array]] = {}
    for path, values in scores.items():
        array: Array = values.detach().cpu().double().numpy().reshape(-1)
        if path not in groups or len(array) != sum(groups[path]):
            raise MethodError(f"{path}: scores must fit an axis of the model, but got {len(array)} values")
        if not np.isfinite(array).all():
            raise MethodError(f"{path}: scores must be finite, but some are NaN or infinite; check weights and data")
        split[path] = np.split(array, np.cumsum(groups[path])[:-1])
    return split


def _row(ladders: Sequence[Widths], need: Array, by: str) -> list[tuple[int, int]]:
    """Return all rungs as (ladder, rung), the least valuable first; a rung always comes after the one above it.

    Where time is bounded, ranks are added up as scores are: a thinner branch may save no time, a whole branch does.
    """
    timed = need[Price._fields.index("latency")] > 0
    weights = np.maximum(need, 0) / max(float(np.maximum(need, 0).max()), 1.0)
    keys: list[tuple[float, int, int]] = []
    for number, ladder in enumerate(ladders):
        if by == "density" or timed:
            lost = [value * _channels(ladder, rung) for rung, value in enumerate(ladder.values)]
            worth = _pooled(lost, [max(float(np.dot(weights, saves)), 0.0) for saves in ladder.saves])
        else:
            worth = list(itertools.accumulate(ladder.values, max))
        keys += [(value, number, rung) for rung, value in enumerate(worth)]
    return [(number, rung) for _, number, rung in sorted(keys)]


def _pooled(lost: Sequence[float], saved: Sequence[float]) -> list[float]:
    """Return the ratio of lost score to saved cost of each rung, made non-decreasing.

    If the ratio of a rung is larger than that of the next one, both are pooled and get the ratio of their sums. For
    example, if only every fourth rung saves time, four rungs are pooled.
    """
    pools: list[tuple[float, float, int]] = []
    for loss, save in zip(lost, saved, strict=True):
        pool = (loss, save, 1)
        while pools and pools[-1][0] * pool[1] >= pool[0] * pools[-1][1]:
            pool = tuple(a + b for a, b in zip(pools.pop(), pool, strict=True))  # type: ignore[assignment]
        pools.append(pool)
    return [loss / max(save, 1e-30) for loss, save, count in pools for _ in range(count)]


def _channels(ladder: Widths, rung: int) -> int:
    (a, b), (c, d) = ladder.widths[rung], ladder.widths[rung + 1]
    return (a - c + b - d) * len(ladder.heads)


def _plan(spec: Spec, ladders: Sequence[Widths], ranked: Mapping[str, Array]) -> Plan:
    attention: dict[int, dict[int, tuple[int, int]]] = {}
    hidden: dict[int, int] = {}
    for ladder in ladders:
        if not ladder.level:
            continue
        width = ladder.widths[ladder.level]
        if ladder.field == "hidden":
            hidden[ladder.block] = width[1]
        else:
            attention.setdefault(ladder.block, {}).update(dict.fromkeys(ladder.heads, width))
    blocks = []
    for index, (path, _, block) in enumerate(spec.blocks()):
        fields: dict[str, object] = {}
        if index in attention and isinstance(block.mixer, Attention):
            fields = _heads(block.mixer, attention[index], ranked, path)
        if index in hidden:
            fields["hidden"] = best_of(ranked[f"{path}.hidden"], hidden[index])
        blocks.append(BlockPlan.model_validate(fields))
    return Plan.of(spec, blocks)


def _heads(
    mixer: Attention, widths: Mapping[int, tuple[int, int]], ranked: Mapping[str, Array], path: str
) -> dict[str, object]:
    kept: dict[str, object] = {}
    for place, (name, sizes) in enumerate((("qk", mixer.qk), ("v", mixer.v))):
        flat = ranked.get(f"{path}.{name}", np.zeros(sum(sizes)))
        parts = np.split(flat, np.cumsum(sizes)[:-1])
        kept[name] = tuple(
            best_of(part, widths[head][place]) if head in widths else tuple(range(len(part)))
            for head, part in enumerate(parts)
        )
    return kept


def _top_up(spec: Spec, plan: Plan, ranked: Mapping[str, Array], budget: Budget, most: int) -> Plan:
    """Restore single neurons, at most `most` in a block, if more than the slack of the budget is unused."""
    parent = budget.cost(spec)
    limits = budget.limits(parent)
    blocks = plan.blocks()
    for index, ((path, stage, block), arriving) in enumerate(zip(spec.blocks(), spec.arrivals(), strict=True)):
        cost = budget.cost(Plan.of(spec, blocks).child(spec))
        if budget.spent(cost, parent) >= 1 - SLACK:
            break
        kept = blocks[index].hidden
        if kept is None or not block.hidden:
            continue
        rate = hidden_rate(stage, block, arriving, budget)(0, 1, 0)
        room = [
            (limits[name] - getattr(cost, name)) // max(int(step), 1)
            for name, step in zip(Price._fields, rate, strict=True)
            if name in limits
        ]
        more = min(block.hidden - len(kept), most, *room)
        if more > 0 and kept:
            better = best_of(ranked[f"{path}.hidden"], len(kept) + more)
            blocks[index] = blocks[index].model_copy(update={"hidden": better})
    return Plan.of(spec, blocks)
