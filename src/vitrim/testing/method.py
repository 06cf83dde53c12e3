"""What every method must keep, whoever wrote it: laws that `check_method` tries on small models."""

import copy
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitrim import methods
from vitrim.cut.surgery import apply
from vitrim.families import describe
from vitrim.methods import Data, Found, Method, why_not_a_method
from vitrim.testing._trying import Broken, broken, report
from vitrim.testing.samples import digits, random_data, small_model
from vitrim.train import Train, fit
from vitrim.words.budget import SLACK, Budget
from vitrim.words.costs import cost_of
from vitrim.words.errors import VitrimError
from vitrim.words.plain import dump, load
from vitrim.words.plan import Plan

__all__ = ["METHOD_LAWS", "SHORT", "Trial", "check_method", "short"]

SHORT: dict[str, Any] = {
    "epochs": 0.2,
    "batch": 16,
    "augment": {"kind": "light"},
    "mixup": 0,
    "cutmix": 0,
    "warmup_epochs": 0,
}
"""Settings of a training that is short enough for a test, see `vitrim.train.Train`."""

_DIGITS = 10


def check_method(
    method: Method | str | Path,
    *,
    models: Sequence[nn.Module] | None = None,
    data: Data | None = None,
    budget: str = "macs=0.7",
    seed: int = 0,
) -> None:
    """Search with a method, twice on each model, and try every law of `METHOD_LAWS` on what it finds.

    Args:
        method: an instance, a name, or the path of a file. One that trains should train briefly, see `short`.
        models: adopted models to search; None for the first preset of every family of vitrim, which have 10 classes.
        data: images; None for 64 pictures of digits, or of noise where a model has other than 10 classes.
        budget: what a child may cost; macs, parameters or both.
        seed: of both searches.

    Raises:
        AssertionError: with every law that does not hold, and the model that it was tried on.
        MethodError: if the method cannot be found.
    """
    held: Method = methods.get(str(method)) if isinstance(method, str | Path) else method
    why = why_not_a_method(type(held))
    if why is not None:
        raise AssertionError(f"{type(held).__name__}: {why}")
    chosen = [small_model(name) for name in ("swin", "t2t", "vit")] if models is None else list(models)
    found: Broken = []
    for model in chosen:
        trial = Trial.of(held, model, data, budget=budget, seed=seed)
        found += broken(METHOD_LAWS, trial, f"on {type(model).__name__}")
    report(found)


def short(method: Method) -> Method:
    """The same method with a search short enough for a test: how long it trains and how much it tries are cut.

    The settings are `train`, a `vitrim.train.Train`; `trials` and `initial`, numbers of policies; and `candidates`,
    `swaps` and `look`, numbers of measured choices and of images. What a method of these names has must mean the same.
    """
    node: Any = method
    cut = {"train": SHORT, "trials": 4, "initial": 3, "candidates": 2, "swaps": 1, "look": 16}
    fields = {key: value for key, value in cut.items() if key in type(node).model_fields}
    same: Method = type(node).model_validate({**dump(node), **fields})
    return same


@dataclass(frozen=True, kw_only=True)
class Trial:
    """Two searches with one method on one model, and what the first did to the model.

    Attributes:
        method: what searched.
        model: the adopted model.
        data: what it was given.
        budget: what a child may cost.
        seed: of both searches.
        found: what the first search found.
        again: what the second found, which had a folder and a log as a run gives them.
        records: what the second logged.
        moved: what of the model or of the process the first search changed.
    """

    method: Method
    model: nn.Module
    data: Data
    budget: Budget
    seed: int
    found: Found
    again: Found
    records: tuple[Any, ...]
    moved: tuple[str, ...]

    @classmethod
    def of(
        cls, method: Method, model: nn.Module, data: Data | None = None, *, budget: str = "macs=0.7", seed: int = 0
    ) -> "Trial":
        """Search twice; see `check_method`."""
        limit, images = Budget.parse(budget), data
        if images is None:
            images = digits(model) if describe(model).classes == _DIGITS else random_data(model)
        before = _state(model)
        found = method.search(model, images, limit, seed=seed, teacher=model)
        after = _state(model)
        moved = tuple(name for name in before if not _equal(before[name], after.get(name)))
        records: list[Any] = []
        with tempfile.TemporaryDirectory() as folder:
            again = method.search(
                model, images, limit, seed=seed, teacher=model, folder=Path(folder) / "search", log=records.append
            )
        return cls(
            method=method,
            model=model,
            data=images,
            budget=limit,
            seed=seed,
            found=found,
            again=again,
            records=tuple(records),
            moved=moved,
        )

    def child(self) -> nn.Module:
        """The model that is cut as the first search found."""
        return apply(self.found.parent, self.found.plan, grafts=self.found.grafts)


