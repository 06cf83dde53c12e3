"""What attention adds to its logits, computed once where it is the same for all images, and left out where it can be.

N tokens, H heads, W windows, A tokens of a window.

A mask that is added costs the flash kernel, so where all keys are raised alike there is none (a softmax does not change
by it). Where there must be one (relative positions of windows, tokens that stand for several patches), its rows lie
`ROW` elements apart in memory: PyTorch's memory-efficient kernel copies any other mask in each call. Numbers of tokens
are never padded: that would need a mask, and kernels without one take any number.

Classes called ``Fixed…`` stand in place of those of `vitrim.nn`, whose attributes they keep: the class of a living
module is changed, as `torch.nn.utils.parametrize` does.
"""

import torch
from torch import Tensor

from vitrim.nn import Block, WindowBlock
from vitrim.nn.continuous import ContinuousWindowAttention
from vitrim.nn.masks import aligned
from vitrim.nn.window import BLOCKED, WindowAttention

__all__ = ["fix_windows_"]


class _Fixed(WindowAttention):
    """Window attention whose biases are looked up once.

    `rows` has them in memory as the kernels want them, ``(1 or W, H, A, up(A, ROW))``; pairs that do not meet are in it
    unless the grid may change.
    """

    rows: Tensor
    whole: bool

    def _bias(self, blocked: Tensor | None) -> Tensor:
        bias = self.rows[..., : self.rows.shape[-2]]
        return bias if blocked is None or self.whole else torch.where(blocked[:, None], bias + BLOCKED, bias)


class FixedWindowAttention(_Fixed):
    """`WindowAttention` with fixed biases."""


class FixedContinuousWindowAttention(_Fixed, ContinuousWindowAttention):
    """`ContinuousWindowAttention` with fixed biases."""


_KINDS: dict[type, type[_Fixed]] = {
    WindowAttention: FixedWindowAttention,
    ContinuousWindowAttention: FixedContinuousWindowAttention,
}


def fix_windows_(block: Block) -> None:
    """Look the biases of a block with windows up; it stands where and in the type in which it will run."""
    if isinstance(block, WindowBlock) and isinstance(block.attn, WindowAttention) and type(block.attn) in _KINDS:
        fixed = not block.window.dynamic
        bias = block.attn._bias(block.blocked if fixed else None)
        block.attn.__class__ = _KINDS[type(block.attn)]
        assert isinstance(block.attn, _Fixed)
        block.attn.whole = fixed
        block.attn.register_buffer("rows", aligned(bias.detach()), persistent=False)
