"""ViTs with relative positions of timm's class ``VisionTransformerRelPos``: a network gives biases.

D width, N tokens, H heads.

Only the blocks are replaced. Stem, pooling and head remain timm's own modules. A head takes its biases along; biases
that all blocks share stay in the host. Patches that are kept at fixed places keep their biases; merging patches, or
choosing them image by image, is refused, and so are blocks with a table of their own, which no published model has.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field
from timm.layers import RelPosMlp
from timm.models import vision_transformer_relpos as timm_relpos
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import Tensor, nn

from vitrim.families import _plain, _sources
from vitrim.families._parts import Hole, check_linear, norm_maker, optional_norm, read_mlp, read_rates, same_norm
from vitrim.families._plain import PlainArguments, blocks_by_stage, channels
from vitrim.nn import Block
from vitrim.words.errors import AdoptError
from vitrim.words.plain import Node
from vitrim.words.sizes import Size
from vitrim.words.spec import Attention, Form, Norm, Relative, Spec
from vitrim.words.spec import Block as BlockSpec

__all__ = ["ARGUMENTS", "HOSTS", "TEST_PRESETS", "blocks_by_stage", "build", "channels", "describe", "example", "host"]

_SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}

TEST_PRESETS: dict[str, dict[str, object]] = {
    "network": {"class_token": True, "rel_pos_dim": 16, "qk_norm": True},
    "shared": {"rel_pos_type": "mlp-swin", "shared_rel_pos": True, "fc_norm": True, "img_size": (24, 32)},
}

HOSTS = (VisionTransformerRelPos,)


class _Shared(Node):
    """The network of biases that all blocks share."""

    num_heads: Size = Field(le=1024)
    rel_pos_dim: Size
    rel_pos_type: Literal["mlp", "mlp-swin"]


class ARGUMENTS(PlainArguments):
    """Arguments of stem, tokens and shared biases."""

    patch_size: tuple[Size, Size]
    class_token: bool
    shared: _Shared | None


def example(**arguments: Any) -> nn.Module:
    """Return a small random ViT with relative positions (2 blocks of width 48 on 4 x 4 patches) for tests."""
    return VisionTransformerRelPos(**{**_SMALL, **arguments})  # type: ignore[no-any-return]


def describe(model: Any) -> Spec:
    """Return the spec of a ViT with relative positions.

    Raises:
        AdoptError: a block has a part that cannot be represented; the message has the path and the reason.
    """
    shared = model.shared_rel_pos
    if shared is not None and type(shared) is not RelPosMlp:
        raise AdoptError(f"shared_rel_pos: must be timm's RelPosMlp, but got {type(shared).__name__}")
    read = functools.partial(_read_block, shared=shared is not None)
    return _plain.describe(model, "relpos", _arguments(model), channels(model), read)


def host(model: Any, blocks: Sequence[Block]) -> nn.Module:
    """Return a copy of `model` with other blocks; hooks on the old blocks are not copied."""
    return _sources.host(model, blocks, _biases)


def _biases(model: Any, _: int) -> Tensor | None:
    """Return the biases that the host shares between its blocks."""
    return None if model.shared_rel_pos is None else model.shared_rel_pos.get_bias()


def build(spec: Spec) -> nn.Module:
    """Return a model for `spec`, built by timm's own constructor with placeholders for the blocks.

    Raises:
        SpecError: the installed timm cannot build it.
    """
    model: nn.Module = _plain.build(spec, functools.partial(_construct, spec))
    return model


def _construct(spec: Spec) -> Any:
    known = dict(spec.host.arguments)
    norm, final = Norm(**known.pop("norm")), known.pop("final_norm")
    for unused in ("num_heads", "mlp_ratio", "activation", "patch_drop_rate", "pos_drop_rate"):
        known.pop(unused)
    shared = known.pop("shared")
    model: Any = VisionTransformerRelPos(
        **known,
        **(shared or {"num_heads": 1}),
        shared_rel_pos=shared is not None,
        img_size=spec.image,
        num_classes=spec.classes,
        embed_dim=spec.stages[0].width,
        depth=len(spec.stages[0].blocks),
        norm_layer=norm_maker(norm),
        block_fn=Hole,
        weight_init="skip",
    )
    if not final:
        model.norm = nn.Identity()
    return model


def _arguments(model: Any) -> dict[str, Any]:
    """Return the constructor arguments of stem, tokens and shared biases, as plain values."""
    shared = model.shared_rel_pos
    arguments: dict[str, Any] = {
        "patch_size": list(model.patch_embed.patch_size),
        "class_token": model.cls_token is not None,
        "final_norm": not isinstance(model.norm, nn.Identity),
        "shared": None,
    }
    if shared is not None:
        arguments["shared"] = {
            "num_heads": shared.num_heads,
            "rel_pos_dim": shared.mlp.fc1.out_features,
            "rel_pos_type": "mlp-swin" if shared.mode == "swin" else "mlp",
        }
    return arguments


def _read_block(block: Any, at: str, *, shared: bool) -> tuple[BlockSpec, Form]:
    if type(block) not in (timm_relpos.RelPosBlock, timm_relpos.ResPostRelPosBlock):
        raise AdoptError(f"{at}: a block must be timm's RelPosBlock, but got {type(block).__name__}")
    attention, post_norm = block.attn, type(block) is timm_relpos.ResPostRelPosBlock
    if type(attention) is not timm_relpos.RelPosAttention:
        raise AdoptError(f"{at}.attn: attention must be timm's RelPosAttention, but got {type(attention).__name__}")
    own = attention.rel_pos
    if own is not None and type(own) is not RelPosMlp:
        raise AdoptError(f"{at}.attn.rel_pos: must be timm's RelPosMlp, but got {type(own).__name__}")
    check_linear(attention, ("qkv", "proj"), f"{at}.attn")
    heads = attention.num_heads
    channels = attention.qkv.out_features // (3 * heads)
    positions = Relative(
        own=own is not None,
        shared=shared,
        network=None if own is None else own.mlp.fc1.out_features,
        bounded=own is not None and own.mode == "swin",
    )
    form = Form(
        norm=same_norm([(f"{at}.norm1", block.norm1), (f"{at}.norm2", block.norm2)]),
        qkv_bias=attention.qkv.bias is not None,
        out_bias=attention.proj.bias is not None,
        layer_scale=not post_norm and not isinstance(block.ls1, nn.Identity),
        post_norm=post_norm,
        head_norm=optional_norm(attention.q_norm, f"{at}.attn.q_norm"),
        head_norm_width=0 if isinstance(attention.q_norm, nn.Identity) else channels,
        positions=positions if own is not None or shared else None,
        **read_mlp(block.mlp, f"{at}.mlp"),
    )
    width = (channels,) * heads
    mixer = Attention(qk=width, v=width, scale=attention.scale, origin=tuple(range(heads)) if shared else None)
    return BlockSpec(mixer=mixer, hidden=block.mlp.fc2.in_features, rates=read_rates(block)), form