def settings_survive_paper(trial: Trial) -> Iterator[str]:
    """A method is its settings: read back from a recipe, it is the same."""
    node: Any = trial.method
    if load(type(node), json.loads(json.dumps(dump(node)))) != node:
        yield "a method must be equal to what its settings make, but is not; keep all that decides in fields"


def budget_binds(trial: Trial) -> Iterator[str]:
    """The child is admitted by the budget and spends at least 98 % of it."""
    parent, cost = cost_of(describe(trial.model)), cost_of(describe(trial.child()))
    if not trial.budget.admits(cost, parent):
        yield f"a child must cost at most {trial.budget}, but costs {cost}"
    elif trial.budget.spent(cost, parent) < 1 - SLACK:
        yield f"a child must spend {1 - SLACK:.0%} of {trial.budget}, but spends {trial.budget.spent(cost, parent):.1%}"


def same_seed_same_plan(trial: Trial) -> Iterator[str]:
    """Two searches of one seed find the same plan, and leave the same weights, bit for bit."""
    if trial.found.plan != trial.again.plan:
        yield "two searches of one seed must find one plan, but found two"
    first, second = (dict(found.parent.state_dict()) for found in (trial.found, trial.again))
    if not _equal(first, second):
        yield "two searches of one seed must leave the parent the same weights, but left others"
    if not _equal(dict(trial.found.grafts), dict(trial.again.grafts)):
        yield "two searches of one seed must find the same grafts, but found others"


def model_is_untouched(trial: Trial) -> Iterator[str]:
    """A search leaves its argument as it was, bit for bit, and the global random state too."""
    if trial.moved:
        yield f"a search must leave the model as it was, but changed {', '.join(trial.moved)}; search in a copy"


def plan_survives_paper(trial: Trial) -> Iterator[str]:
    """A plan that is stored and read is the same, and so is each record of what was tried."""
    if load(Plan, json.loads(json.dumps(dump(trial.found.plan)))) != trial.found.plan:
        yield "a plan must be equal to what is read of it, but is not"
    for what, records in (("trials", trial.found.trials), ("log", trial.records)):
        try:
            json.dumps([dict(record) for record in records])
        except (TypeError, ValueError) as problem:
            yield f"records of {what} must be plain values by name, but {problem}"


def child_trains(trial: Trial) -> Iterator[str]:
    """The child takes a training step, in which most of its weights move."""
    child = trial.child()
    before = copy.deepcopy(child.state_dict())
    if trial.data.train is None:
        return
    settings = Train(epochs=0.25, batch=16, lr=1e-3)
    fit(child, trial.data.train, settings, input=trial.data.input, seed=0, teacher=trial.model)
    moved = [key for key, value in child.state_dict().items() if not torch.equal(value, before[key])]
    if len(moved) <= len(before) / 2:
        yield f"a training step must move most weights of a child, but moves {len(moved)} of {len(before)}"


def data_is_asked_for(trial: Trial) -> Iterator[str]:
    """A method that needs images says so where there are none, and one that needs nothing finds the same without."""
    needs = getattr(trial.method, "asks", trial.method.needs)
    try:
        found = trial.method.search(trial.model, None, trial.budget, seed=trial.seed, teacher=trial.model)
    except VitrimError as problem:
        if needs == "nothing":
            yield f"a method that needs nothing must search without data, but says: {problem}"
        return
    except Exception as problem:
        yield f"where there is no data, a method must raise a MethodError if it needs any, but raises {problem!r}"
        return
    if needs != "nothing":
        yield f"a method that needs {needs} must raise a MethodError where there is no data, but found a plan"
    elif found.plan != trial.found.plan:
        yield "a method that needs nothing must find the same plan without data, but found another"


def another_budget_is_read(trial: Trial) -> Iterator[str]:
    """Where a search can be read at another budget, the same budget gives the same plan."""
    if trial.found.again is not None and trial.found.again(trial.budget).plan != trial.found.plan:
        yield "Found.again must give the same plan for the same budget, but gave another"


METHOD_LAWS: tuple[Callable[[Trial], Iterator[str]], ...] = (
    settings_survive_paper,
    budget_binds,
    same_seed_same_plan,
    model_is_untouched,
    plan_survives_paper,
    child_trains,
    data_is_asked_for,
    another_budget_is_read,
)
"""Each takes a trial and gives a sentence for whatever does not hold."""


def _state(model: nn.Module) -> dict[str, Any]:
    """All that a search must leave alone, by what it is called in a sentence."""
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "training modes": [module.training for module in model.modules()],
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "gradients": [parameter.grad is None for parameter in model.parameters()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "torch's random state": {"cpu": torch.get_rng_state()},
        "the structure": describe(model),
    }


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(value, b[key]) for key, value in a.items())
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    return bool(a == b)
