"""CAIT-style channels: masks and cuts, slots and budgets, scores, and the state that training goes on from."""

import copy
from pathlib import Path

import pytest
import timm
import torch
from torch.nn import functional as F

from tests.samples import adopted, apart, images, timm_model, without_data
from tests.tolerance import EXACT
from vitrim import families, methods
from vitrim.cut.observe import axes, masked
from vitrim.cut.surgery import apply, cut_tensors
from vitrim.deploy import store
from vitrim.families import adopt, describe
from vitrim.families.vit import example
from vitrim.measure import counted
from vitrim.methods import cait
from vitrim.methods._ramp import ramped
from vitrim.methods.cait.masks import Channels, free_axes, merge_plan
from vitrim.methods.cait.slots import Rules, allocate_slots, ladders_of, plan_of
from vitrim.run.pipeline import run
from vitrim.run.recipe import Recipe, read_recipe
from vitrim.testing import digits
from vitrim.train import Start, Train, fit, learning_rate
from vitrim.train.loop import Loop
from vitrim.words.budget import SLACK, Budget
from vitrim.words.costs import block_cost, cost_of
from vitrim.words.errors import BudgetError, MethodError, RunError, TrainError, VitrimError
from vitrim.words.plain import load
from vitrim.words.plan import Plan

SHORT = {
    "epochs": 6,
    "batch": 16,
    "lr": 1e-3,
    "augment": {"kind": "light"},
    "mixup": 0,
    "cutmix": 0,
    "warmup_epochs": 0,
}
FINE = {"group_attention": 4, "floor_attention": 4, "group_mlp": 16, "floor_mlp": 16}
RULES = Rules(**FINE)


def method(**settings):
    return methods.get("cait", {"train": SHORT, **FINE, **settings})


def model_of(preset="plain", dtype=torch.float64, **arguments):
    """A random model (d = 16, 192 neurons, grid 4 x 6) with merges; every weight matters."""
    torch.manual_seed(3)
    model = example(img_size=(32, 48), **families.get("vit").TEST_PRESETS[preset], **arguments)
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 and bool((parameter == 1).all()) else 0.0, 0.25)
    parent = adopt(model.to(dtype).eval())
    child = apply(parent, merge_plan(describe(parent), [(1, "w"), (2, "h")]))
    for name, parameter in child.named_parameters():
        if ".step." in name:
            torch.nn.init.normal_(parameter, 0.0, 0.05)
    return child


def channels_of(model, **settings):
    return Channels(model, free_axes(model, attention=True, mlp=True), **settings)


