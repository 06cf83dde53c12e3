"""Build the timm model of the structure that a ``config.json`` of Hugging Face transformers describes.

D width, K classes, P patches, H neurons of an MLP.

Every class of transformers here has the same function as one of timm's with other names, save one: DINOv2's classifier
reads the class token and the mean of the patches, see `vitrim.families._class_and_mean`.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from timm.layers import DropPath, GELUTanh, LayerNorm, QuickGELU
from timm.layers.mlp import SwiGLUPacked
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitrim.families._class_and_mean import ClassAndMeanVisionTransformer
from vitrim.words.errors import RecipeError
from vitrim.words.plain import reason

__all__ = ["KNOWN", "Structure", "build", "read_structure", "why_not_windows"]

_VIT: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "qkv_bias": True,
}
_DINOV2 = {**_VIT, "mlp_ratio": 4, "layer_norm_eps": 1e-6, "use_swiglu_ffn": False, "drop_path_rate": 0.0}
_CLIP = {**_VIT, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "patch_size": 32, "attention_dropout": 0.0}
_SIGLIP = {**_CLIP, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "patch_size": 16}
_BEIT = {
    **_VIT,
    "use_absolute_position_embeddings": False,
    "use_relative_position_bias": False,
    "use_shared_relative_position_bias": False,
    "layer_scale_init_value": 0.1,
    "drop_path_rate": 0.1,
    "use_mean_pooling": True,
}
_SWIN = {
    "embed_dim": 96,
    "depths": [2, 2, 6, 2],
    "num_heads": [3, 6, 12, 24],
    "window_size": 7,
    "mlp_ratio": 4.0,
    "qkv_bias": True,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "drop_path_rate": 0.1,
    "layer_norm_eps": 1e-5,
    "use_absolute_embeddings": False,
    "image_size": 224,
    "patch_size": 4,
    "num_channels": 3,
}

KNOWN: dict[str, dict[str, Any]] = {
    "vit": _VIT,
    "deit": _VIT,
    "dinov2": {**_DINOV2, "patch_size": 14},
    "dinov2_with_registers": {**_DINOV2, "num_register_tokens": 4},
    "swin": _SWIN,
    "clip": _CLIP,
    "clip_vision_model": _CLIP,
    "siglip": _SIGLIP,
    "siglip_vision_model": _SIGLIP,
    "beit": _BEIT,
    "data2vec-vision": _BEIT,
}
"""Values of ``model_type``, and what a ``config.json`` leaves out, as transformers fills it in."""

_ACTIVATIONS: dict[str, Callable[..., nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_python": nn.GELU,
    "gelu_pytorch_tanh": GELUTanh,
    "gelu_new": GELUTanh,
    "gelu_fast": GELUTanh,
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "mish": nn.Mish,
    "selu": nn.SELU,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """What a ``config.json`` says of an image model, before its weights are seen.

    Attributes:
        model_type: its value of ``model_type``.
        values: its settings, completed with the defaults of transformers.
        image: height and width that its positions are for, pixels.
        patch: height and width of a patch, pixels.
    """

    model_type: str
    values: Mapping[str, Any]
    image: tuple[int, int]
    patch: tuple[int, int]

    @property
    def family(self) -> str:
        """``model_type`` without the suffix that towers alone have."""
        return "beit" if self.model_type == "data2vec-vision" else self.model_type.removesuffix("_vision_model")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image[0] // self.patch[0], self.image[1] // self.patch[1]


def read_structure(config: Mapping[str, Any], source: str) -> Structure:
    """Read the structure from a configuration.

    Args:
        config: ``config.json`` as a table.
        source: the file, for messages.

    Raises:
        RecipeError: if it is of another architecture, or has a setting that no model of timm's has.
    """
    kind = str(config.get("model_type"))
    if kind not in KNOWN:
        raise RecipeError(f"{source}: {_why_not(kind)}")
    given = config.get("vision_config") if kind in ("clip", "siglip") else config
    if not isinstance(given, Mapping):
        given = {}
    values = {name: given[name] if given.get(name) is not None else value for name, value in KNOWN[kind].items()}
    for name in ("vision_use_head", "head_dim"):
        if given.get(name) is not None:
            values[name] = given[name]
    try:
        found = Structure(
            model_type=kind, values=values, image=_pair(values["image_size"]), patch=_pair(values["patch_size"])
        )
        _check(found, source)
    except (TypeError, ValueError) as problem:
        if isinstance(problem, RecipeError):
            raise
        raise RecipeError(f"{source}: settings must be those of a {kind} model, but {reason(problem)}") from None
    return found


def _why_not(kind: str) -> str:
    """Return a clause on why models of another ``model_type`` are not taken."""
    taken = ", ".join(name for name in KNOWN if not name.endswith("_vision_model"))
    if kind.endswith("text_model"):
        return f"the model must be of images, but {kind} is the text tower of another; give the model with its images"
    return f"the architecture must be one of {taken}, but is {kind}; see `vitrim models` for timm's own names"


def _check(found: Structure, source: str) -> None:
    values = found.values
    if values["hidden_act"] not in _ACTIVATIONS:
        raise RecipeError(
            f"{source}: hidden_act must be one of {', '.join(_ACTIVATIONS)}, but is {values['hidden_act']!r}"
        )
    if min(*found.image, *found.patch) < 1 or min(found.grid) < 1:
        raise RecipeError(
            f"{source}: image_size must hold at least one patch, but is {found.image} for patches of {found.patch}"
        )
    width, heads = values.get("hidden_size"), values.get("num_attention_heads")
    if width is not None and "head_dim" in values and values["head_dim"] * heads != width:
        raise RecipeError(
            f"{source}: head_dim must be hidden_size / num_attention_heads = {width / heads:g}, but is "
            f"{values['head_dim']}"
        )
    if values.get("use_absolute_embeddings"):
        raise RecipeError(f"{source}: use_absolute_embeddings must be false, but is true; timm's Swin has no positions")


def why_not_windows(found: Structure, image: tuple[int, int]) -> str | None:
    """Return why timm and transformers would compute something else with images of this size; None if they agree.

    transformers pads a grid before it shifts windows, timm after; where one side is no larger than a window,
    transformers shifts neither.
    """
    size = found.values["window_size"]
    rows, columns = image[0] // found.patch[0], image[1] // found.patch[1]
    for stage in range(len(found.values["depths"])):
        if stage:
            rows, columns = -(-rows // 2), -(-columns // 2)
        if rows % size or columns % size or (min(rows, columns) <= size and rows != columns):
            return (
                f"grids of all stages must be whole windows of {size} x {size}, and square where they are one window, "
                f"but stage {stage} has {rows} x {columns} patches for images of {image[0]} x {image[1]}"
            )
    return None


def build(
    found: Structure, named: Mapping[str, Any], *, image: tuple[int, int], classes: int, channels: int, source: str
) -> nn.Module:
    """Build the timm model, with unset weights.

    Args:
        found: the structure.
        named: the weights under timm's names; which heads there are tells classes of transformers apart.
        image: height and width.
        classes: K; 0 for none.
        channels: of an image.
        source: the file, for messages.

    Raises:
        RecipeError: if timm cannot build it.
    """
    make = {"swin": _swin, "beit": _beit}.get(found.family, _plain)
    try:
        kind, arguments = make(found, named)
        model: nn.Module = kind(img_size=image, in_chans=channels, num_classes=classes, **arguments)
    except Exception as problem:  # timm checks by assertions and by what its layers raise
        if isinstance(problem, RecipeError):
            raise
        raise RecipeError(f"{source}: timm must build a {found.model_type} model, but {reason(problem)}") from None
    _set_rates_(model, found)
    return model


def _plain(found: Structure, named: Mapping[str, Any]) -> tuple[Callable[..., nn.Module], dict[str, Any]]:
    values, kind = found.values, found.family
    width = values["hidden_size"]
    hidden = int(width * values["mlp_ratio"]) if "mlp_ratio" in values else values["intermediate_size"]
    packed = bool(values.get("use_swiglu_ffn"))
    if packed:
        hidden = 2 * ((int(hidden * 2 / 3) + 7) // 8 * 8)
    made: Callable[..., nn.Module] = VisionTransformer
    arguments: dict[str, Any] = {
        "patch_size": found.patch[0] if found.patch[0] == found.patch[1] else found.patch,
        "embed_dim": width,
        "depth": values["num_hidden_layers"],
        "num_heads": values["num_attention_heads"],
        "mlp_ratio": _ratio(hidden, width),
        "qkv_bias": bool(values["qkv_bias"]),
        "norm_layer": functools.partial(LayerNorm, eps=float(values["layer_norm_eps"])),
        "act_layer": _ACTIVATIONS[values["hidden_act"]],
        "attn_drop_rate": float(values.get("attention_dropout", values["attention_probs_dropout_prob"])),
        "proj_drop_rate": float(values["hidden_dropout_prob"]),
        "pos_drop_rate": float(values["hidden_dropout_prob"]),
        "weight_init": "skip",
    }
    if kind == "deit" and "head_dist.weight" in named:
        made = VisionTransformerDistilled
    elif kind == "deit":
        arguments["reg_tokens"] = 1  # the distillation token, which no head reads
    elif kind.startswith("dinov2"):
        arguments |= {"init_values": 1.0}
        if packed:
            arguments |= {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
        if "num_register_tokens" in values:
            arguments |= {"reg_tokens": values["num_register_tokens"], "no_embed_class": True}
        if "head.weight" in named:
            made = ClassAndMeanVisionTransformer
    elif kind == "clip":
        arguments["pre_norm"] = True
        if "head.bias" in named:  # a classifier, which reads the patches' mean; the projection has no bias
            arguments |= {"global_pool": "avg", "final_norm": False}
    elif kind == "siglip":
        arguments["class_token"] = False
        pool = "map" if "head.weight" not in named and "attn_pool.latent" in named else "avg"
        arguments |= {"global_pool": pool, "fc_norm": False}
    return made, arguments


def _beit(found: Structure, named: Mapping[str, Any]) -> tuple[Callable[..., nn.Module], dict[str, Any]]:
    values = found.values
    scale = float(values["layer_scale_init_value"])
    return Beit, {
        "patch_size": found.patch[0] if found.patch[0] == found.patch[1] else found.patch,
        "global_pool": "avg" if values["use_mean_pooling"] else "token",
        "embed_dim": values["hidden_size"],
        "depth": values["num_hidden_layers"],
        "num_heads": values["num_attention_heads"],
        "mlp_ratio": _ratio(values["intermediate_size"], values["hidden_size"]),
        "norm_layer": functools.partial(LayerNorm, eps=float(values["layer_norm_eps"])),
        "init_values": scale if scale > 0 else None,
        "use_abs_pos_emb": bool(values["use_absolute_position_embeddings"]),
        "use_rel_pos_bias": bool(values["use_relative_position_bias"]),
        "use_shared_rel_pos_bias": bool(values["use_shared_relative_position_bias"]),
        "attn_drop_rate": float(values["attention_probs_dropout_prob"]),
        "proj_drop_rate": float(values["hidden_dropout_prob"]),
        "pos_drop_rate": float(values["hidden_dropout_prob"]),
        "drop_path_rate": float(values["drop_path_rate"]),
    }


def _swin(found: Structure, named: Mapping[str, Any]) -> tuple[Callable[..., nn.Module], dict[str, Any]]:
    values = found.values
    return SwinTransformer, {
        "patch_size": found.patch[0] if found.patch[0] == found.patch[1] else found.patch,
        "embed_dim": values["embed_dim"],
        "depths": tuple(values["depths"]),
        "num_heads": tuple(values["num_heads"]),
        "window_size": values["window_size"],
        "mlp_ratio": float(values["mlp_ratio"]),
        "qkv_bias": bool(values["qkv_bias"]),
        "attn_drop_rate": float(values["attention_probs_dropout_prob"]),
        "proj_drop_rate": float(values["hidden_dropout_prob"]),
        "drop_path_rate": float(values["drop_path_rate"]),
        "norm_layer": functools.partial(LayerNorm, eps=1e-5),
        "weight_init": "",
    }


def _set_rates_(model: Any, found: Structure) -> None:
    """Set what timm's constructors cannot say: dropout rates and activations, and the eps of Swin's blocks."""
    values = found.values
    swin = found.family == "swin"
    for block in [block for layer in model.layers for block in layer.blocks] if swin else model.blocks:
        if isinstance(getattr(block.mlp, "drop1", None), nn.Dropout):
            block.mlp.drop1 = nn.Dropout(0.0)  # transformers drops outputs of the MLP, not its neurons
        if swin or found.family == "beit":
            block.mlp.act = _ACTIVATIONS[values["hidden_act"]]()
        if swin:
            block.norm1.eps = block.norm2.eps = float(values["layer_norm_eps"])
        elif found.family.startswith("dinov2") and values["drop_path_rate"]:
            rate = float(values["drop_path_rate"])  # the same in all blocks
            block.drop_path1, block.drop_path2 = DropPath(rate), DropPath(rate)
    if swin:
        model.norm.eps = float(values["layer_norm_eps"])


def _ratio(hidden: int, width: int) -> float:
    """Return a ratio of which timm makes H: ``int(D * ratio)``."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def _pair(size: Any) -> tuple[int, int]:
    rows, columns = (size, size) if isinstance(size, int) else size
    return int(rows), int(columns)
