"""Split the linear layers of an attention by heads, and join them again.

H heads, K channels of a head, D width.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vitrim.nn import Attention
from vitrim.nn.feed import exact

__all__ = ["Heads"]


@dataclass(frozen=True, eq=False)
class Heads:
    """Rows of the query/key/value layer and columns of the projection, one entry for each head, float64.

    Attributes:
        q, k, v: rows ``(K, D)``, or ``(K, D + 1)`` with the bias as last column.
        proj: columns ``(D, K)``.
        bias: bias of the projection, ``(D,)`` or None.
        biased: whether `q`, `k` and `v` contain a bias.
    """

    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    proj: list[Tensor]
    bias: Tensor | None
    biased: bool

    @classmethod
    def of(cls, attention: Attention) -> "Heads":
        """Split the weights of `attention`."""
        rows = exact(attention.qkv.weight.detach())
        biased = attention.qkv.bias is not None
        if biased:
            rows = torch.cat([rows, exact(attention.qkv.bias.detach())[:, None]], dim=1)
        q, k, v = torch.split(rows, list(attention.sizes))
        columns = exact(attention.proj.weight.detach())
        bias = attention.proj.bias
        return cls(
            list(torch.split(q, list(attention.qk))),
            list(torch.split(k, list(attention.qk))),
            list(torch.split(v, list(attention.v))),
            list(torch.split(columns, list(attention.v), dim=1)),
            None if bias is None else exact(bias.detach()),
            biased,
        )

    def picked(self, heads: tuple[int, ...]) -> "Heads":
        """Return the weights of `heads` only."""
        q, k, v, proj = ([part[h] for h in heads] for part in (self.q, self.k, self.v, self.proj))
        return replace(self, q=q, k=k, v=v, proj=proj)

    def state(self) -> dict[str, Tensor]:
        """Return the parameters of the attention by name, relative to the block."""
        rows = torch.cat([*self.q, *self.k, *self.v])
        state = {"attn.qkv.weight": rows[:, :-1] if self.biased else rows}
        if self.biased:
            state["attn.qkv.bias"] = rows[:, -1]
        state["attn.proj.weight"] = torch.cat(self.proj, dim=1)
        if self.bias is not None:
            state["attn.proj.bias"] = self.bias
        return state
