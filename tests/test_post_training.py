"""Compensation on whole models, the table of single cuts, and what is read off it."""

import copy
import dataclasses
import itertools

import pytest
import torch

from tests.samples import PRESETS, adopted, apart, images, timm_model
from tests.tables import proportional
from tests.tolerance import EXACT
from vitrim import families, methods
from vitrim.cut import surgery
from vitrim.cut.compensate import BlockChoice, compensated, importances, recovered
from vitrim.cut.compensate.attention import AttentionCut
from vitrim.cut.compensate.closed_form import Moments, damped
from vitrim.cut.compensate.hear import attended, hidden
from vitrim.cut.compensate.neurons import NeuronCut
from vitrim.cut.compensate.walk import Walk
from vitrim.data import eval_loader
from vitrim.families import adopt, blocks_of, describe
from vitrim.methods import Data
from vitrim.methods.post_training import options as _options
from vitrim.methods.post_training.budgets import read_off
from vitrim.methods.post_training.calibration import Calibration, read_calibration, write_calibration
from vitrim.methods.post_training.options import ALL, Kinds
from vitrim.methods.post_training.schedule import last_exact, merging, schedules
from vitrim.methods.post_training.sensitivity import needed
from vitrim.nn.weights import fingerprint
from vitrim.testing import digits, short
from vitrim.words.budget import Budget
from vitrim.words.costs import block_cost, cost_of
from vitrim.words.errors import BudgetError, MethodError
from vitrim.words.plain import FrozenDict
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Attention
from vitrim.words.steps.drop import Drop
from vitrim.words.steps.grid_merge import GridMerge

LOW_RANK = 1e-10
"""Full rank on a whole model: several decompositions a layer."""


def batches(spec, count=24):
    return list(images(spec, count).split(12))


WITH_LOGITS = [(family, preset) for family, preset in PRESETS if (family, preset) != ("swin", "sizes")]
"""All but the one whose head gives a map of logits."""


def whole(spec):
    """Choices that ask for new bases and cut nothing."""
    found = []
    for _, stage, block in spec.blocks():
        qk = v = None
        if isinstance(block.mixer, Attention) and block.mixer.v:
            qk = block.mixer.qk[0] if stage.form.head_norm is None else None
            v = block.mixer.v[0] if stage.form.mixed_norm is None else None
        found.append(BlockChoice(qk=qk, v=v))
    return found


@pytest.mark.parametrize(("family", "preset"), WITH_LOGITS)
def test_nothing_removed_is_identity(family, preset):
    """Low rank at full rank, in every family: windows, q/k norm, layer scale, gates, prefix tokens, pooled heads."""
    parent = adopted(family, preset)
    spec = describe(parent)
    x = batches(spec)
    worth = importances(parent, x, seed=0)
    for alpha in (0.0, 0.3):
        plan, grafts = compensated(parent, whole(spec), x, worth, alpha=alpha)
        child = surgery.apply(parent, plan, grafts=grafts)
        assert describe(child) == spec
        with torch.no_grad():
            assert apart(child(x[0]), parent(x[0])) < LOW_RANK


