"""Choose widths from scores so that every head of a block keeps the same number of channels.

H heads, K channels of a head, M hidden neurons, N tokens at a block, D width.

In each head the channels are sorted, the best first. The r-th channels of all heads of a block, of queries and keys and
of values, are its *slot* r; each neuron is one slot. Slots are removed in groups, the last ones first. So heads keep
equal widths, and each keeps the best of its own channels for any scores. All groups of all blocks are sorted by score
per cost saved, and as many are removed from the front as the budget needs. The order does not depend on the budget, so
the channels kept for a smaller budget are a subset of those kept for a larger one.

Source: our reading of CAIT (arXiv 2309.15755) and of the group's published pruning code; the paper's own method section
could not be read.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from vitrim.cut.spend import Array, Ladder, Ladders, spend_ladders
from vitrim.words.budget import SLACK, Budget, Price
from vitrim.words.costs import block_cost
from vitrim.words.errors import MethodError
from vitrim.words.plan import BlockPlan, Kept, Plan
from vitrim.words.spec import Attention, Block, Spec, Stage
from vitrim.words.steps import Tokens

__all__ = ["Rules", "SlotLadder", "Slots", "allocate_slots", "ladders_of", "masks_of", "plan_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """How slots are formed and removed.

    Attributes:
        group_attention, group_mlp: number of slots that are removed together.
        floor_attention, floor_mlp: least number of slots to keep.
        by_cost: whether groups are ranked by score per multiply-accumulate saved, or by score alone.
        equal_qkv: whether a head's queries, keys and values keep the same width.
        same_index: whether all heads keep the same channels.
    """

    group_attention: int = 8
    group_mlp: int = 32
    floor_attention: int = 8
    floor_mlp: int = 32
    by_cost: bool = True
    equal_qkv: bool = True
    same_index: bool = False


@dataclass(slots=True, kw_only=True)
class SlotLadder(Ladder):
    """The slots of one width that is chosen independently.

    Attributes:
        block: number of the block.
        orders: by path of an axis, each head's channels, the best first.
        scores: score of each slot, the best first; non-increasing.
        units: (macs, params) of each slot.
        widths: the widths to choose from, decreasing.
        more: number of single slots that are kept in addition to the width.
    """

    block: int
    orders: dict[str, list[Tensor]]
    scores: list[float]
    units: list[tuple[int, int]]
    widths: list[int]
    more: int = 0

    @property
    def kept(self) -> int:
        """Return the number of slots that are kept."""
        return self.widths[self.level] + self.more


def ladders_of(
    spec: Spec, scores: Mapping[str, Tensor], rules: Rules, budget: Budget | None = None
) -> list[SlotLadder]:
    """Return all slots of a model, with everything kept.

    Args:
        spec: the model, with the token steps that its costs are computed with.
        scores: by path of an axis, one number for each channel, heads concatenated. An axis without scores is not cut.
        rules: see `Rules`.
        budget: a budget with the table of times; None for none.

    Raises:
        MethodError: if a score is not finite or scores do not fit their axis.
    """
    prices = budget or Budget()
    ladders = []
    for index, ((path, stage, block), arriving) in enumerate(zip(spec.blocks(), spec.arrivals(), strict=True)):
        if isinstance(block.mixer, Attention):
            axes = {"qk": block.mixer.qk, "v": block.mixer.v}
            known = [name for name in axes if f"{path}.{name}" in scores]
            teams = [known] if rules.equal_qkv else [[name] for name in known]
            for team in filter(None, teams):
                parts = {
                    name: _ranked(scores[f"{path}.{name}"], axes[name], rules.same_index, f"{path}.{name}")
                    for name in team
                }
                unit = {name: _unit(stage, block, arriving, name) for name in team}
                time = _time(stage, block, arriving, team, prices)
                ladders.append(_ladder(index, path, parts, unit, time, rules.group_attention, rules.floor_attention))
        if block.hidden and f"{path}.hidden" in scores:
            parts = {"hidden": _ranked(scores[f"{path}.hidden"], (block.hidden,), False, f"{path}.hidden")}
            unit = {"hidden": _unit(stage, block, arriving, "hidden")}
            time = _time(stage, block, arriving, ["hidden"], prices)
            ladders.append(_ladder(index, path, parts, unit, time, rules.group_mlp, rules.floor_mlp))
    return ladders


Ranked = tuple[list[Tensor], list[Tensor]]
"""Each head's channels, the best first, and their scores in that order."""


def _ranked(scores: Tensor, widths: tuple[int, ...], same: bool, at: str) -> Ranked:
    values = scores.detach().cpu().double().flatten()
    if len(values) != sum(widths):
        raise MethodError(f"{at}: scores must fit an axis of {sum(widths)} channels, but got {len(values)}")
    if not bool(torch.isfinite(values).all()):
        raise MethodError(f"{at}: scores must be finite, but some are not; lower method.train.lr or check the data")
    heads = list(torch.split(values, list(widths)))
    if same and len(set(widths)) == 1:
        order = torch.stack(heads).sum(dim=0).argsort(descending=True, stable=True)
        return [order] * len(heads), [head[order] for head in heads]
    orders = [head.argsort(descending=True, stable=True) for head in heads]
    return orders, [head[order] for head, order in zip(heads, orders, strict=True)]


