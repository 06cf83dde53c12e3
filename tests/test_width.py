"""The residual width as an axis: what a cut of it computes, costs and leaves, and the methods that choose it.

The law that a cut equals the masked parent, with norms over what is kept, is one of `vitrim.testing.FAMILY_LAWS`.
"""

import copy
import itertools

import pytest
import torch
from timm.layers import AttentionPoolLatent
from torch.nn import functional as F

from tests.children import KINDS, child_of
from tests.samples import IDS, PRESETS, adopted, apart, digits, images, kept_widths, random_plan, timm_model
from tests.tables import proportional
from tests.tolerance import EXACT
from vitrim import families, methods
from vitrim.cut import surgery
from vitrim.cut.fill import fill
from vitrim.cut.observe import Gated, axes, masked
from vitrim.cut.width import by_channel, hearing, keeping, readers, widths
from vitrim.deploy import optimized, store
from vitrim.families import adopt, blocks_of, describe
from vitrim.measure import counted
from vitrim.methods.taylor import taylor_scores
from vitrim.nn.pooling import widen_
from vitrim.nn.segment import Head
from vitrim.report.blocks import sheet
from vitrim.words.budget import Budget
from vitrim.words.costs import cost_of
from vitrim.words.errors import BudgetError, DataError, MethodError, PlanError, SpecError
from vitrim.words.plain import dump, load
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Skip, Spec

EACH = pytest.mark.parametrize(("family", "preset"), PRESETS, ids=IDS)
POOLED = pytest.mark.parametrize(("family", "preset"), [("vit", "map"), ("eva", "core")])
"""Their heads pool by attention, which keeps its width inside."""

POST = [("eva", "post"), ("swin_v2", "padded")]
"""Their norms follow the branches, so that these read the stream as it is."""


def narrow(spec, seed=0, keep=0.7):
    """A plan that cuts the residual width of every stage, and nothing else."""
    draw = torch.Generator().manual_seed(seed)
    kept = [
        tuple(sorted(torch.randperm(stage.width, generator=draw)[: max(1, int(keep * stage.width))].tolist()))
        for stage in spec.stages
    ]
    return Plan.of(spec, [BlockPlan()] * len(spec.blocks()), kept)


@EACH
def test_every_width_is_priced_and_described(family, preset):
    """Costs are counted at widths from 1 to all, and what the host says of a channel does not depend on its width."""
    parent = adopted(family, preset)
    spec = describe(parent)
    assert len(spec.host.channels) == len(spec.stages)
    for keep in (0.0, 0.5, 1.0):
        child = surgery.apply(parent, narrow(spec, 1, keep))
        small = describe(child)
        assert small == narrow(spec, 1, keep).child(spec)
        assert small.host.channels == spec.host.channels
        assert cost_of(small) == counted(child)
        assert [stage.width for stage in small.stages] == [max(1, int(keep * s.width)) for s in spec.stages]


@EACH
def test_it_is_a_model_of_its_family_in_every_way(family, preset, tmp_path):
    """Stored, built, optimized, with a new head, and cut once more."""
    parent = adopted(family, preset)
    spec = describe(parent)
    child = surgery.apply(parent, narrow(spec).then(random_plan(narrow(spec).child(spec), 1), spec))
    x = images(spec)
    with torch.no_grad():
        wanted = child(x)
        again = store.load(store.save(child, tmp_path / "m.safetensors"))
        assert describe(again) == describe(child)
        assert torch.equal(again(x), wanted)
        assert apart(optimized(child, multiple=8)(x), wanted) < EXACT
        again.reset_classifier(7)
        assert again(x).shape[-1] == 7 or spec.host.arguments["global_pool"] == ""
    assert describe(again).classes == 7
    assert cost_of(describe(again)) == counted(again)
    assert families.adopt(child).embed_dim == child.embed_dim


def test_features_have_the_width_that_is_kept():
    for name, plan in (("vit", narrow), ("swin", narrow)):
        parent = adopted(name, "plain" if name == "vit" else "windows")
        child = surgery.apply(parent, plan(describe(parent)))
        widths = [stage.width for stage in describe(child).stages]
        assert {info["num_chs"] for info in child.feature_info} == set(widths)
        assert child.num_features == child.head_hidden_size == widths[-1]
        maps = child.forward_intermediates(images(describe(parent)), intermediates_only=True)
        assert maps[-1].shape[1] == widths[-1]


