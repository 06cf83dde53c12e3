"""Multiply-accumulates and parameters of a model: ours by arithmetic, and PyTorch's own count to hold it against."""

import torch
from torch import nn

from vitrim.families import describe
from vitrim.measure.model import Image, home_of, image_of
from vitrim.nn.counter import operations
from vitrim.nn.modes import evaluating
from vitrim.words.costs import Cost, cost_of
from vitrim.words.errors import AdoptError
from vitrim.words.spec import Spec

__all__ = ["cost", "counted"]


def cost(model_or_spec: nn.Module | Spec) -> Cost:
    """Multiply-accumulates for one image, and parameters, by arithmetic on the spec.

    Args:
        model_or_spec: a spec (microseconds), or a model of a family that vitrim knows.

    Raises:
        AdoptError: if the model is of no family that vitrim knows.
    """
    spec = model_or_spec if isinstance(model_or_spec, Spec) else describe(model_or_spec)
    return cost_of(spec)


def counted(model: nn.Module, image: Image | None = None) -> Cost:
    """Multiply-accumulates and parameters as PyTorch counts them in one forward pass of one image.

    Args:
        model: any model of images; it runs once where it is, and keeps its training mode.
        image: channels, height and width; the model's own where not given.

    Raises:
        RecipeError: if the image size is neither given nor known to the model.
        AdoptError: if PyTorch's count is no whole number of multiply-accumulates.
    """
    device, dtype = home_of(model)
    inputs = torch.zeros(1, *image_of(model, image), device=device, dtype=dtype)
    with evaluating(model):
        found = operations(lambda: model(inputs))
    if found % 2:
        raise AdoptError(
            f"PyTorch must count two operations for each multiply-accumulate, but counted {found:,}; "
            "the model runs something that is no product"
        )
    return Cost(found // 2, sum(parameter.numel() for parameter in model.parameters()))
