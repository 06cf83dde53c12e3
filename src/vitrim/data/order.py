"""Ask a model which numbering of the class folders it was trained with.

timm numbers class folders in natural order, torchvision, Keras and Hugging Face datasets in plain order, and nothing in
a weights file says which. The model itself does: on images of classes whose numbers differ, it gives the number that it
was trained with.

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
"""Two-sided chance of an error that is allowed in telling the orders apart."""

_IMAGES = 256
_PER_CLASS = 16
# Eleven classes that all fit one order have a chance of 2^-10 < LEVEL under the other hypothesis; ten have not.
_CLASSES = 11
_LEAST = 0.5


class Fit:
    """How well a model fits two numberings of the same images.

    A paired sign test, exact: an image on which the model is right under one numbering is wrong under the other, so
    under the hypothesis that neither fits better both kinds are equally likely. Images of one class are not independent
    of one another, so classes are counted where at least 11 have differing numbers: a class votes for the numbering
    under which more of its images are right. With fewer, images are counted, and at least half of them must be right,
    for a model that knows nothing of the classes may still give each of a few a number of its own.

    Attributes:
        better: `plain` or `natural`, whichever fits better, or None if neither does significantly.
        right: share of the images that are right under each, in `[0, 1]`.
        count: images that were asked for, P.
        chance: two-sided probability of so great a difference if neither fitted better.
    """

    def __init__(self, answers: NDArray[np.int64], labels: Mapping[str, NDArray[np.int64]]) -> None:
        """Compare.

        Args:
            answers: first choice of the model, `(P,)`.
            labels: by order, `(P,)` each; where both agree, nothing can be told.
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
        knows = several or self.right[better] >= _LEAST
        self.better = better if self.chance < LEVEL and knows else None


def fit_of(model: nn.Module, given: Mapping[str, Images], input: Input, *, seed: int = 0) -> Fit:
    """Ask a model on at most 256 of the images whose numbers differ, evenly drawn over their classes.

    Args:
        model: gives logits `(B, K)`; left as it was.
        given: the same images with labels in `plain` and in `natural` order.
        input: what the model takes.
        seed: decides which images.
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
    """Some of `places`, as many of each class as it has, up to 16 and 256 in all."""
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
    """Return a function that asks `model` which order of class folders is meant; see `Fit` for the test.

    Args:
        model: gives logits `(B, K)`.
        input: what it takes.
        classes: outputs of the model, K; with less than 2 there is nothing to ask.
        seed: decides which images are looked at.
        say: is told what was found.

    Raises:
        DataError: from the function: neither order fits significantly better, or the classes are not the model's.
    """

    def ask(given: Mapping[str, Images]) -> str:
        one = given["plain"]
        ways = (
            f"plain order (torchvision, Keras, Hugging Face) makes {numbering(one)}, natural order (timm) makes "
            f"{numbering(given['natural'])}"
        )
        if classes < 2 or one.classes != classes:
            said = f"the model has {classes} outputs for {one.classes} classes"
        else:
            fit = fit_of(model, given, input, seed=seed)
            told = (
                f"it is right on {100 * fit.right['plain']:.1f} % of {fit.count} images in plain order and on "
                f"{100 * fit.right['natural']:.1f} % in natural order (p = {fit.chance:.1g})"
            )
            if fit.better is not None:
                say(f"{one.source}: classes are numbered in {fit.better} order, as the model says: {told}")
                return fit.better
            said = f"the model does not tell: {told}"
        raise DataError(
            f"{one.source}: the numbers of the classes must be known, but {said}; {ways}; give "
            "data.class_order=plain or natural, or a data.class_map"
        )

    return ask
