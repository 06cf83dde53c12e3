"""MDC from the outside: its recipes, a run from the command line, a Swin, and what each bad request is told."""

from pathlib import Path

import numpy as np
import pytest
import timm

from tests.samples import without_data
from vitrim.budget import SLACK, Budget
from vitrim.costs import cost_of
from vitrim.families import describe
from vitrim.methods._mdc import PRESETS, Bounds, Frame, natural
from vitrim.methods._mdc_share import Chooser
from vitrim.recipe import read_recipe
from vitrim.search.policy import sample

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*_mdc_*.toml"))


def test_all_five_recipes_are_there():
    assert len(RECIPES) == 5


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_strict_and_meet_their_budgets(path):
    """Published policies to the last parameter; a search finds policies within the budget of the others."""
    recipe = read_recipe(path).resolved()
    method, text = recipe.found_method(), path.read_text(encoding="utf-8")
    assert all(f"# {word}:" in text for word in ("Run", "Cost", "Expect"))
    assert text.count("NOT YET MEASURED") == 1
    assert recipe.train.epochs == 300
    spec = describe(without_data(lambda: timm.create_model(recipe.model.name.split(".")[0])))
    budget = Budget.parse(recipe.budget)
    frame = Frame(spec, natural(spec), budget, Bounds(heads=0.5, neurons=0.5, tokens=0.5), method.rounding)
    if method.preset is None:
        assert method.train.epochs == 10
        assert method.train.lr * 10 == pytest.approx(recipe.train.lr)
        policy = sample(frame.space, 1, np.random.default_rng(0))[0]
    else:
        assert (method.rounding, method.estimator, method.neurons_by) == ("floor", "biased_multi", "released")
        policy = frame.policy(PRESETS[method.preset])
    cost = cost_of(Chooser(frame).plan(policy).child(spec))
    assert 1 - SLACK <= budget.spent(cost, cost_of(spec)) <= 1
    if method.preset is not None:
        assert f"{cost.macs / 1e9:.6f} G MACs and {cost.params:,} parameters" in text
