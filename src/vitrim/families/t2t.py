"""T2T-ViT: plain blocks after a stem of overlapping steps. timm has no T2T-ViT, so its names are registered here.

D width.

Heads, head channels and neurons of the backbone's blocks can be cut, and whole blocks. The stem is not cut: it has one
head of width 64, and takes 0.30 G multiply-accumulates with performer layers and 1.60 G with transformer layers, at 224
pixels.
"""

import math
import re
from collections.abc import Callable
from typing import Any, Literal

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import resample_abs_pos_embed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from vitrim.families import _plain
from vitrim.families._plain import PlainArguments, blocks_by_stage, channels, host
from vitrim.families._t2t import T2TVisionTransformer
from vitrim.words.sizes import Size
from vitrim.words.spec import Spec

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

HOSTS = (T2TVisionTransformer,)


class ARGUMENTS(PlainArguments):
    """Arguments of the stem."""

    tokens: Literal["performer", "transformer"]
    token_width: Size


TEST_PRESETS: dict[str, dict[str, object]] = {
    "performer": {},
    "transformer": {"tokens": "transformer", "img_size": (32, 48), "mlp_ratio": 2.0},
    "average": {"global_pool": "avg", "qkv_bias": True},
}

_VARIANTS = {
    "t2t_vit_7": (7, 256, 4, 2.0, "performer"),
    "t2t_vit_10": (10, 256, 4, 2.0, "performer"),
    "t2t_vit_12": (12, 256, 4, 2.0, "performer"),
    "t2t_vit_14": (14, 384, 6, 3.0, "performer"),
    "t2t_vit_19": (19, 448, 7, 3.0, "performer"),
    "t2t_vit_24": (24, 512, 8, 3.0, "performer"),
    "t2t_vit_t_14": (14, 384, 6, 3.0, "transformer"),
    "t2t_vit_t_19": (19, 448, 7, 3.0, "transformer"),
    "t2t_vit_t_24": (24, 512, 8, 3.0, "transformer"),
}
"""Depth, width, heads, MLP ratio, and kind of the layers of the stem, by name."""


def example(**arguments: Any) -> nn.Module:
    """Return a small random T2T-ViT (3 blocks of width 64 on 2 x 2 tokens) for tests."""
    small = {"img_size": 32, "embed_dim": 64, "depth": 3, "num_heads": 4, "num_classes": 10, "token_width": 16}
    model: nn.Module = T2TVisionTransformer(**(small | arguments))
    return model


def describe(model: nn.Module) -> Spec:
    """Return the spec of a T2T-ViT.

    Raises:
        AdoptError: a block has a part that cannot be represented; the message has the path and the reason.
    """
    stem: Any = model.patch_embed
    own = {"tokens": stem.tokens, "token_width": stem.token_width}
    return _plain.describe(model, "t2t", own, channels(model))


def build(spec: Spec) -> nn.Module:
    """Return a T2T-ViT for `spec` with placeholders for the blocks.

    Raises:
        SpecError: the installed timm cannot build it.
    """
    model: nn.Module = _plain.build(spec, lambda: T2TVisionTransformer(**_plain.keywords(spec)))
    return model


def _entry_point(name: str) -> Callable[..., Any]:
    depth, width, heads, ratio, tokens = _VARIANTS[name]
    known = {"depth": depth, "embed_dim": width, "num_heads": heads, "mlp_ratio": ratio, "tokens": tokens}

    def create(pretrained: bool = False, **arguments: Any) -> Any:
        return build_model_with_cfg(
            T2TVisionTransformer,
            name,
            pretrained,
            pretrained_filter_fn=convert,
            feature_cfg={"out_indices": 3, "feature_cls": "getter"},
            **(known | arguments),
        )

    create.__name__ = create.__qualname__ = name
    return create


_CONFIG = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "fixed_input_size": True,
    "crop_pct": 0.9,
    "interpolation": "bicubic",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "first_conv": None,
    "classifier": "head",
    "license": "bsd-3-clause-clear",
    "origin_url": "https://github.com/yitu-opensource/T2T-ViT",
}
default_cfgs = generate_default_cfgs(dict.fromkeys(_VARIANTS, _CONFIG))

for _name in _VARIANTS:
    register_model(_entry_point(_name))


_OFFICIAL = (
    (r"^tokens_to_token\.attention(\d)\.w$", r"patch_embed.token\1.features"),
    (r"^tokens_to_token\.attention(\d)\.attn\.", r"patch_embed.token\1."),
    (r"^tokens_to_token\.attention(\d)\.mlp\.0\.", r"patch_embed.token\1.mlp.fc1."),
    (r"^tokens_to_token\.attention(\d)\.mlp\.2\.", r"patch_embed.token\1.mlp.fc2."),
    (r"^tokens_to_token\.attention(\d)\.", r"patch_embed.token\1."),
    (r"^tokens_to_token\.project\.", r"patch_embed.proj."),
)


def convert(weights: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Return weights of the authors' release under timm's names, with positions interpolated to the model's image size.

    Names that are in neither naming scheme are not changed, so that loading them raises an error.
    """
    renamed = {_renamed(name): value for name, value in weights.items()}
    positions = renamed.get("pos_embed")
    if positions is not None and positions.dim() == 3 and positions.shape[1:] != model.pos_embed.shape[1:]:
        renamed["pos_embed"] = _resized(positions, model)
    return renamed


def _renamed(name: str) -> str:
    for pattern, native in _OFFICIAL:
        name, found = re.subn(pattern, native, name)
        if found:
            break
    return name


def _resized(positions: Tensor, model: Any) -> Tensor:
    """Interpolate positions of a square grid; return others unchanged, because their rows and columns are unknown."""
    side = math.isqrt(positions.shape[1] - 1)
    if side * side != positions.shape[1] - 1 or positions.shape[2] != model.embed_dim:
        return positions
    resized: Tensor = resample_abs_pos_embed(
        positions, new_size=model.patch_embed.grid_size, old_size=(side, side), num_prefix_tokens=1
    )
    return resized
