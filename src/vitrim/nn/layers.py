"""Norms and activations by the names that a spec uses.

A name consists of the library and the class: ``timm.LayerNorm``, ``torch.GELU``. The supported layers are norms over
the last dimension and elementwise activations.
"""

import copy
import functools
from typing import Any

import timm.layers
import torch
from torch import Tensor, nn

from vitrim.words.errors import AdoptError, SpecError
from vitrim.words.plain import did_you_mean
from vitrim.words.spec import Norm

__all__ = ["activation_name", "input_channels", "make_activation", "make_norm", "norm_of", "norm_over"]

_NORMS = frozenset(
    {
        "timm.LayerNorm",
        "timm.LayerNormFp32",
        "timm.RmsNorm",
        "timm.RmsNormFp32",
        "timm.SimpleNorm",
        "timm.SimpleNormFp32",
        "torch.LayerNorm",
        "torch.RMSNorm",
    }
)
_ACTIVATIONS = frozenset(
    {
        "timm.GELU",
        "timm.GELUTanh",
        "timm.QuickGELU",
        "timm.Mish",
        "timm.Swish",
        "torch.ELU",
        "torch.GELU",
        "torch.Hardswish",
        "torch.LeakyReLU",
        "torch.Mish",
        "torch.ReLU",
        "torch.ReLU6",
        "torch.SELU",
        "torch.Sigmoid",
        "torch.SiLU",
        "torch.Softplus",
        "torch.Tanh",
    }
)


def _name(module: nn.Module) -> str:
    kind = type(module)
    library = "timm" if kind.__module__.startswith("timm.") else "torch"
    return f"{library}.{kind.__name__}"


def _class(name: str, known: frozenset[str]) -> Any:
    if name not in known:
        raise SpecError(f"a layer must be one that vitrim supports, but got '{name}'{did_you_mean(name, known)}")
    library, _, kind = name.partition(".")
    found = getattr(timm.layers if library == "timm" else nn, kind, None)
    if found is None:
        raise SpecError(f"layer '{name}' must exist in the installed {library}, but it does not; install a newer one")
    return found


def norm_of(module: nn.Module, at: str) -> Norm:
    """Describe a norm layer.

    Raises:
        AdoptError: if the layer is not supported.
    """
    name = _name(module)
    if name not in _NORMS:
        raise AdoptError(f"{at}: a norm must be one of {', '.join(sorted(_NORMS))}, but got {name}")
    eps = module.eps
    return Norm(
        name=name,
        eps=float(eps) if isinstance(eps, float) else torch.finfo(torch.float32).eps,
        weight=getattr(module, "weight", None) is not None,
        bias=getattr(module, "bias", None) is not None,
    )


def make_norm(norm: Norm, width: int) -> nn.Module:
    """Build a norm over `width` channels."""
    kind = _class(norm.name, _NORMS)
    affine = "elementwise_affine" if norm.name.startswith("torch.") else "affine"
    layer = kind(width, eps=norm.eps, **{affine: norm.weight})
    if not norm.bias and getattr(layer, "bias", None) is not None:
        layer.bias = None
    return layer  # type: ignore[no-any-return]


def norm_over(norm: nn.Module, places: Tensor) -> nn.Module:
    """Return a norm like `norm`, with detached copies of its weights, over some of its channels.

    Args:
        norm: one of those that `norm_of` describes.
        places: indices of the channels, ``(K,)``.
    """
    small: Any = copy.copy(norm)
    small.normalized_shape = (len(places),)
    small._parameters = {
        name: None if value is None else nn.Parameter(value.detach()[places.to(value.device)])
        for name, value in norm._parameters.items()
    }
    return small  # type: ignore[no-any-return]


def activation_name(module: nn.Module, at: str) -> str:
    """Return the name of an activation.

    Raises:
        AdoptError: if the activation is not supported, or was built with arguments other than the defaults.
    """
    if isinstance(module, nn.GELU) and module.approximate == "tanh" and _name(module) == "torch.GELU":
        return "timm.GELUTanh"
    name = _name(module)
    if name not in _ACTIVATIONS:
        raise AdoptError(f"{at}: an activation must be one of {', '.join(sorted(_ACTIVATIONS))}, but got {name}")
    mine = vars(module)
    for key, value in _defaults(name):
        if mine.get(key) != value:
            raise AdoptError(f"{at}: {name} must have its default {key} = {value}, but has {mine.get(key)}")
    return name


@functools.cache
def _defaults(name: str) -> tuple[tuple[str, Any], ...]:
    """Return the attributes of an activation that is built without arguments."""
    plain = vars(_class(name, _ACTIVATIONS)())
    return tuple(
        (key, value) for key, value in plain.items() if not key.startswith("_") and key not in ("training", "inplace")
    )


def make_activation(name: str) -> nn.Module:
    """Build an activation; it never works in place because hooks may observe its input."""
    layer: nn.Module = _class(name, _ACTIVATIONS)()
    return layer


def input_channels(model: nn.Module) -> int:
    """Return the image channels of `model`: those of its patch embedding, else of its first convolution, else 3.

    timm's patch embedding has ``in_chans`` only since 1.0.31. The projection in the patch embedding of a hybrid model
    is not used because its input are features.
    """
    said = getattr(getattr(model, "patch_embed", None), "in_chans", None)
    if isinstance(said, int):
        return said
    return next((layer.in_channels for layer in model.modules() if isinstance(layer, nn.Conv2d)), 3)
