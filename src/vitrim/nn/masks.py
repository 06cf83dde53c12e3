"""Additive masks in memory as PyTorch's attention kernels read them."""

from torch import Tensor
from torch.nn import functional as F

__all__ = ["ROW", "aligned"]

ROW = 8
"""Rows of a mask start at multiples of this many elements: 16 bytes in 16-bit types.

PyTorch's memory-efficient kernel copies any other mask in each call.
"""


def aligned(mask: Tensor) -> Tensor:
    """Return `mask` with its rows padded to a multiple of `ROW`."""
    return F.pad(mask, (0, -mask.shape[-1] % ROW)).contiguous()
