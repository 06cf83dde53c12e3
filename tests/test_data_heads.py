"""Models with one logit, without a head, or with a regression's value: a loss that fits, or a refusal."""

import pytest
import timm
import torch
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from tests.test_run import TINY
from vitrim import families
from vitrim.cut.compensate import importances
from vitrim.cut.outputs import as_classes, gives_values, own_loss
from vitrim.data import Images, Input, eval_loader
from vitrim.deploy.quantize import _compared
from vitrim.methods.taylor import taylor_scores
from vitrim.run.pipeline import compress
from vitrim.train import Distill, Objective, Train, evaluate, fit
from vitrim.train.distill import distance_loss, labels_loss
from vitrim.words.errors import DataError, MethodError, RecipeError

QUIET = {"latency": False}


def model(classes: int):
    torch.manual_seed(0)
    return families.adopt(timm.create_model("test_vit", **(TINY | {"num_classes": classes})).eval())


def data(count: int = 24, labels: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    numbers = torch.arange(count) % labels if labels else torch.full((count,), -1)
    return TensorDataset(torch.randn(count, 3, 32, 32, generator=generator), numbers)


def batches(count: int = 24, labels: int = 0):
    return [tuple(x) for x in torch.utils.data.DataLoader(data(count, labels), batch_size=8)]


@pytest.mark.parametrize(("classes", "labels"), [(1, 0), (1, 2), (0, 0), (0, 2), (1, 1)])
@pytest.mark.parametrize("target", ["auto", "output", "distance"])
def test_taylor_scores_are_not_zero(classes, labels, target):
    scores = taylor_scores(model(classes), batches(labels=labels), target=target)
    assert all(bool((score > 0).any()) for score in scores.values())
    assert all(bool(torch.isfinite(score).all()) for score in scores.values())


def test_one_logit_with_labels_is_binary_cross_entropy():
    """By hand: the scores of a two-class model whose first logit is always zero."""
    one, two = model(1), model(2)
    with torch.no_grad():
        for name, value in one.state_dict().items():
            if name.startswith("head."):
                two.state_dict()[name].copy_(torch.cat([torch.zeros_like(value), value]))
            else:
                two.state_dict()[name].copy_(value)
    for target in ("labels", "output"):
        mine, theirs = (taylor_scores(each, batches(labels=2), target=target) for each in (one, two))
        assert all(torch.allclose(mine[path], theirs[path], rtol=1e-5) for path in mine)
    logits, labels = torch.randn(6, 1), torch.tensor([0, 1, 1, 0, 1, 0])
    wanted = F.binary_cross_entropy_with_logits(logits[:, 0], labels.float())
    assert torch.allclose(labels_loss(as_classes(logits), labels), wanted)


def test_values_are_compared_by_distance():
    """The squared gradient of a random direction averages to that of half the squared distance, J' J."""
    torch.manual_seed(0)
    jacobian = torch.randn(3, 4)
    draw = torch.Generator().manual_seed(1)
    x = torch.zeros(20_000, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(own_loss(x @ jacobian.T, values=True, draw=draw), x)
    assert torch.allclose(gradient.T @ gradient / len(x), jacobian.T @ jacobian, atol=0.15)
    assert gives_values(0, True)
    assert gives_values(1, False)
    assert not gives_values(1, True)
    assert not gives_values(2, False)
    for wrong in (torch.zeros(3), torch.zeros(2, 3, 4), torch.full((2, 3), float("nan")), (1, 2)):
        with pytest.raises(MethodError):
            own_loss(wrong, values=False, draw=draw)


@pytest.mark.parametrize("classes", [0, 1])
def test_importances_of_values(classes):
    found = importances(model(classes), [x for x, _ in batches()], seed=0)
    assert all(float(each.metric.diagonal().sum()) > 0 for each in found.values())
    assert all(float(each.weights.std()) > 0 for each in found.values())


def test_labels_of_values_are_refused():
    with pytest.raises(MethodError, match="must have labels, but the model's outputs are no classes"):
        taylor_scores(model(0), batches(labels=2), target="labels")


# Training.


def weights(net) -> torch.Tensor:
    return torch.cat([value.flatten() for value in net.state_dict().values()])


@pytest.mark.parametrize(("classes", "labels"), [(1, 0), (1, 2), (0, 0)])
def test_training_moves_towards_its_teacher(classes, labels):
    teacher = model(classes)
    torch.manual_seed(1)
    student = families.adopt(timm.create_model("test_vit", **(TINY | {"num_classes": classes})))
    images = torch.cat([x for x, _ in batches()])

    def apart() -> float:
        with torch.no_grad():
            return float((student.eval()(images) - teacher(images)).square().mean())

    before = apart()
    settings = Train(epochs=20, batch=8, lr=1e-3, distill=Distill(alpha=1), augment={"kind": "none"})
    fit(student, data(labels=labels), settings, input=Input.of(student), seed=0, teacher=teacher)
    assert apart() < 0.5 * before


def test_mixup_of_one_logit():
    student = model(1)
    settings = Train(epochs=1, batch=8, mixup=0.5, augment={"kind": "none"})
    before = weights(student).clone()
    found = fit(student, data(labels=2), settings, input=Input.of(student), seed=0)
    assert not torch.equal(weights(found.model), before)


@pytest.mark.parametrize(
    ("classes", "labels", "distill", "told"),
    [
        (0, 0, {"kind": "hard"}, "a model without a head must learn its teacher's outputs by their distance"),
        (1, 0, {"kind": "hard"}, "a model with one output and images without labels must learn"),
        (0, 2, {"alpha": 0.5}, "must learn from a teacher alone, but the labels have a weight"),
        (0, 2, {"kind": "none"}, "but train.distill.kind is 'none'"),
    ],
)
def test_losses_that_do_not_fit_are_refused(classes, labels, distill, told):
    net = model(classes)
    settings = Train(epochs=1, batch=8, distill=Distill(**distill))
    with pytest.raises(RecipeError, match=told):
        fit(net, data(labels=labels), settings, input=Input.of(net), seed=0, teacher=model(classes))


def test_distance_may_be_asked_for_with_classes():
    objective = Objective(Distill(kind="distance", alpha=0.25), 0.0, model(3), True)
    objective.judge(3)
    ours, theirs, labels = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    wanted = 0.75 * F.cross_entropy(ours, labels) + 0.25 * (ours - theirs).square().mean()
    assert torch.allclose(objective.loss(ours, labels, theirs), wanted)
    assert distance_loss(ours.half(), ours.half()) == 0


# Measuring.


def test_agreement_is_told_only_where_it_means_something():
    for classes, labels in ((0, 0), (1, 0), (0, 2)):
        net, other = model(classes), model(classes)
        with torch.no_grad():
            next(other.parameters()).add_(0.3)
        found = evaluate(net, batches(labels=labels), reference=other)
        assert (found.agreement, found.top1, found.top5, found.loss) == (None, None, None, None)
        assert found.distance is not None
        assert found.distance > 0
        assert evaluate(net, batches(labels=labels), reference=net).distance == 0
    binary = evaluate(model(1), batches(labels=2), reference=model(1))
    assert (binary.agreement, binary.top5, binary.distance) == (100.0, None, None)
    with torch.no_grad():
        right = sum(float(((model(1)(x)[:, 0] > 0).long() == y).sum()) for x, y in batches(labels=2))
    assert binary.top1 == pytest.approx(100 * right / 24)
    with pytest.raises(DataError, match="must be below the 1 classes"):
        evaluate(model(1), batches(labels=3))


# Runs.


@pytest.mark.parametrize("method", ["magnitude", "random", "taylor"])
@pytest.mark.parametrize(("classes", "labels"), [(1, 0), (0, 0), (0, 3), (1, 2)])
def test_runs_of_values(method, classes, labels):
    result = compress(
        model(classes), data(labels=labels), method=method, budget="macs=0.6", epochs=0.5, measure=QUIET,
        train={"batch": 8, "distill": {"alpha": 1}, "augment": {"kind": "none"}}, test=data(16, labels),
    )  # fmt: skip
    binary = classes == 1 and labels == 2
    assert (result.measured["agreement"] is not None) == binary
    assert (result.measured["top1"] is not None) == binary
    assert (result.measured["distance"] is not None) == (not binary)
    assert 0.58 < result.measured["macs_ratio"] <= 0.6
    # Nothing is removed whole for want of a score.
    assert all(block.mixer is None for block in result.plan.blocks())


def test_compensation_of_values():
    result = compress(model(0), data(), method="magnitude", budget="macs=0.7", recover="ridge", measure=QUIET)
    plain = compress(model(0), data(), method="magnitude", budget="macs=0.7", measure=QUIET)
    assert result.measured["distance"] < plain.measured["distance"]


@pytest.mark.parametrize("method", ["post_training", "mdc", "cait", "spvit", "vit_slim"])
@pytest.mark.parametrize(
    ("classes", "labels", "told"), [(1, 0, "has one output, and its images"), (0, 2, "has no head")]
)
def test_methods_that_compare_answers_are_refused(method, classes, labels, told):
    with pytest.raises(
        RecipeError, match=f"{method} must have a model that tells classes apart.*{told}.*magnitude, random"
    ):
        compress(model(classes), data(120, labels), method=method, budget="macs=0.7", measure=QUIET)


def test_answers_of_an_exported_model_are_compared_as_classes():
    """One logit that is turned around gives the other answer; its first choice of one would always be the same."""
    for classes, labels, agreement in ((1, 2, 0.0), (1, 0, None), (0, 0, None), (3, 3, 100.0)):
        net = model(classes)
        sign = -1 if classes == 1 else 1
        found = _compared(net, lambda x, net=net, sign=sign: sign * net(x), batches(labels=labels))
        assert found.agreement == agreement
        assert (found.top1 is None) == (labels == 0)


def test_data_of_other_classes_is_refused_for_one_logit():
    with pytest.raises(DataError, match="must have the 1 classes of the model, but has 3"):
        compress(model(1), data(labels=3), budget="macs=0.7", measure=QUIET)
    assert Images(lambda n: None, [0, 1], classes=2).unlabeled().classes == 0
    assert len(list(eval_loader(data(4), Input.of(model(1))))) == 1
