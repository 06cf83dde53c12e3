"""From picture to batch: determinism, shares, and equality with timm's own transform."""

import random
import time

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import Mixup, create_transform

from vitrim.data import Augment, Images, Input, eval_loader, open_source, seeded, split, train_loader
from vitrim.data.augment import move, normalize
from vitrim.data.inputs import to_bytes, to_tensor
from vitrim.data.loader import share
from vitrim.data.noise import numbers
from vitrim.words.errors import DataError, RecipeError
from vitrim.words.plain import dump, load

SMALL = Input(size=(8, 8), crop_pct=1.0)
NONE = Augment(kind="none")


def noise(count: int = 12, size: int = 8) -> Images:
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
    return Images(lambda index: Image.fromarray(pixels[index]), np.arange(count) % 3, classes=3, source="noise")


def batches(loader, epoch=0, start=0):
    return list(loader.epoch(epoch, start))


def same(one, two):
    assert len(one) == len(two)
    for (a, b), (c, d) in zip(one, two, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)


def test_input_is_read_from_the_model():
    model = timm.create_model("vit_tiny_patch16_224", img_size=48, patch_size=8, depth=1)
    found = Input.of(model)
    assert (found.size, found.channels, found.mean) == ((48, 48), 3, (0.5, 0.5, 0.5))
    assert (found.crop_pct, found.interpolation) == (0.9, "bicubic")
    assert Input.of(model, crop_pct=1.0, mean=(0.1, 0.2, 0.3)).mean == (0.1, 0.2, 0.3)
    grey = Input.of(timm.create_model("vit_tiny_patch16_224", in_chans=1, depth=1))
    assert (grey.channels, grey.mean) == (1, (0.5,))
    assert load(Input, dump(found)) == found


def test_input_refuses_nonsense():
    with pytest.raises(DataError, match="Input has no field 'meen'; did you mean 'mean'"):
        Input.of(timm.create_model("vit_tiny_patch16_224", depth=1), meen=1)
    with pytest.raises(RecipeError, match="std must be above 0"):
        load(Input, {"size": [8, 8], "std": [0, 1, 1]})
    with pytest.raises(RecipeError, match="one value for each of 3 channels"):
        load(Input, {"size": [8, 8], "mean": [0.5]})
    with pytest.raises(RecipeError, match="at least 1 pixel"):
        load(Input, {"size": [0, 8]})


@pytest.mark.parametrize("channels", [1, 3])
def test_bytes_and_floats_agree_with_timm_to_the_last_bit(channels):
    input = Input(size=(8, 8), channels=channels, mean=(0.4, 0.5, 0.6)[:channels], std=(0.2, 0.3, 0.4)[:channels])
    image = noise(1, 16)[0][0]
    wanted = create_transform(
        (channels, 8, 8), interpolation="bicubic", mean=input.mean, std=input.std, crop_pct=input.crop_pct
    )(image if channels == 3 else image.convert("L"))
    assert torch.equal(to_tensor(input)(image), wanted)
    assert torch.equal(normalize(to_bytes(input)(image)[None], input)[0], wanted)


def test_eval_keeps_order_and_draws_nothing():
    images = noise()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    loader = eval_loader(images, SMALL, batch=5)
    assert (len(loader), [len(labels) for _, labels in loader]) == (3, [5, 5, 2])
    same(list(loader), list(loader))
    assert torch.equal(torch.cat([labels for _, labels in loader]), torch.from_numpy(images.labels))
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(DataError, match="batch must be at least 1"):
        eval_loader(images, SMALL, batch=0)


@pytest.mark.parametrize("kind", ["none", "light", "full"])
def test_a_batch_is_a_function_of_seed_epoch_and_step(kind):
    images = noise(12, 16)
    augment = Augment(kind=kind, rotate=5)
    loader = train_loader(images, SMALL, augment, batch=4, seed=1)
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    whole = batches(loader, 2)
    assert len(whole) == len(loader) == 3
    assert whole[0][0].shape == (4, 3, 8, 8)
    assert whole[0][0].dtype == torch.float32
    same(batches(train_loader(images, SMALL, augment, batch=4, seed=1), 2, 1), whole[1:])
    assert state[0] == random.getstate()
    assert state[1] == np.random.get_state()[1].tolist()
    assert torch.equal(state[2], torch.get_rng_state())
    for other in (batches(loader, 3), batches(train_loader(images, SMALL, augment, batch=4, seed=2), 2)):
        assert not torch.equal(other[0][0], whole[0][0])


