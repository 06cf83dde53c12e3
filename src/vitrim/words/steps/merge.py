"""Merge similar patches, separately in each image (token merging)."""

from typing import ClassVar, Literal, Self

from vitrim.words.sizes import Size
from vitrim.words.steps._base import Flow, StepBase, Tokens

__all__ = ["Merge"]


class Merge(StepBase):
    """Between attention and MLP, `count` patches are merged into similar ones, separately in each image.

    Patches are assigned alternately to two sets. Each patch of the first set is paired with the patch of the second set
    whose keys are most similar to its own. The `count` most similar pairs are each merged into one token, their mean
    weighted by the number of patches in each. In later blocks, attention counts a token as many times as it has
    patches. Prefix tokens are never merged.

    Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023.
    """

    after_attention: ClassVar[bool] = True

    kind: Literal["merge"] = "merge"
    count: Size

    @classmethod
    def example(cls, arriving: Tokens) -> Self | None:
        """See `StepBase.example`."""
        return cls(count=max(1, arriving.patches // 4)) if arriving.patches > 1 else None

    def why_not(self, arriving: Tokens, patches: int) -> str | None:
        """See `StepBase.why_not`."""
        if arriving.places is not None:
            return "patches must be merged before others are dropped, but some were dropped before"
        if arriving.constant_sizes:
            return "patches must be merged in one way, but neighbors were merged before with size_bias; set it to false"
        if 2 * self.count > arriving.patches:
            return f"at most half of the {arriving.patches} patches can be merged, but {self.count} are requested"
        return None

    def flow(self, arriving: Tokens, patches: int) -> Flow:
        """See `StepBase.flow`."""
        here = arriving.total
        whole = arriving.patches if arriving.stands_for is None else arriving.stands_for
        leaves = arriving._replace(patches=arriving.patches - self.count, grid=None, stands_for=whole)
        return Flow(here, here, here, leaves.total, arriving, leaves)

    def own_cost(self, arriving: Tokens, width: int, qk: int) -> tuple[int, int]:
        """See `StepBase.own_cost`: the products of keys, or of the residual stream if the block has no attention."""
        return -(-arriving.patches // 2) * (arriving.patches // 2) * (qk or width), 0
