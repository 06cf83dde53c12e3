"""Convert labels to whole numbers: from 0, or -1 if an image has no label.

P is the number of images.
"""

import numbers
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitrim.words.errors import DataError

__all__ = ["label_of", "labels_array"]

_MOST = 2**31


def labels_array(values: Iterable[Any], source: str) -> NDArray[np.int64]:
    """Return the labels of a whole source, `(P,)`.

    Args:
        values: one label per image, see `label_of`.
        source: name for the error message.

    Raises:
        DataError: a label is not a whole number.
    """
    array = np.asarray(values.cpu() if isinstance(values, Tensor) else values) if _is_quick(values) else None
    if array is not None and array.ndim == 1 and array.dtype.kind in "iub":
        found = array.astype(np.int64)
        wrong = np.flatnonzero((found < -1) | (found >= _MOST))
        if len(wrong):
            label_of(int(found[wrong[0]]), source)
        return found
    return np.asarray([label_of(value, source) for value in values], dtype=np.int64)


def _is_quick(values: Any) -> bool:
    """Whether the labels are an array of numbers, or a list of plain integers that can be converted to one."""
    if isinstance(values, list):
        return bool(values) and set(map(type, values)) == {int} and max(values) < _MOST and min(values) > -_MOST
    return isinstance(values, Tensor | np.ndarray)


def label_of(value: Any, source: str = "data") -> int:
    """Return one label as an integer.

    Args:
        value: a whole number of at least 0, of any numeric type (also a float such as 3.0, or a tensor with a single
            value); -1 or None for no label.
        source: name for the error message.

    Raises:
        DataError: the value is anything else; the message names what it appears to be.
    """
    if value is None:
        return -1
    if isinstance(value, Tensor | np.ndarray | list | tuple):
        value = _only(value, source)
    if isinstance(value, str | bytes):
        _refuse(source, repr(value), "give each name a number, or put the images into class folders")
    if not isinstance(value, numbers.Real | np.number | np.bool_):
        _refuse(source, f"a {type(value).__name__}", "give one number per image")
    if not float(value).is_integer():
        _refuse(source, f"{float(value):g}", "vitrim trains on classes; regression targets are not supported")
    whole = int(value)
    if whole < -1:
        way = "-1 means no label; leave out images that are to be ignored, which PyTorch marks -100"
        _refuse(source, str(whole), way)
    if whole >= _MOST:
        _refuse(source, str(whole), "number the classes from 0")
    return whole


def _only(value: Any, source: str) -> Any:
    """Return the number in an array that has a single value; raise otherwise."""
    array = value.detach().cpu() if isinstance(value, Tensor) else value
    try:
        flat = np.asarray(array.to(torch.float64) if isinstance(array, Tensor) else array).reshape(-1)
    except ValueError:  # lists of unlike lengths
        flat = np.asarray([str(array), ""])
    if flat.size == 1:
        return flat[0].item() if hasattr(flat[0], "item") else flat[0]
    seems = "an empty list"
    way = "give one number per image"
    if flat.size and flat.dtype.kind in "iubf":
        ones = set(np.unique(flat).tolist()) <= {0, 1}
        if ones and int(flat.sum()) == 1:
            seems, way = f"a one-hot vector of {flat.size}", f"give its index ({int(flat.argmax())}) instead"
        elif ones:
            seems, way = f"a multi-hot vector of {flat.size}", "images of several classes at once are not supported"
        else:
            seems = f"a vector of {flat.size} numbers"
    elif flat.size:
        seems = f"a list of {flat.size}"
    return _refuse(source, seems, way)


def _refuse(source: str, came: str, way: str) -> Any:
    raise DataError(f"{source}: every image must have one whole number as its label, from 0, but {came} came; {way}")
