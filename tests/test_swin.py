"""Swin: every timm name past the door, odd sizes, other sizes, refusals, and the counts of vit-slim.md, section 6.1."""

import copy
import functools
import itertools
import re

import pytest
import timm
import torch
from pydantic import ValidationError
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2

from tests.samples import adopted, apart, images, random_plan
from tests.tolerance import EXACT, SINGLE
from vitrim import families, methods
from vitrim.cut import surgery
from vitrim.cut.observe import axes
from vitrim.deploy import store
from vitrim.deploy.parent import known_models, load_weights_
from vitrim.families import describe, get
from vitrim.measure import counted
from vitrim.methods.taylor import taylor_scores
from vitrim.nn import WindowBlock
from vitrim.words.budget import Budget
from vitrim.words.costs import cost_of
from vitrim.words.errors import AdoptError, DataError, SpecError, WeightsError
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Spec, Stage

swin = get("swin")

NAMES = [name for name in timm.list_models("swin*") if not name.startswith("swinv2_cr")]


def small(name: str) -> torch.nn.Module:
    """The model of a timm name with its image and windows, shallow and narrow, random in every parameter."""
    shape = {"depths": (2, 1, 2, 1), "embed_dim": 8, "num_heads": (1, 2, 4, 4), "num_classes": 7}
    return randomised(timm.create_model(name, **shape))


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        centre = 1.0 if parameter.dim() == 1 and bool((parameter == 1).all()) else 0.0
        torch.nn.init.normal_(parameter, centre, 0.25)
    return model.eval()


def tiny(**arguments: object) -> torch.nn.Module:
    return randomised(swin.example(**arguments))


