"""Convert SPViT's gates to a plan that meets a budget.

M hidden neurons.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vitrim.cut.outputs import divergence, logits_of
from vitrim.cut.spend import Array, Ladder, Ladders, spend_ladders
from vitrim.cut.surgery import apply
from vitrim.methods.spvit import gates
from vitrim.methods.spvit.paths import FittedPaths, Paths
from vitrim.methods.spvit.search import Layout, SinglePath
from vitrim.nn.conv import votes
from vitrim.nn.modes import evaluating
from vitrim.words.budget import SLACK, Budget, Price
from vitrim.words.costs import cost_of
from vitrim.words.errors import BudgetError, MethodError
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Attention, Conv, Spec, Stage, folded
from vitrim.words.spec import Block as BlockSpec
from vitrim.words.steps import Tokens

__all__ = ["Gates", "as_evaluated", "check_reach", "close_", "decide", "grafts", "meets", "nearest", "planned", "told"]

LEVELS = ("skip", "1x1", "3x3", "attention")

_LAST = 1e6
"""Added to the logits of gates that are to close last."""

_TRIES = 32
"""Largest number of gates of attentions that are held open, one after another, to use up a budget."""


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

    def __init__(self, single: SinglePath, how: Layout, held: Mapping[str, int] = MappingProxyType({})) -> None:
        self.single, self.how, self.held = single, how, held

    def ladders(self, spec: Spec, budget: Budget) -> list[GateLadder]:
        """See `Ladders.ladders`.

        Raises:
            MethodError: if a gate is not finite.
        """
        return [
            ladder
            for (path, stage, block), here in zip(spec.blocks(), spec.arrivals(), strict=True)
            for ladder in _ladders(
                self.single, self.how, path, _Block(block, stage, here, budget), self.held.get(path, 0)
            )
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
def decide(
    spec: Spec, single: SinglePath, how: Layout, budget: Budget, held: Mapping[str, int] = MappingProxyType({})
) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Return the structure that the gates prefer within `budget`, filled with the next best units that fit.

    If more than 2 % of the budget is left, because the last gates to close were large, some of these stay open, and
    others close in their place.

    Args:
        spec: the parent.
        single: the search model.
        how: how attentions become convolutions.
        budget: what the child may cost.
        held: by path of a block, how many of its ordered gates close last, whatever their logits say.

    Returns:
        By path, the number of open gates, and which neurons are kept.

    Raises:
        MethodError: if a gate is not finite.
    """
    parent = budget.cost(spec)

    def settled(held: Mapping[str, int]) -> tuple[float, tuple[dict[str, int], dict[str, Tensor]]]:
        options = Gates(single, how, held)
        plan, ladders = spend_ladders(spec, options, budget)
        cost = budget.cost(plan.child(spec))
        spent = budget.spent(cost, parent) if budget.admits(cost, parent) else 0.0
        return spent, options.structure(ladders)

    best, found = settled(held)
    holding, (levels, _) = dict(held), found
    for _ in range(_TRIES):
        closed = {path: float(single.step(path)[level]) for path, level in levels.items() if level < 3}
        if not 0 < best < 1 - SLACK or not closed:
            break
        path = max(closed, key=closed.__getitem__)
        holding[path] = levels[path] + 1
        spent, other = settled(holding)
        levels = other[0]
        if spent > best:
            best, found = spent, other
    return found


def meets(single: SinglePath, spec: Spec, how: Layout, budget: Budget) -> bool:
    """Return whether the structure that evaluation runs is within a budget, with convolutions folded."""
    child = folded(planned(spec, how, *as_evaluated(single)).child(spec))
    return budget.admits(budget.cost(child), budget.cost(spec))


@torch.no_grad()
def close_(single: SinglePath, spec: Spec, how: Layout, budget: Budget, sure: float) -> None:
    """Close the gates that a budget does not allow, the lowest logits first; none is opened.

    Args:
        single: the search model.
        spec: the parent.
        how: how attentions become convolutions.
        budget: what the structure of the gates may cost.
        sure: closed gates get a logit of at most minus this, > 0.
    """
    if meets(single, spec, how, budget):
        return
    levels, neurons = decide(spec, single, how, budget)
    for path, level in levels.items():
        single.step(path)[level:].clamp_(max=-sure)
    for path, kept in neurons.items():
        gate = single.gate(path)
        gate.copy_(torch.where(kept.to(gate.device), gate, gate.clamp(max=-sure)))


