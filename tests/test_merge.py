"""Merging of patches: what must hold whatever is merged, and what it computes."""

import copy
import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.samples import PRESETS, adopted, apart, images, random_plan
from tests.tolerance import EXACT
from vitrim import families
from vitrim.cut import surgery
from vitrim.deploy import export, store
from vitrim.families import blocks_of, describe
from vitrim.measure import counted
from vitrim.nn.attention import Heard
from vitrim.nn.steps.merge import Merged
from vitrim.nn.stream import Stream
from vitrim.words.costs import cost_of
from vitrim.words.errors import DataError, PlanError
from vitrim.words.plain import dump, load
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Spec, why_not_mixed
from vitrim.words.steps.merge import Merge

WITHOUT_WINDOWS = [
    (family, preset) for family, preset in PRESETS if why_not_mixed(describe(adopted(family, preset)).stages[0]) is None
]


OURS: dict[str, Any] = {"by": "tokens", "keeps_norm": True}
FORMS = pytest.mark.parametrize("form", [{}, OURS], ids=["published", "ours"])


def merging(spec: Spec, count: int = 1, **form: Any) -> Plan:
    """Merge in every block but the last, which leaves patches behind where the head reads none."""
    last, reads = len(spec.blocks()) - 1, spec.host.arguments.get("global_pool") == "token"
    return Plan.of(
        spec,
        [
            BlockPlan(tokens=Merge(count=count, **form) if i < last else None, only_prefix=reads and i == last)
            for i in range(last + 1)
        ],
    )


@pytest.mark.parametrize(("family", "preset"), WITHOUT_WINDOWS)
def test_cost_is_counted_and_paper_is_paper(family, preset, tmp_path):
    parent = adopted(family, preset)
    spec = describe(parent)
    plan = merging(spec, **(OURS if len(preset) % 2 else {}))
    assert load(Plan, dump(plan)) == plan
    child = surgery.apply(parent, plan)
    small = describe(child)
    assert small == plan.child(spec)
    assert cost_of(small).macs == counted(child).macs < cost_of(spec).macs
    assert cost_of(small).params == cost_of(spec).params
    x = images(spec)
    with torch.no_grad():
        wanted = child(x)
        assert wanted.shape == parent(x).shape
        found = store.load(store.save(child, tmp_path / "m.safetensors"))(x)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("preset", ["plain", "average", "map", "registers"])
def test_merging_commutes_with_every_other_cut(preset):
    parent = adopted("vit", preset)
    spec = describe(parent)
    cut = random_plan(spec, 5)
    small = cut.child(spec)
    both = cut.then(merging(small), spec)
    assert both.child(spec) == merging(small).child(small)
    one = surgery.apply(parent, both)
    assert cost_of(describe(one)).macs == counted(one).macs
    x = images(spec)
    with torch.no_grad():
        assert torch.equal(one(x), surgery.apply(surgery.apply(parent, cut), merging(small))(x))


@FORMS
@pytest.mark.parametrize("preset", ["plain", "average", "map", "qk_norm", "registers"])
def test_merging_equal_tokens_changes_nothing(preset, form):
    """Pairs of equal patches, merged in block 0: attention counts them twice, and pools read them twice."""
    parent = adopted("vit", preset)
    spec = describe(parent)
    pairs = spec.stages[0].patches // 2
    plan = [
        decision if i else BlockPlan(tokens=Merge(count=pairs, **form))
        for i, decision in enumerate(Plan.keep(spec).blocks())
    ]
    child = surgery.apply(parent, Plan.of(spec, plan))

    def pair(_module, inputs):
        x, prefix = inputs[0], spec.stages[0].prefix
        return torch.cat([x[:, :prefix], x[:, prefix : prefix + pairs].repeat_interleave(2, dim=1)], dim=1)

    logits = []
    for model in (copy.deepcopy(parent), copy.deepcopy(child)):
        blocks_of(model)[0][1].register_forward_pre_hook(pair)
        with torch.no_grad():
            logits.append(model(images(spec)))
    assert apart(logits[1], logits[0]) < EXACT


def test_unfused_attention_counts_sizes_too():
    parent = adopted("vit", "plain")
    child = copy.deepcopy(surgery.apply(parent, merging(describe(parent), 3)))
    x = images(describe(parent))
    with torch.no_grad():
        fused = child(x)
        for _, block in blocks_of(child):
            block.attn.fused_attn = False
        assert apart(child(x), fused) < EXACT


