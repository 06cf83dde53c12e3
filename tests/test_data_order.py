"""The model is asked which order of class folders it was trained with."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vitrim.data import Input, ask_model, open_source
from vitrim.data.names import sort_classes
from vitrim.data.order import Fit, fit_of
from vitrim.words.errors import DataError

SMALL = Input(size=(8, 8), crop_pct=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)


def grey_folders(root: Path, names: list[str], each: int = 16) -> str:
    """Class folders of one grey each, the same for a name wherever it stands."""
    for place, name in enumerate(sorted(names)):
        (root / name).mkdir(parents=True)
        for number in range(each):
            Image.new("RGB", (8, 8), (4 * place + 2,) * 3).save(root / name / f"{number}.png")
    return str(root)


class Knows(nn.Module):
    """Gives each grey the number that its class has in an order; right on some of the images only."""

    def __init__(self, names: list[str], order: str, right: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        numbers = {name: number for number, name in enumerate(sort_classes(names, order))}
        self.numbers = torch.tensor([numbers[name] for name in sorted(names)])
        self.right, self.draw = right, torch.Generator().manual_seed(seed)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        places = ((x.mean((1, 2, 3)) * 255 - 2) / 4).round().long()
        answers = self.numbers[places]
        other = torch.randint(len(self.numbers), answers.shape, generator=self.draw)
        answers = torch.where(torch.rand(answers.shape, generator=self.draw) < self.right, answers, other)
        return nn.functional.one_hot(answers, len(self.numbers)) * self.scale


class Constant(nn.Module):
    """Says one class, whatever it sees."""

    def __init__(self, classes: int, answer: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(nn.functional.one_hot(torch.tensor(answer), classes).float())

    def forward(self, x):
        return self.bias.expand(len(x), -1)


FEW = "10 9 1 2".split()
NAMES = "apple Zebra bird Cat".split()
MANY = [str(n) for n in range(40)]


def asked(source: str, model: nn.Module, classes: int, told: list[str] | None = None):
    ask = ask_model(model, SMALL, classes=classes, say=(told if told is not None else []).append)
    return open_source(source, ask=ask)


@pytest.mark.parametrize("order", ["plain", "natural"])
@pytest.mark.parametrize(("names", "right"), [(FEW, 1.0), (NAMES, 0.8), (MANY, 1.0), (MANY, 0.3)])
def test_the_order_of_training_is_found(tmp_path, names, right, order):
    source = grey_folders(tmp_path, names)
    told: list[str] = []
    model = Knows(names, order, right).train()
    images = asked(source, model, len(names), told)
    assert (images.order, images.names) == (order, tuple(sort_classes(names, order)))
    assert model.training
    assert f"classes are numbered in {order} order, according to the model" in told[0]


@pytest.mark.parametrize("names", [FEW, MANY])
def test_a_model_that_does_not_know_is_refused(tmp_path, names):
    source = grey_folders(tmp_path, names)
    strangers = [Constant(len(names), answer) for answer in range(len(names))] + [Knows(names, "plain", 0.0, 3)]
    for model in strangers:
        with pytest.raises(DataError) as caught:
            asked(source, model, len(names))
        text = str(caught.value)
        for word in ("predictions of the model", "plain order", "natural order", "data.class_order", "data.class_map"):
            assert word in text
    with pytest.raises(DataError, match="the model has 1 outputs for"):
        asked(source, Constant(1, 0), 1)


def test_nothing_is_asked_where_both_orders_agree(tmp_path):
    source = grey_folders(tmp_path, ["ape", "bee", "cat"], each=1)
    assert asked(source, None, 3).order == "plain"


def test_images_are_drawn_evenly_and_their_number_is_bounded(tmp_path):
    source = grey_folders(tmp_path, MANY, each=20)
    given = {order: open_source(source, class_order=order) for order in ("plain", "natural")}
    fit = fit_of(Knows(MANY, "natural"), given, SMALL)
    assert fit.count <= 256
    assert fit.right == {"plain": 0.0, "natural": 1.0}
    # By hand: 36 of 40 classes have two numbers, and each votes.
    assert fit.chance == pytest.approx(2.0 ** (1 - int((given["plain"].labels != given["natural"].labels).sum() / 20)))


def test_classes_count_and_not_their_images():
    """One class of many images that falls on its number by chance is one vote."""
    plain = np.repeat(np.arange(12), 20)
    natural = (plain + 1) % 12
    lucky = np.where(plain < 2, plain, 99)
    assert Fit(lucky, {"plain": plain, "natural": natural}).better is None
    assert Fit(plain, {"plain": plain, "natural": natural}).better == "plain"
    few = np.repeat(np.arange(3), 20)
    third = np.where(few == 0, few, 99)
    assert Fit(third, {"plain": few, "natural": (few + 1) % 3}).chance < 0.001
    assert Fit(third, {"plain": few, "natural": (few + 1) % 3}).better is None, "less than half are right"
