"""Attention of the prefix tokens alone, beside a convolution that mixes the patches.

B images, N tokens, P prefix tokens, D width, H heads, K query (or key) channels of a head, V value channels of a head.

A convolution has no place for prefix tokens, and what a class token reads in late blocks is what a classifier is made
of. To let P tokens read costs next to nothing if keys and values are not computed: the logit of a query q for a token
x is ``q . (W x) = (W' q) . x``, and the mean of values is the value of the mean token. So H P queries of width D attend
to the tokens themselves. The bias of keys moves all logits of a query alike, and is left out.
"""

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrim.nn.axis import Member, rows
from vitrim.nn.projections import Projections
from vitrim.words.spec import NO_RATES, Attention, Form, Rates

__all__ = ["PrefixAttention"]


class PrefixAttention(Projections):
    """The outputs of an attention for prefix tokens, in ``P H N D`` products in place of ``N D K H``.

    Its parameters are those of `vitrim.nn.Attention`, without norms and positions.

    Args:
        width: D.
        spec: head widths and scale; at least one head.
        form: biases and layout of the parameters.
        rates: dropout of the weights; that of the output is the convolution's.
    """

    def __init__(self, width: int, spec: Attention, form: Form, rates: Rates = NO_RATES) -> None:
        super().__init__(width, (sum(spec.qk), sum(spec.qk), sum(spec.v)), form)
        self.qk, self.v, self.scale = spec.qk, spec.v, spec.scale
        self.even = len(set(spec.qk)) == 1 and len(set(spec.v)) == 1
        self.attn_drop = nn.Dropout(rates.attention)
        self.proj = nn.Linear(self.sizes[2], width, bias=form.out_bias)

    def forward(self, x: Tensor, prefix: int, key_bias: Tensor | None = None) -> Tensor:
        """Return the output for the first `prefix` of the normed tokens `x`, ``(B, P, D)``.

        Args:
            x: ``(B, N, D)``.
            prefix: P.
            key_bias: numbers that are added to the logits; broadcasts to ``(B, H, P, N)``.
        """
        (weight, bias), (keys, _), (values, shift) = (self.rows_of(part) for part in ("q", "k", "v"))
        # Heads are joined with the prefix tokens: a product that broadcasts over heads would copy all tokens for each.
        logits = self._asked(F.linear(x[:, :prefix], weight, bias) * self.scale, keys, prefix) @ x.mT
        if key_bias is not None:
            heads = torch.unflatten(logits, 1, (len(self.qk), prefix))
            logits = (heads + key_bias.to(logits.dtype)).flatten(1, 2)
        mixed = self._mapped(self.attn_drop(logits.softmax(dim=-1)) @ x, values, prefix)
        out: Tensor = self.proj(mixed if shift is None else mixed + shift)
        return out

    def _asked(self, q: Tensor, keys: Tensor, prefix: int) -> Tensor:
        """Return the queries ``(B, P, Q)`` in the space of the tokens, ``(B, H P, D)``."""
        if self.even:
            heads = torch.unflatten(q, -1, (len(self.qk), -1)).permute(2, 0, 1, 3).flatten(1, 2)
            asked = heads @ torch.unflatten(keys, 0, (len(self.qk), -1))
            return torch.unflatten(asked, 1, (-1, prefix)).transpose(0, 1).flatten(1, 2)
        parts = zip(torch.split(q, list(self.qk), dim=-1), torch.split(keys, list(self.qk)), strict=True)
        return torch.cat([one @ own for one, own in parts], dim=1)

    def _mapped(self, heard: Tensor, values: Tensor, prefix: int) -> Tensor:
        """Return the values of the mean tokens ``(B, H P, D)``, all heads together, ``(B, P, V)``."""
        heads = torch.unflatten(heard, 1, (len(self.v), prefix))
        if self.even:
            each = torch.unflatten(values, 0, (len(self.v), -1))
            mapped = torch.unflatten(heads.transpose(0, 1).flatten(1, 2) @ each.mT, 1, (-1, prefix))
            return mapped.permute(1, 2, 0, 3).flatten(2)
        parts = zip(heads.unbind(1), torch.split(values, list(self.v)), strict=True)
        return torch.cat([F.linear(one, own) for one, own in parts], dim=-1)

    def stream(self) -> tuple[Member, ...]:
        """Return the slices of parameters that the channels of the residual stream index, relative to the block."""
        inner = [dataclasses.replace(one, parameter=f"attn.read.{one.parameter[5:]}") for one in self.reading()]
        return (*inner, *rows("attn.read.proj", self.proj))
