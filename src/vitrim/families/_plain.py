"""Common functions of the families based on timm's ``VisionTransformer``: read the spec of a model, and build a model.

D width, N tokens.

These families differ in their stems and in the keyword arguments for them. Blocks, tokens, pooling and head are read
here.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import timm
import torch
from pydantic import Field, PositiveFloat, field_validator
from timm.layers import AttentionPoolLatent
from timm.models import vision_transformer as timm_vit
from torch import nn

from vitrim.families._channels import Channels, Counted, channel_costs, named, narrow_
from vitrim.families._features import give_methods_
from vitrim.families._parts import (
    Hole,
    bare,
    check_linear,
    checked_stage,
    count,
    give_pretrained_,
    norm_maker,
    optional_norm,
    params_outside,
    pretrained,
    read_mlp,
    read_rates,
    remembered,
    same_norm,
)
from vitrim.nn import Block
from vitrim.nn.copying import copied
from vitrim.nn.layers import activation_name, input_channels, make_activation, make_norm, norm_of
from vitrim.nn.mlp import LAYERS
from vitrim.nn.pooling import WidePool
from vitrim.words.block import Rate
from vitrim.words.errors import AdoptError, SpecError
from vitrim.words.plain import Node
from vitrim.words.sizes import Size
from vitrim.words.spec import Attention, ChannelCost, Form, Host, Norm, Spec
from vitrim.words.spec import Block as BlockSpec

__all__ = [
    "PlainArguments",
    "arguments",
    "blocks_by_stage",
    "build",
    "built_width",
    "channels",
    "describe",
    "host",
    "keywords",
]


class PlainArguments(Node):
    """The arguments that `arguments` returns, as `vitrim.families.Family.ARGUMENTS`; a family adds those of its stem.

    ``activation`` and the name of a norm are looked up in closed lists (`vitrim.nn.layers`).
    """

    in_chans: Size = Field(le=1024)
    global_pool: Literal["", "avg", "avgmax", "max", "token", "map", "prr"]
    num_heads: Size = Field(le=1024)
    mlp_ratio: PositiveFloat = Field(le=1024)
    final_norm: bool
    fc_norm: bool
    drop_rate: Rate
    pos_drop_rate: Rate
    patch_drop_rate: Rate
    norm: Norm
    activation: str
    pool_include_prefix: bool = False
    pool_width: Size | None = None

    @field_validator("activation")
    @classmethod
    def _known_activation(cls, name: str) -> str:
        make_activation(name)
        return name

    @field_validator("norm")
    @classmethod
    def _known_norm(cls, norm: Norm) -> Norm:
        make_norm(norm, 1)
        return norm


def blocks_by_stage(model: Any) -> list[list[nn.Module]]:
    """Return the blocks of the single stage, timm's or vitrim's."""
    return [list(model.blocks)]


Read = Callable[[Any, str], tuple[BlockSpec, Form]]
"""Reads one of timm's blocks; the path is for messages. Raises `AdoptError`."""


def describe(
    model: Any,
    family: str,
    host_arguments: dict[str, Any],
    outside: Sequence[Channels] = (),
    read: Read | None = None,
) -> Spec:
    """Return the spec of a model.

    Args:
        model: a ``VisionTransformer``.
        family: name of its family.
        host_arguments: arguments that `build` of that family needs in addition to `arguments`.
        outside: the result of the family's ``channels(model)``, if it offers that; without it, the residual width
            cannot be cut.
        read: reads a block of timm's; None for those of a ``VisionTransformer``.

    Raises:
        AdoptError: a block has a part that cannot be represented; the message has the path and the reason.
    """
    blocks: list[BlockSpec] = []
    forms: list[Form] = []
    for index, block in enumerate(model.blocks):
        spec, form = _ours(block) if isinstance(block, Block) else (read or _read_block)(block, f"blocks.{index}")
        if forms and form != forms[0]:
            raise AdoptError(f"blocks.{index}: every block must have the form of block 0, but this one differs from it")
        blocks.append(spec)
        forms.append(form)
    if not blocks:
        raise AdoptError("blocks: a model must have at least one block, but it has none")
    image = _image(model)
    stage = checked_stage(
        "stages.0",
        width=model.embed_dim,
        grid=tuple(model.patch_embed.dynamic_feat_size(image)),
        prefix=model.num_prefix_tokens,
        form=forms[0],
        blocks=tuple(blocks),
    )
    macs, per_token, slopes = _host_macs(model, image, outside)
    known = Host(
        name=str(pretrained(model).get("architecture", "")),
        arguments=arguments(model, forms[0]) | host_arguments,
        macs=macs,
        macs_per_token=per_token,
        params=params_outside(model, [model.blocks]),
        pretrained=pretrained(model),
        channels=slopes,
    )
    return Spec(family=family, host=known, image=image, classes=model.num_classes, stages=(stage,))


