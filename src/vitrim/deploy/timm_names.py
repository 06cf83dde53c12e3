"""Convert weights to timm's names and a model's sizes, with timm's own functions for published weights."""

import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import timm
from timm.models import adapt_input_conv
from torch import Tensor, nn

from vitrim import families
from vitrim.families._parts import pretrained
from vitrim.words.errors import WeightsError

__all__ = ["named_for", "shown"]


def shown(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return a state dict under timm's names, without data: shapes are those in the file, nothing is resampled."""
    bare = {name: value.to("meta") for name, value in state.items()}
    for host in (_Unsized.of(bare, model), model):
        try:
            found = _filtered(bare, host, model)
            named = families.convert(model, found) if families.name_of(model) else found
        except Exception:  # timm's filters read shapes unchecked, and weights of another model can have any shape
            continue
        if any("patch_generator" in name for name in state):  # RADIO's positions are resampled for every image
            named.pop("pos_embed", None)
        elif "pos_embed" in found and "pos_embed" in named:  # a family may have resampled them already
            named["pos_embed"] = found["pos_embed"]
        return named
    return bare


def named_for(state: Mapping[str, Tensor], model: nn.Module, source: str) -> tuple[dict[str, Tensor], list[str]]:
    """Return a state dict under the names of `model`, resampled if its image, patches or windows have another size.

    Args:
        state: the state dict under the file's names.
        model: a model of the wanted sizes.
        source: the file, for messages.

    Returns:
        The state dict, and a line on each thing that was resampled.

    Raises:
        WeightsError: if timm cannot resample it.
    """
    before = shown(state, model)
    try:
        named = _filtered(state, model, model)
        if families.name_of(model):
            named = families.convert(model, named)
    except Exception:  # as above; the shapes are what is wrong
        raise WeightsError(
            f"{source}: weights must have shapes that timm can bring to those of {type(model).__name__}, but "
            f"{_positions(before)} cannot be; open them at their own image and patch size"
        ) from None
    remarks = []
    positions, patch = (before.get(name) for name in ("pos_embed", "patch_embed.proj.weight"))
    if positions is not None and "pos_embed" in named and named["pos_embed"].shape != positions.shape:
        remarks.append(
            f"resampled {positions.shape[-2]} positions to {named['pos_embed'].shape[-2]}, as timm does for another "
            "image or patch size"
        )
    channels = getattr(model, "in_chans", None)
    if patch is not None and patch.ndim == 4:
        now = named["patch_embed.proj.weight"]
        if now.shape[-2:] != patch.shape[-2:]:
            remarks.append(f"resampled patches of {_by(patch.shape[-2:])} pixels to {_by(now.shape[-2:])}")
        wanted = model.state_dict()["patch_embed.proj.weight"].shape[1] if channels is None else channels
        if now.shape[1] == 3 != wanted:
            named["patch_embed.proj.weight"] = adapt_input_conv(wanted, now)
            remarks.append(f"adapted the patch embedding from 3 channels to {wanted}, as timm does")
    tables = [
        name
        for name, value in named.items()
        if name.endswith("relative_position_bias_table") and name in state and state[name].shape != value.shape
    ]
    if tables:
        remarks.append(f"resampled {len(tables)} tables of relative positions to other windows, as timm does")
    return named, remarks


class _Unsized(SimpleNamespace):
    """A stand-in for a model, given to timm's filters: its sizes are those of the weights, so nothing is resampled."""

    @classmethod
    def of(cls, state: Mapping[str, Tensor], model: Any) -> "_Unsized":
        kernels = [value for value in state.values() if value.ndim == 4]
        own = getattr(getattr(getattr(model, "patch_embed", None), "proj", None), "weight", None)
        proj = SimpleNamespace(weight=kernels[0] if len(kernels) == 1 else own)
        return cls(
            patch_embed=SimpleNamespace(proj=proj),
            pos_embed=None,
            no_embed_class=getattr(model, "no_embed_class", False),
            num_prefix_tokens=getattr(model, "num_prefix_tokens", 1),
            head=getattr(model, "head", None),
            get_submodule=model.get_submodule,
        )


def _filtered(state: Mapping[str, Tensor], host: Any, model: nn.Module) -> dict[str, Tensor]:
    change = _filter(str(pretrained(model).get("architecture", "")))
    if change is None:
        return dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns about how timm resamples
        return dict(change(dict(state), host))


@functools.cache
def _filter(name: str) -> Callable[..., Mapping[str, Tensor]] | None:
    """Return timm's function that converts published weights for models of this name; None if there is none.

    timm passes it to its builder and does not store it, so the arguments that some names give it are repeated here.
    """
    if not timm.is_model(name):
        return None
    change = getattr(sys.modules[timm.model_entrypoint(name).__module__], "checkpoint_filter_fn", None)
    if change is None:
        return None
    options: dict[str, Any] = {}
    known = inspect.signature(change).parameters
    if "adapt_layer_scale" in known:  # timm's DeiT-III; it changes names that no other model has
        options["adapt_layer_scale"] = True
    if "interpolation" in known and ("flexi" in name or "radio" in name):
        options |= {"interpolation": "bilinear", "antialias": False}
    corners = getattr(timm.models.vision_transformer, "_RADIO_ALIGN_CORNERS", ())
    if "align_corners" in known and "radio" in name:
        options["align_corners"] = any(part in name for part in corners)
    return functools.partial(change, **options)


def _positions(state: Mapping[str, Tensor]) -> str:
    positions = state.get("pos_embed")
    return "these" if positions is None else f"{positions.shape[-2]} positions"


def _by(sides: Iterable[int]) -> str:
    return " x ".join(map(str, sides))
