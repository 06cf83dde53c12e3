"""Split the linear layers of an attention by heads, and join them again.

H heads, K channels of a head, D width.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vitrim.nn import Attention
from vitrim.nn.feed import exact
from vitrim.nn.projections import PARTS

__all__ = ["Heads"]


@dataclass(frozen=True, eq=False)
class Heads:
    """Rows of the query/key/value layer and columns of the projection, one entry for each head, float64.

    Attributes:
        q, k, v: rows ``(K, D)``, or ``(K, D + 1)`` with the bias as last column.
        proj: columns ``(D, K)``.
        bias: bias of the projection, ``(D,)`` or None.
        biased: whether `q`, `k` and `v` contain a bias.
        attention: the module whose layout of parameters `state` gives.
    """

    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    proj: list[Tensor]
    bias: Tensor | None
    biased: bool
    attention: Attention

    @classmethod
    def of(cls, attention: Attention) -> "Heads":
        """Split the weights of `attention`."""
        parts = [attention.rows_of(part) for part in PARTS]
        biased = any(bias is not None for _, bias in parts)
        q, k, v = (_joined(weight, bias, biased) for weight, bias in parts)
        columns = exact(attention.proj.weight.detach())
        bias = attention.proj.bias
        return cls(
            list(torch.split(q, list(attention.qk))),
            list(torch.split(k, list(attention.qk))),
            list(torch.split(v, list(attention.v))),
            list(torch.split(columns, list(attention.v), dim=1)),
            None if bias is None else exact(bias.detach()),
            biased,
            attention,
        )

    def picked(self, heads: tuple[int, ...]) -> "Heads":
        """Return the weights of `heads` only."""
        q, k, v, proj = ([part[h] for h in heads] for part in (self.q, self.k, self.v, self.proj))
        return replace(self, q=q, k=k, v=v, proj=proj)

    def state(self) -> dict[str, Tensor]:
        """Return the parameters of the attention by name, relative to the block."""
        joined = {part: torch.cat(getattr(self, part)) for part in PARTS}
        rows = {part: (x[:, :-1], x[:, -1]) if self.biased else (x, None) for part, x in joined.items()}
        state = {f"attn.{name}": value for name, value in self.attention.named(rows).items()}
        state["attn.proj.weight"] = torch.cat(self.proj, dim=1)
        if self.bias is not None:
            state["attn.proj.bias"] = self.bias
        return state


def _joined(weight: Tensor, bias: Tensor | None, biased: bool) -> Tensor:
    """Return weight and bias, zeros where a part has none, side by side in float64."""
    rows = exact(weight.detach())
    if not biased:
        return rows
    last = rows.new_zeros(len(rows)) if bias is None else exact(bias.detach())
    return torch.cat([rows, last[:, None]], dim=1)
