"""Merging neighbours on the grid: identities, what timm is told, costs, and what is refused."""

import copy
import functools
import math
import pickle

import onnx
import pytest
import timm
import torch
from timm.models._features import FeatureGetterNet
from torch.nn import functional as F

from tests.samples import WHOLE, adopted, apart, images, random_plan, without_data
from tests.tolerance import EXACT
from vitrim import families
from vitrim.cut import surgery
from vitrim.deploy import export, store
from vitrim.families import adopt, describe
from vitrim.families.vit import example
from vitrim.measure import counted
from vitrim.methods.cait.masks import merge_plan, thirds
from vitrim.nn import fold_steps_, unmerge
from vitrim.nn.steps.grid_merge import GridMerged
from vitrim.report.blocks import sheet, total
from vitrim.words.costs import cost_of
from vitrim.words.errors import DataError, MethodError, PlanError
from vitrim.words.plain import dump, load
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Spec, Stage
from vitrim.words.steps import Tokens
from vitrim.words.steps.drop import Drop
from vitrim.words.steps.grid_merge import GridMerge

BOTH = ((1, "w"), (2, "h"))
FORMS = ["linear", "mean", "channel"]
GRIDS = [(14, 14), (7, 7), (5, 3), (3, 8)]


def merger(grid, axis, prefix=1, width=6, form="mean", seed=None, **step):
    """One merge by itself, in float64, with random weights if a seed is given."""
    stage = Stage.model_construct(width=width, grid=grid, prefix=prefix)
    module = GridMerged(GridMerge(axis=axis, form=form, **step), Tokens(prefix, math.prod(grid), grid), stage).double()
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def tokens(grid, prefix=1, width=6, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, prefix + math.prod(grid), width, generator=generator, dtype=torch.float64)


def as_map(x, prefix, grid):
    return x[:, prefix:].transpose(1, 2).unflatten(2, grid)


def merged(parent, merges=BOTH, form="linear", seed=None, **bias):
    """A model with merges, and random merge weights if a seed is given."""
    child = surgery.apply(parent, merge_plan(describe(parent), merges, form, **bias))
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in child.named_parameters():
                if ".step." in name:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return child


