"""What measurements need from a model: its input, and a way to run it and leave it as it was."""

import copy
from typing import Any

import torch
from torch import nn

from vitrim.cut.optimized import optimized
from vitrim.families import is_adopted
from vitrim.nn.layers import input_channels
from vitrim.nn.weights import home_of
from vitrim.words.errors import RecipeError

__all__ = ["Image", "compiled_copy", "home_of", "image_of", "moved", "running"]

Image = tuple[int, int, int]
"""Channels, height and width of one image."""


def image_of(model: nn.Module, image: Image | None = None) -> Image:
    """Channels, height and width of what `model` takes; `image` wins where given.

    timm's ``pretrained_cfg`` keeps the published size after ``set_input_size``; the patch embedding tells the truth.

    Raises:
        RecipeError: if `image` is malformed, or the model does not say what it takes.
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
            f"a model must have a patch embedding that knows its image size, but {type(model).__name__} has none; "
            "pass image=(channels, height, width)"
        )
    return input_channels(model), int(size[0]), int(size[1])


def moved(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """`model` itself where it is at home there, else a copy that is."""
    if home_of(model) == (device, dtype):
        return model
    return copy.deepcopy(model).to(device, dtype)


def running(model: nn.Module, device: torch.device, dtype: torch.dtype, *, as_stored: bool = False) -> nn.Module:
    """`model` as it is run and timed: in the form of `vitrim.cut.optimized.optimized`, a copy.

    A model that is not adopted (timm's own, to compare with) and one in that form already run as they are, as does
    every model if `as_stored`.
    """
    if as_stored or getattr(model, "is_optimized", False) or not is_adopted(model):
        return moved(model, device, dtype)
    return optimized(model, device, dtype)


def compiled_copy(model: nn.Module) -> nn.Module:
    """A copy that `torch.compile` runs."""
    twin = copy.deepcopy(model)
    twin.compile()
    return twin


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
