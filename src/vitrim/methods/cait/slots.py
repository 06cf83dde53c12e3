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

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vitrim.words.budget import SLACK
from vitrim.words.costs import Cost, block_cost, cost_of
from vitrim.words.errors import BudgetError, MethodError
from vitrim.words.plan import BlockPlan, Kept, Plan
from vitrim.words.spec import Attention, Block, Spec, Stage
from vitrim.words.steps import Tokens

__all__ = ["Rules", "SlotLadder", "allocate_slots", "ladders_of", "masks_of", "plan_of", "row_of", "spend", "top_up"]


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
class SlotLadder:
    """The slots of one width that is chosen independently.

    Attributes:
        block: number of the block.
        orders: by path of an axis, each head's channels, the best first.
        scores: score of each slot, the best first; non-increasing.
        saves: (macs, params) of each slot.
        widths: the widths to choose from, decreasing.
        kept: number of slots that are kept.
    """

    block: int
    orders: dict[str, list[Tensor]]
    scores: list[float]
    saves: list[tuple[int, int]]
    widths: list[int]
    kept: int = field(default=0)


def ladders_of(spec: Spec, scores: Mapping[str, Tensor], rules: Rules) -> list[SlotLadder]:
    """Return all slots of a model, with everything kept.

    Args:
        spec: the model, with the token steps that its costs are computed with.
        scores: by path of an axis, one number for each channel, heads concatenated. An axis without scores is not cut.
        rules: see `Rules`.

    Raises:
        MethodError: if a score is not finite or scores do not fit their axis.
    """
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
                ladders.append(_ladder(index, path, parts, unit, rules.group_attention, rules.floor_attention))
        if block.hidden and f"{path}.hidden" in scores:
            parts = {"hidden": _ranked(scores[f"{path}.hidden"], (block.hidden,), False, f"{path}.hidden")}
            unit = {"hidden": _unit(stage, block, arriving, "hidden")}
            ladders.append(_ladder(index, path, parts, unit, rules.group_mlp, rules.floor_mlp))
    return ladders


Ranked = tuple[list[Tensor], list[Tensor]]
"""Each head's channels, the best first, and their scores in that order."""


def _ranked(scores: Tensor, widths: tuple[int, ...], same: bool, at: str) -> Ranked:
    values = scores.detach().double().cpu().flatten()
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


def _ladder(
    index: int, path: str, parts: Mapping[str, Ranked], unit: Mapping[str, tuple[int, int]], group: int, floor: int
) -> SlotLadder:
    """Build the slots of one width; a narrower head contributes nothing to slots beyond its width."""
    size = max(len(head) for _, values in parts.values() for head in values)
    scores, saves = [], []
    for rank in range(size):
        heads = [(name, head) for name, (_, values) in parts.items() for head in values if rank < len(head)]
        scores.append(sum(float(head[rank]) for _, head in heads))
        saves.append((sum(unit[name][0] for name, _ in heads), sum(unit[name][1] for name, _ in heads)))
    steps = range(math.ceil(size / group) - 1, 0, -1)
    widths = [size, *(step * group for step in steps if step * group >= min(floor, size))]
    orders = {f"{path}.{name}": orders for name, (orders, _) in parts.items()}
    return SlotLadder(block=index, orders=orders, scores=scores, saves=saves, widths=widths, kept=size)


