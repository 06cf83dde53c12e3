"""SPViT from closed forms: fitted convolutions, gates that start apart, several draws, structures that can be read."""

import argparse
import copy
import itertools
import math

import pytest
import timm
import torch

from tests.samples import adopted, apart, images, timm_model
from tests.tolerance import EXACT
from vitrim import cli, methods
from vitrim.cut.outputs import divergence, logits_of
from vitrim.cut.surgery import apply, fold
from vitrim.deploy import store
from vitrim.families import adopt, describe
from vitrim.methods import spvit
from vitrim.methods.spvit import gates, planning
from vitrim.methods.spvit.fitted import fits, start_
from vitrim.methods.spvit.planning import as_evaluated, planned
from vitrim.methods.spvit.prices import prices
from vitrim.methods.spvit.released import open_released
from vitrim.methods.spvit.search import SinglePath, layout
from vitrim.testing import SHORT, digits
from vitrim.train import steps_of
from vitrim.words.budget import SLACK, Budget
from vitrim.words.costs import cost_of
from vitrim.words.errors import MethodError, VitrimError
from vitrim.words.plain import dump
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Conv, folded
from vitrim.words.steps.grid_merge import GridMerge


def fitted_layout(spec, **more):
    return layout(spec, **{"prefix": "mean", "fitted": True} | more)


def set_levels_(single, levels):
    with torch.no_grad():
        for path, level in levels.items():
            single.step(path).copy_(torch.tensor([5.0 if i < level else -5.0 for i in range(3)]))


PARENTS = [("vit", "registers"), ("vit", "average"), ("vit", "swiglu"), ("swin", "padded"), ("vit", "halved")]


@pytest.mark.parametrize(
    ("family", "preset", "prefix", "fitted"),
    [
        *[(*parent, "mean", True) for parent in PARENTS],
        *[(*parent, "attention", fitted) for parent in PARENTS[:1] + PARENTS[4:] for fitted in (True, False)],
    ],
)
def test_search_is_child_is_folded(family, preset, prefix, fitted):
    """With weights of their own, also on a grid that was halved before; prefix tokens may keep the attention."""
    model = copy.deepcopy(adopted(family, "plain" if preset == "halved" else preset))
    if preset == "halved":
        step = GridMerge(axis="w", form="mean", size_bias=True)
        plan = Plan.of(describe(model), [BlockPlan(), BlockPlan(tokens=step), BlockPlan()])
        model = apply(model, plan).eval()
    spec = describe(model)
    how = fitted_layout(spec, rank=11, prefix=prefix, fitted=fitted)
    single = SinglePath(model, how).eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in single.paths.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=draw, dtype=torch.float64) + 0.1)
    x = images(spec)
    for shift in range(4):
        set_levels_(single, {path: (i + shift) % 4 for i, path in enumerate(single.names)})
        levels, neurons = planning.as_evaluated(single)
        child = apply(model, planning.planned(spec, how, levels, neurons), grafts=planning.grafts(single, levels))
        with torch.no_grad():
            wanted = single(x)
            assert apart(child(x), wanted) < EXACT
            assert apart(fold(child)(x), wanted) < EXACT
        priced = prices(spec, how, "counted")
        assert int(priced.total(single)) == cost_of(folded(describe(child))).macs


@pytest.fixture(scope="module", params=["mean", "attention"])
def started(request):
    """A dense model, its fits, and a search model that starts from them."""
    model = adopt(timm_model("vit", "registers"))
    spec = describe(model)
    how = fitted_layout(spec, prefix=request.param)
    x = list(images(spec, 64).split(32))
    found = fits(model, how, x[:1], x[1:], seed=0)
    single = SinglePath(copy.deepcopy(model), how, start=4.0)
    start_(single, found, prices(spec, how, "counted"), 4.0)
    return model, how, found, single.eval(), x