@pytest.mark.parametrize("kind", ["none", "light", "full"])
def test_repeats_show_fewer_pictures_more_often(kind):
    """An epoch keeps its length; copies stand in one batch, each moved in its own way, the first as ever."""
    images = noise(12, 16)
    far = Augment(kind=kind, rotate=90)
    once = batches(train_loader(images, SMALL, far, batch=6, seed=1))
    thrice = batches(train_loader(images, SMALL, far.model_copy(update={"repeats": 3}), batch=6, seed=1))
    assert [len(labels) for _, labels in thrice] == [6, 6]
    order = numbers(1, 0, 1).permutation(12)
    wanted = np.repeat(order[:4], 3)
    assert torch.cat([labels for _, labels in thrice]).tolist() == images.labels[wanted].tolist()
    plain, shown = (torch.cat([pictures for pictures, _ in each]) for each in (once, thrice))
    for number in range(4):
        copies = shown[3 * number : 3 * number + 3]
        assert torch.equal(copies[0], plain[number])
        assert torch.equal(copies[1], copies[2]) == (kind == "none")


@pytest.mark.parametrize("kind", ["light", "full"])
def test_workers_change_nothing(kind, monkeypatch):
    monkeypatch.setattr("vitrim.data.loader.CACHE", 0)
    images = noise(8, 16)
    augment = Augment(kind=kind, repeats=2)
    alone = train_loader(images, SMALL, augment, batch=4, seed=1)
    helped = train_loader(images, SMALL, augment, batch=4, seed=1, workers=2)
    same(batches(alone), batches(helped))


def test_the_cache_changes_nothing(monkeypatch):
    cached = batches(train_loader(noise(), SMALL, Augment(), batch=4, seed=1))
    monkeypatch.setattr("vitrim.data.loader.CACHE", 0)
    same(cached, batches(train_loader(noise(), SMALL, Augment(), batch=4, seed=1)))


@pytest.mark.parametrize(("count", "parts"), [(12, 1), (12, 2), (12, 3), (13, 2), (16, 8), (14, 4)])
def test_shares_make_the_batch(count, parts):
    batch = np.arange(100, 100 + count)
    shares = [share(batch, part, parts) for part in range(parts)]
    assert sorted(np.concatenate(shares).tolist()) == batch.tolist()
    for each in shares:
        # Mirror images stay together, which is what mixup pairs.
        assert ((each + each[::-1]) == 200 + count - 1).all()


def test_processes_and_parts_share_one_batch():
    whole = batches(train_loader(noise(), SMALL, Augment(), batch=12, seed=1))[0]
    found = []
    for rank in range(2):
        found += batches(train_loader(noise(), SMALL, Augment(), batch=12, seed=1, rank=rank, world=2, accumulate=3))
    assert len(found) == 6
    pictures = torch.cat([pictures for pictures, _ in found])
    key = lambda each: each.flatten(1).double().sum(1).sort().values  # noqa: E731
    assert torch.equal(key(pictures), key(whole[0]))


def test_mixing_shares_is_mixing_the_batch():
    mixer = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=3)
    pictures, labels = torch.randn(12, 3, 8, 8), torch.arange(12) % 3
    for key in range(6):
        with seeded(key):
            mixed, _ = mixer(pictures.clone(), labels)
        for part in range(3):
            places = torch.from_numpy(share(np.arange(12), part, 3))
            with seeded(key):
                mine, _ = mixer(pictures[places].clone(), labels[places])
            assert torch.equal(mine, mixed[places])


def test_steps_of_an_epoch():
    assert len(train_loader(noise(13), SMALL, NONE, batch=4, seed=0)) == 3
    small = train_loader(noise(3), SMALL, NONE, batch=4, seed=0)
    assert [len(labels) for _, labels in small.epoch(0)] == [3]
    assert train_loader(noise(3), SMALL, NONE, batch=4, seed=0, even=True).size == 2
    with pytest.raises(DataError, match="2 images to each of 4 processes x 2 accumulated parts, but has 12"):
        train_loader(noise(), SMALL, NONE, batch=12, seed=0, world=4, accumulate=2)
    with pytest.raises(DataError, match="batch must be at least 1"):
        train_loader(noise(), SMALL, NONE, batch=0, seed=0)


