"""Merge similar patches, separately in each image.

B images, N arriving tokens, n tokens that stay, P prefix tokens, D width.
"""

import importlib.util
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vitrim.nn.attention import Heard
from vitrim.nn.feed import precise, wide
from vitrim.nn.steps._base import StepModule
from vitrim.nn.stream import Stream
from vitrim.words.errors import DataError
from vitrim.words.spec import Stage
from vitrim.words.steps import Tokens
from vitrim.words.steps.merge import Merge

__all__ = ["Merged", "make"]

TINY = 1e-12
"""Least norm that is divided by."""

Fused = Callable[[Tensor, Tensor, Tensor | None, int, int, bool, bool], tuple[Tensor, Tensor]]
"""See `vitrim.nn.kernels.merge.merged`."""


class Merged(StepModule):
    """Merges similar patches, see `vitrim.words.steps.merge.Merge`.

    Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023. There, keys are averaged over heads. Here,
    the keys of all heads are concatenated, because after a cut each head has its own basis. The remaining tokens keep
    their order, so that neighbors stay in different sets.

    Args:
        prefix: P.
        count: number of patches that are merged into others.
        by: what is compared.
        keeps_norm: whether means keep the norm.
    """

    def __init__(
        self, prefix: int, count: int, by: Literal["keys", "tokens"] = "keys", keeps_norm: bool = False
    ) -> None:
        super().__init__()
        self.prefix, self.count, self.keeps_norm = prefix, count, keeps_norm
        self.needs_attention = by == "keys"
        self.fused: Fused | None = None
        """The fused kernel, in the form that the model runs in on CUDA; None runs PyTorch's operators."""
        self.fused_on = ""
        """Kind of the devices on which the kernel runs."""

    def after_attention(self, x: Tensor | Stream, heard: Heard | None) -> Stream:
        """Map N tokens to n; keys are compared, or the residual stream if `heard` is None.

        Raises:
            DataError: if there are fewer patches than twice the number to merge.
        """
        tokens, sizes, patches = x if isinstance(x, Stream) else (x, None, x.shape[1] - self.prefix)
        if 2 * self.count > tokens.shape[1] - self.prefix:
            raise DataError(
                f"a block that merges {self.count} patches must be given {2 * self.count} or more, but got "
                f"{tokens.shape[1] - self.prefix}; give larger images"
            )
        alike = (tokens if heard is None else heard.k)[:, self.prefix :]
        if self.fused is not None and tokens.device.type == self.fused_on and not _recorded(tokens):
            settings = (self.prefix, self.count, not self.needs_attention, self.keeps_norm)
            return Stream(*self.fused(tokens, alike, sizes, *settings), patches)
        gone, into, stay = self._pairs(alike, tokens.shape[1], None if self.needs_attention else sizes)
        kind = precise(tokens)
        if sizes is None:
            counts = torch.ones(*tokens.shape[:2], 1, dtype=torch.float32, device=tokens.device)
            heavy = tokens.to(kind)
        else:
            counts, heavy = sizes, (tokens * sizes).to(kind)
        if not self.keeps_norm:
            heavy, counts = (self._merged(t, gone, into, stay) for t in (heavy, counts))
            return Stream((heavy / counts.to(kind)).to(tokens.dtype), counts, patches)
        # The sums of vectors and of norms count every patch, so that their ratio is that of the means.
        both = torch.cat([heavy.norm(dim=-1, keepdim=True), counts.to(kind)], dim=-1)
        heavy, both = (self._merged(t, gone, into, stay) for t in (heavy, both))
        norms, counts = torch.split(both, 1, dim=-1)
        scale = norms / (heavy.norm(dim=-1, keepdim=True).clamp_min(TINY) * counts)
        return Stream((heavy * scale).to(tokens.dtype), counts.float().contiguous(), patches)

    def _merged(self, x: Tensor, gone: Tensor, into: Tensor, stay: Tensor) -> Tensor:
        """Add the tokens `gone` to those they are merged into; return prefix tokens, first set and second set."""
        rows = x.flatten(0, 1)
        added = rows.scatter_add(0, into[:, None].expand(-1, rows.shape[1]), rows.index_select(0, gone)).view_as(x)
        first = torch.unflatten(rows.index_select(0, stay), 0, (x.shape[0], -1))
        return torch.cat([x[:, : self.prefix], first, added[:, self.prefix + 1 :: 2]], dim=1)

    def _pairs(self, alike: Tensor, tokens: int, sizes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Choose the pairs to merge, as indices into the tokens of all images, ``(B N)``.

        Patches are compared in float32 or finer, because most cosines are alike in half precision. Of equal ones the
        first is chosen, in the second set and in the first.

        Args:
            alike: features by which patches are compared, ``(B, N - P, channels)``.
            tokens: N.
            sizes: number of patches of each token, ``(B, N, 1)``, that distances are weighted by; None if they are not,
                or if each is one.

        Returns:
            The tokens that are merged into others, the tokens that they are merged into, and the tokens of the first
            set that are left.
        """
        alike = F.normalize(wide(alike), dim=-1)
        scores = alike[:, ::2] @ alike[:, 1::2].mT
        if sizes is not None:
            a, b = sizes[:, self.prefix :: 2], sizes[:, self.prefix + 1 :: 2].mT
            scores = (scores - 1) * (a * b / (a + b)).sqrt()
        best, partner = scores.max(dim=-1)
        # A stable sort cannot be exported to ONNX, whose own sort is stable.
        stable = {} if torch.compiler.is_exporting() else {"stable": True}
        order = best.sort(dim=-1, descending=True, **stable).indices
        gone, stay = order[:, : self.count], order[:, self.count :].sort(dim=-1).values
        first, rows = self.prefix, alike.shape[0] * tokens
        start = torch.arange(first, first + rows, tokens, device=alike.device)[:, None]
        into = torch.add(start + 1, partner.gather(1, gone), alpha=2)
        return torch.add(start, gone, alpha=2).flatten(), into.flatten(), torch.add(start, stay, alpha=2).flatten()

    def fix_(self, dtype: torch.dtype, device: torch.device) -> None:
        """See `StepModule.fix_`; on CUDA the step then runs as a fused kernel, if Triton is there."""
        if device.type == "cuda" and self.why_slow(dtype, device) is None:
            from vitrim.nn.kernels.merge import merged

            self.fused, self.fused_on = merged, device.type

    def why_slow(self, dtype: torch.dtype, device: torch.device) -> str | None:
        """See `StepModule.why_slow`."""
        if device.type != "cuda":
            return None
        if importlib.util.find_spec("triton") is None:
            return "merging runs in PyTorch's operators, for Triton is not installed; run pip install triton"
        if dtype == torch.float64:
            return "merging runs in PyTorch's operators, for its kernel takes no float64"
        return None


def _recorded(x: Tensor) -> bool:
    """Return whether gradients are computed, which the fused kernel has not."""
    return torch.is_grad_enabled() and x.requires_grad


def make(step: Merge, stage: Stage, arriving: Tokens) -> Merged:
    """See `vitrim.nn.steps.make_step`."""
    return Merged(stage.prefix, step.count, step.by, step.keeps_norm)
