"""Keep a share of a list: exact counts whatever is tied, and sets of tokens that only shrink with depth.

L blocks, N places of each, n entries of a list.

Source: Chavan et al., "Vision Transformer Slimming", CVPR 2022, arXiv 2201.00814, section 3.3 (ranking, token
consistency), and the authors' code where the two differ.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from vitrim.words.budget import SLACK, Budget
from vitrim.words.errors import BudgetError, MethodError
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Attention, Spec
from vitrim.words.steps import Step

__all__ = [
    "Rule",
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
"""``suffix_or``: a place that a later block keeps stays in all before it (the authors' code, and the only rule that the
paper's costs fit). ``prefix_and``: a place that a block cuts is gone from all after it (the paper's text)."""


def kept_count(size: int, share: float) -> int:
    """Entries of `size` that a share in [0, 1] keeps: ``n - int((1 - share) n)``."""
    return size - int((1 - share) * size)


def top(scores: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Which entries of all lists together are the `count` largest; of equal ones the first.

    The authors keep all that equal the threshold; fresh gates, all 1, would then not be cut at all. Sets for a smaller
    count lie inside those for a larger one.

    Raises:
        MethodError: if a score is not a number.
    """
    if not scores:
        return {}
    flat = torch.cat([values.detach().double().cpu().flatten() for values in scores.values()])
    if not bool(torch.isfinite(flat).all()):
        raise MethodError("scores must be finite, but some are NaN or infinite; check weights and learning rate")
    keep = torch.zeros(len(flat), dtype=torch.bool)
    keep[torch.argsort(flat, descending=True, stable=True)[:count]] = True
    return dict(zip(scores, torch.split(keep, [values.numel() for values in scores.values()]), strict=True))


def consistent(keep: Tensor, rule: Rule) -> Tensor:
    """Make sets shrink with depth.

    Args:
        keep: which places each block would keep by itself, boolean ``(L, N)``.
        rule: see `Rule`.

    Returns:
        ``(L, N)``; each row lies inside the row before it.
    """
    counted = keep.int()
    if rule == "prefix_and":
        return counted.cummin(dim=0).values.bool()
    return counted.flip(0).cummax(dim=0).values.flip(0).bool()


def largest(high: int, fits: Callable[[int], bool]) -> int:
    """The largest count in ``[0, high]`` that fits; 0 if none does. What fits must also fit with less."""
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def give_back(
    scores: Mapping[str, Tensor], keep: Mapping[str, Tensor], spent: Callable[[Mapping[str, Tensor]], float]
) -> dict[str, Tensor]:
    """Keep single entries more, the best first, until a budget is spent but for the slack.

    On small models the entry that comes next may cost more than the slack while one after it fits. On DeiT-S one entry
    is at most 0.5 % of all pairs, and nothing is done.

    Args:
        scores: by path.
        keep: what is kept, by path.
        spent: share of the budget that a choice takes.
    """
    names, sizes = list(scores), [values.numel() for values in scores.values()]
    flat = torch.cat([values.detach().double().cpu().flatten() for values in scores.values()])
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
    """Keep exactly a share of each kind's list, one list over all blocks (section 3.3 of the paper).

    Args:
        spec: the parent.
        scores: by path of an axis. Queries and keys go with their values, with which they share a gate, save where a
            norm ties them: they then go with their head.
        kinds: by path, ``attention`` or ``mlp``.
        shares: by kind; kinds without one are left alone.
    """
    keep: dict[str, Tensor] = {}
    for kind, share in shares.items():
        mine = {path: scores[path] for path in scores if kinds[path] == kind and not path.endswith(".qk")}
        keep |= top(mine, kept_count(sum(values.numel() for values in mine.values()), share))
    blocks = []
    for path, stage, block in spec.blocks():
        fields: dict[str, Any] = {}
        if f"{path}.v" in keep and isinstance(block.mixer, Attention):
            fields["v"] = _by_head(keep[f"{path}.v"], block.mixer.v)
            if f"{path}.qk" in scores and stage.form.head_norm is None:
                fields["qk"] = fields["v"]
        if f"{path}.hidden" in keep:
            fields["hidden"] = tuple(keep[f"{path}.hidden"].nonzero().flatten().tolist())
        blocks.append(BlockPlan(**fields))
    return Plan.of(spec, blocks)


def _by_head(keep: Tensor, widths: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(head.nonzero().flatten().tolist()) for head in torch.split(keep, list(widths)))


def with_tokens(spec: Spec, plan: Plan, steps: Mapping[str, Step]) -> Plan:
    """`plan` with token steps, by path (``stages.0.blocks.3.tokens``)."""
    decided = [
        block.model_copy(update={"tokens": steps.get(f"{path}.tokens")})
        for (path, _, _), block in zip(spec.blocks(), plan.blocks(), strict=True)
    ]
    return Plan.of(spec, decided)


def remains(spec: Spec, child: Spec, nominal: Mapping[str, float]) -> tuple[dict[str, Any], ...]:
    """What share of channels, neurons and tokens is left of every block, as flat records.

    Args:
        spec: the parent.
        child: what was made of it.
        nominal: by path, the share of tokens that the block would keep by itself.
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


def check_spent(child: Spec, spec: Spec, budget: Budget) -> None:
    """Refuse a child of `spec` that is over `budget`, or more than the slack under it.

    Raises:
        BudgetError: saying which bound would do.
        MethodError: saying what is spent.
    """
    parent, cost = budget.cost(spec), budget.cost(child)
    for name, limit in budget.limits(parent).items():
        if getattr(cost, name) > limit:
            raise BudgetError(
                f"budget of {name} must be at least {getattr(cost, name):,}, what the shares keep, but is {limit:,}; "
                "raise it, lower a share, or leave one out"
            )
    # Times come in steps; how close a child is to a budget of latency is measured on the child.
    if budget.latency is None and budget.spent(cost, parent) < 1 - SLACK:
        raise MethodError(
            f"what is kept must spend at least {1 - SLACK:.0%} of {budget}, but spends "
            f"{budget.spent(cost, parent):.1%}; leave out a share, or choose finer widths with method.choice=free"
        )