def spend(ladders: list[SlotLadder], row: list[tuple[int, int]], cost: Cost, limits: Mapping[str, float]) -> Cost:
    """Remove groups until `cost` is within `limits`.

    Args:
        ladders: the slots, with everything kept; their `kept` is set.
        row: the groups in order of removal, see `row_of`.
        cost: cost of the model with everything kept.
        limits: limits of macs, params or both.

    Returns:
        The cost of the kept slots. If any group was removed, it is above the limit minus the most expensive group.

    Raises:
        BudgetError: naming the least possible cost, if the model with the smallest widths exceeds a limit.
    """
    rest = list(cost)
    for number, rung in row:
        if _within(rest, limits):
            break
        ladder = ladders[number]
        gone = ladder.saves[ladder.widths[rung + 1] : ladder.widths[rung]]
        rest = [value - sum(each[place] for each in gone) for place, value in enumerate(rest)]
        ladder.kept = ladder.widths[rung + 1]
    if not _within(rest, limits):
        name = next(name for name, limit in limits.items() if getattr(Cost(*rest), name) > limit)
        raise BudgetError(
            f"budget of {name} must be at least {getattr(Cost(*rest), name):,}, the cost with the smallest widths, "
            f"but got {limits[name]:,.0f}; allow more, lower method.floor_attention and floor_mlp, or merge more"
        )
    return Cost(*rest)


def _within(cost: list[int], limits: Mapping[str, float]) -> bool:
    return all(cost[Cost._fields.index(name)] <= limit for name, limit in limits.items())


def row_of(ladders: list[SlotLadder], names: Iterable[str], cost: Cost, rules: Rules) -> list[tuple[int, int]]:
    """Return all groups as (ladder, group), the least valuable first; ties: deeper blocks first, MLP before attention.

    Args:
        ladders: see `ladders_of`.
        names: the limited costs: macs, params or both.
        cost: cost of the model with everything kept.
        rules: see `Rules`.
    """
    limited = [(Cost._fields.index(name), getattr(cost, name)) for name in names]
    keys: list[tuple[float, int, bool, int, int]] = []
    for number, ladder in enumerate(ladders):
        highest = -math.inf
        attention = not any(path.endswith(".hidden") for path in ladder.orders)
        for rung in range(len(ladder.widths) - 1):
            slots = slice(ladder.widths[rung + 1], ladder.widths[rung])
            worth = sum(ladder.scores[slots])
            if rules.by_cost:
                share = sum(each[place] / whole for each in ladder.saves[slots] for place, whole in limited)
                worth /= max(share, 1e-30)
            highest = max(highest, worth)
            keys.append((highest, -ladder.block, attention, rung, number))
    return [(number, rung) for *_, rung, number in sorted(keys)]


def top_up(ladders: list[SlotLadder], cost: Cost, limits: Mapping[str, float]) -> Cost:
    """Add single slots back, the most valuable first, if removing whole groups left more than the slack unused."""
    rest = list(cost)

    def short() -> bool:
        return all(rest[Cost._fields.index(name)] < (1 - SLACK) * limit for name, limit in limits.items())

    while short():
        room: list[tuple[float, int, SlotLadder, list[int]]] = []
        for ladder in ladders:
            if ladder.kept < ladder.widths[0]:
                more = [value + add for value, add in zip(rest, ladder.saves[ladder.kept], strict=True)]
                if _within(more, limits):
                    worth = ladder.scores[ladder.kept] / max(ladder.saves[ladder.kept][0], 1)
                    room.append((worth, -len(room), ladder, more))
        if not room:
            break
        _, _, best, rest = max(room, key=lambda each: each[:2])
        best.kept += 1
    return Cost(*rest)


def masks_of(ladders: list[SlotLadder]) -> dict[str, Tensor]:
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
) -> dict[str, Tensor]:
    """Return the masks of the channels to keep within `limits`.

    Args:
        spec: the model with everything kept, used to count costs.
        scores: see `ladders_of`.
        limits: limits of macs, params or both.
        rules: see `Rules`.
        ranked_at: the model whose costs rank the groups, if not `spec`.
        fine: whether single slots are added back if groups leave more than the slack unused.

    Raises:
        BudgetError: see `spend`.
        MethodError: see `ladders_of`.
    """
    ladders, cost = ladders_of(spec, scores, rules), cost_of(spec)
    priced = ladders if ranked_at is None else ladders_of(ranked_at, scores, rules)
    row = row_of(priced, limits, cost, rules)
    rest = spend(ladders, row, cost, limits)
    if fine:
        top_up(ladders, rest, limits)
    return masks_of(ladders)
