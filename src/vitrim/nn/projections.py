"""The linear layers that make queries, keys and values, in the layouts in which timm keeps them.

B images, N tokens, D width, Q query (or key) channels of all heads together, V value channels of all heads together.

Three layouts compute the same: one layer (``qkv``), one layer whose biases are parameters of the attention, without one
for keys (``qkv``, ``q_bias``, ``v_bias``), and three layers (``q_proj``, ``k_proj``, ``v_proj``).
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrim.nn.axis import Member, columns
from vitrim.words.spec import Form

__all__ = ["PARTS", "Part", "Projections", "Rows", "values_of"]

Part = Literal["q", "k", "v"]
PARTS: tuple[Part, ...] = ("q", "k", "v")

Rows = tuple[Tensor, Tensor | None]
"""Weight ``(channels, D)`` and bias ``(channels)``, or None."""


class Projections(nn.Module):
    """Queries, keys and values of tokens.

    Args:
        width: D.
        sizes: channels of queries, keys and values.
        form: layout and biases.
    """

    qkv: nn.Linear
    q_bias: nn.Parameter | None
    v_bias: nn.Parameter | None

    def __init__(self, width: int, sizes: tuple[int, int, int], form: Form) -> None:
        super().__init__()
        self.sizes = sizes
        self.split = form.qkv == "split"
        self.apart = form.qkv_bias and not form.k_bias and not self.split
        if self.split:
            for part, size in zip(PARTS, sizes, strict=True):
                biased = form.qkv_bias and (part != "k" or form.k_bias)
                self.add_module(f"{part}_proj", nn.Linear(width, size, bias=biased))
        else:
            self.qkv = nn.Linear(width, sum(sizes), bias=form.qkv_bias and not self.apart)
        self.q_bias = nn.Parameter(torch.zeros(sizes[0])) if self.apart else None
        self.v_bias = nn.Parameter(torch.zeros(sizes[2])) if self.apart else None

    def projected(self, x: Tensor, n_queries: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of tokens ``(B, N, D)``.

        Args:
            x: normed tokens.
            n_queries: number of first tokens that get queries; all if None.
        """
        if self.split:
            q, k, v = (self.get_submodule(f"{part}_proj") for part in PARTS)
            return q(x if n_queries is None else x[:, :n_queries]), k(x), v(x)
        weight, bias, (first, second, third) = self.qkv.weight, self._joint_bias(), self.sizes
        if n_queries is None:
            whole = F.linear(x, weight, bias) if self.apart else self.qkv(x)
            queries, keys, values = whole.split((first, second, third), dim=-1)
            return queries, keys, values
        queries = F.linear(x[:, :n_queries], weight[:first], None if bias is None else bias[:first])
        rest = F.linear(x, weight[first:], None if bias is None else bias[first:])
        keys, values = rest.tensor_split((second,), dim=-1)
        return queries, keys, values

    def _joint_bias(self) -> Tensor | None:
        if self.q_bias is None or self.v_bias is None:
            return self.qkv.bias
        return torch.cat([self.q_bias, self.q_bias.new_zeros(self.sizes[1]), self.v_bias])

    def rows_of(self, part: Part) -> Rows:
        """Return weight and bias of queries, keys or values."""
        if self.split:
            layer = self.get_submodule(f"{part}_proj")
            assert isinstance(layer, nn.Linear)
            return layer.weight, layer.bias
        start, bias = self._start(part), self._joint_bias()
        end = start + self.sizes[PARTS.index(part)]
        return self.qkv.weight[start:end], None if bias is None else bias[start:end]

    def named(self, rows: Mapping[Part, Rows]) -> dict[str, Tensor]:
        """Return the parameters that hold `rows`, by name; any numbers of channels, biases as this attention has them.

        A bias of keys is left out where keys have none.
        """
        known = {name for name, _ in self.named_parameters()}
        if self.split:
            made = {f"{part}_proj.weight": rows[part][0] for part in PARTS}
            biases = {f"{part}_proj.bias": rows[part][1] for part in PARTS}
        else:
            made = {"qkv.weight": torch.cat([rows[part][0] for part in PARTS])}
            each = [bias for bias in (rows[part][1] for part in PARTS) if bias is not None]
            biases = {"q_bias": rows["q"][1], "v_bias": rows["v"][1], "qkv.bias": torch.cat(each) if each else None}
        return made | {name: bias for name, bias in biases.items() if name in known and bias is not None}

    def members(self, part: Part) -> tuple[Member, ...]:
        """Return the slices of parameters that the channels of queries, keys or values index."""
        if self.split:
            places = {f"{part}_proj.weight": 0, f"{part}_proj.bias": 0}
        else:
            places = {"qkv.weight": self._start(part), "qkv.bias": self._start(part), f"{part}_bias": 0}
        known = {name for name, _ in self.named_parameters()}
        return tuple(
            Member(parameter=f"attn.{name}", dim=0, offset=offset, second=part == "k")
            for name, offset in places.items()
            if name in known
        )

    def reading(self) -> tuple[Member, ...]:
        """Return the slices of parameters that the channels of the residual stream index."""
        names = [f"{part}_proj" for part in PARTS] if self.split else ["qkv"]
        return tuple(member for name in names for member in columns(f"attn.{name}", self.get_submodule(name)))

    def _start(self, part: Part) -> int:
        return {"q": 0, "k": self.sizes[0], "v": 2 * self.sizes[0]}[part]

    @torch.no_grad()
    def join_(self) -> None:
        """Keep queries, keys and values in one layer with one bias, in place: the same function in fewer calls."""
        if not self.split and not self.apart:
            return
        rows = [self.rows_of(part) for part in PARTS]
        weight = torch.cat([weight for weight, _ in rows])
        biased = any(bias is not None for _, bias in rows)
        layer = nn.Linear(weight.shape[1], len(weight), bias=biased).to(weight)
        layer.weight.copy_(weight)
        if biased:
            layer.bias.copy_(torch.cat([w.new_zeros(len(w)) if bias is None else bias for w, bias in rows]))
        for name in ("q_proj", "k_proj", "v_proj", "q_bias", "v_bias"):
            if hasattr(self, name):
                delattr(self, name)
        self.q_bias = self.v_bias = None
        self.qkv, self.split, self.apart = layer.requires_grad_(weight.requires_grad), False, False


def values_of(have: Mapping[str, Tensor], channels: int) -> Rows:
    """Return weight and bias of the values of an attention.

    Args:
        have: parameters of the attention, by name.
        channels: V.
    """
    if "v_proj.weight" in have:
        return have["v_proj.weight"], have.get("v_proj.bias")
    bias = have.get("qkv.bias")
    return have["qkv.weight"][-channels:], have.get("v_bias") if bias is None else bias[-channels:]