def random_scores(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {path: torch.rand(axis.size, generator=generator, dtype=torch.float64) for path, axis in axes(model).items()}


def half(spec, share=0.5):
    return {"macs": share * cost_of(spec).macs}


class TestMaskedIsCut:
    @pytest.mark.parametrize("preset", ["plain", "distilled", "registers"])
    @pytest.mark.parametrize("rules", [RULES, Rules(**FINE, equal_qkv=False), Rules(**FINE, same_index=True)])
    def test_logits(self, preset, rules):
        model = model_of(preset)
        spec, x = describe(model), images(describe(model))
        masks = allocate_slots(spec, random_scores(model), half(spec), rules)
        gated = channels_of(copy.deepcopy(model)).eval()
        gated.keep(masks)
        child = apply(model, plan_of(spec, masks))
        with torch.no_grad():
            assert apart(gated(x), child(x)) < EXACT
            with masked(model, {path: mask.double() for path, mask in masks.items()}):
                assert apart(model(x), child(x)) < EXACT  # masking q alone is masking q and k
        assert cost_of(describe(child)).macs == counted(child).macs <= half(spec)["macs"]

    def test_the_scale_is_that_of_the_dense(self):
        model = model_of()
        spec, x = describe(model), images(describe(model))
        child = apply(model, plan_of(spec, allocate_slots(spec, random_scores(model), half(spec), RULES)))
        with torch.no_grad():
            right = child(x)
            for block in child.blocks:
                assert block.attn.qk[0] < 16
                block.attn.scale = block.attn.qk[0] ** -0.5
            assert apart(child(x), right) > 1e-2

    def test_gates_fold(self):
        gated = channels_of(model_of(), scorer="resrep").eval()
        x = images(describe(gated.model))
        with torch.no_grad():
            plain = gated(x)
            for path in gated.paths:
                gated.get_buffer(f"gate/{path.replace('.', '/')}").uniform_(0.5, 1.5)
            wanted = gated(x)
            assert apart(wanted, plain) > 1e-3
            assert apart(gated.fold_gates()(x), wanted) < EXACT

    def test_a_step_of_the_cut_model_is_the_masked_step(self):
        """Same averages, same gradients, same clipping: one AdamW step more leaves the same kept weights."""
        model = model_of()
        spec, x, y = describe(model), images(describe(model), 4), torch.tensor([1, 2, 3, 4])
        gated = channels_of(model).train()
        settings = {"lr": 1e-3, "weight_decay": 0.05}
        optimizer = torch.optim.AdamW(gated.parameters(), **settings)

        def step(net, adam):
            adam.zero_grad()
            F.cross_entropy(net(x), y).backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            adam.step()

        step(gated, optimizer)
        masks = allocate_slots(spec, random_scores(model), half(spec), RULES)
        gated.keep(masks)
        gated.leaves.clear()
        plan = plan_of(spec, masks)
        child = apply(model, plan).train()
        adam = torch.optim.AdamW(child.parameters(), **settings)
        names = dict(model.named_parameters())
        for key in ("step", "exp_avg", "exp_avg_sq"):
            values = {name: optimizer.state[parameter][key] for name, parameter in names.items()}
            for name, value in cut_tensors(model, plan, values).items():
                adam.state[dict(child.named_parameters())[name]][key] = value.clone()
        step(gated, optimizer)
        step(child, adam)
        wanted = cut_tensors(model, plan, {name: p.detach() for name, p in model.named_parameters()})
        assert wanted.keys() == dict(child.named_parameters()).keys()
        for name, parameter in child.named_parameters():
            assert apart(parameter, wanted[name]) < EXACT, name


class TestSlots:
    def test_scores_never_rise(self):
        model = model_of()
        for ladder in ladders_of(describe(model), random_scores(model), RULES):
            assert all(a >= b for a, b in zip(ladder.scores, ladder.scores[1:], strict=False))

    @pytest.mark.parametrize("by_cost", [True, False])
    def test_budgets_bind_and_nest(self, by_cost):
        model = model_of()
        spec, rules = describe(model), Rules(**FINE, by_cost=by_cost)
        dearest = 4 * max(
            sum(unit[0] for unit in ladder.units[:4]) for ladder in ladders_of(spec, random_scores(model), rules)
        )
        before = None
        for share in (0.9, 0.7, 0.5, 0.45):
            masks = allocate_slots(spec, random_scores(model), half(spec, share), rules)
            macs = cost_of(plan_of(spec, masks).child(spec)).macs
            assert half(spec, share)["macs"] - dearest < macs <= half(spec, share)["macs"]
            if before is not None:
                assert all(bool((masks[path] <= before[path]).all()) for path in masks)
            before = masks

    def test_prices_of_the_specification(self):
        """DeiT-S with merges after 4 and 8: one slot of attention, one neuron."""
        spec = describe(without_data(lambda: timm.create_model("deit_small_patch16_224")))
        small = merge_plan(spec, [(4, "w"), (8, "h")]).child(spec)
        scores = {}
        for path, *_ in small.blocks():
            scores |= {f"{path}.{name}": torch.ones(384) for name in ("qk", "v")} | {f"{path}.hidden": torch.ones(1536)}
        ladders = {(ladder.block, len(ladder.orders)): ladder for ladder in ladders_of(small, scores, Rules())}
        found = [(ladders[i, 2].units[0][0], ladders[i, 1].units[0][0]) for i in (0, 4, 11)]
        assert found == [(2_281_260, 151_296), (1_029_996, 76_032), (490_800, 38_400)]
        assert ladders[0, 2].widths == [64, 56, 48, 40, 32, 24, 16, 8]
        assert ladders[0, 1].widths[-2:] == [64, 32]

    def test_equal_scores_go_deep_first_and_neurons_before_heads(self):
        model = model_of()
        spec = describe(model)
        scores = {path: torch.ones(axis.size) for path, axis in axes(model).items()}
        masks = allocate_slots(spec, scores, half(spec, 0.999), Rules(**FINE, by_cost=False))
        touched = [path for path, mask in masks.items() if not bool(mask.all())]
        assert touched == ["stages.0.blocks.2.hidden"] or all("blocks.2" in path for path in touched)

    def test_too_small_a_budget(self):
        model = model_of()
        with pytest.raises(BudgetError, match=r"must be at least [\d,]+, the cost with the smallest widths, but got"):
            allocate_slots(describe(model), random_scores(model), half(describe(model), 0.1), RULES)

    def test_bad_scores(self):
        model = model_of()
        scores = random_scores(model)
        scores["stages.0.blocks.1.v"][3] = torch.nan
        with pytest.raises(MethodError, match=r"blocks\.1\.v: scores must be finite"):
            allocate_slots(describe(model), scores, half(describe(model)), RULES)


class TestScores:
    def test_the_gradient_is_the_finite_difference(self):
        """For kept and for masked channels; of a step that is accumulated in two parts too."""
        model = model_of()
        spec, x, y = describe(model), images(describe(model), 4), torch.tensor([1, 2, 3, 4])
        gated = channels_of(model).train()
        gated.keep(allocate_slots(spec, random_scores(model), half(spec), RULES))
        (F.cross_entropy(gated(x[:2]), y[:2]) / 2).backward()
        (F.cross_entropy(gated(x[2:]), y[2:]) / 2).backward()
        for path in ("stages.0.blocks.1.qk", "stages.0.blocks.0.v", "stages.0.blocks.2.hidden"):
            key = path.replace(".", "/")
            gradient, gate = gated.leaves[key].grad, gated.get_buffer(f"gate/{key}")
            off = int((gate == 0).nonzero()[0])
            for channel in (int((gate == 1).nonzero()[0]), off):
                losses = []
                for change in (1e-4, -2e-4):
                    gate[channel] += change
                    with torch.no_grad():
                        losses.append(float(F.cross_entropy(gated(x), y)))
                gate[channel] += 1e-4
                assert float(gradient[channel]) == pytest.approx((losses[0] - losses[1]) / 2e-4, rel=1e-3)

    def test_dead_channels_score_nothing(self):
        model = model_of()
        with torch.no_grad():
            attention = model.blocks[1].attn
            attention.qkv.weight[48 + 5] = 0
            attention.qkv.bias[48 + 5] = 0
            attention.proj.weight[:, 20] = 0
        gated = channels_of(model).train()
        F.cross_entropy(gated(images(describe(model))), torch.tensor([1, 2])).backward()
        gated.learn()
        scores = gated.scores()
        assert float(scores["stages.0.blocks.1.qk"][5]) == float(scores["stages.0.blocks.1.v"][20]) == 0
        assert int((scores["stages.0.blocks.1.qk"] == 0).sum()) == 1
        x = images(describe(model))
        with torch.no_grad():
            before = gated.eval()(x)
            gated.mask("stages.0.blocks.1.qk")
            masks = gated.masks()
            masks["stages.0.blocks.1.qk"][5] = masks["stages.0.blocks.1.v"][20] = 0
            gated.keep(masks)
            assert apart(gated(x), before) < EXACT

    def test_averages_are_corrected(self):
        gated = channels_of(model_of(), average=0.9).train()
        path = gated.paths[0]
        for value in (1.0, 3.0):
            gated.held(path.replace(".", "/")).grad = torch.full((48,), value, dtype=torch.float64)
            gated.learn()
        wanted = (0.9 * 0.1 * 1 + 0.1 * 9) / (1 - 0.9**2)
        assert torch.allclose(gated.scores()[path], torch.full((48,), wanted, dtype=torch.float64))

    def test_channels_come_back(self):
        """A masked channel comes back where its score beats the weakest kept one by more than 1 / hysteresis."""
        model = model_of()
        spec, path = describe(model), "stages.0.blocks.1.hidden"
        gated, scores = channels_of(model), {path: torch.linspace(2, 1, 192, dtype=torch.float64)}
        rules = Rules(group_mlp=1, floor_mlp=1)

        def refresh(raw):
            seen = {name: torch.where(gated.mask(name) == 1, value, 0.9 * value) for name, value in raw.items()}
            gated.keep(allocate_slots(spec, seen, half(spec, 0.9), rules))

        refresh(scores)
        kept = gated.mask(path).clone()
        count = int(kept.sum())
        assert 0 < count < 192
        weakest = float(scores[path][kept == 1].min())
        scores[path][191] = weakest * 1.05
        refresh(scores)
        assert int(gated.revived.sum()) == 0
        assert float(gated.mask(path)[191]) == 0
        scores[path][191] = weakest * 1.2
        refresh(scores)
        assert float(gated.mask(path)[191]) == 1
        assert gated.revived_by_path() == {p: int(p == path) for p in gated.paths}

    def test_gates_fall_to_zero_in_time(self):
        """Without a gradient: (1 - momentum) / (rate x pull) steps, and the start-up of the momentum."""
        gated = channels_of(model_of(), scorer="resrep", gate_lr=0.1, gate_l1=1e-2, momentum=0.9)
        path, steps = gated.paths[0], 0
        masks = gated.masks()
        masks[path][0] = 0
        gated.keep(masks)
        gate = gated.get_buffer(f"gate/{path.replace('.', '/')}")
        while float(gate[0]) > 0:
            gated.held(path.replace(".", "/")).grad = torch.full_like(gate, 1.0)
            gated.learn()
            steps += 1
        assert steps == pytest.approx((1 - 0.9) / (0.1 * 1e-2) + 9, rel=0.05)
        assert float(gate[1]) < -50  # unmasked: it obeys the whole gradient, 101 times the pull
        assert float(gate[0]) > -0.01


def test_the_ramp():
    assert ramped(0.05, 0.6, 0.4, 0.05, 0.5) == 0.6
    assert ramped(0.5, 0.6, 0.4, 0.05, 0.5) == ramped(1.0, 0.6, 0.4, 0.05, 0.5) == 0.4
    values = [ramped(i / 100, 0.6, 0.4, 0.05, 0.5) for i in range(101)]
    assert values == sorted(values, reverse=True)
    assert ramped(0.275, 0.6, 0.4, 0.05, 0.5) == pytest.approx(0.4 + 0.2 / 8)


class TestSearch:
    @pytest.fixture
    def model(self):
        return adopt(timm_model("vit", "plain", torch.float32))

    @pytest.mark.parametrize("scorer", ["taylor", "resrep"])
    def test_every_choice_is_even_and_within_its_budget(self, model, scorer, monkeypatch):
        chosen = []
        keep = Channels.keep
        monkeypatch.setattr(Channels, "keep", lambda self, masks: (keep(self, masks), chosen.append(masks))[0])
        spec = describe(model)
        found = method(scorer=scorer, merges=[(2, "w")]).search(model, digits(model), Budget.parse("macs=0.5"), seed=0)
        assert len(chosen) > 5
        spent = []
        for masks in chosen[:-1]:
            small = plan_of(spec, masks, merge_plan(spec, [(2, "w")])).child(spec)
            for _, _, block in small.blocks():
                assert len({*block.mixer.qk, *block.mixer.v}) == 1
                assert block.mixer.v[0] % 4 == 0 < block.mixer.v[0]
                assert block.hidden % 16 == 0 < block.hidden
            spent.append(cost_of(small).macs)
        assert spent == sorted(spent, reverse=True)
        child = apply(found.parent, found.plan)
        assert 0.49 * cost_of(spec).macs <= cost_of(describe(child)).macs <= 0.5 * cost_of(spec).macs
        assert [block.tokens is not None for _, _, block in describe(child).blocks()] == [False, False, True]
        assert [t["macs_before"] for t in found.trials] == [block_cost(b, s)[0] for _, s, b in spec.blocks()]
        assert sum(t["macs"] for t in found.trials) == cost_of(describe(child)).macs - describe(child).host.macs
        assert all(t["revived"] >= 0 for t in found.trials)

    def test_each_choice_and_each_block_is_told_as_it_is(self):
        """On three columns: a merge halves them nominally, and leaves two. Revivals belong to their block."""
        model = adopt(example(img_size=(32, 48), patch_size=16, embed_dim=48, depth=3, num_heads=3))
        spec, told, counts = describe(model), [], []
        keep = Channels.keep

        def counting(channels, masks):
            before = {path: channels.mask(path).clone() for path in channels.paths}
            keep(channels, masks)
            counts.append({p: int(((masks[p] > 0) & (before[p] == 0)).sum()) for p in channels.paths})

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Channels, "keep", counting)
            found = method(merges=[(1, "w")], hysteresis=1.0, average=0.0).search(
                model, digits(model), Budget.parse("macs=0.5"), seed=0, log=told.append
            )
        child = found.plan.child(spec)
        assert [t["tokens_nominal"] for t in found.trials] == [1, 0.5, 0.5]
        assert [t["tokens"] for t in found.trials] == [1, 4 / 6, 4 / 6]
        assert any(sum(count.values()) for count in counts)
        for record in found.trials:
            mine = [n for count in counts for path, n in count.items() if path.startswith(record["path"] + ".")]
            assert record["revived"] == sum(mine)
        choices = [record for record in told if record["event"] == "masks"]
        assert len(choices) == len(counts)
        assert all(record["macs"] <= record["macs_limit"] for record in choices)
        limits = [record["macs_limit"] for record in choices]
        assert limits == sorted(limits, reverse=True)
        assert limits[-1] == Budget.parse("macs=0.5").limits(cost_of(spec))["macs"]
        assert choices[-1]["macs"] == cost_of(child).macs

    def test_the_cut_answers_as_the_masked(self, model, monkeypatch):
        seen = []
        monkeypatch.setattr(cait.Method, "_found", _watch(cait.Method._found, seen))
        found = method().search(model, digits(model), Budget.parse("macs=0.4"), seed=0)
        x = images(describe(model), dtype=torch.float32)
        child = apply(found.parent, found.plan).eval()
        with torch.no_grad():
            assert apart(child(x), seen[0].eval()(x)) < 1e-5

    def test_ablations(self, model):
        spec, data = describe(model), digits(model)
        channels = method(merges=[]).search(model, data, Budget.parse("macs=0.6"), seed=0)
        assert all(block.tokens is None for block in channels.plan.blocks())
        merged = cost_of(merge_plan(spec, [(1, "w"), (2, "h")]).child(spec)).macs
        tokens = method(prune_attention=False, prune_mlp=False)
        found = tokens.search(model, data, Budget(macs=merged), seed=0)
        assert found.plan == merge_plan(spec, [(1, "w"), (2, "h")])
        assert not torch.equal(found.parent.blocks[1].step.delta, torch.zeros(48, 96))
        bare = tokens.model_copy(update={"train": Train(epochs=0)}).search(model, data, Budget(macs=merged), seed=0)
        assert bare.start is None

    def test_channels_first(self, model):
        found = method(order="channel_first").search(model, digits(model), Budget.parse("macs=0.4"), seed=0)
        assert all(block.spec.tokens is None for block in found.parent.blocks)
        child = apply(found.parent, found.plan)
        assert 0.392 <= cost_of(describe(child)).macs / cost_of(describe(model)).macs <= 0.4
        assert torch.equal(child.blocks[1].step.delta, torch.zeros(48, 96))

    def test_unmerged_where_merging_alone_leaves_the_budget(self, model):
        plan = method().merging(describe(model), Budget.parse("macs=0.9"))
        assert plan == Plan.keep(describe(model))

    @pytest.mark.parametrize(
        ("settings", "budget", "words"),
        [
            ({"merges": [(1, "w"), (2, "h")]}, "macs=0.9", "merges must leave at least 98% of macs=0.9 to spend"),
            ({"prune_attention": False, "prune_mlp": False}, "macs=0.3", "budget must be met by merges alone"),
            ({"merges": [(7, "w")]}, "macs=0.5", "merges must be between two of 3 blocks"),
            ({"train": {"epochs": 0}}, "macs=0.4", "must train to score channels, but method.train.epochs is 0"),
            ({}, "macs=0.05", "budget of macs must be at least"),
        ],
    )
    def test_refused(self, model, settings, budget, words):
        with pytest.raises(VitrimError, match=words):
            method(**settings).search(model, digits(model), Budget.parse(budget), seed=0)

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"warmup": 0.5}, "phases must follow one another"),
            ({"train": {"precision": "fp16"}}, "train.precision must be fp32 or bf16"),
        ],
    )
    def test_bad_settings(self, settings, words):
        with pytest.raises(MethodError, match=words):
            methods.get("cait", settings)

    def test_windows(self):
        swin = adopted("swin", "windows")
        with pytest.raises(MethodError, match="merges must be empty for this model: token cuts are not possible"):
            method(merges=[(1, "w")]).merging(describe(swin), Budget.parse("macs=0.5"))

    def test_norms_tie_channels(self):
        model = adopt(timm_model("vit", "qk_norm", torch.float32))
        found = method(merges=[]).search(model, digits(model), Budget.parse("macs=0.7"), seed=0)
        assert all(block.qk is None or all(len(head) == 16 for head in block.qk) for block in found.plan.blocks())


