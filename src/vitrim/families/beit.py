"""BEiT and BEiTv2: relative position bias with a class token, queries and values with a bias, keys without.

D width, N tokens, H heads.

Only the blocks are replaced. Stem, pooling and head remain timm's own modules, and a compressed model *is* a
``timm.models.beit.Beit``. A head takes its column of biases along; biases that all blocks share stay in the host, for
all heads of the dense model. Patches that are kept at fixed places keep their biases; merging patches, or choosing them
image by image, is refused.
"""

import functools
from collections.abc import Sequence
from typing import Any

from pydantic import Field
from timm.models import beit
from timm.models.beit import Beit
from torch import Tensor, nn

from vitrim.families import _plain, _sources
from vitrim.families._parts import Hole, check_linear, norm_maker, read_mlp, read_rates, same_norm
from vitrim.families._plain import PlainArguments, blocks_by_stage, channels
from vitrim.nn import Block
from vitrim.nn.mlp import LAYERS
from vitrim.words.errors import AdoptError
from vitrim.words.sizes import Count, Size
from vitrim.words.spec import Attention, Form, Norm, Relative, Spec
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

_SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}

TEST_PRESETS: dict[str, dict[str, object]] = {
    "own": {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 0.5},
    "shared": {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": True, "global_pool": "token", "img_size": (24, 32)},
    "none": {"qkv_bias": False, "swiglu_mlp": True, "scale_mlp": True},
}

HOSTS = (Beit,)


class ARGUMENTS(PlainArguments):
    """Arguments of stem, tokens and shared biases; ``shared_heads`` is 0 where blocks share none."""

    patch_size: tuple[Size, Size]
    use_abs_pos_emb: bool
    shared_heads: Count = Field(le=1024)


def example(**arguments: Any) -> nn.Module:
    """Return a small random BEiT (2 blocks of width 48 on 4 x 4 patches) for tests."""
    return Beit(**{**_SMALL, **arguments})  # type: ignore[no-any-return]


def describe(model: Any) -> Spec:
    """Return the spec of a BEiT.

    Raises:
        AdoptError: a block has a part that cannot be represented; the message has the path and the reason.
    """
    read = functools.partial(_read_block, shared=model.rel_pos_bias is not None)
    return _plain.describe(model, "beit", _arguments(model), channels(model), read)


def host(model: Any, blocks: Sequence[Block]) -> nn.Module:
    """Return a copy of `model` with other blocks; hooks on the old blocks are not copied."""
    return _sources.host(model, blocks, _biases)


def _biases(model: Any, _: int) -> Tensor | None:
    """Return the biases that the host shares between its blocks."""
    return None if model.rel_pos_bias is None else model.rel_pos_bias()


def build(spec: Spec) -> nn.Module:
    """Return a BEiT for `spec`, built by timm's own constructor with placeholders for the blocks.

    Raises:
        SpecError: the installed timm cannot build it.
    """
    model: nn.Module = _plain.build(spec, functools.partial(_construct, spec))
    return model


def convert(weights: dict[str, Tensor], _: Any) -> dict[str, Tensor]:
    """Return weights without buffers that the model computes itself."""
    return {name: value for name, value in weights.items() if not name.endswith("relative_position_index")}


def _construct(spec: Spec) -> Any:
    known, count = dict(spec.host.arguments), len(spec.stages[0].blocks)
    norm, shared_heads = Norm(**known.pop("norm")), known.pop("shared_heads")
    known["use_fc_norm"] = known.pop("fc_norm")
    final = known.pop("final_norm")
    for unused in ("num_heads", "mlp_ratio", "activation", "patch_drop_rate"):
        known.pop(unused)
    model: Any = Beit(
        **known,
        img_size=spec.image,
        num_classes=spec.classes,
        embed_dim=spec.stages[0].width,
        depth=0,
        num_heads=max(shared_heads, 1),
        use_shared_rel_pos_bias=shared_heads > 0,
        norm_layer=norm_maker(norm),
    )
    if not final:
        model.norm = nn.Identity()
    model.blocks = nn.ModuleList(Hole() for _ in range(count))
    reduction = model.patch_embed.feat_ratio()
    model.feature_info = [
        {"module": f"blocks.{index}", "num_chs": model.embed_dim, "reduction": reduction} for index in range(count)
    ]
    return model


def _arguments(model: Any) -> dict[str, Any]:
    """Return the constructor arguments of stem, tokens and shared biases, as plain values."""
    shared = model.rel_pos_bias
    return {
        "patch_size": list(model.patch_embed.patch_size),
        "use_abs_pos_emb": model.pos_embed is not None,
        "shared_heads": 0 if shared is None else shared.relative_position_bias_table.shape[1],
        "final_norm": not isinstance(model.norm, nn.Identity),
    }


def _read_block(block: Any, at: str, *, shared: bool) -> tuple[BlockSpec, Form]:
    if type(block) is not beit.Block:
        raise AdoptError(f"{at}: a block must be timm's Block of BEiT, but got {type(block).__name__}")
    attention = block.attn
    if type(attention) is not beit.Attention:
        raise AdoptError(f"{at}.attn: attention must be timm's Attention of BEiT, but got {type(attention).__name__}")
    check_linear(attention, ("qkv", "proj"), f"{at}.attn")
    heads, channels = attention.num_heads, attention.qkv.out_features // 3
    own, scaled = attention.relative_position_bias_table is not None, block.gamma_1 is not None
    form = Form(
        norm=same_norm([(f"{at}.norm1", block.norm1), (f"{at}.norm2", block.norm2)]),
        qkv_bias=attention.q_bias is not None,
        k_bias=attention.q_bias is None,
        out_bias=attention.proj.bias is not None,
        layer_scale=scaled,
        gamma=scaled,
        positions=Relative(own=own, shared=shared) if own or shared else None,
        **read_mlp(block.mlp, f"{at}.mlp"),
    )
    width = (channels // heads,) * heads
    mixer = Attention(qk=width, v=width, scale=attention.scale, origin=tuple(range(heads)) if shared else None)
    hidden = getattr(block.mlp, LAYERS[form.mlp][-1]).in_features
    return BlockSpec(mixer=mixer, hidden=hidden, rates=read_rates(block)), form