def test_a_child_keeps_what_its_owner_set():
    parent = copy.deepcopy(adopted("vit", "registers")).float()
    parent.cls_token.requires_grad_(False)
    parent.patch_embed.proj.weight.requires_grad_(False)
    parent.head_drop.p = 0.3
    parent.train()
    child = surgery.apply(parent, narrow(describe(parent)))
    frozen = {name for name, p in child.named_parameters() if not p.requires_grad}
    assert frozen == {"cls_token", "patch_embed.proj.weight"}
    assert child.head_drop.p == 0.3
    assert child.training
    assert child.blocks[0].training
    assert next(child.parameters()).dtype == torch.float32
    assert not {p.data_ptr() for p in parent.parameters()} & {p.data_ptr() for p in child.parameters()}


@pytest.mark.parametrize(("family", "preset"), [("vit", "distilled"), ("swin", "sizes"), ("t2t", "average")])
def test_averages_of_an_optimizer_are_cut_alike(family, preset):
    parent = adopted(family, preset)
    plan = random_plan(describe(parent), 3, widths=True)
    child = surgery.apply(parent, plan)
    values = {name: parameter.detach() for name, parameter in parent.named_parameters()}
    cut = surgery.cut_tensors(parent, plan, values)
    for name, value in child.named_parameters():
        if not name.endswith((".attn.bias", ".mlp.bias")):  # constants are made, not cut
            assert torch.equal(cut[name], value), name


@pytest.mark.parametrize("kind", ["fpn", "linear"])
@pytest.mark.parametrize(("family", "preset"), [("vit", "plain"), ("swin", "four")])
def test_a_segmentor_is_cut_with_its_head(kind, family, preset, tmp_path):
    pytest.importorskip("segmentation_models_pytorch")
    from vitrim.families._segmentor import segmentor

    torch.manual_seed(0)
    if preset == "four":
        backbone = (
            families.get("swin")
            .example(img_size=64, depths=(1, 1, 1, 1), num_heads=(2, 2, 2, 4), window_size=2)
            .double()
        )
    else:
        backbone = adopted(family, preset)
    parent = segmentor(backbone, 5, Head(kind=kind, width=32, channels=32)).double().eval()
    for parameter in parent.head.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.25)
    spec, plan, x = describe(parent), random_plan(describe(parent), 4, widths=True), images(describe(parent))
    child = surgery.apply(parent, plan)
    assert describe(child) == plan.child(spec)
    assert describe(child).host.channels == spec.host.channels
    assert cost_of(describe(child)) == counted(child)
    only = narrow(spec)
    with torch.no_grad():
        with keeping(parent, kept_widths(only)):
            wanted = parent(x)
        assert apart(surgery.apply(parent, only)(x), wanted) < EXACT
        again = store.load(store.save(child, tmp_path / "m.safetensors"))
        assert torch.equal(again(x), child(x))


@POOLED
def test_attention_pooling_keeps_its_width_inside(family, preset, tmp_path):
    """Its columns follow; its heads, and all that comes after them, do not. A new head fits what it gives."""
    parent = adopted(family, preset)
    spec = describe(parent)
    child = surgery.apply(parent, narrow(spec))
    width = describe(child).stages[0].width
    assert type(parent.attn_pool) is AttentionPoolLatent
    assert child.attn_pool.kv.weight.shape == (96, width)
    assert child.head_hidden_size == child.attn_pool.out_features == child.head.in_features == 48
    assert child.embed_dim == child.num_features == width
    x = images(spec)
    with torch.no_grad():
        tokens = child.forward_features(x)
        wide = child.attn_pool(tokens)
        child.attn_pool.fused_attn = not child.attn_pool.fused_attn
        assert apart(child.attn_pool(tokens), wide) < EXACT
        pool = copy.deepcopy(parent.attn_pool)
        widen_(pool)
        whole = parent.forward_features(x)
        assert apart(pool(whole), parent.attn_pool(whole)) < EXACT
    child.reset_classifier(7)
    assert child(x).shape == (2, 7)
    assert describe(store.load(store.save(child, tmp_path / "m.safetensors"))) == describe(child)
    child.reset_classifier(5, "avg")
    assert child.head_hidden_size == child.head.in_features == width
    assert child(x).shape == (2, 5)
    again = store.load(store.save(child, tmp_path / "n.safetensors"))
    with torch.no_grad():
        assert torch.equal(again(x), child(x))


