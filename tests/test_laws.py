"""The laws of docs/architecture.md, over every preset of every family and random plans."""

import copy

import pytest
import torch

from tests.samples import IDS, PRESETS, adopted, apart, images, masks_of, places, random_plan, timm_model
from tests.tolerance import EXACT, SINGLE
from vitrim import families
from vitrim.cut import surgery
from vitrim.cut.observe import Gated, axes, masked
from vitrim.families import describe
from vitrim.measure import counted
from vitrim.nn import Attention
from vitrim.words.costs import cost_of
from vitrim.words.errors import PlanError
from vitrim.words.plain import dump, load
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Spec

EACH = pytest.mark.parametrize(("family", "preset"), PRESETS, ids=IDS)
SEEDS = range(4)


@EACH
def test_mask_is_cut(family, preset):
    parent = adopted(family, preset)
    spec = describe(parent)
    x = images(spec)
    for seed in SEEDS:
        plan = random_plan(spec, seed)
        child = surgery.apply(parent, plan)
        with masked(parent, masks_of(spec, plan)), torch.no_grad():
            expected = parent(x)
        with torch.no_grad():
            assert apart(child(x), expected) < EXACT, f"seed {seed}"


@EACH
def test_mask_is_cut_for_tokens_in_the_exact_form(family, preset):
    """Of the tokens that stay: a head that pools patches sees fewer of them, and only that is another function."""
    parent = adopted(family, preset)
    spec = describe(parent)
    if spec.stages[0].window is not None:
        pytest.skip("no token can be cut on windows")
    x = images(spec)
    for seed in SEEDS:
        plan = random_plan(spec, seed, drops="exact")
        child = surgery.apply(parent, plan)
        with masked(parent, masks_of(spec, plan)), torch.no_grad():
            expected = parent.forward_features(x)[:, places(plan.child(spec))]
        with torch.no_grad():
            assert apart(child.forward_features(x), expected) < EXACT, f"seed {seed}"


@EACH
def test_cost_is_counted(family, preset):
    parent = adopted(family, preset)
    spec = describe(parent)
    for seed in (None, *SEEDS):
        model = parent if seed is None else surgery.apply(parent, random_plan(spec, seed, drops="mixed"))
        assert cost_of(describe(model)) == counted(model)
        hybrid = surgery.apply(parent, random_plan(spec, seed or 7, convs="folded"))
        assert cost_of(describe(hybrid)) == counted(hybrid)


@EACH
def test_nothing_is_identity(family, preset):
    parent = adopted(family, preset)
    spec = describe(parent)
    child = surgery.apply(parent, Plan.keep(spec))
    assert Plan.keep(spec).child(spec) == spec
    assert describe(child) == spec
    with torch.no_grad():
        assert torch.equal(child(images(spec)), parent(images(spec)))


@EACH
def test_plans_compose(family, preset):
    parent = adopted(family, preset)
    spec = describe(parent)
    for seed, more in [(s, {"drops": "mixed"}) for s in SEEDS] + [(s, {"convs": "mixed"}) for s in range(8)]:
        first = random_plan(spec, seed, **more)
        small = first.child(spec)
        second = random_plan(small, seed + 100, **more)
        steps = surgery.apply(surgery.apply(parent, first), second)
        once = surgery.apply(parent, first.then(second, spec))
        assert describe(steps) == describe(once)
        with torch.no_grad():
            assert torch.equal(steps(images(spec)), once(images(spec)))


@EACH
def test_paper_is_paper(family, preset):
    spec = describe(adopted(family, preset))
    assert load(Spec, dump(spec)) == spec
    for plan in [random_plan(spec, s, **more) for s in SEEDS for more in ({"drops": "mixed"}, {"convs": "mixed"})]:
        assert load(Plan, dump(plan)) == plan
        child = plan.child(spec)
        assert load(Spec, dump(child)) == child


@EACH
def test_built_from_paper(family, preset):
    parent = adopted(family, preset)
    spec = describe(parent)
    for more in ({"drops": "mixed"}, {"convs": "mixed"}):
        child = surgery.apply(parent, random_plan(spec, 3, **more))
        again = families.build(describe(child)).double().eval()
        again.load_state_dict(child.state_dict())
        assert describe(again) == describe(child)
        with torch.no_grad():
            assert torch.equal(again(images(spec)), child(images(spec)))


@EACH
def test_parent_is_untouched(family, preset):
    parent = adopted(family, preset)
    spec = describe(parent)
    before = {name: value.clone() for name, value in parent.state_dict().items()}
    child = surgery.apply(parent, random_plan(spec, 2, drops="mixed"))
    with torch.no_grad():
        for parameter in child.parameters():
            parameter.zero_()
    bad = Plan.of(spec, [BlockPlan(hidden=(5, 5))] * len(spec.blocks()))
    with pytest.raises(PlanError, match=r"kept indices must rise within|must be kept together"):
        surgery.apply(parent, bad)
    assert describe(parent) == spec
    assert all(torch.equal(value, before[name]) for name, value in parent.state_dict().items())


@EACH
def test_fused_is_unfused(family, preset):
    parent = adopted(family, preset)
    spec = describe(parent)
    for seed in SEEDS:
        child = surgery.apply(parent, random_plan(spec, seed, drops="mixed"))
        answers = []
        for fused in (True, False):
            for module in child.modules():
                if isinstance(module, Attention):
                    module.fused_attn = fused
            with torch.no_grad():
                answers.append(child(images(spec)))
        assert apart(answers[0], answers[1]) < EXACT


@EACH
def test_guest_keeps_logits_and_names(family, preset):
    guest = timm_model(family, preset, torch.float32)
    before = {name: value.clone() for name, value in guest.state_dict().items()}
    ours = families.adopt(guest)
    assert type(ours) is type(guest)
    assert list(ours.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in guest.state_dict().items())
    assert not {p.data_ptr() for p in ours.parameters()} & {p.data_ptr() for p in guest.parameters()}
    x = images(describe(guest), dtype=torch.float32)
    with torch.no_grad():
        assert apart(ours(x), guest(x)) < SINGLE


@EACH
def test_gates_through_weights_equal_gates_at_taps(family, preset):
    parent = copy.deepcopy(adopted(family, preset))
    spec = describe(parent)
    gates = {path: torch.randn(axis.size, dtype=torch.float64) for path, axis in axes(parent).items() if axis.scales}
    gated = Gated(parent, gates)
    weight = next(p for name, p in parent.named_parameters() if name.endswith("qkv.weight"))
    taps = {path: gate.clone().requires_grad_() for path, gate in gates.items()}
    with masked(parent, taps):
        expected = parent(images(spec))
    expected.square().mean().backward()
    wanted = weight.grad.clone()
    parent.zero_grad()
    got = gated(images(spec))
    got.square().mean().backward()
    assert apart(got, expected) < EXACT
    assert apart(weight.grad, wanted) < EXACT
    for path, gate in taps.items():
        assert apart(gated.gate(path).grad, gate.grad) < EXACT
    with torch.no_grad():
        folded = gated.fold_()(images(spec))
    assert apart(folded, expected) < EXACT
