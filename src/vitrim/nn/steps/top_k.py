"""Keep the tokens that receive the most attention in each image, and the mean of the others.

B images, N tokens, Q channels of all heads (queries or keys).
"""

import torch
from torch import Tensor

from vitrim.nn.attention import Heard
from vitrim.nn.feed import precise
from vitrim.nn.steps._base import StepModule
from vitrim.nn.stream import Stream
from vitrim.words.errors import DataError
from vitrim.words.spec import Stage
from vitrim.words.steps import Tokens
from vitrim.words.steps.top_k import TopK

__all__ = ["Chosen", "make"]


class Chosen(StepModule):
    """Keeps the tokens that receive the most attention, and the mean of the others.

    Args:
        step: number of tokens and ranking.
        prefix: number of prefix tokens, which come first and always stay.
    """

    needs_attention = True
    weights: Tensor

    def __init__(self, step: TopK, prefix: int) -> None:
        super().__init__()
        self.spec, self.prefix = step, prefix
        self.register_buffer("weights", torch.tensor(step.weights), persistent=False)

    def after_attention(self, x: Tensor | Stream, heard: Heard | None) -> Tensor:
        """Map ``(B, N, D)`` to ``(B, kept + 1, D)``; kept tokens stay in order, the fused one comes last.

        Raises:
            DataError: if the step has weights for another number of patches.
        """
        assert isinstance(x, Tensor)
        count, kept = x.shape[1], self.spec.kept
        if count <= kept or heard is None:
            return x
        scores = self.scores(heard)
        # Sorted by index, so that prefix tokens stay at the start, where the head reads them.
        chosen = scores.topk(kept, dim=1).indices.sort(dim=1).values
        stays = torch.gather(x, 1, chosen[..., None].expand(-1, -1, x.shape[2]))
        if not self.spec.fused:
            return stays
        left_out = torch.ones_like(scores).scatter(1, chosen, 0.0).to(precise(x))
        fused = (x * left_out[..., None]).sum(dim=1, keepdim=True) / (count - kept)
        return torch.cat([stays, fused.to(x.dtype)], dim=1)

    def scores(self, heard: Heard) -> Tensor:
        """Return the score of each token, ``(B, N)``; infinite for prefix tokens."""
        queries = heard.q[:, :1] if self.prefix else heard.q
        parts = [torch.split(t, list(heard.widths), dim=-1) for t in (queries, heard.k)]
        wide = precise(heard.q)
        heads = [_received(q.to(wide), k.to(wide), heard.scale) for q, k in zip(*parts, strict=True)]
        found = torch.stack(heads).mean(dim=0)
        prefix, patches = found[:, : self.prefix], found[:, self.prefix :]
        if self.spec.weights:
            if patches.shape[1] != len(self.spec.weights):
                raise DataError(
                    f"tokens are chosen by weights of {len(self.spec.weights)} patches, but {patches.shape[1]} came; "
                    "give images of the model's size"
                )
            patches = patches * self.weights.to(patches)
        return torch.cat([torch.full_like(prefix, torch.inf), patches], dim=1)

    def init_non_persistent_buffers(self) -> None:
        """Compute the buffers that are not stored."""
        self.weights = torch.tensor(self.spec.weights, device="cpu")


def _received(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Return the attention that each key receives, averaged over queries, ``(B, N)``."""
    if q.shape[1] == 1:
        return ((q * k).sum(dim=-1) * scale).softmax(dim=-1)
    return ((q @ k.transpose(-2, -1)) * scale).softmax(dim=-1).mean(dim=1)


def make(step: TopK, stage: Stage, arriving: Tokens) -> Chosen:
    """See `vitrim.nn.steps.make_step`."""
    return Chosen(step, stage.prefix)
