"""The patch embedding of patches that do not overlap, as one matrix product.

B images, C channels, (h, w) height and width of an image, (p, q) those of a patch, (R, S) rows and columns of patches,
D width.
"""

from typing import Any

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["PatchProduct", "replace_patches_"]


class PatchProduct(nn.Module):
    """A convolution whose stride is its kernel, as one linear layer on the pixels of each patch.

    A DeiT-S spends 15 % of its time on an H100 (bf16, batch 256) in this convolution, which runs without tensor cores
    there (cuDNN; PyTorch 2.11).

    Args:
        conv: the convolution; without padding, dilation and groups.
        multiple: the row of a patch is padded with zeros, so that C p q is a multiple of this.
    """

    def __init__(self, conv: nn.Conv2d, multiple: int = 1) -> None:
        super().__init__()
        high, wide = conv.kernel_size
        self.patch = (high, wide)
        rows = conv.in_channels * high
        self.spare = next(spare for spare in range(multiple) if rows * (wide + spare) % multiple == 0)
        weight = F.pad(conv.weight.detach(), (0, self.spare)).flatten(1)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map images ``(B, C, h, w)`` to ``(B, D, R, S)``, a view of ``(B, R, S, D)``.

        As the convolution does, it leaves out pixels at the end that do not fill a patch.
        """
        high, wide = self.patch
        rows, columns = x.shape[2] // high, x.shape[3] // wide
        if x.shape[2] != rows * high or x.shape[3] != columns * wide:
            x = x[:, :, : rows * high, : columns * wide]
        x = torch.unflatten(torch.unflatten(x, 3, (columns, wide)), 2, (rows, high)).permute(0, 2, 4, 1, 3, 5)
        if self.spare:
            x = F.pad(x, (0, self.spare))
        return F.linear(x.flatten(3), self.weight, self.bias).permute(0, 3, 1, 2)


def replace_patches_(model: Any, multiple: int) -> None:
    """Replace the convolution of timm's `PatchEmbed` in `model`; a stem of any other kind stays as it is.

    timm's layer keeps its checks of image sizes, its padding, its order of tokens and its norm.
    """
    stem = getattr(model, "patch_embed", None)
    conv = getattr(stem, "proj", None)
    if not isinstance(stem, PatchEmbed) or not isinstance(conv, nn.Conv2d) or not _is_patches(conv):
        return
    # `vitrim.nn.layers.input_channels` reads the channels of the images off the first convolution otherwise.
    stem.in_chans = conv.in_channels
    stem.proj = PatchProduct(conv, multiple)


def _is_patches(conv: nn.Conv2d) -> bool:
    plain = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding == (0, 0)
    return type(conv) is nn.Conv2d and plain and conv.kernel_size == conv.stride and conv.kernel_size != (1, 1)
