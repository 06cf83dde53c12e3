"""Convolutions fitted to an attention: what they must be exactly, what they gain, what is refused."""

import pytest
import torch

from tests.samples import adopted, apart, images, timm_model
from tests.tolerance import EXACT
from vitrim.cut import surgery
from vitrim.cut.compensate import BlockChoice, ConvCut, Importance, Place, Walk, compensated, images_needed, importances
from vitrim.cut.compensate.closed_form import low_rank_fit, root
from vitrim.cut.compensate.hear import attended, mixed
from vitrim.deploy import store
from vitrim.families import adopt, blocks_of, describe
from vitrim.measure import counted
from vitrim.words.costs import cost_of
from vitrim.words.errors import MethodError, PlanError
from vitrim.words.plain import dump, load
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Attention, Conv, Mixture
from vitrim.words.steps.grid_merge import GridMerge
from vitrim.words.steps.merge import Merge

FULL_RANK = 1e-10
"""A regression of 432 features and one eigendecomposition."""


def linear(kernel, width, prefix="mean"):
    return Conv(kernel=kernel, width=width, prefix=prefix, act="none")


def place_of(model, x, index=0, *, alpha=0.0, worth=None):
    """Block `index` of a model with what enters it; every token and direction counts the same unless `worth` is given.

    Weights are as many as the padded windows hold, where there are windows.
    """
    same = {}
    for path, stage, _ in describe(model).blocks():
        rows, columns = stage.grid if stage.window is None else stage.window.padded(stage.grid)
        weights = torch.ones(sum(map(len, x)), stage.prefix + rows * columns)
        same[f"{path}.mixer"] = Importance(weights, torch.eye(stage.width, dtype=torch.float64))
    walk = Walk(model, x, worth or same, 1e-2, alpha)
    place = walk.first()
    with torch.no_grad():
        while walk.at < index:
            place = walk.send([place.block(batch) for batch in place.streams])
    return place


def rebuilt(place, cut):
    mixer, _, state = cut
    return place.rebuilt(mixer, place.block.spec.hidden, state)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize(
    ("family", "preset"),
    [("vit", "plain"), ("vit", "registers"), ("vit", "average"), ("vit", "swiglu"), ("swin", "windows")],
)
def test_a_linear_target_is_recovered_at_full_rank(family, preset, kernel):
    """Grids of 4 x 4 and 4 x 6, none to three prefix tokens, layer scale, no biases, shifted windows with padding."""
    parent = adopted(family, preset)
    spec = describe(parent)
    width = spec.stages[0].width
    keep = [BlockPlan()] * (len(spec.blocks()) - 1)
    model = surgery.apply(parent, Plan.of(spec, [BlockPlan(mixer=linear(kernel, width)), *keep]))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in blocks_of(model)[0][1].attn.parameters():
            value.copy_(torch.randn(value.shape, generator=draw, dtype=torch.float64) / width**0.5)
    seen, fresh = images(spec, 160).split(128)
    place, other = place_of(model, [seen]), place_of(model, [fresh])
    again = rebuilt(place, ConvCut(place, strength=0.0).cut(linear(kernel, width)))
    x = other.streams[0]
    with torch.no_grad():
        assert apart(again(x), place.block(x)) < FULL_RANK


