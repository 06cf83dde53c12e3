"""Convert the pictures of a dataset: PIL images, arrays, or tensors that are ready for the model.

C is the number of channels, (h, w) the height and width.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from vitrim.data.decode import to_rgb
from vitrim.data.labels import label_of
from vitrim.words.errors import DataError

__all__ = ["as_picture", "pair_of"]

_CHANNELS = (1, 3, 4)


def pair_of(item: Any) -> tuple[Any, int]:
    """Split an item of a dataset into picture and label.

    Raises:
        DataError: the item is not a pair, or the label is not a whole number.
    """
    if not isinstance(item, list | tuple) or len(item) != 2:
        raise DataError(f"a dataset must give (image, label) for each index, but gave a {type(item).__name__}; wrap it")
    return item[0], label_of(item[1])


def as_picture(given: Any) -> Image.Image | Tensor:
    """Convert a picture to an RGB or grayscale image or to a float32 tensor.

    Args:
        given: one of

            - a `PIL.Image` of any mode;
            - 8-bit values, a uint8 array or tensor `(h, w)`, `(h, w, C)` or `(C, h, w)` with 1, 3 or 4 channels: an
              image, which is later resized and normalized;
            - 16-bit gray values, a uint16 array `(h, w)`: an image, scaled to 8 bits;
            - floating-point values `(C, h, w)`, array or tensor of any precision: already resized and normalized for
              the model; converted to float32.

    Returns:
        An image, or a tensor that is ready for the model, float32 `(C, h, w)`.

    Raises:
        DataError: the picture is none of these.
    """
    if isinstance(given, Image.Image):
        return _rgb(given)
    if isinstance(given, Tensor):
        given = given.detach().cpu()
        if given.is_floating_point():
            return _ready(given.float())
        given = given.numpy()
    if isinstance(given, np.ndarray):
        if given.dtype.kind == "f":
            return _ready(torch.from_numpy(np.ascontiguousarray(given, dtype=np.float32)))
        if given.dtype == np.uint8:
            return _of_bytes(given)
        if given.dtype == np.uint16 and given.ndim == 2:
            return _rgb(Image.fromarray(given))
        raise DataError(
            f"a picture must be of uint8 or floating values, or gray of uint16, but is {given.dtype} {given.shape}; "
            "convert it"
        )
    raise DataError(
        f"a picture must be a PIL image, an array or a tensor, but is a {type(given).__name__}; convert it there"
    )


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGB", "L"):
        return image
    try:
        return to_rgb(image)
    except ValueError as problem:
        raise DataError(f"a picture must be of 8 or 16 bits, but {problem}") from None


def _ready(tensor: Tensor) -> Tensor:
    if tensor.ndim != 3:
        raise DataError(
            f"a picture of floating values must be (channels, height, width), but is {tuple(tensor.shape)}; give 8-bit "
            "values to have it resized and normalized"
        )
    return tensor


def _of_bytes(values: NDArray[np.uint8]) -> Image.Image:
    shape = values.shape
    if values.ndim == 3 and shape[2] not in _CHANNELS and shape[0] in _CHANNELS:
        values = values.transpose(1, 2, 0)
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.ndim == 2 or (values.ndim == 3 and values.shape[2] in _CHANNELS):
        if min(values.shape[:2]) < 1:
            raise DataError(f"a picture must have at least one pixel, but is {shape}")
        return _rgb(Image.fromarray(np.ascontiguousarray(values)))
    raise DataError(
        f"a picture of 8-bit values must be (height, width), (height, width, channels) or (channels, height, width) "
        f"of 1, 3 or 4 channels, but is {shape}"
    )
