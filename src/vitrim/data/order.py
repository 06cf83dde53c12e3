"""Determine from a model's predictions which numbering of the class folders it was trained with.

timm numbers class folders in natural order; torchvision, Keras and Hugging Face datasets number them in plain order. A
weights file does not record which. It can be determined from the model: on images of classes whose numbers differ, the
model predicts the number that it was trained with.

P images, K classes.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from vitrim.data.folders import Ask, numbering
from vitrim.data.images import Images
from vitrim.data.inputs import Input, eval_loader
from vitrim.words.errors import DataError

__all__ = ["LEVEL", "Fit", "ask_model", "fit_of"]

LEVEL = 0.001
"""Significance level of the two-sided test that decides between the orders."""

_IMAGES = 256
_PER_CLASS = 16
# If neither order fits better, eleven classes all favor the same order with probability 2^-10 < LEVEL; for ten classes
# it is 2^-9 > LEVEL.
_CLASSES = 11
_LEAST = 0.5


class Fit:
    """How well a model fits two numberings of the same images.

    This is an exact paired sign test. An image on which the model is correct under one numbering is wrong under the
    other. If neither numbering fits better, both cases are equally likely. Images of one class are not independent of
    each other. So if at least 11 classes have differing numbers, classes are counted: a class counts for the numbering
    under which more of its images are correct. With fewer classes, images are counted, and at least half of them must
    be correct, because a model that was not trained on these classes may still predict a different number for each.

    Attributes:
        better: `plain` or `natural`, the one that fits better, or None if the difference is not significant.
        right: fraction of the images that are correct under each, in `[0, 1]`.
        count: number of images used, P.
        chance: two-sided probability of a difference at least this large if neither fits better.
    """

    def __init__(self, answers: NDArray[np.int64], labels: Mapping[str, NDArray[np.int64]]) -> None:
        """Run the test.

        Args:
            answers: class that the model predicts for each image, `(P,)`.
            labels: labels in each order, `(P,)` each; images with equal labels do not affect the result.
        """
        plain, natural = answers == labels["plain"], answers == labels["natural"]
        self.count = len(answers)
        self.right = {"plain": float(plain.mean()), "natural": float(natural.mean())}
        lead = plain.astype(np.int64) - natural
        several = len(np.unique(labels["plain"])) >= _CLASSES
        if several:
            lead = np.sign(np.bincount(labels["plain"], weights=lead)).astype(np.int64)
        ours, theirs = int((lead > 0).sum()), int((lead < 0).sum())
        tail = sum(math.comb(ours + theirs, more) for more in range(max(ours, theirs), ours + theirs + 1))
        self.chance = min(1.0, 2 * tail / 2 ** (ours + theirs))
        better = "plain" if ours > theirs else "natural"
        enough = several or self.right[better] >= _LEAST
        self.better = better if self.chance < LEVEL and enough else None


def fit_of(model: nn.Module, given: Mapping[str, Images], input: Input, *, seed: int = 0) -> Fit:
    """Run a model on at most 256 images whose class numbers differ, drawn evenly over the classes, and test the fit.

    Args:
        model: returns logits `(B, K)`; its modes are restored.
        given: the same images with labels in `plain` and in `natural` order.
        input: what the model takes.
        seed: seed of the choice of images.
    """
    plain, natural = given["plain"].labels, given["natural"].labels
    places = _drawn(plain, np.flatnonzero(plain != natural), seed)
    flags = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    dtype = next(model.parameters()).dtype
    answers = []
    try:
        model.eval()
        with torch.inference_mode():
            for pictures, _ in eval_loader(given["plain"].pick(places), input, batch=32):
                answers.append(model(pictures.to(device, dtype)).argmax(-1).cpu())
    finally:
        for module, flag in flags:
            module.training = flag
    found = torch.cat(answers).numpy()
    return Fit(found, {"plain": plain[places], "natural": natural[places]})


def _drawn(labels: NDArray[np.int64], places: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Return some of `places`: up to 16 of each class, up to 256 in all."""
    generator = np.random.default_rng([seed, 0x0DE5])
    classes = generator.permutation(np.unique(labels[places]))
    per_class = min(_PER_CLASS, max(2, _IMAGES // len(classes)))
    taken = []
    for label in classes[: max(1, _IMAGES // per_class)]:
        mine = places[labels[places] == label]
        taken.append(generator.permutation(mine)[:per_class])
    return np.sort(np.concatenate(taken))


def ask_model(
    model: nn.Module, input: Input, *, classes: int, seed: int = 0, say: Callable[[str], None] = lambda _: None
) -> Ask:
    """Return a function that determines the order of the class folders from `model`; see `Fit` for the test.

    Args:
        model: returns logits `(B, K)`.
        input: what the model takes.
        classes: number of outputs of the model, K; with fewer than 2 the order cannot be determined.
        seed: seed of the choice of images.
        say: called with a sentence about the result.

    Raises:
        DataError: raised by the returned function: neither order fits significantly better, or the number of classes
            differs from the model's.
    """

    def ask(given: Mapping[str, Images]) -> str:
        one = given["plain"]
        ways = (
            f"plain order (torchvision, Keras, Hugging Face) gives {numbering(one)}, natural order (timm) gives "
            f"{numbering(given['natural'])}"
        )
        if classes < 2 or one.classes != classes:
            said = f"the model has {classes} outputs for {one.classes} classes"
        else:
            fit = fit_of(model, given, input, seed=seed)
            shares = (
                f"it is correct on {100 * fit.right['plain']:.1f} % of {fit.count} images in plain order and on "
                f"{100 * fit.right['natural']:.1f} % in natural order (p = {fit.chance:.1g})"
            )
            if fit.better is not None:
                say(f"{one.source}: classes are numbered in {fit.better} order, according to the model: {shares}")
                return fit.better
            said = f"the predictions of the model do not decide it: {shares}"
        raise DataError(
            f"{one.source}: the numbers of the classes must be known, but {said}; {ways}; set "
            "data.class_order=plain or natural, or a data.class_map"
        )

    return ask
