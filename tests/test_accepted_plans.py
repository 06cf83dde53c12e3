"""Law 13: a plan is refused with a sentence where it meets the spec, or the model that it makes works in every way."""

import collections
import copy
import functools
import warnings

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.samples import FEW as FIRST
from tests.samples import IDS, PRESETS, WHOLE, apart, images, keeps_constants, timm_model
from tests.tolerance import SINGLE
from vitrim import families
from vitrim.cut import surgery
from vitrim.deploy import store
from vitrim.deploy.export import export
from vitrim.families import describe
from vitrim.measure import counted
from vitrim.testing.plans import kinds_in, plans, steps
from vitrim.words.costs import cost_of
from vitrim.words.errors import PlanError, VitrimError
from vitrim.words.plain import dump, load
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Conv
from vitrim.words.steps import kinds

OTHERS = {
    "conv1",
    "conv3",
    "linear",
    "mixture",
    "reads",
    "skip",
    "skip_norm",
    "dead_attention",
    "dead_mlp",
    "skipped_mlp",
    "only_prefix",
    "width",
}
EXAMPLES = 60 if WHOLE else 32
BATCH = None if WHOLE else 2
"""Of an exported file; tracing any batch takes twice as long, and `test_export.py` does it for every family."""
# Without shrinking, which takes minutes of forward passes; the plan that fails is printed as it was drawn.
FEW = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)


PRESETS_OF_T2T = [preset for family, preset in PRESETS if family == "t2t"]


@functools.cache
def parent(family: str, preset: str) -> torch.nn.Module:
    return families.adopt(timm_model(family, preset, torch.float32))


def accepted(plan: Plan, spec):
    """The child's spec, or None where the plan is refused; nothing else may happen."""
    try:
        return plan.child(spec)
    except PlanError as problem:
        said = str(problem)
    assert "\n" not in said
    assert len(said) > 20
    return None


