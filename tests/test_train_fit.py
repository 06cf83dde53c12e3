"""The loop: what a step is, and that a run can be stopped at any moment and goes on to the same result."""

import copy
import json
import random
import signal

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from vitrim.data import Augment, Images, Input
from vitrim.train import Distill, Train, fit
from vitrim.words.errors import DataError, MethodError, RecipeError, TrainError, WeightsError
from vitrim.words.stopping import Terminated

INPUT = Input(size=(8, 8), crop_pct=1.0)
NONE = Augment(kind="none")
PLAIN = Train(epochs=2, batch=8, lr=1e-3, augment=NONE)
# All that is random is on.
FULL = Train(
    epochs=4,
    batch=8,
    accumulate=2,
    lr=1e-3,
    warmup_epochs=1,
    mixup=0.8,
    cutmix=1.0,
    smoothing=0.1,
    ema=0.9,
    drop_path=0.3,
    augment=Augment(rotate=10, hflip=0.5),
    checkpoint_every=1,
    keep=2,
)


@pytest.fixture(autouse=True)
def _one_thread():
    # With a busy second core, two threads wait for each other at every tiny operation: 59 s instead of 1 s.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def images(count=24, labels=None):
    pixels = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), np.uint8)
    given = np.arange(count) % 3 if labels is None else labels
    return Images(lambda i: Image.fromarray(pixels[i]), given, classes=3 if given[0] >= 0 else 0, source="noise")


def vit(name="vit_tiny_patch16_224", **given):
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
    return timm.create_model(name, **(sizes | {"proj_drop_rate": 0.1} | given))


def equal(one, two):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


def timeless(history):
    return [{name: value for name, value in record.items() if name != "seconds"} for record in history]


def stopped(at, number=signal.SIGINT):
    """Return a hook that presses ctrl-C inside step `at`, or sends another signal."""

    def hook(model, step):
        if step == at:
            signal.raise_signal(number)

    return hook


def test_it_learns_and_reports():
    records = []
    model = vit().eval()
    found = fit(
        model,
        images(),
        Train(epochs=40, batch=8, lr=3e-3, augment=NONE),
        input=INPUT,
        seed=0,
        log=records.append,
        validation=images(),
    )
    assert found.model is model
    assert not model.training
    assert (found.steps, found.ema) == (120, None)
    assert found.history[-1]["top1"] > 90
    assert [record["event"] for record in records].count("epoch") == 40
    first = records[0]
    assert {"stage", "event", "epoch", "step", "loss", "task", "penalty", "lr", "seconds"} == set(first)
    json.dumps(records, allow_nan=False)


def test_a_seed_decides_all():
    runs = [fit(vit(), images(), FULL, input=INPUT, seed=seed) for seed in (1, 1, 2)]
    assert equal(runs[0].model, runs[1].model)
    assert not equal(runs[0].model, runs[2].model)


def test_global_generators_are_left_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    model = vit()
    torch.set_rng_state(state[0])
    fit(model, images(), FULL, input=INPUT, seed=0)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert np.random.get_state()[1].tolist() == state[2]


def gradients(settings, penalty=None):
    """Train one step in float64; return its gradients."""
    found = {}

    def keep(model, step):
        found.update({name: p.grad.clone() for name, p in model.named_parameters()})

    fit(
        vit(proj_drop_rate=0.0).double(),
        images(),
        settings,
        input=INPUT,
        seed=0,
        penalty=penalty,
        after_step=keep,
    )
    return found


@pytest.mark.parametrize("mixed", [{}, {"mixup": 0.8, "cutmix": 1.0}])
def test_accumulation_changes_no_gradient(mixed):
    settings = {"epochs": 0.3, "batch": 12, "clip": None, "augment": Augment()} | mixed

    def penalty(model):
        return 0.1 * model.pos_embed.abs().sum()

    whole = gradients(Train(**settings), penalty)
    parts = gradients(Train(accumulate=3, **settings), penalty)
    for name, value in whole.items():
        assert torch.allclose(value, parts[name], rtol=0, atol=1e-12), name


def test_a_penalty_counts_once():
    settings = Train(epochs=0.3, batch=12, clip=None, augment=NONE, accumulate=2)
    with_it = gradients(settings, lambda model: 0.1 * model.pos_embed.sum())
    without = gradients(settings)
    assert torch.allclose(with_it["pos_embed"] - without["pos_embed"], torch.tensor(0.1, dtype=torch.float64))
    assert torch.equal(with_it["head.weight"], without["head.weight"])