class TestStart:
    def test_all_open_is_the_model_and_a_convolution_is_nearer_than_nothing(self, started):
        model, how, found, single, x = started
        spec = describe(model)
        with torch.no_grad():
            assert torch.equal(single(x[0]), model(x[0]))
            for path, losses in found.losses.items():
                assert list(losses) == sorted(losses)
                set_levels_(single, dict.fromkeys(single.names, 3))
                told = []
                for level in (2, 1, 0):
                    set_levels_(single, {path: level})
                    told.append(divergence(logits_of(model, x[1:]), logits_of(single, x[1:])))
                # The search model has the fits with batch norm and open ReLU, and the losses are of these.
                assert losses[0] == pytest.approx(told[0], rel=1e-5)
                assert losses[2] == pytest.approx(max(told), rel=1e-5)
        start_(single, found, prices(spec, how, "counted"), 4.0)

    def test_gates_start_apart_in_the_order_of_their_losses(self, started):
        model, how, found, single, _ = started
        priced = prices(describe(model), how, "counted")
        every = torch.cat([gate.detach().flatten() for gate in single.gate_parameters()])
        assert len(every.unique()) == len(every)
        assert float(every.min()) >= 2
        assert float(every.max()) <= 6
        for path in found.losses:
            assert bool((single.step(path).diff() <= 0).all())
        for (path, losses), (other, theirs) in itertools.permutations(found.neurons.items(), 2):
            mine, them = single.gate(path), single.gate(other)
            cheaper = (losses / priced.neurons[path])[:, None] < (theirs / priced.neurons[other])[None]
            assert bool((mine[:, None] < them[None])[cheaper].all())

    def test_gates_do_not_close_in_one_step(self, started):
        """Under AdamW and the penalty alone, the cost falls in many steps; equal gates fall all at once."""
        model, how, found, _, _ = started
        spec = describe(model)
        penalty = methods.get("spvit").penalty(spec, how, Budget.parse("macs=0.5"))
        largest = []
        for from_losses in (True, False):
            single = SinglePath(copy.deepcopy(model), how, start=4.0)
            if from_losses:
                start_(single, found, prices(spec, how, "counted"), 4.0)
            optimizer = torch.optim.AdamW(single.gate_parameters(), lr=0.1, weight_decay=0)
            costs = []
            for _ in range(70):
                costs.append(float(prices(spec, how, "counted").total(single).detach()))
                optimizer.zero_grad()
                penalty(single).backward()
                optimizer.step()
            largest.append(max(a - b for a, b in itertools.pairwise(costs)) / costs[0])
        assert largest[0] < 0.2 < 0.5 < largest[1]


def test_densities_pool_what_cannot_be_closed_alone():
    assert gates.densities([1.0, 2.0, 9.0], [1.0, 1.0, 1.0]) == [1.0, 2.0, 9.0]
    assert gates.densities([3.0, 1.0, 9.0], [1.0, 1.0, 1.0]) == [2.0, 2.0, 9.0]
    # The 3 x 3 costs more than attention, so only both together save.
    assert gates.densities([1.0, 2.0, 9.0], [-1.0, 2.0, 1.0]) == [3.0, 3.0, 9.0]
    assert gates.densities([1.0, 0.0], [-1.0, 0.0]) == [math.inf, math.inf]


def test_spread_is_around_its_start():
    density, saves = torch.tensor([3.0, 1.0, 2.0, 9.0]), torch.tensor([1.0, 2.0, 4.0, 1.0])
    found = gates.spread(2.0, density, saves)
    assert found.argsort().tolist() == [1, 2, 0, 3]
    assert float((found * saves).sum() / saves.sum()) == pytest.approx(2.0)
    assert 1.0 <= float(found.min()) < float(found.max()) <= 3.0


class TestDraws:
    def test_a_part_of_the_images_for_each_draw(self):
        model = copy.deepcopy(adopted("vit", "plain"))
        single = SinglePath(model, layout(describe(model)), draws=3).train()
        x = images(describe(model), 7)
        torch.manual_seed(0)
        together = single(x)
        single.draws = 1
        torch.manual_seed(0)
        assert torch.equal(together, torch.cat([single(part) for part in x.tensor_split(3)]))
        single.draws = 5  # two images at least for each batch norm
        torch.manual_seed(1)
        fewer = single(x)
        single.draws = 3
        torch.manual_seed(1)
        assert torch.equal(fewer, single(x))
        single.eval()
        single.draws = 1
        with torch.no_grad():
            assert torch.equal(single(x), single.train().eval()(x))

    @pytest.mark.parametrize(
        ("epochs", "accumulate", "settings", "wanted"),
        [(0.5, 1, {}, (4.0, 4)), (0.5, 2, {}, (4.0, 2)), (0.5, 1, {"draws": 7, "start": 2.0}, (2.0, 7)),
         (1000, 1, {}, (1.5, 4))],
    )  # fmt: skip
    def test_defaults_follow_the_length(self, epochs, accumulate, settings, wanted, monkeypatch):
        seen = []
        monkeypatch.setattr(
            spvit,
            "fit",
            lambda single, *_, **__: seen.append((single.step("stages.0.blocks.0")[0].item(), single.draws)),
        )
        model = adopt(timm_model("vit", "plain", torch.float32))
        train = {**SHORT, "epochs": epochs, "accumulate": accumulate}
        methods.get("spvit", {"train": train} | settings).search(model, digits(model), Budget.parse("macs=0.5"), seed=0)
        assert seen == [wanted]


