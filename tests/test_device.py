"""Work happens on one device and models come back on another: with a second device that needs no card.

Marked tests ask the same of a card.
"""

import contextlib

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from PIL import Image

import vitrim
from tests.second_device import CARD, SYNCS, OnCard, second_device
from vitrim import methods
from vitrim.data import Images, Input, eval_loader
from vitrim.methods.cait.masks import Channels, free_axes
from vitrim.methods.mdc.scores import Settings, score
from vitrim.nn.weights import home_of
from vitrim.train import Train, evaluate, fit

SHORT = {"epochs": 1, "batch": 8, "augment": {"kind": "none"}, "workers": 0}


def noise(count=24, size=16):
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
    return Images(lambda i: Image.fromarray(pixels[i]), np.arange(count) % 3, classes=3, source="noise", fixed=True)


def vit(depth=2):
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        embed_dim=16,
        depth=depth,
        num_heads=2,
        mlp_ratio=2,
        num_classes=3,
    ).eval()


def settings_of(name):
    """The smallest search that does all that a method does."""
    given = {
        "cait": {"train": SHORT | {"epochs": 2}, "group_attention": 2, "floor_attention": 2, "group_mlp": 8,
                 "floor_mlp": 8, "cut": 0.5, "merges": [], "refresh": 1, "warmup": 0.1, "ramp_end": 0.4},
        "vit_slim": {"train": SHORT, "token_l1": 1e-4},
        "spvit": {"train": SHORT},
        "mdc": {"train": SHORT, "trials": 2, "initial": 1, "corners": False, "batch": 8},
        "post_training": {"probe": 4, "batch": 8, "merge": "none", "candidates": 1, "swaps": 0},
    }  # fmt: skip
    return given.get(name, {})


def compressed(model, name, **more):
    budget = {"spvit": "macs=0.95", "mdc": "macs=0.8"}.get(name, "macs=0.6")
    given = {"train": SHORT, "epochs": 1, "measure": {"latency": False}, "test": noise(12)}
    if name == "cait":
        given["train"] = {"augment": {"kind": "none"}, "workers": 0}
    data = {"calibration": 8, "validation": 8}
    return vitrim.compress(
        model, noise(), method=name, budget=budget, settings=settings_of(name), recipe={"data": data}, **given | more
    )


@pytest.fixture
def card(monkeypatch):
    """A machine whose first device is `CARD`: what a recipe's ``auto`` and Accelerate select."""
    with second_device() as place:
        for module in ("machine", "job"):
            monkeypatch.setattr(
                f"vitrim.run.{module}.device_of", lambda name: place if name == "auto" else torch.device(name)
            )
        monkeypatch.setattr(Accelerator, "device", place)
        yield place


def everything(model):
    return [*model.parameters(), *model.buffers()]


@pytest.mark.parametrize("name", methods.names())
def test_a_run_gives_back_models_where_the_caller_has_his(name, card):
    model = vit()
    found = compressed(model, name)
    assert SYNCS  # the work was done there
    for each in (model, found.model, found.parent):
        assert all(type(tensor) is not OnCard and tensor.device.type == "cpu" for tensor in everything(each))
    maps = found.model.forward_intermediates(torch.randn(1, 3, 16, 16), intermediates_only=True, output_fmt="NLC")
    assert len(maps) == 2
    assert found.measured["device"] == str(CARD)
    assert found.measured["top1"] is not None


@pytest.mark.parametrize("ema", [None, 0.9])
def test_fit_trains_there_and_brings_all_back(ema, card):
    model, teacher = vit(), vit()
    kept = list(map(id, model.parameters()))
    SYNCS.clear()
    settings = Train(workers=0, epochs=1, batch=8, ema=ema, precision="fp32")
    found = fit(model, noise(), settings, input=Input.of(model), seed=0, teacher=teacher)
    alone = vit()
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.MonkeyPatch.context()).setattr(Accelerator, "device", torch.device("cpu"))
        wanted = fit(alone, noise(), settings, input=Input.of(model), seed=0, teacher=vit())
    averages = [value for state in found.averages.values() for value in state.values()]
    models = [model, teacher] + ([] if ema is None else [found.ema])
    assert all(tensor.device.type == "cpu" for tensor in averages + [t for each in models for t in everything(each)])
    assert list(map(id, model.parameters())) == kept
    for mine, other in zip(everything(found.model), everything(wanted.model), strict=True):
        assert torch.allclose(mine, other, rtol=1e-4, atol=1e-5)


