"""Tokens chosen by attention, image by image: what stays, in what order, what it costs and who may ask for it."""

import copy

import pytest
import torch
from pydantic import ValidationError

from tests.samples import PRESETS, adopted, apart, images
from tests.tolerance import EXACT, SINGLE
from vitrim import families
from vitrim.cut import surgery
from vitrim.deploy import store
from vitrim.families import describe
from vitrim.measure import counted
from vitrim.nn import Attention
from vitrim.nn.attention import Heard
from vitrim.nn.steps.top_k import Chosen
from vitrim.words.costs import cost_of
from vitrim.words.errors import PlanError
from vitrim.words.plain import dump, load
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Skip, Spec
from vitrim.words.steps.drop import Drop
from vitrim.words.steps.top_k import TopK

PLAIN = [(family, preset) for family, preset in PRESETS if family in ("vit", "t2t")]


def choosing(spec, *steps, **more):
    steps = [*steps, *[None] * (len(spec.blocks()) - len(steps))]
    return Plan.of(spec, [BlockPlan(tokens=step, **more) for step in steps])


def step_of(spec, keep=0.6, **options):
    stage = spec.stages[0]
    return TopK(kept=stage.prefix + max(1, int(keep * stage.patches)), **options)


def attended(model, block, x):
    """The attention that tokens get of the first one (or of all), by hand, and the residual after attention."""
    seen = {}
    handles = [
        block.attn.q_tap.register_forward_hook(lambda m, i, o: seen.__setitem__("q", o)),
        block.attn.k_tap.register_forward_hook(lambda m, i, o: seen.__setitem__("k", o)),
    ]
    mixed = block.drop_path1(block.ls1(block.attn(block.norm1(x))))
    for handle in handles:
        handle.remove()
    q, k = (seen[name].unflatten(-1, (len(block.attn.qk), -1)).transpose(1, 2) for name in "qk")
    weights = (q @ k.transpose(-2, -1) * block.attn.scale).softmax(dim=-1)
    return weights.mean(dim=1), x + mixed


@pytest.mark.parametrize(("family", "preset"), PLAIN)
def test_the_most_attended_stay_and_the_rest_is_their_mean(family, preset):
    model = adopted(family, preset)
    spec = describe(model)
    prefix, step = spec.stages[0].prefix, step_of(spec)
    child = surgery.apply(model, choosing(spec, step))
    heard = {}
    child.blocks[0].norm2.register_forward_hook(lambda m, i, o: heard.__setitem__("after", i[0]))
    model.blocks[0].register_forward_hook(lambda m, i, o: heard.__setitem__("x", i[0]))
    with torch.no_grad():
        x = images(spec, 3)
        model(x)
        child(x)
        weights, residual = attended(model, model.blocks[0], heard["x"])
    model.blocks[0]._forward_hooks.clear()
    score = weights[:, 0] if prefix else weights.mean(dim=1)
    score[:, :prefix] = 9
    for image in range(3):
        kept = sorted(score[image].argsort(descending=True)[: step.kept].tolist())
        assert kept[:prefix] == list(range(prefix))
        others = [i for i in range(residual.shape[1]) if i not in kept]
        wanted = torch.cat([residual[image, kept], residual[image, others].mean(dim=0, keepdim=True)])
        assert apart(heard["after"][image], wanted) < EXACT
    assert heard["after"].shape[1] == step.kept + 1


@pytest.mark.parametrize(("family", "preset"), PLAIN)
def test_cost_is_counted_and_paper_is_paper(family, preset, tmp_path):
    model = adopted(family, preset)
    spec = describe(model)
    plan = choosing(spec, step_of(spec), None, step_of(spec, 0.3))
    assert load(Plan, dump(plan)) == plan
    child = surgery.apply(model, plan)
    assert load(Spec, dump(describe(child))) == describe(child) == plan.child(spec)
    assert cost_of(describe(child)) == counted(child)
    assert cost_of(describe(child)).macs < cost_of(spec).macs
    store.save(child, tmp_path / "child.safetensors", provenance={})
    x = images(spec)
    with torch.no_grad():
        assert torch.equal(store.load(tmp_path / "child.safetensors")(x), child(x))
        # Each image by itself: what it keeps does not depend on its neighbours.
        assert apart(torch.cat([child(x[:1]), child(x[1:])]), child(x)) < EXACT


def test_plans_compose_and_cuts_before_and_after_agree():
    model = adopted("vit", "plain")
    spec = describe(model)
    first, second = choosing(spec, step_of(spec)), Plan.of(spec, [BlockPlan(hidden=tuple(range(50)))] * 3)
    once = surgery.apply(model, first.then(second, spec))
    steps = surgery.apply(surgery.apply(model, first), second)
    with torch.no_grad():
        assert torch.equal(once(images(spec)), steps(images(spec)))
    assert describe(once) == describe(steps)


