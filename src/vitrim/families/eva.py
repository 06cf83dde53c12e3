"""ViTs of timm's class ``Eva``: EVA and EVA-02, DINOv3, Perception Encoder, RoPE-ViT.

D width, N tokens, K channels of a head.

Only the blocks are replaced. Stem, registers, the angles of rotary positions, pooling and head remain timm's own
modules, and a compressed model *is* a ``timm.models.eva.Eva``. Under rotary positions, channels of queries and keys
turn in pairs by their own angles, so a head's are cut all together or not at all. Patches that are kept at fixed places
keep their angles; merging patches, or choosing them image by image, is refused.

Models with `gated` or grouped attention (Sapiens2) are refused with path and reason.
"""

import functools
import inspect
from collections.abc import Sequence
from typing import Any, Literal, Self

import timm.layers
import torch
from pydantic import ConfigDict, model_validator
from timm.layers import AttentionRope
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from torch import Tensor, nn

from vitrim.families import _plain, _sources
from vitrim.families._parts import Hole, check_linear, norm_maker, optional_norm, read_mlp, read_rates, same_norm
from vitrim.families._plain import PlainArguments, blocks_by_stage, channels
from vitrim.nn import Block
from vitrim.nn.mlp import LAYERS
from vitrim.words.errors import AdoptError
from vitrim.words.plain import Node
from vitrim.words.sizes import Count, Size
from vitrim.words.spec import Attention, Form, Norm, Rotary, Spec
from vitrim.words.spec import Block as BlockSpec

__all__ = ["ARGUMENTS", "HOSTS", "TEST_PRESETS", "blocks_by_stage", "build", "channels", "describe", "example", "host"]

_SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}

_ROTARY = {"use_rot_pos_emb": True, "use_abs_pos_emb": False}

TEST_PRESETS: dict[str, dict[str, object]] = {
    "dinov3": {
        **_ROTARY,
        "rope_type": "dinov3",
        "rope_rotate_half": True,
        "num_reg_tokens": 2,
        "init_values": 0.5,
        "use_fc_norm": False,
    },
    "eva02": {
        "use_rot_pos_emb": True,
        "ref_feat_shape": (4, 4),
        "qkv_fused": False,
        "swiglu_mlp": True,
        "scale_mlp": True,
        "img_size": (32, 48),
    },
    "mixed": {
        **_ROTARY,
        "rope_type": "mixed",
        "attn_type": "rope",
        "global_pool": "token",
        "rope_grid_indexing": "xy",
        "swiglu_mlp": True,
    },
    "core": {
        "use_rot_pos_emb": True,
        "attn_type": "rope",
        "qkv_fused": False,
        "global_pool": "map",
        "use_pre_transformer_norm": True,
        "class_token": False,
        "attn_pool_num_heads": 2,
        "rope_grid_offset": 1.0,
    },
    "post": {"use_post_norm": True, "global_pool": "token"},
    "dynamic": {**_ROTARY, "rope_type": "dinov3", "dynamic_img_size": True, "qk_norm": True, "qkv_bias": False},
}

HOSTS = (Eva,)


class _Rope(Node):
    """The module of rotary positions: a class of ``timm.layers``, and the arguments that its constructor takes."""

    model_config = ConfigDict(extra="allow")

    kind: Literal["RotaryEmbeddingCat", "RotaryEmbeddingMixed", "RotaryEmbeddingDinoV3", "RotaryEmbeddingMRope"]
    dim: Size

    @model_validator(mode="after")
    def _plain(self) -> Self:
        known = set(inspect.signature(getattr(timm.layers, self.kind)).parameters) - {"device", "dtype"}
        for name, value in (self.model_extra or {}).items():
            parts = value if isinstance(value, list | tuple) else (value,)
            if name not in known or not all(part is None or isinstance(part, _SIMPLE) for part in parts):
                raise ValueError(f"{name} must be a number or word that timm's {self.kind} takes, but it is not")
        return self