def _watch(function, seen):
    def watched(self, channels, *rest):
        seen.append(copy.deepcopy(channels))
        return function(self, channels, *rest)

    return watched


class TestGoingOn:
    def test_search_and_training_share_one_cycle(self):
        """The rates of both together are those of one long run."""
        model = adopt(timm_model("vit", "plain", torch.float32))
        data, rates = digits(model), []
        settings = {**SHORT, "epochs": 6, "log_every": 1, "min_lr": 0.0, "warmup_epochs": 1}
        log = lambda record: rates.append(record["lr"]) if record["event"] == "step" else None  # noqa: E731
        found = method(train=settings).search(model, data, Budget.parse("macs=0.4"), seed=0, log=log)
        child = apply(found.parent, found.plan)
        after = Train(**{**settings, "epochs": 4})
        fit(child, data.train, after, input=data.input, seed=0, log=log, start=found.start)
        whole = Train(**{**settings, "epochs": 10})
        assert rates == pytest.approx([learning_rate(step, 40, 4, whole) for step in range(40)])

    def test_averages_are_handed_over(self, tmp_path):
        model = adopt(timm_model("vit", "distilled", torch.float32))
        data = digits(model)
        found = method(train={**SHORT, "ema": 0.9}).search(model, data, Budget.parse("macs=0.4"), seed=0)
        child = apply(found.parent, found.plan)
        found.start.save(tmp_path / "start.safetensors")
        again = Start.load(tmp_path / "start.safetensors")
        shapes = {name: parameter.shape for name, parameter in child.named_parameters()}
        assert again.done == found.start.done == 0.6
        assert {name: state["exp_avg"].shape for name, state in again.averages.items()} == shapes
        assert {name: again.ema[name].shape for name in shapes} == shapes
        assert float(again.averages["blocks.1.step.delta"]["exp_avg_sq"].max()) > 0
        assert not torch.equal(again.ema["blocks.1.attn.qkv.weight"], child.blocks[1].attn.qkv.weight)
        fitted = fit(
            child,
            data.train,
            Train(epochs=1, batch=16, ema=0.9, lr=1e-9, min_lr=0),
            input=data.input,
            seed=0,
            start=again,
        )
        assert int(next(iter(fitted.averages.values()))["step"]) == 24 + 4
        after, before = fitted.ema.blocks[1].attn.proj.weight, again.ema["blocks.1.attn.proj.weight"]
        assert 0 < apart(after, before) < apart(child.blocks[1].attn.proj.weight, before)

    def test_another_models_state_is_refused(self):
        model = adopt(timm_model("vit", "plain", torch.float32))
        data = digits(model)
        start = Start(done=0.5, averages={"head.weight": {"exp_avg": torch.zeros(3, 3)}})
        with pytest.raises(RunError, match=r"head\.weight: the state to continue from must be of this model"):
            fit(model, data.train, Train(epochs=1, batch=16), input=data.input, seed=0, start=start)

    @pytest.mark.whole
    def test_a_stopped_run_goes_on(self, tmp_path, monkeypatch):
        """Killed in the search or in the training after it, a run ends with the same bits."""
        store.save(adopt(timm_model("vit", "plain", torch.float32)), tmp_path / "parent.safetensors")
        recipe = load(
            Recipe,
            {
                "model": {"name": str(tmp_path / "parent.safetensors")},
                "data": {"train": "digits", "validation": 0, "calibration": 32},
                "method": {
                    "name": "cait",
                    **FINE,
                    "train": {**SHORT, "epochs": 0.27, "batch": 64, "checkpoint_every": 1},
                },
                "budget": "macs=0.4",
                "train": {"epochs": 0.18, "batch": 64, "ema": 0.9, "checkpoint_every": 1},
                "measure": {"latency": False},
            },
            VitrimError,
            at="test",
        )
        whole = run(recipe, tmp_path / "whole")
        step, stops, taken = Loop._step, [3, 8], []

        def stopping(self, parts):
            if stops and len(taken) == stops[0]:
                stops.pop(0)
                raise TrainError("stopped")
            taken.append(self.stage)
            step(self, parts)

        monkeypatch.setattr(Loop, "_step", stopping)
        for _ in range(2):
            with pytest.raises(TrainError, match="stopped"):
                run(recipe, tmp_path / "parts")
        again = run(recipe, tmp_path / "parts")
        assert taken == ["search"] * 6 + ["train"] * 4
        assert again.plan == whole.plan
        for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True):
            assert torch.equal(a, b)
        assert not (tmp_path / "parts" / "search").exists()


