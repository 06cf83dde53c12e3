"""Maps of features: merged patches laid out on the grid that they were merged from.

B images, D width, (h, w) rows and columns of the patches that are left.
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
    """Lay merged patches out on the grid that they were merged from.

    Args:
        maps: ``(B, D, h, w)``.
        size: rows and columns of that grid.
        halved: how often its rows and its columns were halved.
        mode: ``nearest`` gives each place the token that it was merged into, so that the mean of both neighbours gives
            the map back; ``bilinear`` interpolates between tokens at the middle of the places that they stand for.

    Returns:
        ``(B, D, *size)``.
    """
    (rows, columns), (high, wide) = size, halved
    if not high and not wide:
        return maps
    if mode == "nearest":
        row, column = (torch.arange(n, device=maps.device) >> often for n, often in zip(size, halved, strict=True))
        return maps.index_select(2, row).index_select(3, column)
    # An odd last token stands for one place; laid out as if for two, and cut off, it stays where it is.
    whole = (maps.shape[2] << high, maps.shape[3] << wide)
    return F.interpolate(maps, size=whole, mode="bilinear", align_corners=False)[:, :, :rows, :columns]
