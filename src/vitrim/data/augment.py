"""Augmentation of training pictures: none, small shifts and rotations, or the full augmentation of DeiT.

B images, C channels, (h, w) height and width of the input.
"""

import math
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydantic import Field
from timm.data import create_transform
from timm.data.auto_augment import RandAugment
from torch import Tensor

from vitrim.data.inputs import Input
from vitrim.data.noise import seeded
from vitrim.data.pictures import as_picture
from vitrim.words.errors import DataError
from vitrim.words.plain import Node

__all__ = ["Augment", "Full", "move", "normalize"]


class Augment(Node):
    """Augmentation of training pictures.

    Attributes:
        kind: `none`: the evaluation transform; `light`: that, then a random shift over reflected borders, rotation and
            flip; `full`: random resized crop, RandAugment, color jitter and random erasing with DeiT's settings.
        hflip: probability of a left-right flip in `[0, 1]`; None is 0.5 for `full` and 0 for `light`, because flipping
            can change the class of a digit or letter.
        shift: largest shift of `light`, as a fraction of height and width in `[0, 0.5]`; 0.125 is usual for CIFAR.
        rotate: largest rotation of `light`, degrees in `[0, 180]`.
        scale: smallest fraction of the area that a crop of `full` keeps, in `(0, 1]`.
        auto: timm's policy string for `full`; empty for none.
        jitter: brightness, contrast and saturation factor of `full`, `>= 0`; timm ignores it if `auto` is set.
        erase: probability that `full` erases a rectangle, in `[0, 1]`.
        repeats: number of copies of each picture in an epoch, `>= 1`, each augmented differently. The length of an
            epoch does not change: with 3, it contains a third of the pictures three times. This is the repeated
            augmentation that DeiT is trained with (Hoffer et al. 2020); the copies are next to each other in the order.
    """

    kind: Literal["none", "light", "full"] = "light"
    hflip: float | None = Field(default=None, ge=0, le=1)
    shift: float = Field(default=0.0625, ge=0, le=0.5)
    rotate: float = Field(default=0.0, ge=0, le=180)
    scale: float = Field(default=0.08, gt=0, le=1)
    auto: str = "rand-m9-mstd0.5-inc1"
    jitter: float = Field(default=0.4, ge=0)
    erase: float = Field(default=0.25, ge=0, le=1)
    repeats: int = Field(default=1, ge=1, le=16)

    @property
    def flips(self) -> float:
        """Probability of a flip, with the default for None resolved."""
        if self.hflip is not None:
            return self.hflip
        return 0.5 if self.kind == "full" else 0.0


class Full:
    """timm's training transform, with random numbers that depend only on `(seed, epoch, index)`."""

    def __init__(self, augment: Augment, input: Input, seed: int) -> None:
        """Build the transform.

        Raises:
            DataError: timm rejects the policy.
        """
        self.seed = seed
        self.mode = "L" if input.channels == 1 else "RGB"
        if augment.auto and input.channels == 1:
            raise DataError("augment.auto must be empty for gray pictures, because its color steps need RGB")
        try:
            self.transform = create_transform(
                input_size=(input.channels, *input.size),
                is_training=True,
                scale=(augment.scale, 1.0),
                hflip=augment.flips,
                color_jitter=augment.jitter,
                auto_augment=augment.auto or None,
                interpolation=input.interpolation,
                mean=input.mean,
                std=input.std,
                re_prob=augment.erase,
                re_mode="pixel",
            )
        except (AssertionError, ValueError, KeyError) as problem:
            raise DataError(f"augment.auto must be a policy that timm accepts, but is '{augment.auto}'") from problem
        for step in self.transform.transforms:
            if isinstance(step, RandAugment):
                _keep_a_bit(step)

    def __call__(self, given: Any, epoch: int, index: int) -> Tensor:
        """Return the augmented picture, float32 `(C, h, w)`.

        Raises:
            DataError: the picture is a tensor, or not a picture.
        """
        picture = as_picture(given)
        if isinstance(picture, Tensor):
            raise DataError("augment.kind must be 'none' or 'light' for a dataset of tensors, but is 'full'")
        with seeded(self.seed, epoch, index):
            tensor: Tensor = self.transform(picture if picture.mode == self.mode else picture.convert(self.mode))
        return tensor


