"""The last block computes the prefix tokens alone: exactly the same logits for less."""

import pytest
import torch

from tests.samples import PRESETS, adopted, apart, images, random_plan
from tests.tolerance import EXACT
from vitrim.cut import surgery
from vitrim.deploy import store
from vitrim.families import describe
from vitrim.measure import counted
from vitrim.words.costs import attention_macs, cost_of, mlp_macs
from vitrim.words.errors import DataError, PlanError
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Spec

READS_PREFIX = [
    (family, preset)
    for family, preset in PRESETS
    if describe(adopted(family, preset)).host.arguments.get("global_pool") == "token"
]


def leaving(spec: Spec) -> Plan:
    return Plan.of(spec, [BlockPlan(only_prefix=i == len(spec.blocks()) - 1) for i in range(len(spec.blocks()))])


@pytest.mark.parametrize(("family", "preset"), READS_PREFIX)
def test_it_is_exact_and_counted(family, preset):
    parent = adopted(family, preset)
    spec = describe(parent)
    child = surgery.apply(parent, leaving(spec))
    x = images(spec)
    with torch.no_grad():
        assert apart(child(x), parent(x)) < EXACT
    small = describe(child)
    assert cost_of(small).macs == counted(child).macs < cost_of(spec).macs
    assert cost_of(small).params == cost_of(spec).params


@pytest.mark.parametrize(("family", "preset"), READS_PREFIX)
@pytest.mark.parametrize("drops", ["", "mixed"])
def test_it_commutes_with_every_other_cut(family, preset, drops):
    parent = adopted(family, preset)
    spec = describe(parent)
    cut = random_plan(spec, 5, drops=drops)
    small = cut.child(spec)
    both = cut.then(leaving(small), spec)
    assert both.child(spec) == leaving(small).child(small)
    one, other = surgery.apply(parent, both), surgery.apply(surgery.apply(parent, leaving(spec)), cut)
    assert describe(one) == describe(other)
    assert cost_of(describe(one)).macs == counted(one).macs
    x = images(spec)
    with torch.no_grad():
        assert apart(one(x), surgery.apply(parent, cut)(x)) < EXACT
        assert apart(other(x), one(x)) < EXACT


def test_what_it_saves():
    """Queries, scores, mixing, projection and MLP of every patch; keys and values stay."""
    spec = describe(adopted("vit", "plain"))
    stage, block = spec.stages[0], spec.stages[0].blocks[-1]
    qk, v = sum(block.mixer.qk), sum(block.mixer.v)
    gone = stage.patches
    assert cost_of(spec).macs - cost_of(leaving(spec).child(spec)).macs == (
        gone * (stage.width + stage.tokens) * (qk + v) + mlp_macs(gone, stage.width, block.hidden)
    )
    assert attention_macs(9, 4, 6, 6, queries=9) == attention_macs(9, 4, 6, 6)


def test_it_is_stored(tmp_path):
    parent = adopted("vit", "registers")
    child = surgery.apply(parent, leaving(describe(parent)))
    store.save(child, tmp_path / "model.safetensors")
    again = store.load(tmp_path / "model.safetensors")
    assert describe(again) == describe(child)
    x = images(describe(child))
    with torch.no_grad():
        assert torch.equal(again.to(x)(x), child(x))


@pytest.mark.parametrize(
    ("preset", "place", "words"),
    [
        ("average", -1, "with 0 prefix tokens"),
        ("map", -1, "with 0 prefix tokens"),
        ("dynamic", -1, "it pools 'avg'"),
        ("plain", 0, "this is block 0 of 3"),
    ],
)
def test_it_is_refused_where_the_patches_are_needed(preset, place, words):
    spec = describe(adopted("vit", preset))
    blocks = [BlockPlan() for _ in spec.blocks()]
    blocks[place] = BlockPlan(only_prefix=True)
    with pytest.raises(PlanError, match=words):
        Plan.of(spec, blocks).child(spec)


def test_windows_refuse_it():
    spec = describe(adopted("swin", "windows"))
    with pytest.raises(PlanError, match="not possible on windowed attention"):
        leaving(spec).child(spec)


def test_timm_is_told():
    parent = adopted("vit", "plain")
    child = surgery.apply(parent, leaving(describe(parent)))
    with pytest.raises(DataError, match="must have every patch"):
        child.forward_intermediates(images(describe(parent)))
    with pytest.raises(DataError, match="only if the head reads the prefix tokens alone, but it pools 'avg'"):
        child.reset_classifier(5, "avg")
    child.reset_classifier(5)
    assert child(images(describe(parent)).float().to(next(child.parameters()).dtype)).shape == (2, 5)
    with pytest.raises(DataError, match="without attention masks"):
        child.blocks[-1](torch.zeros(1, 17, 48, dtype=torch.float64), attn_mask=torch.ones(17, 17, dtype=torch.bool))
