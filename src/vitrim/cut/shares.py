"""Keep a share of a list, with exact counts even if scores are equal, and sets of tokens that shrink with depth.

L blocks, N positions of each, n entries of a list.

Source: Chavan et al., "Vision Transformer Slimming", CVPR 2022, arXiv 2201.00814, section 3.3 (ranking, token
consistency), and the authors' code where the two differ.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vitrim.words.budget import SLACK, Budget
from vitrim.words.costs import Cost, block_cost, cost_of
from vitrim.words.errors import BudgetError, MethodError
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Attention, Block, Spec
from vitrim.words.steps import Step

__all__ = [
    "Rule",
    "check_shares",
    "check_spent",
    "consistent",
    "give_back",
    "kept_count",
    "largest",
    "remains",
    "share_plan",
    "top",
    "with_tokens",
]

Rule = Literal["suffix_or", "prefix_and"]
"""``suffix_or``: a position that a block keeps is also kept in all blocks before it. This is the authors' code, and the
only rule that agrees with the costs in the paper. ``prefix_and``: a position that a block cuts is also cut in all
blocks after it. This is the text of the paper."""


def kept_count(size: int, share: float) -> int:
    """Return the number of entries that a share in [0, 1] keeps of n = `size`: ``n - int((1 - share) n)``."""
    return size - int((1 - share) * size)


def top(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Return boolean masks of the `count` largest entries of all lists together; of equal entries the first are kept.

    The authors' code keeps all entries that equal the threshold, so it would not cut new gates, which are all 1. The
    result for a smaller count is a subset of that for a larger count.

    Raises:
        MethodError: if a score is not finite.
    """
    if not scores:
        return {}
    flat = torch.cat([values.detach().cpu().double().flatten() for values in scores.values()])
    if not bool(torch.isfinite(flat).all()):
        raise MethodError("scores must be finite, but some are NaN or infinite; check weights and learning rate")
    keep = torch.zeros(len(flat), dtype=torch.bool)
    keep[torch.argsort(flat, descending=True, stable=True)[:count]] = True
    return dict(zip(scores, torch.split(keep, [values.numel() for values in scores.values()]), strict=True))


def consistent(keep: Tensor, rule: Rule) -> Tensor:
    """Make the sets of kept positions shrink with depth.

    Args:
        keep: positions that each block would keep on its own, boolean ``(L, N)``.
        rule: see `Rule`.

    Returns:
        ``(L, N)``; each row is a subset of the row before it.
    """
    counted = keep.int()
    if rule == "prefix_and":
        return counted.cummin(dim=0).values.bool()
    return counted.flip(0).cummax(dim=0).values.flip(0).bool()


def largest(high: int, fits: Callable[[int], bool]) -> int:
    """Return the largest count in ``[0, high]`` for which `fits` is true; 0 if there is none.

    If `fits` is true for a count, it must be true for all smaller counts.
    """
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def give_back(
    scores: Mapping[str, Tensor], keep: Mapping[str, Tensor], spent: Callable[[Mapping[str, Tensor]], float]
) -> dict[str, Tensor]:
    """Keep additional single entries, the best first, until the budget is used except for the slack.

    In small models, the next entry may cost more than the slack while a later entry fits. In DeiT-S, one entry is at
    most 0.5 % of all pairs, so nothing is changed.

    Args:
        scores: by path.
        keep: boolean masks of the kept entries, by path.
        spent: function that returns the share of the budget that a choice uses.
    """
    names, sizes = list(scores), [values.numel() for values in scores.values()]
    flat = torch.cat([values.detach().cpu().double().flatten() for values in scores.values()])
    kept = torch.cat(list(keep.values()))

    def named(chosen: Tensor) -> dict[str, Tensor]:
        return dict(zip(names, torch.split(chosen, sizes), strict=True))

    for entry in torch.argsort(flat, descending=True, stable=True).tolist():
        if spent(named(kept)) >= 1 - SLACK:
            break
        more = kept.clone()
        more[entry] = True
        kept = more if spent(named(more)) <= 1 else kept
    return named(kept)


