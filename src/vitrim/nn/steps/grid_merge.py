"""Merge neighboring patches along one axis of the grid.

B images, P prefix tokens, (H, W) rows and columns of the arriving patches, D width.

Source: "CAIT: Triple-Win Compression towards High Accuracy, Fast Inference, and Favorable Transferability For ViTs",
Wang et al., arXiv 2309.15755. Its method section was not available, so this follows the abstract only ("CAIT-style"):
pairs of neighbors along one axis, one matrix for each of the two, starting from the mean.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrim.nn.axis import Member
from vitrim.nn.steps._constant_sizes import ConstantSizes
from vitrim.words.errors import DataError
from vitrim.words.spec import Stage
from vitrim.words.steps import Tokens
from vitrim.words.steps.grid_merge import GridMerge

__all__ = ["GridMerged", "make"]


class GridMerged(ConstantSizes):
    """Merges pairs of neighbors along one axis of the grid; prefix tokens are unchanged.

    ``y = A a + B b + c`` for neighbors a and b. The parameters are the differences of A and B from half the identity,
    and c. All are zero at the start, so weight decay pulls the merge towards the mean. The mean is added in the type of
    the residual stream, because under autocast adding half the identity to the weights would round small differences
    away. `fold_` converts the merge to one linear layer.

    Args:
        step: axis, form, and whether attention counts merged patches.
        arriving: the tokens before the merge; they fill a grid.
        stage: width and dense grid.
    """

    def __init__(self, step: GridMerge, arriving: Tokens, stage: Stage) -> None:
        self.spec = step  # set first because `place`, called by the base class, uses it
        super().__init__(arriving, stage.grid)
        width = stage.width
        self.folded: nn.Linear | None = None
        if step.form != "mean":
            self.delta = nn.Parameter(torch.zeros((width, 2 * width) if step.form == "linear" else (2, width)))
            self.bias = nn.Parameter(torch.zeros(width))

    def mixed(self, arriving: Tokens) -> Tokens:
        """See `ConstantSizes.mixed`."""
        return self.spec.flow(arriving, arriving.patches).mixed

    def initial(self, name: str, like: Tensor) -> Tensor:
        """See `StepModule.initial`; the step starts as the mean."""
        return torch.zeros(getattr(self, name).shape, dtype=like.dtype, device=like.device)

    def stream(self) -> tuple[Member, ...]:
        """See `StepModule.stream`; a linear merge reads the channels of both neighbors."""
        if self.spec.form == "mean":
            return ()
        found = [Member(parameter="step.bias", dim=0, offset=0), Member(parameter="step.delta", dim=1, offset=0)]
        if self.spec.form == "linear":
            found.append(Member(parameter="step.delta", dim=1, offset=len(self.bias)))
            found.append(Member(parameter="step.delta", dim=0, offset=0))
        return tuple(found)

    def enter(self, x: Tensor) -> Tensor:
        """Map ``(B, P + H W, D)`` to ``(B, P + H ceil(W / 2), D)`` or ``(B, P + ceil(H / 2) W, D)``.

        Raises:
            DataError: if the number of tokens is not P + H W.
        """
        prefix, grid = self.arriving.prefix, self.arriving.grid
        assert grid is not None
        if x.shape[1] != self.arriving.total:
            raise DataError(
                f"a block that merges neighbors must be given {prefix} + {grid[0]} x {grid[1]} tokens, but got "
                f"{x.shape[1]}; give images of the model's size, or change that with set_input_size"
            )
        merged = self._merge(torch.unflatten(x[:, prefix:], 1, grid)).flatten(1, 2)
        return torch.cat([x[:, :prefix], merged], dim=1) if prefix else merged

    def _merge(self, patches: Tensor) -> Tensor:
        """Map ``(B, H, W, D)`` to ``(B, ceil(H / 2), W, D)`` or ``(B, H, ceil(W / 2), D)``."""
        dim = 1 if self.spec.axis == "h" else 2
        if patches.shape[dim] % 2:
            patches = torch.cat([patches, patches.narrow(dim, patches.shape[dim] - 1, 1)], dim=dim)
        pairs = torch.unflatten(patches, dim, (-1, 2))
        a, b = pairs.unbind(dim + 1)
        if self.spec.form == "mean":
            return (a + b) * 0.5
        if self.spec.form == "channel":
            return a * (self.delta[0] + 0.5) + b * (self.delta[1] + 0.5) + self.bias
        # Neighbors along a row are contiguous in memory: no copy.
        both = pairs.flatten(3) if dim == 2 else torch.cat([a, b], dim=-1)
        if self.folded is not None:
            merged: Tensor = self.folded(both)
            return merged
        return (a + b) * 0.5 + F.linear(both, self.delta, self.bias)

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `ConstantSizes.keys`; without `size_bias` there is no bias."""
        return super().keys(x) if self.attended.constant_sizes or self.fixed else (x, None)

    @torch.no_grad()
    def fold_(self) -> None:
        """Convert a linear merge to one linear layer with the same function, for inference."""
        if self.spec.form != "linear" or self.folded is not None:
            return
        width = len(self.bias)
        half = 0.5 * torch.eye(width, dtype=self.delta.dtype, device=self.delta.device)
        self.folded = nn.Linear(2 * width, width).to(self.delta)
        self.folded.weight.copy_(self.delta + half.repeat(1, 2))
        self.folded.bias.copy_(self.bias)
        del self.delta, self.bias


def make(step: GridMerge, stage: Stage, arriving: Tokens) -> GridMerged:
    """See `vitrim.nn.steps.make_step`."""
    return GridMerged(step, arriving, stage)
