"""Weight magnitude: the oldest score, without data.

H heads, K channels of a head, M hidden neurons.

A channel's score is the product of the norms of the weights on both sides of it: rows of queries and keys for ``qk``,
row of values and column of the projection for ``v``, row of the first and column of the second linear layer for
``hidden``. Such a product is invariant to the scale that the two sides can trade. Scores of different kinds do not
compare, so each kind is ranked by itself (as one list over all blocks).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitrim.cut.fill import Choice, fill, quantiles
from vitrim.families import blocks_of, describe
from vitrim.methods._contract import Data, Found
from vitrim.nn import Axis, Block
from vitrim.words.budget import Budget
from vitrim.words.plain import Node

__all__ = ["Method"]


class Method(Node):
    """Keep channels with large weights.

    Attributes:
        choice: which widths are allowed, see `vitrim.cut.fill.Choice`.
    """

    needs: ClassVar[str] = "nothing"
    values: ClassVar[bool] = True
    timed: ClassVar[bool] = True
    sentence: ClassVar[str] = "keeps channels with large weights on both sides; no data"

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
        found = {
            f"{path}.{axis.name}": (axis.name, _score(block, axis))
            for path, block in blocks_of(model)
            for axis in block.axes()
        }
        scores = {path: score for path, (_, score) in found.items()}
        kinds = {path: kind for path, (kind, _) in found.items()}
        plan = fill(describe(model), quantiles(scores, kinds), budget, choice=self.choice, by="score")
        return Found(plan=plan, parent=model)


@torch.no_grad()
def _score(block: Block, axis: Axis) -> Tensor:
    """Sum of the logarithms of the norms, over all weight matrices that the axis indexes; ``(C,)``."""
    total = torch.zeros(axis.size, dtype=torch.float64)
    for member in axis.members:
        weight = block.get_parameter(member.parameter)
        if weight.dim() == 2:
            rows = weight.narrow(member.dim, member.offset, axis.size).double().cpu()
            total += rows.norm(dim=1 - member.dim).clamp_min(1e-300).log()
    return total
