"""Plain Vision Transformers: ViT, DeiT, DeiT-III, DINOv2, CLIP and SigLIP towers, AIMv2, BEiT-3, CNN hybrids.

D width, N tokens.

Only the blocks are replaced. Patch embedding, position embedding, prefix tokens, pooling and head remain timm's own
modules, and a compressed model *is* a ``timm.models.VisionTransformer``.
"""

import functools
from typing import Any, Literal

import timm
from timm.layers.mlp import SwiGLU
from timm.models import vision_transformer as timm_vit
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from timm.models.vitamin import GeGluMlp
from torch import nn

from vitrim.families import _plain
from vitrim.families._class_and_mean import ClassAndMeanVisionTransformer
from vitrim.families._parts import norm_maker
from vitrim.families._plain import PlainArguments, blocks_by_stage, channels, host
from vitrim.nn.layers import norm_of
from vitrim.words.errors import SpecError
from vitrim.words.sizes import Count, Size
from vitrim.words.spec import Norm, Spec

__all__ = ["ARGUMENTS", "HOSTS", "TEST_PRESETS", "blocks_by_stage", "build", "channels", "describe", "example", "host"]

_SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 10}

TEST_PRESETS: dict[str, dict[str, object]] = {
    "plain": {},
    "distilled": {"distilled": True},
    "registers": {"reg_tokens": 2, "no_embed_class": True, "init_values": 0.1},
    "average": {"class_token": False, "global_pool": "avg", "qkv_bias": False, "img_size": (32, 48)},
    "map": {"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh"},
    "clip": {"pre_norm": True, "act_layer": "quick_gelu"},
    "qk_norm": {"qk_norm": True, "init_values": 1.0},
    "scale_norms": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "glu": {"mlp_layer": timm_vit.SwiGLUPacked, "init_values": 0.5, "mlp_ratio": 4.0},
    "swiglu": {
        "mlp_layer": SwiGLU,
        "proj_bias": False,
        "qkv_bias": False,
        "norm_layer": "rmsnorm",
        "act_layer": "silu",
    },
    "geglu": {"mlp_layer": GeGluMlp, "act_layer": "gelu"},
    "class_and_mean": {"class_and_mean": True, "init_values": 0.1},
    "dynamic": {"dynamic_img_size": True, "pool_include_prefix": True, "global_pool": "avg", "fc_norm": False},
}


HOSTS = (VisionTransformer,)


class ARGUMENTS(PlainArguments):
    """Arguments of stem and tokens; ``hybrid`` says that the stem is that of the timm model `Host.name`."""

    distilled: bool
    hybrid: bool
    patch_size: tuple[Size, Size]
    class_token: bool
    pos_embed: Literal["none", "learn"]
    no_embed_class: bool
    reg_tokens: Count
    pre_norm: bool
    dynamic_img_size: bool
    dynamic_img_pad: bool
    class_and_mean: bool = False
    embed_norm_layer: Norm | None = None


def example(*, distilled: bool = False, class_and_mean: bool = False, **arguments: Any) -> nn.Module:
    """Return a small random ViT (3 blocks of width 48 on 4 x 4 patches) for tests."""
    kind = VisionTransformerDistilled if distilled else VisionTransformer
    kind = ClassAndMeanVisionTransformer if class_and_mean else kind
    model: nn.Module = kind(**{**_SMALL, **arguments})
    return model


def describe(model: nn.Module) -> Spec:
    """Return the spec of a ViT.

    Raises:
        AdoptError: a block has a part that cannot be represented; the message has the path and the reason.
    """
    return _plain.describe(model, "vit", _arguments(model), channels(model))


def build(spec: Spec) -> nn.Module:
    """Return a ViT for `spec`, built by timm's own constructor with placeholders for the blocks.

    Raises:
        SpecError: the installed timm cannot build it.
    """
    model: nn.Module = _plain.build(spec, functools.partial(_construct, spec))
    return model


def _construct(spec: Spec) -> Any:
    arguments = _plain.keywords(spec)
    distilled, hybrid = arguments.pop("distilled"), arguments.pop("hybrid")
    class_and_mean = arguments.pop("class_and_mean", False)
    if "embed_norm_layer" in arguments:
        arguments["embed_norm_layer"] = norm_maker(Norm(**arguments["embed_norm_layer"]))
    if hybrid:
        if not timm.is_model(spec.host.name):
            raise SpecError(f"host.name: a hybrid must be a model of timm's, but got '{spec.host.name}'")
        arguments.pop("patch_size")
        return timm.create_model(spec.host.name, pretrained=False, **arguments)
    if distilled:
        # timm before 1.0.21 does not allow skipping the initialization of this class
        return VisionTransformerDistilled(**arguments | {"weight_init": ""})
    if class_and_mean:
        return ClassAndMeanVisionTransformer(**{name: value for name, value in arguments.items() if name != "fc_norm"})
    return VisionTransformer(**arguments)


def _arguments(model: Any) -> dict[str, Any]:
    """Return the constructor arguments of the stem and the tokens, as plain values."""
    embed = model.patch_embed
    hybrid = not hasattr(embed, "patch_size") or not isinstance(getattr(embed, "proj", None), nn.Conv2d)
    arguments = {
        "distilled": isinstance(model, VisionTransformerDistilled),
        "hybrid": hybrid or hasattr(embed, "backbone"),
        "patch_size": list(getattr(embed, "patch_size", (1, 1))),
        "class_token": bool(model.has_class_token),
        "pos_embed": "none" if model.pos_embed is None else "learn",
        "no_embed_class": bool(model.no_embed_class),
        "reg_tokens": int(model.num_reg_tokens),
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "dynamic_img_size": bool(model.dynamic_img_size),
        "dynamic_img_pad": bool(getattr(embed, "dynamic_img_pad", False)),
    }
    if isinstance(model, ClassAndMeanVisionTransformer):
        arguments["class_and_mean"] = True
    if not isinstance(getattr(embed, "norm", nn.Identity()), nn.Identity):
        arguments["embed_norm_layer"] = norm_of(embed.norm, "patch_embed.norm").model_dump(mode="json")
    return arguments