def test_a_model_of_the_card_stays_there(card):
    model = vit().to(card)
    found = fit(model, noise(), Train(workers=0, epochs=1, batch=8), input=Input.of(model), seed=0)
    child = compressed(found.model, "magnitude", epochs=0).model
    assert all(tensor.device == card for each in (found.model, child) for tensor in everything(each))
    plan = vitrim.Plan.keep(vitrim.describe(vitrim.adopt(model)))
    assert home_of(vitrim.apply(vitrim.adopt(model), plan))[0] == card


def test_a_device_that_is_named_is_used(card):
    SYNCS.clear()
    found = compressed(vit(), "taylor", device="cpu")
    assert not SYNCS
    assert found.measured["device"] == "cpu"


def test_the_host_does_not_wait_for_every_step_or_batch(card):
    """What is read from the device does not grow with the number of steps and batches."""
    counts = []
    for count in (24, 48):
        model = vit()
        SYNCS.clear()
        fit(
            model,
            noise(count),
            Train(workers=0, epochs=1, batch=4, log_every=1000, clip=1.0),
            input=Input.of(model),
            seed=0,
        )
        model.to(card)
        evaluate(model, eval_loader(noise(count), Input.of(model), batch=4), reference=torch.zeros(count, 3))
        counts.append(len(SYNCS))
    assert counts[0] == counts[1]


def test_scores_of_mdc_are_read_once(card):
    """What is read from the device does not grow with the number of batches."""
    counts = []
    for count in (16, 32):
        model = vitrim.adopt(vit()).to(card)
        SYNCS.clear()
        score(model, eval_loader(noise(count), Input.of(model), batch=8), Settings())
        counts.append(len(SYNCS))
    assert counts[0] == counts[1]


def test_scores_of_cait_are_read_at_once(card):
    """One transfer for the count of steps and one for all axes; none for a step, and none for new masks."""
    model = vitrim.adopt(vit()).to(card)
    channels = Channels(model, free_axes(model, True, True)).train()
    channels(torch.rand(2, 3, 16, 16).to(card)).square().sum().backward()
    SYNCS.clear()
    channels.learn()
    assert not SYNCS
    found = channels.scores()
    assert len(SYNCS) == 2
    wanted = {path: (values > values.median()).float() for path, values in found.items()}
    channels.keep(wanted)
    assert len(SYNCS) == 2
    masks = channels.masks()
    assert all(torch.equal(masks[path], mask) for path, mask in wanted.items())


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in methods.names() if name != "spvit"])  # whose plan hangs on rounding
def test_a_run_on_a_card(name):
    model = vit()
    found = compressed(model, name)
    for each in (model, found.model, found.parent):
        assert all(tensor.device.type == "cpu" for tensor in everything(each))
    found.model.forward_intermediates(torch.randn(1, 3, 16, 16), intermediates_only=True, output_fmt="NLC")
    assert found.measured["device"].startswith("cuda")


@pytest.mark.gpu
def test_training_and_evaluation_on_a_card():
    model, input = vit(), Input.of(vit())
    settings = Train(epochs=2, batch=8, ema=0.9, checkpointing=True)
    found = fit(model, noise(), settings, input=input, seed=0, teacher=vit())
    averages = [value for state in found.averages.values() for value in state.values()]
    assert all(t.device.type == "cpu" for t in averages + everything(model) + everything(found.ema))
    here = evaluate(model, eval_loader(noise(), input))
    there = evaluate(model.cuda(), eval_loader(noise(), input, device=torch.device("cuda")))
    assert there.loss == pytest.approx(here.loss, rel=1e-3)
    half = evaluate(model, eval_loader(noise(), input), precision="bf16", tf32=True)
    assert half.loss == pytest.approx(here.loss, rel=0.05)