@pytest.mark.parametrize("name", NAMES)
def test_every_name_adopts(name: str):
    theirs = small(name)
    assert type(theirs) is (SwinTransformerV2 if name.startswith("swinv2") else SwinTransformer)
    ours = families.adopt(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(isinstance(block, WindowBlock) for _, block in families.blocks_of(ours))
    x = images(describe(theirs), 1, torch.float32)
    with torch.no_grad():
        assert apart(ours(x), theirs(x)) < SINGLE
    assert cost_of(describe(ours)) == counted(ours)


def test_the_names_are_all_of_timms_swins():
    modules = {timm.models.swin_transformer.__name__, timm.models.swin_transformer_v2.__name__}
    known = {name for name in timm.list_models() if timm.model_entrypoint(name).__module__ in modules}
    assert set(NAMES) == known


def test_the_list_of_models_gives_the_reason():
    rows = {row["name"]: row for row in known_models("swin*tiny*")}
    assert rows["swin_tiny_patch4_window7_224"]["reason"] is None
    assert rows["swin_tiny_patch4_window7_224"]["params"] == 28_288_354
    assert rows["swinv2_tiny_window8_256"]["reason"] is None
    assert "Swin V2 in another author's form" in rows["swinv2_cr_tiny_224"]["reason"]


# Older versions of timm make masks for another grid than the one that their odd grids merge to.
ROUNDS_RIGHT = hasattr(swin.example(), "_ref_window_sizes")
RECENT = pytest.mark.skipif(not ROUNDS_RIGHT, reason="this timm rounds odd grids down, and is refused there")


@pytest.mark.parametrize(
    "arguments",
    [
        {"img_size": 33},
        {"img_size": (24, 56), "window_size": (4, 2)},
        pytest.param({"img_size": (36, 44)}, marks=RECENT),
        pytest.param({"img_size": (20, 28), "window_size": (4, 2)}, marks=RECENT),
        pytest.param({"img_size": (12, 44), "always_partition": True}, marks=RECENT),
        pytest.param(
            {"img_size": 28, "patch_size": 2, "window_size": 5, "depths": (2, 2, 2), "num_heads": (2, 4, 8)},
            marks=RECENT,
        ),
        pytest.param({"num_classes": 0, "global_pool": "max"}, marks=RECENT),
        {"in_chans": 1, "attn_drop_rate": 0.1, "proj_drop_rate": 0.1, "drop_rate": 0.1},
    ],
    ids=str,
)
def test_odd_sizes_and_arguments(arguments: dict[str, object]):
    theirs = tiny(**arguments)
    ours = families.adopt(theirs)
    spec = describe(ours)
    x = torch.randn(2, arguments.get("in_chans", 3), *spec.image)
    with torch.no_grad():
        assert apart(ours(x), theirs(x)) < SINGLE
    assert cost_of(spec) == counted(ours)
    again = families.build(spec).eval()
    again.load_state_dict(ours.state_dict())
    assert describe(again) == spec
    with torch.no_grad():
        assert torch.equal(again(x), ours(x))


# Of timm's interpolation of biases, with its own blocks as with ours.
OWN_WARNING = pytest.mark.filterwarnings(
    "ignore:Using a non-tuple sequence:UserWarning", "ignore:torch.searchsorted:UserWarning"
)
SIZES = [
    {"img_size": (48, 40), "window_size": 3},
    {"img_size": 64},
    {"img_size": 32, "window_size": 2, "always_partition": True},
    {"img_size": (36, 44), "patch_size": 2, "window_size": 6},
    pytest.param({"window_size": 8}, marks=RECENT),
]


@OWN_WARNING
@pytest.mark.parametrize("change", SIZES, ids=str)
def test_set_input_size_as_timm_does(change: dict[str, object]):
    theirs = tiny()
    ours = families.adopt(theirs)
    for model in (theirs, ours):
        model.set_input_size(**change)
    spec = describe(ours)
    assert spec == describe(theirs)
    x = images(spec, dtype=torch.float32)
    with torch.no_grad():
        assert apart(ours(x), theirs(x)) < SINGLE
    child = surgery.apply(ours, random_plan(spec, 1))
    assert cost_of(describe(child)) == counted(child)
    again = families.build(describe(child)).eval()
    again.load_state_dict(child.state_dict())
    with torch.no_grad():
        assert torch.equal(again(x), child(x))


@OWN_WARNING
def test_set_input_size_after_a_cut_and_after_paper():
    parent = families.adopt(tiny())
    spec = describe(parent)
    plan = Plan.of(spec, [BlockPlan(v=((0, 2), ())), BlockPlan(v=((), ())), *[BlockPlan(hidden=(1, 5))] * 2])
    child = surgery.apply(parent, plan)
    again = families.build(describe(child)).eval()
    again.load_state_dict(child.state_dict())
    for model in (child, again):
        model.set_input_size(img_size=64)
    assert describe(again) == describe(child)
    assert cost_of(describe(child)) == counted(child)
    x = images(describe(child), dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(x), child(x))


def test_dynamic_sizes():
    theirs = tiny(strict_img_size=False)
    ours = families.adopt(theirs)
    for size in ((32, 32), (40, 28), (64, 48)):
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            assert apart(ours(x), theirs(x)) < SINGLE


def test_a_dead_head_takes_its_column_of_biases_along():
    parent = adopted("swin", "windows")
    spec = describe(parent)
    kept = tuple(range(12))
    plan = Plan.of(spec, [BlockPlan(), BlockPlan(), BlockPlan(), BlockPlan(v=((), kept, (), kept[:3]))])
    child = surgery.apply(parent, plan)
    name = "layers.1.blocks.1.attn.relative_position_bias_table"
    assert torch.equal(child.get_parameter(name), parent.get_parameter(name)[:, [1, 3]])
    # Two heads go with 12 channels of q, k, v and the projection each; the last keeps 3 of 12 values.
    lost = 2 * (2 * 12 * (48 + 1) + 12 * (2 * 48 + 1)) + 9 * (2 * 48 + 1) + 2 * 49
    assert cost_of(spec).params - cost_of(describe(child)).params == lost


def test_grid_of_another_size_is_refused():
    ours = families.adopt(tiny())
    block = swin.blocks_by_stage(ours)[0][0]
    with pytest.raises(DataError, match=r"must be \(8, 8\), but is \(9, 8\); resize the images, call set_input_size"):
        block(torch.zeros(1, 9, 8, 24))
    with pytest.raises(AssertionError, match="Input height"):
        ours(torch.zeros(1, 3, 36, 32))


def test_weights_of_another_window_are_refused_by_name():
    model = families.adopt(tiny())
    other = tiny(window_size=2).state_dict()
    expected = r"another shape for layers\.0\.blocks\.0\.attn\.relative_position_bias_table \(9, 2\) for \(49, 2\)"
    with pytest.raises(WeightsError, match=expected):
        load_weights_(model, other, "weights.pth")


def test_weights_of_the_authors_release():
    model = tiny(depths=(1, 2, 1), num_heads=(2, 4, 8))
    released = {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16)}
    for name, value in model.state_dict().items():
        merging = re.match(r"layers\.(\d)\.downsample(.*)", name)
        old = f"layers.{int(merging[1]) - 1}.downsample{merging[2]}" if merging else name.replace("head.fc", "head")
        released[old] = value
    found = families.convert(model, released)
    assert found.keys() == model.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())
    assert families.convert(model, model.state_dict()).keys() == found.keys()


