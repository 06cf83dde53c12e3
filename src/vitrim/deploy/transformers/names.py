"""Rename the weights of Hugging Face transformers to timm's names.

D width, P patches, H hidden neurons.

transformers 5 has other names in memory than in its files; both are known here. Queries, keys and values are three
layers there and one in timm; layers are joined in timm's order.
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from vitrim.words.errors import WeightsError

__all__ = ["LEFT_OUT", "TOKENS", "left_out", "renamed"]

LEFT_OUT = re.compile(
    r"(text_model|text_projection|logit_scale|logit_bias|decoder|lm_head)(\..*)?|pooler\.dense\..*|embeddings\.mask_token"
)
"""Parts that timm's image models do not have: text towers, poolers that no classifier reads, parts for pretraining."""

_COMPUTED = re.compile(r"(.*\.)?(position_ids|relative_position_index|attn_mask)")
"""Buffers of older versions, which the model computes."""

TOKENS = {"cls_token": "a class token", "dist_token": "a distillation token", "reg_token": "register tokens"}
"""timm's names of learned tokens, and what they are called in messages."""

_TOWER = re.compile(r"^(vit|deit|dinov2|dinov2_with_registers|swin|beit|data2vec_vision|vision_model)\.")

_ATTENTION = r"\.(?:attention\.attention|attention\.self|self_attn|attention)\."

_NAMES = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"^encoder\.layers\.(?=\d+\.(?:blocks|downsample)\.)", "layers."),
        (r"^(?:encoder\.)?layers?\.(?=\d+\.(?!blocks\.|downsample\.))", "blocks."),
        (r"^embeddings\.patch_embeddings?(?:\.projection)?\.", "patch_embed.proj."),
        (r"^embeddings\.position_embeddings?(?:\.weight)?$", "pos_embed"),
        (r"^embeddings\.(?:cls_token|class_embedding)$", "cls_token"),
        (r"^embeddings\.distillation_token$", "dist_token"),
        (r"^embeddings\.register_tokens$", "reg_token"),
        (r"^embeddings\.norm\.", "patch_embed.norm."),
        (r"^pre_layrnorm\.", "norm_pre."),
        (r"^(?:layernorm|post_layernorm)\.", "norm."),
        (r"^pooler\.layernorm\.", "fc_norm."),
        (r"^(?:encoder\.relative_position_bias|shared_position_bias)\.", "rel_pos_bias."),
        (r"^(blocks\.\d+)\.relative_position_bias\.", r"\1.attn."),
        (r"^head\.probe$", "attn_pool.latent"),
        (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
        (r"^head\.attention\.in_proj_", "attn_pool.in_proj."),
        (r"^head\.layernorm\.", "attn_pool.norm."),
        (r"^head\.mlp\.", "attn_pool.mlp."),
        (r"^(?:classifier|cls_classifier|visual_projection)\.", "head."),
        (r"^distillation_classifier\.", "head_dist."),
        (_ATTENTION + r"(?:query|q_proj)\.", ".attn.q."),
        (_ATTENTION + r"(?:key|k_proj)\.", ".attn.k."),
        (_ATTENTION + r"(?:value|v_proj)\.", ".attn.v."),
        (
            _ATTENTION + r"(?:relative_position_bias\.)?relative_position_bias_table$",
            ".attn.relative_position_bias_table",
        ),
        (r"\.(?:attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", ".attn.proj."),
        (r"\.(?:intermediate\.dense|mlp\.weights_in)\.", ".mlp.fc1."),
        (r"\.(?:output\.dense|mlp\.weights_out|mlp\.down_proj)\.", ".mlp.fc2."),
        (r"\.(?:layernorm_before|layer_norm1)\.", ".norm1."),
        (r"\.(?:layernorm_after|layer_norm2)\.", ".norm2."),
        (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
        (r"\.lambda_([12])$", r".gamma_\1"),
    )
)


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict of transformers under timm's names, without what timm's models do not have.

    Names that are not known keep their name, so that loading reports them. Positions are `(1, P, D)`, a class token is
    `(1, 1, D)`; heads and positions still have the layout of transformers.

    Raises:
        WeightsError: if a layer that is joined with others lacks one of them.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        at = _TOWER.sub("", name)
        if LEFT_OUT.fullmatch(at) or _COMPUTED.fullmatch(at):
            continue
        for pattern, new in _NAMES:
            at = pattern.sub(new, at)
        found[at] = value
    for name, shape in (("pos_embed", (1, -1)), ("cls_token", (1, 1))):
        if name in found and found[name].ndim < 3:
            found[name] = found[name].reshape(*shape, found[name].shape[-1])
    if not any(name.endswith(".attn.k.bias") for name in found):  # BEiT's keys have no bias, in any block
        ours = re.compile(r"\.attn\.([qv])\.bias$")
        found = {ours.sub(r".attn.\1_bias", name): value for name, value in found.items()}
    found = _joined(found, ("attn.q", "attn.k", "attn.v"), "attn.qkv")
    found = _joined(found, ("mlp.gate_proj", "mlp.up_proj"), "mlp.fc1")
    for leaf in ("weight", "bias"):
        whole = found.pop(f"attn_pool.in_proj.{leaf}", None)
        if whole is not None:
            width = len(whole) // 3
            found[f"attn_pool.q.{leaf}"], found[f"attn_pool.kv.{leaf}"] = whole[:width], whole[width:]
    return found


def left_out(state: Mapping[str, Tensor]) -> list[str]:
    """Return the parts of a state dict that `renamed` leaves out, each once; computed buffers are not named."""
    names = (_TOWER.sub("", name) for name in state)
    parts = (name.removeprefix("embeddings.").split(".")[0] for name in names if LEFT_OUT.fullmatch(name))
    return list(dict.fromkeys(parts))


def _joined(state: Mapping[str, Tensor], parts: tuple[str, ...], whole: str) -> dict[str, Tensor]:
    """Return the state dict with several layers of one block joined into one, in the place of the first of them."""
    found: dict[str, Tensor] = {}
    ends = tuple(f".{part}.{leaf}" for part in parts for leaf in ("weight", "bias"))
    for name, value in state.items():
        if not name.endswith(ends):
            found[name] = value
            continue
        leaf = name.rpartition(".")[2]
        block = next(name.removesuffix(f".{part}.{leaf}") for part in parts if name.endswith(f".{part}.{leaf}"))
        target = f"{block}.{whole}.{leaf}"
        if target not in found:
            found[target] = torch.cat(list(_all(state, [f"{block}.{part}.{leaf}" for part in parts])))
    return found


def _all(state: Mapping[str, Tensor], names: Iterable[str]) -> Iterable[Tensor]:
    for name in names:
        if name not in state:
            raise WeightsError(f"{name}: queries, keys and values must all be in the file, but this one is missing")
        yield state[name]
