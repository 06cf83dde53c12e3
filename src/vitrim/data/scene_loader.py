"""Training batches of scenes. Picture and mask are scaled, cropped and flipped together; only pictures are distorted.

B images, C channels, (h, w) height and width of the input.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.transforms import v2

from vitrim.data.augment import Augment, normalize
from vitrim.data.inputs import Input
from vitrim.data.loader import TrainLoader
from vitrim.data.noise import numbers, seeded
from vitrim.data.scenes import IGNORE, Scenes
from vitrim.words.errors import DataError
from vitrim.words.plain import Node

__all__ = ["SceneAugment", "SceneLoader", "to_pixels"]

_PLACE = 5


class SceneAugment(Node):
    """Augmentation of training scenes.

    Attributes:
        ratio: smallest and largest scale, > 0, drawn uniformly; 1 scales the shorter side of a picture to the shorter
            side of the input. Then a random crop of the input's size is taken. Where the crop extends beyond the
            picture, it is filled with the mean color and labeled as ignored.
        hflip: probability of a left-right flip in `[0, 1]`.
        distort: whether brightness, contrast, saturation and hue change (torchvision's `RandomPhotometricDistort`).
    """

    ratio: tuple[float, float] = (0.5, 2.0)
    hflip: float = Field(default=0.5, ge=0, le=1)
    distort: bool = True

    @model_validator(mode="after")
    def _check(self) -> "SceneAugment":
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio must rise and be above 0, but is {self.ratio}")
        return self


def to_pixels(picture: Image.Image, input: Input, size: tuple[int, int]) -> Tensor:
    """Return a resized picture, uint8 `(C, *size)`.

    Args:
        picture: an image of any mode.
        input: gives channels and interpolation.
        size: height and width in pixels.
    """
    picture = picture.convert("L" if input.channels == 1 else "RGB")
    if (picture.height, picture.width) != size:
        picture = picture.resize((size[1], size[0]), Image.Resampling[input.interpolation.upper()])
    pixels = np.array(picture)
    return torch.from_numpy(pixels[None] if input.channels == 1 else pixels.transpose(2, 0, 1).copy())


class _Keyed(Dataset[tuple[Tensor, Tensor] | DataError]):
    """Augmented scenes indexed by `(epoch, number)`."""

    def __init__(self, scenes: Scenes, input: Input, augment: SceneAugment, seed: int) -> None:
        self.scenes, self.input, self.augment, self.seed = scenes, input, augment, seed
        self.distort: Any = v2.RandomPhotometricDistort() if augment.distort and input.channels == 3 else v2.Identity()

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor] | DataError:
        epoch, number = key
        try:
            picture, mask = self.scenes[number]
        except DataError as problem:
            return problem
        scale, down, right, flip = numbers(self.seed, epoch, number, _PLACE).random(4)
        least, most = self.augment.ratio
        size = self._size(picture, least + (most - least) * scale)
        pixels = to_pixels(picture, self.input, size)
        labels = np.array(mask.resize((size[1], size[0]), Image.Resampling.NEAREST), dtype=np.int64)
        with seeded(self.seed, epoch, number):
            pixels = self.distort(pixels)
        return self._cut(normalize(pixels[None], self.input)[0], torch.from_numpy(labels), (down, right), flip)

    def _size(self, picture: Image.Image, ratio: float) -> tuple[int, int]:
        factor = ratio * min(self.input.size) / min(picture.size)
        return max(1, round(picture.height * factor)), max(1, round(picture.width * factor))

    def _cut(self, pixels: Tensor, labels: Tensor, draws: tuple[float, float], flip: float) -> tuple[Tensor, Tensor]:
        """Return a crop of the input's size, `(C, h, w)` and `(h, w)`, with a random flip."""
        beyond = [max(0, want - have) for want, have in zip(self.input.size, labels.shape, strict=True)]
        # The pixels are normalized, so zero is the mean color.
        pixels = F.pad(pixels, (0, beyond[1], 0, beyond[0]))
        labels = F.pad(labels, (0, beyond[1], 0, beyond[0]), value=IGNORE)
        (height, width), (all_rows, all_columns) = self.input.size, labels.shape
        row, column = int(draws[0] * (all_rows - height + 1)), int(draws[1] * (all_columns - width + 1))
        pixels = pixels[:, row : row + height, column : column + width]
        labels = labels[row : row + height, column : column + width]
        if flip < self.augment.hflip:
            pixels, labels = pixels.flip(-1), labels.flip(-1)
        return pixels.contiguous(), labels.contiguous()


class SceneLoader(TrainLoader):
    """Like the loader of `vitrim.data.train_loader`, but with masks, int64 `(b, h, w)`, as labels."""

    def __init__(self, scenes: Scenes, input: Input, augment: SceneAugment, **rest: Any) -> None:
        """Build the loader.

        Args:
            scenes: training scenes.
            input: what the model takes.
            augment: augmentation of a scene.
            rest: `batch seed workers rank world accumulate even device` as for `vitrim.data.train_loader`.

        Raises:
            DataError: the batch is too small for its shares.
        """
        self.scenes, self.scene_augment = scenes, augment
        super().__init__(scenes, input, Augment(kind="none"), **rest)

    def _by_key(self) -> Dataset[Any]:
        return _Keyed(self.scenes, self.input, self.scene_augment, self.seed)

    @property
    def labelled(self) -> bool:
        """Always True: every scene has a mask."""
        return True
