"""Blocks that run on fewer patches: what a plan may drop, what the model then computes, and what timm is told."""

import copy
import pickle

import pytest
import torch
from pydantic import ValidationError

from tests.samples import adopted, apart, images, random_plan
from tests.tolerance import EXACT, SINGLE
from vitrim import families
from vitrim.cut import surgery
from vitrim.deploy import store
from vitrim.families import describe
from vitrim.families.vit import example
from vitrim.report.blocks import sheet, total
from vitrim.report.tables import plan_table
from vitrim.words.costs import cost_of
from vitrim.words.errors import DataError, PlanError
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Stage
from vitrim.words.steps.drop import Drop


def dropping(spec, *kept, exact=False):
    """A plan that keeps these patches, one entry a block, None for no decision."""
    steps = [None if places is None else Drop(kept=places, exact=exact) for places in kept]
    steps += [None] * (len(spec.blocks()) - len(steps))
    return Plan.of(spec, [BlockPlan(tokens=step) for step in steps])


def kept_by(spec):
    return [None if block.tokens is None else block.tokens.kept for _, _, block in spec.blocks()]


EVEN, FOURTH = tuple(range(0, 16, 2)), (0, 4, 8, 12)


def test_dropped_is_gone():
    """The blocks run on the tokens that are left, as they would on tokens picked by hand."""
    parent = adopted("vit", "registers")
    spec = describe(parent)
    child = surgery.apply(parent, dropping(spec, EVEN, None, FOURTH))
    x = images(spec)
    with torch.no_grad():
        t = parent.norm_pre(parent.patch_drop(parent._pos_embed(parent.patch_embed(x))))
        prefix = list(range(spec.stages[0].prefix))
        t = t[:, prefix + [len(prefix) + i for i in EVEN]]
        t = parent.blocks[1](parent.blocks[0](t))
        t = parent.blocks[2](t[:, prefix + [len(prefix) + EVEN.index(i) for i in FOURTH]])
        assert apart(child(x), parent.forward_head(parent.norm(t))) < EXACT


def test_blocks_after_run_on_no_others():
    spec = describe(adopted("vit", "plain"))
    assert kept_by(dropping(spec, None, EVEN).child(spec)) == [None, EVEN, EVEN]
    assert dropping(spec, range(16)).child(spec) == spec


@pytest.mark.parametrize("preset", ["plain", "average"])
def test_exact_differs_from_gone_even_without_biases(preset):
    """Without a bias the missing tokens answer with zeros: their keys still take their share of each softmax."""
    parent = adopted("vit", preset)
    spec = describe(parent)
    gone, exact = (surgery.apply(parent, dropping(spec, FOURTH, exact=e)) for e in (False, True))
    x = images(spec)
    with torch.no_grad():
        assert apart(gone(x), exact(x)) > 1e-3
        assert apart(gone(x), parent(x)) > 1e-3
    macs = [cost_of(describe(model)).macs for model in (gone, exact)]
    assert macs[0] < macs[1] < cost_of(spec).macs


def test_fewer_places_by_a_later_plan():
    spec = describe(adopted("vit", "plain"))
    first = dropping(spec, None, EVEN, FOURTH)
    small = first.child(spec)
    assert kept_by(dropping(small, (0, 2, 3, 4)).child(small)) == [(0, 2, 3, 4), (0, 2, 4), (0, 4)]
    again = first.then(dropping(small, (0, 2, 3, 4)), spec)
    assert kept_by(again.child(spec)) == [(0, 2, 3, 4), (0, 2, 4), (0, 4)]
    assert first.then(Plan.keep(small), spec).child(spec) == small


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        ([(0, 16)], r"stages\.0\.blocks\.0\.tokens: kept places must lie within the grid's 16, but one is 16"),
        ([EVEN, (0, 1)], r"stages\.0\.blocks\.1\.tokens: patches that were dropped before cannot be kept, but \[1\]"),
        ([None, FOURTH, EVEN], r"stages\.0\.blocks\.2\.tokens: patches that were dropped before"),
    ],
    ids=["outside", "back", "more"],
)
def test_impossible_places_are_refused(kept, words):
    spec = describe(adopted("vit", "plain"))
    with pytest.raises(PlanError, match=words):
        dropping(spec, *kept).child(spec)
    small = dropping(spec, EVEN).child(spec)
    with pytest.raises(PlanError, match="cannot be kept"):
        dropping(small, (1,)).child(small)


def test_windows_refuse_token_cuts_with_a_sentence():
    spec = describe(adopted("swin", "windows"))
    with pytest.raises(
        PlanError, match=r"stages\.0\.blocks: token cuts are not possible on windowed attention: windows"
    ):
        dropping(spec, FOURTH).child(spec)
    stage = spec.stages[0].model_dump()
    stage["blocks"][0]["tokens"] = {"kind": "drop", "kept": [0]}
    with pytest.raises(ValidationError, match="token cuts are not possible on windowed attention"):
        Stage.model_validate(stage)


def test_a_hand_made_spec_must_shrink_and_rise():
    stage = describe(adopted("vit", "plain")).stages[0].model_dump()
    stage["blocks"][0]["tokens"] = {"kind": "drop", "kept": [0, 3]}
    with pytest.raises(ValidationError, match=r"blocks\.1\.tokens: .* but all are kept here"):
        Stage.model_validate(stage)
    with pytest.raises(ValidationError, match="kept places must rise"):
        Drop(kept=(2, 2))


