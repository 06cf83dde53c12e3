"""The residual stream between two blocks, where its tokens stand for several patches each.

B images, N tokens, P prefix tokens, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Residual", "Stream", "precise", "tokens_of"]


def precise(x: Tensor) -> torch.dtype:
    """The type for sums over many tokens: that of `x`, but float32 at least.

    Counts above 256 are not whole in bfloat16, and a sum of 655 values of 100 is infinite in float16.
    """
    return torch.promote_types(x.dtype, torch.float32)


class Stream(NamedTuple):
    """Tokens, and how many patches each one stands for."""

    x: Tensor
    """``(B, N, D)``, prefix tokens first."""
    sizes: Tensor
    """``(B, N, 1)``, whole numbers in float32; 1 for prefix tokens."""
    patches: int
    """What the sizes of the patch tokens sum to, in every image."""

    def key_bias(self) -> Tensor:
        """What to add to attention's logits so that a key counts as its patches, ``(B, 1, 1, N)``."""
        return self.sizes.to(precise(self.x)).log().mT[:, None]

    def repeated(self, prefix: int) -> Tensor:
        """Each token as often as it has patches: a head that pools patches then reads their mean or attention.

        Args:
            prefix: P, tokens that stay as they are.

        Returns:
            ``(B, P + patches, D)``.
        """
        ends = self.sizes[:, prefix:, 0].round().cumsum(dim=1)
        places = torch.arange(self.patches, device=self.x.device, dtype=ends.dtype)
        index = (ends[:, None, :] <= places[None, :, None]).sum(dim=-1) + prefix
        each = self.x.gather(1, index[..., None].expand(-1, -1, self.x.shape[-1]))
        return torch.cat([self.x[:, :prefix], each], dim=1)


Residual = Tensor | Stream
"""What a block takes and gives: tokens, with their sizes where those are not all 1."""


def tokens_of(residual: Residual) -> Tensor:
    """The tokens alone, ``(B, N, D)``."""
    return residual.x if isinstance(residual, Stream) else residual
