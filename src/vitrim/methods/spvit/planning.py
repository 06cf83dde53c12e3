"""Convert SPViT's gates to a plan that meets a budget.

M hidden neurons.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitrim.methods.spvit import gates
from vitrim.methods.spvit.paths import Paths
from vitrim.methods.spvit.search import Layout, SinglePath
from vitrim.nn.conv import votes
from vitrim.words.budget import Budget, Price
from vitrim.words.costs import block_cost, cost_of
from vitrim.words.errors import BudgetError, MethodError
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Attention, Spec, Stage, folded
from vitrim.words.spec import Block as BlockSpec

__all__ = ["as_evaluated", "check_reach", "decide", "grafts", "planned", "told"]

LEVELS = ("skip", "1x1", "3x3", "attention")


def planned(spec: Spec, how: Layout, levels: Mapping[str, int], neurons: Mapping[str, Tensor]) -> Plan:
    """Return the plan of a structure.

    Args:
        spec: the parent.
        how: how attentions become convolutions.
        levels: by path of a block, how many of its ordered gates are open.
        neurons: by path of an axis, which neurons are kept, bool ``(M,)``.
    """
    blocks = []
    for path, _, block in spec.blocks():
        fields: dict[str, Any] = {}
        if path in levels and isinstance(block.mixer, Attention):
            fields["mixer"] = how.mixer(path, block.mixer, levels[path])
        keep = neurons.get(f"{path}.hidden")
        if keep is not None and not (len(keep) == block.hidden and bool(keep.all())):
            fields["hidden"] = tuple(keep.nonzero().flatten().tolist())
        blocks.append(BlockPlan(**fields))
    return Plan.of(spec, blocks)


def check_reach(spec: Spec, how: Layout, budget: Budget) -> None:
    """Raise an error if a budget is below the cost with every gate closed.

    Raises:
        BudgetError: naming the least possible cost.
    """
    none = torch.zeros(0, dtype=torch.bool)
    closed = {
        f"{path}.hidden": none
        for path, stage, block in spec.blocks()
        if block.hidden and stage.form.hidden_norm is None
    }
    least = budget.cost(planned(spec, how, dict.fromkeys(how.mixtures, 0), closed).child(spec))
    for name, limit in budget.limits(budget.cost(spec)).items():
        if getattr(least, name) > limit:
            raise BudgetError(
                f"budget of {name} must be at least {getattr(least, name):,} for this model, but got {limit:,}; "
                "allow more"
            )


@torch.no_grad()
def as_evaluated(single: SinglePath) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Return the structure that evaluation runs: by path, the number of open gates, and which neurons are kept."""
    levels = {path: int(gates.opened(gates.hard(single.step(path))).sum()) for path in single.names}
    hidden = [path.replace("/", ".") for path in single.gates]
    return levels, {path: gates.hard(single.gate(path)).bool().cpu() for path in hidden}