def share_plan(spec: Spec, scores: Mapping[str, Tensor], kinds: Mapping[str, str], shares: Mapping[str, float]) -> Plan:
    """Return the plan that keeps exactly a share of each kind, ranked over all blocks (section 3.3 of the paper).

    Args:
        spec: the parent.
        scores: by path of an axis. Queries and keys are cut together with their values because they share a gate. If a
            norm ties them, they are cut only with their whole head.
        kinds: by path, ``attention``, ``mlp`` or ``width``.
        shares: by kind; kinds without a share are not cut.
    """
    keep: dict[str, Tensor] = {}
    for kind, share in shares.items():
        mine = {path: scores[path] for path in scores if kinds[path] == kind and not path.endswith(".qk")}
        keep |= top(mine, kept_count(sum(values.numel() for values in mine.values()), share))
    for path in (path for path in keep if path.endswith(".width")):
        keep[path][int(scores[path].argmax())] = True  # a stage cannot lose its last channel
    blocks = []
    for path, stage, block in spec.blocks():
        fields: dict[str, Any] = {}
        if f"{path}.v" in keep and isinstance(block.mixer, Attention):
            fields["v"] = _by_head(keep[f"{path}.v"], block.mixer.v)
            if f"{path}.qk" in scores and not stage.form.ties_qk:
                fields["qk"] = fields["v"]
        if f"{path}.hidden" in keep:
            fields["hidden"] = tuple(keep[f"{path}.hidden"].nonzero().flatten().tolist())
        blocks.append(BlockPlan(**fields))
    widths = [keep.get(f"stages.{index}.width") for index in range(len(spec.stages))]
    return Plan.of(spec, blocks, [None if one is None else tuple(one.nonzero().flatten().tolist()) for one in widths])


def _by_head(keep: Tensor, widths: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(head.nonzero().flatten().tolist()) for head in torch.split(keep, list(widths)))


def with_tokens(spec: Spec, plan: Plan, steps: Mapping[str, Step]) -> Plan:
    """Return `plan` with token steps, given by path (``stages.0.blocks.3.tokens``)."""
    decided = [
        block.model_copy(update={"tokens": steps.get(f"{path}.tokens")})
        for (path, _, _), block in zip(spec.blocks(), plan.blocks(), strict=True)
    ]
    return Plan.of(spec, decided, plan.widths())


def remains(spec: Spec, child: Spec, nominal: Mapping[str, float]) -> tuple[dict[str, Any], ...]:
    """Return the remaining shares of channels, neurons and tokens of every block, as flat records.

    Args:
        spec: the parent.
        child: the spec of the smaller model.
        nominal: by path, the share of tokens that the block would keep on its own.
    """
    records = []
    for (path, stage, before), (_, _, after), flow in zip(spec.blocks(), child.blocks(), child.flows(), strict=True):
        heads = [block.mixer.v if isinstance(block.mixer, Attention) else () for block in (before, after)]
        records.append(
            {
                "path": path,
                "attention": sum(heads[1]) / max(sum(heads[0]), 1),
                "mlp": (after.hidden or 0) / max(before.hidden or 0, 1),
                "tokens_nominal": nominal.get(f"{path}.tokens", 1.0),
                "tokens": (flow.rows - stage.prefix) / stage.patches,
            }
        )
    return tuple(records)


def check_shares(
    spec: Spec, kinds: Mapping[str, str], shares: Mapping[str, float], budget: Budget, tokens: bool = False
) -> None:
    """Raise if the shares cannot fit `budget` for any ranking; to be called before a search that takes hours.

    In a plain ViT every channel of a kind costs the same, so the check is exact. If stages differ, the bounds are
    computed from the least and the most expensive channels. A budget of latency is not checked.

    Args:
        spec: the parent.
        kinds: by path of an axis, ``attention``, ``mlp`` or ``width``; axes that are not listed are not cut.
        shares: kept share by kind; a kind without a share may keep everything or nothing.
        budget: upper bounds on the cost of the child.
        tokens: whether tokens may be cut, too, in any number.

    Raises:
        BudgetError: if the shares always cost more than the budget.
        MethodError: if they always leave more than the slack of the budget unused.
    """
    if budget.latency is not None or not shares:
        return
    parent = budget.cost(spec)
    limits = budget.limits(parent)
    least, most = _reach(spec, kinds, shares, tokens)
    if "width" in kinds.values():
        least = Cost(0, 0)  # every cost depends on the width, which the shares leave open
    said = ", ".join(f"{kind}={share:g}" for kind, share in shares.items())
    for name, limit in limits.items():
        if getattr(least, name) > limit:
            raise BudgetError(
                f"budget of {name} must be at least {getattr(least, name):,}, what the shares {said} keep, but is "
                f"{limit:,}; raise it, lower a share, or leave one out"
            )
    if budget.spent(most, parent) < 1 - SLACK:
        raise MethodError(
            f"the shares {said} must spend at least {1 - SLACK:.0%} of {budget}, but can spend no more than "
            f"{budget.spent(most, parent):.1%}; raise a share, leave one out, or lower the budget"
        )