def _unit(stage: Stage, block: Block, arriving: Tokens, name: str) -> tuple[int, int]:
    """Return (macs, params) of one channel of one head, or of one neuron; costs are linear in every width."""

    def cost(width: int) -> tuple[int, int]:
        if name == "hidden":
            return block_cost(block.model_copy(update={"hidden": width}), stage, arriving)
        assert isinstance(block.mixer, Attention)
        qk, v = (width if name == other else 1 for other in ("qk", "v"))
        mixer = Attention(qk=(qk,), v=(v,), scale=block.mixer.scale)
        return block_cost(block.model_copy(update={"mixer": mixer}), stage, arriving)

    one, two = cost(1), cost(2)
    return two[0] - one[0], two[1] - one[1]


def _time(stage: Stage, block: Block, arriving: Tokens, team: Sequence[str], budget: Budget) -> Callable[[int], int]:
    """Return a function from the number of kept slots to the nanoseconds of the block; 0 without a table."""

    def time(kept: int) -> int:
        if budget.table is None:
            return 0
        node = block
        if "hidden" in team:
            node = block.model_copy(update={"hidden": kept})
        elif isinstance(block.mixer, Attention):
            widths = {name: tuple(min(kept, width) for width in getattr(block.mixer, name)) for name in team}
            node = block.model_copy(update={"mixer": block.mixer.model_copy(update=widths)})
        return budget.block(node, stage, arriving).latency

    return time


def _ladder(
    index: int,
    path: str,
    parts: Mapping[str, Ranked],
    unit: Mapping[str, tuple[int, int]],
    time: Callable[[int], int],
    group: int,
    floor: int,
) -> SlotLadder:
    """Build the slots of one width; a narrower head contributes nothing to slots beyond its width."""
    size = max(len(head) for _, values in parts.values() for head in values)
    scores, units = [], []
    for rank in range(size):
        heads = [(name, head) for name, (_, values) in parts.items() for head in values if rank < len(head)]
        scores.append(sum(float(head[rank]) for _, head in heads))
        units.append((sum(unit[name][0] for name, _ in heads), sum(unit[name][1] for name, _ in heads)))
    steps = range(math.ceil(size / group) - 1, 0, -1)
    widths = [size, *(step * group for step in steps if step * group >= min(floor, size))]
    times = [time(width) for width in widths]
    saves = [
        np.array([*np.sum(units[less:more], axis=0), before - after], dtype=np.float64)
        for (more, before), (less, after) in itertools.pairwise(zip(widths, times, strict=True))
    ]
    orders = {f"{path}.{name}": orders for name, (orders, _) in parts.items()}
    return SlotLadder(block=index, orders=orders, scores=scores, units=units, widths=widths, saves=saves)


