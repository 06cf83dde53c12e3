"""Families whose attention knows the places of its tokens: angles of rotary positions, biases of relative ones."""

import copy

import pytest
import torch
from torch import nn

from tests.samples import adopted, apart, images, timm_model
from tests.tolerance import EXACT, SINGLE
from vitrim import families
from vitrim.cut import surgery
from vitrim.cut.compensate.hear import arriving
from vitrim.deploy import store
from vitrim.families import blocks_of, describe
from vitrim.methods.spvit.search import layout
from vitrim.nn.rotary import turned
from vitrim.words.errors import DataError, MethodError, PlanError
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Rotary, Skip
from vitrim.words.steps import kinds
from vitrim.words.steps.drop import Drop

TURNED = [("eva", "dinov3"), ("eva", "eva02"), ("eva", "mixed")]
BIASED = [("beit", "own"), ("beit", "shared"), ("relpos", "network"), ("relpos", "shared")]
PLACED = [*TURNED, *BIASED]


def some(spec, start=1, step=3):
    return tuple(range(start, spec.stages[0].patches, step))


def dropping(spec, kept):
    return Plan.of(spec, [BlockPlan(tokens=Drop(kept=kept)), *[BlockPlan()] * (len(spec.blocks()) - 1)])


@pytest.mark.parametrize(("family", "preset"), TURNED)
@torch.no_grad()
def test_dropped_patches_are_keys_that_timm_hides(family, preset):
    theirs, ours = timm_model(family, preset), adopted(family, preset)
    spec, x = describe(ours), images(describe(ours))
    stage, kept = spec.stages[0], some(spec)
    here = [*range(stage.prefix), *(stage.prefix + place for place in kept)]
    seen = torch.zeros(stage.tokens, dtype=torch.bool).index_fill(0, torch.tensor(here), True)
    expected = theirs.forward_features(x, attn_mask=seen.expand(stage.tokens, -1))[:, here]
    child = surgery.apply(ours, dropping(spec, kept))
    assert apart(child.forward_features(x), expected) < EXACT


@pytest.mark.parametrize(("family", "preset"), BIASED)
@torch.no_grad()
def test_dropped_patches_are_keys_without_a_share(family, preset):
    """Biases of minus infinity on keys of the dense model hide them, and the others keep the biases of their places."""
    model = copy.deepcopy(adopted(family, preset))
    spec, x = describe(model), images(describe(model))
    stage, kept = spec.stages[0], some(spec)
    here = [*range(stage.prefix), *(stage.prefix + place for place in kept)]
    hide = torch.full((3, stage.tokens, stage.tokens), -torch.inf, dtype=torch.float64)
    hide[..., here] = 0.0
    name = "shared_rel_pos_bias" if family == "beit" else "shared_rel_pos"

    def hidden(_block, given, named):
        return given, {**named, name: hide if named[name] is None else hide + named[name]}

    child = surgery.apply(model, dropping(spec, kept))
    for _, block in blocks_of(model):
        block.register_forward_pre_hook(hidden, with_kwargs=True)
    assert apart(child.forward_features(x), model.forward_features(x)[:, here]) < EXACT


@pytest.mark.parametrize(("family", "preset"), PLACED)
@torch.no_grad()
def test_a_block_alone_is_the_block_in_its_model(family, preset):
    model = adopted(family, preset)
    x, blocks = images(describe(model)), [block for _, block in blocks_of(model)]
    heard = []
    handle = blocks[1].register_forward_hook(lambda _m, _i, out: heard.append(out))
    model(x)
    handle.remove()
    (given,) = arriving(model, blocks, 1, [x], None)
    assert torch.equal(blocks[1](given), heard[0])
    assert blocks[1].source.model is model


@torch.no_grad()
def test_copies_ask_their_own_host_and_lone_blocks_the_one_they_are_from():
    model = adopted("eva", "mixed")
    twin = copy.deepcopy(model)
    assert twin.blocks[1].source.model is twin
    assert copy.deepcopy(model.blocks[1]).source.model is model


@pytest.mark.parametrize(("family", "preset"), [TURNED[0], BIASED[0]])
@pytest.mark.parametrize("kind", sorted(set(kinds()) - {"drop"}))
def test_tokens_without_a_place_are_refused(family, preset, kind):
    spec = describe(adopted(family, preset))
    step = kinds()[kind].example(spec.stages[0].enters)
    plan = Plan.of(spec, [BlockPlan(tokens=step), *[BlockPlan()] * (len(spec.blocks()) - 1)])
    with pytest.raises(PlanError, match=r"blocks\.0\.tokens: tokens must keep their places, because .* positions"):
        plan.child(spec)