def test_prefix_and_shift_need_their_place():
    stage = describe(adopted("swin", "windows")).stages[0]
    with pytest.raises(ValidationError, match="prefix must be 0 where attention is windowed"):
        Stage.model_validate(stage.model_dump() | {"prefix": 1})
    with pytest.raises(ValidationError, match="must be in a stage with a window"):
        Stage.model_validate(stage.model_dump() | {"window": None})
    with pytest.raises(SpecError, match="window: the stage of a block with windows must have one"):
        WindowBlock(stage.model_copy(update={"window": None}), stage.blocks[0])


def test_a_foreign_part_is_refused_by_path():
    model = tiny()
    model.layers[1].blocks[1].attn.qkv = torch.nn.Identity()
    with pytest.raises(AdoptError, match=r"layers\.1\.blocks\.1\.attn\.qkv: must be a linear layer"):
        describe(model)
    model = tiny()
    model.layers[0].blocks[1].shift_size = (1, 1)
    with pytest.raises(AdoptError, match=r"layers\.0\.blocks\.1: windows must be shifted by half"):
        describe(model)
    model = tiny()
    model.layers[0].blocks[1] = torch.nn.Identity()
    with pytest.raises(AdoptError, match=r"layers\.0\.blocks\.1: a block must be timm's SwinTransformerBlock"):
        describe(model)


