"""Self-attention with any head widths.

B images, N tokens, D width, H heads, Q query (or key) channels of all heads together, V value channels of all heads
together.

Parameters have timm's names, so a dense block loads timm's weights without conversion.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from timm.layers import use_fused_attn
from torch import Tensor, nn
from torch.nn import functional as F

from vitrim.nn.axis import Axis, Member, Tap, rows
from vitrim.nn.feed import uncast
from vitrim.nn.layers import make_norm
from vitrim.nn.projections import PARTS, Projections
from vitrim.words.spec import NO_RATES, Form, Rates
from vitrim.words.spec import Attention as AttentionSpec

__all__ = ["Attention", "Heard"]

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Maps queries, keys and values of heads of one width, ``(B, H, N, K)``, and a mask to the heads' outputs."""


class Heard(NamedTuple):
    """Queries and keys of all heads of an attention, after norms and taps, for a token step that needs them."""

    q: Tensor
    """``(B, N, Q)``, or fewer tokens if queries are computed for the first tokens only."""
    k: Tensor
    """``(B, N, Q)``."""
    widths: tuple[int, ...]
    """Query (or key) channels of each head."""
    scale: float
    """Factor on the logits."""


class Attention(Projections):
    """Multi-head self-attention whose heads may differ in width.

    Heads of one width run as one dense call. Heads of several widths run as one call for each width: padding them to
    one width is slower (38 ms against 21 ms, CPU, 2 threads, DeiT-S at 63 % of the channels; dense 9 ms).

    The logit scale is always the one of the spec. In timm, the fused kernel derives it from the width of the queries,
    which is wrong after a cut.

    Args:
        width: D.
        spec: head widths and scale; at least one head.
        form: biases and norms.
        rates: dropout.
    """

    def __init__(self, width: int, spec: AttentionSpec, form: Form, rates: Rates = NO_RATES) -> None:
        super().__init__(width, (sum(spec.qk), sum(spec.qk), sum(spec.v)), form)
        self.qk, self.v, self.scale = spec.qk, spec.v, spec.scale
        self.even = len(set(spec.qk)) == 1 and len(set(spec.v)) == 1
        self.runs = _runs(spec)
        self.tied_qk, self.tied_v = form.ties_qk, form.mixed_norm is not None
        self.last = "proj"
        self.fused_attn = use_fused_attn()

        self.has_norms = form.head_norm is not None
        self.q_norm = make_norm(form.head_norm, form.head_norm_width) if form.head_norm else nn.Identity()
        self.k_norm = make_norm(form.head_norm, form.head_norm_width) if form.head_norm else nn.Identity()
        self.q_tap, self.k_tap, self.v_tap = Tap(), Tap(), Tap()
        self.attn_drop = nn.Dropout(rates.attention)
        self.norm = make_norm(form.mixed_norm, self.sizes[2]) if form.mixed_norm else nn.Identity()
        self.proj = nn.Linear(self.sizes[2], width, bias=form.out_bias)
        self.proj_drop = nn.Dropout(rates.projection)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        n_queries: int | None = None,
        heard: list[Heard] | None = None,
        key_bias: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Mix tokens.

        Args:
            x: normed tokens, ``(B, N, D)``.
            attn_mask: boolean, True for keys that a query may attend to, or a bias that is added to the logits;
                broadcasts to ``(B, H, N, N)``.
            is_causal: whether a token attends only to itself and the tokens before it.
            n_queries: number of first tokens for which queries and outputs are computed; None for all tokens.
            heard: a list to which queries and keys are appended, for a token step that needs them.
            key_bias: finite numbers that are added to the logits, in place of `attn_mask`; broadcasts the same way.
            positions: what a subclass must know about the places of tokens; nothing here.

        Returns:
            ``(B, N, D)``, or ``(B, n_queries, D)``.
        """
        mask, may_hide_all = (attn_mask, True) if key_bias is None else (key_bias, False)

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            return self._attend(q, k, v, mask, is_causal, may_hide_all)

        return self._run(x, mask, attend, n_queries, heard, positions)

    def _run(
        self,
        x: Tensor,
        attn_mask: Tensor | None,
        attend: Attend,
        n_queries: int | None = None,
        heard: list[Heard] | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        q, k, v = self.projected(x, n_queries)
        if self.has_norms:
            q, k = self._normed(q, self.q_norm), self._normed(k, self.k_norm)
        q, k = self._placed(q, k, positions)
        q, k, v = self.q_tap(q), self.k_tap(k), self.v_tap(v)
        if heard is not None:
            heard.append(Heard(q, k, self.qk, self.scale))
        if self.even:
            q, k, v = (self._heads(t).transpose(1, 2) for t in (q, k, v))
            mixed = attend(q, k, v, attn_mask).transpose(1, 2).flatten(2)
        else:
            mixed = self._uneven(q, k, v, attn_mask, attend)
        out: Tensor = self.proj_drop(self.proj(self.norm(mixed)))
        return out

    def place(self, grid: tuple[int, int]) -> None:
        """Adapt to another dense grid; here nothing depends on it."""

    def _placed(self, q: Tensor, k: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return queries and keys changed by the places of their tokens; here they stay."""
        return q, k

    def _normed(self, x: Tensor, norm: nn.Module) -> Tensor:
        normed: Tensor = norm(self._heads(x))
        return normed.flatten(-2)

    def _heads(self, x: Tensor) -> Tensor:
        return torch.unflatten(x, -1, (len(self.qk), -1))

    def _uneven(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, attend: Attend) -> Tensor:
        parts = [torch.split(t, list(widths), dim=-1) for t, widths in ((q, self.qk), (k, self.qk), (v, self.v))]
        mixed: list[Tensor] = [v] * len(self.v)
        for run in self.runs:
            q, k, v = (torch.stack([part[i] for i in run], dim=1) for part in parts)
            mask = _for_heads(attn_mask, run)
            for i, head in zip(run, attend(q, k, v, mask).unbind(1), strict=True):
                mixed[i] = head
        return torch.cat(mixed, dim=-1)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool = False,
        may_hide_all: bool = False,
    ) -> Tensor:
        """Attend with heads of one width.

        Args:
            q: ``(B, H, N, K)``.
            k: as `q`.
            v: ``(B, H, N, V)``.
            attn_mask: see `forward`.
            is_causal: see `forward`.
            may_hide_all: whether the mask may hide all keys from a query.
        """
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            attn_mask = attn_mask.to(q.dtype)
        # On a CPU, PyTorch has no fused kernel if values and queries differ in width. Its fallback searches all weights
        # for rows that are fully masked (4 % of the time of a cut ViT-Ti).
        # In an ONNX export, the decomposition of a fused call with a mask has other strides than the call, and fails.
        odd = q.shape[-1] != v.shape[-1] or (attn_mask is not None and torch.compiler.is_exporting())
        if self.fused_attn and not (odd and q.device.type == "cpu"):
            drop = self.attn_drop.p if self.training else 0.0
            if _slow_backward(q, k, v):
                mask = attn_mask if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask.float()
                with uncast(q.device):
                    return F.scaled_dot_product_attention(
                        *(q.float(), k.float(), v.float()),
                        attn_mask=mask,
                        dropout_p=drop,
                        is_causal=is_causal,
                        scale=self.scale,
                    ).to(v.dtype)
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=attn_mask, dropout_p=drop, is_causal=is_causal, scale=self.scale
            )
        weights = self._logits(q, k, attn_mask, is_causal).softmax(dim=-1)
        if attn_mask is not None and may_hide_all:
            # The output of a query with no allowed key is zero, as in the fused kernels; its softmax would be 0 / 0.
            hidden = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask.isneginf()
            weights = weights.masked_fill(hidden.all(dim=-1, keepdim=True), 0.0)
        dropped: Tensor = self.attn_drop(weights)
        return dropped @ v

    def _logits(self, q: Tensor, k: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        if attn_mask is not None and attn_mask.dtype != torch.bool and attn_mask.dim() == 4 and not is_causal:
            # Applying scale and bias within the product saves 12 % of the time of such an attention.
            bias = attn_mask.expand(q.shape[0], q.shape[1], -1, -1).flatten(0, 1)
            logits = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).mT, alpha=self.scale)
            return torch.unflatten(logits, 0, (-1, q.shape[1]))
        logits = (q * self.scale) @ k.transpose(-2, -1)
        if is_causal:
            attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
        if attn_mask is None:
            return logits
        return logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask

    def axes(self) -> tuple[Axis, ...]:
        """Return the axes of query/key channels and of value channels; names are relative to the block."""
        q, k, v = (self.members(part) for part in PARTS)
        qk_rows, v_rows = q + k, v
        columns = (Member(parameter="attn.proj.weight", dim=1, offset=0),)
        return (
            Axis(
                name="qk",
                groups=self.qk,
                members=qk_rows,
                taps=("attn.q_tap", "attn.k_tap"),
                scales=() if self.tied_qk else qk_rows,
                tied=self.tied_qk,
            ),
            Axis(
                name="v",
                groups=self.v,
                members=v_rows + columns,
                taps=("attn.v_tap",),
                scales=v_rows,
                tied=self.tied_v,
            ),
        )

    def stream(self) -> tuple[Member, ...]:
        """Return the slices of parameters that the channels of the residual stream index, as in `axes`."""
        return (*self.reading(), *rows("attn.proj", self.proj))


def _slow_backward(*inputs: Tensor) -> bool:
    """Return whether the fused kernel is to run in float32 instead of bf16: where all inputs get a gradient.

    On a CPU its backward pass in bf16 takes 1.6 times as long as in float32 with 197 tokens, 4 times with 100 and 8
    times with 17 (3 to 6 heads of 64 channels, forward and backward pass, an Intel Xeon with AMX).
    """
    short = inputs[0].device.type == "cpu" and any(x.dtype == torch.bfloat16 for x in inputs)
    return short and torch.is_grad_enabled() and all(x.requires_grad for x in inputs)


def _runs(spec: AttentionSpec) -> tuple[tuple[int, ...], ...]:
    """Return groups of heads with equal widths."""
    runs: dict[tuple[int, int], list[int]] = {}
    for head, widths in enumerate(zip(spec.qk, spec.v, strict=True)):
        runs.setdefault(widths, []).append(head)
    return tuple(tuple(run) for run in runs.values())


def _for_heads(attn_mask: Tensor | None, run: tuple[int, ...]) -> Tensor | None:
    if attn_mask is None or attn_mask.dim() < 3 or attn_mask.shape[-3] == 1:
        return attn_mask
    return attn_mask[..., list(run), :, :]