def test_a_key_for_all_that_are_missing_needs_keys_that_are_alike():
    spec = describe(adopted("eva", "core"))
    kept = tuple(range(spec.stages[0].patches // 2))
    plan = Plan.of(spec, [BlockPlan(tokens=Drop(kept=kept, exact=True)), BlockPlan()])
    with pytest.raises(PlanError, match=r"exact must be false .* rotary positions"):
        plan.child(spec)


def test_channels_that_turn_together_are_cut_together():
    spec = describe(adopted("eva", "dinov3"))
    few = tuple(range(8)), tuple(range(16)), tuple(range(16))
    with pytest.raises(PlanError, match=r"heads\.0\.qk: channels that turn with their places must be kept together"):
        Plan.of(spec, [BlockPlan(qk=few), BlockPlan()]).child(spec)


@torch.no_grad()
def test_heads_keep_the_angles_they_learned():
    model = adopted("eva", "mixed")
    spec = describe(model)
    whole = tuple(range(16))
    first = surgery.apply(model, Plan.of(spec, [BlockPlan(), BlockPlan(v=((), whole, whole))]))
    second = surgery.apply(first, Plan.of(describe(first), [BlockPlan(), BlockPlan(v=((), whole))]))
    assert describe(second).stages[0].blocks[1].mixer.origin == (2,)
    assert describe(second).stages[0].blocks[0].mixer.origin == (0, 1, 2)


@pytest.mark.parametrize("halves", [False, True])
def test_turning_by_an_angle_is_a_product_of_complex_numbers(halves):
    x, angles = torch.randn(5, 8, dtype=torch.float64), torch.rand(5, 4, dtype=torch.float64)
    both = (lambda t: torch.cat([t, t], -1)) if halves else (lambda t: t.repeat_interleave(2, -1))
    pairs = x.unflatten(-1, (2, 4)).mT if halves else x.unflatten(-1, (4, 2))
    product = torch.view_as_real(
        torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles)
    )
    expected = product.mT.flatten(-2) if halves else product.flatten(-2)
    assert apart(turned(x, both(angles.sin()), both(angles.cos()), halves), expected) < EXACT


@pytest.mark.filterwarnings("ignore::UserWarning")  # timm's own, where it resizes tables of biases
@pytest.mark.parametrize(("family", "preset"), [*PLACED, ("eva", "core")])
@torch.no_grad()
def test_another_image_size_is_what_timm_makes_of_it(family, preset):
    theirs, ours = timm_model(family, preset), copy.deepcopy(adopted(family, preset))
    for model in (theirs, ours):
        model.set_input_size(img_size=(48, 40))
    x = torch.randn(2, 3, 48, 40, dtype=torch.float64)
    assert apart(ours(x), theirs(x)) < EXACT
    assert describe(ours).image == (48, 40)
    again = families.build(describe(ours)).double().eval()
    again.load_state_dict(ours.state_dict())
    assert apart(again(x), ours(x)) < SINGLE  # timm computes angles of another size in the type of the model


@torch.no_grad()
def test_images_of_any_size_are_turned_by_their_own_grid():
    theirs, ours = timm_model("eva", "dynamic"), adopted("eva", "dynamic")
    x = torch.randn(2, 3, 40, 24, dtype=torch.float64)
    assert apart(ours(x), theirs(x)) < EXACT
    assert isinstance(describe(ours).stages[0].form.positions, Rotary)


@pytest.mark.filterwarnings("ignore::UserWarning")  # timm's own, where it resizes tables of biases
@pytest.mark.parametrize(("family", "preset"), BIASED)
@torch.no_grad()
def test_children_take_other_image_sizes_where_attention_is_gone(family, preset):
    model = adopted(family, preset)
    spec = describe(model)
    none = ((),) * 3
    child = surgery.apply(model, Plan.of(spec, [BlockPlan(qk=none, v=none), BlockPlan(mixer=Skip())]))
    child.set_input_size(img_size=(48, 40))
    assert torch.isfinite(child(torch.randn(2, 3, 48, 40, dtype=torch.float64))).all()
    assert describe(child).stages[0].grid == (6, 5)


def test_masks_of_keys_do_not_mix_with_dropped_patches():
    model = adopted("eva", "dinov3")
    spec = describe(model)
    child = surgery.apply(model, dropping(spec, some(spec)))
    with pytest.raises(DataError, match="without attention masks"):
        child.forward_features(images(spec), attn_mask=torch.ones(1, dtype=torch.bool))


def test_a_classifier_of_ones_own_is_put_in_place():
    model = timm_model("eva", "dinov3", torch.float32)
    model.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(48, 7))
    assert describe(families.adopt(model)).classes == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("preset", ["dinov3", "dynamic", "eva02"])
@torch.no_grad()
def test_stored_angles_have_the_type_of_the_weights(preset, dtype, tmp_path):
    model = families.adopt(timm_model("eva", preset, torch.float32).to(dtype))
    again = store.load(store.save(model, tmp_path / "model.safetensors"))
    x = images(describe(model), dtype=dtype)
    assert torch.equal(again(x), model.eval()(x))


def test_spvit_refuses_norms_that_undo_its_gates():
    with pytest.raises(MethodError, match="norms before its branches for spvit"):
        layout(describe(adopted("eva", "post")))
