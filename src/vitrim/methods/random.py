"""Random scores: the baseline that every other method must beat at equal cost."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from vitrim.cut.observe import axes
from vitrim.methods import Data, ScoreMethod

__all__ = ["Method"]


class Method(ScoreMethod):
    """Keep channels drawn at random.

    Attributes:
        choice: which widths are allowed, see `vitrim.cut.fill.Choice`.
    """

    values: ClassVar[bool] = True
    sentence: ClassVar[str] = "keeps channels drawn at random; the control that every method must beat"

    def scores(self, model: nn.Module, data: Data | None, *, seed: int) -> Mapping[str, Tensor]:
        """Uniform random numbers, see `vitrim.methods.ScoreMethod.scores`."""
        generator = torch.Generator().manual_seed(seed)
        return {path: torch.rand(axis.size, generator=generator) for path, axis in axes(model).items()}
