"""What a CAIT-style search says about itself: each block at the end, and each choice of masks on the way."""

from collections.abc import Mapping
from typing import Any

import torch

from vitrim.cut.shares import remains
from vitrim.methods.cait.masks import Channels
from vitrim.methods.cait.slots import plan_of
from vitrim.words.budget import Budget
from vitrim.words.costs import block_cost
from vitrim.words.plan import Plan
from vitrim.words.spec import Spec
from vitrim.words.steps.grid_merge import GridMerge

__all__ = ["GONE", "block_records", "choice_record"]

GONE = 1e-5
"""A gate of ``resrep`` below this counts as zero."""


def block_records(spec: Spec, child: Spec, channels: Channels) -> tuple[dict[str, Any], ...]:
    """Return one flat record for each block of the child.

    - ``attention``, ``mlp``: shares of channels and neurons that are kept.
    - ``tokens_nominal``, ``tokens``: share of the patches that the merges so far should leave, a half each, and that
      they leave. The latter is more where a row or column without a neighbor stays.
    - ``macs_before``, ``macs``: multiply-accumulates of the block in the parent and in the child.
    - ``revived``: how often a channel of the block was unmasked again (queries and keys, values, neurons).
    - ``gates_not_gone``, for ``resrep``: number of gates that are cut but not yet zero; the cut is exact if there are
      none.

    Args:
        spec: the parent.
        child: the spec of the smaller model.
        channels: the masked model after the search.
    """
    revived, left = _by_block(channels, channels.revived_by_path()), _by_block(channels, _not_gone(channels))
    halvings, nominal, tokens = 0, {}, []
    for (path, stage, block), flow in zip(child.blocks(), child.flows(), strict=True):
        halvings += isinstance(block.tokens, GridMerge)
        nominal[f"{path}.tokens"] = 0.5**halvings
        tokens.append(flow.leaves.patches / stage.patches)
    costs = [
        [
            block_cost(block, stage, here)[0]
            for (_, stage, block), here in zip(one.blocks(), one.arrivals(), strict=True)
        ]
        for one in (spec, child)
    ]
    found = []
    for record, share, before, after in zip(remains(spec, child, nominal), tokens, *costs, strict=True):
        more = {"gates_not_gone": left.get(record["path"], 0)} if channels.scorer == "resrep" else {}
        revivals = {"revived": revived.get(record["path"], 0)}
        found.append(record | {"tokens": share, "macs_before": before, "macs": after} | revivals | more)
    return tuple(found)


def choice_record(
    step: int, limits: Mapping[str, float], masks: Mapping[str, torch.Tensor], spec: Spec, budget: Budget, steps: Plan
) -> dict[str, Any]:
    """Return the record of a choice of masks for ``log.jsonl``: the limits that it was made for, and what it costs.

    Args:
        step: number of steps taken.
        limits: limits of macs, params and nanoseconds, as far as they are bounded.
        masks: the masks, by path of an axis.
        spec: the parent.
        budget: prices.
        steps: the plan of the merges, which the limits count whether or not the model in training merges yet.
    """
    price = budget.cost(plan_of(spec, masks, steps).child(spec))
    cost = {name: getattr(price, name) for name in limits}
    return (
        {"stage": "search", "event": "masks", "step": step} | {f"{n}_limit": int(v) for n, v in limits.items()} | cost
    )


@torch.no_grad()
def _not_gone(channels: Channels) -> dict[str, int]:
    if channels.scorer != "resrep" or not channels.paths:
        return {}
    scores, masks = channels.scores(), channels.masks()
    return {path: int((scores[path][masks[path] == 0] > GONE).sum()) for path in channels.paths}


def _by_block(channels: Channels, counts: Mapping[str, int]) -> dict[str, int]:
    found: dict[str, int] = {}
    for path in channels.paths:
        block = path.rpartition(".")[0]
        found[block] = found.get(block, 0) + counts.get(path, 0)
    return found
