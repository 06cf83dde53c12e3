"""Drop patches at fixed positions, the same in all images (ViT-Slim)."""

import itertools
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from vitrim.words.sizes import Count
from vitrim.words.steps._base import Flow, StepBase, Tokens

__all__ = ["Drop"]


class Drop(StepBase):
    """A block runs on some patches only; the others are dropped at its input. Prefix tokens always stay.

    `kept` are the positions of the kept patches in the grid of the dense model, row by row from 0, increasing. They do
    not depend on what was dropped before, so a position has the same number in every block.

    `exact`: whether attention gets one more key and value, computed from a token of zeros, whose logit is raised by the
    logarithm of the number of missing patches. This is the contribution of missing patches if a mask multiplies the
    outputs of both norms by zero, so the block then computes the same as the masked block in ViT-Slim's training.
    """

    keeps_stream: ClassVar[bool] = True

    kind: Literal["drop"] = "drop"
    kept: tuple[Count, ...]
    exact: bool = False

    @model_validator(mode="after")
    def _rise(self) -> Self:
        if any(a >= b for a, b in itertools.pairwise(self.kept)):
            raise ValueError("kept places must rise")
        return self

    @classmethod
    def example(cls, arriving: Tokens) -> Self | None:
        """See `StepBase.example`."""
        return cls(kept=tuple(range(arriving.patches // 2))) if arriving.patches > 1 else None

    def why_not(self, arriving: Tokens, patches: int) -> str | None:
        """See `StepBase.why_not`."""
        if self.kept and self.kept[-1] >= patches:
            return f"kept places must lie within the grid's {patches}, but one is {self.kept[-1]}"
        if not self.kept and not arriving.prefix:
            return "a model without prefix tokens must keep a patch, but none is left"
        if arriving.places is None and (arriving.grid is None or arriving.patches != patches):
            return "patches must be dropped before others are merged or chosen, but here they have no fixed positions"
        return _returning(self.kept, arriving.places)

    @property
    def adds_zeros(self) -> bool:
        """See `StepBase.adds_zeros`."""
        return self.exact

    def why_not_any_size(self) -> str | None:
        """See `StepBase.why_not_any_size`: two grids with equally many patches cannot be distinguished."""
        return (
            "patches must be dropped on one grid, but dynamic_img_size is on; build the model without it, and change "
            "the size with set_input_size before tokens are cut"
        )

    def why_not_resized(self) -> str | None:
        """See `StepBase.why_not_resized`."""
        return "patches are dropped at places of the grid; set the input size on the dense model, and cut tokens after"

    def flow(self, arriving: Tokens, patches: int) -> Flow:
        """See `StepBase.flow`; the exact form adds one token in attention that represents all missing patches."""
        count, missing = len(self.kept), patches - len(self.kept)
        here = arriving.prefix + count
        seen = here + (1 if self.exact and missing else 0)
        leaves = arriving._replace(patches=count, grid=None, places=self.kept) if missing else arriving
        return Flow(seen, seen, seen, here, leaves, leaves)

    def why_not_joining(self, mine: StepBase) -> str | None:
        """See `StepBase.why_not_joining`: a later cut may only drop more."""
        return _returning(self.kept, mine.kept) if isinstance(mine, Drop) else super().why_not_joining(mine)

    def inherited(self, arriving: Tokens) -> Self:
        """See `StepBase.inherited`: patches that an earlier block dropped are not kept."""
        if arriving.places is None:
            return self
        here = set(arriving.places)
        return self.model_copy(update={"kept": tuple(place for place in self.kept if place in here)})

    def following(self) -> "Drop":
        """See `StepBase.following`: the next block keeps the same patches."""
        return self

    def simplified(self, patches: int) -> Self | None:
        """See `StepBase.simplified`."""
        return None if len(self.kept) == patches else self


def _returning(kept: tuple[int, ...], before: tuple[int, ...] | None) -> str | None:
    missing = set(kept) - set(before) if before is not None else set()
    if missing:
        return f"patches that were dropped before cannot be kept, but {sorted(missing)[:8]} are kept here"
    return None
