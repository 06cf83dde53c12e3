"""How many images give a fit enough tokens."""

import math
from collections.abc import Iterator

from vitrim.words.spec import Attention, Spec

__all__ = ["images_for_tokens"]


def images_for_tokens(spec: Spec, tokens: float) -> int:
    """Return the number of images that give so many tokens for each neuron or channel of every layer.

    Args:
        spec: the model.
        tokens: tokens for each feature of a fit; positive.
    """
    return max(math.ceil(max(_widths(block), default=1) * tokens / stage.tokens) for _, stage, block in spec.blocks())


def _widths(block: object) -> Iterator[int]:
    mixer, hidden = getattr(block, "mixer", None), getattr(block, "hidden", None)
    if isinstance(mixer, Attention):
        yield sum(mixer.v)
    if hidden:
        yield hidden
