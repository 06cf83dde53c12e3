"""What each neuron, value channel and head loses if it alone is removed and the others compensate for it.

B images, N tokens, D width, H heads, K channels of a head, C channels of all heads, M hidden neurons.

Sources: Hassibi and Stork, "Optimal Brain Surgeon", 1992, on the Gram matrix of a layer's inputs as in SparseGPT; for
several channels at once (a head), the Schur complement of that matrix.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitrim.cut.compensate.attention import AttentionCut
from vitrim.cut.compensate.closed_form import damped
from vitrim.cut.compensate.hear import passed
from vitrim.cut.compensate.importance import importances
from vitrim.cut.compensate.neurons import NeuronCut
from vitrim.cut.compensate.walk import Walk
from vitrim.nn import Attention
from vitrim.nn.modes import evaluating

__all__ = ["Removal", "removals"]


@dataclass(frozen=True, eq=False)
class Removal:
    """Losses of the parts of one axis.

    Attributes:
        losses: loss of each part alone, at least 0, float64; those of different axes compare.
        best: indices of the parts, the most valuable first. Neurons are in the reversed order of `removal_order`, in
            which of two copies one goes late.
    """

    losses: Tensor
    best: Tensor


def removals(
    model: nn.Module,
    images: Sequence[Tensor],
    *,
    seed: int,
    strength: float = 1e-2,
    advance: Callable[[float], None] = lambda _: None,
) -> dict[str, Removal]:
    """Compute the losses of removals with one pass through the model.

    Args:
        model: an adopted model; not modified.
        images: batches ``(B, C, h, w)``.
        seed: seed of drawn labels.
        strength: strength of the ridge, as a share of the mean diagonal of a layer's Gram matrix.
        advance: called with 1 after each block.

    Returns:
        By path, ``….hidden`` ``(M,)``, ``….v`` ``(C,)`` and ``….heads`` ``(H,)``; parts that a norm ties are left out.

    Raises:
        MethodError: if activations are constant or not finite; the message names the path.
    """
    worth = importances(model, images, seed=seed)
    found: dict[str, Removal] = {}
    with evaluating(model, frozen=True):
        walk = Walk(model, images, worth, strength, 0.0)
        place = walk.first()
        for index in range(len(walk.rows)):
            block, form = place.block, place.block.form
            if isinstance(block.attn, Attention) and form.mixed_norm is None and block.attn.v:
                cut = AttentionCut(place)
                weight, gram = torch.cat(cut.heads.proj, dim=1), cut.moments.positive_gram
                half, tokens = worth[f"{place.path}.mixer"].half, place.stage.tokens
                inverse = torch.linalg.inv(damped(gram, max(strength, cut.moments.noise), f"{place.path}.v"))
                rows = (half @ weight).mT
                single = tokens * rows.square().sum(1) / inverse.diagonal()
                found[f"{place.path}.v"] = _ranked(single)
                whole = [tokens * _together(rows, inverse, part) for part in _parts(block.attn.v)]
                found[f"{place.path}.heads"] = _ranked(torch.stack(whole))
            if block.spec.hidden and form.hidden_norm is None:
                neurons = NeuronCut(place, block)
                moments, half = neurons.moments, worth[f"{place.path}.mlp"].half
                inverse = torch.linalg.inv(damped(moments.gram, max(strength, moments.noise), f"{place.path}.hidden"))
                single = place.stage.tokens * (half @ neurons.weight).square().sum(0) / inverse.diagonal()
                found[f"{place.path}.hidden"] = Removal(single.clamp_min(0).cpu(), neurons.order.flip(0).cpu())
            advance(1)
            if index + 1 < len(walk.rows):
                place = walk.send(passed(block, place.streams))
    return found


def _ranked(losses: Tensor) -> Removal:
    losses = losses.clamp_min(0).cpu()
    return Removal(losses, losses.argsort(descending=True, stable=True))


def _parts(widths: Sequence[int]) -> list[Tensor]:
    return list(torch.split(torch.arange(sum(widths)), list(widths)))


def _together(rows: Tensor, inverse: Tensor, part: Tensor) -> Tensor:
    """Return the loss of removing several channels at once: ``tr(W_S' metric W_S (G^-1_SS)^-1)``."""
    mine = rows[part]
    lost: Tensor = torch.linalg.solve(inverse[part][:, part], mine @ mine.mT).diagonal().sum()
    return lost