def test_the_target_lies_below_the_budget():
    model = adopted("vit", "plain")
    spec = describe(model)
    how = layout(spec)
    single = SinglePath(copy.deepcopy(model), how)
    told = {}
    for target in (None, 0.95 * 0.6 * cost_of(spec).macs / 1e9):
        settings = {"target": target, "counting": "counted", "pressure": 1.0}
        told[target] = float(
            methods.get("spvit", settings).penalty(spec, how, Budget.parse("macs=0.6"))(single).detach()
        )
    assert math.isclose(*told.values(), rel_tol=1e-4)  # limits are whole numbers


@pytest.mark.parametrize("inherit", ["dense", "search"])
def test_a_search_from_closed_forms(inherit):
    """It meets its budget; from the dense weights, the child is fitted again and nearer than with new convolutions."""
    model = adopt(timm_model("vit", "plain", torch.float32))
    data, spec = digits(model), describe(model)
    train = {**SHORT, "epochs": 3, "lr": 1e-5, "drop_path": None}
    settings = {"train": train, "gate_lr": 0.5, "inherit": inherit, "first": 50.0}
    found = methods.get("spvit", settings | {"init": "closed_form"}).search(
        model, data, Budget.parse("macs=0.45"), seed=0
    )
    child = apply(found.parent, found.plan, grafts=found.grafts).eval()
    cost = cost_of(folded(describe(child)))
    assert 0.45 * (1 - SLACK) * cost_of(spec).macs <= cost.macs <= 0.45 * cost_of(spec).macs
    assert {trial.get("votes") for trial in found.trials[1:]} == {None}
    convs = [block.mixer for _, _, block in describe(child).blocks() if isinstance(block.mixer, Conv)]
    assert all(conv.prefix == "attention" and conv.mixture is None for conv in convs)
    x = [images(spec, 32, torch.float32)]
    bare = apply(model, found.plan).eval()
    if inherit == "dense":
        near, far = (divergence(logits_of(model, x), logits_of(net, x)) for net in (child, bare))
        assert near < far
    again = found.again(Budget.parse("macs=0.7"))
    assert cost_of(folded(again.plan.child(spec))).macs <= 0.7 * cost_of(spec).macs


def test_it_stops_within_an_epoch():
    """The budget is looked at every five steps, and gates that start apart do not run far past it in these."""
    model = adopt(timm_model("vit", "plain", torch.float32))
    train, steps = {**SHORT, "epochs": 100, "drop_path": None, "batch": 4, "log_every": 1}, []
    settings = {"train": train, "gate_lr": 0.1, "first": 500.0, "init": "closed_form", "closing": "penalty"}
    found = methods.get("spvit", settings).search(
        model, digits(model), Budget.parse("macs=0.6"), seed=0, log=lambda record: steps.append(record["step"])
    )
    # Records come after a step; the one that stops is not reported any more.
    assert (max(steps) + 1) % 5 == 0
    assert (max(steps) + 1) % 16
    assert 0.5 < found.trials[0]["macs_of_gates"] / cost_of(describe(model)).macs <= 0.6


