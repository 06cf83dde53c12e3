"""The laws that authors of methods try: each is broken once, and then named; and what is drawn for them."""

import copy
from typing import ClassVar

import pytest
import torch

from vitrim import methods
from vitrim.families import adopt, describe
from vitrim.families.vit import example
from vitrim.methods import Found, ScoreMethod
from vitrim.testing import METHOD_LAWS, SHORT, check_method, random_data, short, small_model
from vitrim.words.budget import Budget
from vitrim.words.errors import MethodError
from vitrim.words.plan import Plan

TOUCHED: list[int] = []


class Even(ScoreMethod):
    """Scores alike; what a test changes is broken."""

    sentence: ClassVar[str] = "keeps the first channels"

    def scores(self, model, data, *, seed):
        return methods.get("magnitude").scores(model, data, seed=seed)


class Forgetful(Even):
    def __eq__(self, other):
        return self is other

    __hash__ = None


class Spendthrift(Even):
    def search(self, model, *rest, **more):
        return Found(plan=Plan.keep(describe(model)), parent=model)


class Miser(Even):
    def search(self, model, data, budget, **more):
        return super().search(model, data, Budget.parse("macs=0.4"), **more)


class Moody(Even):
    def scores(self, model, data, *, seed):
        TOUCHED.append(seed)
        generator = torch.Generator().manual_seed(len(TOUCHED))
        return {
            path: torch.rand(len(row), generator=generator) for path, row in super().scores(model, data, seed=0).items()
        }


class Clumsy(Even):
    def scores(self, model, data, *, seed):
        with torch.no_grad():
            next(model.parameters()).add_(1.0)
        model.train()
        torch.rand(1)
        return super().scores(model, data, seed=seed)


class Wordy(Even):
    def search(self, model, data, budget, **more):
        if more.get("log"):
            more["log"]({"loss": torch.ones(1)})
        return super().search(model, data, budget, **more)


class Frozen(Even):
    def search(self, model, *rest, **more):
        parent = copy.deepcopy(model).requires_grad_(False)
        parent.get_classifier().requires_grad_(True)
        return super().search(parent, *rest, **more)


class Greedy(Even):
    needs: ClassVar[str] = "images"


class Careless(Even):
    needs: ClassVar[str] = "images"

    def scores(self, model, data, *, seed):
        assert len(data.calibration)
        return super().scores(model, data, seed=seed)


class Needy(Even):
    def scores(self, model, data, *, seed):
        if data is None:
            raise MethodError("images must be given, but are not")
        return super().scores(model, data, seed=seed)


class Fickle(Even):
    def search(self, model, data, budget, **more):
        found, other = (super(Fickle, self).search(model, data, b, **more) for b in (budget, Budget.parse("macs=0.6")))
        return Found(plan=found.plan, parent=found.parent, again=lambda _: other)


BROKEN = {
    Forgetful: "settings_survive_paper",
    Spendthrift: "budget_binds",
    Miser: "budget_binds",
    Moody: "same_seed_same_plan",
    Clumsy: "model_is_untouched",
    Wordy: "plan_survives_paper",
    Frozen: "child_trains",
    Greedy: "data_is_asked_for",
    Careless: "data_is_asked_for",
    Needy: "data_is_asked_for",
    Fickle: "another_budget_is_read",
}


def test_a_method_that_keeps_every_law_passes():
    check_method(Even(), models=[small_model("vit")])
    check_method("magnitude", models=[small_model("vit")], budget="params=0.7")


@pytest.mark.parametrize("kind", list(BROKEN), ids=lambda kind: kind.__name__)
def test_a_law_that_does_not_hold_is_named(kind):
    with pytest.raises(AssertionError, match=f"{BROKEN[kind]}, on VisionTransformer: "):
        check_method(kind(), models=[small_model("vit")])


def test_every_law_is_broken_once():
    assert set(BROKEN.values()) == {law.__name__ for law in METHOD_LAWS}


def test_what_is_no_method_is_told():
    class Untold(ScoreMethod):
        def scores(self, model, data, *, seed):
            return {}

    with pytest.raises(
        AssertionError, match="Untold: a method must have needs, sentence and search, but has no sentence"
    ):
        check_method(Untold())
    with pytest.raises(MethodError, match="did you mean 'taylor'"):
        check_method("tailor")


def test_a_method_that_trains_is_cut_short():
    method = short(methods.get("vit_slim", {"attention": 0.5, "choice": "free"}))
    assert (method.attention, method.train.epochs, method.train.batch) == (0.5, SHORT["epochs"], SHORT["batch"])
    assert short(methods.get("mdc")).trials == 4
    assert short(methods.get("random")) == methods.get("random")


def test_noise_stands_in_where_digits_do_not_fit():
    model = adopt(example(num_classes=3).eval())
    data, again = random_data(model, 8), random_data(model, 8)
    assert [len(part) for part in (data.train, data.calibration, data.validation)] == [8, 4, 4]
    assert data.train.classes == 3
    assert [list(part.labels) for part in (data.train, again.train)] == [list(data.train.labels)] * 2
    assert data.train[3][0].tobytes() == again.train[3][0].tobytes()
    assert {data.validation[i][0].tobytes() for i in range(4)}.isdisjoint(data.train[i][0].tobytes() for i in range(8))
    check_method(methods.get("taylor"), models=[model])