def test_a_pooling_cannot_go_where_its_norm_stays():
    parent = adopt(families.get("vit").example(global_pool="map", fc_norm=True).double())
    child = surgery.apply(parent, narrow(describe(parent)))
    before = describe(child)
    with pytest.raises(DataError, match="global_pool: must stay 'map' where a norm of 48 channels follows"):
        child.reset_classifier(5, "avg")
    assert describe(child) == before
    x = images(before)
    assert child(x).shape == (2, 10)


@POOLED
def test_specs_from_before_the_width_of_a_pooling_was_said_are_the_same(family, preset):
    """Such a spec, and the plans for it, fit the model; its width is that of the blocks."""
    spec = describe(adopted(family, preset))
    arguments = {key: value for key, value in spec.host.arguments.items() if key != "pool_width"}
    old = spec.model_copy(update={"host": spec.host.model_copy(update={"arguments": arguments, "channels": ()})})
    assert load(Spec, dump(old)) == old == spec
    assert hash(old) == hash(spec)
    assert describe(families.build(old)) == spec
    wrong = {**arguments, "pool_width": 24}
    with pytest.raises(SpecError, match=r"host.arguments.pool_width: must be the width 48 of the blocks, or more"):
        families.build(spec.model_copy(update={"host": spec.host.model_copy(update={"arguments": wrong})}))


def test_a_lost_branch_leaves_what_its_norm_gives_over_what_is_kept():
    """Where norms follow the branches, a constant is made at the width that is there when the branch goes."""
    parent = adopted("eva", "post")
    spec = describe(parent)
    dead = Plan.of(spec, [BlockPlan(hidden=()), BlockPlan()])
    only = narrow(spec)
    both = only.then(Plan.of(only.child(spec), dead.blocks()), spec)
    child = surgery.apply(parent, both)
    kept = torch.tensor(both.widths()[0])
    old, bias = parent.blocks[0], parent.blocks[0].mlp.fc2.bias[kept]
    wanted = F.layer_norm(bias, (len(kept),), old.norm2.weight[kept], old.norm2.bias[kept], old.norm2.eps)
    assert apart(child.blocks[0].mlp.bias, wanted) < EXACT
    later = surgery.apply(surgery.apply(parent, dead), narrow(dead.child(spec)))
    whole = F.layer_norm(old.mlp.fc2.bias, (48,), old.norm2.weight, old.norm2.bias, old.norm2.eps)
    assert apart(later.blocks[0].mlp.bias, whole[kept]) < EXACT


# -- what is refused


def test_widths_that_cannot_be_kept_are_refused():
    spec = describe(adopted("vit", "plain"))
    nothing = [BlockPlan()] * 3
    with pytest.raises(PlanError, match=r"stages.0.width: at least one channel"):
        Plan.of(spec, nothing, [()]).child(spec)
    with pytest.raises(PlanError, match=r"stages.0.width: kept indices must rise within \[0, 48\)"):
        Plan.of(spec, nothing, [(3, 3)]).child(spec)
    closed = spec.model_copy(update={"host": spec.host.model_copy(update={"channels": ()})})
    with pytest.raises(PlanError, match="can be cut only where everything outside"):
        Plan.of(closed, nothing, [(1, 2)]).child(closed)
    assert closed == spec
    assert load(Spec, dump(spec)).host.channels == spec.host.channels


def test_a_pooling_without_weights_keeps_the_width():
    """Its heads are the channels themselves."""
    spec = describe(adopt(families.get("vit").example(global_pool="prr")))
    assert spec.host.channels == ()
    with pytest.raises(PlanError, match="attention pooling without weights"):
        narrow(spec).child(spec)


def test_a_stem_that_hides_its_channels_cannot_be_narrowed():
    model = copy.deepcopy(adopted("vit", "plain"))
    model.patch_embed.proj = torch.nn.Sequential(model.patch_embed.proj)
    assert describe(model).host.channels == ()
    with pytest.raises(MethodError, match="width must not be cut in this model"):
        methods.get("magnitude", {"width": True}).search(model, None, Budget(macs=0.5), seed=0)


def test_a_head_that_cannot_follow_cannot_be_narrowed():
    model = copy.deepcopy(adopted("vit", "plain"))
    model.head = torch.nn.Sequential(torch.nn.Linear(48, 8), torch.nn.ReLU(), torch.nn.Linear(8, 10)).double()
    assert describe(model).host.channels == ()


