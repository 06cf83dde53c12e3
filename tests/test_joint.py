"""The joint search of post_training: what is tried, what wins, what is switched off, what a stopped search keeps."""

import copy
import dataclasses
import functools
import json
from pathlib import Path

import pytest
import torch
from torch.utils.data import Subset

from tests.samples import apart, timm_model
from vitrim import methods
from vitrim.cut.compensate import importances
from vitrim.cut.compensate.closed_form import Moments
from vitrim.cut.surgery import apply
from vitrim.data import eval_loader
from vitrim.families import adopt, describe
from vitrim.methods.post_training import CELLS, FILE, LOOKED
from vitrim.methods.post_training.calibration import read_calibration
from vitrim.methods.post_training.notes import Notes
from vitrim.methods.post_training.operators import why_not_convolve
from vitrim.methods.post_training.options import ALL, block_options
from vitrim.methods.post_training.schedule import merging
from vitrim.report.tables import tried
from vitrim.testing import digits
from vitrim.words.budget import Budget
from vitrim.words.costs import cost_of
from vitrim.words.errors import MethodError
from vitrim.words.spec import Conv

SETTINGS = {"candidates": 2, "swaps": 2, "look": 16}
BRIEF = {"candidates": 1, "swaps": 0, "tokens": False}
KINDS = ("operators", "heads", "widths", "tokens", "depth")


@functools.cache
def model():
    torch.manual_seed(0)
    return adopt(timm_model("vit", "plain", torch.float32))


@functools.cache
def calibration(folder):
    """A calibration file, made once."""
    folder.mkdir(parents=True, exist_ok=True)
    methods.get("post_training", {"candidates": 0}).search(
        model(), digits(model()), Budget.parse("macs=0.7"), seed=0, folder=folder
    )
    return folder / FILE


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    return str(calibration(tmp_path_factory.mktemp("calibrated")))


def found(known, budget="macs=0.6", folder=None, **settings):
    method = methods.get("post_training", {**SETTINGS, "calibration": known, **settings})
    return method.search(model(), digits(model()), Budget.parse(budget), seed=0, folder=folder)


def test_measurements_choose(known):
    summary, *trials = found(known).trials
    assert 2 <= len(trials) <= 4
    assert trials[0]["what"] == "candidate"
    assert any(trial["what"] != "candidate" for trial in trials)
    best = [trial for trial in trials if trial["best"]]
    assert [trial["loss"] for trial in best] == [min(trial["loss"] for trial in trials)]
    assert summary["merges"] == best[0]["merges"]
    spec = describe(model())
    assert all(0.98 * 0.6 <= trial["macs"] / cost_of(spec).macs <= 0.6 for trial in trials)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_switched_off_is_not_cut(known, kind):
    only = found(known, "macs=0.7", **{kind: False})
    whole = describe(model())
    for before, decision in zip(whole.blocks(), only.plan.blocks(), strict=True):
        block = before[2]
        mixer = decision.child(block, before[1].form, before[0]).mixer
        if isinstance(mixer, Conv):
            assert kind != "operators"
            continue
        heads, hidden = len(mixer.v), len(block.mixer.v)
        if kind == "tokens":
            assert decision.tokens is None
            assert not decision.only_prefix
        if kind == "heads":
            assert heads in (0, hidden)
        if kind == "depth":
            assert heads
            assert decision.hidden != ()
        if kind == "widths":
            assert {*mixer.qk, *mixer.v} <= {*block.mixer.qk}
            # Single neurons may come back to use up the budget only where some were cut.
            assert decision.hidden in (None, ())


def test_a_stopped_search_goes_on_with_the_same_bits(known, tmp_path, monkeypatch):
    whole = found(known, folder=tmp_path / "whole")
    lines = (tmp_path / "whole" / LOOKED).read_text().splitlines(keepends=True)
    assert len(lines) == len(whole.trials) - 1
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / LOOKED).write_text("".join(lines[:2]) + lines[2][:9])  # killed in the middle of a line
    again = found(known, folder=cut)
    assert again.plan == whole.plan
    assert [(trial["what"], trial["loss"]) for trial in again.trials[1:]] == [
        (trial["what"], trial["loss"]) for trial in whole.trials[1:]
    ]
    assert all(torch.equal(again.grafts[name], value) for name, value in whole.grafts.items())


def test_a_stopped_calibration_goes_on(tmp_path):
    """Losses that were measured are not measured again."""
    notes = Notes(tmp_path / CELLS)
    method = methods.get("post_training", {"tokens": False})
    data = digits(model())
    images, probe = method.images(data)
    first = method.calibrated(model(), data, images, probe, 0, notes=notes)
    lines = (tmp_path / CELLS).read_text().splitlines(keepends=True)
    name = json.loads(lines[0])[0]
    lines[0] = json.dumps([name, [0.125] * len(first.losses[name])]) + "\n"
    (tmp_path / CELLS).write_text("".join(lines[:5]))
    second = method.calibrated(model(), data, images, probe, 0, notes=Notes(tmp_path / CELLS))
    assert second.losses[name] == (0.125,) * len(first.losses[name])
    assert {k: v for k, v in second.losses.items() if k != name} == {k: v for k, v in first.losses.items() if k != name}
    assert second.merged == first.merged