_SIMPLE = (bool, int, float, str)


class ARGUMENTS(PlainArguments):
    """Arguments of stem, tokens and positions."""

    patch_size: tuple[Size, Size]
    class_token: bool
    num_reg_tokens: Count
    no_embed_class: bool
    use_abs_pos_emb: bool
    use_pre_transformer_norm: bool
    dynamic_img_size: bool
    dynamic_img_pad: bool
    rope: _Rope | None


def example(**arguments: Any) -> nn.Module:
    """Return a small random Eva (2 blocks of width 48 on 4 x 4 patches) for tests."""
    return Eva(**{**_SMALL, **arguments})  # type: ignore[no-any-return]


def describe(model: Any) -> Spec:
    """Return the spec of an Eva.

    Raises:
        AdoptError: a block has a part that cannot be represented; the message has the path and the reason.
    """
    read = functools.partial(_read_block, rotary=model.rope is not None, by_head=bool(model.rope_mixed))
    return _plain.describe(model, "eva", _arguments(model), channels(model), read)


def host(model: Any, blocks: Sequence[Block]) -> nn.Module:
    """Return a copy of `model` with other blocks; hooks on the old blocks are not copied."""
    return _sources.host(model, blocks, _angles)


def _angles(model: Any, index: int) -> Tensor | None:
    """Return sines and cosines that the host gives to a block at the model's image size."""
    if model.rope is None:
        return None
    cached = getattr(model.rope, "feat_shape", None) is not None
    angles: Tensor = model.rope.get_embed(shape=None if cached else model.patch_embed.grid_size)
    return angles[index] if model.rope_mixed else angles


def build(spec: Spec) -> nn.Module:
    """Return an Eva for `spec`, built by timm's own constructor with placeholders for the blocks.

    Raises:
        SpecError: the installed timm cannot build it.
    """
    model: nn.Module = _plain.build(spec, functools.partial(_construct, spec))
    return model


def _construct(spec: Spec) -> Any:
    known, count = dict(spec.host.arguments), len(spec.stages[0].blocks)
    rope, norm = known.pop("rope"), Norm(**known.pop("norm"))
    renamed = {
        "attn_pool_num_heads": known.pop("num_heads"),
        "attn_pool_mlp_ratio": known.pop("mlp_ratio"),
        "use_post_transformer_norm": known.pop("final_norm"),
        "use_fc_norm": known.pop("fc_norm"),
    }
    for other in ("activation", "pool_width"):
        known.pop(other, None)
    model: Any = Eva(
        **known,
        **renamed,
        img_size=spec.image,
        num_classes=spec.classes,
        embed_dim=_plain.built_width(spec),
        depth=0,
        num_heads=1,
        norm_layer=norm_maker(norm),
    )
    model.blocks = nn.ModuleList(Hole() for _ in range(count))
    reduction = model.patch_embed.feat_ratio()
    model.feature_info = [
        {"module": f"blocks.{index}", "num_chs": model.embed_dim, "reduction": reduction} for index in range(count)
    ]
    if rope is not None:
        settings = {key: tuple(value) if isinstance(value, list | tuple) else value for key, value in rope.items()}
        model.rope_mixed = settings.pop("kind") == "RotaryEmbeddingMixed"
        model.rope = getattr(timm.layers, rope["kind"])(**settings)
        # timm makes it before the norm that follows, of a size that depends on the width, which may be any here.
        modules = model._modules
        for name in list(modules)[list(modules).index("norm_pre") : -1]:
            modules[name] = modules.pop(name)
    return model


