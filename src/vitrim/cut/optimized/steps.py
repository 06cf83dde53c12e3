"""Token steps as they run: folded, with what is the same for all images computed once.

B images, N tokens, D width.

All that this package knows of single kinds of steps is in this file.
"""

import math

import torch
from torch import Tensor

from vitrim.cut.optimized.masks import aligned
from vitrim.nn import Block, fold_merges_
from vitrim.nn.grid import GridMerged, Sized
from vitrim.nn.tokens import Dropped, Step

__all__ = ["adds_zeros", "fix_step_", "fold_step_", "may_compare_stream"]


class FixedSized(Sized):
    """Counts patches with one constant, or not at all where all tokens stand for as many."""

    rows: Tensor | None

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `Sized.keys`."""
        return x, None if self.rows is None else self.rows[..., : x.shape[1]]


class FixedGridMerged(GridMerged):
    """The same for a block that merges."""

    rows: Tensor | None

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `GridMerged.keys`."""
        return x, None if self.rows is None else self.rows[..., : x.shape[1]]


class FixedDropped(Dropped):
    """Raises the key of missing patches with one constant, or not at all where one is missing."""

    rows: Tensor | None
    zero: Tensor

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `Dropped.keys`."""
        given = torch.cat([x, self.zero.expand(x.shape[0], 1, x.shape[2])], dim=1)
        return given, None if self.rows is None else self.rows[..., : given.shape[1]]


def fold_step_(block: Block) -> None:
    """Fold the step of a block into as few layers as it can be."""
    fold_merges_(block)


def adds_zeros(step: Step | None) -> bool:
    """Whether a step joins tokens of zeros to the normed ones that attention is given."""
    return isinstance(step, Dropped) and step.missing > 0


def may_compare_stream(step: Step | None) -> bool:
    """Whether a step may read the residual stream between both branches of its block."""
    return step is not None and step.looks


def fix_step_(step: Step | None, dtype: torch.dtype, device: torch.device) -> None:
    """Compute what a step adds to the logits; it stands where and in the type in which it will run."""
    if type(step) in (Sized, GridMerged):
        assert isinstance(step, Sized)
        counts = step.counts.double() if step.seen.sized else torch.ones(1, dtype=torch.float64)
        same = bool((counts == counts.flatten()[0]).all())
        step.__class__ = FixedSized if type(step) is Sized else FixedGridMerged
        _give_rows_(step, None if same else counts.cpu().log(), dtype, device)
    elif type(step) is Dropped and step.missing:
        raised = torch.zeros(1, 1, 1, (step.arriving if step.kept is None else len(step.kept)) + 1, dtype=torch.float64)
        raised[..., -1] = math.log(step.missing)
        step.__class__ = FixedDropped
        _give_rows_(step, None if step.missing == 1 else raised, dtype, device)
        step.register_buffer("zero", torch.zeros(1, 1, 1, dtype=dtype, device=device), persistent=False)


def _give_rows_(step: Step, mask: Tensor | None, dtype: torch.dtype, device: torch.device) -> None:
    step.register_buffer("rows", None if mask is None else aligned(mask).to(device, dtype), persistent=False)