def channels(model: Any) -> tuple[Channels, ...]:
    """Return where the channels of the residual stream lie outside the blocks; empty if something cannot follow a cut.

    A stem may hide them, and a pooling without weights takes them for the channels of its heads. Attention pooling
    with weights reads them by its keys and values; what it gives, with norm and head, is of a width of its own.
    """
    pool: Any = getattr(model, "attn_pool", None)
    stem = isinstance(getattr(model.patch_embed, "proj", None), nn.Conv2d | nn.Linear)
    if not stem or not (pool is None or type(pool) in (AttentionPoolLatent, WidePool)):
        return ()
    norms = ("norm", "fc_norm") if pool is None else ("norm",)
    readers = ("head", "head_dist") if pool is None else ("attn_pool.kv",)
    return (
        Channels(
            width=model.embed_dim,
            writers=("patch_embed.proj",),
            readers=readers,
            norms=norms,
            stem_norms=("patch_embed.norm", "norm_pre"),
            direct=() if any(named(model, norm) is not None for norm in norms) else readers,
            pools=() if pool is None else ("attn_pool",),
            tensors=("cls_token", "reg_token", "dist_token", "pos_embed", "attn_pool.pos_embed"),
            sizes=("embed_dim", "num_features", *(("head_hidden_size",) if pool is None else ())),
        ),
    )


def host(model: Any, blocks: Sequence[Block]) -> nn.Module:
    """Return a copy of `model` with other blocks; hooks on the old blocks are not copied."""
    for block in blocks:
        block.is_last = block is blocks[-1]
    run: nn.Module = nn.Sequential(*blocks) if isinstance(model.blocks, nn.Sequential) else nn.ModuleList(blocks)
    run.training = model.blocks.training
    shell = copied(model, {id(model.blocks): run})
    give_methods_(shell)
    return shell  # type: ignore[no-any-return]


def build(spec: Spec, construct: Callable[[], Any]) -> Any:
    """Return the model that `construct` builds for `spec`, with placeholders for the blocks.

    Raises:
        SpecError: the installed timm cannot build it.
    """
    try:
        model = construct()
    except SpecError:
        raise
    except (LookupError, TypeError, ValueError, RuntimeError, AssertionError) as problem:
        raise SpecError(
            f"host: the installed timm {timm.__version__} must build {spec.host.name or 'VisionTransformer'}, "
            f"but fails: {type(problem).__name__}: {problem}"
        ) from None
    form = spec.stages[0].form
    if form.norm.bias is False and isinstance(model.norm, nn.LayerNorm) and model.norm.bias is not None:
        raise SpecError("host: a final LayerNorm without bias cannot be built by timm; keep the model in memory")
    width = spec.stages[0].width
    if model.embed_dim != width:
        outside = channels(model)
        if not outside or model.embed_dim < width:
            raise SpecError(
                f"host.arguments.pool_width: must be the width {width} of the blocks, or more where the stem is "
                f"plain, but got {model.embed_dim}"
            )
        narrow_(model, outside, [range(width)])
    give_pretrained_(model, spec.host.pretrained)
    return model


def built_width(spec: Spec) -> int:
    """Return the width at which timm builds the host: that of its attention pooling, which `build` cuts to the blocks'.

    timm's pooling is as wide as the blocks; a cut of theirs leaves its inside.
    """
    return int(spec.host.arguments.get("pool_width") or spec.stages[0].width)


def keywords(spec: Spec) -> dict[str, Any]:
    """Return the keyword arguments for timm's constructor."""
    known = dict(spec.host.arguments)
    known.pop("pool_width", None)
    norm, activation = Norm(**known.pop("norm")), known.pop("activation")
    return known | {
        "img_size": spec.image,
        "num_classes": spec.classes,
        "embed_dim": built_width(spec),
        "depth": len(spec.stages[0].blocks),
        "norm_layer": norm_maker(norm),
        "act_layer": functools.partial(make_activation, activation),
        "block_fn": Hole,
        "weight_init": "skip",
    }


def _ours(block: Block) -> tuple[BlockSpec, Form]:
    return block.spec.model_copy(update={"rates": read_rates(block)}), block.form


def _read_block(block: Any, at: str) -> tuple[BlockSpec, Form]:
    if type(block) is not timm_vit.Block:
        raise AdoptError(f"{at}: a block must be timm's plain pre-norm Block, but got {type(block).__name__}")
    attention, mlp = block.attn, block.mlp
    if type(attention) is not timm_vit.Attention:
        raise AdoptError(f"{at}.attn: attention must be timm's plain Attention, but got {type(attention).__name__}")
    if getattr(attention, "gate", None) is not None:
        raise AdoptError(f"{at}.attn: gated attention is not supported")
    check_linear(attention, ("qkv", "proj"), f"{at}.attn")
    heads, width = attention.num_heads, attention.head_dim
    if attention.qkv.out_features != 3 * heads * width:
        raise AdoptError(
            f"{at}.attn.qkv: must give {3 * heads * width} channels, as many keys and values as queries, but gives "
            f"{attention.qkv.out_features}; grouped attention is not supported"
        )
    mixer = Attention(qk=(width,) * heads, v=(width,) * heads, scale=attention.scale)
    form = Form(
        norm=same_norm([(f"{at}.norm1", block.norm1), (f"{at}.norm2", block.norm2)]),
        qkv_bias=attention.qkv.bias is not None,
        out_bias=attention.proj.bias is not None,
        layer_scale=_layer_scale(block, at),
        head_norm=optional_norm(attention.q_norm, f"{at}.attn.q_norm"),
        head_norm_width=0 if isinstance(attention.q_norm, nn.Identity) else width,
        mixed_norm=optional_norm(getattr(attention, "norm", nn.Identity()), f"{at}.attn.norm"),
        **read_mlp(mlp, f"{at}.mlp"),
    )
    hidden = getattr(mlp, LAYERS[form.mlp][-1]).in_features
    return BlockSpec(mixer=mixer, hidden=hidden, rates=read_rates(block)), form