def _arguments(model: Any) -> dict[str, Any]:
    """Return the constructor arguments of stem, tokens and positions, as plain values."""
    embed = model.patch_embed
    arguments = {
        "patch_size": list(embed.patch_size),
        "class_token": model.cls_token is not None,
        "num_reg_tokens": 0 if model.reg_token is None else model.reg_token.shape[1],
        "no_embed_class": bool(model.no_embed_class),
        "use_abs_pos_emb": model.pos_embed is not None,
        "use_pre_transformer_norm": not isinstance(model.norm_pre, nn.Identity),
        "final_norm": not isinstance(model.norm, nn.Identity),
        "dynamic_img_size": bool(model.dynamic_img_size),
        "dynamic_img_pad": bool(embed.dynamic_img_pad),
        "rope": None,
    }
    if model.rope is not None:
        names = inspect.signature(type(model.rope)).parameters
        values = {name: getattr(model.rope, name) for name in names if hasattr(model.rope, name)}
        shown = {
            key: list(value) if isinstance(value, tuple | list | torch.Size) else value for key, value in values.items()
        }
        arguments["rope"] = {"kind": type(model.rope).__name__, **shown}
    return arguments


def _read_block(block: Any, at: str, *, rotary: bool, by_head: bool) -> tuple[BlockSpec, Form]:
    if type(block) not in (EvaBlock, EvaBlockPostNorm):
        raise AdoptError(f"{at}: a block must be timm's EvaBlock or EvaBlockPostNorm, but got {type(block).__name__}")
    attention = block.attn
    if type(attention) not in (EvaAttention, AttentionRope):
        raise AdoptError(
            f"{at}.attn: attention must be timm's EvaAttention or AttentionRope, but got {type(attention).__name__}"
        )
    if getattr(attention, "gate", None) is not None:
        raise AdoptError(f"{at}.attn: gated attention is not supported")
    if getattr(attention, "num_kv_groups", 1) > 1:
        raise AdoptError(f"{at}.attn: heads that share keys and values (grouped attention) are not supported")
    post_norm = type(block) is EvaBlockPostNorm
    gammas = (getattr(block, "gamma_1", None) is not None, getattr(block, "gamma_2", None) is not None)
    if gammas[0] != gammas[1]:
        raise AdoptError(f"{at}.gamma_2: layer scale must be on both branches or none, but is on attention alone")
    heads = attention.num_heads
    turned = None
    if rotary:
        turned = Rotary(halves=bool(getattr(attention, "rotate_half", False)), by_head=by_head)
    names = ("q_proj", "k_proj", "v_proj") if attention.qkv is None else ("qkv",)
    check_linear(attention, (*names, "proj"), f"{at}.attn")
    channels = attention.get_submodule(names[0]).out_features // (3 // len(names))
    form = Form(
        norm=same_norm([(f"{at}.norm1", block.norm1), (f"{at}.norm2", block.norm2)]),
        **_biases(attention, names),
        qkv="split" if attention.qkv is None else "fused",
        out_bias=attention.proj.bias is not None,
        layer_scale=gammas[0],
        gamma=gammas[0],
        post_norm=post_norm,
        head_norm=optional_norm(attention.q_norm, f"{at}.attn.q_norm"),
        head_norm_width=0 if isinstance(attention.q_norm, nn.Identity) else channels // heads,
        mixed_norm=optional_norm(attention.norm, f"{at}.attn.norm"),
        positions=turned,
        **read_mlp(block.mlp, f"{at}.mlp"),
    )
    width = (channels // heads,) * heads
    mixer = Attention(qk=width, v=width, scale=attention.scale, origin=tuple(range(heads)) if by_head else None)
    hidden = getattr(block.mlp, LAYERS[form.mlp][-1]).in_features
    return BlockSpec(mixer=mixer, hidden=hidden, rates=read_rates(block)), form


def _biases(attention: Any, names: Sequence[str]) -> dict[str, bool]:
    """Return whether queries and values have a bias, and whether keys have one where those do."""
    if len(names) == 3:
        biased = [getattr(attention, name).bias is not None for name in names]
        return {"qkv_bias": biased[0], "k_bias": biased[1] or not biased[0]}
    apart = getattr(attention, "q_bias", None) is not None
    return {"qkv_bias": apart or attention.qkv.bias is not None, "k_bias": not apart}
