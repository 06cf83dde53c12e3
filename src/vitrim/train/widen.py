"""Training in float32 of models whose weights are in half precision.

An optimizer's steps are smaller than a rounding of bfloat16 (0.4 % of a weight), and AdamW's epsilon of 1e-8 is zero in
float16: with betas of 0.9 and 0.999 a ViT's loss was NaN after two steps.
"""

import itertools

import torch
from torch import nn

__all__ = ["narrow_", "widen_"]


def widen_(model: nn.Module) -> dict[str, torch.dtype]:
    """Put parameters and buffers of less than 32 bits into float32, in place, so that they stay the same objects.

    Returns:
        The types that they had, by name, for `narrow_`; empty if there were none.
    """
    found = {}
    for name, value in itertools.chain(model.named_parameters(), model.named_buffers()):
        if value.is_floating_point() and value.dtype.itemsize < 4:
            found[name] = value.dtype
            value.data = value.data.float()
    return found


def narrow_(model: nn.Module, types: dict[str, torch.dtype]) -> None:
    """Round parameters and buffers to the types that `widen_` found, in place; gradients are let go."""
    for name, value in itertools.chain(model.named_parameters(), model.named_buffers()):
        if name in types:
            value.grad = None
            value.data = value.data.to(types[name])