def _layer_scale(block: Any, at: str) -> bool:
    scale = timm_vit.LayerScale  # before timm 1.0.21 a separate class of that module, with the same parameter
    kinds = {type(block.ls1), type(block.ls2)}
    if kinds not in ({scale}, {nn.Identity}):
        raise AdoptError(f"{at}.ls1: layer scale must be timm's on both branches or none, but got {kinds}")
    return kinds == {scale}


def _image(model: Any) -> tuple[int, int]:
    size = getattr(model.patch_embed, "img_size", None) or pretrained(model).get("input_size", (3, 224, 224))[1:]
    return int(size[0]), int(size[1])


def arguments(model: Any, form: Form) -> dict[str, Any]:
    """Return the keyword arguments with which timm builds this model again, read from its modules, as plain values.

    timm does not store them (before 1.0.31), and they may have changed since construction (`reset_classifier`,
    `set_input_size`). The arguments of the stem are read by the family.
    """
    pool: Any = getattr(model, "attn_pool", None)
    pool_width = pool.kv.out_features // 2 if isinstance(pool, AttentionPoolLatent) else None
    before = getattr(model, "norm_pre", nn.Identity())
    final = next((n for n in (model.norm, model.fc_norm, before) if not isinstance(n, nn.Identity)), None)
    known = {
        "in_chans": input_channels(model),
        "global_pool": model.global_pool,
        "num_heads": 1 if pool is None else pool.num_heads,
        "mlp_ratio": 4.0
        if getattr(pool, "mlp", None) is None
        else pool.mlp.fc1.out_features / (pool_width or model.embed_dim),
        "final_norm": not (isinstance(model.norm, nn.Identity) and isinstance(model.fc_norm, nn.Identity)),
        "fc_norm": not isinstance(model.fc_norm, nn.Identity),
        "drop_rate": model.head_drop.p,
        "pos_drop_rate": getattr(getattr(model, "pos_drop", None), "p", 0.0),
        "patch_drop_rate": getattr(getattr(model, "patch_drop", None), "prob", 0.0),
        "norm": (form.norm if final is None else norm_of(final, "norm")).model_dump(mode="json"),
        "activation": form.activation if getattr(pool, "mlp", None) is None else activation_name(pool.mlp.act, "pool"),
    }
    if hasattr(model, "pool_include_prefix"):
        known["pool_include_prefix"] = bool(model.pool_include_prefix)
    if pool_width is not None:
        known["pool_width"] = pool_width
    return known


def _host_macs(
    model: Any, image: tuple[int, int], outside: Sequence[Channels]
) -> tuple[int, int, tuple[ChannelCost, ...]]:
    """Return the multiply-accumulates of stem and head on one image, and those of the head per additional token.

    They are counted by PyTorch on a copy without blocks on the meta device (4 ms for DeiT-B). Stem and head are timm's,
    and formulas for them would have to be updated with every timm release. The count is cached by their structure. The
    last result is the cost of each channel of the residual stream.
    """
    question = ("plain", image, tuple(outside))
    return remembered(model, [model.blocks], question, lambda: _counted_host(model, image, outside))


def _counted_host(
    model: Any, image: tuple[int, int], outside: Sequence[Channels]
) -> tuple[int, int, tuple[ChannelCost, ...]]:
    leaving = model.num_prefix_tokens + _patches(model, image)
    x = torch.zeros(1, input_channels(model), *image, device="meta")

    def counted(shell: Any) -> Counted:
        whole, more = count(shell, x), 0
        if getattr(model, "attn_pool", None) is not None:
            tokens = torch.zeros(1, 16 + model.num_prefix_tokens, shell.embed_dim, device="meta")
            more = count(shell.forward_head, torch.cat([tokens, tokens[:, :1]], dim=1))
            more -= count(shell.forward_head, tokens)
        return Counted(whole - more * leaving, more, sum(p.numel() for p in shell.parameters()))

    shell = bare(model, [model.blocks])
    here = counted(shell)
    return here.macs, here.macs_per_token, channel_costs(shell, outside, counted, here)


def _patches(model: Any, image: tuple[int, int]) -> int:
    rows, columns = model.patch_embed.dynamic_feat_size(image)
    return int(rows * columns)