def narrow(spec):
    """Choices that cut heads' channels and neurons wherever that is allowed."""
    found = []
    for (_, stage, block), choice in zip(spec.blocks(), whole(spec), strict=True):
        qk, v = (None if width is None else max(1, width // 2) for width in (choice.qk, choice.v))
        hidden = block.hidden // 2 if block.hidden and stage.form.hidden_norm is None else None
        found.append(BlockChoice(qk=qk, v=v, hidden=hidden))
    return found


@pytest.mark.parametrize(("family", "preset"), WITH_LOGITS)
def test_a_cut_is_what_the_plan_says(family, preset):
    parent = adopted(family, preset)
    spec = describe(parent)
    before = {name: value.clone() for name, value in parent.state_dict().items()}
    x = batches(spec)
    plan, grafts = compensated(parent, narrow(spec), x, importances(parent, x, seed=0))
    child = surgery.apply(parent, plan, grafts=grafts)
    assert describe(child) == plan.child(spec)
    assert cost_of(describe(child)).macs < cost_of(spec).macs
    with torch.no_grad():
        assert bool(torch.isfinite(child(x[0])).all())
    assert all(torch.equal(value, before[name]) for name, value in parent.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in parent.modules())


@pytest.mark.parametrize("preset", ["plain", "registers", "qk_norm", "glu"])
def test_compensated_is_never_worse_layer_by_layer(preset):
    """Weighted error of each layer's output, on what enters it after the cuts before, against the bare slice."""
    parent = adopted("vit", preset)
    spec = describe(parent)
    x = batches(spec)
    worth = importances(parent, x, seed=0)
    cut = Plan.of(
        spec,
        [
            BlockPlan(
                qk=None if stage.form.head_norm else tuple(tuple(range(0, k, 2)) for k in block.mixer.qk),
                v=tuple(tuple(range(1, v, 2)) for v in block.mixer.v),
                hidden=tuple(range(0, block.hidden, 3)),
            )
            for _, stage, block in spec.blocks()
        ],
    )
    bare = surgery.apply(parent, cut)
    child = surgery.apply(parent, cut, grafts=recovered(parent, cut, x, alpha=0.0))
    walk = Walk(parent, x, worth, 1e-2, 0.0)
    place = walk.first()
    for number, ((_, mine), (_, slice_)) in enumerate(zip(blocks_of(child), blocks_of(bare), strict=True)):
        wanted = AttentionCut(place).targets

        def error(block, place=place, wanted=wanted):
            weights = place.worth[f"{place.path}.mixer"].weights.split(12)
            pairs = zip(place.streams, wanted, weights, strict=True)
            return sum(float((w * (attended(block, a).out - b).square().sum(-1)).sum()) for a, b, w in pairs)

        assert error(mine) <= error(slice_) * (1 + 1e-9)
        if number + 1 < len(spec.blocks()):
            with torch.no_grad():
                place = walk.send([mine(batch) for batch in place.streams])


def test_ridge_after_any_cut_brings_the_output_nearer():
    model = adopt(timm_model("vit", "plain"))
    spec = describe(model)
    x = batches(spec, 60)
    plan = methods.get("magnitude").search(model, None, Budget.parse("macs=0.7"), seed=0).plan
    with torch.no_grad():
        dense = model(x[0])
        bare = surgery.apply(model, plan)(x[0])
        kept = surgery.apply(model, plan, grafts=recovered(model, plan, x))(x[0])
    assert (kept - dense).square().mean() < 0.5 * (bare - dense).square().mean()


def test_ridge_after_token_drops_and_dead_branches():
    model = adopt(timm_model("vit", "plain"))
    spec = describe(model)
    keep = tuple(range(0, 16, 2))
    decisions = [
        BlockPlan(hidden=tuple(range(40))),
        BlockPlan(qk=((), (0, 1, 2, 3), ()), v=((), (4, 5, 6, 7), ()), tokens=Drop(kept=keep)),
        BlockPlan(v=((), (), ()), hidden=()),
    ]
    plan = Plan.of(spec, decisions)
    x = batches(spec, 60)
    with torch.no_grad():
        dense, bare = model(x[0]), surgery.apply(model, plan)(x[0])
        kept = surgery.apply(model, plan, grafts=recovered(model, plan, x))(x[0])
    assert (kept - dense).square().mean() < (bare - dense).square().mean()


def test_attention_received_is_that_of_the_softmax():
    model = adopted("vit", "plain")
    block = blocks_of(model)[0][1]
    x = torch.randn(2, 17, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = torch.rand(2, 17, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    heard = attended(block, x, weights)
    q, k = (t.unflatten(-1, (3, 16)).transpose(1, 2) for t in (heard.queries, heard.keys))
    probabilities = (q @ k.mT * block.attn.scale).softmax(-1)
    wanted = (weights[:, None, :, None] * probabilities).sum(2).mT
    assert apart(heard.received, wanted) < EXACT


def test_importance_is_the_gradient_at_the_last_layer():
    model = copy.deepcopy(adopted("vit", "registers"))
    x = images(describe(model), 6)
    worth = importances(model, [x[:4], x[4:]], seed=0)["stages.0.blocks.1.mlp"]
    assert worth.weights.shape == (6, 19)
    assert float(worth.weights.mean()) == pytest.approx(1.1)
    assert float(torch.linalg.eigvalsh(worth.metric).min()) > -1e-12
    last = importances(model, [x], seed=0)["stages.0.blocks.2.mlp"].weights
    assert float(last[:, 1:].max()) == pytest.approx(0.1)  # the head reads the class token alone


# -- the table, and what is read off it


def made_up(model) -> Calibration:
    """A table by formulas, for what is read off it."""
    spec = describe(model)
    shares, losses = {}, {}
    for number, (path, _, block) in enumerate(spec.blocks()):
        for kind in ("qk", "v", "hidden"):
            points = (0.25, 0.5, 0.75) + ((1.0,) if kind == "hidden" else ())
            shares[f"{path}.{kind}"] = points
            losses[f"{path}.{kind}"] = tuple((1 + number) * point**2 for point in points)
        shares[f"{path}.heads"] = (1.0,) * (len(block.mixer.v) + 1)
        losses[f"{path}.heads"] = (*(0.5 + head for head in range(len(block.mixer.v))), 5.0)
    rows = ((0,) * len(spec.blocks()), (2, 2, 0), (4, 4, 0))
    return Calibration(
        spec=spec,
        weights=fingerprint(model),
        input=digits(model).input,
        count=32,
        shares=shares,
        losses=losses,
        merges=rows,
        merged=(0.0, 0.05, 0.9),
    )


@pytest.mark.parametrize("budget", ["macs=0.8", "macs=0.5", "macs=0.35", "params=0.6", "macs=0.7,params=0.8"])
def test_what_is_read_off_spends_its_budget(budget):
    model = adopted("vit", "plain")
    spec, limit = describe(model), Budget.parse(budget)
    found = read_off(made_up(model), limit, merge=True, exact=True)
    steps = merging(spec, found.merges, found.exact)
    base = surgery.apply(model, steps)
    x = batches(spec)
    plan, _ = compensated(base, found.choices, x, importances(base, x, seed=0))
    cost = cost_of(plan.child(describe(base)))
    assert limit.admits(cost, cost_of(spec))
    assert limit.spent(cost, cost_of(spec)) >= 0.98


@pytest.mark.parametrize("share", [0.8, 0.5, 0.35])
def test_what_is_read_off_spends_its_time(share):
    model = adopted("vit", "plain")
    spec = describe(model)
    limit = Budget(latency=share, table=proportional(spec))
    found = read_off(made_up(model), limit, merge=True, exact=True)
    base = surgery.apply(model, merging(spec, found.merges, found.exact))
    x = batches(spec)
    plan, _ = compensated(base, found.choices, x, importances(base, x, seed=0))
    cost = limit.cost(plan.child(describe(base)))
    assert limit.admits(cost, limit.cost(spec))
    assert limit.spent(cost, limit.cost(spec)) >= 0.95


def test_a_smaller_budget_never_promises_less_loss():
    table = made_up(adopted("vit", "plain"))
    losses = [
        read_off(table, Budget.parse(f"macs={share}"), merge=True, exact=True).loss for share in (0.9, 0.7, 0.5, 0.3)
    ]
    assert losses == sorted(losses)


def test_budget_below_reach_names_the_least():
    table = made_up(adopted("vit", "plain"))
    with pytest.raises(BudgetError, match=r"budget of macs must be at least [\d,]+ for this model, but got"):
        read_off(table, Budget.parse("macs=0.01"), merge=True, exact=True)
    with pytest.raises(BudgetError, match="must be at least"):
        read_off(table, Budget.parse("macs=0.3"), merge=True, exact=True, kinds=Kinds((), False, False, False))


def test_calibration_is_paper(tmp_path):
    model = adopt(timm_model("vit", "plain", torch.float32))
    table = made_up(model)
    write_calibration(tmp_path / "c.safetensors", table)
    assert dataclasses.asdict(read_calibration(tmp_path / "c.safetensors")) == dataclasses.asdict(table)


def test_calibrations_that_do_not_fit_are_refused(tmp_path):
    model = adopt(timm_model("vit", "plain", torch.float32))
    table, path = made_up(model), tmp_path / "c.safetensors"
    write_calibration(path, table)
    data, budget = digits(model), Budget.parse("macs=0.7")
    method = methods.get("post_training", {"calibration": str(path)})
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.head.bias.add_(1)
    with pytest.raises(MethodError, match="its weights were others"):
        method.search(other, data, budget, seed=0)
    narrow_ = adopt(timm_model("vit", "registers", torch.float32))
    with pytest.raises(MethodError, match="another structure"):
        method.search(narrow_, digits(narrow_), budget, seed=0)
    size = dataclasses.replace(data, input=data.input.model_copy(update={"size": (40, 40)}))
    with pytest.raises(MethodError, match=r"images must be of the size \(32, 32\)"):
        method.search(model, size, budget, seed=0)
    mean = dataclasses.replace(data, input=data.input.model_copy(update={"mean": (0.1, 0.1, 0.1)}))
    with pytest.raises(MethodError, match="normalized as they were"):
        method.search(model, mean, budget, seed=0)
    path.write_bytes(b"no tensors")
    with pytest.raises(MethodError, match="must be whole safetensors"):
        method.search(model, data, budget, seed=0)
    path.unlink()
    with pytest.raises(MethodError, match="must exist"):
        method.search(model, data, budget, seed=0)


def test_too_few_images_say_how_many():
    model = adopt(timm_model("t2t", "performer", torch.float32))
    assert needed(describe(model)) > 2
    data = digits(model)
    few = dataclasses.replace(data, calibration=data.calibration.pick(range(2)))
    with pytest.raises(MethodError, match=r"must have at least \d+ images for this model, but got 2"):
        methods.get("post_training").search(model, few, Budget.parse("macs=0.7"), seed=0)


def test_broken_and_constant_activations_are_named():
    model = adopt(timm_model("vit", "plain", torch.float32))
    data, budget = digits(model), Budget.parse("macs=0.7")
    dead = copy.deepcopy(model)
    with torch.no_grad():
        dead.blocks[1].mlp.fc1.weight.zero_()
    with pytest.raises(MethodError, match=r"stages\.0\.blocks\.1\.hidden: activations must vary"):
        methods.get("post_training").search(dead, data, budget, seed=0)
    loud = copy.deepcopy(model)
    with torch.no_grad():
        loud.blocks[1].attn.proj.weight.mul_(1e30)
        loud.blocks[1].attn.qkv.weight.mul_(1e30)
    with pytest.raises(MethodError, match="must be finite"):
        methods.get("post_training").search(loud, data, budget, seed=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_varies_by_rounding_alone_is_constant(dtype):
    """The mean of equal numbers is not exact, so that centered they are not zero."""
    draw = torch.Generator().manual_seed(0)
    constant = torch.randn(5, generator=draw, dtype=dtype) * 1e3
    moments = Moments("here")
    for _ in range(3):
        features = constant.expand(2, 7, 5)
        moments.add(torch.rand(2, 7, generator=draw, dtype=dtype), features, features)
    assert not moments.gram.any()
    with pytest.raises(MethodError, match="here: activations must vary"):
        damped(moments.gram, 1e-2, "here")
    moments.add(
        torch.rand(2, 7, generator=draw, dtype=dtype), constant + 1e-2 * torch.randn(2, 7, 5, dtype=dtype), features
    )
    assert (moments.gram.diagonal() > 1e-6).all()


def test_merge_is_refused_or_left_out_in_windows():
    model = adopt(timm_model("swin", "windows", torch.float32))
    with pytest.raises(MethodError, match="merge=none"):
        methods.get("post_training", {"merge": "bipartite"}).search(
            model, digits(model), Budget.parse("macs=0.7"), seed=0
        )


def test_dense_prediction_keeps_every_patch():
    model = adopt(timm_model("vit", "plain", torch.float32))
    method = methods.get("post_training", {"merge": "none"})
    found = method.search(model, digits(model), Budget.parse("macs=0.8"), seed=0)
    child = surgery.apply(model, found.plan, grafts=found.grafts)
    assert all(block.tokens is None and not block.only_prefix for _, _, block in describe(child).blocks())
    x = torch.zeros(1, 3, 32, 32)
    assert child.forward_intermediates(x)[1][-1].shape == model.forward_intermediates(x)[1][-1].shape


def test_same_seed_same_weights_and_resumed(tmp_path):
    model = adopt(timm_model("vit", "plain", torch.float32))
    data: Data = digits(model)
    method, budget = methods.get("post_training"), Budget.parse("macs=0.6")
    first = method.search(model, data, budget, seed=0, folder=tmp_path)
    assert (tmp_path / "calibration.safetensors").is_file()
    second = method.search(model, data, budget, seed=0, folder=tmp_path)
    assert first.plan == second.plan
    assert first.grafts.keys() == second.grafts.keys()
    assert all(torch.equal(value, second.grafts[name]) for name, value in first.grafts.items())


def test_exact_last_block_where_the_head_allows_it():
    for preset, able in (("plain", True), ("distilled", True), ("average", False), ("map", False)):
        plan = last_exact(describe(adopted("vit", preset)))
        assert plan.blocks()[-1].only_prefix == able


def test_moments_of_some_features_are_slices():
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    w = torch.rand(3, 5, dtype=torch.float64)
    index = torch.tensor([1, 4])
    whole_, part = Moments("a"), Moments("a")
    whole_.add(w, x, x)
    part.add(w, x[..., index], x)
    assert apart(whole_.of(index).gram, part.gram) < EXACT
    assert apart(whole_.of(index).cross, part.cross) < EXACT


# -- what else the method promises


@pytest.mark.parametrize("name", ["magnitude", "taylor", "vit_slim", "mdc", "cait"])
def test_ridge_after_every_other_method(name):
    """Each can be used without training: on the pictures of the fit the output is nearer to the uncut model's."""
    model = adopt(timm_model("vit", "plain", torch.float32))
    data = digits(model)
    found = short(methods.get(name)).search(model, data, Budget.parse("macs=0.6"), seed=0, teacher=model)
    x = [pictures for pictures, _ in eval_loader(data.calibration, data.input, batch=16)]
    grafts = recovered(found.parent, found.plan, x)
    bare, kept = (surgery.apply(found.parent, found.plan, grafts=some).eval() for some in ({}, grafts))
    assert describe(bare) == describe(kept)
    with torch.no_grad():
        whole = surgery.apply(found.parent, steps_alone(found)).eval()
        dense, before, after = (torch.cat([net(batch) for batch in x]) for net in (whole, bare, kept))
    assert (after - dense).square().mean() < (before - dense).square().mean()


def steps_alone(found):
    """What a plan does to tokens, without its widths."""
    blocks = [one.model_copy(update={"qk": None, "v": None, "hidden": None}) for one in found.plan.blocks()]
    return Plan.of(describe(found.parent), blocks)


@pytest.mark.parametrize("share", [0.75, 0.45])
def test_grid_merging_keeps_a_grid(share, tmp_path):
    model = adopt(timm_model("vit", "plain", torch.float32))
    rows = ((0, 0, 0), (0, 0, -1), (0, -1, -2))
    table = dataclasses.replace(made_up(model), merges=rows, merged=(0.0, 1e-4, 2e-4))
    write_calibration(tmp_path / "c.safetensors", table)
    settings = {"merge": "grid", "calibration": str(tmp_path / "c.safetensors")}
    method, budget = methods.get("post_training", settings), Budget(macs=share)
    found = method.search(model, digits(model), budget, seed=0)
    child = surgery.apply(model, found.plan, grafts=found.grafts)
    cost, parent = cost_of(describe(child)), cost_of(describe(model))
    assert budget.admits(cost, parent)
    assert budget.spent(cost, parent) >= 0.98
    steps = [block.tokens for _, _, block in describe(child).blocks() if block.tokens is not None]
    assert steps
    assert all(isinstance(step, GridMerge) and step.form == "mean" and step.size_bias for step in steps)
    x = torch.zeros(1, 3, 32, 32)
    shapes = [maps.shape for maps in child.forward_intermediates(x)[1]]
    assert all(len(shape) == 4 for shape in shapes)
    assert all(isinstance(arrives.grid, tuple) for arrives in describe(child).arrivals())


def test_schedules_of_the_grid_and_of_likeness():
    spec = describe(adopted("vit", "plain"))
    assert schedules(spec, "none", True) == [(0, 0, 0)]
    assert schedules(spec, "grid", False) == [(0, 0, 0), (0, -1, 0), (0, -1, -2), (0, 0, -1)]
    costs = [cost_of(merging(spec, counts, True).child(spec)).macs for counts in schedules(spec, "bipartite", True)]
    assert costs[0] == max(costs)
    assert len(set(costs)) > 3
    swin = describe(adopted("swin", "windows"))
    assert len(schedules(swin, "bipartite", True)) == 1


@pytest.mark.parametrize(("tokens", "prefix"), [(197, 1), (198, 2), (196, 0), (257, 1)])
def test_schedules_of_few_merges_leave_multiples_of_eight(tokens, prefix):
    small = describe(adopted("vit", "plain"))
    side = (tokens - prefix) ** 0.5
    stage = small.stages[0].model_copy(
        update={"grid": (int(side), int(side)), "prefix": prefix, "blocks": small.stages[0].blocks * 4}
    )
    spec = small.model_copy(update={"stages": (stage,)})
    found = schedules(spec, "bipartite", True)
    few = [counts for counts in found if sum(map(bool, counts)) in (2, 3, 4)]
    assert {sum(map(bool, counts)) for counts in few} == {2, 3, 4}
    whole = cost_of(spec).macs
    shares = [cost_of(merging(spec, counts, True).child(spec)).macs / whole for counts in few]
    assert min(shares) < 0.55
    assert max(shares) > 0.65
    for counts in few:
        assert all(
            flow.leaves.total % 8 == 0 for flow, count in zip(spec_flows(spec, counts), counts, strict=True) if count
        )


def spec_flows(spec, counts):
    """Return the tokens at each part of every block under a schedule, all blocks on all tokens."""
    return merging(spec, counts, False).child(spec).flows()


def test_a_table_with_slow_matching_chooses_few_merges():
    """By MACs a schedule with a matching in every block may win; where a matching takes long, few places do."""
    model = adopted("vit", "plain")
    spec = describe(model)
    stage = spec.stages[0].model_copy(update={"grid": (14, 14), "blocks": spec.stages[0].blocks * 4})
    spec = spec.model_copy(update={"stages": (stage,)})
    rows, whole = schedules(spec, "bipartite", True), cost_of(spec).macs
    saved = [1 - cost_of(merging(spec, counts, True).child(spec)).macs / whole for counts in rows]
    losses = [share**2 * (1.2 - 0.02 * sum(map(bool, counts))) for share, counts in zip(saved, rows, strict=True)]
    table = dataclasses.replace(
        made_up(model), spec=spec, merges=tuple(rows), merged=tuple(losses), losses={}, shares={}
    )
    chosen, times = [], proportional(spec)
    for share in (0.0, 0.03):
        slow = {"steps": FrozenDict({"merge": share * times.latency(spec) / 1e9})}
        times = times.model_copy(update={"stages": tuple(stage.model_copy(update=slow) for stage in times.stages)})
        found = read_off(
            table, Budget(latency=0.75, table=times), merge=True, exact=True, kinds=Kinds((), False, False, False)
        )
        chosen.append(sum(map(bool, found.merges)))
    assert chosen[1] <= 4 < chosen[0]


def test_a_calibration_of_another_merging_is_refused(tmp_path):
    model = adopt(timm_model("vit", "plain", torch.float32))
    write_calibration(tmp_path / "c.safetensors", made_up(model))
    method = methods.get("post_training", {"merge": "grid", "calibration": str(tmp_path / "c.safetensors")})
    with pytest.raises(MethodError, match="must hold schedules of merge=grid, but holds those of merge=bipartite"):
        method.search(model, digits(model), Budget.parse("macs=0.7"), seed=0)
    none = methods.get("post_training", {"merge": "none", "calibration": str(tmp_path / "c.safetensors")})
    found = none.search(model, digits(model), Budget.parse("macs=0.8"), seed=0)
    assert all(decision.tokens is None for decision in found.plan.blocks())


@pytest.mark.parametrize("share", [0.75, 0.5, 0.3])
def test_what_is_read_off_equals_brute_force(share):
    """Every combination of a net of two blocks; costs counted node by node, allocation may round by 0.03 %."""
    torch.manual_seed(0)
    model = adopt(families.get("vit").example(depth=2).eval())
    table = made_up(model)
    spec = describe(model)
    whole = cost_of(spec).macs
    options = []
    for (path, stage, block), arrives in zip(spec.blocks(), spec.arrivals(), strict=True):
        attention, neurons = (group(table, path, block, ALL)[0] for group in (_options._attention, _options._neurons))
        own = []
        for a, b in itertools.product(range(len(attention.choices)), range(len(neurons.choices))):
            choice = dataclasses.replace(attention.choices[a], hidden=neurons.choices[b].hidden)
            macs, _ = block_cost(_options.chosen(block, choice), stage, arrives)
            own.append((macs, attention.losses[a] + neurons.losses[b]))
        options.append(own)
    rest = whole - sum(max(macs for macs, _ in own) for own in options)

    def best(limit):
        return min(a[1] + b[1] for a, b in itertools.product(*options) if rest + a[0] + b[0] <= limit)

    found = read_off(table, Budget(macs=share), merge=False, exact=False)
    assert best(share * whole) - 1e-12 <= found.loss <= best((share - 5e-4) * whole) + 1e-12


@pytest.mark.parametrize("preset", ["plain", "glu", "registers"])
def test_fitted_neurons_are_never_worse(preset):
    """Weighted error of the second MLP layer, on what enters it, against the bare slice of the same neurons."""
    parent = adopted("vit", preset)
    x = batches(describe(parent))
    walk = Walk(parent, x, importances(parent, x, seed=0), 1e-2, 0.0)
    place = walk.first()
    for index in range(len(walk.rows)):
        cut = NeuronCut(place, place.block)
        kept, state = cut.cut(place.block.spec.hidden // 2)
        bias = {name: value for name, value in state.items() if name.startswith(("mlp.fc1", "mlp.gate"))}
        columns = cut.weight[:, list(kept)]
        slices = bias | {f"{cut.name}.weight": columns}
        blocks = [place.rebuilt(place.block.spec.mixer, len(kept), own) for own in (state, slices)]
        weights = place.worth[f"{place.path}.mlp"].weights.split(12)
        errors = [
            sum(
                float((w[..., None] * (hidden(block, a)[1] - hidden(place.block, a)[1]).square()).sum())
                for a, w in zip(place.streams, weights, strict=True)
            )
            for block in blocks
        ]
        assert errors[0] <= errors[1] * (1 + 1e-9)
        if index + 1 < len(walk.rows):
            place = walk.send([place.block(batch).detach() for batch in place.streams])


@pytest.mark.whole
def test_memory_is_bounded():
    """Per image: itself, token weights, and at most six streams of one block, whatever the depth."""
    spec = describe(adopted("vit", "plain"))
    model = adopt(timm_model("vit", "plain", torch.float32))
    image, stream = 4 * 3 * 32 * 32, 4 * 17 * 48
    peaks, cpu = [], [torch.profiler.ProfilerActivity.CPU]
    for count in (10, 20):
        x = [part.float() for part in images(spec, count).split(5)]
        worth = importances(model, x, seed=0)
        with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as watched:
            compensated(model, narrow(spec), x, worth, alpha=0.3)
        events = [event for event in watched.profiler.kineto_results.events() if event.name() == "[memory]"]
        sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        peaks.append(max(itertools.accumulate(sizes)))
    assert peaks[0] > 0
    assert peaks[1] - peaks[0] <= 10 * (image + 6 * stream)
