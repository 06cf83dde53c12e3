"""Swin Transformers, first version: shifted windows, relative position bias, patch merging (Swin, S3).

D width, R x C rows and columns of the grid of patches.

A compressed model *is* a ``timm.models.SwinTransformer``; `_swin` has what all versions share.
"""

from typing import Any

from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, WindowAttention
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
    "depths": (2, 2),
    "num_heads": (2, 4),
    "window_size": 4,
    "num_classes": 10,
}

TEST_PRESETS: dict[str, dict[str, object]] = {
    "windows": {},
    "padded": {"img_size": (24, 40)},
    "always": {"img_size": 24, "always_partition": True, "qkv_bias": False, "drop_path_rate": 0.0},
    "dynamic": {"strict_img_size": False, "head_dim": 8, "mlp_ratio": (2.0, 3.0), "num_heads": (3, 2)},
    "sizes": {
        "patch_size": 2,
        "depths": (1, 2, 1),
        "num_heads": (2, 3, 6),
        "window_size": ((4, 2), (2, 4), (2, 2)),
        "global_pool": "",
    },
}

HOSTS = (SwinTransformer,)

ARGUMENTS = SwinArguments


def example(**arguments: Any) -> nn.Module:
    """Return a small random Swin (two stages of two blocks, width 24, on 8 x 8 patches) for tests."""
    return SwinTransformer(**{**_SMALL, **arguments})  # type: ignore[no-any-return]


def describe(model: Any) -> Spec:
    """Return the spec of a Swin.

    Raises:
        AdoptError: a part cannot be represented; the message has the path and the reason.
    """
    return _swin.describe(model, "swin", _read_block, channels(model))


def build(spec: Spec) -> Any:
    """Return a Swin for `spec`, built by timm's own constructor with placeholders for the blocks.

    Raises:
        SpecError: the installed timm cannot build it.
    """
    return _swin.build(spec, SwinTransformer, weight_init="skip")


def _read_block(block: Any, at: str, grid: tuple[int, int]) -> _swin.Parts:
    if type(block) is not SwinTransformerBlock:
        raise AdoptError(f"{at}: a block must be timm's SwinTransformerBlock, but got {type(block).__name__}")
    attention = block.attn
    if type(attention) is not WindowAttention:
        raise AdoptError(f"{at}.attn: attention must be timm's WindowAttention, but got {type(attention).__name__}")
    check_linear(attention, ("qkv", "proj"), f"{at}.attn")
    window = Window(size=block.window_size, always=block.always_partition, dynamic=bool(block.dynamic_mask))
    shifted = _swin.shift_of(block, at, window, grid)
    heads = attention.num_heads
    width = attention.qkv.out_features // (3 * heads)
    form = Form(
        norm=same_norm([(f"{at}.norm1", block.norm1), (f"{at}.norm2", block.norm2)]),
        qkv_bias=attention.qkv.bias is not None,
        out_bias=attention.proj.bias is not None,
        **read_mlp(block.mlp, f"{at}.mlp"),
    )
    mixer = Attention(qk=(width,) * heads, v=(width,) * heads, scale=attention.scale)
    spec = BlockSpec(mixer=mixer, hidden=block.mlp.fc2.in_features, rates=read_rates(block), shifted=shifted)
    return _swin.Parts(spec, form, window, block.dim)
