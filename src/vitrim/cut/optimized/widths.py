"""Widths padded with zeros to what the hardware's matrix units take.

D width, H heads, M hidden neurons, d channels of a convolution.

A padded channel has zeros in the layer that makes it and in the layer that reads it, so no output changes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrim.cut.optimized.folds import give_
from vitrim.nn import Attention, Block, Conv, Mlp, Tap
from vitrim.nn.modes import without_data
from vitrim.words.spec import Attention as AttentionSpec
from vitrim.words.spec import Form

__all__ = ["pad_block_", "padded_heads", "up"]


def up(width: int, multiple: int) -> int:
    """The next multiple of `multiple` from `width` on."""
    return -(-width // multiple) * multiple


def pad_block_(block: Block, multiple: int, pad_heads: bool) -> None:
    """Pad neurons, head channels and the bottleneck of a convolution.

    What a norm runs over stays as it is, for zeros would change its statistics: neurons under a hidden norm, queries
    and keys under a q/k norm, values under a norm over all heads, and D.

    Args:
        block: a block whose convolution, if it has one, is folded.
        multiple: of which every width is to be one.
        pad_heads: whether all heads of the block get the width of the widest.
    """
    if isinstance(block.attn, Attention):
        _pad_heads_(block.attn, block.form, multiple, pad_heads)
    elif isinstance(block.attn, Conv):
        _pad_conv_(block.attn, multiple)
    if isinstance(block.mlp, Mlp):
        _pad_mlp_(block.mlp, multiple)


def padded_heads(
    qk: tuple[int, ...],
    v: tuple[int, ...],
    multiple: int,
    *,
    one_width: bool,
    tied_qk: bool = False,
    tied_v: bool = False,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The widths that heads are padded to.

    With `one_width` queries, keys and values of all heads get one width where norms let them: PyTorch's flash kernel
    takes no other.

    Args:
        qk: channels of queries (or keys) of each head.
        v: channels of values of each head.
        multiple: of which every width is to be one.
        one_width: whether the heads are to be alike.
        tied_qk: whether a norm runs over queries and keys.
        tied_v: whether a norm runs over values.
    """
    most_qk, most_v = max(qk), max(v)
    if one_width:
        free = [most for most, tied in ((most_qk, tied_qk), (most_v, tied_v)) if not tied]
        fixed = [most for most, tied in ((most_qk, tied_qk), (most_v, tied_v)) if tied]
        wide = up(max(free, default=0), multiple)
        # Next to a width that must stay, the other follows it where it can.
        wide = fixed[0] if len(fixed) == 1 and max(free) <= fixed[0] else wide
        new_qk, new_v = (wide,) * len(qk), (wide,) * len(v)
    else:
        new_qk, new_v = tuple(up(k, multiple) for k in qk), tuple(up(k, multiple) for k in v)
    return qk if tied_qk else new_qk, v if tied_v else new_v


def _pad_heads_(attn: Attention, form: Form, multiple: int, one_width: bool) -> None:
    if not all(_plain(tap) for tap in (attn.q_tap, attn.k_tap, attn.v_tap)):
        return
    qk, v = padded_heads(attn.qk, attn.v, multiple, one_width=one_width, tied_qk=attn.tied_qk, tied_v=attn.tied_v)
    if (qk, v) == (attn.qk, attn.v):
        return
    to_qk, to_v = _places(attn.qk, qk), _places(attn.v, v)
    rows = torch.cat([to_qk, sum(qk) + to_qk, 2 * sum(qk) + to_v])
    made, back = attn.qkv, attn.proj
    total = 2 * sum(qk) + sum(v)
    bias = None if made.bias is None else _spread(made.bias, rows, total, 0)
    give_(made, _spread(made.weight, rows, total, 0), bias)
    give_(back, _spread(back.weight, to_v, sum(v), 1), back.bias)
    with without_data():
        like = Attention(back.out_features, AttentionSpec(qk=qk, v=v, scale=attn.scale), form)
    for name in ("qk", "v", "sizes", "even", "runs"):
        setattr(attn, name, getattr(like, name))


def _places(old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """Where the channels of heads of widths `old` lie among those of heads of widths `new`."""
    places: list[int] = []
    start = 0
    for few, many in zip(old, new, strict=True):
        places += range(start, start + few)
        start += many
    return torch.tensor(places, dtype=torch.long)


def _spread(x: Tensor, places: Tensor, size: int, dim: int) -> Tensor:
    """Zeros of `size` along `dim`, with the entries of `x` at `places`."""
    shape = list(x.shape)
    shape[dim] = size
    return x.new_zeros(shape).index_copy(dim, places.to(x.device), x)


def _pad_mlp_(mlp: Mlp, multiple: int) -> None:
    more = up(mlp.hidden, multiple) - mlp.hidden
    if mlp.tied or not more or not _plain(mlp.tap):
        return
    for name in mlp.firsts:
        layer = mlp.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        parts = layer.out_features // mlp.hidden  # a packed gate has both factors in one layer
        weight = F.pad(torch.unflatten(layer.weight, 0, (parts, -1)), (0, 0, 0, more)).flatten(0, 1)
        bias = None if layer.bias is None else F.pad(torch.unflatten(layer.bias, 0, (parts, -1)), (0, more)).flatten()
        give_(layer, weight, bias)
    last = mlp.get_submodule(mlp.last)
    assert isinstance(last, nn.Linear)
    give_(last, F.pad(last.weight, (0, more)), last.bias)
    mlp.hidden += more


def _pad_conv_(conv: Conv, multiple: int) -> None:
    made, back = conv.conv, conv.proj
    assert isinstance(made, nn.Linear | nn.Conv2d)
    assert isinstance(back, nn.Linear | nn.Conv2d)
    more = up(len(made.weight), multiple) - len(made.weight)
    if not more:
        return
    square = [0, 0] * (made.weight.dim() - 2)
    assert made.bias is not None
    give_(made, F.pad(made.weight, (*square, 0, 0, 0, more)), F.pad(made.bias, (0, more)))
    give_(back, F.pad(back.weight, (*square, 0, more)), back.bias)


def _plain(tap: nn.Module) -> bool:
    """Whether nothing that knows the axis' size listens at a tap or stands in its place."""
    return type(tap) is Tap and not tap._forward_hooks and not tap._forward_pre_hooks