@FORMS
@pytest.mark.parametrize("sized", [False, True])
def test_what_a_merge_computes(form, sized):
    """Against the sets, pairs and means made one by one."""
    draw = torch.Generator().manual_seed(2)
    x, keys = (torch.randn(1, 9, 4, generator=draw, dtype=torch.float64) for _ in range(2))
    sizes = torch.tensor([1, 3, 1, 1, 2, 1, 1, 4, 1] if sized else [1] * 9, dtype=torch.float32)[None, :, None]
    step = Merged(1, 2, **form)
    assert step.needs_attention == (not form)
    heard = Heard(keys, keys, (4,), 1.0) if step.needs_attention else None
    out, after, _ = step.after_attention(Stream(x, sizes, 14) if sized else x, heard)
    first, second = [1, 3, 5, 7], [2, 4, 6, 8]

    def score(a, b):
        cosine = float(F.cosine_similarity(*((x if form else keys)[0, [a, b]]), dim=0))
        one, two = float(sizes[0, a]), float(sizes[0, b])
        return -(1 - cosine) * math.sqrt(one * two / (one + two)) if form else cosine

    alike = {(a, b): score(a, b) for a in first for b in second}
    partner = {a: max(second, key=lambda b: alike[a, b]) for a in first}
    gone = sorted(first, key=lambda a: -alike[a, partner[a]])[:2]
    kept = [0, *(a for a in first if a not in gone), *second]
    members = {i: [i, *(a for a in gone if partner[a] == i)] for i in kept}
    assert max(map(len, members.values())) > 1
    for place, i in enumerate(kept):
        weights = sizes[0, members[i]]
        mean = (weights * x[0, members[i]]).sum(0) / weights.sum()
        if form:
            norms = x[0, members[i]].norm(dim=-1, keepdim=True)
            mean *= (weights * norms).sum() / weights.sum() / mean.norm()
        assert torch.allclose(out[0, place], mean, rtol=0, atol=EXACT)
        assert float(after[0, place]) == float(weights.sum())
    assert float(after.sum()) == float(sizes.sum())


def test_large_tokens_are_merged_less_often():
    """Three patches alike but for their sizes: of two equal distances, that of the small ones is merged."""
    x = torch.tensor([[[1.0, 0], [1, 0], [1, 0.1], [-1, 0], [-1, 0.1]]], dtype=torch.float64)
    sizes = torch.tensor([1.0, 5, 5, 1, 1])[None, :, None]
    out, after, _ = Merged(1, 1, "tokens").after_attention(Stream(x, sizes, 12), None)
    assert after.flatten().tolist() == [1, 5, 5, 2]
    assert torch.equal(out[0, 1], x[0, 1])


def test_each_token_is_repeated_by_its_size():
    x = torch.arange(5.0)[None, :, None]
    sizes = torch.tensor([1.0, 2.0, 1.0, 3.0, 1.0])[None, :, None]
    assert Stream(x, sizes, 7).repeated(1).flatten().tolist() == [0, 1, 1, 2, 3, 3, 3, 4]


def test_what_cannot_be_merged_is_refused():
    parent = adopted("vit", "plain")
    spec = describe(parent)
    with pytest.raises(PlanError, match="at most half of the 16 patches can be merged, but 9"):
        merging(spec, 9).child(spec)
    swin = describe(adopted("swin", "windows"))
    with pytest.raises(PlanError, match="token cuts are not possible on windowed attention"):
        Plan.of(swin, [BlockPlan(tokens=Merge(count=1))] * len(swin.blocks())).child(swin)
    child = surgery.apply(parent, merging(spec))
    with pytest.raises(DataError, match="features of single blocks"):
        child.forward_intermediates(images(spec), output_fmt="NLC")
    with pytest.raises(DataError, match="without attention masks"):
        blocks_of(child)[1][1](torch.zeros(1, 16, 49, dtype=torch.float64), is_causal=True)


@pytest.mark.whole
def test_merging_is_exported_with_static_counts(tmp_path):
    torch.manual_seed(0)
    parent = families.adopt(families.get("vit").example(depth=2).eval())
    spec = describe(parent)
    child = surgery.apply(parent, merging(spec, 3, **OURS))
    export.export(child, tmp_path / "model.onnx")
    _, run = export.onnx_session(tmp_path / "model.onnx")
    for count in (1, 5):
        x = images(spec, count, torch.float32)
        with torch.no_grad():
            assert apart(run(x), child(x)) < export.PARITY


@pytest.mark.parametrize("name", ["model.pt2", pytest.param("model.onnx", marks=pytest.mark.whole)])
def test_a_pooled_head_is_exported_too(name, tmp_path):
    torch.manual_seed(0)
    parent = families.adopt(families.get("vit").example(class_token=False, global_pool="avg", depth=2).eval())
    spec = describe(parent)
    child = surgery.apply(parent, merging(spec, 3, **OURS))
    export.export(child, tmp_path / name)
    run = (
        export.onnx_session(tmp_path / name)[1]
        if name.endswith(".onnx")
        else torch.export.load(tmp_path / name).module()
    )
    x = images(spec, 3, torch.float32)
    with torch.no_grad():
        assert apart(run(x), child(x)) < export.PARITY
