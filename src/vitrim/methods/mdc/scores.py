"""MDC's scores: how much of what a network says depends on each of its heads, neurons and tokens.

n images, N tokens, H heads, K channels of a head, M hidden neurons, C classes.

Features are, for a neuron, its activations after the nonlinearity at all N tokens; for a head, its output before the
projection, by token the mean over its channels (``released``) or all of them (``greedy``); for a place of the grid, the
values of all heads there. The other side is the softmax of the dense model, with a linear kernel.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrim.cut.observe import axes, listening
from vitrim.families import blocks_of, describe
from vitrim.methods.mdc import hsic
from vitrim.nn import Axis
from vitrim.nn.feed import fed
from vitrim.nn.modes import evaluating
from vitrim.words.errors import MethodError

__all__ = ["Scores", "Settings", "greedy", "minmax", "order", "score"]

BETA = 0.1
"""Weight of the mean redundancy in the published code."""
_MIX = (0.1, 0.9)
"""Weights of dependence and of activation size in the published code's neuron scores."""


_DEAD = 1e-6
"""A head whose own HSIC is at most this is constant: five Gaussians of a constant give 1e-8 in float32, of anything
else at least 1 / n."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to score; see `vitrim.methods.mdc.Method`."""

    neurons_by: Literal["hsic", "released"] = "hsic"
    heads_by: Literal["released", "greedy"] = "released"
    estimator: Literal["unbiased_median", "biased_multi"] = "unbiased_median"
    target: Literal["output", "labels"] = "output"
    place: str | None = None
    """Path of the block whose values score the places of the grid; None for no such scores."""

    @property
    def kind(self) -> hsic.Estimator:
        """The estimator."""
        return "unbiased" if self.estimator == "unbiased_median" else "biased"

    @property
    def kernel(self) -> hsic.Kernel:
        """The kernel of the features."""
        return hsic.kernel_of("median" if self.estimator == "unbiased_median" else "multi")


@dataclass
class Scores:
    """What was found.

    Attributes:
        ranking: indices of heads (``….heads``) and neurons (``….hidden``), the best first.
        values: the scores that they are ranked by, the head order of ``greedy`` apart.
        places: scores of the patches from 0 to 1, or none.
    """

    ranking: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    places: Tensor | None = None


@dataclass
class _Sums:
    """Sums over batches, by path.

    The energy that decides ties is that of what varies: what a constant adds, a bias could.
    """

    dependence: dict[str, Tensor] = field(default_factory=dict)
    size: dict[str, Tensor] = field(default_factory=dict)
    energy: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def add(into: dict[str, Tensor], path: str, value: Tensor) -> None:
        """Add a value in float64 on the CPU, which no batch's order of summation blurs."""
        into[path] = into.get(path, torch.zeros((), dtype=torch.float64)) + value.double().cpu()


@torch.no_grad()
def score(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], settings: Settings) -> Scores:
    """Rank every head and neuron of `model`.

    Two forward passes: one for what the model says, one on whose way each block is scored as it is passed, so that the
    activations of one block are held at a time.

    Args:
        model: an adopted model; left as it was, with its modes.
        batches: images ``(n, 3, height, width)`` and labels ``(n,)``, each batch of 4 images at least; what batches
            give is averaged, their Gram matrices are never mixed.
        settings: how.

    Raises:
        MethodError: if a batch is too small, outputs are not finite or the same for all images of every batch, or
            labels are asked for and missing or all of one class.
    """
    known, sums = axes(model), _Sums()
    labels_seen: set[int] = set()
    count, varied = 0, False
    with evaluating(model):
        for x, y in batches:
            x = fed(x, model)
            outputs = _outputs(model, x, y, settings, labels_seen)
            against = hsic.target(hsic.linear(outputs), settings.kind)
            varied |= bool(against.any())
            hear = _ears(known, outputs, against, settings, sums)
            with listening(model, hear):
                model(x)
            count += 1
    if not count:
        raise MethodError("dependence must be estimated on at least 4 images, but got none; give more")
    if settings.target == "labels" and len(labels_seen) < 2:
        raise MethodError("labels must be of two classes at least, but all are of one; use target=output")
    if not varied:
        raise MethodError(
            "outputs must vary from image to image for anything to depend on, but all are equal; check the weights, or "
            "give other images"
        )
    return _ranked(model, known, sums, settings)


