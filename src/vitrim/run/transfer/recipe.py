"""Everything that decides a transfer, as one strict TOML file."""

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from vitrim.data import Augment, SceneAugment
from vitrim.nn.segment import Head
from vitrim.run.recipe import Measure, ModelRecipe
from vitrim.train import Train
from vitrim.words.plain import Node

__all__ = ["SceneData", "SceneTest", "TransferRecipe"]

_TRAIN: dict[str, Any] = {"epochs": 20, "batch": 16, "lr": 2e-4, "weight_decay": 1e-4, "schedule": "poly"}
"""Training settings that differ from those of a classifier; Semantic FPN's custom on ADE20k."""


class SceneData(Node):
    """Which scenes.

    Attributes:
        train: source of the training scenes, see `vitrim.data.open_scenes`.
        test: source of the test scenes; None for those of `train`.
        split: part of the test source that is measured on.
        ignore: names of classes that are not learned and not counted; pixels of value 255 never are.
        size: height and width of a training crop and of what the model takes, in pixels; the model's own if None.
        mean, std: normalisation, where the model's own config is wrong.
    """

    train: str
    test: str | None = None
    split: Literal["validation", "test"] = "test"
    ignore: tuple[str, ...] = ()
    size: tuple[PositiveInt, PositiveInt] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


class SceneTest(Node):
    """How a segmentor meets test scenes; its logits are resized to the scene before the best class is taken.

    Attributes:
        mode: ``whole``: the scene at once, its shorter side that of the input and both sides rounded up to `align`; the
            model is set to that size. ``slide``: windows of the model's own size over the scene scaled to cover it,
            logits averaged where they overlap.
        align: pixels that sides are multiples of, for ``whole``.
        stride: from one window to the next, as a share of its sides in `(0, 1]`, for ``slide``.
        batch: scenes (or windows) of one pass.
        pictures: predictions that the report shows.
    """

    mode: Literal["whole", "slide"] = "whole"
    align: PositiveInt = 32
    stride: float = Field(default=2 / 3, gt=0, le=1)
    batch: PositiveInt = 8
    pictures: NonNegativeInt = 4


class TransferRecipe(Node):
    """A whole transfer.

    Attributes:
        task: says that this recipe is none of a compression.
        model: the backbone, dense or compressed.
        data: its scenes.
        head: what is put on it.
        augment: what is done to training scenes.
        train: how backbone and head are trained together; without mixup, cutmix, teacher and `train.augment`. What a
            table leaves out is 20 epochs of batch 16 at 2e-4, falling as a polynomial, with a weight decay of 1e-4.
        test: how scenes are met.
        measure: how the whole segmentor is timed.
        seed: of everything random.
        device: where to run.
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
            raise ValueError("train.augment must be left out for segmentation; scenes are augmented as `augment` says")
        return self

    def resolved(self) -> Self:
        """The same recipe; every setting is written out already."""
        return self
