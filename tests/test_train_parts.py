"""Settings, losses, groups, learning rates and evaluation, against hand values."""

import math

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.scheduler import CosineLRScheduler
from torch import nn

from vitrim.nn.weights import check_weights
from vitrim.train import Distill, Objective, Train, evaluate, learning_rate, parameter_groups, reference_logits
from vitrim.train.distill import hard_loss, labels_loss, soft_loss, token_loss, two_heads
from vitrim.train.guard import drop_path
from vitrim.train.optim import optimizer, set_learning_rate
from vitrim.words.errors import DataError, MethodError, RecipeError, WeightsError
from vitrim.words.plain import dump, load

LOGITS = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)  # probabilities 3/4, 1/4
TEACHER = torch.tensor([[0.0, math.log(4.0)]], dtype=torch.float64)  # probabilities 1/5, 4/5
LABEL = torch.tensor([0])
CE, HARD = -math.log(0.75), -math.log(0.25)
KL = 0.2 * math.log(0.2 / 0.75) + 0.8 * math.log(0.8 / 0.25)


def vit(**given):
    torch.manual_seed(0)
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 3, "num_heads": 2, "num_classes": 3}
    return timm.create_model("vit_tiny_patch16_224", **(sizes | given))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"lr": 0}, "train.lr: input should be greater than 0, but got 0"),
        ({"lrr": 0.1}, "Train has no field 'lrr'; did you mean 'lr'"),
        ({"distill": {"temprature": 2}}, "Distill has no field 'temprature'; did you mean 'temperature'"),
        ({"betas": [0.9, 1.0]}, r"betas must be in \[0, 1\)"),
        ({"warmup_epochs": 11}, "warmup_epochs must be at most epochs 10, but is 11"),
        ({"lr": 1e-7}, "min_lr must be at most lr"),
        ({"mixup": 0.2, "batch": 7}, "batch must be even"),
        ({"ema": 1.0}, "train.ema: input should be less than 1"),
        ({"precision": "fp8"}, "train.precision"),
    ],
)
def test_settings_refuse_nonsense(values, text):
    with pytest.raises(RecipeError, match=text):
        load(Train, values, at="train")


def test_settings_are_plain():
    settings = Train(mixup=0.1, distill=Distill(kind="hard"))
    assert load(Train, dump(settings)) == settings


def test_losses_by_hand():
    assert labels_loss(LOGITS, LABEL).item() == pytest.approx(CE, abs=1e-12)
    smooth = 0.95 * CE + 0.05 * HARD
    assert labels_loss(LOGITS, LABEL, 0.1).item() == pytest.approx(smooth, abs=1e-12)
    assert labels_loss(LOGITS, torch.tensor([[0.95, 0.05]])).item() == pytest.approx(smooth, abs=1e-7)
    assert hard_loss(LOGITS, TEACHER).item() == pytest.approx(HARD, abs=1e-12)
    assert soft_loss(LOGITS, TEACHER).item() == pytest.approx(KL, abs=1e-12)
    assert soft_loss(2 * LOGITS, 2 * TEACHER, 2.0).item() == pytest.approx(4 * KL, abs=1e-12)
    assert soft_loss(LOGITS, LOGITS, 3.0).item() == pytest.approx(0, abs=1e-12)
    both = token_loss((LOGITS, LOGITS), LABEL, TEACHER, 0.25, 0.0)
    assert both.item() == pytest.approx(0.75 * CE + 0.25 * HARD, abs=1e-12)


def test_a_soft_loss_is_a_mean_over_the_batch():
    one = soft_loss(LOGITS, TEACHER)
    assert soft_loss(LOGITS.repeat(5, 1), TEACHER.repeat(5, 1)).item() == pytest.approx(one.item(), abs=1e-12)


@pytest.mark.parametrize(("kind", "term"), [("hard", HARD), ("soft", KL)])
def test_objectives_mix_labels_and_teacher(kind, term):
    settings = Distill(kind=kind, alpha=0.3)
    mixed = Objective(settings, 0.0, nn.Identity(), labelled=True)
    assert mixed.loss(LOGITS, LABEL, TEACHER).item() == pytest.approx(0.7 * CE + 0.3 * term, abs=1e-12)
    free = Objective(settings, 0.0, nn.Identity(), labelled=False)
    assert free.alpha == 1
    assert free.loss(LOGITS, torch.tensor([-1]), TEACHER).item() == pytest.approx(term, abs=1e-12)
    alone = Objective(settings, 0.0, None, labelled=True)
    assert alone.ask(LOGITS) is None
    assert alone.loss(LOGITS, LABEL, None).item() == pytest.approx(CE, abs=1e-12)


def test_token_objectives():
    objective = Objective(Distill(kind="token", alpha=0.5), 0.0, nn.Identity(), labelled=True)
    assert objective.token
    assert objective.loss((LOGITS, LOGITS), LABEL, TEACHER).item() == pytest.approx((CE + HARD) / 2, abs=1e-12)
    free = Objective(Distill(kind="token", alpha=0.5), 0.0, nn.Identity(), labelled=False)
    assert free.loss((LOGITS, 0 * LOGITS), LABEL, TEACHER).item() == pytest.approx((HARD - math.log(0.5)) / 2)
    with pytest.raises(RecipeError, match="must have a model with a distillation token"):
        two_heads(vit())


@pytest.mark.parametrize(("kind", "teacher"), [("soft", None), ("none", nn.Identity())])
def test_without_labels_there_must_be_a_teacher(kind, teacher):
    with pytest.raises(RecipeError, match="without labels must have a teacher"):
        Objective(Distill(kind=kind), 0.0, teacher, labelled=False)