def _reach(spec: Spec, kinds: Mapping[str, str], shares: Mapping[str, float], tokens: bool) -> tuple[Cost, Cost]:
    """Return the smallest and the largest cost of children with these shares."""
    rates: dict[str, list[np.ndarray[Any, np.dtype[np.int64]]]] = {}
    whole = np.array(cost_of(spec))
    gone = np.zeros(2, dtype=np.int64)
    for (path, stage, block), arriving in zip(spec.blocks(), spec.arrivals(), strict=True):
        cost = np.array(block_cost(block, stage, arriving))
        both = f"{path}.qk" in kinds and not stage.form.ties_qk
        for axis, size in ((f"{path}.v", _channels(block)), (f"{path}.hidden", block.hidden or 0)):
            if axis in kinds and size:
                rate = np.array(block_cost(_wider(block, axis, both), stage, arriving)) - cost
                rates.setdefault(kinds[axis], []).append(np.tile(rate, (size, 1)))
                # A branch without channels has no norm and no other parameters, either.
                gone += cost - size * rate - np.array(block_cost(_without(block, axis), stage, arriving))
    least, most = whole - gone, whole
    for kind, parts in rates.items():
        each = np.sort(np.concatenate(parts), axis=0)
        count = kept_count(len(each), shares.get(kind, 0.0))
        least = least - each[count:].sum(axis=0)
        if kind in shares:
            most = most - each[: len(each) - count].sum(axis=0)
    return Cost(spec.host.macs if tokens else int(least[0]), int(least[1])), Cost(int(most[0]), int(most[1]))


def _channels(block: Block) -> int:
    return sum(block.mixer.v) if isinstance(block.mixer, Attention) else 0


def _wider(block: Block, axis: str, both: bool) -> Block:
    """Return `block` with one more neuron or value channel, and if `both` is true one more query and key channel."""
    if axis.endswith(".hidden"):
        return block.model_copy(update={"hidden": (block.hidden or 0) + 1})
    assert isinstance(block.mixer, Attention)
    (qk, *queries), (v, *values) = block.mixer.qk, block.mixer.v
    mixer = block.mixer.model_copy(update={"qk": (qk + both, *queries), "v": (v + 1, *values)})
    return block.model_copy(update={"mixer": mixer})


def _without(block: Block, axis: str) -> Block:
    """Return `block` without any channels of an axis."""
    if axis.endswith(".hidden"):
        return block.model_copy(update={"hidden": 0})
    return block.model_copy(update={"mixer": block.mixer.model_copy(update={"qk": (), "v": ()})})


def check_spent(child: Spec, spec: Spec, budget: Budget, choice: str) -> None:
    """Raise if a child of `spec` is over `budget`, or more than the slack under it.

    Args:
        child: the spec of the smaller model.
        spec: the parent.
        budget: upper bounds on the cost of the child.
        choice: the setting for the allowed widths, for messages.

    Raises:
        BudgetError: if the child costs more; the message names the smallest bound that would be met.
        MethodError: if the child costs too little; the message names the share of the budget that it uses.
    """
    parent, cost = budget.cost(spec), budget.cost(child)
    for name, limit in budget.limits(parent).items():
        if getattr(cost, name) > limit:
            raise BudgetError(
                f"budget of {name} must be at least {getattr(cost, name):,}, what the shares keep, but is {limit:,}; "
                "raise it, lower a share, or leave one out"
            )
    # Latency changes in steps, so whether a child uses a budget of latency is measured on the child itself.
    if budget.latency is None and budget.spent(cost, parent) < 1 - SLACK:
        raise MethodError(
            f"what is kept must spend at least {1 - SLACK:.0%} of {budget}, but spends "
            f"{budget.spent(cost, parent):.1%}; leave out a share"
            + ("" if choice == "free" else ", or choose finer widths with method.choice=free")
        )
