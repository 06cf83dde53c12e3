"""A bottleneck convolution in place of attention, in all its states.

B images, N tokens, P prefix tokens, R x C rows and columns of the grid, D width, H heads, d channels of a head. A slot
is one of the nine pixels around a pixel, the pixel itself included.

Source: He et al., "Pruning Self-attentions into Convolutional Layers in Single Path", TPAMI 2024, arXiv 2111.11802. The
convolution has almost no parameters of its own. Its kernel is a convex mixture, over heads, of the attention's value
projection, and its output layer is a mixture of the output projection. Every slot has its own mixture weights.

Differences from the authors' code: the grid need not be square, any number of prefix tokens is allowed, and folding
gives two plain layers (theirs keeps the batch norm, and for Swin reads the slots in DeiT's order).

Ours: the bottleneck may have any width, the activation may be left out, and prefix tokens may get a stored constant, or
keep the attention (`vitrim.nn.read`).
Such convolutions are fitted to an attention (`vitrim.cut.compensate.ConvCut`); without a fit, surgery makes them of
some of its value channels, as if each token attended to itself or equally to its neighborhood.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrim.nn.axis import Member, columns, rows
from vitrim.nn.projections import values_of
from vitrim.nn.read import PrefixAttention
from vitrim.words.errors import DataError
from vitrim.words.spec import NO_RATES, Form, Mixture, Rates
from vitrim.words.spec import Attention as AttentionSpec
from vitrim.words.spec import Conv as ConvSpec

__all__ = ["EPS", "Conv", "Same", "mixed_back", "mixed_kernel", "slot_order", "state_of", "votes"]

EPS = 1e-5
"""Epsilon of the batch norm, as in the authors' code."""


def votes(logits: Tensor, temperature: float) -> Tensor:
    """Return the weight of each head in each slot: a softmax over heads of ``(H, 9)`` logits; each column sums to 1."""
    return (logits / temperature).softmax(dim=0)


def slot_order(mixture: Mixture) -> list[int]:
    """Return the slot of each of the nine positions of a 3 x 3 kernel, row by row."""
    slots = {offset: slot for slot, offset in enumerate(mixture.offsets)}
    return [slots[down, right] for down in (-1, 0, 1) for right in (-1, 0, 1)]


def mixed_kernel(share: Tensor, value: Tensor, kernel: int, mixture: Mixture) -> Tensor:
    """Mix a kernel, ``(d, D)`` or ``(d, D, 3, 3)``, from an attention's value projection.

    Args:
        share: the result of `votes`, ``(H, 9)``.
        value: value projection, ``(H d, D)``.
        kernel: 1 uses only the center slot, 3 uses all slots.
        mixture: the order of the slots.
    """
    split = value.view(len(share), -1)
    if kernel == 1:
        return (share[:, mixture.centre] @ split).view(-1, value.shape[1])
    return (share[:, slot_order(mixture)].t() @ split).view(3, 3, -1, value.shape[1]).permute(2, 3, 0, 1)


def mixed_back(
    share: Tensor, bias: Tensor | None, out: Tensor, kernel: int, mixture: Mixture
) -> tuple[Tensor | None, Tensor]:
    """Mix the bias and the output layer, with the weights of the center slot (1 x 1) or summed over all nine (3 x 3).

    Args:
        share: the result of `votes`, ``(H, 9)``.
        bias: bias of the values, ``(H d)``, or None.
        out: output projection, ``(D, H d)``.
        kernel: 1 or 3.
        mixture: the order of the slots.

    Returns:
        The bias of the bottleneck, ``(d)`` or None, and the weight of the output layer, ``(D, d)``.
    """
    total = share[:, mixture.centre] if kernel == 1 else share.sum(dim=1)
    back = torch.einsum("chd,h->cd", out.view(len(out), len(share), -1), total)
    return None if bias is None else total @ bias.view(len(share), -1), back