@torch.no_grad()
def decide(spec: Spec, single: SinglePath, how: Layout, budget: Budget) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Return the structure that the gates prefer within `budget`, filled with the next best units that fit.

    Returns:
        By path, the number of open gates, and which neurons are kept.

    Raises:
        MethodError: if a gate is not finite.
    """
    rungs = [rung for path, stage, block in spec.blocks() for rung in _rungs(single, how, path, stage, block, budget)]
    counts = [len(logits) for _, logits, *_ in rungs]
    logits, saves, places = (torch.cat(list(column)) for column in list(zip(*rungs, strict=True))[1:])
    if not bool(torch.isfinite(logits).all()):
        raise MethodError("gates must be finite, but some are not; lower method.train.lr or gate_lr")
    starts = np.cumsum([0, *counts[:-1]])
    after = torch.cat(
        [
            torch.tensor([-1, start, start + 1]) if path in how.mixtures else torch.full((count,), -1)
            for (path, *_), start, count in zip(rungs, starts, counts, strict=True)
        ]
    )
    # Gates with equal logits, of which a short search leaves many, are closed evenly over all blocks.
    ranks = torch.empty(len(logits), dtype=torch.long)
    ranks[torch.from_numpy(np.lexsort((places.numpy(), logits.numpy())))] = torch.arange(len(logits))
    parent = budget.cost(spec)
    limits = budget.limits(parent)
    need = [getattr(parent, name) - limits[name] if name in limits else -math.inf for name in Price._fields]
    kept_all = gates.project(ranks, saves, torch.tensor(need, dtype=torch.float64), after)
    keep = torch.split(kept_all, counts)
    found = {path: kept for (path, *_), kept in zip(rungs, keep, strict=True)}
    levels = {path: int(kept.sum()) for path, kept in found.items() if path in how.mixtures}
    return levels, {path: kept for path, kept in found.items() if path not in how.mixtures}


def _rungs(
    single: SinglePath, how: Layout, path: str, stage: Stage, block: BlockSpec, budget: Budget
) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """Yield the rungs of a block: path, logits, savings by closing, and positions in [0, 1] that decide ties."""
    found = []
    if path in how.mixtures and isinstance(block.mixer, Attention):
        choices = [_cost(block, stage, how, path, level, budget) for level in range(4)]
        saves = torch.tensor(choices[1:]).double() - torch.tensor(choices[:-1]).double()
        # Limit each logit to those of the gates before it.
        logits = single.step(path).double().cpu().cummin(dim=0).values
        found.append((path, logits, saves, torch.tensor([0.75, 0.5, 0.25], dtype=torch.float64)))
    if single.has_gate(f"{path}.hidden"):
        logits = single.gate(f"{path}.hidden").double().cpu()
        one, two = (block_cost(block.model_copy(update={"hidden": n}), stage) for n in (1, 2))
        whole, bare = (budget.block(block.model_copy(update={"hidden": n}), stage).latency for n in (len(logits), None))
        each = [two[0] - one[0], two[1] - one[1], (whole - bare) / len(logits)]
        saves = torch.tensor([each]).double().expand(len(logits), len(each))
        places = torch.arange(len(logits), dtype=torch.float64) / len(logits)
        found.append((f"{path}.hidden", logits, saves, places))
    return found


def _cost(block: BlockSpec, stage: Stage, how: Layout, path: str, level: int, budget: Budget) -> Price:
    """Return the cost of an attention at `level`, after folding."""
    assert isinstance(block.mixer, Attention)
    mixer = how.mixer(path, block.mixer, level) or block.mixer
    if mixer.kind == "conv":
        mixer = mixer.model_copy(update={"mixture": None, "norm": False})
    return budget.block(block.model_copy(update={"mixer": mixer, "hidden": None}), stage)


@torch.no_grad()
def grafts(single: SinglePath, levels: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the mixtures and batch norms that the search has trained, by their names in the child."""
    found: dict[str, Tensor] = {}
    for path, level in levels.items():
        if level not in (1, 2):
            continue
        beside, at = single.beside(path), f"{single.names[path]}.attn"
        half = slice(0, beside.width) if level == 1 else slice(beside.width, None)
        found[f"{at}.mix"] = beside.mix.detach()
        for name, value in beside.bn.state_dict().items():
            found[f"{at}.bn.{name}"] = value[half] if value.dim() else value
    return found


@torch.no_grad()
def told(
    spec: Spec, single: SinglePath, how: Layout, levels: Mapping[str, int], neurons: Mapping[str, Tensor]
) -> tuple[dict[str, Any], ...]:
    """Return a record of each block: its operation, gates, neurons, and the entropy of its mixture over heads.

    ``votes`` is the entropy of a slot's weights over heads, relative to equal weights, averaged over nine slots: 1 if
    all heads have equal weight, 0 if each slot uses one head.
    """
    child = cost_of(folded(planned(spec, how, levels, neurons).child(spec)))
    evaluated, open_ = as_evaluated(single)
    before = cost_of(folded(planned(spec, how, evaluated, open_).child(spec)))
    trials: list[dict[str, Any]] = [
        {"macs_of_gates": before.macs, "params_of_gates": before.params, "macs": child.macs, "params": child.params}
    ]
    for path, _, block in spec.blocks():
        record: dict[str, Any] = {"path": path}
        if path in levels:
            record["operation"] = LEVELS[levels[path]]
            record["gates"] = [round(float(value), 4) for value in single.step(path)]
            record["votes"] = _entropy(single.beside(path))
        keep = neurons.get(f"{path}.hidden")
        record["neurons"] = block.hidden if keep is None else int(keep.sum())
        trials.append(record)
    return tuple(trials)


def _entropy(beside: Paths) -> float | None:
    share = votes(beside.mix.double(), beside.mixture.temperature)
    if len(share) == 1:
        return None
    return round(float(-(share * share.clamp_min(1e-300).log()).sum(dim=0).mean()) / math.log(len(share)), 4)