def test_clipping():
    found = gradients(Train(epochs=0.3, batch=12, clip=1e-3, augment=NONE))
    norm = torch.stack([value.norm() for value in found.values()]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_a_perfect_teacher_teaches_nothing_new():
    model = vit(proj_drop_rate=0.0)
    teacher = copy.deepcopy(model).train()
    before = copy.deepcopy(teacher)
    # One step: Adam blows the rounding errors of the first gradient up to whole learning rates.
    settings = Train(epochs=0.3, batch=8, augment=NONE, distill=Distill(kind="soft", alpha=1.0))
    found = fit(model, images(), settings, input=INPUT, seed=0, teacher=teacher)
    assert found.history[0]["loss"] == pytest.approx(0, abs=1e-6)
    assert equal(teacher, before)
    assert teacher.training
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("kind", ["hard", "soft", "token"])
def test_a_teacher_suffices_without_labels(kind):
    name = "deit_tiny_distilled_patch16_224" if kind == "token" else "vit_tiny_patch16_224"
    model = vit(name)
    settings = Train(epochs=1, batch=8, mixup=0.2, augment=NONE, distill=Distill(kind=kind))
    bare = images(labels=np.full(24, -1))
    found = fit(model, bare, settings, input=INPUT, seed=0, teacher=vit(), validation=bare)
    assert found.history[0]["top1"] is None
    if kind == "token":
        assert not model.distilled_training


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision(precision):
    model = vit()
    found = fit(model, images(), PLAIN.model_copy(update={"precision": precision}), input=INPUT, seed=0)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert np.isfinite(found.history[-1]["loss"])


def test_no_epochs_is_no_change():
    model = vit()
    before = copy.deepcopy(model)
    assert fit(model, images(), Train(epochs=0, batch=8), input=INPUT, seed=0).steps == 0
    assert equal(model, before)


@pytest.mark.parametrize(
    ("at", "number", "raised"),
    [(0, signal.SIGINT, KeyboardInterrupt), (4, signal.SIGTERM, Terminated), (5, signal.SIGINT, KeyboardInterrupt),
     (7, signal.SIGTERM, Terminated)],
)  # fmt: skip
def test_a_stop_leaves_a_checkpoint_and_the_run_goes_on(tmp_path, at, number, raised):
    settings = FULL.model_copy(update={"checkpoint_every": 0})
    whole = fit(vit(), images(), settings, input=INPUT, seed=0, validation=images())
    arguments = {"input": INPUT, "seed": 0, "folder": tmp_path, "validation": images()}
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(raised):
        fit(vit(), images(), settings, after_step=stopped(at, number), **arguments)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is before
    assert (tmp_path / f"train-{at + 1:08d}.safetensors").exists()
    resumed = fit(vit(), images(), settings, **arguments)
    assert equal(whole.model, resumed.model)
    assert equal(whole.ema, resumed.ema)
    assert timeless(whole.history) == timeless(resumed.history)
    # A finished run is not run again.
    again = fit(vit(), images(), settings, **arguments)
    assert again.steps == 12
    assert equal(again.model, whole.model)
    assert again.seconds == resumed.seconds


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    calls = []

    def penalty(model):
        calls.append(0)
        return model.pos_embed.sum() * (float("nan") if len(calls) == 5 else 0.0)

    settings = PLAIN.model_copy(update={"checkpoint_every": 2})
    model = vit()
    text = r"train: the loss must be finite, but is nan at step 4; lower train.lr.* kept at .*train-00000004"
    with pytest.raises(TrainError, match=text):
        fit(model, images(), settings, input=INPUT, seed=0, penalty=penalty, folder=tmp_path)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    with pytest.raises(TrainError, match="no checkpoint was written yet"):
        fit(vit(), images(), settings, input=INPUT, seed=0, penalty=lambda m: m.pos_embed.sum() * float("inf"))


def test_a_gradient_that_is_not_finite_stops_the_run():
    # The square root has value 0 and slope inf at 0.
    with pytest.raises(TrainError, match=r"the gradient must be finite, but is (inf|nan) at step 0"):
        fit(vit(), images(), PLAIN, input=INPUT, seed=0, penalty=lambda m: (m.pos_embed * 0).abs().sum().sqrt())


def test_what_does_not_fit_is_refused():
    broken = vit()
    with torch.no_grad():
        broken.head.bias[0] = float("inf")
    with pytest.raises(WeightsError, match=r"head\.bias: weights must be finite"):
        fit(broken, images(), PLAIN, input=INPUT, seed=0)
    with pytest.raises(DataError, match="must have the 4 classes of the model, but has 3"):
        fit(vit(num_classes=4), images(), PLAIN, input=INPUT, seed=0)
    with pytest.raises(RecipeError, match="the teacher must have the 3 classes of the model, but has 4"):
        fit(vit(), images(), PLAIN, input=INPUT, seed=0, teacher=vit(num_classes=4))
    with pytest.raises(DataError, match=r"must take pictures of \(3, 16, 16\)"):
        fit(vit(), images(), PLAIN, input=Input(size=(16, 16)), seed=0)
    distilled = PLAIN.model_copy(update={"distill": Distill(kind="token")})
    with pytest.raises(RecipeError, match="must have a model with a distillation token"):
        fit(vit(), images(), distilled, input=INPUT, seed=0, teacher=vit())
    with pytest.raises(MethodError, match="requires a gradient"):
        fit(nn.Sequential(vit()).requires_grad_(False), images(), PLAIN, input=INPUT, seed=0)


def test_a_refused_run_leaves_the_model_as_it_was():
    model = vit("deit_tiny_distilled_patch16_224").eval()
    before, text = copy.deepcopy(model), str(model)
    settings = FULL.model_copy(update={"distill": Distill(kind="token")})
    with pytest.raises(MethodError):
        fit(
            model,
            images(),
            settings,
            input=INPUT,
            seed=0,
            teacher=vit(),
            groups=lambda m: [{"params": [m.pos_embed]}] * 2,
        )
    assert equal(model, before)
    assert str(model) == text
    assert not model.training
    assert not model.distilled_training


def test_extra_groups_move_with_their_own_rate():
    model = vit()
    before = model.pos_embed.detach().clone()
    fit(
        model,
        images(),
        Train(epochs=0.3, batch=8, clip=None, lr=1e-3, schedule="constant", augment=NONE),
        input=INPUT,
        seed=0,
        groups=lambda m: [{"params": [m.pos_embed], "lr": 0.5}],
    )
    # Adam's first step has the size of the learning rate.
    assert (model.pos_embed - before).abs().median().item() == pytest.approx(0.5, rel=1e-2)
