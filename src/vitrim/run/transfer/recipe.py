"""The recipe of a transfer: all its settings, as one strict TOML file."""

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from vitrim.data import Augment, SceneAugment
from vitrim.nn.segment import Head
from vitrim.run.recipe import Measure, ModelRecipe
from vitrim.train import Train
from vitrim.words.plain import Node

__all__ = ["SceneData", "SceneTest", "TransferRecipe"]

_TRAIN: dict[str, Any] = {"epochs": 20, "batch": 16, "lr": 2e-4, "weight_decay": 1e-4, "schedule": "poly"}
"""Training settings that differ from those of a classifier; as usual for Semantic FPN on ADE20k."""


class SceneData(Node):
    """Which scenes to train and test on.

    Attributes:
        train: source of the training scenes, see `vitrim.data.open_scenes`.
        test: source of the test scenes; None for the test scenes of `train`.
        split: split of the test source to measure on.
        ignore: names of classes that are neither learned nor counted; pixels of value 255 never are.
        size: height and width of training crops and of the model's input, in pixels; the model's image size if None.
        mean, std: normalization, if the model's own config is wrong.
    """

    train: str
    test: str | None = None
    split: Literal["validation", "test"] = "test"
    ignore: tuple[str, ...] = ()
    size: tuple[PositiveInt, PositiveInt] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


class SceneTest(Node):
    """How a segmentation model is run on test scenes; logits are resized to the scene before the best class is taken.

    Attributes:
        mode: ``whole``: the whole scene at once. Its shorter side is scaled to that of the input, both sides are
            rounded up to `align`, and the model is set to that size. ``slide``: windows of the model's own size over
            the scaled scene; logits are averaged where windows overlap.
        align: pixels that sides are multiples of, for ``whole``.
        stride: from one window to the next, as a share of its sides in `(0, 1]`, for ``slide``.
        batch: scenes (or windows) per pass.
        pictures: number of predictions that the report shows.
    """

    mode: Literal["whole", "slide"] = "whole"
    align: PositiveInt = 32
    stride: float = Field(default=2 / 3, gt=0, le=1)
    batch: PositiveInt = 8
    pictures: NonNegativeInt = 4


class TransferRecipe(Node):
    """A whole transfer.

    Attributes:
        task: marks this recipe as a segmentation recipe, not a compression recipe.
        model: the backbone, dense or compressed.
        data: the scenes.
        head: the segmentation head.
        augment: augmentation of training scenes.
        train: how backbone and head are trained together; without mixup, cutmix, teacher and `train.augment`. What a
            table leaves out is 20 epochs of batch 16 at 2e-4, falling as a polynomial, with a weight decay of 1e-4.
        test: how the model is run on test scenes.
        measure: how the whole segmentation model is timed.
        seed: seed of all random numbers.
        device: the device to run on.
    """

    task: Literal["segmentation"] = "segmentation"
    model: ModelRecipe
    data: SceneData
    head: Head = Head()
    augment: SceneAugment = SceneAugment()
    train: Train = Train(**_TRAIN)
    test: SceneTest = SceneTest()
    measure: Measure = Measure()
    seed: NonNegativeInt = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.train.mixes:
            raise ValueError("train.mixup and train.cutmix must be 0 for segmentation, but are not; leave them out")
        if self.train.augment != Augment():
            raise ValueError(
                "train.augment must be left out for segmentation; scenes are augmented as set in `augment`"
            )
        return self

    def resolved(self) -> Self:
        """Return the same recipe, because it already contains every setting."""
        return self
