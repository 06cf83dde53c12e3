"""Feature maps of merged patches, resized to the grid before merging.

B images, D width, (h, w) rows and columns of the merged patches.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["unmerge"]


def unmerge(
    maps: Tensor,
    size: tuple[int, int],
    halved: tuple[int, int],
    mode: Literal["nearest", "bilinear"] = "bilinear",
) -> Tensor:
    """Resize a map of merged patches to the grid before merging.

    Args:
        maps: ``(B, D, h, w)``.
        size: rows and columns of that grid.
        halved: how often its rows and its columns were halved.
        mode: ``nearest`` copies to each position the token that it was merged into, so that averaging neighbors again
            returns `maps`; ``bilinear`` interpolates between tokens, each at the center of the positions that it
            represents.

    Returns:
        ``(B, D, *size)``.
    """
    (rows, columns), (high, wide) = size, halved
    if not high and not wide:
        return maps
    if mode == "nearest":
        row, column = (torch.arange(n, device=maps.device) >> often for n, often in zip(size, halved, strict=True))
        return maps.index_select(2, row).index_select(3, column)
    # With an odd size, the last token represents one position. It is treated as two, and the second one is cut off.
    whole = (maps.shape[2] << high, maps.shape[3] << wide)
    return F.interpolate(maps, size=whole, mode="bilinear", align_corners=False)[:, :, :rows, :columns]
