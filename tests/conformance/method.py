"""What every method must keep, on every family; `tests/test_methods.py` inherits it, methods of strangers may too."""

import copy

import torch

from vitrim import methods
from vitrim.cut.surgery import apply
from vitrim.data import Input, split
from vitrim.families import describe
from vitrim.methods._contract import Data
from vitrim.train import Train, fit
from vitrim.words.budget import SLACK, Budget
from vitrim.words.costs import cost_of
from vitrim.words.plain import dump, load
from vitrim.words.plan import Plan

SHORT = {"epochs": 0.2, "batch": 16, "augment": {"kind": "light"}, "mixup": 0, "cutmix": 0, "warmup_epochs": 0}


def digits(model) -> Data:
    """64 pictures of digits, sized for `model`."""
    parts = split("digits", calibration=32, validation=32, seed=0)
    few = parts.train.pick(range(64))
    return Data(train=few, calibration=parts.calibration, validation=parts.validation, input=Input.of(model))


def method_of(name: str):
    """The method with a search short enough for a test, where it trains or tries."""
    fields = methods.settings_of(name).model_fields
    short = {"train": SHORT, "trials": 4, "initial": 3}
    return methods.get(name, {key: value for key, value in short.items() if key in fields})


class MethodConformance:
    """Subclass it, give a fixture `name` and a fixture `model` (adopted, 10 classes), and inherit every test."""

    budget = "macs=0.7"

    def found(self, name, model, seed=0):
        return method_of(name).search(model, digits(model), Budget.parse(self.budget), seed=seed, teacher=model)

    def test_budget_binds(self, name, model):
        found = self.found(name, model)
        spec = describe(model)
        child = apply(found.parent, found.plan, grafts=found.grafts)
        parent, cost, budget = cost_of(spec), cost_of(describe(child)), Budget.parse(self.budget)
        assert budget.admits(cost, parent)
        assert budget.spent(cost, parent) >= 1 - SLACK

    def test_same_seed_same_plan(self, name, model):
        first, second = self.found(name, model), self.found(name, model)
        assert first.plan == second.plan
        for a, b in zip(first.parent.parameters(), second.parent.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_parent_is_untouched(self, name, model):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        modes = [module.training for module in model.modules()]
        wanted = [parameter.requires_grad for parameter in model.parameters()]
        state = torch.get_rng_state()
        self.found(name, model)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert modes == [module.training for module in model.modules()]
        assert wanted == [parameter.requires_grad for parameter in model.parameters()]
        assert all(parameter.grad is None for parameter in model.parameters())
        assert torch.equal(torch.get_rng_state(), state)
        assert not any(module._forward_hooks for module in model.modules())

    def test_plan_survives_paper(self, name, model):
        plan = self.found(name, model).plan
        assert load(Plan, dump(plan)) == plan

    def test_child_trains_a_step(self, name, model):
        found = self.found(name, model)
        child = apply(found.parent, found.plan, grafts=found.grafts)
        before = copy.deepcopy(child.state_dict())
        data = digits(model)
        settings = Train(epochs=0.25, batch=16, lr=1e-3)
        fitted = fit(child, data.train, settings, input=data.input, seed=0, teacher=model)
        assert fitted.steps >= 1
        moved = [key for key, value in child.state_dict().items() if not torch.equal(value, before[key])]
        assert len(moved) > len(before) / 2