# -- scores and gates


def gated_at(reader, gate):
    """Multiply what is read of a stream by ``(D,)``, or by ``(B, D)`` for each image; runs of D alike."""

    def times(x):
        runs = x.shape[-1] // gate.shape[-1]
        factor = torch.cat([gate] * runs, dim=-1)
        return x * factor.view(*factor.shape[:-1], *[1] * (x.dim() - factor.dim()), -1)

    if reader.enters:
        return reader.module.register_forward_pre_hook(lambda _m, given: (times(given[0]), *given[1:]))
    return reader.module.register_forward_hook(lambda _m, _i, out: times(out))


def without_norm():
    """A model whose head reads the stream as it is."""
    torch.manual_seed(2)
    return adopt(families.get("vit").example(final_norm=False, global_pool="avg").double())


SCORED = {f"{family}-{preset}": (family, preset) for family, preset in [("vit", "registers"), ("vit", "map"), *POST]}


@pytest.mark.parametrize("kind", [*SCORED, "bare"])
def test_taylor_scores_the_change_by_a_gate(kind):
    """Half the mean square, over images, of the derivative by a gate on the channels wherever they are read."""
    model = without_norm() if kind == "bare" else adopted(*SCORED[kind])
    x, y = images(describe(model), 4), torch.tensor([1, 0, 3, 2])
    (path, size), *_ = widths(model).items()
    found = taylor_scores(model, [(x, y)], target="labels", width=True)[path]
    gate = torch.ones(4, size, dtype=torch.float64, requires_grad=True)
    handles = [gated_at(reader, gate) for reader in readers(model)[path]]
    loss = F.cross_entropy(model(x), y, reduction="sum")
    (slope,) = torch.autograd.grad(loss, gate)
    for handle in handles:
        handle.remove()
    assert apart(found, 0.5 * slope.square().mean(dim=0)) < 1e-10
    assert set(taylor_scores(model, [(x, y)])) == set(taylor_scores(model, [(x, y)], width=True)) - set(widths(model))


GATED = [("vit", "plain"), ("swin", "windows"), ("t2t", "performer"), ("vit", "map"), *POST, ("bare", "")]


@pytest.mark.parametrize(("family", "preset"), GATED)
def test_gates_through_weights_are_gates_where_channels_are_read(family, preset):
    """Also together with gates of the other axis of the same weights."""
    parent = without_norm() if family == "bare" else copy.deepcopy(adopted(family, preset))
    x = images(describe(parent))
    draw = torch.Generator().manual_seed(0)
    gates = {path: torch.rand(n, generator=draw, dtype=torch.float64) for path, n in widths(parent).items()}
    handles = [gated_at(reader, gates[path]) for path, found in readers(parent).items() for reader in found]
    values = {path: axis for path, axis in axes(parent).items() if axis.name == "v" and axis.scales}
    others = {path: torch.rand(axis.size, generator=draw, dtype=torch.float64) for path, axis in values.items()}
    gates |= others
    with torch.no_grad():
        with masked(parent, others):
            wanted = parent(x)
        for handle in handles:
            handle.remove()
        gated = Gated(parent, gates)
        assert apart(gated(x), wanted) < EXACT
        assert apart(gated.fold_()(x), wanted) < EXACT


def test_a_norm_without_scale_cannot_be_gated():
    model = copy.deepcopy(adopted("vit", "plain"))
    model.norm.weight = None
    with pytest.raises(MethodError, match="norm: a gated stream must be read through norms with a scale"):
        Gated(model, {"stages.0.width": torch.ones(48)})
    bare = without_norm()
    bare.reset_classifier(0)
    with pytest.raises(MethodError, match="has neither norm nor head"):
        readers(bare)


def test_a_branch_that_passes_channels_on_cannot_be_gated():
    parent = adopted("eva", "post")
    spec = describe(parent)
    child = surgery.apply(parent, Plan.of(spec, [BlockPlan(mixer=Skip(leaves="norm")), *[BlockPlan()]]))
    with pytest.raises(MethodError, match=r"blocks.0.before1: a gated stream must be read"):
        Gated(child, {"stages.0.width": torch.ones(48)})


