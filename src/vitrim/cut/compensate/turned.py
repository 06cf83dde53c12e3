"""Order the channels of all heads by value, without a change of the function."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vitrim.cut.compensate.attention import AttentionCut
from vitrim.cut.compensate.hear import passed
from vitrim.cut.compensate.importance import importances
from vitrim.cut.compensate.walk import Walk
from vitrim.families import blocks_of
from vitrim.nn import Attention
from vitrim.nn.copying import copied
from vitrim.nn.modes import evaluating

__all__ = ["turned"]


def turned(
    model: nn.Module, images: Sequence[Tensor], *, seed: int, advance: Callable[[float], None] = lambda _: None
) -> nn.Module:
    """Return a copy of a model, with the same outputs, in which the last channels of each head lose least.

    A method that selects channels cannot find a subspace of few dimensions that is spread over all channels, as those
    of trained heads are. In the new basis it is the first channels.

    Args:
        model: an adopted model; not modified.
        images: batches ``(B, C, h, w)``.
        seed: seed of drawn labels.
        advance: called with 1 after each block.

    Raises:
        MethodError: if activations are not finite; the message names the path.
    """
    worth, twin = importances(model, images, seed=seed), copied(model)
    mine = dict(blocks_of(twin))
    with evaluating(model, frozen=True), torch.no_grad():
        walk = Walk(model, images, worth, 0.0, 0.0)
        place = walk.first()
        for index in range(len(walk.rows)):
            if isinstance(place.block.attn, Attention) and place.block.attn.v:
                named = dict(mine[place.path].named_parameters())
                for name, value in AttentionCut(place).turned().items():
                    named[name].copy_(value)
            advance(1)
            if index + 1 < len(walk.rows):
                place = walk.send(passed(place.block, place.streams))
    return twin