class Slots(Ladders[SlotLadder]):
    """Channels in slots, removed in groups. None is restored, so what a smaller budget keeps a larger one keeps too.

    Args:
        scores: see `ladders_of`.
        rules: see `Rules`.
        limits: limits of macs, params and nanoseconds; those that are not exceeded yet take part in the order.
        ranked_at: the model whose costs rank the groups; None for the one that is cut.
        fine: whether single slots are added back if groups leave more than the slack unused.
    """

    restores: ClassVar[bool] = False
    where: ClassVar[str] = ", the cost with the smallest widths"
    way_out: ClassVar[str] = "allow more, lower method.floor_attention and floor_mlp, or merge more"

    def __init__(
        self,
        scores: Mapping[str, Tensor],
        rules: Rules,
        limits: Mapping[str, float],
        *,
        ranked_at: Spec | None = None,
        fine: bool = False,
    ) -> None:
        self.scores, self.rules, self.limits = scores, rules, limits
        self.ranked_at, self.fine = ranked_at, fine
        self.priced: list[SlotLadder] | None = None
        self.whole = Price(1, 1, 1)

    def ladders(self, spec: Spec, budget: Budget) -> list[SlotLadder]:
        """See `Ladders.ladders`."""
        self.whole = budget.cost(spec)
        if self.ranked_at is not None:
            self.priced = ladders_of(self.ranked_at, self.scores, self.rules, budget)
        return ladders_of(spec, self.scores, self.rules, budget)

    def row(self, ladders: Sequence[SlotLadder], need: Array) -> list[tuple[int, int]]:
        """Return all groups, the least valuable first; ties: deeper blocks first, MLP before attention."""
        limited = [(Price._fields.index(name), getattr(self.whole, name)) for name in self.limits]
        keys: list[tuple[float, int, bool, int, int]] = []
        for number, ladder in enumerate(ladders if self.priced is None else self.priced):
            highest = -math.inf
            attention = not any(path.endswith(".hidden") for path in ladder.orders)
            for rung, saves in enumerate(ladder.saves):
                slots = slice(ladder.widths[rung + 1], ladder.widths[rung])
                worth = sum(ladder.scores[slots])
                if self.rules.by_cost:
                    share = sum(each[at] / whole for each in ladder.units[slots] for at, whole in limited if at < 2)
                    share += sum(float(saves[at]) / whole for at, whole in limited if at == 2)
                    worth /= max(share, 1e-30)
                highest = max(highest, worth)
                keys.append((highest, -ladder.block, attention, rung, number))
        return [(number, rung) for *_, rung, number in sorted(keys)]

    def plan(self, spec: Spec, ladders: Sequence[SlotLadder]) -> Plan:
        """See `Ladders.plan`."""
        return plan_of(spec, masks_of(ladders))

    def finished(self, spec: Spec, ladders: Sequence[SlotLadder], budget: Budget) -> Plan:
        """Return the plan, with single slots added back, the most valuable first."""
        for ladder in ladders:
            ladder.more = 0
        if self.fine and "latency" not in self.limits:
            self._top_up(ladders)
        return self.plan(spec, ladders)

    def _top_up(self, ladders: Sequence[SlotLadder]) -> None:
        saved = sum((each for ladder in ladders for each in ladder.saves[: ladder.level]), np.zeros(3))
        rest = [int(whole - gone) for whole, gone in zip(self.whole, saved, strict=True)]
        while all(getattr(Price(*rest), name) < (1 - SLACK) * limit for name, limit in self.limits.items()):
            room: list[tuple[float, int, SlotLadder, list[int]]] = []
            for ladder in ladders:
                if ladder.kept < ladder.widths[0]:
                    unit = ladder.units[ladder.kept]
                    more = [value + add for value, add in zip(rest, (*unit, 0), strict=True)]
                    if all(getattr(Price(*more), name) <= limit for name, limit in self.limits.items()):
                        room.append((ladder.scores[ladder.kept] / max(unit[0], 1), -len(room), ladder, more))
            if not room:
                break
            _, _, best, rest = max(room, key=lambda each: each[:2])
            best.more += 1


def masks_of(ladders: Sequence[SlotLadder]) -> dict[str, Tensor]:
    """Return, by path of an axis, 1 for each channel that is kept and 0 for the others, heads concatenated."""
    masks = {}
    for ladder in ladders:
        for path, orders in ladder.orders.items():
            masks[path] = torch.cat(
                [torch.zeros(len(order)).index_fill_(0, order[: ladder.kept], 1) for order in orders]
            )
    return masks


def plan_of(spec: Spec, masks: Mapping[str, Tensor], steps: Plan | None = None) -> Plan:
    """Return the plan that keeps the channels whose mask is 1.

    Args:
        spec: the parent.
        masks: masks by path of an axis.
        steps: a plan whose token steps are included.
    """
    decided = (steps or Plan.keep(spec)).blocks()
    blocks = []
    for (path, _, block), step in zip(spec.blocks(), decided, strict=True):
        fields: dict[str, tuple[Kept, ...] | Kept] = {}
        for name in ("qk", "v"):
            mask = masks.get(f"{path}.{name}")
            if mask is not None and isinstance(block.mixer, Attention) and not bool(mask.bool().all()):
                widths = block.mixer.qk if name == "qk" else block.mixer.v
                fields[name] = tuple(_places(head) for head in torch.split(mask, list(widths)))
        hidden = masks.get(f"{path}.hidden")
        if hidden is not None and not bool(hidden.bool().all()):
            fields["hidden"] = _places(hidden)
        blocks.append(BlockPlan.model_validate({**fields, "tokens": step.tokens}))
    return Plan.of(spec, blocks)


def _places(mask: Tensor) -> Kept:
    return tuple(int(place) for place in mask.nonzero().flatten())


def allocate_slots(
    spec: Spec,
    scores: Mapping[str, Tensor],
    limits: Mapping[str, float],
    rules: Rules,
    *,
    ranked_at: Spec | None = None,
    fine: bool = False,
    budget: Budget | None = None,
) -> dict[str, Tensor]:
    """Return the masks of the channels to keep within `limits`.

    Args:
        spec: the model with everything kept, used to count costs.
        scores: see `ladders_of`.
        limits: limits of macs, params, nanoseconds, or several of them.
        rules: see `Rules`.
        ranked_at: the model whose costs rank the groups, if not `spec`.
        fine: whether single slots are added back if groups leave more than the slack unused.
        budget: a budget with the table of times; None for none.

    Raises:
        BudgetError: naming the least possible cost, if the model with the smallest widths exceeds a limit.
        MethodError: see `ladders_of`.
    """
    prices = budget or Budget()
    whole = prices.cost(spec)
    over = prices.bounded({name: float(math.floor(v)) for name, v in limits.items() if v < getattr(whole, name)})
    slots = Slots(scores, rules, limits, ranked_at=ranked_at, fine=fine)
    return masks_of(spend_ladders(spec, slots, over)[1])