def state_of(
    conv: ConvSpec, was: AttentionSpec | ConvSpec, have: Mapping[str, Tensor], prefix: int = 0
) -> dict[str, Tensor]:
    """Return the parameters and buffers of a convolution, made from those of the mixer that it replaces.

    From an attention whose heads have the convolution's width, with a ReLU (as published): the value and output
    projections unchanged, equal mixture weights for all heads, and a batch norm that is the identity. From any other
    attention: as many value channels as the convolution is wide, and the same batch norm. From a convolution: the same
    function in evaluation, with its mixture and then its batch norm folded into plain tensors.

    Args:
        conv: the convolution to make.
        was: the replaced mixer: an attention with at least one head, or a convolution in an earlier state.
        have: the parameters and buffers of `was`, by name.
        prefix: number of prefix tokens. Their constants are the attention's output for an input of zeros.
    """
    first = {name: value for name, value in have.items() if name == "mean" or name.startswith("read.")}
    if isinstance(was, AttentionSpec):
        weight, bias = values_of(have, sum(was.v))
        value = {"weight": weight} | ({} if bias is None else {"bias": bias})
        first = _constants(have, value, prefix) if conv.prefix == "mean" and prefix else {}
        if conv.prefix == "attention":
            first = {f"read.{name}": tensor for name, tensor in have.items()}
        if conv.act == "none" or set(was.v) != {conv.width}:
            return _chosen(have, value, conv) | first
        mixture = conv.mixture or Mixture(heads=len(was.v), temperature=1.0)
        have = _of_attention(have, value, mixture.heads, conv.width)
        was = conv.model_copy(update={"mixture": mixture, "norm": True})
    state = {name: value for name, value in have.items() if name.startswith(("v.", "conv.", "bn.", "proj.", "mix"))}
    if was.mixture is not None and conv.mixture is None:
        state = _merged(state, was, was.mixture)
    if was.norm and not conv.norm:
        state = _without_norm(state)
    return state | first


def _of_attention(
    have: Mapping[str, Tensor], values: Mapping[str, Tensor], heads: int, width: int
) -> dict[str, Tensor]:
    state = {name: value for name, value in have.items() if name.startswith("proj.")}
    state |= {f"v.{name}": value for name, value in values.items()}
    like = values["weight"]
    state["mix"] = like.new_ones(heads, 9)
    return state | _same_norm(like, width)


def _same_norm(like: Tensor, width: int) -> dict[str, Tensor]:
    """Return the state of a batch norm that changes nothing."""
    one, zero = like.new_ones(width), like.new_zeros(width)
    state = {"bn.weight": one, "bn.bias": zero, "bn.running_mean": zero, "bn.running_var": one}
    return state | {"bn.num_batches_tracked": torch.zeros((), dtype=torch.long, device=like.device)}


def _constants(have: Mapping[str, Tensor], values: Mapping[str, Tensor], prefix: int) -> dict[str, Tensor]:
    """Return the output of an attention for an input of zeros, for each of `prefix` tokens, ``(P, D)``."""
    out = have["proj.weight"]
    mean = out.new_zeros(len(out)) if "bias" not in values else out @ values["bias"]
    if "proj.bias" in have:
        mean = mean + have["proj.bias"]
    return {"mean": mean.expand(prefix, -1)}


def _chosen(have: Mapping[str, Tensor], values: Mapping[str, Tensor], conv: ConvSpec) -> dict[str, Tensor]:
    """Return a convolution of plain tensors from `conv.width` value channels of an attention, evenly spaced.

    All nine taps of a 3 x 3 kernel are equal. A width above the number of value channels gets channels of zeros. Which
    channels are chosen depends on their number alone, so that cuts of the residual width before or after give the same.
    """
    out, like = have["proj.weight"], values["weight"]
    count = min(conv.width, len(like))
    index = torch.arange(count, device=like.device) * len(like) // count
    more = conv.width - count
    inner, back = F.pad(like[index], (0, 0, 0, more)), F.pad(out[:, index], (0, more))
    bias = values["bias"][index] if "bias" in values else like.new_zeros(count)
    if conv.kernel == 3:
        inner, back = (inner / 9)[:, :, None, None].expand(-1, -1, 3, 3), back[:, :, None, None]
    state = {name: value for name, value in have.items() if name == "proj.bias"}
    state |= {"conv.weight": inner, "conv.bias": F.pad(bias, (0, more)), "proj.weight": back}
    return state | (_same_norm(like, conv.width) if conv.norm else {})