RECIPES = sorted((Path(methods.__file__).parents[1] / "recipes").glob("deit_*cait*.toml"))


def test_all_six_recipes_are_there():
    assert len(RECIPES) == 6


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_recipes_are_strict_and_meet_their_budgets(path):
    """One run cut at 60 %, and a budget between merging alone and the smallest child."""
    recipe = read_recipe(path).resolved()
    found = recipe.found_method()
    first, second = found.train, recipe.train
    assert first.epochs / (first.epochs + second.epochs) == pytest.approx(found.cut)
    assert second == first.model_copy(update={"epochs": second.epochs})
    assert path.read_text(encoding="utf-8").count("NOT YET MEASURED") == 1
    spec = describe(without_data(lambda: timm.create_model(recipe.model.name.split(".")[0])))
    budget = Budget.parse(recipe.budget)
    small = found.merging(spec, budget).child(spec)
    scores = {}
    for at, _, block in small.blocks():
        scores |= {f"{at}.{name}": torch.rand(sum(block.mixer.v)) for name in ("qk", "v")}
        scores[f"{at}.hidden"] = torch.rand(block.hidden)
    masks = allocate_slots(small, scores, budget.limits(cost_of(spec)), found.rules, fine=True)
    cost = cost_of(plan_of(spec, masks, found.merging(spec, budget)).child(spec))
    assert 1 - SLACK < budget.spent(cost, cost_of(spec)) <= 1
