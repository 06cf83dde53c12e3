"""Weight magnitude: the simplest score; needs no data.

H heads, K channels of a head, M hidden neurons.

A channel's score is the product of the norms of the weights on both sides of it: rows of queries and keys for ``qk``,
row of values and column of the projection for ``v``, row of the first and column of the second linear layer for
``hidden``. Such a product does not change when one side is scaled up and the other down. Scores of different kinds are
not comparable, so each kind is ranked by itself, over all blocks.

A channel of the residual stream (``width``) has such norms in every layer of every block that reads or writes it; its
score is their product, with the scales of the norms in between.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from vitrim.cut.fill import quantiles
from vitrim.cut.width import check_narrowable, widths
from vitrim.families import blocks_of
from vitrim.methods import Data, ScoreMethod
from vitrim.nn import Axis, Block

__all__ = ["Method"]


class Method(ScoreMethod):
    """Keep channels with large weights.

    Attributes:
        choice: which widths are allowed, see `vitrim.cut.fill.Choice`.
        width: whether the residual width may be cut, too; without training afterwards that costs much accuracy.
    """

    values: ClassVar[bool] = True
    sentence: ClassVar[str] = "keeps channels with large weights on both sides; no data"

    width: bool = False

    def scores(self, model: nn.Module, data: Data | None, *, seed: int) -> Mapping[str, Tensor]:
        """Rank of each channel among those of its kind, see `vitrim.methods.ScoreMethod.scores`."""
        found = {
            f"{path}.{axis.name}": _score(block, axis) for path, block in blocks_of(model) for axis in block.axes()
        }
        if self.width:
            check_narrowable(model)
            found |= {path: _stream_score(model, path, size) for path, size in widths(model).items()}
        return quantiles(found, {path: path.rpartition(".")[2] for path in found})


@torch.no_grad()
def _score(block: Block, axis: Axis) -> Tensor:
    """Sum of the logarithms of the norms, over all weight matrices that the axis indexes; ``(C,)``."""
    total = torch.zeros(axis.size, dtype=torch.float64)
    for member in axis.members:
        weight = block.get_parameter(member.parameter)
        if weight.dim() == 2:
            rows = weight.narrow(member.dim, member.offset, axis.size).cpu().double()
            total += rows.norm(dim=1 - member.dim).clamp_min(1e-300).log()
    return total


@torch.no_grad()
def _stream_score(model: nn.Module, path: str, size: int) -> Tensor:
    """Sum of the logarithms of the norms of what each channel indexes in the blocks of a stage; ``(D,)``."""
    total = torch.zeros(size, dtype=torch.float64)
    for block in (block for name, block in blocks_of(model) if name.startswith(path.removesuffix("width"))):
        for member in block.stream():
            own = block.get_parameter(member.parameter).cpu().double()
            if own.dim() > 1 or member.parameter in ("norm1.weight", "norm2.weight"):
                slices = own.narrow(member.dim, member.offset, size).movedim(member.dim, 0).reshape(size, -1)
                total += slices.norm(dim=1).clamp_min(1e-300).log()
    return total
