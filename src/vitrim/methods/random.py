"""Random scores: the baseline that every other method must beat at equal cost."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from vitrim.cut.observe import axes
from vitrim.cut.width import check_narrowable, widths
from vitrim.methods import Data, ScoreMethod

__all__ = ["Method"]


class Method(ScoreMethod):
    """Keep channels drawn at random.

    Attributes:
        choice: which widths are allowed, see `vitrim.cut.fill.Choice`.
        width: whether the residual width may be cut, too.
    """

    values: ClassVar[bool] = True
    sentence: ClassVar[str] = "keeps channels drawn at random; the control that every method must beat"

    width: bool = False

    def scores(self, model: nn.Module, data: Data | None, *, seed: int) -> Mapping[str, Tensor]:
        """Uniform random numbers, see `vitrim.methods.ScoreMethod.scores`."""
        generator = torch.Generator().manual_seed(seed)
        sizes = {path: axis.size for path, axis in axes(model).items()}
        if self.width:
            check_narrowable(model)
            sizes |= widths(model)
        return {path: torch.rand(size, generator=generator) for path, size in sizes.items()}
