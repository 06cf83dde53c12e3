"""MDC from the outside: its recipes, a Swin, a child in another runtime."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from tests.samples import apart, images, timm_model, without_data
from vitrim import families, methods
from vitrim.cut.surgery import apply
from vitrim.deploy import export
from vitrim.families import adopt, describe
from vitrim.methods.mdc.decode import PRESETS, Bounds, Frame, natural
from vitrim.methods.mdc.policy import sample
from vitrim.methods.mdc.share import Chooser
from vitrim.run.recipe import read_recipe
from vitrim.testing import digits
from vitrim.words.budget import SLACK, Budget
from vitrim.words.costs import cost_of

RECIPES = sorted((Path(methods.__file__).parents[1] / "recipes").glob("*_mdc_*.toml"))


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


def test_a_swin_loses_heads_and_neurons():
    """In every stage what the policy says, and no token; masks on the parent give what the child gives."""
    model = adopt(timm_model("swin", "windows", torch.float32))
    spec = describe(model)
    found = methods.get("mdc", {"trials": 4, "initial": 3, "measure": "agreement"}).search(
        model, digits(model), Budget.parse("macs=0.7"), seed=0, teacher=model
    )
    child = apply(found.parent, found.plan)
    best = next(trial for trial in found.trials if trial["best"])
    kept = [(len(block.mixer.v), block.hidden) for _, _, block in describe(child).blocks()]
    assert kept == list(zip(best["heads"], best["neurons"], strict=True))
    assert sum(heads for heads, _ in kept) < sum(len(block.mixer.v) for _, _, block in spec.blocks())
    assert sum(hidden for _, hidden in kept) < sum(block.hidden for _, _, block in spec.blocks())
    assert best["tokens"] == []
    assert all(block.tokens is None for block in found.plan.blocks())


def test_a_child_in_another_runtime(tmp_path):
    """Token counts are static, the batch is free: ONNX gives eager PyTorch's logits for batches it never saw."""
    torch.manual_seed(0)
    model = adopt(families.get("vit").example(depth=2).eval())
    found = methods.get("mdc", {"proposal": "even", "tokens_by": "hsic_attn"}).search(
        model, digits(model), Budget.parse("macs=0.6"), seed=0
    )
    child = apply(model, found.plan).eval()
    spec = describe(child)
    assert spec.flows()[-1].leaves.total < spec.stages[0].tokens
    export.export(child, tmp_path / "child.onnx")
    _, run = export.onnx_session(tmp_path / "child.onnx")
    for count in (1, 6):
        x = images(spec, count, torch.float32)
        with torch.no_grad():
            assert apart(run(x), child(x)) < export.PARITY
