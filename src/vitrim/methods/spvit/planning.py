"""Convert SPViT's gates to a plan that meets a budget.

M hidden neurons.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vitrim.cut.spend import Array, Ladder, Ladders, settle
from vitrim.methods.spvit import gates
from vitrim.methods.spvit.paths import Paths
from vitrim.methods.spvit.search import Layout, SinglePath
from vitrim.nn.conv import votes
from vitrim.words.budget import Budget, Price
from vitrim.words.costs import block_cost, cost_of
from vitrim.words.errors import BudgetError, MethodError
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Attention, Conv, Spec, Stage, folded
from vitrim.words.spec import Block as BlockSpec

__all__ = ["Gates", "as_evaluated", "check_reach", "decide", "grafts", "planned", "told"]

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


@dataclass(slots=True, kw_only=True)
class GateLadder(Ladder):
    """The gates of one part, the first to close first: neurons of an MLP, or the ordered gates of an attention.

    Attributes:
        path: of the block or of its neurons.
        keys: (logit, position) by which each gate is closed; logits of an attention fall with its level.
        order: the gate that each rung closes.
    """

    path: str
    keys: list[tuple[float, float]]
    order: list[int]

    def kept(self) -> Tensor:
        """Return which gates are open, bool."""
        keep = torch.ones(len(self.order), dtype=torch.bool)
        keep[self.order[: self.level]] = False
        return keep


class Gates(Ladders[GateLadder]):
    """The gates of a search: closed below one threshold until a budget is met, then reopened where they fit.

    Gates with equal logits, of which a short search leaves many, are closed evenly over all blocks.
    """

    strict: ClassVar[bool] = False

    def __init__(self, single: SinglePath, how: Layout) -> None:
        self.single, self.how = single, how

    def ladders(self, spec: Spec, budget: Budget) -> list[GateLadder]:
        """See `Ladders.ladders`.

        Raises:
            MethodError: if a gate is not finite.
        """
        return [
            ladder
            for path, stage, block in spec.blocks()
            for ladder in _ladders(self.single, self.how, path, stage, block, budget)
        ]

    def row(self, ladders: Sequence[GateLadder], need: Array) -> list[tuple[int, int]]:
        """See `Ladders.row`."""
        keys = [(*key, number, rung) for number, one in enumerate(ladders) for rung, key in enumerate(one.keys)]
        return [(number, rung) for *_, number, rung in sorted(keys)]

    def structure(self, ladders: Sequence[GateLadder]) -> tuple[dict[str, int], dict[str, Tensor]]:
        """Return, by path, the number of open gates of each attention, and which neurons are kept."""
        found = {ladder.path: ladder.kept() for ladder in ladders}
        levels = {path: int(kept.sum()) for path, kept in found.items() if path in self.how.mixtures}
        return levels, {path: kept for path, kept in found.items() if path not in self.how.mixtures}

    def plan(self, spec: Spec, ladders: Sequence[GateLadder]) -> Plan:
        """Return the plan, with convolutions folded, as budgets count them."""
        return _folded(spec, planned(spec, self.how, *self.structure(ladders)))


def _folded(spec: Spec, plan: Plan) -> Plan:
    blocks = []
    for block in plan.blocks():
        mixer = block.mixer
        if isinstance(mixer, Conv):
            block = block.model_copy(update={"mixer": mixer.model_copy(update={"mixture": None, "norm": False})})
        blocks.append(block)
    return Plan.of(spec, blocks)


@torch.no_grad()
def decide(spec: Spec, single: SinglePath, how: Layout, budget: Budget) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Return the structure that the gates prefer within `budget`, filled with the next best units that fit.

    Returns:
        By path, the number of open gates, and which neurons are kept.

    Raises:
        MethodError: if a gate is not finite.
    """
    options = Gates(single, how)
    return options.structure(settle(spec, options, budget)[1])


@torch.no_grad()
def _ladders(
    single: SinglePath, how: Layout, path: str, stage: Stage, block: BlockSpec, budget: Budget
) -> Iterator[GateLadder]:
    """Yield the ladders of a block; positions in [0, 1] decide ties."""
    if path in how.mixtures and isinstance(block.mixer, Attention):
        choices = np.array([_cost(block, stage, how, path, level, budget) for level in range(4)], dtype=np.float64)
        # Limit each logit to those of the gates before it.
        logits = single.step(path).cpu().double().cummin(dim=0).values.tolist()
        yield GateLadder(
            path=path,
            keys=_checked([(logits[gate], place) for gate, place in ((2, 0.25), (1, 0.5), (0, 0.75))]),
            order=[2, 1, 0],
            saves=[choices[level] - choices[level - 1] for level in (3, 2, 1)],
        )
    if single.has_gate(f"{path}.hidden"):
        logits = single.gate(f"{path}.hidden").cpu().double().tolist()
        one, two = (block_cost(block.model_copy(update={"hidden": n}), stage) for n in (1, 2))
        whole, bare = (budget.block(block.model_copy(update={"hidden": n}), stage).latency for n in (len(logits), None))
        each = np.array([two[0] - one[0], two[1] - one[1], (whole - bare) / len(logits)])
        order = sorted(range(len(logits)), key=logits.__getitem__)
        yield GateLadder(
            path=f"{path}.hidden",
            keys=_checked([(logits[gate], gate / len(logits)) for gate in order]),
            order=order,
            saves=[each] * len(logits),
        )


def _checked(keys: list[tuple[float, float]]) -> list[tuple[float, float]]:
    if not all(math.isfinite(logit) for logit, _ in keys):
        raise MethodError("gates must be finite, but some are not; lower method.train.lr or gate_lr")
    return keys


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
    share = votes(beside.mix.cpu().double(), beside.mixture.temperature)
    if len(share) == 1:
        return None
    return round(float(-(share * share.clamp_min(1e-300).log()).sum(dim=0).mean()) / math.log(len(share)), 4)