def test_what_a_plan_accepts_runs(tmp_path):
    seen: collections.Counter[str] = collections.Counter()

    @FEW
    @given(st.data())
    def check(data):
        family, preset = data.draw(st.sampled_from(PRESETS), label="preset")
        model = parent(family, preset)
        spec = describe(model)
        for number in range(2):
            plan = data.draw(plans(spec), label=f"plan {number}")
            wanted = accepted(plan, spec)
            narrow = {"width"} if any(plan.widths()) else set()
            if wanted is None:
                seen["refused"] += 1
                break
            assert load(Plan, dump(plan)) == plan
            child = surgery.apply(model, plan)
            runs(child, wanted, tmp_path)
            if (kinds_in(wanted) | narrow) - set(seen):
                works_or_says(child, lambda model: export(model, tmp_path / "model.pt2", batch=BATCH))
            seen.update(kinds_in(wanted) | narrow)
            seen["second"] += number
            model, spec = child, wanted

    @settings(FEW, max_examples=EXAMPLES)
    @given(st.data())
    def check_steps(data):
        """Most plans with several token steps are refused; here there is one, and other cuts in other blocks."""
        model = parent("vit", data.draw(st.sampled_from(["plain", "average"]), label="preset"))
        spec = describe(model)
        rest = data.draw(plans(spec, tokens=False), label="rest")
        blocks = rest.blocks()
        at = data.draw(st.integers(0, len(blocks) - 1), label="block")
        blocks[at] = BlockPlan(tokens=data.draw(steps(spec.stages[0]), label="step"))
        plan = Plan.of(spec, blocks, rest.widths())
        wanted = accepted(plan, spec)
        if wanted is None or blocks[at].tokens is None:
            return
        runs(surgery.apply(model, plan), wanted, tmp_path)
        seen.update(kinds_in(wanted))

    @settings(FEW, max_examples=EXAMPLES // 4)
    @given(st.data())
    def check_reads(data):
        """Only some families let prefix tokens keep the attention beside a convolution; here one block always does."""
        model = parent(
            *data.draw(st.sampled_from([("vit", "plain"), ("vit", "registers"), ("t2t", PRESETS_OF_T2T[0])]))
        )
        spec = describe(model)
        blocks = data.draw(plans(spec, tokens=False), label="rest").blocks()
        at = data.draw(st.integers(0, len(blocks) - 1), label="block")
        kernel, act = data.draw(st.sampled_from([(1, "none"), (3, "none"), (1, "relu")]), label="convolution")
        conv = Conv(kernel=kernel, width=5, prefix="attention", act=act)
        blocks[at] = BlockPlan(mixer=conv, hidden=blocks[at].hidden, mlp=blocks[at].mlp)
        wanted = accepted(Plan.of(spec, blocks), spec)
        if wanted is not None:
            runs(surgery.apply(model, Plan.of(spec, blocks)), wanted, tmp_path)
            seen.update(kinds_in(wanted))

    check()
    check_steps()
    check_reads()
    missing = (set(OTHERS) | {kind.model_fields["kind"].default for kind in kinds().values()}) - set(seen)
    assert not missing, f"never drawn and accepted: {missing}; {seen}"
    assert seen["second"] > EXAMPLES // 20
    assert seen["refused"] < EXAMPLES * 0.9


@torch.no_grad()
def runs(child: torch.nn.Module, wanted, folder) -> None:
    """Every way to use `child` works, or is refused with a sentence."""
    child.eval()
    spec = describe(child)
    assert spec == wanted
    assert hash(spec) == hash(wanted)
    x = images(spec, dtype=torch.float32)
    logits = child(x)
    assert torch.isfinite(logits).all()
    plain = surgery.fold(child)  # kernels that are still mixed are priced as the convolutions that they become
    assert cost_of(describe(plain)) == counted(plain)
    assert cost_of(spec).macs == counted(plain).macs
    assert torch.isfinite(copy.deepcopy(child).bfloat16()(x.bfloat16())).all()
    path = folder / "model.safetensors"
    store.save(child, path)
    again = store.load(path)
    assert describe(again) == wanted
    assert torch.equal(again(x), logits)
    rows, columns = spec.image
    larger = (2 * rows, 2 * columns)
    works_or_says(child, lambda model: model.reset_classifier(5))
    works_or_says(child, lambda model: model.reset_classifier(5, "avg"))
    works_or_says(child, lambda model: model.set_input_size(img_size=larger), larger)
    works_or_says(child, lambda model: model.prune_intermediate_layers([0], prune_head=True))
    works_or_says(child, lambda model: None, larger)


def works_or_says(child: torch.nn.Module, change, size=None) -> None:
    """A change and a forward pass work, or one of both is refused with a sentence of ours or of timm's assertions."""
    model = copy.deepcopy(child)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # timm's own, where it resizes tables of biases
            change(model)
            out = model(torch.randn(2, 3, *(size or describe(child).image)))
    except (VitrimError, AssertionError) as problem:
        said = str(problem)
    else:
        assert torch.isfinite(out).all()
        return
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(("family", "preset"), PRESETS, ids=IDS)
def test_plans_compose_over_every_kind(family, preset):
    """Two plans in a row are one plan, bit for bit, and both are refused together.

    Kernels that are made at another residual width may round otherwise; `keeps_constants` says what is no law.
    """
    model = parent(family, preset)
    spec = describe(model)

    @settings(FEW, max_examples=12 if WHOLE or (family, preset) in FIRST else 5)
    @given(st.data())
    def check(data):
        first = data.draw(plans(spec), label="first")
        small = accepted(first, spec)
        if small is None:
            return
        second = data.draw(plans(small), label="second")
        if accepted(second, small) is None:
            return
        once = first.then(second, spec)
        steps = surgery.apply(surgery.apply(model, first), second)
        whole = surgery.apply(model, once)
        assert describe(steps) == describe(whole) == once.child(spec)
        x = images(spec, dtype=torch.float32)
        with torch.no_grad():
            if not keeps_constants(first, second, spec):
                return
            rounds = any(first.widths() + second.widths()) and {"conv1", "conv3"} & kinds_in(once.child(spec))
            assert apart(steps(x), whole(x)) < SINGLE if rounds else torch.equal(steps(x), whole(x))

    check()