@pytest.mark.parametrize(("family", "preset"), [("swin", "windows"), ("swin_v2", "windows")])
def test_what_is_heard_sums_over_tokens(family, preset):
    model, heard = adopted(family, preset), {}
    x = images(describe(model))
    with torch.no_grad(), hearing(model, lambda path, norm, out: heard.setdefault(path, []).append((norm, out))):
        model(x)
    for path, size in widths(model).items():
        assert all(by_channel(out, norm, size).shape == (2, size) for norm, out in heard[path])
        assert len(heard[path]) == len(readers(model)[path])


# -- choosing widths


@pytest.mark.parametrize("name", ["magnitude", "random", "taylor"])
@pytest.mark.parametrize(
    ("budget", "family", "preset"),
    [("macs=0.5", "vit", "plain"), ("params=0.6", "vit", "plain"), ("macs=0.6", "vit", "map"), ("macs=0.6", *POST[0])],
)
def test_methods_spend_a_budget_on_the_width_too(name, budget, family, preset):
    model = adopt(timm_model(family, preset, torch.float32))
    spec, limit = describe(model), Budget.parse(budget)
    found = methods.get(name, {"width": True}).search(model, digits(model), limit, seed=0)
    child = surgery.apply(model, found.plan)
    # A first-order score says that nothing costs as much as this model's stream; ranks are cut in equal shares.
    if preset == "plain":
        assert (describe(child).stages[0].width < spec.stages[0].width) == (name != "taylor")
    assert limit.admits(cost_of(describe(child)), cost_of(spec))
    assert limit.spent(cost_of(describe(child)), cost_of(spec)) >= 0.98
    assert torch.isfinite(child(images(spec, dtype=torch.float32))).all()
    again = found.again(Budget(macs=0.5)).plan.child(spec)
    assert cost_of(again).macs <= 0.5 * cost_of(spec).macs


@pytest.mark.parametrize(("family", "preset"), [("vit", "plain"), ("vit", "map"), POST[0]])
def test_vit_slim_gates_the_width(family, preset):
    model = adopt(timm_model(family, preset, torch.float32))
    spec, budget = describe(model), Budget(macs=0.5)
    settings = {"width_l1": 1e-3, "train": {"epochs": 1, "batch": 32}}
    found = methods.get("vit_slim", settings).search(model, digits(model), budget, seed=0)
    child = describe(surgery.apply(found.parent, found.plan))
    assert child.stages[0].width < 48
    assert budget.admits(cost_of(child), cost_of(spec))
    assert budget.spent(cost_of(child), cost_of(spec)) >= 0.98


def test_the_width_with_the_least_loss_is_taken():
    """Against every width of the grid, filled by itself; and scores that make one side worthless leave the other."""
    spec = describe(adopted("vit", "plain"))
    draw = torch.Generator().manual_seed(4)
    sizes = {f"{path}.{n}": 48 for path, _, _ in spec.blocks() for n in ("qk", "v")}
    sizes |= {f"{path}.hidden": block.hidden for path, _, block in spec.blocks()}
    scores = {path: torch.rand(n, generator=draw).double() for path, n in sizes.items()}
    budget, whole = Budget(macs=0.5), cost_of(spec).macs

    def lost(plan):
        total = 0.0
        for (path, _, block), one in zip(spec.blocks(), plan.blocks(), strict=True):
            qk, v = one.heads(block.mixer)
            for name, kept in (("qk", qk), ("v", v)):
                flat = [16 * head + i for head, own in enumerate(kept) for i in own]
                total += float(scores[f"{path}.{name}"].sum() - scores[f"{path}.{name}"][flat].sum())
            if one.hidden is not None:
                values = scores[f"{path}.hidden"]
                total += float(values.sum() - values[list(one.hidden)].sum())
        return total

    for weight, least, most in ((1.0, 16, 48), (100.0, 48, 48), (1e-6, 8, 32)):
        stream = weight * torch.rand(48, generator=draw).double() * 3
        plan = fill(spec, {**scores, "stages.0.width": stream}, budget)
        child = plan.child(spec)
        assert least <= child.stages[0].width <= most
        assert 0.98 * 0.5 <= cost_of(child).macs / whole <= 0.5
        kept = plan.widths()[0]
        mine = lost(plan) + (0.0 if kept is None else float(stream.sum() - stream[list(kept)].sum()))
        for width in range(16, 49, 8):
            order = stream.argsort(descending=True, stable=True)[:width].sort().values.tolist()
            only = Plan.of(spec, [BlockPlan()] * 3, [tuple(order)])
            small = only.child(spec)
            if cost_of(small).macs < 0.5 * whole:
                continue
            other = only.then(fill(small, scores, Budget(macs=float(int(0.5 * whole)))), spec)
            assert mine <= lost(other) + float(stream.sum() - stream[order].sum()) + 1e-9