@torch.no_grad()
def nearest(
    single: SinglePath, spec: Spec, how: Layout, budget: Budget, dense: nn.Module, probe: Sequence[Tensor]
) -> tuple[dict[str, int], dict[str, Tensor], dict[str, Any]]:
    """Return the structure that the gates prefer, or one that lets prefix tokens read at the end, if that is nearer.

    A head that reads prefix tokens alone gets nothing from the patches after the last attention: convolutions there
    have no effect, and what the patches learn is lost. Losses of single choices hardly show that. Where prefix tokens
    keep the attention beside convolutions, only a skip at the end is compared.

    Args:
        single: the search model.
        spec: the parent's.
        how: how attentions become convolutions.
        budget: what the child may cost.
        dense: the dense model.
        probe: batches of images to compare both with the dense model on; empty to compare nothing.

    Returns:
        By path, the number of open gates; which neurons are kept; and what was compared, empty if nothing was.
    """
    levels, neurons = decide(spec, single, how, budget)
    last = spec.blocks()[-1][0]
    reads = spec.host.arguments.get("global_pool") == "token" and spec.stages[-1].prefix > 0
    mixed = levels.get(last, 3)
    if not reads or not probe or mixed == 3 or (mixed and how.reads):
        return levels, neurons, {}
    held = decide(spec, single, how, budget, {last: 3})
    if held[0][last] != 3:
        return levels, neurons, {}
    with evaluating(dense, single.model):
        wanted = logits_of(dense, probe)
        losses = []
        for mine in ((levels, neurons), held):
            child = apply(single.model, planned(spec, how, *mine), grafts=grafts(single, mine[0])).eval()
            losses.append(divergence(wanted, logits_of(child, probe)))
    record = {"compared": last, "divergence": losses[0], "divergence_with_attention": losses[1]}
    return (*(held if losses[1] < losses[0] else (levels, neurons)), record)


class _Block(NamedTuple):
    """A block of the parent, and what prices it."""

    node: BlockSpec
    stage: Stage
    here: Tokens
    budget: Budget

    def price(self, **fields: Any) -> Price:
        """Return the cost of the block with other fields."""
        return self.budget.block(self.node.model_copy(update=fields), self.stage, self.here)


@torch.no_grad()
def _ladders(single: SinglePath, how: Layout, path: str, block: _Block, held: int) -> Iterator[GateLadder]:
    """Yield the ladders of a block; positions in [0, 1] decide ties."""
    if path in how.mixtures and isinstance(block.node.mixer, Attention):
        choices = np.array([_cost(block, how, path, level) for level in range(4)], dtype=np.float64)
        # Limit each logit to those of the gates before it.
        falling = single.step(path).cpu().double().cummin(dim=0).values
        falling[:held] += _LAST
        logits = falling.tolist()
        yield GateLadder(
            path=path,
            keys=_checked([(logits[gate], place) for gate, place in ((2, 0.25), (1, 0.5), (0, 0.75))]),
            order=[2, 1, 0],
            saves=[choices[level] - choices[level - 1] for level in (3, 2, 1)],
        )
    if single.has_gate(f"{path}.hidden"):
        logits = single.gate(f"{path}.hidden").cpu().double().tolist()
        one, two, whole, bare = (block.price(hidden=n) for n in (1, 2, len(logits), None))
        latency = (whole.latency - bare.latency) / len(logits)
        each = np.array([two.macs - one.macs, two.params - one.params, latency])
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


def _cost(block: _Block, how: Layout, path: str, level: int) -> Price:
    """Return the cost of an attention at `level`, after folding."""
    assert isinstance(block.node.mixer, Attention)
    mixer = how.mixer(path, block.node.mixer, level) or block.node.mixer
    if mixer.kind == "conv":
        mixer = mixer.model_copy(update={"mixture": None, "norm": False})
    return block.price(mixer=mixer, hidden=None)


@torch.no_grad()
def grafts(single: SinglePath, levels: Mapping[str, int]) -> dict[str, Tensor]:
    """Return the mixtures and batch norms that the search has trained, by their names in the child."""
    found: dict[str, Tensor] = {}
    for path, level in levels.items():
        if level not in (1, 2):
            continue
        beside, at = single.beside(path), f"{single.names[path]}.attn"
        if isinstance(beside, FittedPaths):
            found |= {f"{at}.{name}": value.detach() for name, value in beside.conv(level).state_dict().items()}
            continue
        half = slice(0, beside.width) if level == 1 else slice(beside.width, None)
        found[f"{at}.mix"] = beside.mix.detach()
        for name, value in beside.bn.state_dict().items():
            found[f"{at}.bn.{name}"] = value[half] if value.dim() else value
    return found


@torch.no_grad()
def told(
    spec: Spec, single: SinglePath, how: Layout, levels: Mapping[str, int], neurons: Mapping[str, Tensor]
) -> list[dict[str, Any]]:
    """Return a record of the whole structure, and one of each block: operation, gates, neurons, entropy of its mixture.

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
    return trials


def _entropy(beside: Paths | FittedPaths) -> float | None:
    if isinstance(beside, FittedPaths):
        return None
    share = votes(beside.mix.cpu().double(), beside.mixture.temperature)
    if len(share) == 1:
        return None
    return round(float(-(share * share.clamp_min(1e-300).log()).sum(dim=0).mean()) / math.log(len(share)), 4)
