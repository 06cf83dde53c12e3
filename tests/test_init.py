"""Searches that start from closed forms: losses of removals, gates that start apart, rankings."""

import copy
from dataclasses import replace

import pytest
import torch

from tests.samples import adopted, apart, images, timm_model
from tests.tolerance import EXACT
from vitrim import methods
from vitrim.cut.compensate import AttentionCut, NeuronCut, Walk, importances
from vitrim.cut.compensate.losses import removals
from vitrim.families import adopt, describe
from vitrim.methods.vit_slim import gate_model
from vitrim.methods.vit_slim.gates import gate_scores, set_apart
from vitrim.testing import digits, short
from vitrim.words.budget import Budget
from vitrim.words.costs import cost_of
from vitrim.words.errors import MethodError


def rise(moments, weight, metric, gone):
    """How much the least weighted error rises without the inputs `gone`; by solving both problems."""

    def least(kept):
        part = moments.of(torch.tensor(kept))
        target = weight @ moments.gram @ weight.mT
        cross = weight @ moments.gram[:, kept]
        return torch.trace(metric @ (target - cross @ torch.linalg.solve(part.gram, cross.mT)))

    size = weight.shape[1]
    return float(least([i for i in range(size) if i not in gone]) - least(list(range(size))))


def test_losses_are_those_of_the_best_compensation():
    model = adopted("vit", "plain")
    x = list(images(describe(model), 64).split(32))
    worth = importances(model, x, seed=0)
    found = removals(model, x, seed=0, strength=0.0)
    walk = Walk(model, x, worth, 0.0, 0.0)
    place, tokens = walk.first(), describe(model).stages[0].tokens
    neurons, cut = NeuronCut(place, place.block), AttentionCut(place)
    metric = worth[f"{place.path}.mlp"].metric
    for neuron in (0, 17):
        expected = tokens * rise(neurons.moments, neurons.weight, metric, [neuron])
        assert float(found[f"{place.path}.hidden"].losses[neuron]) == pytest.approx(expected, rel=1e-6)
    weight, metric = torch.cat(cut.heads.proj, dim=1), worth[f"{place.path}.mixer"].metric
    width = place.block.attn.v[0]
    for head in range(len(place.block.attn.v)):
        channels = list(range(head * width, (head + 1) * width))
        expected = tokens * rise(cut.moments, weight, metric, channels)
        assert float(found[f"{place.path}.heads"].losses[head]) == pytest.approx(expected, rel=1e-6)
        expected = tokens * rise(cut.moments, weight, metric, channels[:1])
        assert float(found[f"{place.path}.v"].losses[channels[0]]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("pair", [("vit", "plain"), ("vit", "glu"), ("vit", "qk_norm"), ("swin", "windows")])
def test_gates_that_start_apart_leave_the_function(pair):
    model = copy.deepcopy(adopted(*pair))
    x = images(describe(model), 3)
    before = model(x)
    gated = gate_model(model).eval()
    draw = torch.Generator().manual_seed(0)
    paths = [path for path in gate_scores(gated, "absolute")[0] if gated.has_gate(path)]
    losses = {path: torch.rand(gated.gate(path).numel(), generator=draw).double() for path in paths}
    set_apart(gated, losses)
    assert apart(gated(x), before) < EXACT
    for kind in ("hidden", "v"):
        gates = torch.cat([gated.gate(path).detach().flatten() for path in losses if path.endswith(kind)])
        ranked = torch.cat([values for path, values in losses.items() if path.endswith(kind)])
        assert torch.equal(gates.argsort(), ranked.argsort())
        assert 0.9 < float(gates.min()) < 0.91
        assert 0.99 < float(gates.max()) < 1


@pytest.mark.parametrize("name", ["vit_slim", "mdc"])
def test_searches_start_from_closed_forms(name):
    model = adopt(timm_model("vit", "plain", torch.float32))
    data, budget = digits(model), Budget.parse("macs=0.7")
    held = copy.deepcopy(model.state_dict())
    one, other = (
        short(methods.get(name, {"init": init})).search(model, data, budget, seed=0, teacher=model)
        for init in ("closed_form", "published")
    )
    assert one.plan != other.plan
    assert all(torch.equal(value, held[key]) for key, value in model.state_dict().items())
    assert 0.98 * 0.7 <= cost_of(one.plan.child(describe(model))).macs / cost_of(describe(model)).macs <= 0.7


def test_closed_forms_need_images():
    model = adopt(timm_model("vit", "plain", torch.float32))
    with pytest.raises(MethodError, match="init=closed_form must have calibration images"):
        short(methods.get("vit_slim", {"init": "closed_form"})).search(
            model, replace(digits(model), calibration=None), Budget.parse("macs=0.7"), seed=0
        )
