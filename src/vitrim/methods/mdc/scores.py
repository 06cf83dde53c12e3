"""MDC's scores: how much the output of a network depends on each of its heads, neurons and tokens.

n images, N tokens, H heads, K channels of a head, M hidden neurons, C classes.

The features of a neuron are its activations after the nonlinearity at all N tokens. Those of a head are its output
before the projection: for each token the mean over its channels (``released``), or all channels (``greedy``). Those of
a grid position are the values of all heads there. The outputs are the softmax of the dense model, with a linear kernel.
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
from vitrim.nn.feed import fed, summing
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
    """Settings of the scores; see `vitrim.methods.mdc.Method`."""

    neurons_by: Literal["hsic", "released"] = "hsic"
    heads_by: Literal["released", "greedy"] = "released"
    estimator: Literal["unbiased_median", "biased_multi"] = "unbiased_median"
    target: Literal["output", "labels"] = "output"
    place: str | None = None
    """Path of the block whose values score the grid positions; None for no such scores."""

    @property
    def kind(self) -> hsic.Estimator:
        """The estimator."""
        return "unbiased" if self.estimator == "unbiased_median" else "biased"

    @property
    def kernel(self) -> hsic.Kernel:
        """Return the kernel of the features."""
        return hsic.kernel_of("median" if self.estimator == "unbiased_median" else "multi")


@dataclass
class Scores:
    """The result of scoring.

    Attributes:
        ranking: indices of heads (``….heads``) and neurons (``….hidden``), the best first.
        values: the scores that they are ranked by, except the head order of ``greedy``.
        places: scores of the patches from 0 to 1, or None.
    """

    ranking: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    places: Tensor | None = None


@dataclass
class _Sums:
    """Sums over batches, by path.

    The energy that decides ties counts only variation over images, because a bias can replace a constant.
    """

    dependence: dict[str, Tensor] = field(default_factory=dict)
    size: dict[str, Tensor] = field(default_factory=dict)
    energy: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def add(into: dict[str, Tensor], path: str, value: Tensor) -> None:
        """Add a value in float64 on its device, so that the host need not wait for it."""
        value = value.to(summing(value.device))
        into[path] = into[path] + value if path in into else value

    def on_host(self) -> "_Sums":
        """Return the sums in float64 on the CPU."""
        kinds = (self.dependence, self.size, self.energy)
        return _Sums(*({path: value.cpu().double() for path, value in kind.items()} for kind in kinds))


@torch.no_grad()
def score(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], settings: Settings) -> Scores:
    """Rank every head and neuron of `model`.

    There are two forward passes per batch: one for the outputs, and one in which each block is scored as it is run, so
    that only the activations of one block are in memory at a time.

    Args:
        model: an adopted model; not modified, modes included.
        batches: images ``(n, 3, height, width)`` and labels ``(n,)``, each batch with at least 4 images; the results of
            batches are averaged, and their Gram matrices are never mixed.
        settings: settings of the scores.

    Raises:
        MethodError: if a batch is too small, outputs are not finite or are equal for all images of every batch, or
            labels are needed but missing or all of one class.
    """
    known, sums = axes(model), _Sums()
    labels_seen: set[int] = set()
    count, seen = 0, _Seen()
    with evaluating(model):
        for x, y in batches:
            x = fed(x, model)
            outputs = _outputs(model, x, y, settings, labels_seen, seen)
            against = hsic.target(hsic.linear(outputs), settings.kind)
            seen.varied.append(against.any())
            observers = _observers(known, outputs, against, settings, sums)
            with listening(model, observers):
                model(x)
            count += 1
    if not count:
        raise MethodError("dependence must be estimated on at least 4 images, but got none; give more")
    if settings.target == "labels" and len(labels_seen) < 2:
        raise MethodError("labels must be of two classes at least, but all are of one; use target=output")
    seen.check()
    if not bool(torch.stack(seen.varied).any()):
        raise MethodError(
            "outputs must vary from image to image for anything to depend on, but all are equal; check the weights, or "
            "give other images"
        )
    return _ranked(model, known, sums.on_host(), settings)


@dataclass
class _Seen:
    """What is known of the outputs of each batch, on the device: whether they are finite, and differ."""

    finite: list[Tensor] = field(default_factory=list)
    varied: list[Tensor] = field(default_factory=list)

    def check(self) -> None:
        """Raise if outputs are not finite."""
        if not bool(torch.stack(self.finite).all()):
            raise MethodError("outputs must be finite while scoring, but some are not; check weights and normalization")


def _outputs(model: nn.Module, x: Tensor, y: Tensor, settings: Settings, labels: set[int], seen: _Seen) -> Tensor:
    logits = model(x).float() if next(model.parameters()).dtype.itemsize < 4 else model(x)
    seen.finite.append(torch.isfinite(logits).all())
    if settings.target == "output":
        return logits.softmax(dim=-1)  # type: ignore[no-any-return]
    if bool((y < 0).any()):
        raise MethodError("mdc with target=labels must have labels, but some are missing; use target=output")
    labels.update(y.tolist())
    return F.one_hot(y, logits.shape[-1]).to(logits)


def _observers(
    known: Mapping[str, Axis], outputs: Tensor, against: Tensor, settings: Settings, sums: _Sums
) -> dict[str, Callable[[Tensor], None]]:
    observers: dict[str, Callable[[Tensor], None]] = {}
    for path, axis in known.items():
        block = path.rpartition(".")[0]
        if axis.name == "hidden":
            observers[path] = _neurons(path, against, settings, sums)
        elif axis.name == "v" and len(axis.groups) > 1:
            observers[f"{block}.heads"] = _heads(f"{block}.heads", axis.groups, outputs, settings, sums)
        if axis.name == "v" and block == settings.place:
            observers[path] = _grid("tokens", against, settings, sums)
    return observers


def _neurons(path: str, against: Tensor, settings: Settings, sums: _Sums) -> Callable[[Tensor], None]:
    def observe(activation: Tensor) -> None:
        sums.add(sums.dependence, path, hsic.dependence(activation, against, settings.kernel))
        sums.add(sums.energy, path, activation.var(dim=(0, 1), correction=0))
        if settings.neurons_by == "released":
            sums.add(sums.size, path, torch.linalg.vector_norm(activation, ord=1, dim=(0, 1)))

    return observe


def _heads(
    path: str, groups: tuple[int, ...], outputs: Tensor, settings: Settings, sums: _Sums
) -> Callable[[Tensor], None]:
    """Observe the HSIC of every head with every head, and last with the output: ``(H + 1, H + 1)``."""

    def observe(mixed: Tensor) -> None:
        sums.add(sums.energy, path, mixed.var(dim=(0, 1), correction=0))
        parts = torch.split(mixed, list(groups), dim=-1)
        if settings.heads_by == "greedy":
            grams = [settings.kernel(part.flatten(1)) for part in parts]
        else:
            grams = [settings.kernel(part.mean(dim=-1)) for part in parts]
        grams.append(hsic.linear(outputs).to(grams[0].dtype))
        every = torch.stack(grams)
        sums.add(sums.dependence, path, torch.einsum("aij,bij->ab", every, hsic.target(every, settings.kind)))

    return observe


def _grid(path: str, against: Tensor, settings: Settings, sums: _Sums) -> Callable[[Tensor], None]:
    def observe(values: Tensor) -> None:
        by_place = values.transpose(1, 2)
        sums.add(sums.dependence, path, hsic.dependence(by_place, against, settings.kernel))

    return observe


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
    """Return the squared norm of the weights that read each channel."""
    member = next(member for member in axis.members if member.dim == 1)
    return block.get_parameter(member.parameter).detach().cpu().double().square().sum(dim=0)


def _normalised(cross: Tensor) -> Tensor:
    """Return HSIC normalized to CKA; 0 for constant components."""
    own = cross.diagonal().clamp(min=0)
    both = (own[:, None] * own[None, :]).sqrt()
    return torch.where(both > torch.finfo(torch.float32).tiny, cross / both.clamp(min=1e-300), 0.0)


def _static(cross: Tensor, settings: Settings) -> Tensor:
    """Return relevance minus a tenth of the mean redundancy, ``(H,)``; constant heads get the lowest score.

    With the published estimator both terms are HSICs. With the median kernel both are normalized to CKA, because the
    kernels of features are large there and softmax outputs are small, so that a tenth of the redundancy would outweigh
    all relevance (on a ViT-Ti by a factor of 20).
    """
    heads = len(cross) - 1
    if settings.estimator == "unbiased_median":
        cross = _normalised(cross)
    others = cross[:heads, :heads].sum(dim=1) - cross.diagonal()[:heads]
    values = cross[:heads, heads] - BETA * others / max(heads - 1, 1)
    dead = cross.diagonal()[:heads] <= _DEAD
    return torch.where(dead, -torch.inf, values)


def greedy(alike: Tensor, energy: Tensor, beta: float = 1.0) -> Tensor:
    """Order heads greedily: next is the head with the largest relevance minus similarity to a head chosen before.

    Args:
        alike: CKA of every head with every head, last with the output, ``(H + 1, H + 1)``.
        energy: energy of the heads' outputs, ``(H,)``; decides ties.
        beta: weight of the similarity. With the mean in place of the maximum, or with 0.75 or less, a copy is not
            detected.

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
    """Return values scaled from 0 for the smallest to 1 for the largest; all 1 if all are equal."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if bool(high > low) else torch.ones_like(values)


def order(values: Tensor, energy: Tensor) -> Tensor:
    """Return indices, the most valuable first; if equal, the one with more output energy, then the lower index."""
    keys = (np.arange(len(values)), -energy.numpy(), -values.numpy())
    return torch.from_numpy(np.lexsort(keys))
