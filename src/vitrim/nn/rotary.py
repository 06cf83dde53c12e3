"""Attention whose queries and keys are turned by the places of their tokens (RoPE).

B images, N tokens, P prefix tokens, T patches on which attention runs, H heads, K query (or key) channels of a head.

Source: Su et al., "RoFormer", arXiv 2104.09864; the angles are the host's, as timm computes them. Prefix tokens, and a
token of zeros that stands for missing patches, are not turned.
"""

import torch
from torch import Tensor

from vitrim.nn.attention import Attention
from vitrim.words.spec import NO_RATES, Form, Rates, Rotary
from vitrim.words.spec import Attention as AttentionSpec

__all__ = ["RotaryAttention", "turned"]


class RotaryAttention(Attention):
    """Self-attention with rotary positions.

    Args:
        width: D.
        spec: head widths and scale; all queries and keys are as wide as in the dense model.
        form: biases, norms, and how channels are paired.
        rates: dropout.
        prefix: P.
        places: places of the T patches in the dense grid; None for all of the grid.
    """

    kept: Tensor
    heads: Tensor

    def __init__(
        self,
        width: int,
        spec: AttentionSpec,
        form: Form,
        rates: Rates = NO_RATES,
        *,
        prefix: int,
        places: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(width, spec, form, rates)
        assert isinstance(form.positions, Rotary)
        self.halves, self.by_head = form.positions.halves, form.positions.by_head
        self.prefix, self.places, self.origin = prefix, places, spec.origin
        for name in ("kept", "heads"):
            self.register_buffer(name, torch.empty(0, dtype=torch.long), persistent=False)
        self.init_non_persistent_buffers()

    def _placed(self, q: Tensor, k: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Turn queries and keys.

        Args:
            q: ``(B, N, H K)``, or fewer tokens.
            k: ``(B, N, H K)``.
            positions: sines and cosines of the places of the dense grid, ``(places, 2 K)``, or with heads or images
                before that, ``(H, places, 2 K)``, ``(B, 1 or H, places, 2 K)``; None turns nothing.
        """
        if positions is None:
            return q, k
        angles = positions
        if self.by_head and self.origin is not None and self.origin != tuple(range(angles.shape[-3])):
            angles = angles.index_select(-3, self.heads.to(angles.device))
        if self.places is not None:
            angles = angles.index_select(-2, self.kept.to(angles.device))
        # Channels of a head stand last, so heads come after places.
        angles = angles[:, None] if angles.dim() == 2 else angles.transpose(-3, -2)
        sines, cosines = angles.chunk(2, dim=-1)
        return self._turned(q, sines, cosines), self._turned(k, sines, cosines)

    def _turned(self, x: Tensor, sines: Tensor, cosines: Tensor) -> Tensor:
        count = sines.shape[-3]
        if x.shape[1] <= self.prefix:  # queries of prefix tokens alone
            return x
        patches = self._heads(x[:, self.prefix : self.prefix + count])
        parts = [turned(patches, sines, cosines, self.halves).flatten(-2)]
        if self.prefix:
            parts.insert(0, x[:, : self.prefix])
        if x.shape[1] > self.prefix + count:
            parts.append(x[:, self.prefix + count :])
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def init_non_persistent_buffers(self) -> None:
        """Compute the buffers that are not stored."""
        self.kept = torch.tensor(self.places or (), dtype=torch.long, device="cpu")
        self.heads = torch.tensor(self.origin or (), dtype=torch.long, device="cpu")


def turned(x: Tensor, sines: Tensor, cosines: Tensor, halves: bool) -> Tensor:
    """Turn pairs of channels by angles whose sines and cosines are given for both channels of a pair.

    Args:
        x: ``(..., K)``; the result has its type, and products are in the wider of both types.
        sines: broadcasts to `x`.
        cosines: broadcasts to `x`.
        halves: whether channel i is paired with i + K / 2, or 2 i with 2 i + 1.
    """
    if halves:
        first, second = x.chunk(2, dim=-1)
        across = torch.cat([-second, first], dim=-1)
    else:
        across = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    found: Tensor = x * cosines + across * sines
    return found.to(x.dtype)
