"""Read how images are prepared from a processor's configuration of Hugging Face transformers."""

import math
from collections.abc import Mapping
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vitrim.words.errors import RecipeError

__all__ = ["assumed", "image_of", "read_input"]

_INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""Pillow's numbers of filters."""

_HALVES = (0.5, 0.5, 0.5)


def assumed(model_type: str) -> dict[str, Any]:
    """Return mean and std for a model without a processor: those that its published checkpoints use."""
    mean, std = _HALVES, _HALVES
    if model_type.startswith("clip"):
        mean, std = OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    elif model_type.startswith(("dinov2", "swin", "deit")):
        mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return {
        "mean": list(mean),
        "std": list(std),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }


def image_of(processor: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return height and width of the images that a processor makes; None if it keeps their aspect or their size."""
    crop = _sides(processor.get("crop_size"), square=True) if processor.get("do_center_crop") else None
    if crop is not None:
        return crop
    size = processor.get("size") if processor.get("do_resize", True) else None
    return None if size is None else _sides(size, square=not _by_shorter_side(processor))


def read_input(processor: Mapping[str, Any], image: tuple[int, int], source: str) -> dict[str, Any]:
    """Return the entries of timm's ``pretrained_cfg`` that prepare images as a processor does.

    Args:
        processor: ``preprocessor_config.json``.
        image: height and width that the model takes.
        source: the file, for messages.

    Raises:
        RecipeError: if the values are not numbers, or `std` is not above 0.
    """
    factor = _number(processor.get("rescale_factor", 1 / 255), source, "rescale_factor")
    scale = 255 * factor if processor.get("do_rescale", True) else 255.0
    if not scale > 0:
        raise RecipeError(f"{source}: rescale_factor must be above 0, but is {factor:g}")
    mean, std = [0.0], [1.0]
    if processor.get("do_normalize", True):
        mean = _numbers(processor.get("image_mean", _HALVES), source, "image_mean")
        std = _numbers(processor.get("image_std", _HALVES), source, "image_std")
    if len(mean) == 1 or len(std) == 1:
        mean, std = mean * (3 // len(mean)), std * (3 // len(std))
    if min(std) <= 0:
        raise RecipeError(f"{source}: image_std must be above 0, but is {std}")
    # A factor other than 1/255 is made part of mean and std: (x f - m) / s = (x / 255 - m / 255 f) / (s / 255 f).
    crop_pct, mode = _crop(processor, image)
    return {
        "mean": [value / scale if scale != 1 else value for value in mean],
        "std": [value / scale if scale != 1 else value for value in std],
        "interpolation": _INTERPOLATIONS.get(processor.get("resample", 3), "bicubic"),
        "crop_pct": crop_pct,
        "crop_mode": mode,
    }


def _crop(processor: Mapping[str, Any], image: tuple[int, int]) -> tuple[float, str]:
    """Return timm's share of the shorter side that is kept, and whether images are squashed to the size first."""
    size = processor.get("size") if processor.get("do_resize", True) else None
    cropped = bool(processor.get("do_center_crop"))
    if isinstance(size, Mapping) and "shortest_edge" in size:
        return _share(image[0], int(size["shortest_edge"])), "center"
    whole = _sides(size, square=isinstance(size, int))
    if whole is None:
        return 1.0, "center"
    if isinstance(size, int) and _by_shorter_side(processor):
        return _share(image[0], size), "center"
    return _share(image[0], whole[0]) if cropped else 1.0, "squash"


def _by_shorter_side(processor: Mapping[str, Any]) -> bool:
    """Return whether a size of one number is that of the shorter side, as for CLIP; for others it is a square."""
    kind = str(processor.get("image_processor_type") or processor.get("feature_extractor_type") or "")
    return kind.startswith(("CLIP", "Bit"))


def _share(side: int, resized: int) -> float:
    """Return a share of which timm makes the side `resized` for a crop of `side`: ``floor(side / share)``."""
    share = side / resized if resized > 0 else 1.0
    return share if math.floor(side / share) == resized else side / (resized + 1e-6)


def _sides(size: Any, *, square: bool) -> tuple[int, int] | None:
    if isinstance(size, Mapping):
        if "height" in size and "width" in size:
            return int(size["height"]), int(size["width"])
        return None
    if isinstance(size, int) and square:
        return size, size
    if isinstance(size, list | tuple) and len(size) == 2:
        return int(size[0]), int(size[1])
    return None


def _number(value: Any, source: str, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RecipeError(f"{source}: {name} must be a number, but is {value!r}")
    return float(value)


def _numbers(values: Any, source: str, name: str) -> list[float]:
    given = list(values) if isinstance(values, list | tuple) else [values]
    if len(given) not in (1, 3):
        raise RecipeError(f"{source}: {name} must be one number for each of 3 channels, but is {values!r}")
    return [_number(value, source, name) for value in given]
