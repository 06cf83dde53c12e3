"""Image size of a model, and copies of it on another device, with another type, or compiled."""

from typing import Any

import torch
from torch import nn

from vitrim.cut.optimized import optimized
from vitrim.families import is_adopted
from vitrim.nn.copying import copied
from vitrim.nn.layers import input_channels
from vitrim.nn.weights import home_of
from vitrim.words.errors import RecipeError

__all__ = ["Image", "compiled_copy", "home_of", "image_of", "moved", "running"]

Image = tuple[int, int, int]
"""Channels, height and width of one image."""


def image_of(model: nn.Module, image: Image | None = None) -> Image:
    """Return the channels, height and width of the images of `model`, or `image` if it is given.

    The size is read from the patch embedding because timm's ``pretrained_cfg`` does not change with ``set_input_size``.

    Raises:
        RecipeError: if `image` is malformed, or the patch embedding of the model has no image size.
    """
    if image is not None:
        if (
            not isinstance(image, tuple | list)
            or len(image) != 3
            or any(not _whole(size) or size < 1 for size in image)
        ):
            raise RecipeError(f"image must be (channels, height, width), each at least 1, but got {image}")
        return image
    stem: Any = getattr(model, "patch_embed", None)
    size = getattr(stem, "img_size", None)
    if size is None:
        raise RecipeError(
            f"a model must have a patch embedding with an image size, but {type(model).__name__} has none; "
            "pass image=(channels, height, width)"
        )
    return input_channels(model), int(size[0]), int(size[1])


def moved(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return `model` itself if it has this device and type, else a copy that has them."""
    if home_of(model) == (device, dtype):
        return model
    return copied(model).to(device, dtype)


def running(model: nn.Module, device: torch.device, dtype: torch.dtype, *, as_stored: bool = False) -> nn.Module:
    """`model` as it is run and timed: in the form of `vitrim.cut.optimized.optimized`, a copy.

    A model that is not adopted (timm's own, to compare with) and one in that form already run as they are, as does
    every model if `as_stored`.
    """
    if as_stored or getattr(model, "is_optimized", False) or not is_adopted(model):
        return moved(model, device, dtype)
    return optimized(model, device, dtype)


def compiled_copy(model: nn.Module) -> nn.Module:
    """Return a copy of `model` that runs with `torch.compile`."""
    twin = copied(model)
    twin.compile()
    return twin


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
