"""Swin Transformers, second version: cosine attention in windows, continuous position bias, norms after branches.

D width, R x C rows and columns of the grid of patches.

A compressed model *is* a ``timm.models.SwinTransformerV2``; `_swin` has what all versions share. Queries and keys of a
head are divided by their lengths, so they stay as wide as they are or go with their head. A head takes along its scale
and its output of the network that gives the biases. The other layer of that network is shared by all heads and stays.
"""

from typing import Any

from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block, WindowAttention
from torch import nn

from vitrim.families import _swin
from vitrim.families._parts import check_linear, read_mlp, read_rates, same_norm
from vitrim.families._swin import SwinArguments, blocks_by_stage, channels, convert, host
from vitrim.words.errors import AdoptError
from vitrim.words.spec import Attention, Form, Spec, Window
from vitrim.words.spec import Block as BlockSpec

__all__ = [
    "ARGUMENTS",
    "HOSTS",
    "TEST_PRESETS",
    "blocks_by_stage",
    "build",
    "channels",
    "convert",
    "describe",
    "example",
    "host",
]

_SMALL = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 24,
    "depths": (1, 2),
    "num_heads": (2, 4),
    "window_size": 2,  # a network of biases costs as much as a block this small, and a budget must be met all the same
    "num_classes": 10,
}

TEST_PRESETS: dict[str, dict[str, object]] = {
    "windows": {},
    "padded": {"img_size": (24, 40), "window_size": 4, "qkv_bias": False, "strict_img_size": False},
    "trained": {"pretrained_window_sizes": (6, 3), "window_size": (2, 4), "drop_path_rate": 0.0},
}

HOSTS = (SwinTransformerV2,)

ARGUMENTS = SwinArguments


def example(**arguments: Any) -> nn.Module:
    """Return a small random Swin V2 (stages of one and two blocks, width 24, on 8 x 8 patches) for tests."""
    return SwinTransformerV2(**{**_SMALL, **arguments})  # type: ignore[no-any-return]


def describe(model: Any) -> Spec:
    """Return the spec of a Swin V2.

    Raises:
        AdoptError: a part cannot be represented; the message has the path and the reason.
    """
    return _swin.describe(model, "swin_v2", _read_block, channels(model))


def build(spec: Spec) -> Any:
    """Return a Swin V2 for `spec`, built by timm's own constructor with placeholders for the blocks.

    Raises:
        SpecError: the installed timm cannot build it.
    """
    return _swin.build(spec, SwinTransformerV2, pretrained_window_sizes=(0,) * len(spec.stages))


def _read_block(block: Any, at: str, grid: tuple[int, int]) -> _swin.Parts:
    if type(block) is not SwinTransformerV2Block:
        raise AdoptError(f"{at}: a block must be timm's SwinTransformerV2Block, but got {type(block).__name__}")
    attention = block.attn
    if type(attention) is not WindowAttention:
        raise AdoptError(f"{at}.attn: attention must be timm's WindowAttention, but got {type(attention).__name__}")
    check_linear(attention, ("qkv", "proj"), f"{at}.attn")
    trained = tuple(attention.pretrained_window_size)
    window = Window(
        size=block.window_size,
        always=block.always_partition,
        dynamic=bool(block.dynamic_mask),
        network=attention.cpb_mlp[0].out_features,
        trained=trained if all(trained) else None,
    )
    shifted = _swin.shift_of(block, at, window, grid)
    heads = attention.num_heads
    width = attention.qkv.out_features // (3 * heads)
    form = Form(
        norm=same_norm([(f"{at}.norm1", block.norm1), (f"{at}.norm2", block.norm2)]),
        qkv_bias=attention.q_bias is not None,
        k_bias=attention.q_bias is None,
        out_bias=attention.proj.bias is not None,
        post_norm=True,
        cosine=True,
        **read_mlp(block.mlp, f"{at}.mlp"),
    )
    mixer = Attention(qk=(width,) * heads, v=(width,) * heads, scale=1.0)
    spec = BlockSpec(mixer=mixer, hidden=block.mlp.fc2.in_features, rates=read_rates(block), shifted=shifted)
    return _swin.Parts(spec, form, window, block.dim)
