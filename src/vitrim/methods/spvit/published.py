"""The structures that SPViT's authors have released, as plans.

M hidden neurons.

The operations of blocks are from the fine-tuning configurations, and the kept neurons from the gate files, of
github.com/ziplab/SPViT at commit ae19b0d. The ``_first_release`` structures are from its first commit, for which only
widths are known. They are stored in ``_spvit_published.json``: one letter per block (M attention, 3 and 1 convolutions,
- nothing), and for each block the kept neurons, one bit each from the highest bit of the first byte on, in base 64.
"""

import base64
import importlib.resources
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vitrim.methods.spvit.planning import planned
from vitrim.methods.spvit.search import Layout
from vitrim.words.budget import SLACK, Budget
from vitrim.words.costs import cost_of
from vitrim.words.errors import BudgetError, MethodError
from vitrim.words.plain import did_you_mean
from vitrim.words.plan import Plan
from vitrim.words.spec import Spec, folded

__all__ = ["check_budget", "published", "structures"]


def structures() -> dict[str, dict[str, Any]]:
    """Return every released structure by name: ``model``, ``operations``, and ``neurons`` or ``hidden`` widths."""
    text = importlib.resources.files(__package__).joinpath("published.json").read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = json.loads(text)
    return found


def published(name: str, spec: Spec, how: Layout) -> Plan:
    """Return the plan that cuts a dense model to a structure that was released for it.

    If only widths are known, the first neurons are kept.

    Args:
        name: name of the structure, such as ``deit_b_t60``.
        spec: the dense model.
        how: how attentions become convolutions.

    Raises:
        MethodError: if there is no such structure, or it is of another model.
    """
    known = structures()
    if name not in known:
        raise MethodError(f"structure must be one that was released, but is '{name}'{did_you_mean(name, known)}")
    levels, neurons = _choices(known[name], spec)
    if levels is None or neurons is None:
        raise MethodError(
            f"structure {name} must be given the model that it was searched from, {known[name]['model']}, but the "
            "blocks of this one differ; take that model, or search this one"
        )
    return planned(spec, how, levels, neurons)


def _choices(known: Mapping[str, Any], spec: Spec) -> tuple[dict[str, int] | None, dict[str, Tensor] | None]:
    """Return, by path, the number of open gates and which neurons are kept; None if they do not fit `spec`."""
    stages = [len(stage.blocks) for stage in spec.stages]
    operations = known["operations"].split(" / ")
    if stages != list(map(len, operations)):
        return None, None
    letters = "".join(operations)
    blocks = spec.blocks()
    levels = {path: "-13M".index(letter) for (path, _, _), letter in zip(blocks, letters, strict=True)}
    neurons: dict[str, Tensor] = {}
    for index, (path, _, block) in enumerate(blocks):
        if "neurons" in known:
            raw = torch.frombuffer(bytearray(base64.b64decode(known["neurons"][index])), dtype=torch.uint8)
            keep = ((raw[:, None] >> torch.arange(7, -1, -1)) & 1).bool().flatten()
        else:
            keep = torch.arange(block.hidden or 0) < known["hidden"][index]
        if len(keep) != block.hidden:
            return None, None
        neurons[f"{path}.hidden"] = keep
    return levels, neurons


def check_budget(name: str, child: Spec, spec: Spec, budget: Budget) -> None:
    """Raise an error if a released structure exceeds a budget or leaves part of it unused.

    Raises:
        BudgetError: naming the cost of the structure.
    """
    parent, cost = cost_of(spec), cost_of(folded(child))
    if not budget.admits(cost, parent) or budget.spent(cost, parent) < 1 - SLACK:
        raise BudgetError(
            f"the budget must be what structure {name} costs, at most {SLACK:.0%} above its macs={cost.macs} and "
            f"params={cost.params}, but is {budget}"
        )