def test_it_is_the_best_map_of_its_rank():
    """The error in the metric is what the discarded singular values of the full fit say, and no map's is less."""
    draw = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(200, n, generator=draw, dtype=torch.float64) for n in (12, 8))
    y = x @ torch.randn(12, 8, generator=draw, dtype=torch.float64) + noise
    metric = torch.diag(torch.linspace(0.1, 3, 8, dtype=torch.float64))
    x, y = x - x.mean(0), y - y.mean(0)
    # The floor of the metric is part of what is minimized.
    half = root(metric + 1e-3 * metric.diagonal().mean() * torch.eye(8, dtype=torch.float64))
    fitted = x @ torch.linalg.lstsq(x, y).solution
    rest = ((y - fitted) @ half).square().sum()
    sizes = torch.linalg.svdvals(fitted @ half)
    for rank in (1, 3, 8, 11):
        inner, back = low_rank_fit(x.mT @ x / 200, y.mT @ x / 200, metric, 0.0)(rank)
        error = ((y - x @ inner.mT @ back.mT) @ half).square().sum()
        assert inner.shape == (rank, 12)
        assert float(error) == pytest.approx(float(rest + sizes[rank:].square().sum()), rel=1e-9)
    between = (x @ low_rank_fit(x.mT @ x / 200, y.mT @ x / 200, metric, 0.0)(3)[0].mT).mT.cov(correction=0)
    assert torch.allclose(between, torch.eye(3, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("kernel", [1, 3])
def test_an_open_relu_is_the_linear_form_on_the_calibration_images(kernel, norm):
    """Also in training mode, where a batch norm takes the statistics of the images themselves."""
    model = adopted("vit", "registers")
    place = place_of(model, [images(describe(model), 64)])
    cut = ConvCut(place)
    plain = rebuilt(place, cut.cut(linear(kernel, 20)))
    bent = rebuilt(place, cut.cut(linear(kernel, 20).model_copy(update={"act": "relu", "norm": norm})))
    with torch.no_grad():
        wanted = plain(place.streams[0])
        assert apart(bent(place.streams[0]), wanted) < FULL_RANK
        assert apart(bent.train()(place.streams[0]), wanted) < FULL_RANK
        bent.eval().attn.proj.weight.zero_()  # the test would be empty if nothing of the bottleneck came through
        assert apart(bent(place.streams[0]), wanted) > 1e-3


def test_weights_of_shifted_windows_lie_where_the_outputs_do():
    model = adopted("swin", "windows")
    place = place_of(model, [images(describe(model), 16)], 1)
    assert any(place.block.shift)
    out = attended(place.block, place.streams[0]).out
    assert torch.equal(ConvCut(place)._weights(out[..., 0]), mixed(place.block, place.streams[0]).out[..., 0])


def test_more_rank_is_never_worse_and_prefix_tokens_get_their_mean():
    model = adopted("vit", "distilled")
    x = list(images(describe(model), 48).split(20))
    worth = importances(model, x, seed=0)
    place = place_of(model, x, 1, worth=worth)
    cut = ConvCut(place, strength=0.0)
    weights = worth["stages.0.blocks.1.mixer"].weights[..., None].double()
    wanted = torch.cat([mixed(place.block, batch).out for batch in place.streams])
    half = root(worth["stages.0.blocks.1.mixer"].metric + 0)
    errors = []
    for kernel, width in ((1, 8), (1, 48), (3, 8), (3, 24), (3, 48)):
        block = rebuilt(place, cut.cut(linear(kernel, width)))
        with torch.no_grad():
            out = torch.cat([mixed(block, batch).out for batch in place.streams])
        error = weights * ((out - wanted) @ half).square()
        errors.append(float(error[:, 2:].sum()))
        mean = (weights * wanted)[:, :2].sum(0) / weights[:, :2].sum(0)
        assert apart(out[:, :2], mean.expand(len(out), -1, -1)) < EXACT
    constant = (weights * wanted)[:, 2:].sum((0, 1)) / weights[:, 2:].sum((0, 1))
    errors.append(float((weights * ((constant - wanted) @ half).square())[:, 2:].sum()))
    one_small, one, three_small, three_middle, three, nothing = errors
    assert nothing > one_small >= one > three
    assert nothing > three_small >= three_middle >= three


@pytest.mark.parametrize("step", [None, GridMerge(axis="w", form="mean", size_bias=True)])
def test_a_walk_with_convolutions(step, tmp_path):
    """Convolution, attention, then a convolution on the whole or on the halved grid, with fewer neurons behind both."""
    parent = adopt(timm_model("vit", "registers"))
    spec = describe(parent)
    base = surgery.apply(parent, Plan.of(spec, [BlockPlan(), BlockPlan(tokens=step), BlockPlan()]))
    x = list(images(spec, 96).split(48))
    before = {name: value.clone() for name, value in base.state_dict().items()}
    choices = [
        BlockChoice(conv=linear(3, 24)),
        BlockChoice(conv=linear(1, 24)) if step is not None else BlockChoice(),
        BlockChoice(conv=linear(3, 16), hidden=150),
    ]
    plan, grafts = compensated(base, choices, x, importances(base, x, seed=0))
    child = surgery.apply(base, plan, grafts=grafts).eval()
    assert describe(child) == plan.child(describe(base))
    assert counted(child) == cost_of(describe(child)) < cost_of(describe(base))
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    if step is not None:
        assert child.blocks[2].attn.grid == (4, 2)
    store.save(child, tmp_path / "child.safetensors")
    fresh = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(store.load(tmp_path / "child.safetensors")(fresh), child(fresh))
        wanted = base(fresh)
        bare = surgery.apply(base, plan).eval()
        errors = [float((model(fresh) - wanted).square().mean()) for model in (child, bare)]
        assert errors[0] < 0.6 * errors[1]


def test_the_dense_stream_is_approached():
    """With alpha, a fit makes up for what the block before lost."""
    parent = adopt(timm_model("vit", "plain"))
    spec = describe(parent)
    x = [images(spec, 128)]
    worth = importances(parent, x, seed=0)
    choices = [BlockChoice(hidden=48), BlockChoice(conv=linear(3, 48)), BlockChoice()]
    after = []
    for alpha in (0.0, 1.0):
        plan, grafts = compensated(parent, choices, x, worth, alpha=alpha)
        child = surgery.apply(parent, plan, grafts=grafts).eval()
        with torch.no_grad():
            streams = [
                model.blocks[1].attn(model.blocks[1].norm1(s)) + s
                for model, s in ((m, m.blocks[0](m.patch_embed_tokens(x[0]))) for m in map(_Stem, (parent, child)))
            ]
        after.append(float((streams[0] - streams[1])[:, 1:].square().mean()))
    assert after[1] < after[0]


class _Stem:
    """A model's blocks, and what enters the first of them."""

    def __init__(self, model):
        self.model, self.blocks = model, model.blocks

    def patch_embed_tokens(self, x):
        return self.model.norm_pre(self.model._pos_embed(self.model.patch_embed(x)))


def test_without_a_fit_it_is_an_attention_of_tokens_to_themselves():
    model = adopted("vit", "plain")
    spec = describe(model)
    attn, x = model.blocks[0].attn, torch.randn(2, 17, 48, dtype=torch.float64)
    plan = Plan.of(spec, [BlockPlan(mixer=linear(1, 60)), BlockPlan(), BlockPlan()])
    conv = surgery.apply(model, plan).blocks[0].attn
    with torch.no_grad():
        values = torch.nn.functional.linear(x, attn.qkv.weight[-48:], attn.qkv.bias[-48:])
        wanted = attn.proj(values)
        assert apart(conv(x)[:, 1:], wanted[:, 1:]) < EXACT
        nothing = attn.proj(attn.qkv.bias[-48:].expand(2, 1, -1))
        assert apart(conv(x)[:, :1], nothing) < EXACT


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_cut_of_the_residual_width_takes_it_along(kernel):
    """Before, after, or in one plan with it: constants of prefix tokens are cut like everything in the stream."""
    model = adopted("vit", "registers")
    spec = describe(model)
    conv = Plan.of(spec, [BlockPlan(), BlockPlan(mixer=linear(kernel, 20)), BlockPlan()])
    keep = [BlockPlan()] * 3
    narrow = Plan.of(spec, keep, [tuple(range(1, 48, 2))])
    after = surgery.apply(surgery.apply(model, conv), narrow)
    before = surgery.apply(surgery.apply(model, narrow), conv)
    whole = surgery.apply(model, conv.then(narrow, spec))
    x = images(spec, 3)
    with torch.no_grad():
        wanted = whole(x)
        assert whole.blocks[1].attn.mean.shape == (3, 24)
        assert apart(after(x), wanted) < EXACT
        assert apart(before(x), wanted) < EXACT


def test_forms_are_read_and_written():
    """What an older version wrote has no activation in it, and reads as the published one."""
    old = {"kind": "conv", "kernel": 3, "width": 16, "prefix": "zero", "mixture": None, "norm": False}
    assert load(Conv, old) == Conv(kernel=3, width=16, prefix="zero")
    new = linear(3, 7)
    assert load(Conv, dump(new)) == new
    mixture = Mixture(heads=2, temperature=1.0)
    for wrong in ({"norm": True}, {"norm": True, "mixture": mixture}):
        with pytest.raises(ValueError, match="without activation must have no norm and no mixture"):
            Conv(kernel=1, width=4, act="none", **wrong)


class TestRefusals:
    def test_few_images(self):
        model = adopted("vit", "plain")
        place = place_of(model, [images(describe(model), 26)])
        assert images_needed(48, 16, 3) == 27
        with pytest.raises(MethodError, match="3 x 3 convolution must have at least 27 images, but got 26; give more"):
            ConvCut(place).cut(linear(3, 8))
        ConvCut(place).cut(linear(1, 8))

    def test_patches_without_a_grid(self):
        model = adopt(timm_model("vit", "plain"))
        merge = Plan.of(describe(model), [BlockPlan(tokens=Merge(count=3)), BlockPlan(), BlockPlan()])
        merged = surgery.apply(model, merge)
        x = [images(describe(model), 8)]
        place = place_of(merged, x, 1, worth=importances(merged, x, seed=0))
        with pytest.raises(MethodError, match="3 x 3 convolution must have patches that fill a grid"):
            ConvCut(place).cut(linear(3, 8))
        ConvCut(place).cut(linear(1, 8))

    def test_norms_that_follow_their_branch(self):
        model = adopted("swin_v2", "windows")
        with pytest.raises(MethodError, match="where the norm comes before its branch, but here it follows"):
            ConvCut(place_of(model, [images(describe(model), 4)]))

    def test_forms(self):
        model = adopted("vit", "swiglu")
        cut = ConvCut(place_of(model, [images(describe(model), 64)]))
        with pytest.raises(MethodError, match="ReLU can only be opened where the output projection has a bias"):
            cut.cut(Conv(kernel=1, width=8))
        mixture = Conv(kernel=1, width=16, mixture=Mixture(heads=3, temperature=1.0), norm=True)
        with pytest.raises(MethodError, match="must have plain kernels"):
            cut.cut(mixture)

    def test_a_grid_that_changes(self):
        model = adopted("vit", "dynamic")
        spec = describe(model)
        with pytest.raises(PlanError, match="must know the grid, but dynamic_img_size is on"):
            Plan.of(spec, [BlockPlan(mixer=linear(3, 8)), BlockPlan(), BlockPlan()]).child(spec)
        x = list(images(spec, 8).split(4))
        plan, grafts = compensated(
            model, [BlockChoice(conv=linear(1, 40)), BlockChoice(), BlockChoice()], x, importances(model, x, seed=0)
        )
        child = surgery.apply(model, plan, grafts=grafts).eval()
        with torch.no_grad():
            assert torch.isfinite(child(torch.randn(1, 3, 48, 40, dtype=torch.float64))).all()
        assert not isinstance(describe(child).blocks()[0][2].mixer, Attention)
        assert isinstance(place_of(model, x), Place)