def _merged(state: Mapping[str, Tensor], was: ConvSpec, mixture: Mixture) -> dict[str, Tensor]:
    share = votes(state["mix"], mixture.temperature)
    kernel = mixed_kernel(share, state["v.weight"], was.kernel, mixture)
    bias, back = mixed_back(share, state.get("v.bias"), state["proj.weight"], was.kernel, mixture)
    plain = {name: value for name, value in state.items() if name.startswith("bn.") or name == "proj.bias"}
    plain |= {"conv.weight": kernel, "conv.bias": kernel.new_zeros(len(kernel)) if bias is None else bias}
    return plain | {"proj.weight": back if was.kernel == 1 else back[:, :, None, None]}


def _without_norm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    factor = state["bn.weight"] * (state["bn.running_var"] + EPS).rsqrt()
    kernel = state["conv.weight"]
    plain = {name: value for name, value in state.items() if name.startswith("proj.")}
    plain["conv.weight"] = kernel * factor.view(-1, *[1] * (kernel.dim() - 1))
    plain["conv.bias"] = (state["conv.bias"] - state["bn.running_mean"]) * factor + state["bn.bias"]
    return plain


class Same(nn.Module):
    """A branch that returns its normed input unchanged (`vitrim.words.spec.Skip` with ``leaves="norm"``)."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return `x`."""
        return x


