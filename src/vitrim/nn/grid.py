"""Merging neighbours on the grid of patches, counting merged ones in attention, and laying them out again.

B images, N tokens that arrive, P prefix tokens, (H, W) rows and columns of the patches that arrive, D width.

Source: "CAIT: Triple-Win Compression towards High Accuracy, Fast Inference, and Favorable Transferability For ViTs",
Wang et al., arXiv 2309.15755. Its method section could not be read, so form and places are our reading of the abstracts
("CAIT-style"): pairs of neighbours along one axis, one matrix for each of the two, the mean at the start.
"""

import itertools
import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrim.nn.tokens import Step
from vitrim.words.errors import DataError
from vitrim.words.spec import Block, GridMerge, Stage, Tokens, spans

__all__ = ["GridMerged", "Sized", "fold_merges_", "grid_step", "unmerge"]


class Sized(Step):
    """Attention counts each patch as those that it stands for: their number's logarithm is added to its logits.

    Without it, prefix tokens get as many times too large a share of each softmax.

    Args:
        arriving: the tokens at the block's input.
        dense: rows and columns of the dense grid.
        step: what becomes of them there, if anything.
    """

    counts: Tensor

    def __init__(self, arriving: Tokens, dense: tuple[int, int], step: GridMerge | None = None) -> None:
        super().__init__()
        self.spec = step
        self.place(arriving, dense)

    def place(self, arriving: Tokens, dense: tuple[int, int]) -> None:
        """Take the tokens of another grid.

        Args:
            arriving: the tokens at the block's input.
            dense: rows and columns of the dense grid.
        """
        patches = math.prod(dense)
        self.arriving, self.dense = arriving, dense
        self.seen = arriving if self.spec is None else self.spec.flow(arriving, patches).leaves
        self.init_non_persistent_buffers()

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Give all tokens, and the logarithms of their numbers, ``(1, 1, 1, N)``."""
        return x, self.counts.to(x.device, x.dtype).log()

    def init_non_persistent_buffers(self) -> None:
        """Compute what is not stored."""
        rows, columns = (spans(n, often) for n, often in zip(self.dense, self.seen.halved, strict=True))
        counts = [1] * self.seen.prefix + [a * b for a, b in itertools.product(rows, columns)]
        # Whole numbers: a cast of the model to another type and back would round their logarithms.
        self.register_buffer("counts", torch.tensor(counts, device="cpu")[None, None, None], persistent=False)


class GridMerged(Sized):
    """Merges pairs of neighbours along one axis of the grid; prefix tokens pass unchanged.

    ``y = A a + B b + c`` for neighbours a and b. Stored is what A and B differ from half the identity by, and c, all
    zero at the start; so weight decay leads back to the mean. The mean itself is added in the type of the residual
    stream: under autocast, half the identity would round small differences away. `fold_` makes one linear layer of it.

    Args:
        step: axis, form, and whether attention counts merged patches.
        arriving: the tokens before the merge; they fill a grid.
        stage: width and dense grid.
    """

    def __init__(self, step: GridMerge, arriving: Tokens, stage: Stage) -> None:
        super().__init__(arriving, stage.grid, step)
        self.axis, self.form = step.axis, step.form
        width = stage.width
        self.folded: nn.Linear | None = None
        if step.form != "mean":
            self.delta = nn.Parameter(torch.zeros((width, 2 * width) if step.form == "linear" else (2, width)))
            self.bias = nn.Parameter(torch.zeros(width))

    def fresh(self, name: str, like: Tensor) -> Tensor:
        """What a parameter is before it is trained, so that the step is the mean."""
        return torch.zeros(getattr(self, name).shape, dtype=like.dtype, device=like.device)

    def enter(self, x: Tensor) -> Tensor:
        """Map ``(B, P + H W, D)`` to ``(B, P + ceil(H W / 2), D)``, or what odd sides make of it.

        Raises:
            DataError: if another number of tokens comes.
        """
        prefix, grid = self.arriving.prefix, self.arriving.grid
        assert grid is not None
        if x.shape[1] != self.arriving.total:
            raise DataError(
                f"a block that merges neighbours must be given {prefix} + {grid[0]} x {grid[1]} tokens, but got "
                f"{x.shape[1]}; give images of the model's size, or change that with set_input_size"
            )
        merged = self._merge(torch.unflatten(x[:, prefix:], 1, grid)).flatten(1, 2)
        return torch.cat([x[:, :prefix], merged], dim=1) if prefix else merged

    def _merge(self, patches: Tensor) -> Tensor:
        """Map ``(B, H, W, D)`` to ``(B, ceil(H / 2), W, D)`` or ``(B, H, ceil(W / 2), D)``."""
        dim = 1 if self.axis == "h" else 2
        if patches.shape[dim] % 2:
            patches = torch.cat([patches, patches.narrow(dim, patches.shape[dim] - 1, 1)], dim=dim)
        pairs = torch.unflatten(patches, dim, (-1, 2))
        a, b = pairs.unbind(dim + 1)
        if self.form == "mean":
            return (a + b) * 0.5
        if self.form == "channel":
            return a * (self.delta[0] + 0.5) + b * (self.delta[1] + 0.5) + self.bias
        # Neighbours along a row lie side by side in memory: no copy.
        both = pairs.flatten(3) if dim == 2 else torch.cat([a, b], dim=-1)
        if self.folded is not None:
            merged: Tensor = self.folded(both)
            return merged
        return (a + b) * 0.5 + F.linear(both, self.delta, self.bias)

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `Sized.keys`, if the patches are to be counted."""
        return super().keys(x) if self.seen.sized else (x, None)

    @torch.no_grad()
    def fold_(self) -> None:
        """Make one linear layer of a linear merge, for inference: the same numbers in one product."""
        if self.form != "linear" or self.folded is not None:
            return
        width = len(self.bias)
        half = 0.5 * torch.eye(width, dtype=self.delta.dtype, device=self.delta.device)
        self.folded = nn.Linear(2 * width, width).to(self.delta)
        self.folded.weight.copy_(self.delta + half.repeat(1, 2))
        self.folded.bias.copy_(self.bias)
        del self.delta, self.bias


def fold_merges_(model: nn.Module) -> nn.Module:
    """Fold every merge of `model`, in place, for inference and export; its parameters' names change.

    A folded model cannot be stored or cut: fold a copy.
    """
    for module in model.modules():
        if isinstance(module, GridMerged):
            module.fold_()
    return model


def grid_step(stage: Stage, spec: Block, arriving: Tokens) -> Step | None:
    """The module of a block that merges on the grid, or whose attention counts what was merged before; else None."""
    if isinstance(spec.tokens, GridMerge):
        return GridMerged(spec.tokens, arriving, stage)
    if spec.tokens is None and arriving.sized and arriving.grid is not None:
        return Sized(arriving, stage.grid)
    return None


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
