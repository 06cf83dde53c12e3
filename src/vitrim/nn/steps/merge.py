"""Merge similar patches, separately in each image.

B images, N arriving tokens, n tokens that stay, P prefix tokens, D width.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from vitrim.nn.attention import Heard
from vitrim.nn.feed import precise
from vitrim.nn.steps._base import StepModule
from vitrim.nn.stream import Stream
from vitrim.words.errors import DataError
from vitrim.words.spec import Stage
from vitrim.words.steps import Tokens
from vitrim.words.steps.merge import Merge

__all__ = ["Merged", "make"]


class Merged(StepModule):
    """Merges similar patches.

    Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023. There, keys are averaged over heads. Here,
    the keys of all heads are concatenated, because after a cut each head has its own basis. The remaining tokens keep
    their order, so that neighbors stay in different sets.

    Args:
        prefix: P.
        count: number of patches that are merged into others.
    """

    needs_attention = True

    def __init__(self, prefix: int, count: int) -> None:
        super().__init__()
        self.prefix, self.count = prefix, count

    def after_attention(self, x: Tensor | Stream, heard: Heard | None) -> Stream:
        """Map N tokens to n; keys are compared, or the residual stream if the block has no attention.

        Raises:
            DataError: if there are fewer patches than twice the number to merge.
        """
        stream = x
        if not isinstance(stream, Stream):
            sizes = torch.ones(*stream.shape[:2], 1, dtype=torch.float32, device=stream.device)
            stream = Stream(stream, sizes, stream.shape[1] - self.prefix)
        tokens = stream.x.shape[1]
        if 2 * self.count > tokens - self.prefix:
            raise DataError(
                f"a block that merges {self.count} patches must be given {2 * self.count} or more, but got "
                f"{tokens - self.prefix}; give larger images"
            )
        gone, into, kept = self._pairs((stream.x if heard is None else heard.k)[:, self.prefix :], tokens)
        wide = precise(stream.x)
        sizes = stream.sizes.to(wide)
        heavy, counts = (stream.x * sizes).to(wide).flatten(0, 1), stream.sizes.flatten(0, 1)
        heavy = heavy.scatter_add(0, into[:, None].expand(-1, heavy.shape[1]), heavy.index_select(0, gone))
        counts = counts.scatter_add(0, into[:, None], counts.index_select(0, gone))
        left, sizes = (torch.unflatten(t.index_select(0, kept), 0, (stream.x.shape[0], -1)) for t in (heavy, counts))
        return Stream((left / sizes.to(wide)).to(stream.x.dtype), sizes, stream.patches)

    def _pairs(self, alike: Tensor, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
        """Choose the pairs to merge, as indices into the tokens of all images, ``(B N)``.

        Args:
            alike: features by which patches are compared, ``(B, N - P, channels)``.
            tokens: N.

        Returns:
            The tokens that are merged into others, the tokens that they are merged into, and all tokens that are left.
        """
        alike = F.normalize(alike, dim=-1)
        best, partner = (alike[:, ::2] @ alike[:, 1::2].mT).max(dim=-1)
        order = best.sort(dim=-1, descending=True).indices  # a stable sort cannot be exported to ONNX
        gone, stay = order[:, : self.count], order[:, self.count :].sort(dim=-1).values
        start = torch.arange(alike.shape[0], device=alike.device)[:, None] * tokens
        first = start + self.prefix
        into = first + 2 * partner.gather(1, gone) + 1
        prefix = torch.arange(self.prefix, device=alike.device)
        second = torch.arange(1, tokens - self.prefix, 2, device=alike.device)
        kept = torch.cat([start + prefix, first + 2 * stay, first + second], dim=1)
        return (first + 2 * gone).flatten(), into.flatten(), kept.flatten()


def make(step: Merge, stage: Stage, arriving: Tokens) -> Merged:
    """See `vitrim.nn.steps.make_step`."""
    return Merged(stage.prefix, step.count)