def _outputs(model: nn.Module, x: Tensor, y: Tensor, settings: Settings, seen: set[int]) -> Tensor:
    logits = model(x).float() if next(model.parameters()).dtype.itemsize < 4 else model(x)
    if not bool(torch.isfinite(logits).all()):
        raise MethodError("outputs must be finite while scoring, but some are not; check weights and normalisation")
    if settings.target == "output":
        return logits.softmax(dim=-1)  # type: ignore[no-any-return]
    if bool((y < 0).any()):
        raise MethodError("mdc with target=labels must have labels, but some are missing; use target=output")
    seen.update(y.tolist())
    return F.one_hot(y.to(logits.device), logits.shape[-1]).to(logits.dtype)


def _ears(
    known: Mapping[str, Axis], outputs: Tensor, against: Tensor, settings: Settings, sums: _Sums
) -> dict[str, Callable[[Tensor], None]]:
    hear: dict[str, Callable[[Tensor], None]] = {}
    for path, axis in known.items():
        block = path.rpartition(".")[0]
        if axis.name == "hidden":
            hear[path] = _neurons(path, against, settings, sums)
        elif axis.name == "v" and len(axis.groups) > 1:
            hear[f"{block}.heads"] = _heads(f"{block}.heads", axis.groups, outputs, settings, sums)
        if axis.name == "v" and block == settings.place:
            hear[path] = _grid("tokens", against, settings, sums)
    return hear


def _neurons(path: str, against: Tensor, settings: Settings, sums: _Sums) -> Callable[[Tensor], None]:
    def ear(activation: Tensor) -> None:
        sums.add(sums.dependence, path, hsic.dependence(activation, against, settings.kernel))
        sums.add(sums.energy, path, activation.var(dim=(0, 1), correction=0))
        if settings.neurons_by == "released":
            sums.add(sums.size, path, torch.linalg.vector_norm(activation, ord=1, dim=(0, 1)))

    return ear


def _heads(
    path: str, groups: tuple[int, ...], outputs: Tensor, settings: Settings, sums: _Sums
) -> Callable[[Tensor], None]:
    """HSIC of every head with every head, and last with the output: ``(H + 1, H + 1)``."""

    def ear(mixed: Tensor) -> None:
        sums.add(sums.energy, path, mixed.var(dim=(0, 1), correction=0))
        parts = torch.split(mixed, list(groups), dim=-1)
        if settings.heads_by == "greedy":
            grams = [settings.kernel(part.flatten(1)) for part in parts]
        else:
            grams = [settings.kernel(part.mean(dim=-1)) for part in parts]
        grams.append(hsic.linear(outputs).to(grams[0].dtype))
        every = torch.stack(grams)
        sums.add(sums.dependence, path, torch.einsum("aij,bij->ab", every, hsic.target(every, settings.kind)))

    return ear


def _grid(path: str, against: Tensor, settings: Settings, sums: _Sums) -> Callable[[Tensor], None]:
    def ear(values: Tensor) -> None:
        by_place = values.transpose(1, 2)
        sums.add(sums.dependence, path, hsic.dependence(by_place, against, settings.kernel))

    return ear