def test_stages_keep_equal_shares():
    spec = describe(adopted("swin", "windows"))
    draw = torch.Generator().manual_seed(0)
    scores = {f"{path}.hidden": torch.rand(block.hidden, generator=draw) for path, _, block in spec.blocks()}
    scores |= {f"stages.{i}.width": 1e-9 * torch.rand(s.width, generator=draw) for i, s in enumerate(spec.stages)}
    child = fill(spec, scores, Budget(macs=0.5), by="score").child(spec)
    assert [stage.width for stage in child.stages] == [16, 32]


def test_a_budget_out_of_reach_is_refused():
    spec = describe(adopted("vit", "plain"))
    scores = {"stages.0.width": torch.rand(48), "stages.0.blocks.0.hidden": torch.rand(192)}
    with pytest.raises(
        BudgetError, match="smallest residual width that is tried, 16 of 48 channels: budget of macs must be at least"
    ):
        fill(spec, scores, Budget(macs=0.01))
    with pytest.raises(BudgetError, match="must be made by a table with times at two of them"):
        fill(spec, scores, Budget(latency=0.5, table=proportional(spec)))
    for name, settings in (("taylor", {"width": True}), ("vit_slim", {"width_l1": 1e-4})):
        assert methods.get(name).plans_by_time
        assert methods.get(name, settings).plans_by_time
        assert not methods.get(name).cuts_width
        assert methods.get(name, settings).cuts_width
    with pytest.raises(MethodError, match=r"stages.0.width: scores must fit the 48 channels"):
        fill(spec, scores | {"stages.0.width": torch.rand(3)}, Budget(macs=0.5))


def test_merging_by_the_stream_sees_what_is_kept():
    """A block without attention compares the stream itself: dropped channels must not take part."""
    from vitrim.words.steps.merge import Merge

    parent = adopted("vit", "plain")
    spec = describe(parent)
    none = ((),) * 3
    first = surgery.apply(
        parent, Plan.of(spec, [BlockPlan(qk=none, v=none, tokens=Merge(count=3)), *[BlockPlan()] * 2])
    )
    only = narrow(describe(first))
    with torch.no_grad():
        with keeping(first, kept_widths(only)):
            wanted = first(images(spec))
        assert apart(surgery.apply(first, only)(images(spec)), wanted) < EXACT


def means():
    """Kinds of children whose convolutions give prefix tokens constants, of the table of all kinds."""
    return [kind for kind in KINDS if kind.endswith("mean") and kind.startswith("conv")][:2]


def test_grid_merges_follow_the_width():
    for kind in ("grid-linear", "grid-channel", "conv3-mixed-norm", *means(), "dead", "skips"):
        model = child_of(adopted("vit", "plain"), kind)
        only = narrow(describe(model))
        with torch.no_grad():
            with keeping(model, kept_widths(only)):
                wanted = model(images(describe(model)))
            assert apart(surgery.apply(model, only)(images(describe(model))), wanted) < EXACT, kind


def test_a_plan_is_explained_with_its_width():
    spec = describe(adopted("swin", "windows"))
    rows = sheet(spec, narrow(spec))
    assert rows[-1].heads == "residual width 16 of 24, 33 of 48"
    assert sum(row.macs for row in rows) == cost_of(narrow(spec).child(spec)).macs
    assert sheet(spec, Plan.keep(spec))[-1].heads == ""


def test_sizes_can_still_be_changed():
    child = surgery.apply(adopted("vit", "plain"), narrow(describe(adopted("vit", "plain"))))
    child = copy.deepcopy(child)
    child.set_input_size(img_size=(48, 32))
    assert child(torch.randn(1, 3, 48, 32, dtype=torch.float64)).shape == (1, 10)
    with pytest.raises((DataError, AssertionError)):
        child(images(describe(adopted("vit", "plain"))))
    assert list(itertools.chain(*[[b.width] for _, b in blocks_of(child)])) == [child.embed_dim] * 3