class Conv(nn.Module):
    """A convolution to the bottleneck, a ReLU or nothing, and a convolution back to the width, on the patches only.

    Args:
        width: D.
        spec: kernel, d, state.
        form: biases of the attention that it was made from.
        rates: dropout.
        grid: R and C, needed if the input is a sequence of tokens.
        prefix: P.
    """

    def __init__(
        self,
        width: int,
        spec: ConvSpec,
        form: Form,
        rates: Rates = NO_RATES,
        *,
        grid: tuple[int, int] = (0, 0),
        prefix: int = 0,
    ) -> None:
        super().__init__()
        self.spec, self.grid, self.prefix = spec, grid, prefix
        if spec.mixture is not None:
            channels = spec.mixture.heads * spec.width
            self.mix = nn.Parameter(torch.ones(spec.mixture.heads, 9))
            self.v = nn.Linear(width, channels, bias=form.qkv_bias)
            self.proj: nn.Module = nn.Linear(channels, width, bias=form.out_bias)
        elif spec.kernel == 1:
            self.conv: nn.Module = nn.Linear(width, spec.width)
            self.proj = nn.Linear(spec.width, width, bias=form.out_bias)
        else:
            self.conv = nn.Conv2d(width, spec.width, 3, padding=1)
            self.proj = nn.Conv2d(spec.width, width, 1, bias=form.out_bias)
        if spec.heads is not None:
            self.read = PrefixAttention(width, spec.heads, form, rates)
        if spec.prefix == "mean" and prefix:
            self.mean = nn.Parameter(torch.zeros(prefix, width))
        if spec.norm:
            self.bn = nn.BatchNorm1d(spec.width, EPS) if spec.kernel == 1 else nn.BatchNorm2d(spec.width, EPS)
        self.proj_drop = nn.Dropout(rates.projection)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        key_bias: Tensor | None = None,
    ) -> Tensor:
        """Mix neighboring patches.

        Args:
            x: normed tokens, ``(B, N, D)``, prefix tokens first; or a map without prefix tokens, ``(B, R, C, D)``.
            attn_mask: must be None because a convolution reads every neighbor.
            is_causal: must be False.
            key_bias: see `vitrim.nn.read.PrefixAttention.forward`; nothing else needs it.

        Returns:
            A tensor of the shape of `x`.

        Raises:
            DataError: if a mask is given, if the number of tokens does not fit the grid, or if a batch norm is trained
                with one image.
        """
        if attn_mask is not None or is_causal:
            raise DataError("a model whose attention became convolution must be run without masks; leave them out")
        if self.training and self.spec.norm and len(x) == 1:
            raise DataError(
                "a convolution's batch norm must be trained on at least 2 images at a time, but got 1; raise "
                "train.batch or lower train.accumulate, or fold the model first"
            )
        if x.dim() == 4:
            return self._drop(self._pointwise(x) if self.spec.kernel == 1 else self._map(x))
        patches = x[:, self.prefix :]
        if self.spec.kernel == 1:
            out = self._pointwise(patches)
        else:
            out = self._map(torch.unflatten(patches, 1, self._grid(patches.shape[1]))).flatten(1, 2)
        if not self.prefix:
            return self._drop(out)
        return self._drop(torch.cat([self._first(x, key_bias), out], dim=1))

    def _first(self, x: Tensor, key_bias: Tensor | None) -> Tensor:
        """Return the output for the prefix tokens of `x`, ``(B, P, D)``."""
        if self.spec.prefix == "attention":
            read: Tensor = self.read(x, self.prefix, key_bias)
            return read
        first = x[:, : self.prefix]
        if self.spec.prefix == "mean":
            return self.mean.to(x.dtype).expand_as(first)
        return first if self.spec.prefix == "norm" else torch.zeros_like(first)

    def _drop(self, x: Tensor) -> Tensor:
        dropped: Tensor = self.proj_drop(x)
        return dropped

    def _grid(self, patches: int) -> tuple[int, int]:
        if patches != self.grid[0] * self.grid[1]:
            raise DataError(
                f"a 3 x 3 convolution must be given the {self.grid[0]} x {self.grid[1]} patches of its grid, but got "
                f"{patches}; resize the images, or call set_input_size"
            )
        return self.grid

    def _act(self, x: Tensor) -> Tensor:
        return x.relu() if self.spec.act == "relu" else x

    def _pointwise(self, x: Tensor) -> Tensor:
        """Apply two linear layers to the last dimension."""
        if self.spec.mixture is None:
            inner: Tensor = self.conv(x)
        else:
            kernel, bias, back = self._mixed(self.spec.mixture)
            inner = F.linear(x, kernel, bias)
        if self.spec.norm:
            inner = self.bn(inner.flatten(0, -2)).view_as(inner)
        inner = self._act(inner)
        if self.spec.mixture is None:
            out: Tensor = self.proj(inner)
            return out
        return F.linear(inner, back, self.proj.bias)  # type: ignore[arg-type]

    def _map(self, x: Tensor) -> Tensor:
        """Apply two convolutions to a map, ``(B, R, C, D)``; the memory layout stays channels-last throughout."""
        x = x.permute(0, 3, 1, 2)
        if self.spec.mixture is None:
            inner: Tensor = self.conv(x)
        else:
            kernel, bias, back = self._mixed(self.spec.mixture)
            inner = F.conv2d(x, kernel, bias, padding=1)
        if self.spec.norm:
            inner = self.bn(inner)
        inner = self._act(inner)
        if self.spec.mixture is None:
            out: Tensor = self.proj(inner)
            return out.permute(0, 2, 3, 1)
        return F.linear(inner.permute(0, 2, 3, 1), back, self.proj.bias)  # type: ignore[arg-type]

    def _mixed(self, mixture: Mixture) -> tuple[Tensor, Tensor | None, Tensor]:
        share, kernel = votes(self.mix, mixture.temperature), self.spec.kernel
        weight: Tensor = self.proj.weight  # type: ignore[assignment]
        mixed = mixed_kernel(share, self.v.weight, kernel, mixture)
        return mixed, *mixed_back(share, self.v.bias, weight, kernel, mixture)

    def stream(self) -> tuple[Member, ...]:
        """Return the slices of parameters that the channels of the residual stream index, relative to the block."""
        first = "conv" if self.spec.mixture is None else "v"
        constants = [Member(parameter="attn.mean", dim=1, offset=0)] if hasattr(self, "mean") else []
        reads = self.read.stream() if hasattr(self, "read") else ()
        return (*columns(f"attn.{first}", getattr(self, first)), *rows("attn.proj", self.proj), *constants, *reads)