def test_the_learning_rate_is_timms():
    settings = Train(lr=1.0, warmup_lr=0.1, min_lr=0.05)
    dummy = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    timms = CosineLRScheduler(
        dummy, t_initial=40, lr_min=0.05, warmup_t=8, warmup_lr_init=0.1, t_in_epochs=False, warmup_prefix=True
    )
    for step in range(48):
        wanted = timms._get_lr(step)[0]
        assert learning_rate(step, 48, 8, settings) == pytest.approx(wanted, abs=1e-12)
    assert learning_rate(47, 48, 8, Train(schedule="constant", lr=0.3)) == 0.3


def test_what_decays():
    model = vit()
    names = {id(p): name for name, p in model.named_parameters()}
    plain = parameter_groups(model, Train(weight_decay=0.1))
    decayed, spared = ({names[id(p)] for p in group["params"]} for group in plain)
    assert [group["weight_decay"] for group in plain] == [0.1, 0.0]
    assert "blocks.0.attn.qkv.weight" in decayed
    assert {"pos_embed", "cls_token", "blocks.0.norm1.weight", "blocks.0.attn.qkv.bias"} <= spared
    assert decayed | spared == set(names.values())
    assert not decayed & spared
    # The same for a model inside another.
    inside = parameter_groups(nn.Sequential(model), Train())
    assert [len(group["params"]) for group in inside] == [len(decayed), len(spared)]


def test_extra_groups():
    model = vit()
    mask = model.pos_embed
    made = parameter_groups(model, Train(lr=1e-3), lambda m: [{"params": [m.pos_embed], "lr": 1e-2}])
    assert [p is mask for p in made[0]["params"]] == [True]
    assert sum(p is mask for group in made for p in group["params"]) == 1
    made_by = optimizer(model, Train(lr=1e-3), lambda m: [{"params": m.pos_embed, "lr": 1e-2}])
    set_learning_rate(made_by, 5e-4)
    assert [group["lr"] for group in made_by.param_groups] == pytest.approx([5e-3, 5e-4, 5e-4])
    with pytest.raises(MethodError, match="must contain only parameters of the model"):
        parameter_groups(model, Train(), lambda m: [{"params": [nn.Parameter(torch.zeros(1))]}])
    with pytest.raises(MethodError, match="pos_embed: a parameter must be in one group, but is in two"):
        parameter_groups(model, Train(), lambda m: [{"params": [m.pos_embed]}] * 2)
    with pytest.raises(MethodError, match="a parameter that requires a gradient"):
        optimizer(model.requires_grad_(False), Train())


def test_drop_path_comes_and_goes():
    model = vit()
    before = str(model)
    with drop_path(model, 0.2):
        rates = [block.drop_path1.drop_prob for block in model.blocks]
        assert rates == pytest.approx([0, 0.1, 0.2])
        assert all(isinstance(block.drop_path2, DropPath) for block in model.blocks)
    assert str(model) == before
    with drop_path(nn.Sequential(model), 0.2):
        assert model.blocks[2].drop_path1.drop_prob == pytest.approx(0.2)
    with pytest.raises(RecipeError, match="must have blocks with a drop path"), drop_path(nn.Linear(1, 1), 0.1):
        pass


def test_weights_must_be_finite():
    model = vit()
    check_weights(model)
    with torch.no_grad():
        model.blocks[1].mlp.fc1.bias[0] = float("nan")
    with pytest.raises(WeightsError, match=r"blocks\.1\.mlp\.fc1\.bias: weights must be finite"):
        check_weights(model)


class Table(nn.Module):
    """Gives out what it is fed."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.weight


SCORES = torch.eye(6)
LABELS = torch.tensor([0, 1, 2, 0, 0, 0])


def halves(x=SCORES, labels=LABELS):
    return [(x[:4], labels[:4]), (x[4:], labels[4:])]


def test_evaluation_by_hand():
    model = Table().train()
    found = evaluate(model, halves())
    assert model.training
    assert (found.top1, found.count, found.agreement) == (50.0, 6, None)
    # An eye's ties beyond the first are broken by place, so label 0 is always among the first five.
    assert found.top5 == pytest.approx(100)
    wrong, right = math.log(math.e + 5), math.log(math.e + 5) - 1
    assert found.loss == pytest.approx((wrong + right) / 2, abs=1e-6)


def test_agreement_and_labels_missing():
    other = Table()
    with torch.no_grad():
        other.weight.fill_(-1.0)
    unlabelled = halves(labels=torch.full((6,), -1))
    found = evaluate(Table(), unlabelled, reference=Table())
    assert (found.top1, found.top5, found.loss, found.agreement) == (None, None, None, 100.0)
    cached = reference_logits(other, unlabelled)
    assert cached.shape == (6, 6)
    assert (
        evaluate(Table(), unlabelled, reference=cached).agreement
        == evaluate(Table(), unlabelled, reference=other).agreement
    )


def test_evaluation_refuses_what_does_not_fit():
    with pytest.raises(DataError, match="the 7 classes of the data, but has 6"):
        evaluate(Table(), halves(), classes=7)
    with pytest.raises(DataError, match="labels must be below the 6 classes of the model, but 6 came"):
        evaluate(Table(), halves(labels=LABELS + 4))
    with pytest.raises(DataError, match="at least one image"):
        evaluate(Table(), [])
    with pytest.raises(DataError, match="must be of the 6 images of the loader, but has 7"):
        evaluate(Table(), halves(), reference=torch.zeros(7, 6))
    with pytest.raises(WeightsError, match="logits must be finite"):
        evaluate(Table(), halves(x=SCORES * float("nan")))
    with pytest.raises(DataError, match="the reference must be of every image of the loader, but ends at 5"):
        evaluate(Table(), halves(), reference=torch.zeros(5, 6))
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
