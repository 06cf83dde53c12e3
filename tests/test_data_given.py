"""Data in memory: labels, pictures of every kind, and datasets that draw random numbers."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms import v2

from vitrim.data import Augment, Images, Input, eval_loader, images_of, train_loader
from vitrim.data.labels import label_of, labels_array
from vitrim.data.pictures import as_picture
from vitrim.words.errors import DataError

SMALL = Input(size=(8, 8), crop_pct=1.0)
NONE = Augment(kind="none")


class Pairs(Dataset):
    def __init__(self, *items) -> None:
        self.items = items

    def __getitem__(self, index: int):
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)


# Labels.


@pytest.mark.parametrize(
    ("value", "label"),
    [(3, 3), (3.0, 3), (-1, -1), (None, -1), (True, 1), (np.int8(2), 2), (np.array([4]), 4), (torch.tensor(5), 5),
     (torch.tensor([6.0]), 6), ([7], 7)],
)  # fmt: skip
def test_whole_numbers_are_labels(value, label):
    assert label_of(value) == label
    assert labels_array([value, 0], "x").tolist() == [label, 0]


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (0.9, "but 0.9 came; vitrim trains on classes"),
        (float("nan"), "but nan came"),
        (float("inf"), "but inf came"),
        (-100, r"but -100 came; -1 means no label; .* PyTorch marks -100"),
        ("cat", "but 'cat' came; give each name a number"),
        ([0, 0, 1], r"a one-hot vector of 3 came; give its index \(2\)"),
        (torch.tensor([1.0, 0, 1]), "a multi-hot vector of 3 came; images of several classes"),
        (np.array([0.2, 0.8]), "a vector of 2 numbers"),
        (["a", "b"], "a list of 2"),
        ([], "an empty list"),
        ([[1], [2, 3]], "a list of 2"),
        ({}, "a dict came"),
        (2**40, "but 1099511627776 came"),
        (1 + 2j, "a complex came"),
    ],
)
def test_other_labels_are_one_sentence(value, told):
    with pytest.raises(DataError, match=told) as caught:
        label_of(value, "data")
    assert "\n" not in str(caught.value)
    picture = Image.new("RGB", (8, 8))
    with pytest.raises(DataError, match=told):
        images_of(Pairs((picture, value), (picture, 0)))
    with pytest.raises(DataError, match=told):
        list(eval_loader(Pairs((picture, value)), SMALL))
    with pytest.raises(DataError, match=told):
        images_of([(torch.zeros(2, 3, 8, 8), [value, 0])])


def test_labels_of_loaders_and_targets():
    assert images_of([(torch.zeros(2, 3, 8, 8), torch.tensor([1, -1]))]).labels.tolist() == [1, -1]
    with pytest.raises(DataError, match="one label per image, but gave 3 for 2"):
        images_of([(torch.zeros(2, 3, 8, 8), [1, 2, 3])])
    with pytest.raises(DataError, match="but -100 came"):
        labels_array(np.array([0, -100]), "x")
    with pytest.raises(DataError, match="but -7 came"):
        Images(lambda index: None, [0, -7], classes=2)
    dataset = Pairs((Image.new("RGB", (8, 8)), 1))
    dataset.targets, dataset.classes = torch.tensor([1]), ["cat", "dog"]
    images = images_of(dataset)
    assert (images.classes, images.names) == (2, ("cat", "dog"))


# Pictures.


def values(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize(
    "given",
    [
        values(12, 10, 3),
        torch.from_numpy(values(12, 10, 3).transpose(2, 0, 1).copy()),
        values(12, 10, 3).transpose(2, 0, 1),
        np.dstack([values(12, 10, 3), np.full((12, 10), 9, np.uint8)]),
    ],
    ids=["height-width-channels", "tensor", "channels-height-width", "alpha"],
)
def test_bytes_are_images(given):
    wanted = Image.fromarray(values(12, 10, 3))
    assert as_picture(given).convert("RGB").tobytes() == wanted.tobytes()
    ((tensor, _),) = eval_loader(Pairs((given, 0)), SMALL)
    ((expected, _),) = eval_loader(Pairs((wanted, 0)), SMALL)
    assert torch.equal(tensor, expected)
    ((trained, _),) = train_loader(Pairs((given, 0)), SMALL, NONE, batch=1, seed=0).epoch(0)
    assert torch.equal(trained, expected)
    full = Augment(kind="full", auto="")
    assert [x.dtype for x, _ in train_loader(Pairs((given, 0)), SMALL, full, batch=1, seed=0).epoch(0)] == [
        torch.float32
    ]


def test_grey_arrays_are_images():
    grey = values(12, 10)
    for given in (grey, grey[..., None], grey[None], torch.from_numpy(grey)):
        assert as_picture(given).convert("RGB").getpixel((3, 2)) == (grey[2, 3],) * 3
    deep = (grey.astype(np.uint16)) * 257
    assert np.array_equal(np.asarray(as_picture(deep))[..., 0], grey)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float32])
def test_floating_tensors_are_ready(dtype):
    given = torch.linspace(-1, 1, 192).view(3, 8, 8).to(dtype)
    forms = [given] if dtype == torch.bfloat16 else [given, given.numpy()]
    for form in forms:
        ((tensor, _),) = eval_loader(Pairs((form, 0)), SMALL)
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor[0], given.float())
        ((trained, _),) = train_loader(Pairs((form, 0)), SMALL, NONE, batch=1, seed=0).epoch(0)
        assert torch.equal(trained, tensor)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (np.zeros((8, 8, 3)), r"must be \(3, 8, 8\) for this input, but is \(8, 8, 3\)"),
        (np.zeros((8, 8)), r"\(channels, height, width\), but is \(8, 8\)"),
        (np.zeros((8, 8, 3), np.int64), r"uint8 or floating values, .* but is int64"),
        (torch.zeros(3, 8, 8, dtype=torch.bool), "but is bool"),
        (np.zeros((8, 8, 7), np.uint8), r"of 1, 3 or 4 channels, but is \(8, 8, 7\)"),
        (np.zeros((2, 3, 8, 8), np.uint8), "of 1, 3 or 4 channels"),
        (np.zeros((0, 8, 3), np.uint8), "at least one pixel"),
        (np.zeros((8, 8, 3), np.uint16), "gray of uint16, but is uint16"),
        ("cat.png", "must be a PIL image, an array or a tensor, but is a str"),
        (Image.new("F", (8, 8)), "mode 'F' has no agreed range"),
    ],
)
def test_other_pictures_are_one_sentence(given, told):
    for load in (
        lambda: list(eval_loader(Pairs((given, 0)), SMALL)),
        lambda: list(train_loader(Pairs((given, 0)), SMALL, NONE, batch=1, seed=0).epoch(0)),
    ):
        with pytest.raises(DataError, match=told) as caught:
            load()
        assert "\n" not in str(caught.value)


def test_items_that_are_no_pairs_are_one_sentence():
    for item in ({"image": 1, "label": 0}, (1, 2, 3), 5):
        with pytest.raises(DataError, match=r"must give \(image, label\) for each index, but gave a"):
            images_of(Pairs(item))
        with pytest.raises(DataError, match=r"must give \(image, label\) for each index, but gave a"):
            list(eval_loader(Pairs(item), SMALL))


def test_loaders_of_arrays_are_read():
    images = images_of([(values(2, 12, 10, 3), [0, 1])])
    assert len(next(iter(eval_loader(images, SMALL)))[0]) == 2
    images = images_of(DataLoader(TensorDataset(torch.from_numpy(values(4, 3, 8, 8)), torch.arange(4)), batch_size=2))
    assert next(iter(eval_loader(images, SMALL)))[0].dtype == torch.float32


# Datasets that draw.


class Draws(Dataset):
    """Each picture is of one value, drawn when it is read."""

    def __init__(self, draw, count: int = 8) -> None:
        self.draw, self.count = draw, count

    def __getitem__(self, index: int):
        return torch.full((3, 8, 8), float(self.draw()) + 10 * index), index % 2

    def __len__(self) -> int:
        return self.count


DRAWS = {
    "torch": lambda: torch.rand(()),
    "numpy": lambda: np.random.random(),
    "python": random.random,
    "rarely": lambda: float(torch.rand(()) < 0.01),
}


def shown(loader, epoch: int) -> dict[int, float]:
    """The value of each picture in an epoch, without its number."""
    found = {}
    for pictures, _ in loader.epoch(epoch):
        for value in pictures[:, 0, 0, 0].tolist():
            found[int(value // 10)] = value % 10
    return found


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("kind", ["torch", "numpy", "python"])
def test_what_a_dataset_draws_is_drawn_anew_each_epoch(kind, wrapped):
    dataset = Draws(DRAWS[kind])
    dataset = images_of(dataset, 2) if wrapped else dataset
    loader = train_loader(dataset, SMALL, NONE, batch=4, seed=1)
    one, two = shown(loader, 0), shown(loader, 1)
    assert one.keys() == two.keys() == set(range(8))
    assert all(one[n] != two[n] for n in one)
    assert len(set(one.values())) == 8
    # A function of seed, epoch and picture: asked again, resumed, or by another seed.
    assert shown(train_loader(dataset, SMALL, NONE, batch=4, seed=1), 1) == two
    assert shown(train_loader(dataset, SMALL, NONE, batch=4, seed=2), 1) != two


def test_what_is_rarely_drawn_is_not_cached():
    dataset = Draws(DRAWS["rarely"], count=8)
    loader = train_loader(dataset, SMALL, NONE, batch=8, seed=1)
    shown(loader, 0)
    assert loader._cache is None


@pytest.mark.parametrize("bound", [1.0, 0.0])
def test_workers_and_processes_draw_what_one_process_draws(bound, monkeypatch):
    monkeypatch.setattr("vitrim.data.loader.CACHE", bound)
    dataset = Draws(DRAWS["torch"])
    alone = train_loader(dataset, SMALL, NONE, batch=8, seed=1)
    helped = train_loader(dataset, SMALL, NONE, batch=8, seed=1, workers=2)
    for epoch in range(2):
        wanted = shown(alone, epoch)
        assert shown(helped, epoch) == wanted
        ranks = [train_loader(dataset, SMALL, NONE, batch=8, seed=1, rank=rank, world=2) for rank in range(2)]
        assert shown(ranks[0], epoch) | shown(ranks[1], epoch) == wanted


def test_a_generator_of_its_own_is_not_cached():
    own = np.random.default_rng(0)
    loader = train_loader(Draws(own.random), SMALL, NONE, batch=4, seed=1)
    assert shown(loader, 0) != shown(loader, 1)


def test_what_draws_nothing_is_read_once():
    reads = []
    dataset = Draws(lambda: reads.append(1) or 0.5)
    loader = train_loader(dataset, SMALL, NONE, batch=4, seed=1)
    for epoch in range(5):
        shown(loader, epoch)
    assert loader._cache is not None
    assert (
        len(reads) <= 8 + 8 + 8
    )  # to see whether they differ, to keep them, and to see whether they still are the same


def test_measuring_draws_the_same_each_time():
    dataset = Draws(DRAWS["torch"])
    state = torch.get_rng_state()
    one, two = (torch.cat([x for x, _ in eval_loader(dataset, SMALL, batch=3)]) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(state, torch.get_rng_state())


def test_transforms_of_torchvision_are_drawn_anew():
    flip = v2.RandomHorizontalFlip()
    picture = Image.fromarray(values(8, 8, 3))

    class Flipped(Dataset):
        def __getitem__(self, index: int):
            return flip(picture), index % 2

        def __len__(self) -> int:
            return 16

    loader = train_loader(Flipped(), SMALL, NONE, batch=16, seed=0)
    epochs = [next(iter(loader.epoch(epoch)))[0] for epoch in range(3)]
    assert all(len({x.numpy().tobytes() for x in epoch}) == 2 for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