def _ranked(model: nn.Module, known: Mapping[str, Axis], sums: _Sums, settings: Settings) -> Scores:
    found = Scores()
    blocks = dict(blocks_of(model))
    for path, found_sum in sums.dependence.items():
        if path == "tokens":
            found.places = minmax(found_sum[describe(model).stages[0].prefix :])
            continue
        block, _, name = path.rpartition(".")
        axis = known[path if name == "hidden" else f"{block}.v"]
        energy = sums.energy[path] * _columns(blocks[block], axis)
        if name == "hidden":
            values = found_sum.clamp(min=0)
            if settings.neurons_by == "released":
                values = _MIX[0] * minmax(found_sum) + _MIX[1] * minmax(sums.size[path])
            found.values[path], found.ranking[path] = values, order(values, energy)
            continue
        energy = torch.stack([part.sum() for part in torch.split(energy, list(axis.groups))])
        if settings.heads_by == "greedy":
            found.ranking[path] = greedy(_normalised(found_sum), energy)
        else:
            values = _static(found_sum, settings)
            found.values[path], found.ranking[path] = values, order(values, energy)
    return found


def _columns(block: nn.Module, axis: Axis) -> Tensor:
    """Squared norm of what each channel is multiplied by on its way out."""
    member = next(member for member in axis.members if member.dim == 1)
    return block.get_parameter(member.parameter).detach().double().square().sum(dim=0).cpu()


def _normalised(cross: Tensor) -> Tensor:
    """HSIC in units of both sides' own (CKA); 0 for what is constant."""
    own = cross.diagonal().clamp(min=0)
    both = (own[:, None] * own[None, :]).sqrt()
    return torch.where(both > torch.finfo(torch.float32).tiny, cross / both.clamp(min=1e-300), 0.0)


def _static(cross: Tensor, settings: Settings) -> Tensor:
    """Relevance less a tenth of the mean redundancy, ``(H,)``; a constant head is worth less than any other.

    With the published estimator these are HSICs. With the median kernel both terms are put in units of their sides'
    own: features' kernels stay alive there, softmax outputs are small, and a tenth of the redundancy would outweigh all
    relevance (on a ViT-Ti by a factor of 20).
    """
    heads = len(cross) - 1
    if settings.estimator == "unbiased_median":
        cross = _normalised(cross)
    others = cross[:heads, :heads].sum(dim=1) - cross.diagonal()[:heads]
    values = cross[:heads, heads] - BETA * others / max(heads - 1, 1)
    dead = cross.diagonal()[:heads] <= _DEAD
    return torch.where(dead, -torch.inf, values)


def greedy(alike: Tensor, energy: Tensor, beta: float = 1.0) -> Tensor:
    """Order heads by what each adds: next is the one with the most relevance less its likeness to one chosen before.

    Args:
        alike: CKA of every head with every head, last with the output, ``(H + 1, H + 1)``.
        energy: of the heads' outputs, ``(H,)``; decides ties.
        beta: weight of the likeness. With the mean in place of the maximum, or 0.75 and less, a copy is not found.

    Returns:
        Indices of all heads, the best first; constant ones last.
    """
    heads = len(alike) - 1
    relevance = alike[:heads, heads]
    dead = [h for h in range(heads) if float(alike[h, h]) <= _DEAD]
    chosen: list[int] = []
    left = [h for h in range(heads) if h not in dead]
    while left:
        best = max(
            left,
            key=lambda h: (
                float(relevance[h]) - beta * max((float(alike[h, other]) for other in chosen), default=0.0),
                float(energy[h]),
                -h,
            ),
        )
        chosen.append(best)
        left.remove(best)
    return torch.tensor(chosen + dead)


def minmax(values: Tensor) -> Tensor:
    """From 0 for the smallest to 1 for the largest; all 1 where all are equal."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if bool(high > low) else torch.ones_like(values)


def order(values: Tensor, energy: Tensor) -> Tensor:
    """Indices, the most valuable first; of equal ones that with more output energy, then the first."""
    keys = (np.arange(len(values)), -energy.numpy(), -values.numpy())
    return torch.from_numpy(np.lexsort(keys))