def test_a_block_that_is_gone_is_two_constants(known):
    """Its loss is measured with both branches gone at once, and the child keeps the constants."""
    one = found(known, "macs=0.5", tokens=False, heads=False, widths=False, operators=False, candidates=0)
    child = apply(one.parent, one.plan, grafts=one.grafts)
    assert any(not block.hidden and not block.mixer.v for _, _, block in describe(child).blocks())


# -- bad input


def test_a_model_that_is_sure_of_its_own_images_is_cut_with_unweighted_statistics():
    sure = copy.deepcopy(model())
    with torch.no_grad():
        sure.head.weight.mul_(1e12)
    data = digits(sure)
    x = [pictures for pictures, _ in eval_loader(data.calibration, data.input, batch=16)]
    for worth in importances(sure, x, seed=0).values():
        assert torch.equal(worth.weights, torch.full_like(worth.weights, 1.1))
        assert torch.equal(worth.metric, torch.eye(len(worth.metric), dtype=torch.float64))
    one = methods.get("post_training", BRIEF).search(sure, data, Budget.parse("macs=0.7"), seed=0)
    assert cost_of(one.plan.child(describe(sure))).macs <= 0.7 * cost_of(describe(sure)).macs


def test_moments_of_activations_that_vary_little_around_their_mean_in_float32():
    draw = torch.Generator().manual_seed(0)
    x = (1000 + 1e-2 * torch.randn(3, 40, 6, generator=draw)).float()
    moments, exact = Moments("a"), Moments("a")
    for batch in x.split(1):
        moments.add(torch.ones(1, 40), batch, batch)
        exact.add(torch.ones(1, 40), batch.double(), batch.double())
    assert float(torch.linalg.eigvalsh(moments.gram).min()) > 0
    assert apart(moments.gram, exact.gram) < 1e-3
    assert apart(moments.mean, exact.mean) < 1e-6
    flat = x.double().flatten(0, 1)
    assert apart(exact.gram, torch.cov(flat.mT, correction=0)) < 1e-6


def test_eight_images_in_float32_are_enough():
    data = digits(model())
    few = dataclasses.replace(data, calibration=Subset(data.calibration, range(8)), validation=None)
    one = methods.get("post_training", BRIEF).search(model(), few, Budget.parse("macs=0.7"), seed=0)
    assert cost_of(one.plan.child(describe(model()))).macs <= 0.7 * cost_of(describe(model())).macs


# -- operators


def test_operators_alone_take_attentions_away(known):
    """The child runs, and its convolutions are those of the plan."""
    one = found(known, "macs=0.85", tokens=False, heads=False, widths=False, depth=False)
    child = apply(one.parent, one.plan, grafts=one.grafts).eval()
    mixers = [block.mixer for _, _, block in describe(child).blocks()]
    assert any(isinstance(mixer, Conv) for mixer in mixers)
    assert all(mixer.prefix == "attention" and mixer.act == "none" for mixer in mixers if isinstance(mixer, Conv))
    # Convolutions alone are a coarse choice in three blocks.
    assert 0.95 * 0.85 <= cost_of(describe(child)).macs / cost_of(describe(model())).macs <= 0.85
    assert {"3 x 3", "1 x 1"} & {way for trial in one.trials[1:] for way in " / ".join(trial["ways"]).split(" / ")}


def test_only_pointwise_convolutions_stand_behind_merged_patches(known):
    spec, table = describe(model()), read_calibration(Path(known))
    small = merging(spec, (2, 2, 0), False).child(spec)
    budget = Budget(macs=0.5)
    able, placed, few = [], [], dataclasses.replace(ALL, images=2)
    for (path, stage, block), here in zip(small.blocks(), small.arrivals(), strict=True):
        placed.append([kernel for kernel in (1, 3) if why_not_convolve(block, stage, here, kernel) is None])
        group = block_options(table, path, block, stage, here, budget, ALL)
        able.append({choice.conv.kernel for choice in group.choices if choice.conv is not None})
        # A fit takes more images than that, above all of few patches.
        assert all(
            choice.conv is None for choice in block_options(table, path, block, stage, here, budget, few).choices
        )
    assert placed == [[1, 3], [1], [1]]
    assert able[1] | able[2] == {1}


def test_wanted_operators_say_what_they_need():
    data = digits(model())
    few = dataclasses.replace(data, calibration=Subset(data.calibration, range(8)), validation=None)
    wanted = methods.get("post_training", {"operators": True})
    with pytest.raises(MethodError, match="a 3 x 3 convolution must have at least 27 images for this model, but got 7"):
        wanted.search(model(), few, Budget.parse("macs=0.7"), seed=0)
    sized = adopt(timm_model("vit", "dynamic", torch.float32))
    with pytest.raises(MethodError, match="operators=true must know the grid of patches"):
        wanted.search(sized, digits(sized), Budget.parse("macs=0.7"), seed=0)


# -- the report


def test_the_report_tells_what_was_tried_and_what_was_taken(known):
    trials = found(known).trials
    table = tried(trials)
    assert len(table.rows) == len(trials) - 1
    taken = [row for row in table.rows if row[-1] == "taken"]
    assert len(taken) == 1
    assert float(taken[0][2]) == min(float(row[2]) for row in table.rows)
    assert "time of dense" not in table.head
    timed = tried([trial | {"ratio": 0.5} for trial in trials])
    assert "time of dense" in timed.head
    assert tried([{"trial": 0, "macs": 5, "loss": 0.1}]) is None
