"""The cost of a structure that SPViT searches, as a sum over its gates."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from vitrim.methods.spvit import gates
from vitrim.methods.spvit.search import Layout, SinglePath
from vitrim.nn.feed import summing
from vitrim.words.budget import Budget
from vitrim.words.costs import block_cost, cost_of, mlp_macs
from vitrim.words.spec import Attention, Spec

__all__ = ["Counting", "Prices", "prices", "times"]

Counting = Literal["published", "counted"]
"""``published``: the authors' rule, with one product a channel for each norm, and neurons only on patches; or ours."""


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Cost of a structure as a sum over gates: multiply-accumulates, or nanoseconds if time is bounded.

    Attributes:
        constant: cost of all parts without gates.
        steps: by path of a block, the cost that each of its ordered gates adds: 1 x 1, 3 x 3 over 1 x 1, attention over
            3 x 3.
        neurons: by path of an axis, the cost of each neuron.
    """

    constant: int
    steps: Mapping[str, tuple[int, int, int]]
    neurons: Mapping[str, int]

    def total(self, single: SinglePath) -> Tensor:
        """Return the cost under deterministic gates, float64, differentiable with respect to their logits."""
        device = next(single.parameters()).device
        kind = summing(device)
        total = torch.tensor(float(self.constant), dtype=kind, device=device)
        for path, adds in self.steps.items():
            open_ = gates.opened(gates.budgeted(single.step(path)).to(kind))
            total = total + (open_ * open_.new_tensor(adds)).sum()
        for path, adds_one in self.neurons.items():
            total = total + adds_one * gates.budgeted(single.gate(path)).to(kind).sum()
        return total


def prices(spec: Spec, how: Layout, counting: Counting) -> Prices:
    """Return the cost that each gate of a parent adds.

    Args:
        spec: the parent.
        how: which attentions have gates.
        counting: the counting rule.
    """
    rows = list(zip(spec.blocks(), spec.arrivals(), spec.flows(), strict=True))
    host = cost_of(spec).macs - sum(block_cost(block, stage, here)[0] for (_, stage, block), here, _ in rows)
    constant = host + (_norms(spec) if counting == "published" else 0)
    steps: dict[str, tuple[int, int, int]] = {}
    neurons: dict[str, int] = {}
    for (path, stage, block), here, flow in rows:
        mixer, ours = block_cost(block.model_copy(update={"hidden": None}), stage, here)[0], path in how.mixtures
        if ours and isinstance(block.mixer, Attention):
            chosen = [how.mixer(path, block.mixer, level) for level in (1, 2)]
            bare = [block.model_copy(update={"mixer": conv, "hidden": None}) for conv in chosen]
            one, three = (block_cost(node, stage, here)[0] for node in bare)
            steps[path] = (one, three - one, mixer - three)
        else:
            constant += mixer
        if block.hidden and stage.form.hidden_norm is None:
            tokens = flow.leaves.patches if counting == "published" else flow.rows
            neurons[f"{path}.hidden"] = mlp_macs(tokens, stage.width, 1, stage.form.factors)
        elif block.hidden:
            constant += mlp_macs(flow.rows, stage.width, block.hidden, stage.form.factors)
    return Prices(constant=constant, steps=steps, neurons=neurons)


def times(spec: Spec, how: Layout, budget: Budget) -> Prices:
    """Return the time that each gate of a parent adds according to the table of `budget`, in nanoseconds.

    A neuron adds its share of its branch. A gate adds a negative time if its choice is faster than the one before it.
    """
    rows = list(zip(spec.blocks(), spec.arrivals(), strict=True))
    blocks = [budget.block(block, stage, here).latency for (_, stage, block), here in rows]
    constant = budget.cost(spec).latency - sum(blocks)
    steps: dict[str, tuple[int, int, int]] = {}
    neurons: dict[str, int] = {}
    for ((path, stage, block), here), whole in zip(rows, blocks, strict=True):
        mixer = budget.block(block.model_copy(update={"hidden": None}), stage, here).latency
        if path in how.mixtures and isinstance(block.mixer, Attention):
            convs = [how.mixer(path, block.mixer, level) for level in (1, 2)]
            bare = [block.model_copy(update={"mixer": conv, "hidden": None}) for conv in convs]
            one, three = (budget.block(node, stage, here).latency for node in bare)
            steps[path] = (one, three - one, mixer - three)
        else:
            constant += mixer
        if block.hidden and stage.form.hidden_norm is None:
            neurons[f"{path}.hidden"] = (whole - mixer) // block.hidden
        else:
            constant += whole - mixer
    return Prices(constant=constant, steps=steps, neurons=neurons)


def _norms(spec: Spec) -> int:
    """Return the authors' count for norms: two per block and token; for a Swin also those of stem, mergings and end."""
    first, last = spec.stages[0], spec.stages[-1]
    norms: int = sum(2 * stage.width * stage.tokens * len(stage.blocks) for stage in spec.stages)
    if first.window is None:
        return norms
    merging = sum(stage.width * stage.patches for stage in spec.stages[:-1])
    # The count at the end is four times too large for four stages, as in the original Swin's counter that they reuse.
    return norms + first.width * first.patches + merging + (last.width * first.patches >> len(spec.stages))
