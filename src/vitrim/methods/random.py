"""Random scores: the control that every other method must beat at equal cost."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from vitrim.cut.fill import Choice, fill
from vitrim.cut.observe import axes
from vitrim.families import describe
from vitrim.methods._contract import Data, Found
from vitrim.words.budget import Budget
from vitrim.words.plain import Node

__all__ = ["Method"]


class Method(Node):
    """Keep channels drawn at random.

    Attributes:
        choice: which widths are allowed, see `vitrim.cut.fill.Choice`.
    """

    needs: ClassVar[str] = "nothing"
    values: ClassVar[bool] = True
    timed: ClassVar[bool] = True
    sentence: ClassVar[str] = "keeps channels drawn at random; the control that every method must beat"

    choice: Choice = "even"

    def search(
        self,
        model: nn.Module,
        data: Data | None,
        budget: Budget,
        *,
        seed: int,
        teacher: nn.Module | None = None,
        folder: Path | None = None,
        log: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> Found:
        """See `vitrim.methods._contract.Method.search`."""
        generator = torch.Generator().manual_seed(seed)
        scores = {path: torch.rand(axis.size, generator=generator) for path, axis in axes(model).items()}
        plan = fill(describe(model), scores, budget, choice=self.choice, by="score")
        return Found(plan=plan, parent=model)
