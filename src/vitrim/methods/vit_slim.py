"""ViT-Slim: gates on channels, trained with an l1 penalty, ranked over the whole network.

H heads, K channels of a head, M hidden neurons.

Source: Chavan et al., "Vision Transformer Slimming: Multi-Dimension Searching in Continuous Optimization Space", CVPR
2022, arXiv 2201.00814. One gate for each (block, head, channel), shared by query, key and value, and one for each
(block, neuron) after the activation; weights and gates are trained together with the task loss and
``attention_l1 * sum |z_attention| + mlp_l1 * sum |z_mlp|``; each kind is ranked as one list over all blocks.

Where we differ from the authors' code, on purpose:

- The code divides its penalty weights by the number of processes and then averages gradients, so its published command
  (four processes, 2e-4 and 5e-5) trains with a quarter of what it names. Ours are the effective weights, whatever runs.
- The code trains its final network with masks and cuts nothing. Ours is cut before it is trained again.
- The code drops the gates' values (`export = "binarize"`). Folding them into the weights keeps the function that the
  search has found, which is the better start for a short training; `"binarize"` remains for the published protocol.
- Gates of a kind without penalty are not trained, and do not exist.
- Gates act through the weights, which is the same function with the same gradients (`vitrim.observe.Gated`).

Token gates are not part of this file yet.
"""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from vitrim.budget import Budget
from vitrim.contract import Data, Found
from vitrim.data import Augment
from vitrim.errors import MethodError
from vitrim.families import describe
from vitrim.observe import Gated, axes
from vitrim.plain import Node
from vitrim.search.fill import Choice, fill, quantiles
from vitrim.train import Distill, Train, fit

__all__ = ["Method", "gate_model", "gate_scores", "l1_penalty"]


class Method(Node):
    """Train gates with an l1 penalty and keep the largest.

    Attributes:
        train: the search's own training; the default is the published one (50 epochs, AdamW, constant 5e-4).
        attention_l1: weight of the sum of attention gates; 0 leaves attention alone.
        mlp_l1: weight of the sum of MLP gates; 0 leaves MLPs alone.
        gate_lr: learning rate of the gates; None for that of the weights, as published. A search of a few hundred steps
            needs a larger one for gates to move at all.
        ranking: ``signed`` cuts the most negative gate first, as published; ``absolute`` the one nearest to 0.
        export: ``fold`` multiplies the gates into the weights, ``binarize`` drops them.
        choice: which widths are allowed, see `vitrim.search.fill.Choice`; ``free`` is the published one.
    """

    needs: ClassVar[str] = "images"
    sentence: ClassVar[str] = "trains l1-penalised gates on channels together with the weights and keeps the largest"

    train: Train = Train(
        epochs=50,
        batch=1024,
        lr=5e-4,
        weight_decay=1e-3,
        schedule="constant",
        warmup_epochs=0,
        clip=None,
        mixup=0.8,
        cutmix=1.0,
        smoothing=0.1,
        drop_path=0.1,
        augment=Augment(kind="full"),
        distill=Distill(kind="none"),
    )
    attention_l1: Annotated[float, Field(ge=0)] = 5e-5
    mlp_l1: Annotated[float, Field(ge=0)] = 1.25e-5
    gate_lr: Annotated[float, Field(gt=0)] | None = None
    ranking: Literal["signed", "absolute"] = "signed"
    export: Literal["fold", "binarize"] = "fold"
    choice: Choice = "even"

    def search(
        self,
        model: nn.Module,
        data: Data | None,
        budget: Budget,
        *,
        seed: int,
        teacher: nn.Module | None = None,
        folder: Path | None = None,
        log: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> Found:
        """See `vitrim.contract.Method.search`."""
        if data is None or data.train is None:
            raise MethodError("vit_slim must train its gates, but no data was given; give data or use magnitude")
        gated = gate_model(copy.deepcopy(model), attention=self.attention_l1 > 0, mlp=self.mlp_l1 > 0)
        fit(
            gated,
            data.train,
            self.train,
            input=data.input,
            seed=seed,
            teacher=teacher,
            penalty=l1_penalty(self.attention_l1, self.mlp_l1),
            groups=self._groups,
            folder=folder,
            log=log,
            stage="search",
        )
        scores, kinds = gate_scores(gated, self.ranking)
        plan = fill(describe(model), quantiles(scores, kinds), budget, choice=self.choice, by="score")
        parent = gated.fold_() if self.export == "fold" else gated.model
        parent.train(model.training)
        return Found(plan=plan, parent=parent)

    def _groups(self, gated: nn.Module) -> list[dict[str, Any]]:
        """Gates in a group of their own: the usual filter would not decay them, the published search does."""
        assert isinstance(gated, Gated)
        group: dict[str, Any] = {"params": list(gated.gates.values()), "weight_decay": self.train.weight_decay}
        if self.gate_lr is not None:
            group["lr"] = self.gate_lr
        return [group]


def gate_model(model: nn.Module, *, attention: bool = True, mlp: bool = True) -> Gated:
    """Put gates of value 1 on `model`: one for each head channel (queries, keys and values share it) and each neuron.

    Where a norm stands between the queries and the logits, the gate acts on the values alone, and so does the cut.

    Raises:
        MethodError: if nothing of the model can be gated.
    """
    gates: dict[str, Tensor] = {}
    share: dict[str, str] = {}
    like = next(model.parameters())
    for path, axis in axes(model).items():
        block = path.rpartition(".")[0]
        if not axis.scales or axis.tied:
            continue
        if axis.name == "hidden" and mlp:
            gates[path] = torch.ones(axis.size, device=like.device)
        elif axis.name == "v" and attention:
            gates[path] = torch.ones(axis.size, device=like.device)
        elif axis.name == "qk" and attention and axis.size == axes(model)[f"{block}.v"].size:
            share[path] = f"{block}.v"
    share = {path: gate for path, gate in share.items() if gate in gates}
    if not gates:
        raise MethodError(
            "a model must have channels that can be gated, but norms tie them all or both penalties are 0"
        )
    return Gated(model, gates, share)


def l1_penalty(attention: float, mlp: float) -> Callable[[nn.Module], Tensor]:
    """The penalty of a gated model: ``attention * sum |z_attention| + mlp * sum |z_mlp|``."""

    def penalty(gated: nn.Module) -> Tensor:
        assert isinstance(gated, Gated)
        sums = [
            gate.abs().sum() * (mlp if path.endswith("/hidden") else attention) for path, gate in gated.gates.items()
        ]
        return torch.stack(sums).sum()

    return penalty


@torch.no_grad()
def gate_scores(gated: Gated, ranking: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Gates as scores by path of an axis, and the list (attention or mlp) that each is ranked in.

    Raises:
        MethodError: if a gate is not finite.
    """
    scores: dict[str, Tensor] = {}
    kinds: dict[str, str] = {}
    for path, axis in axes(gated.model).items():
        block = path.rpartition(".")[0]
        name = path if axis.name == "hidden" else f"{block}.v"
        if not gated.has_gate(name) or (axis.name == "qk" and axis.size != gated.gate(name).numel()):
            continue
        gate = gated.gate(name).detach().double().cpu()
        if not bool(torch.isfinite(gate).all()):
            raise MethodError(f"{path}: gates must be finite, but some are not; lower method.train.lr or gate_lr")
        scores[path] = gate.abs() if ranking == "absolute" else gate
        kinds[path] = "mlp" if axis.name == "hidden" else "attention"
    return scores, kinds