@pytest.mark.parametrize("init", ["published", "closed_form"])
def test_a_ramp_closes_gates_while_it_trains(init):
    """The structure costs less and less, meets the budget at 0.8 of the search, and stays there."""
    model = adopt(timm_model("vit", "plain", torch.float32))
    spec, budget = describe(model), Budget.parse("macs=0.6")
    costs: list[float] = []
    method = methods.get("spvit", {"train": {**SHORT, "epochs": 5, "drop_path": None}, "init": init})
    ramp = method._ramp

    def watched(spec, how, budget, steps, start):
        after = ramp(spec, how, budget, steps, start)

        def both(single, step):
            after(single, step)
            levels, neurons = as_evaluated(single)
            costs.append(cost_of(folded(planned(spec, how, levels, neurons).child(spec))).macs / cost_of(spec).macs)

        return both

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(method), "_ramp", lambda _, *args: watched(*args))
        found = method.search(model, digits(model), budget, seed=0)
    count = len(costs)
    assert count == steps_of(digits(model).train, method.train, digits(model).input)
    assert costs[0] == 1
    assert 0.7 < costs[count // 4] < 0.98
    assert max(costs[math.ceil(0.8 * count) :]) <= 0.6
    assert 0.98 * 0.6 <= cost_of(folded(found.plan.child(spec))).macs / cost_of(spec).macs <= 0.6


@pytest.mark.parametrize(
    ("settings", "steps", "ramps"),
    [
        ({}, 185, True),
        ({}, 3000, False),
        ({"closing": "ramp"}, 3000, True),
        ({"closing": "penalty"}, 185, False),
        ({"pressure": 2.0}, 185, False),
        ({"first": 8.0}, 185, False),
        ({"target": 1.0}, 185, False),
        ({"counting": "counted"}, 185, False),
        ({"stop": False}, 185, False),
    ],
)
def test_settings_of_the_penalty_are_not_lost(settings, steps, ramps):
    """A ramp does not use them, so naming one keeps the penalty; a stored recipe, which names all, changes nothing."""
    method = methods.get("spvit", settings)
    assert method._ramps(steps) == ramps
    assert methods.get("spvit", dump(method))._ramps(steps) == ramps


def test_a_structure_has_mixtures_whatever_searches_start_from():
    """Fitted convolutions without a fit would be noise; a preset may ask for closed forms."""
    model = adopt(timm.create_model("deit_tiny_patch16_224"))
    plans = [
        methods.get("spvit", {"structure": "deit_ti", "init": init})
        .search(model, None, Budget.parse("macs=1.04G"), seed=0)
        .plan
        for init in ("published", "closed_form")
    ]
    assert plans[0] == plans[1]
    assert plans[1].stages[0].blocks[0].mixer.mixture is not None


class TestReading:
    """A class token that no attention of the last block serves."""

    def single(self, preset):
        model = adopt(timm_model("vit", preset, torch.float32))
        how = layout(describe(model))
        single = SinglePath(copy.deepcopy(model), how, start=3.0).eval()
        last = "stages.0.blocks.2"
        with torch.no_grad():
            single.step(last).fill_(-1.0)
            for path in list(single.gates):
                single.gates[path].add_(torch.rand(single.gates[path].shape))
        return model, how, single, last

    def test_the_nearer_structure_is_taken(self):
        model, how, single, last = self.single("plain")
        spec = describe(model)
        probe = [images(spec, 16, torch.float32)]
        budget = Budget.parse("macs=0.7")
        levels, _, record = planning.nearest(single, spec, how, budget, model, probe)
        near = record["divergence_with_attention"] < record["divergence"]
        assert record["compared"] == last
        assert (levels[last] == 3) == near
        for held, wanted in (({}, 0), ({last: 3}, 3)):
            levels, neurons = planning.decide(spec, single, how, budget, held)
            assert levels[last] == wanted
            cost = cost_of(folded(planning.planned(spec, how, levels, neurons).child(spec)))
            assert budget.admits(cost, cost_of(spec))
            assert budget.spent(cost, cost_of(spec)) >= 1 - SLACK
        # Without images nothing can be compared.
        assert planning.nearest(single, spec, how, budget, model, ())[2] == {}

    def test_pooled_patches_need_no_reading(self):
        model, how, single, _ = self.single("average")
        probe = [images(describe(model), 4, torch.float32)]
        assert planning.nearest(single, describe(model), how, Budget.parse("macs=0.7"), model, probe)[2] == {}


def test_small_swins_are_filled():
    """At 0.95 the next gate to close may be an attention that saves more than is needed; then others close."""
    model = adopted("swin", "windows")
    spec = describe(model)
    how = layout(spec)
    single, draw = SinglePath(copy.deepcopy(model), how), torch.Generator().manual_seed(0)
    budget, whole = Budget.parse("macs=0.95"), cost_of(spec)
    for _ in range(60):
        with torch.no_grad():
            for logits in single.gate_parameters():
                logits.copy_(torch.randn(logits.shape, generator=draw))
        cost = cost_of(folded(planning.planned(spec, how, *planning.decide(spec, single, how, budget)).child(spec)))
        assert 1 - SLACK <= budget.spent(cost, whole) <= 1


def test_released_files_from_the_command_line(tmp_path, monkeypatch, capsys):
    """A searched file with the arguments of its training; a skip adds nothing there, and the normed input if asked."""
    model = adopt(timm_model("vit", "plain", torch.float32))
    state = {}
    for name, value in model.state_dict().items():
        at, dot, leaf = name.partition(".attn.qkv.")
        if dot:
            state |= {
                f"{at}.attn.qk.{leaf}": value[: 2 * len(value) // 3],
                f"{at}.attn.v.{leaf}": value[2 * len(value) // 3 :],
            }
        else:
            state[name] = value
    for index in range(3):
        state[f"blocks.{index}.attn.kernel_thresholds"] = torch.tensor([1.0, 1.0, 1.0 if index else -1.0])
        state[f"blocks.{index}.attn.head_probs"] = torch.ones(3, 9)
        state[f"blocks.{index}.mlp.ffn_thresholds"] = torch.ones(192)
        for side in ("1x1", "3x3"):
            norm = torch.nn.BatchNorm2d(16).state_dict()
            state |= {f"blocks.{index}.attn.bn_{side}.{name}": value for name, value in norm.items()}
    state["blocks.2.attn.kernel_thresholds"] = torch.tensor([-1.0, 1.0, 1.0])
    torch.save({"model": state, "args": argparse.Namespace(lr=1e-4), "epoch": 10}, tmp_path / "search.pth")
    x = images(describe(model), dtype=torch.float32)
    monkeypatch.setattr("timm.create_model", lambda *_, **__: timm_model("vit", "plain", torch.float32))

    def called(*more):
        words = [
            "vitrim",
            "released",
            "vit_tiny_patch16_224",
            str(tmp_path / "search.pth"),
            "--out",
            str(tmp_path / "x.safetensors"),
        ]
        monkeypatch.setattr("sys.argv", [*words, *more])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code

    assert not called()
    assert "multiply-accumulates" in capsys.readouterr().err
    plain = store.load(tmp_path / "x.safetensors").eval()
    operations = [getattr(block.mixer, "kernel", block.mixer.kind) for _, _, block in describe(plain).blocks()]
    assert operations == [3, "attention", "skip"]
    with torch.no_grad():
        assert torch.equal(plain(x), open_released(model, tmp_path / "search.pth", leaves="zero")(x))
    assert not called("--leaves", "norm", "--fold")
    normed = store.load(tmp_path / "x.safetensors").eval()
    assert describe(normed) == folded(describe(normed))
    with torch.no_grad():
        assert apart(normed(x), plain(x)) > 1e-3
    assert called("--leaves", "half") == 2
    assert "--leaves" in capsys.readouterr().err


def test_closed_forms_need_images():
    model = adopt(timm_model("vit", "plain", torch.float32))
    data = digits(model)
    without = type(data)(train=data.train, calibration=None, validation=None, input=data.input)
    with pytest.raises(MethodError, match="no calibration images were given"):
        methods.get("spvit", {"init": "closed_form"}).search(model, without, Budget.parse("macs=0.5"), seed=0)


def test_which_prefix_a_search_has():
    """Published convolutions leave prefix tokens as they are; fitted ones keep their attention where they can."""
    spec = describe(adopt(timm_model("vit", "plain")))
    normed = describe(adopt(timm_model("vit", "qk_norm")))
    swin = describe(adopt(timm_model("swin", "padded")))
    fits_ = {"init": "closed_form"}
    assert methods.get("spvit").layout(spec).prefix == "norm"
    assert methods.get("spvit", fits_).layout(spec).prefix == "attention"
    assert methods.get("spvit", fits_).layout(normed).prefix == "mean"
    assert methods.get("spvit", fits_).layout(swin).prefix == "mean"
    assert methods.get("spvit", fits_ | {"prefix": "zero"}).layout(spec).prefix == "zero"
    assert methods.get("spvit", {"prefix": "attention"}).layout(spec).prefix == "attention"
    with pytest.raises(VitrimError, match="prefix=mean must have fitted convolutions"):
        methods.get("spvit", {"prefix": "mean"})
