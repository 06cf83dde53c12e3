"""Infer settings of a model from the shapes of its weights.

D width, P positions, p patch size in pixels.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
from timm.models import VisionTransformer
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from vitrim.nn.modes import without_data
from vitrim.words.errors import WeightsError

__all__ = ["Inferred", "infer", "near_name"]

_SIZES = ("tiny", "xsmall", "small", "little", "medium", "betwixt", "base", "large", "so400m", "huge", "giant")


@dataclass(slots=True)
class Inferred:
    """The settings that were inferred.

    Attributes:
        arguments: keyword arguments of ``timm.create_model``.
        remarks: a line on each of them.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def take(self, *remarks: str, **arguments: Any) -> None:
        """Add arguments, and remarks that explain them."""
        self.arguments |= arguments
        self.remarks += remarks


def infer(state: Mapping[str, Tensor], model: Any, given: Mapping[str, Any], source: str) -> Inferred:
    """Find the arguments with which a model gets the shapes of its weights.

    Args:
        state: shapes under timm's names, not resampled.
        model: the named model on any device; only its shapes are read.
        given: arguments that the user gave; they are not changed.
        source: the file, for messages.

    Returns:
        Arguments beyond those given; empty if the model has these shapes already.

    Raises:
        WeightsError: if the weights are of a distilled model and `model` is not one, or their positions fit neither a
            square grid nor the requested one.
    """
    found = Inferred()
    patch = _stem(state, model, given, found)
    if isinstance(model, VisionTransformer):
        _tokens(state, model, given, found, source)
        _parts(state, model, given, found)
        _image(state, model, given, found, source, patch)
    return found


def _stem(state: Mapping[str, Tensor], model: Any, given: Mapping[str, Any], found: Inferred) -> tuple[int, int] | None:
    """Infer channels and patch size from the kernel `(D, C, p, p)` of a patch embedding that is one convolution.

    Returns:
        The patch size that the model will have; None if it has another kind of stem.
    """
    embed = getattr(model, "patch_embed", None)
    kernel, mine = state.get("patch_embed.proj.weight"), getattr(getattr(embed, "proj", None), "weight", None)
    if mine is None or mine.ndim != 4 or hasattr(embed, "backbone"):
        return None
    own = (int(mine.shape[2]), int(mine.shape[3]))
    if kernel is None or kernel.ndim != 4:
        return own
    channels, rows, columns = map(int, kernel.shape[1:])
    if channels != mine.shape[1] and "in_chans" not in given:
        found.take(f"{channels} channel{'s' if channels > 1 else ''}", in_chans=channels)
    if (rows, columns) == own or "patch_size" in given:
        return own
    size = rows if rows == columns else (rows, columns)
    found.take(f"patches of {rows} x {columns} pixels", patch_size=size)
    return rows, columns


def _tokens(state: Mapping[str, Tensor], model: Any, given: Mapping[str, Any], found: Inferred, source: str) -> None:
    distilled = isinstance(model, VisionTransformerDistilled)
    if ("dist_token" in state) != distilled:
        name = _distilled_name(state, distilled)
        kind = "have no distillation token" if distilled else "have a distillation token"
        raise WeightsError(f"{source}: weights must be those of the model that is named, but they {kind}; name {name}")
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    if registers != model.num_reg_tokens and "reg_tokens" not in given:
        found.take(f"{registers} register tokens", reg_tokens=registers)


def _parts(state: Mapping[str, Tensor], model: Any, given: Mapping[str, Any], found: Inferred) -> None:
    mine = model.state_dict()
    if {"fc_norm.weight"} == {"fc_norm.weight", "norm.weight"} & set(state) and "fc_norm.weight" not in mine:
        if not {"global_pool", "fc_norm"} & set(given):
            found.take("mean pooling (fc_norm)", global_pool="avg")
    if "blocks.0.attn.qkv.weight" not in state:
        return
    scaled = "blocks.0.ls1.gamma" in state
    if scaled != ("blocks.0.ls1.gamma" in mine) and "init_values" not in given:
        found.take("layer scale (ls1.gamma)" if scaled else "no layer scale", init_values=1e-5 if scaled else None)
    biased = "blocks.0.attn.qkv.bias" in state
    if biased != ("blocks.0.attn.qkv.bias" in mine) and "qkv_bias" not in given:
        found.take(f"{'a' if biased else 'no'} bias of queries, keys and values", qkv_bias=biased)


