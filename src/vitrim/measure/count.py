"""Multiply-accumulates and parameters of a model: computed from its spec, and counted by PyTorch as a check."""

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
    """Return the multiply-accumulates for one image and the parameters, computed from the spec.

    Args:
        model_or_spec: a spec (takes microseconds), or a model of a supported family.

    Raises:
        AdoptError: if the model is not of a supported family.
    """
    spec = model_or_spec if isinstance(model_or_spec, Spec) else describe(model_or_spec)
    return cost_of(spec)


def counted(model: nn.Module, image: Image | None = None) -> Cost:
    """Return the multiply-accumulates and parameters that PyTorch counts in one forward pass of one image.

    Args:
        model: any model that takes images; it runs once on its own device, and keeps its training mode.
        image: channels, height and width; those of the model if None.

    Raises:
        RecipeError: if the image size is not given and the model does not have one.
        AdoptError: if PyTorch's count of operations is odd.
    """
    device, dtype = home_of(model)
    inputs = torch.zeros(1, *image_of(model, image), device=device, dtype=dtype)
    with evaluating(model):
        found = operations(lambda: model(inputs))
    if found % 2:
        raise AdoptError(
            f"PyTorch must count two operations for each multiply-accumulate, but counted {found:,}; "
            "the model runs something that is not a product"
        )
    return Cost(found // 2, sum(parameter.numel() for parameter in model.parameters()))