class TestIdentities:
    """Section 6.1 of the specification."""

    def test_golden(self):
        x = torch.tensor([9.0, 1, 2, 3, 4, 5, 6], dtype=torch.float64)[None, :, None]
        wide = merger((2, 3), "w", width=1).enter(x)
        assert wide.flatten().tolist() == [9, 1.5, 3, 4.5, 6]
        high = merger((2, 2), "h", width=1).enter(wide)
        assert high.flatten().tolist() == [9, 3, 4.5]
        assert unmerge(as_map(high, 1, (1, 2)), (2, 3), (1, 1), "nearest").tolist() == [[[[3, 3, 4.5], [3, 3, 4.5]]]]

    @pytest.mark.parametrize("grid", GRIDS)
    @pytest.mark.parametrize("prefix", [0, 1, 2])
    @pytest.mark.parametrize("form", FORMS)
    def test_constant_stays(self, grid, prefix, form):
        x = tokens(grid, prefix)
        x[:, prefix:] = x[:, -1:]
        halved = (grid[0], -(-grid[1] // 2))
        y = merger(halved, "h", prefix, form=form).enter(merger(grid, "w", prefix, form=form).enter(x))
        assert y.shape[1] == prefix + -(-grid[0] // 2) * halved[1]
        assert torch.equal(y[:, :prefix], x[:, :prefix])
        assert apart(y[:, prefix:], x[:, -1:].expand_as(y[:, prefix:])) < EXACT

    def test_even_grids_are_pooled(self):
        x = tokens((4, 6))
        first = merger((4, 3), "h").enter(merger((4, 6), "w").enter(x))
        second = merger((2, 6), "w").enter(merger((4, 6), "h").enter(x))
        pooled = F.avg_pool2d(as_map(x, 1, (4, 6)), 2)
        assert apart(as_map(first, 1, (2, 3)), pooled) < EXACT
        assert apart(first, second) < EXACT
        assert apart(first[:, 1:].mean(dim=1), x[:, 1:].mean(dim=1)) < EXACT
        odd = tokens((3, 3))
        assert apart(merger((3, 3), "w").enter(odd)[:, 1:].mean(dim=1), odd[:, 1:].mean(dim=1)) > 1e-3

    @pytest.mark.parametrize(
        ("grid", "wide", "high"),
        [
            ((14, 14), (14, 7), (7, 7)),
            ((21, 21), (21, 11), (11, 11)),
            ((16, 24), (16, 12), (8, 12)),
            ((7, 5), (7, 3), (4, 3)),
        ],
    )
    def test_shapes(self, grid, wide, high):
        here = Tokens(2, math.prod(grid), grid)
        after = GridMerge(axis="w").flow(here, here.patches).leaves
        last = GridMerge(axis="h").flow(after, here.patches).leaves
        assert (after.grid, last.grid) == (wide, high)
        assert (after.total, last.total) == (2 + math.prod(wide), 2 + math.prod(high))
        x = merger(grid, "w", 2).enter(tokens(grid, 2))
        assert x.shape[1] == after.total
        assert merger(wide, "h", 2).enter(x).shape[1] == last.total

    @pytest.mark.parametrize("grid", GRIDS)
    @pytest.mark.parametrize("axis", ["w", "h"])
    def test_unmerge_and_merge(self, grid, axis):
        halved, small = ((0, 1), (grid[0], -(-grid[1] // 2))) if axis == "w" else ((1, 0), (-(-grid[0] // 2), grid[1]))
        y = tokens(small, 0)
        restored = unmerge(as_map(y, 0, small), grid, halved, "nearest")
        assert restored.shape[2:] == grid
        again = merger(grid, axis, 0).enter(restored.flatten(2).transpose(1, 2))
        assert apart(again, y) < EXACT
        smooth = unmerge(as_map(y, 0, small), grid, halved)
        assert smooth.shape[2:] == grid
        constant = torch.ones(1, 1, *small, dtype=torch.float64)
        assert apart(unmerge(constant, grid, halved), torch.ones(1, 1, *grid, dtype=torch.float64)) < EXACT

    def test_bilinear_stands_at_the_middle_of_its_pair(self):
        """A ramp of pairs' middles (0.5, 2.5, 4.5) gives back the ramp of places between them."""
        ramp = torch.tensor([0.5, 2.5, 4.5, 6.0], dtype=torch.float64)[None, None, None]
        assert unmerge(ramp, (1, 7), (0, 1))[0, 0, 0, 1:5].tolist() == [1, 2, 3, 4]

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("grid", [(4, 6), (5, 3)])
    def test_the_view_is_the_index(self, form, grid):
        x, module = tokens(grid), merger(grid, "w", form=form, seed=3)
        t, rows = as_map(x, 1, grid), []
        eye = 0.5 * torch.eye(6, dtype=torch.float64)
        a = b = eye
        bias = torch.zeros(6, dtype=torch.float64)
        if form == "linear":
            a, b, bias = eye + module.delta[:, :6], eye + module.delta[:, 6:], module.bias
        elif form == "channel":
            a, b, bias = eye + module.delta[0].diag(), eye + module.delta[1].diag(), module.bias
        for i in range(grid[0]):
            for j in range(-(-grid[1] // 2)):
                right = min(2 * j + 1, grid[1] - 1)
                rows.append(t[:, :, i, 2 * j] @ a.T + t[:, :, i, right] @ b.T + bias)
        assert apart(module.enter(x)[:, 1:], torch.stack(rows, dim=1)) < EXACT

    @pytest.mark.parametrize("preset", ["plain", "distilled"])
    @pytest.mark.parametrize("size_bias", [True, False])
    def test_constant_cells_pass_the_network(self, preset, size_bias):
        parent = adopted("vit", preset)
        child = merged(parent, form="mean", size_bias=size_bias)
        prefix = describe(parent).stages[0].prefix
        cells = torch.randn(2, 48, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        x = torch.cat([tokens((0, 0), prefix, 48), unmerge(cells, (4, 4), (1, 1), "nearest").flatten(2).mT], dim=1)
        with torch.no_grad():
            dense, small = parent.blocks(x), child.blocks(x)
        read = [*range(prefix), *(prefix + place for place in (0, 2, 8, 10))]
        difference = apart(small, dense[:, read])
        assert difference < EXACT if size_bias else difference > 1e-4

    @pytest.mark.parametrize("form", ["linear", "channel"])
    def test_fresh_weights_are_the_mean_and_learn(self, form):
        parent = adopted("vit", "plain")
        child, mean = merged(parent, form=form), merged(parent, form="mean")
        x = images(describe(parent))
        assert apart(child(x), mean(x)) < EXACT
        child.train()
        optimizer = torch.optim.AdamW(child.parameters(), lr=1e-3)
        child(x).square().mean().backward()
        optimizer.step()
        for block in child.blocks[1:]:
            assert all(float(parameter.detach().abs().min()) > 0 for parameter in block.step.parameters())

    def test_transposed(self):
        x, wide, high = tokens((4, 6)), merger((4, 6), "w", form="linear", seed=1), merger((6, 4), "h", form="linear")
        high.load_state_dict(wide.state_dict())
        turned = torch.cat([x[:, :1], as_map(x, 1, (4, 6)).mT.flatten(2).mT], dim=1)
        got = as_map(high.enter(turned), 1, (3, 4)).mT
        assert apart(got, as_map(wide.enter(x), 1, (4, 3))) < EXACT


NAMES = ("deit_tiny", "deit_small", "deit_base")
SIZES = {(14, 14): 224, (21, 21): 336, (16, 24): (256, 384), (32, 32): 512}
FOUR = [(4, "w"), (8, "h")]
TABLE = [  # (what, merges, form, share of widths, grid, (Ti, S, B) in G)
    ("dense", [], "mean", 1, (14, 14), (1.2537, 4.5989, 17.5638)),
    ("4 8 mean", FOUR, "mean", 1, (14, 14), (0.7198, 2.6641, 10.2262)),
    ("4 8", FOUR, "linear", 1, (14, 14), (0.7307, 2.7075, 10.3996)),
    ("3 6", [(3, "w"), (6, "h")], "linear", 1, (14, 14), (0.627, 2.327, 8.945)),
    ("4 6", [(4, "w"), (6, "h")], "linear", 1, (14, 14), (0.682, 2.523, 9.684)),
    ("5 9", [(5, "w"), (9, "h")], "linear", 1, (14, 14), (0.810, 2.995, 11.496)),
    ("6 9", [(6, "w"), (9, "h")], "linear", 1, (14, 14), (0.864, 3.191, 12.234)),
    ("4", [(4, "w")], "linear", 1, (14, 14), (0.825, 3.062, 11.774)),
    ("6", [(6, "w")], "linear", 1, (14, 14), (0.934, 3.454, 13.250)),
    ("8", [(8, "w")], "linear", 1, (14, 14), (1.043, 3.845, 14.727)),
    ("x0.75", [], "linear", 0.75, (14, 14), (0.9475, 3.4637, 13.2020)),
    ("x0.5", [], "linear", 0.5, (14, 14), (0.6414, 2.3285, 8.8401)),
    ("4 8 x0.875", FOUR, "linear", 0.875, (14, 14), (0.6443, 2.3818, 9.1359)),
    ("4 8 x0.75", FOUR, "linear", 0.75, (14, 14), (0.5580, 2.0560, 7.8721)),
    ("4 8 x0.5", FOUR, "linear", 0.5, (14, 14), (0.3853, 1.4045, 5.3447)),
    ("21", [], "linear", 1, (21, 21), (3.312, 11.316, 41.403)),
    ("21 4 8", FOUR, "linear", 1, (21, 21), (1.905, 6.679, 24.835)),
    ("16x24", [], "linear", 1, (16, 24), (2.784, 9.655, 35.659)),
    ("16x24 4 8", FOUR, "linear", 1, (16, 24), (1.572, 5.575, 20.875)),
    ("32", [], "linear", 1, (32, 32), (10.434, 31.749, 107.028)),
    ("32 4 8", FOUR, "linear", 1, (32, 32), (5.503, 17.473, 60.808)),
]
PARAMS = {"4 8": (5.865, 22.641, 88.928), "x0.75": (4.386, 16.734, 65.318), "x0.5": (3.055, 11.418, 44.068),
          "4 8 x0.875": (5.200, 19.983, 78.304), "4 8 x0.75": (4.534, 17.325, 67.679),
          "4 8 x0.5": (3.203, 12.008, 46.429)}  # fmt: skip


@functools.cache
def deit(name, image=224):
    return describe(without_data(lambda: timm.create_model(f"{name}_patch16_224", img_size=image)))


def narrowed(spec, share):
    blocks = []
    for _, _, block in spec.blocks():
        heads = tuple(tuple(range(round(width * share))) for width in block.mixer.v)
        blocks.append(BlockPlan(qk=heads, v=heads, hidden=tuple(range(round(block.hidden * share)))))
    return Plan.of(spec, blocks)


@pytest.mark.parametrize(("what", "merges", "form", "share", "grid", "macs"), TABLE, ids=[row[0] for row in TABLE])
def test_macs_of_the_specification(what, merges, form, share, grid, macs):
    """Table 6.3: every configuration, within 0.1 %."""
    for name, wanted, params in zip(NAMES, macs, PARAMS.get(what, (None,) * 3), strict=True):
        spec = deit(name, SIZES[grid])
        small = merge_plan(spec, merges, form).child(spec)
        cost = cost_of(narrowed(small, share).child(small))
        assert cost.macs / 1e9 == pytest.approx(wanted, rel=1e-3)
        if params is not None:
            assert cost.params / 1e6 == pytest.approx(params, rel=1e-3)


def test_macs_of_the_distilled():
    for name, wanted in zip(NAMES, (0.7372, 2.7313, 10.4896), strict=True):
        spec = describe(without_data(lambda name=name: timm.create_model(f"{name}_distilled_patch16_224")))
        assert cost_of(merge_plan(spec, FOUR).child(spec)).macs / 1e9 == pytest.approx(wanted, rel=1e-3)


PRESETS = [("vit", "plain"), ("vit", "registers"), ("vit", "average"), ("vit", "map"), ("t2t", "performer")]


@pytest.mark.parametrize(("family", "preset"), PRESETS, ids=[f"{a}-{b}" for a, b in PRESETS])
@pytest.mark.parametrize("form", FORMS)
def test_laws(family, preset, form, tmp_path):
    """Merges under random cuts: cost, composition, paper, storing, and the parent left alone."""
    parent = adopted(family, preset)
    spec, x = describe(parent), images(describe(parent))
    first = merge_plan(spec, BOTH, form, size_bias=form == "mean")
    second = random_plan(first.child(spec), 3)
    child = surgery.apply(surgery.apply(parent, first), second)
    once = surgery.apply(parent, first.then(second, spec))
    assert describe(parent) == spec
    assert describe(once) == describe(child) == load(Spec, dump(describe(child)))
    assert load(Plan, dump(first)) == first
    with torch.no_grad():
        assert torch.equal(once(x), child(x))
    assert cost_of(describe(child)) == counted(child)
    row = total(sheet(spec, first.then(second, spec)))
    assert (row.macs, row.params) == cost_of(describe(child))
    store.save(child, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(store.load(tmp_path / "model.safetensors")(x), child(x))


def test_merge_weights_are_kept_by_cuts_after():
    child = merged(adopted("vit", "plain"), seed=5)
    spec = describe(child)
    again = surgery.apply(child, random_plan(spec, 1))
    assert torch.equal(again.blocks[1].step.delta, child.blocks[1].step.delta)
    assert merge_plan(spec, BOTH).child(spec) == spec


def test_folded_is_the_same():
    child = merged(adopted("vit", "plain"), seed=2)
    x, count = images(describe(child)), sum(p.numel() for p in child.parameters())
    folded = fold_steps_(copy.deepcopy(child)).eval()
    assert sum(p.numel() for p in folded.parameters()) == count == cost_of(describe(child)).params
    with torch.no_grad():
        assert apart(folded(x), child(x)) < EXACT
    assert sum(p.numel() for p in fold_steps_(folded).parameters()) == count


@pytest.mark.parametrize("size_bias", [True, False] if WHOLE else [True])
def test_exported_folded(size_bias, tmp_path):
    """One product a merge, nothing left of its parts, and as many weights as the formula counts."""
    child = merged(adopt(example(img_size=(40, 56))), seed=4, size_bias=size_bias).eval()
    names = list(child.state_dict())
    export.export(child, tmp_path / "model.onnx")
    assert list(child.state_dict()) == names
    graph = onnx.load(tmp_path / "model.onnx").graph
    weights = {tuple(sorted(each.dims)) for each in graph.initializer}
    assert (48, 96) in weights
    positions = math.prod(child.pos_embed.shape)
    large = sum(math.prod(each.dims) for each in graph.initializer if math.prod(each.dims) >= 2 * 48)
    counted = sum(p.numel() for p in child.parameters() if p.numel() >= 2 * 48)
    assert counted - positions <= large <= counted + 200
    _, run = export.onnx_session(tmp_path / "model.onnx")
    x = images(describe(child), dtype=torch.float32)
    with torch.no_grad():
        assert apart(run(x), child(x)) < export.PARITY


class TestTimmIsToldTheTruth:
    @pytest.fixture
    def child(self):
        parent = adopt(example(img_size=(40, 56), reg_tokens=2).double().eval())  # a grid of 5 x 7
        return merged(parent, seed=1).eval()

    @pytest.mark.parametrize("how", ["same", "deepcopy", "pickle", "adopt", "cut"])
    def test_maps(self, child, how):
        child = {
            "same": lambda: child,
            "deepcopy": lambda: copy.deepcopy(child),
            "pickle": lambda: pickle.loads(pickle.dumps(child)),
            "adopt": lambda: families.adopt(child),
            "cut": lambda: surgery.apply(child, Plan.keep(describe(child))),
        }[how]()
        x, grids = images(describe(child)), [(5, 7), (5, 4), (3, 4)]
        with torch.no_grad():
            final, maps = child.forward_intermediates(x)
            assert [m.shape[2:] for m in maps] == grids
            assert torch.equal(final, child.forward_features(x))
            lists = child.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
            assert all(torch.equal(m.flatten(2).mT, t) for m, t in zip(maps, lists, strict=True))
            for mode in ("nearest", "bilinear"):
                full = child.forward_intermediates(x, intermediates_only=True, restore=mode)
                assert [m.shape[2:] for m in full] == [(5, 7)] * 3
            assert torch.equal(full[0], maps[0])
            given = child.forward_intermediates(x, indices=[-1, 0], output_dict=True, return_prefix_tokens=True)
            assert [m.shape[2:] for m in given["image_intermediates"]] == [(5, 7), (3, 4)]
            pairs = child.forward_intermediates(x, indices=2, return_prefix_tokens=True, norm=True)[1]
            assert [(m.shape[2:], p.shape[1]) for m, p in pairs] == [((5, 4), 3), ((3, 4), 3)]
            assert [m.shape[2:] for m in child.get_intermediate_layers(x, 2, reshape=True)] == [(5, 4), (3, 4)]

    def test_feature_extractors(self, child):
        net = FeatureGetterNet(copy.deepcopy(child), out_indices=[0, 1, 2])
        assert net.feature_info.get("reduction") == [8, 16, 16]
        assert net.feature_info.get("reduction_hw") == [(8, 8), (8, 16), (16, 16)]
        x = images(describe(child))
        assert [m.shape[2:] for m in net(x)] == [(5, 7), (5, 4), (3, 4)]
        net.model.forward_intermediates.restore = "bilinear"
        assert [m.shape[2:] for m in net(x)] == [(5, 7)] * 3

    def test_input_size(self, child):
        parent = adopt(example(img_size=(40, 56), reg_tokens=2).double().eval())
        parent.load_state_dict({k: v for k, v in child.state_dict().items() if ".step." not in k})
        spec = describe(child)
        child.set_input_size(img_size=(48, 72))
        parent.set_input_size((48, 72))
        wanted = surgery.apply(parent, merge_plan(describe(parent), BOTH))
        assert describe(child) == describe(wanted) != spec
        wanted.load_state_dict(child.state_dict())
        x = images(describe(child))
        with torch.no_grad():
            assert torch.equal(child(x), wanted(x))
            assert [m.shape[2:] for m in child.forward_intermediates(x)[1]] == [(6, 9), (6, 5), (3, 5)]
        child.set_input_size((40, 56))
        assert describe(child) == spec

    def test_sizes_of_counted_tokens_follow(self):
        child = merged(adopt(example(img_size=40).double()), form="mean", size_bias=True)
        counts = [block.step.counts.flatten().tolist()[1:] for block in child.blocks[1:]]
        assert counts[0] == [2, 2, 1] * 5
        assert counts[1] == [4, 4, 2, 4, 4, 2, 2, 2, 1]
        child.set_input_size(32)
        assert child.blocks[2].step.counts.flatten().tolist() == [1, 4, 4, 4, 4]

    def test_too_small_a_size_changes_nothing(self, child):
        spec = describe(child)
        with pytest.raises(DataError, match=r"blocks\.1\.tokens: a grid can be halved along an axis of 2 or more"):
            child.set_input_size(img_size=(40, 8))
        assert describe(child) == spec
        assert torch.isfinite(child(images(spec))).all()

    def test_gradients_reach_the_merges_through_maps(self, child):
        maps = child.forward_intermediates(images(describe(child)), intermediates_only=True, restore="bilinear")
        sum(m.square().mean() for m in maps).backward()
        assert all(float(block.step.delta.grad.abs().sum()) > 0 for block in child.blocks[1:])


class TestRefused:
    def test_windows(self):
        spec = describe(adopted("swin", "windows"))
        with pytest.raises(MethodError, match="merges must be empty for this model: token cuts are not possible"):
            merge_plan(spec, [(1, "w")])
        steps = [BlockPlan(), BlockPlan(tokens=GridMerge(axis="w"))] + [BlockPlan()] * (len(spec.blocks()) - 2)
        with pytest.raises(PlanError, match="token cuts are not possible on windowed attention"):
            Plan.of(spec, steps).child(spec)

    def test_more_than_the_grid_allows(self):
        spec = describe(adopt(example(depth=5)))
        with pytest.raises(PlanError, match=r"blocks\.3\.tokens: .* 2 or more, but along 'w' 4 x 1 has 1"):
            merge_plan(spec, [(1, "w"), (2, "w"), (3, "w")])

    @pytest.mark.parametrize("merges", [[(0, "w")], [(3, "w")], [(1, "w"), (1, "h")]])
    def test_sites(self, merges):
        with pytest.raises(MethodError, match="must be between two of 3 blocks, after 1 to 2, but got"):
            merge_plan(describe(adopted("vit", "plain")), merges)

    def test_after_dropping_and_twice(self):
        spec = describe(adopted("vit", "plain"))
        steps = [Drop(kept=(0, 1, 2, 3)), GridMerge(axis="w"), None]
        with pytest.raises(PlanError, match="while patches fill a grid, but some were dropped"):
            Plan.of(spec, [BlockPlan(tokens=step) for step in steps]).child(spec)
        with pytest.raises(PlanError, match="before others are merged or chosen"):
            Plan.of(spec, [BlockPlan(tokens=step) for step in steps[1:] + steps[:1]]).child(spec)
        small = merge_plan(spec, [(1, "w")]).child(spec)
        with pytest.raises(PlanError, match="can have one token step, but it already has 'grid'"):
            merge_plan(small, [(1, "h")])

    def test_moving_grids(self):
        spec = describe(adopted("vit", "dynamic"))
        with pytest.raises(PlanError, match="must stay where neighbors are merged, but dynamic_img_size is on"):
            merge_plan(spec, [(1, "w")])

    def test_other_tokens(self):
        child = merged(adopted("vit", "plain"))
        with pytest.raises(DataError, match=r"must be given 1 \+ 4 x 4 tokens, but got 21"):
            child.blocks[1](torch.zeros(1, 21, 48, dtype=torch.float64))


def test_thirds():
    assert thirds(deit("deit_small")) == ((4, "w"), (8, "h"))
    assert thirds(describe(adopted("vit", "plain"))) == ((1, "w"), (2, "h"))