def _image(
    state: Mapping[str, Tensor],
    model: Any,
    given: Mapping[str, Any],
    found: Inferred,
    source: str,
    patch: tuple[int, int] | None,
) -> None:
    """Infer the image size from the positions `(1, P, D)`, which may or may not include those of prefix tokens."""
    positions = state.get("pos_embed")
    embed = model.patch_embed
    size, grid = getattr(embed, "img_size", None), getattr(embed, "grid_size", None)
    if positions is None or positions.ndim != 3 or model.pos_embed is None or size is None or grid is None:
        return
    step = patch or (size[0] // grid[0], size[1] // grid[1])
    rows, columns = size[0] // step[0], size[1] // step[1]
    prefix = sum(state[name].shape[1] for name in ("cls_token", "dist_token", "reg_token") if name in state)
    apart = bool(model.no_embed_class)
    count = positions.shape[1] - (0 if apart else prefix)
    if count == rows * columns:
        if rows != columns and math.isqrt(count) ** 2 == count:
            found.take(f"{count} positions as a grid of {rows} x {columns}")
        return
    if math.isqrt(max(count, 0)) ** 2 != count:
        other = positions.shape[1] - (prefix if apart else 0)
        if math.isqrt(max(other, 0)) ** 2 != other:
            # timm assumes that the side of the grid is the square root, and may return positions of a wrong shape.
            way = f"give --image-size HEIGHTxWIDTH of these, in multiples of {step[0]}"
            raise WeightsError(f"{source}: positions must be of a square grid, but {count} are not; {way}")
        if "no_embed_class" not in given:
            found.take(
                "positions of prefix tokens" if apart else "no positions of prefix tokens", no_embed_class=not apart
            )
        count = other
    side = math.isqrt(count)
    image = (side * step[0], side * step[1])
    if "img_size" not in given and image != tuple(size):
        found.take(
            f"images of {image[0]} x {image[1]} pixels ({count} positions; --image-size resamples them)",
            img_size=image,
        )


# -- names


def near_name(name: str, state: Mapping[str, Tensor], model: nn.Module) -> str:
    """Return the way out if weights have another width or depth than the named model, for the end of a message.

    Args:
        name: a timm name.
        state: shapes under timm's names.
        model: the model called `name`.

    Returns:
        Text that starts with a semicolon; empty if width and depth are those of the model.
    """
    theirs, mine = _build(state), _build(model.state_dict())
    if 0 in theirs or theirs == mine:
        return ""
    near = next((other for other in _siblings(name) if _build(_empty(other).state_dict()) == theirs), None)
    have = f"; the weights have width {theirs[1]} and depth {theirs[0]}, {name} has {mine[1]} and {mine[0]}"
    return f"{have}: name {near}" if near else f"{have}: name another model"


def _build(state: Mapping[str, Tensor]) -> tuple[int, int]:
    """Return the number of blocks, and the width of the first."""
    found = {match[0]: name for name in state if (match := re.match(r"(layers\.\d+\.)?blocks\.\d+\.", name))}
    norm = next((value for name, value in state.items() if re.search(r"blocks\.\d+\.norm1\.weight$", name)), None)
    return len(found), 0 if norm is None else len(norm)


def _siblings(name: str) -> list[str]:
    base = name.split(".")[0]
    size = next((size for size in _SIZES if f"_{size}_" in base), None)
    names = [base.replace(f"_{size}_", f"_{other}_") for other in _SIZES if other != size] if size else []
    return [other for other in names if timm.is_model(other)]


def _distilled_name(state: Mapping[str, Tensor], distilled: bool) -> str:
    """Return the name of a DeiT of the same width, with a distillation token, or without if the named one has it."""
    for size in ("tiny", "small", "base"):
        with_token, without = f"deit_{size}_distilled_patch16_224", f"deit_{size}_patch16_224"
        if _build(_empty(without).state_dict()) == _build(state):
            return without if distilled else with_token
    return "a model without one" if distilled else "a model with one (`vitrim models '*distilled*'` lists them)"


def _empty(name: str) -> nn.Module:
    with without_data():
        model: nn.Module = timm.create_model(name)
    return model