def test_nothing_left_where_nothing_may_be():
    """A class token can be left alone; patches that are pooled cannot, nor can a model without other tokens."""
    parent = adopted("vit", "plain")
    spec = describe(parent)
    for exact in (False, True):
        child = surgery.apply(parent, dropping(spec, None, (), exact=exact))
        assert torch.isfinite(child(images(spec))).all()
    for model, words in (
        (adopted("vit", "average"), "must keep a patch, but none is left"),
        (example(global_pool="avg"), r"pools patches \(avg\)"),
        (adopted("vit", "dynamic"), "must be dropped on one grid, but dynamic_img_size is on"),
    ):
        spec = describe(model)
        with pytest.raises(PlanError, match=words):
            dropping(spec, ()).child(spec)


def test_random_patch_dropping_is_refused():
    spec = describe(example(patch_drop_rate=0.5))
    with pytest.raises(PlanError, match="must not be dropped at random"):
        dropping(spec, EVEN).child(spec)


def test_average_pools_what_is_left():
    parent = adopted("vit", "average")
    spec = describe(parent)
    child = surgery.apply(parent, dropping(spec, None, None, EVEN))
    x = images(spec)
    with torch.no_grad():
        features = child.forward_features(x)
        assert features.shape[1] == len(EVEN)
        assert apart(child(x), child.head(child.fc_norm(features.mean(dim=1)))) < EXACT


class TestTimmIsToldTheTruth:
    @pytest.fixture
    def child(self):
        parent = adopted("vit", "registers")
        return surgery.apply(parent, dropping(describe(parent), EVEN, None, FOURTH))

    def test_maps_are_refused(self, child):
        x = images(describe(child))
        with pytest.raises(DataError, match="maps of features must have every patch, but this model drops some; use"):
            child.forward_intermediates(x)
        with pytest.raises(DataError, match="maps of features"):
            child.get_intermediate_layers(x, reshape=True)

    @pytest.mark.parametrize("how", ["same", "deepcopy", "pickle", "adopt", "cut"])
    def test_tokens_are_given(self, child, how):
        again = {
            "same": lambda: child,
            "deepcopy": lambda: copy.deepcopy(child),
            "pickle": lambda: pickle.loads(pickle.dumps(child)),
            "adopt": lambda: families.adopt(child),
            "cut": lambda: surgery.apply(child, Plan.keep(describe(child))),
        }[how]()
        with torch.no_grad():
            for parameter in again.blocks[0].parameters():
                parameter.mul_(1.01)
        x = images(describe(child))
        with torch.no_grad():
            final, parts = again.forward_intermediates(x, output_fmt="NLC")
            assert torch.equal(final, again.forward_features(x))
        assert [part.shape[1] for part in parts] == [8, 8, 4]
        with pytest.raises(DataError, match="maps of features"):
            again.forward_intermediates(x, output_fmt="NCHW")

    def test_size_and_masks_are_refused(self, child):
        with pytest.raises(DataError, match=r"must not change, because patches are dropped at places of the grid; set"):
            child.set_input_size(img_size=64)
        mask = torch.ones(19, 19, dtype=torch.bool)
        with pytest.raises(DataError, match="must be run without attention masks"):
            child.forward_features(images(describe(child)), attn_mask=mask)

    def test_head_and_groups(self, child):
        child = copy.deepcopy(child)
        child.reset_classifier(3)
        child.double()  # timm before 1.0.21 builds what it sets anew in float32
        assert describe(child).classes == 3
        assert child(images(describe(child))).shape == (2, 3)
        assert isinstance(child, type(adopted("vit", "registers")))


def test_other_grids_are_refused_when_they_come():
    parent = adopted("vit", "plain")
    child = surgery.apply(parent, dropping(describe(parent), EVEN))
    with pytest.raises(DataError, match="must be given 17, but got 26; the places are tied to the grid"):
        child.blocks[0](torch.zeros(1, 26, 48, dtype=torch.float64))


@pytest.mark.parametrize(("family", "preset"), [("vit", "distilled"), ("vit", "map"), ("t2t", "performer")])
def test_stored_and_read(family, preset, tmp_path):
    parent = adopted(family, preset)
    child = surgery.apply(parent, random_plan(describe(parent), 1, drops="mixed"))
    store.save(child, tmp_path / "model.safetensors")
    again = store.load(tmp_path / "model.safetensors")
    x = images(describe(child))
    assert describe(again) == describe(child)
    with torch.no_grad():
        assert torch.equal(again(x), child(x))


@pytest.mark.parametrize("exact", [False, True])
def test_exported_child_answers_the_same(exact):
    parent = families.adopt(example())
    child = surgery.apply(parent, dropping(describe(parent), EVEN, None, FOURTH, exact=exact)).eval()
    x = images(describe(child), dtype=torch.float32)
    program = torch.export.export(child, (x,))
    with torch.no_grad():
        assert apart(program.module()(x), child(x)) < SINGLE
        with torch.autocast("cpu", torch.bfloat16):
            assert apart(child(x).float(), program.module()(x)) < 0.1


@pytest.mark.parametrize("preset", ["plain", "map"])
def test_the_sheet_sums_to_the_cost(preset):
    parent = adopted("vit", preset)
    spec = describe(parent)
    for seed in range(3):
        plan = random_plan(spec, seed, drops="mixed")
        row = total(sheet(spec, plan))
        assert (row.macs, row.params) == cost_of(plan.child(spec))
        assert (row.macs_before, row.params_before) == cost_of(spec)


def test_the_sheet_tells_the_tokens():
    spec = describe(adopted("vit", "distilled"))
    table = plan_table(spec, dropping(spec, None, EVEN))
    column = table.head.index("tokens")
    assert [row[column] for row in table.rows] == ["18 of 18", "10 of 18", "10 of 18", "", ""]
    assert "tokens" not in plan_table(spec, Plan.keep(spec)).head