def _posterize(picture: Image.Image, bits: int, **_: Any) -> Image.Image:
    return ImageOps.posterize(picture, min(8, max(1, bits)))


def _keep_a_bit(policy: RandAugment) -> None:
    """Make posterize keep at least one bit: timm 1.0.31 passes 0 at the end of its scale, which Pillow 13 rejects."""
    for step in policy.ops:
        if step.name.startswith("Posterize"):
            step.aug_fn = _posterize


def move(pictures: Tensor, augment: Augment, draws: NDArray[np.float64]) -> Tensor:
    """Shift, flip and rotate a batch, each picture by its own random numbers.

    Because the whole batch is processed at once, an epoch of 1,347 pictures of 32x32 takes 9 ms (2 cores, idle). timm's
    evaluation transform alone, picture by picture, takes 240 ms.

    Args:
        pictures: `(B, C, h, w)`, any dtype.
        augment: largest shift and rotation, and the probability of a flip.
        draws: random numbers uniform in `[0, 1)`, `(B, 4)`: down, right, flip, rotation.

    Returns:
        The batch, with the shape and dtype of `pictures`. Shifts and flips copy values; a rotation interpolates.
    """
    height, width = pictures.shape[-2:]
    flip = draws[:, 2] < augment.flips
    down = _whole(draws[:, 0], augment.shift * height)
    right = _whole(draws[:, 1], augment.shift * width)
    rows = _reflect(np.arange(height)[None] + down[:, None], height)
    columns = _reflect(np.arange(width)[None] + right[:, None], width)
    columns = np.where(flip[:, None], columns[:, ::-1], columns)
    device = pictures.device
    batch = torch.arange(len(pictures), device=device)[:, None, None]
    y = torch.from_numpy(rows).to(device)[:, :, None]
    x = torch.from_numpy(columns).to(device)[:, None, :]
    moved = pictures.permute(0, 2, 3, 1)[batch, y, x].permute(0, 3, 1, 2)
    if augment.rotate:
        moved = _rotate(moved, (2 * draws[:, 3] - 1) * augment.rotate)
    return moved.contiguous()


def _whole(draws: NDArray[np.float64], most: float) -> NDArray[np.int64]:
    reach = round(most)
    return np.floor(draws * (2 * reach + 1)).astype(np.int64) - reach


def _reflect(places: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    if size == 1:
        return np.zeros_like(places)
    period = 2 * (size - 1)
    folded = places % period
    return np.minimum(folded, period - folded)


def _rotate(pictures: Tensor, degrees: NDArray[np.float64]) -> Tensor:
    angle = torch.from_numpy(degrees * (math.pi / 180)).to(pictures.device, torch.float32)
    # The grid runs from -1 to 1 along both sides, so pixels are not square in its units if height and width differ.
    height, width = pictures.shape[-2:]
    zero = torch.zeros_like(angle)
    first = torch.stack([angle.cos(), -angle.sin() * (height / width), zero], -1)
    second = torch.stack([angle.sin() * (width / height), angle.cos(), zero], -1)
    grid = F.affine_grid(torch.stack([first, second], 1), list(pictures.shape), align_corners=False)
    turned = F.grid_sample(pictures.float(), grid, padding_mode="reflection", align_corners=False)
    return turned.round().to(pictures.dtype) if pictures.dtype == torch.uint8 else turned.to(pictures.dtype)


def normalize(pictures: Tensor, input: Input) -> Tensor:
    """Normalize a uint8 batch for the model; return a floating-point batch unchanged.

    Args:
        pictures: `(B, C, h, w)`, uint8 or floating point.
        input: gives mean and std.

    Returns:
        `(B, C, h, w)`, bit-identical to timm's own evaluation transform for uint8.
    """
    if pictures.dtype != torch.uint8:
        return pictures
    constants: dict[str, Any] = {"device": pictures.device, "dtype": torch.float32}
    mean = torch.tensor(input.mean, **constants).view(-1, 1, 1)
    std = torch.tensor(input.std, **constants).view(-1, 1, 1)
    return pictures.float().div_(255).sub_(mean).div_(std)