def test_images_keep_different_patches():
    model = adopted("vit", "plain")
    spec = describe(model)
    block = model.blocks[0]
    chosen = Chosen(step_of(spec, 0.4), 1)
    x = torch.randn(2, 17, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        q, k, _ = block.attn.qkv(block.norm1(x)).chunk(3, dim=-1)
        heard = Heard(q, k, block.attn.qk, block.attn.scale)
        scores = chosen.scores(heard)
        out = chosen.after_attention(x, heard)
    first, second = (set(row.topk(7).indices.tolist()) for row in scores)
    assert first != second
    assert torch.equal(out[:, 0], x[:, 0])
    places = [[int((x[i] == row).all(dim=1).nonzero()) for row in out[i, :-1]] for i in range(2)]
    assert all(row == sorted(row) for row in places)


def test_a_distillation_token_stays_second():
    model = adopted("vit", "distilled")
    spec = describe(model)
    child = surgery.apply(model, choosing(spec, TopK(kept=3), None, TopK(kept=3)))
    assert [flow.leaves.total for flow in child.blocks and describe(child).flows()] == [4, 4, 4]
    heard = {}
    child.norm.register_forward_hook(lambda m, i, o: heard.__setitem__("x", o))
    x = images(spec)
    with torch.no_grad():
        assert torch.equal(child.head_dist(heard["x"][:, 1]) if child(x) is None else child(x), child(x))
        wanted = (child.head(heard["x"][:, 0]) + child.head_dist(heard["x"][:, 1])) / 2
        assert apart(child(x), wanted) < EXACT


def test_weights_multiply_the_attention():
    model = adopted("vit", "plain")
    spec = describe(model)
    favourite = tuple(1.0 if place in (3, 9) else 0.0 for place in range(16))
    child = surgery.apply(model, choosing(spec, TopK(kept=3, by="hsic_attn", weights=favourite)))
    heard = {}
    child.blocks[0].norm2.register_forward_hook(lambda m, i, o: heard.__setitem__("after", i[0]))
    model.blocks[0].norm2.register_forward_hook(lambda m, i, o: heard.__setitem__("dense", i[0]))
    with torch.no_grad():
        child(images(spec))
        model(images(spec))
    model.blocks[0].norm2._forward_hooks.clear()
    assert apart(heard["after"][:, :3], heard["dense"][:, [0, 4, 10]]) < EXACT


def test_without_fusing_the_rest_is_gone():
    model = adopted("vit", "plain")
    spec = describe(model)
    child = surgery.apply(model, choosing(spec, TopK(kept=5, fused=False)))
    assert [flow.leaves.total for flow in describe(child).flows()] == [5, 5, 5]
    assert cost_of(describe(child)) == counted(child)


def test_as_many_as_arrive_change_nothing():
    model = adopted("vit", "plain")
    spec = describe(model)
    child = surgery.apply(model, choosing(spec, TopK(kept=17), TopK(kept=40)))
    with torch.no_grad():
        assert torch.equal(child(images(spec)), model(images(spec)))
    assert cost_of(describe(child)) == cost_of(spec)


def test_after_patches_were_dropped_and_with_prefix_tokens_alone():
    model = adopted("vit", "plain")
    spec = describe(model)
    plan = choosing(spec, Drop(kept=tuple(range(12))), TopK(kept=6), None)
    child = surgery.apply(model, plan)
    assert [flow.leaves.total for flow in describe(child).flows()] == [13, 7, 7]
    assert cost_of(describe(child)) == counted(child)
    last = [BlockPlan(), BlockPlan(tokens=TopK(kept=6)), BlockPlan(only_prefix=True)]
    both = surgery.apply(model, Plan.of(spec, last))
    plain = surgery.apply(model, Plan.of(spec, [*last[:2], BlockPlan()]))
    with torch.no_grad():
        assert apart(both(images(spec)), plain(images(spec))) < EXACT
    assert cost_of(describe(both)) == counted(both)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tokens": TopK(kept=1)}, "a patch must be kept besides 1 prefix tokens"),
        ({"tokens": TopK(kept=5), "mixer": Skip()}, "must keep a head, but it keeps none"),
        ({"tokens": TopK(kept=5), "v": ((),) * 3}, "must keep a head, but it keeps none"),
        ({"tokens": TopK(kept=5, by="hsic_attn", weights=(1.0,))}, "for each of 16 patches, but are for 1"),
    ],
)
def test_impossible_choices_are_refused(fields, words):
    spec = describe(adopted("vit", "plain"))
    with pytest.raises(PlanError, match=words):
        Plan.of(spec, [BlockPlan(**fields), BlockPlan(), BlockPlan()]).child(spec)


def test_words_are_strict():
    with pytest.raises(ValidationError, match="weights must be given for hsic_attn only"):
        TopK(kept=3, weights=(1.0,))
    swin = describe(adopted("swin", next(p for f, p in PRESETS if f == "swin")))
    with pytest.raises(PlanError, match="windowed attention"):
        choosing(swin, TopK(kept=3)).child(swin)


def test_gradients_pass_and_half_precision_runs():
    model = copy.deepcopy(adopted("vit", "plain"))
    spec = describe(model)
    child = surgery.apply(model, choosing(spec, step_of(spec)))
    child(images(spec)).sum().backward()
    assert all(parameter.grad is not None for parameter in child.parameters())
    small = child.bfloat16()
    with torch.no_grad():
        assert bool(torch.isfinite(small(images(spec).bfloat16())).all())


def test_exported_with_a_free_batch():
    """Counts are static, the batch is not: what torch.export and ONNX need."""
    model = families.adopt(families.get("vit").example()).eval()
    spec = describe(model)
    child = surgery.apply(model, choosing(spec, step_of(spec), None, step_of(spec, 0.3)))
    x = images(spec, 3, torch.float32)
    program = torch.export.export(child, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    with torch.no_grad():
        for count in (1, 5):
            y = images(spec, count, torch.float32)
            assert apart(program.module()(y), child(y)) < SINGLE


def test_heads_of_several_widths_choose_too():
    model = adopted("vit", "plain")
    spec = describe(model)
    fields = {"v": ((0, 1), (0, 1, 2), (4,)), "qk": ((0, 1), (0, 5, 7), (1,))}
    child = surgery.apply(model, Plan.of(spec, [BlockPlan(tokens=TopK(kept=6), **fields), BlockPlan(), BlockPlan()]))
    assert isinstance(child.blocks[0].attn, Attention)
    assert not child.blocks[0].attn.even
    with torch.no_grad():
        assert bool(torch.isfinite(child(images(spec))).all())
    assert cost_of(describe(child)) == counted(child)
