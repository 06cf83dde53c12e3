"""The residual stream between two blocks, if tokens represent several patches each.

B images, N tokens, P prefix tokens, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vitrim.nn.feed import precise

__all__ = ["Residual", "Stream", "tokens_of"]


class Stream(NamedTuple):
    """Tokens, and the number of patches that each token represents."""

    x: Tensor
    """``(B, N, D)``, prefix tokens first."""
    sizes: Tensor
    """``(B, N, 1)``, whole numbers in float32; 1 for prefix tokens."""
    patches: int
    """Sum of the sizes of the patch tokens, the same in every image."""

    def key_bias(self) -> Tensor:
        """Return the logarithms of the sizes, ``(B, 1, 1, N)``.

        If they are added to the logits of attention, each key counts as many times as it has patches.
        """
        return self.sizes.to(precise(self.x)).log().mT[:, None]

    def repeated(self, prefix: int) -> Tensor:
        """Return each token repeated as many times as it has patches, so that a pooling head weights it by its size.

        Args:
            prefix: P, the number of first tokens that are not repeated.

        Returns:
            ``(B, P + patches, D)``.
        """
        ends = self.sizes[:, prefix:, 0].round().cumsum(dim=1)
        places = torch.arange(self.patches, device=self.x.device, dtype=ends.dtype)
        index = (ends[:, None, :] <= places[None, :, None]).sum(dim=-1) + prefix
        each = self.x.gather(1, index[..., None].expand(-1, -1, self.x.shape[-1]))
        return torch.cat([self.x[:, :prefix], each], dim=1)


Residual = Tensor | Stream
"""Input and output of a block: tokens, with their sizes if those are not all 1."""


def tokens_of(residual: Residual) -> Tensor:
    """Return the tokens without their sizes, ``(B, N, D)``."""
    return residual.x if isinstance(residual, Stream) else residual
