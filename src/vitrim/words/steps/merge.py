"""Merge patches that are alike, image by image (token merging)."""

from typing import ClassVar, Literal, Self

from pydantic import PositiveInt

from vitrim.words.steps._base import Flow, StepBase, Tokens

__all__ = ["Merge"]


class Merge(StepBase):
    """Between attention and MLP `count` patches are merged into others that are like them, in every image its own.

    Patches are put in turn into two sets; each of the first looks for the one of the second whose keys are most like
    its own, and the `count` best pairs become one token, their mean weighted by the number of patches in each. From
    then on attention counts a token as so many keys as it has patches. Prefix tokens are never merged.

    Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023.
    """

    after_attention: ClassVar[bool] = True

    kind: Literal["merge"] = "merge"
    count: PositiveInt

    @classmethod
    def example(cls, arriving: Tokens) -> Self | None:
        """See `StepBase.example`."""
        return cls(count=max(1, arriving.patches // 4)) if arriving.patches > 1 else None

    def why_not(self, arriving: Tokens, patches: int) -> str | None:
        """See `StepBase.why_not`."""
        if arriving.places is not None:
            return "patches must be merged where all are there, but some were dropped before"
        if arriving.constant_sizes:
            return "patches must be merged in one way, but neighbors were merged before with size_bias; set it to false"
        if 2 * self.count > arriving.patches:
            return f"at most half of the {arriving.patches} patches can be merged, but {self.count} are asked for"
        return None

    def flow(self, arriving: Tokens, patches: int) -> Flow:
        """See `StepBase.flow`."""
        here = arriving.total
        whole = arriving.patches if arriving.stands_for is None else arriving.stands_for
        leaves = arriving._replace(patches=arriving.patches - self.count, grid=None, stands_for=whole)
        return Flow(here, here, here, leaves.total, arriving, leaves)

    def own_cost(self, arriving: Tokens, width: int, qk: int) -> tuple[int, int]:
        """The products of keys by which patches are matched; of the stream, where the block has no attention."""
        return -(-arriving.patches // 2) * (arriving.patches // 2) * (qk or width), 0