def test_features_of_a_child_tell_the_truth():
    parent = families.adopt(tiny())
    child = surgery.apply(parent, random_plan(describe(parent), 5))
    x = images(describe(child), dtype=torch.float32)
    with torch.no_grad():
        final, parts = child.forward_intermediates(x)
        assert torch.equal(final, child.forward_features(x))
    for info, part in zip(child.feature_info, parts, strict=True):
        assert part.shape[1:] == (info["num_chs"], 32 // info["reduction"], 32 // info["reduction"])
    names = {name for name, _ in child.named_parameters()}
    assert {name for name in child.no_weight_decay() if name in names} == {
        name for name in names if name.endswith("bias_table")
    }
    groups = timm.models.group_parameters(child, child.group_matcher())
    assert set(itertools.chain(*groups.values())) == names
    child.reset_classifier(3)
    assert describe(child).classes == 3
    assert cost_of(describe(child)) == counted(child)
    assert child(x).shape == (2, 3)


def test_checkpointing_gives_the_same_gradients():
    parent = families.adopt(tiny())
    child = surgery.apply(parent, random_plan(describe(parent), 4, skips=False))
    x = images(describe(child), dtype=torch.float32)
    gradients = []
    for on in (False, True):
        model = copy.deepcopy(child)
        model.set_grad_checkpointing(on)
        model(x).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_windows_differ_only_where_shifts_say():
    spec = describe(adopted("swin", "windows"))
    assert [block.shifted for _, _, block in spec.blocks()] == [False, True, False, True]
    first, second = spec.stages
    assert first.window.shift(first.grid) == (2, 2)
    assert second.window.shift(second.grid) == (0, 0)


def test_exported_child_answers_the_same():
    parent = families.adopt(tiny())
    child = surgery.apply(parent, random_plan(describe(parent), 6))
    x = images(describe(child), dtype=torch.float32)
    program = torch.export.export(child, (x,))
    with torch.no_grad():
        assert apart(program.module()(x), child(x)) < SINGLE


def test_half_precision_under_autocast():
    parent = families.adopt(tiny())
    x = images(describe(parent), dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(parent(x)).all()


def test_stored_child_loads_with_nothing_else(tmp_path):
    parent = families.adopt(tiny(img_size=(24, 40)))
    child = surgery.apply(parent, random_plan(describe(parent), 2))
    store.save(child, tmp_path / "child.safetensors")
    again = store.load(tmp_path / "child.safetensors")
    assert describe(again) == describe(child)
    x = images(describe(child), dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(again(x), child(x))


@pytest.mark.parametrize("name", ["magnitude", "random"])
@pytest.mark.parametrize("choice", ["free", "even", "heads"])
def test_methods_written_once_work_here(name: str, choice: str):
    parent = adopted("swin", "padded")
    budget = Budget.parse("macs=0.7")
    found = methods.get(name, {"choice": choice}).search(parent, None, budget, seed=0)
    child = surgery.apply(found.parent, found.plan)
    assert budget.admits(counted(child), cost_of(describe(parent)))


def test_taylor_scores_are_those_of_single_images():
    parent = adopted("swin", "padded")
    x, y = images(describe(parent)), torch.tensor([1, 2])
    both = taylor_scores(parent, [(x, y)], target="labels")
    single = [taylor_scores(parent, [(x[i : i + 1], y[i : i + 1])], target="labels") for i in range(2)]
    assert both.keys() == axes(parent).keys()
    for path, score in both.items():
        assert score.min() >= 0
        assert apart((single[0][path] + single[1][path]) / 2, score) < SINGLE


# Closed forms of shared/methods/vit-slim.md, section 6.1.
HOST_PARAMS, HOST_MACS = 2_378_914, 188_626_944
ATTENTION = [(387, 1_511_552), (771, 678_944), (1539, 320_264), (3075, 155_330)]
NEURONS = [(193, 602_112), (385, 301_056), (769, 150_528), (1537, 75_264)]


@functools.cache
def swin_tiny() -> Spec:
    return describe(timm.create_model("swin_tiny_patch4_window7_224"))


def heads_cut(spec: Spec, stage: int, width: int) -> Spec:
    """All heads of a stage at one width."""
    blocks = []
    for path, _, block in spec.blocks():
        kept = tuple(range(width))
        here = path.startswith(f"stages.{stage}.")
        blocks.append(
            BlockPlan(qk=(kept,) * len(block.mixer.qk), v=(kept,) * len(block.mixer.v)) if here else BlockPlan()
        )
    return Plan.of(spec, blocks).child(spec)


def test_published_counts():
    spec = swin_tiny()
    dense = cost_of(spec)
    assert dense.params == 28_288_354
    assert dense.macs / 1e9 == pytest.approx(4.491, abs=5e-4)
    channels = [len(stage.blocks) * stage.width for stage in spec.stages]
    assert channels == [192, 384, 2304, 1536]
    params, macs = HOST_PARAMS, HOST_MACS
    for count, (p, m), (q, n) in zip(channels, ATTENTION, NEURONS, strict=True):
        params += count * p + 4 * count * q
        macs += count * m + 4 * count * n
    assert (macs, params) == dense


@pytest.mark.parametrize("stage", range(4))
def test_published_cost_of_a_channel(stage: int):
    spec = swin_tiny()
    dense = cost_of(spec)
    less = cost_of(heads_cut(spec, stage, 24))
    gone = len(spec.stages[stage].blocks) * spec.stages[stage].width // 4
    assert (dense.params - less.params, dense.macs - less.macs) == tuple(gone * rate for rate in ATTENTION[stage])
    plan = [BlockPlan(hidden=tuple(range(64))) if f"stages.{stage}." in p else BlockPlan() for p, _, _ in spec.blocks()]
    less = cost_of(Plan.of(spec, plan).child(spec))
    gone = len(spec.stages[stage].blocks) * (4 * spec.stages[stage].width - 64)
    assert (dense.params - less.params, dense.macs - less.macs) == tuple(gone * rate for rate in NEURONS[stage])


def test_pairs_that_do_not_meet_are_timms():
    theirs = tiny(img_size=(24, 40)).double()
    ours = families.adopt(theirs)
    block, old = swin.blocks_by_stage(ours)[0][1], theirs.layers[0].blocks[1]
    assert torch.equal(block.blocked, old.attn_mask != 0)
    assert torch.equal(block.attn.relative_position_index, old.attn.relative_position_index)
    x = images(describe(ours))
    with torch.no_grad():
        assert apart(ours(x), theirs(x)) < EXACT