def test_moves():
    pictures = torch.arange(2 * 3 * 4 * 5, dtype=torch.uint8).view(2, 3, 4, 5)
    still = np.full((2, 4), 0.5)
    assert torch.equal(move(pictures, Augment(hflip=0, shift=0.4), still), pictures)
    flipped = move(pictures, Augment(hflip=1.0, shift=0), still)
    assert torch.equal(flipped, pictures.flip(-1))
    # One down of four rows: row r shows row r + 1, and the last reflects.
    down = move(pictures, Augment(shift=0.25), np.array([[0.99, 0.5, 0.5, 0.5]] * 2))
    assert torch.equal(down, pictures[:, :, [1, 2, 3, 2]])
    turned = move(pictures.float(), Augment(shift=0, rotate=180), np.array([[0.5, 0.5, 0.5, 1.0]] * 2))
    assert torch.allclose(turned, pictures.float().flip(-1, -2), atol=1e-3)


def test_digits_are_not_flipped_unless_asked():
    assert Augment().flips == 0
    assert Augment(kind="full").flips == 0.5
    assert Augment(kind="full", hflip=0.0).flips == 0


def test_posterize_to_nothing_does_not_stop_an_epoch():
    # timm 1.0.31 asks for zero bits at this magnitude, which Pillow 13 refuses.
    loader = train_loader(noise(8, 8), SMALL, Augment(kind="full", auto="rand-m10-n4-inc1"), batch=4, seed=0)
    for epoch in range(20):
        assert all(torch.isfinite(pictures).all() for pictures, _ in loader.epoch(epoch))


def test_tensors_pass_through():
    pictures = [(torch.full((3, 8, 8), float(n)), n % 3) for n in range(8)]
    loader = train_loader(pictures, SMALL, NONE, batch=8, seed=0)
    assert sorted(x.mean().item() for x in batches(loader)[0][0]) == list(range(8))
    with pytest.raises(DataError, match=r"must be \(3, 9, 9\)"):
        list(eval_loader(pictures, Input(size=(9, 9))))
    with pytest.raises(DataError, match="'none' or 'light' for a dataset of tensors"):
        batches(train_loader(pictures, SMALL, Augment(kind="full"), batch=4, seed=0))


def test_bad_policies_are_refused():
    with pytest.raises(DataError, match="policy that timm accepts, but is 'rond-m9'"):
        train_loader(noise(), SMALL, Augment(kind="full", auto="rond-m9"), batch=4, seed=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_picture_is_one_sentence_through_every_loader(workers):
    def read(index):
        if index == 3:
            raise DataError("x.png: every image must decode, but it does not; replace or remove this file")
        return Image.new("RGB", (8, 8))

    images = Images(read, [0] * 8, classes=1)
    for run in (
        lambda: list(eval_loader(images, SMALL, workers=workers)),
        lambda: batches(train_loader(images, SMALL, NONE, batch=4, seed=0, workers=workers)),
        lambda: batches(train_loader(images, SMALL, Augment(kind="full"), batch=4, seed=0, workers=workers)),
    ):
        with pytest.raises(DataError, match=r"^x\.png: every image must decode"):
            run()


@pytest.mark.whole
def test_an_epoch_of_digits_is_quick():
    loader = train_loader(split("digits", seed=0).train, Input(size=(32, 32)), Augment(), batch=64, seed=0)
    list(loader.epoch(0))
    # The best of several, since a busy machine may stop any single one; it takes 0.01 s on an idle one.
    best = min(clock(loader, epoch) for epoch in range(1, 6))
    assert best < 0.5


def clock(loader, epoch: int) -> float:
    start = time.process_time()
    list(loader.epoch(epoch))
    return time.process_time() - start


def test_labelled():
    digits = open_source("digits")
    assert train_loader(digits, SMALL, NONE, batch=4, seed=0).labelled
    bare = [(torch.zeros(3, 8, 8), -1)] * 4
    assert not train_loader(bare, SMALL, NONE, batch=4, seed=0).labelled
