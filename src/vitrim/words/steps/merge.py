"""Merge similar patches, separately in each image (token merging)."""

from typing import ClassVar, Literal, Self

from vitrim.words.sizes import Size
from vitrim.words.steps._base import Flow, StepBase, Tokens

__all__ = ["Merge"]


class Merge(StepBase):
    """Between attention and MLP, `count` patches are merged into similar ones, separately in each image.

    Patches are assigned alternately to two sets. Each patch of the first set is paired with the closest patch of the
    second set. The `count` closest pairs are each merged into one token, their mean weighted by the number of patches
    in each. In later blocks, attention counts a token as many times as it has patches. Prefix tokens are never merged.

    Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, which is ``by = "keys"`` without
    `keeps_norm`. Ours: ``by = "tokens"``, after Ward's criterion of clustering (1963), which weights squared distances
    by a b / (a + b); the root of that weight is better here. The norm after MLERP of ToFu (arXiv 2312.01026).

    Attributes:
        count: number of patches that are merged into others.
        by: ``keys``: the closest patch has the largest cosine of keys. ``tokens``: the least distance
            (1 - c) sqrt(a b / (a + b)), where c is the cosine of the tokens in the residual stream, and a and b are
            their numbers of patches; large tokens are merged less often.
        keeps_norm: whether the mean is scaled to the weighted mean of the norms of the tokens in it.
    """

    after_attention: ClassVar[bool] = True

    kind: Literal["merge"] = "merge"
    count: Size
    by: Literal["keys", "tokens"] = "keys"
    keeps_norm: bool = False

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
        """See `StepBase.own_cost`: the products of keys, or of the residual stream.

        A block without attention compares the stream, whatever `by` says.
        """
        channels = (qk or width) if self.by == "keys" else width
        return -(-arriving.patches // 2) * (arriving.patches // 2) * channels, 0
