"""SPViT: the identities of its convolutions, gates and costs, and what it refuses."""

import copy
import math
from pathlib import Path

import pytest
import timm
import torch
from torch.nn import functional as F

from tests.samples import PRESETS, adopted, apart, images, timm_model, without_data
from tests.tolerance import EXACT
from vitrim import families, methods
from vitrim.cut.surgery import apply, fold
from vitrim.deploy import export, store
from vitrim.families import adopt, describe
from vitrim.measure import counted
from vitrim.methods import spvit
from vitrim.methods.spvit import gates
from vitrim.methods.spvit import planning as _spvit_plan
from vitrim.methods.spvit.paths import Paths
from vitrim.methods.spvit.prices import prices
from vitrim.methods.spvit.published import published, structures
from vitrim.methods.spvit.released import open_released
from vitrim.methods.spvit.search import SinglePath, layout
from vitrim.nn.conv import Conv, mixed_back, mixed_kernel, state_of, votes
from vitrim.run.pipeline import compress
from vitrim.run.recipe import Recipe, merged, overrides, read_recipe
from vitrim.testing import SHORT, digits
from vitrim.train import parameter_groups
from vitrim.words.budget import SLACK, Budget
from vitrim.words.costs import cost_of
from vitrim.words.errors import AdoptError, BudgetError, DataError, MethodError, PlanError, RecipeError, WeightsError
from vitrim.words.plain import dump, load
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Attention, Form, Mixture, Norm, Skip, Stage, folded
from vitrim.words.spec import Conv as ConvSpec
from vitrim.words.steps.drop import Drop


# Every preset whose attention can become both convolutions.
def _is_free(spec):
    form = spec.stages[0].form
    return form.mixed_norm is None and not form.post_norm and not spec.host.arguments.get("dynamic_img_size")


FREE = [(f, p) for f, p in PRESETS if _is_free(describe(adopted(f, p)))]
IDS = [f"{f}-{p}" for f, p in FREE]
FORM = Form(
    norm=Norm(name="timm.LayerNorm", eps=1e-6), qkv_bias=True, out_bias=True, mlp="plain", activation="torch.GELU",
    hidden_bias=True, mlp_out_bias=True,
)  # fmt: skip


def single_of(family, preset, **arguments):
    """A search model in which every parameter matters, in evaluation mode."""
    model = copy.deepcopy(adopted(family, preset))
    windowed = arguments.pop("windowed", False)
    single = SinglePath(model, layout(describe(model), **arguments), windowed).eval()
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for path in single.names:
            beside = single.beside(path)
            beside.mix.copy_(torch.randn(beside.mix.shape, generator=draw) * beside.mixture.temperature)
            for tensor in (beside.bn.weight, beside.bn.bias, beside.bn.running_mean):
                tensor.copy_(torch.randn(tensor.shape, generator=draw))
            beside.bn.running_var.uniform_(0.5, 2.0, generator=draw)
    return single


def set_levels_(single, levels, signs=False):
    """Open as many gates of each attention as `levels` says; with `signs` a later gate of a closed one is open too."""
    with torch.no_grad():
        for path, level in levels.items():
            step = torch.full((3,), -5.0)
            step[:level] = 5.0
            if signs and level < 2:
                step[2] = 5.0
            single.step(path).copy_(step)


def cut_neurons_(single, seed=0):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path in single.gates:
            gate = single.gates[path]
            gate.copy_(torch.where(torch.rand(gate.shape, generator=draw) < 0.4, -5.0, 5.0))


@pytest.mark.parametrize(("family", "preset"), FREE, ids=IDS)
def test_search_is_child_is_folded(family, preset):
    """A search model under hard gates, the child that training starts from, and the folded child are one function."""
    single = single_of(family, preset)
    spec = describe(single.model)
    how, x = layout(spec), images(spec)
    for shift in (0, 3):
        set_levels_(single, {path: (i + shift) % 4 for i, path in enumerate(single.names)}, signs=shift == 3)
        cut_neurons_(single, shift)
        levels, neurons = _spvit_plan.as_evaluated(single)
        plan = _spvit_plan.planned(spec, how, levels, neurons)
        child = apply(single.model, plan, grafts=_spvit_plan.grafts(single, levels))
        plain = fold(child)
        assert describe(plain) == folded(describe(child)) == folded(plan.child(spec))
        with torch.no_grad():
            wanted = single(x)
            assert apart(child(x), wanted) < EXACT
            assert apart(plain(x), wanted) < EXACT


@pytest.mark.parametrize(("family", "preset"), FREE, ids=IDS)
def test_all_gates_open_is_the_model(family, preset):
    single = SinglePath(copy.deepcopy(adopted(family, preset)), layout(describe(adopted(family, preset)))).eval()
    with torch.no_grad():
        assert torch.equal(
            single(images(describe(single.model))), adopted(family, preset)(images(describe(single.model)))
        )


def test_a_search_model_survives_a_copy_and_its_state():
    single = single_of("vit", "plain").train()
    x = images(describe(single.model))
    again = SinglePath(copy.deepcopy(adopted("vit", "plain")), layout(describe(single.model))).train()
    again.load_state_dict(single.state_dict())
    answers = []
    for model in (single, copy.deepcopy(single), again):
        torch.manual_seed(3)
        answers.append(model(x))
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in single.modules())
    torch.manual_seed(4)
    assert not torch.equal(single(x), answers[0])
    single.eval()
    torch.manual_seed(3)
    first = single(x)
    torch.manual_seed(4)
    assert torch.equal(single(x), first)


class TestConvolution:
    """Sections 2.2 and 2.3 of the method's specification, on tensors."""

    @pytest.mark.parametrize("slots", ["columns", "centre"])
    @pytest.mark.parametrize("grid", [(1, 5), (4, 1), (3, 4), (5, 5), (1, 1)])
    @pytest.mark.parametrize("heads", [1, 3])
    def test_mixing_values_is_mixing_kernels(self, grid, heads, slots):
        torch.manual_seed(0)
        width, d = 10, 4
        mixture = Mixture(heads=heads, temperature=0.7, slots=slots)
        beside = Paths(d, mixture).double()
        torch.nn.init.normal_(beside.mix)
        value, bias = torch.randn(heads * d, width).double(), torch.randn(heads * d).double()
        out, x = torch.randn(width, heads * d).double(), torch.randn(2, *grid, width).double()
        one, three = beside.inner(x @ value.t())
        share = votes(beside.mix, 0.7)
        for got, kernel in ((one, 1), (three, 3)):
            mixed = mixed_kernel(share, value, kernel, mixture)
            start, _ = mixed_back(share, bias, out, kernel, mixture)
            if kernel == 1:
                wanted = F.linear(x, mixed, start)
            else:
                wanted = F.conv2d(x.permute(0, 3, 1, 2), mixed, start, padding=1).permute(0, 2, 3, 1)
            assert apart(got + start, wanted) < EXACT

    @pytest.mark.parametrize("slots", ["columns", "centre"])
    def test_slots_lie_where_the_tables_say(self, slots):
        """An impulse at a pixel appears at the pixels that read it, and each tap is its slot's head."""
        table = {
            "columns": [(-1, -1), (0, -1), (1, -1), (-1, 0), (0, 0), (1, 0), (-1, 1), (0, 1), (1, 1)],
            "centre": [(0, 0), (-1, -1), (0, -1), (1, -1), (-1, 0), (1, 0), (-1, 1), (0, 1), (1, 1)],
        }[slots]
        mixture = Mixture(heads=9, temperature=0.01, slots=slots)
        assert mixture.offsets == tuple(table)
        assert mixture.centre == table.index((0, 0))
        value = torch.randn(9 * 2, 5).double()
        kernel = mixed_kernel(torch.eye(9).double(), value, 3, mixture)
        beside = Paths(2, mixture).double()
        with torch.no_grad():
            beside.mix.copy_(100 * torch.eye(9))
        for slot, (down, right) in enumerate(table):
            assert torch.equal(kernel[:, :, down + 1, right + 1], value.view(9, 2, 5)[slot])
            values = torch.zeros(1, 5, 5, 18).double()
            values[0, 2, 2, 2 * slot : 2 * slot + 2] = 1
            _, three = beside.inner(values)
            assert three[0, :, :, 0].nonzero().tolist() == [[2 - down, 2 - right]]

    def test_it_is_hard_attention_by_position(self):
        """Nine one-hot attention maps, and the softmax that the authors take their places from."""
        torch.manual_seed(1)
        rows, columns, d, width, heads = 3, 4, 2, 5, 3
        mixture = Mixture(heads=heads, temperature=1.0)
        places = [(r, c) for r in range(rows) for c in range(columns)]
        padded = [(r, c) for r in range(-1, rows + 1) for c in range(-1, columns + 1)]
        share = votes(torch.randn(heads, 9).double(), 1.0)
        value, x = torch.randn(heads * d, width).double(), torch.randn(rows * columns, width).double()
        total = torch.zeros(rows * columns, d).double()
        for slot, (down, right) in enumerate(mixture.offsets):
            hard = torch.zeros(len(places), len(places)).double()
            soft = torch.empty(len(places), len(padded)).double()
            for p, (r, c) in enumerate(places):
                if (r + down, c + right) in places:
                    hard[p, places.index((r + down, c + right))] = 1
                for q, (s, t) in enumerate(padded):
                    a, b = s - r, t - c
                    soft[p, q] = 46 * (-(a * a + b * b) + 2 * (down * a + right * b))
            soft = soft.softmax(dim=1)
            inside = [i for i, place in enumerate(padded) if place in places]
            assert torch.allclose(soft[:, inside], hard, atol=1e-12)
            assert torch.allclose(soft.max(dim=1).values, torch.ones(len(places)).double(), atol=1e-12)
            kernel = (share[:, slot] @ value.view(heads, -1)).view(d, width)
            total += hard @ (x @ kernel.t())
        mixed = mixed_kernel(share, value, 3, mixture)
        wanted = F.conv2d(x.t().view(1, width, rows, columns), mixed, padding=1).flatten(2)[0].t()
        assert apart(total, wanted) < EXACT

    @pytest.mark.parametrize("temperature", [0.01, 1.0, 100.0])
    def test_equal_logits_are_equal_votes(self, temperature):
        constant = torch.full((5, 9), 3.7).double()
        assert torch.allclose(votes(constant, temperature), torch.full((5, 9), 0.2).double(), atol=1e-15)
        random = torch.randn(5, 9).double()
        moved = random + torch.randn(9).double()
        assert torch.allclose(votes(random, temperature), votes(moved, temperature), atol=1e-9)

    def test_one_head_is_its_own_mixture(self):
        torch.manual_seed(0)
        value, out = torch.randn(4, 6).double(), torch.randn(6, 4).double()
        share, mixture = votes(torch.randn(1, 9).double(), 0.01), Mixture(heads=1, temperature=0.01)
        assert torch.equal(mixed_kernel(share, value, 1, mixture), value)
        assert all(torch.equal(mixed_kernel(share, value, 3, mixture)[:, :, r, c], value) for r, c in ((0, 0), (1, 2)))
        bias = torch.full((4,), 1e4).double()
        conv = Conv(6, ConvSpec(kernel=1, width=4, mixture=mixture, norm=True), FORM).double().eval()
        conv.load_state_dict(
            state_of(conv.spec, Attention(qk=(4,), v=(4,), scale=1), {
                "qkv.weight": torch.cat([value, value, value]), "qkv.bias": torch.cat([bias] * 3),
                "proj.weight": out, "proj.bias": torch.zeros(6).double(),
            })
        )  # fmt: skip
        x = torch.randn(2, 3, 6).double()
        wanted = ((x @ value.t() + bias) / math.sqrt(1 + 1e-5)) @ out.t()
        with torch.no_grad():
            assert apart(conv(x), wanted) < EXACT

    @pytest.mark.parametrize("kernel", [1, 3])
    @pytest.mark.parametrize("prefix", ["norm", "zero"])
    def test_prefix_tokens_pass_by(self, kernel, prefix):
        torch.manual_seed(0)
        conv = Conv(6, ConvSpec(kernel=kernel, width=4, prefix=prefix), FORM, grid=(2, 3), prefix=2)
        x = torch.randn(2, 8, 6)
        first = conv(x)[:, :2]
        assert torch.equal(first, x[:, :2] if prefix == "norm" else torch.zeros(2, 2, 6))
        flat = conv(torch.cat([x[:, :2] * 9, x[:, 2:]], dim=1))[:, 2:]
        assert torch.equal(flat, conv(x)[:, 2:])

    def test_centre_alone_learns_in_a_pointwise_convolution(self):
        mixture = Mixture(heads=2, temperature=0.01)
        conv = Conv(6, ConvSpec(kernel=1, width=3, mixture=mixture, norm=True), FORM, prefix=1).train()
        conv(torch.randn(4, 7, 6)).square().sum().backward()
        others = [slot for slot in range(9) if slot != mixture.centre]
        assert float(conv.mix.grad[:, mixture.centre].abs().min()) > 0
        assert float(conv.mix.grad[:, others].abs().max()) == 0

    def test_what_a_skip_leaves(self):
        model = adopted("vit", "plain")
        spec, x = describe(model), torch.randn(2, 17, 48, dtype=torch.float64)
        with torch.no_grad():
            for leaves, wanted in (("zero", x), ("norm", x + model.blocks[1].norm1(x))):
                plan = Plan.of(spec, [BlockPlan(), BlockPlan(mixer=Skip(leaves=leaves), mlp=Skip()), BlockPlan()])
                assert torch.equal(apply(model, plan).blocks[1](x), wanted)


class TestSwin:
    """Windows see what the map does inside them, and not across their borders."""

    def answers(self, path, kernel):
        found = {}
        for windowed in (False, True):
            single = single_of("swin", "windows", windowed=windowed)
            set_levels_(single, dict.fromkeys(single.names, 3))
            set_levels_(single, {path: {1: 1, 3: 2}[kernel]})
            block = single.model.get_submodule(single.names[path])
            heard = []
            handle = block.ls1.register_forward_hook(lambda _m, _i, out, heard=heard: heard.append(out))
            with torch.no_grad():
                single(images(describe(single.model)))
            handle.remove()
            found[windowed] = heard[0]
        return found[False], found[True]

    @pytest.mark.parametrize("path", ["stages.0.blocks.0", "stages.0.blocks.1"])
    def test_a_pointwise_convolution_knows_no_windows(self, path):
        whole, windows = self.answers(path, 1)
        assert apart(windows, whole) < EXACT

    def test_a_window_has_borders(self):
        whole, windows = self.answers("stages.0.blocks.0", 3)
        inside = [1, 2, 5, 6]
        near = (whole - windows).abs().amax(dim=(0, 3))
        assert float(near[inside][:, inside].max()) < 1e-12 * float(whole.abs().max())
        assert float(near[[0, 3, 4, 7]].max(dim=1).values.min()) > 1e-3

    def test_a_shifted_window_holds_opposite_edges(self):
        whole, windows = self.answers("stages.0.blocks.1", 3)
        assert apart(windows, whole) > 1e-3


class TestGates:
    """Sections 2.5 to 2.7: sampling, its gradients, and the budget's."""

    @pytest.mark.parametrize(
        ("logit", "open_", "slope"), [(1.5, 0.81757, 0.13371), (0.0, 0.5, 1 / 6), (-1.0, 0.26894, 0.15095)]
    )
    def test_statistics(self, logit, open_, slope):
        torch.manual_seed(0)
        logits = torch.full((400_000,), logit, dtype=torch.float64, requires_grad=True)
        drawn = gates.sampled(logits, gates.noise(logits))
        drawn.sum().backward()
        assert set(drawn.detach().unique().tolist()) == {0.0, 1.0}
        assert float(drawn.detach().mean()) == pytest.approx(open_, abs=3e-3)
        assert float(logits.grad.mean()) == pytest.approx(slope, abs=1e-3)

    @pytest.mark.parametrize("pattern", [(x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1)])
    def test_gradients_of_all_patterns(self, pattern):
        """The authors' table, in which a, b, e are what 1 x 1, 3 x 3 and attention would add to the loss."""
        torch.manual_seed(0)
        logits = torch.randn(3, dtype=torch.float64, requires_grad=True)
        side = torch.tensor([4.0 if open_ else -4.0 for open_ in pattern], dtype=torch.float64)
        noise = side - logits.detach()
        a, b, e = (torch.tensor(value, dtype=torch.float64) for value in (2.0, 3.5, -7.0))
        one, three, attention = gates.weights(gates.opened(gates.sampled(logits, noise)))
        (one * a + three * b + attention * e).backward()
        x, y, z = pattern
        if pattern == (1, 1, 1):
            by_gate = (e - b, e - b, e - b)
        elif pattern == (1, 1, 0):
            by_gate = (b - a, b - a, e - b)
        elif x:
            by_gate = (a, (b - a) + z * (e - a), 0)
        else:
            by_gate = (a + y * b + y * z * e, 0, 0)
        slope = side.sigmoid() * (1 - side.sigmoid())
        assert torch.allclose(logits.grad, torch.tensor([float(g) for g in by_gate]).double() * slope, atol=EXACT)
        assert float((one + three + attention).detach()) == (0.0 if not x else 1.0)

    def test_nothing_at_zero(self):
        assert gates.hard(torch.zeros(2)).tolist() == [0.0, 0.0]
        assert gates.budgeted(torch.zeros(2)).tolist() == [0.0, 0.0]

    @pytest.mark.parametrize(
        ("name", "dense", "pressure", "target"),
        [
            ("deit_tiny_patch16_224", 1.251052, 20.0, 1.0),
            ("deit_base_patch16_224", 17.510836, 0.08, 6.0),
            ("swin_tiny_patch4_window7_224", 4.494405, 2.8, 3.2),
        ],
    )
    def test_gradient_of_the_penalty(self, name, dense, pressure, target):
        """Closed forms at the start; no draw enters, and the same logits give the same cost whatever was drawn."""
        spec = empty(name)
        with torch.device("meta"):
            model = families.build(spec)
        how = layout(spec)
        single = SinglePath(model.to_empty(device="cpu"), how).train()
        method = methods.get("spvit", {"pressure": pressure, "target": target})
        penalty = method.penalty(spec, how, Budget.parse("macs=0.9"))
        torch.manual_seed(1)
        first = penalty(single).detach()
        torch.manual_seed(2)
        single._draw()
        loss = penalty(single)
        assert torch.equal(loss.detach(), first)
        loss.backward()
        factor = 2 * pressure * (dense - target) * 0.0363621 / 1e9
        path, stage, block = spec.blocks()[0]
        neuron = 2 * stage.patches * stage.width
        assert float(single.gate(f"{path}.hidden").grad.min()) == pytest.approx(factor * neuron, rel=1e-4)
        d = block.mixer.v[0]
        small, large = (stage.width * d * stage.patches * (k * k + 1) for k in (1, 3))
        keys = stage.window.area if stage.window else stage.tokens
        whole = 4 * stage.tokens * stage.width**2 + 2 * stage.tokens * keys * stage.width
        wanted = torch.tensor([whole, whole - small, whole - large]) * factor
        assert torch.allclose(single.step(path).grad, wanted.float(), rtol=1e-4)

    def test_who_learns_from_what(self):
        """Mixtures learn from the convolution that was drawn; queries and keys only where attention was."""
        single = single_of("vit", "plain").train()
        x = images(describe(single.model), 4)
        weight = single.model.blocks[1].attn.qkv.weight
        path = "stages.0.blocks.1"
        for level in range(4):
            single.zero_grad()
            set_levels_(single, dict.fromkeys(single.names, 3))
            with torch.no_grad():
                single.step(path).copy_(torch.tensor([60.0 if i < level else -60.0 for i in range(3)]))
            torch.manual_seed(0)
            single(x).square().sum().backward()
            assert float(weight.grad[:96].abs().max()) > 0 if level == 3 else float(weight.grad[:96].abs().max()) == 0
            moved = single.beside(path).mix.grad.abs().amax(dim=0)
            assert (float(moved.max()) > 0) == (level in (1, 2))
            if level == 1:
                assert moved.nonzero().flatten().tolist() == [single.beside(path).mixture.centre]

    def test_groups_of_the_optimiser(self):
        single = single_of("vit", "plain")
        method = methods.get("spvit")
        every = parameter_groups(
            single, method.train, lambda model: [{"params": model.gate_parameters(), "lr": 0.5, "weight_decay": 0.0}]
        )
        mine, decayed, _ = every
        assert (mine["lr"], mine["weight_decay"]) == (0.5, 0.0)
        assert {id(p) for p in mine["params"]} == {id(p) for p in [*single.gates.values(), *single.steps.values()]}
        assert id(single.beside("stages.0.blocks.0").mix) in {id(p) for p in decayed["params"]}
        assert decayed["weight_decay"] == 0.05

    @pytest.mark.parametrize(
        ("epochs", "given", "start", "rate"),
        [(0.5, None, None, 4.0), (0.5, 1e-3, None, 1e-3), (2, None, None, 1.0), (2, None, 1.5, 3 / 8)],
    )
    def test_gates_move_far_enough(self, epochs, given, start, rate, monkeypatch):
        """In a short search they would hardly move at the published rate: a gate starts 4, or 1.5, above closing."""
        seen = []
        model = adopt(timm_model("vit", "plain", torch.float32))
        monkeypatch.setattr(spvit, "fit", lambda single, *_, groups, **__: seen.append(groups(single)[0]["lr"]))
        settings = {"train": {**SHORT, "epochs": epochs}, "gate_lr": given, "start": start}
        methods.get("spvit", settings).search(model, digits(model), Budget.parse("macs=0.5"), seed=0)
        assert seen == [pytest.approx(rate)]

    @pytest.mark.parametrize(("first", "budget"), [(4.0, "macs=0.5"), (1e6, "macs=0.2")])
    def test_the_penalty_alone_ends_near_its_target(self, first, budget):
        model = adopt(timm_model("vit", "plain", torch.float32))
        spec = describe(model)
        how = layout(spec)
        single = SinglePath(model, how)
        penalty = methods.get("spvit", {"first": first}).penalty(spec, how, Budget.parse(budget))
        with torch.no_grad():
            for logits in single.gate_parameters():
                logits.add_(0.3 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0)))
        optimizer = torch.optim.AdamW(single.gate_parameters(), lr=0.02, weight_decay=0)
        start, lowest = float(penalty(single).detach()), math.inf
        for _ in range(150):
            optimizer.zero_grad()
            loss = penalty(single)
            lowest = min(lowest, float(loss.detach()))
            loss.backward()
            optimizer.step()
        assert lowest < start / 10
        assert all(bool(logits.isfinite().all()) for logits in single.gate_parameters())

    def test_without_pressure_nothing_closes(self):
        model = adopt(timm_model("vit", "plain", torch.float32))
        how = layout(describe(model))
        single = SinglePath(model, how)
        penalty = methods.get("spvit", {"pressure": 0}).penalty(describe(model), how, Budget.parse("macs=0.5"))
        loss = penalty(single)
        loss.backward()
        assert all(float(logits.grad.abs().max()) == 0 for logits in single.gate_parameters())


class TestProjection:
    @pytest.mark.parametrize("family", sorted({family for family, _ in FREE}))
    def test_budgets_bind(self, family):
        """Whatever the gates are: never over, at most 2 % under, for macs, folded parameters, and both."""
        single = single_of(family, next(preset for name, preset in FREE if name == family))
        spec, draw = describe(single.model), torch.Generator().manual_seed(0)
        how = layout(spec)
        for equal in (True, False, False):
            with torch.no_grad():
                for logits in single.gate_parameters():
                    logits.copy_(torch.ones(logits.shape) if equal else torch.randn(logits.shape, generator=draw))
            for text in ("macs=0.55", "macs=0.7", "macs=0.95", "params=0.6", "macs=0.7,params=0.7", "macs=1"):
                bound = Budget.parse(text)
                plan = _spvit_plan.planned(spec, how, *_spvit_plan.decide(spec, single, how, bound))
                cost = cost_of(folded(plan.child(spec)))
                assert bound.admits(cost, cost_of(spec))
                assert bound.spent(cost, cost_of(spec)) >= 1 - SLACK


PUBLISHED = {
    "deit_ti": (1.036706, 1.038642, 4873422, 4774808, 1.251052, (1.0, 4.9)),
    "deit_s": (3.346504, 3.353213, 16116858, 15870724, 4.586542, (3.3, 16.4)),
    "deit_b_t60": (8.390583, 8.409142, 46207987, 41583639, 17.510836, (8.3, 46.2)),
    "deit_b_t100": (11.730751, 11.764169, 62256336, 58320928, 17.510836, (11.7, 62.3)),
    "swin_ti": (3.334211, 3.330372, 26306263, 26232230, 4.494405, (3.3, 26.3)),
    "swin_s": (6.143214, 6.137569, 39205671, 38922496, 8.74652, (6.1, 39.2)),
    "swin_b": (11.39218, 11.384654, 68034286, 67542142, 15.438473, (11.4, 68.0)),
    "swin_ti_first_release": (3.358972, 3.355134, 25974891, 25630062, 4.494405, None),
    "swin_s_first_release": (6.335212, 6.329567, 40032883, 39749708, 8.74652, None),
    "swin_b_first_release": (12.107389, 12.099863, 72207302, 72157886, 15.438473, None),
}
"""By the authors' rule, all products (G), parameters with mixtures and with plain kernels, dense by the rule, and as
the published table has it (G and M)."""


def empty(name):
    """The spec of a timm model, built without data where timm can."""
    return describe(without_data(lambda: timm.create_model(name)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_released_structures(name):
    rule, products, mixed, plain, dense, table = PUBLISHED[name]
    spec = empty(structures()[name]["model"])
    how = layout(spec, leaves="norm")
    child = published(name, spec, how).child(spec)
    ours = prices(spec, how, "published")
    before, after = ({f"{path}.hidden": b.hidden for path, _, b in s.blocks()} for s in (spec, child))
    levels = {path: {"skip": 0, "attention": 3}.get(b.mixer.kind) for path, _, b in child.blocks()}
    levels |= {path: 1 + (b.mixer.kernel == 3) for path, _, b in child.blocks() if isinstance(b.mixer, ConvSpec)}
    attention = sum(sum(ours.steps[path][:level]) for path, level in levels.items())
    every = sum(map(sum, ours.steps.values()))
    by_rule = ours.constant + attention + sum(ours.neurons[path] * n for path, n in after.items())
    assert by_rule / 1e9 == pytest.approx(rule, abs=1e-6)
    by_rule = ours.constant + every + sum(ours.neurons[path] * n for path, n in before.items())
    assert by_rule / 1e9 == pytest.approx(dense, abs=1e-6)
    assert cost_of(child).macs / 1e9 == pytest.approx(products, abs=1e-6)
    assert cost_of(child).params == mixed
    # The authors' folding keeps the batch norm, ours does not.
    norms = sum(2 * b.mixer.width for _, _, b in child.blocks() if isinstance(b.mixer, ConvSpec))
    assert cost_of(folded(child)).params + norms == plain
    if table is not None:
        within = 0.04 if name == "deit_ti" else 0.02
        assert rule == pytest.approx(table[0], rel=within)
        assert mixed / 1e6 == pytest.approx(table[1], rel=0.02)


def test_a_released_structure_in_place_of_a_search():
    model = adopt(timm.create_model("deit_tiny_patch16_224"))
    found = methods.get("spvit", {"structure": "deit_ti"}).search(model, None, Budget.parse("macs=1.04G"), seed=0)
    child = fold(apply(found.parent, found.plan)).eval()
    assert cost_of(describe(child)) == counted(child)
    settings = {"structure": "deit_ti"}
    whole = compress(model, method="spvit", settings=settings, budget="macs=1.04G", measure={"latency": False})
    assert describe(whole.model) == describe(child)
    with pytest.raises(DataError, match="spvit needs images; give --data SRC"):
        compress(model, method="spvit", budget="macs=1.04G")
    with pytest.raises(BudgetError, match="must be what structure deit_ti costs"):
        methods.get("spvit", {"structure": "deit_ti"}).search(model, None, Budget.parse("macs=1.0G"), seed=0)
    with pytest.raises(MethodError, match="must be given the model that it was searched from, deit_small"):
        methods.get("spvit", {"structure": "deit_s"}).search(model, None, Budget.parse("macs=1.04G"), seed=0)
    with pytest.raises(MethodError, match="did you mean 'deit_ti'"):
        methods.get("spvit", {"structure": "deit_tii"}).search(model, None, Budget.parse("macs=1.04G"), seed=0)


def test_parameters_of_a_search_model():
    for family, preset in (("vit", "plain"), ("swin", "windows")):
        single = single_of(family, preset)
        spec = describe(single.model)
        more = sum(3 + b.hidden + 9 * len(b.mixer.v) + 4 * b.mixer.v[0] for _, _, b in spec.blocks())
        assert sum(p.numel() for p in single.parameters()) == cost_of(spec).params + more


def released_names(single, kind, plan):
    """The weights of a search model as the authors' code would have stored them."""
    swin = hasattr(single.model, "layers")
    child = apply(single.model, plan, grafts=_spvit_plan.grafts(single, _spvit_plan.as_evaluated(single)[0]))
    source = single.model if kind == "search" else child
    state = {}
    for name, value in source.state_dict().items():
        if kind != "search" and any(f".attn.{leaf}" in name for leaf in ("mix", "bn", "conv", "v", "proj")):
            continue
        if ".attn.qkv." in name:
            at, leaf = name.split(".attn.qkv.")
            third = len(value) // 3
            state |= {f"{at}.attn.qk.{leaf}": value[: 2 * third], f"{at}.attn.v.{leaf}": value[2 * third :]}
        else:
            state[name] = value
    for path, at in single.names.items():
        beside, attn = single.beside(path), f"{at}.attn"
        halves = {"1x1": slice(0, beside.width), "3x3": slice(beside.width, None)}
        if kind == "search":
            gate = "kernel_thresholds_full" if swin else "kernel_thresholds"
            state |= {f"{attn}.{gate}": single.step(path).detach(), f"{attn}.head_probs": beside.mix.detach()}
            state[f"{at}.mlp.ffn_thresholds"] = single.gate(f"{path}.hidden").detach()
            state[f"{at}.mlp.assigned_indicator_index"] = gates.hard(single.gate(f"{path}.hidden"))
            for side, half in halves.items():
                for leaf, value in beside.bn.state_dict().items():
                    state[f"{attn}.bn_{side}.{leaf}"] = value[half] if value.dim() else value
            continue
        block = child.get_submodule(at)
        if isinstance(block.attn, Conv):
            side, mine = f"{block.attn.spec.kernel}x{block.attn.spec.kernel}", block.attn.state_dict()
            if kind == "folded":
                conv = block.attn.spec.model_copy(update={"mixture": None})
                mine = state_of(conv, block.attn.spec, mine)
                mine = {n: v.view(*v.shape, 1, 1) if v.dim() == 2 else v for n, v in mine.items()}
            renamed = {"mix": "head_probs", "bn": f"bn_{side}" if kind == "tuned" else "bconv.1"}
            renamed |= {"conv": "bconv.0"} | ({"proj": "bconv.3"} if kind == "folded" else {})
            for leaf, value in mine.items():
                first, dot, rest = leaf.partition(".")
                state[f"{attn}.{renamed.get(first, first)}{dot}{rest}"] = value
            if swin:
                state[f"{attn}.relative_position_index"] = torch.zeros(2, 2, dtype=torch.long)
        elif block.attn is not None and hasattr(block.attn, "proj"):
            state |= {f"{attn}.proj.{leaf}": value for leaf, value in block.attn.proj.state_dict().items()}
    if swin:
        early = {n.replace("layers.1.downsample", "layers.0.downsample"): v for n, v in state.items()}
        state = {n.replace("head.fc.", "head."): v for n, v in early.items()}
    return state, child


@pytest.mark.parametrize(("family", "preset"), [("vit", "plain"), ("swin", "windows")])
@pytest.mark.parametrize("kind", ["search", "tuned", "folded"])
def test_released_checkpoints(family, preset, kind):
    single = single_of(family, preset)
    spec = describe(single.model)
    levels = {path: (3, 1, 2, 0)[i % 4] for i, path in enumerate(single.names)}
    set_levels_(single, levels)
    cut_neurons_(single)
    leaves = "zero" if kind == "search" else "norm"
    how = layout(spec, leaves=leaves)
    plan = _spvit_plan.planned(spec, how, *_spvit_plan.as_evaluated(single))
    state, child = released_names(single, kind, plan)
    opened = open_released(copy.deepcopy(single.model), state)
    x = images(spec)
    with torch.no_grad():
        assert apart(opened(x), child(x)) < EXACT
        if kind == "search":
            assert apart(opened(x), single(x)) < EXACT
        assert apart(fold(opened)(x), child(x)) < EXACT


def test_a_released_file_that_does_not_fit():
    single = single_of("vit", "plain")
    state = dict(single.model.state_dict())
    with pytest.raises(WeightsError, match="misses"):
        open_released(single.model, {n: v for n, v in state.items() if "attn.proj" not in n})
    with pytest.raises(WeightsError, match="must have an MLP in each block"):
        open_released(single.model, {n: v for n, v in state.items() if "mlp" not in n})


class TestRefusals:
    def test_budgets_out_of_reach(self):
        model = adopt(timm_model("vit", "plain", torch.float32))
        with pytest.raises(BudgetError, match=r"must be at least [\d,]+ for this model, but got"):
            methods.get("spvit").search(model, None, Budget.parse("macs=0.001"), seed=0)

    def test_settings(self):
        with pytest.raises(MethodError, match="temperature: input should be greater than 0"):
            methods.get("spvit", {"temperature": 0})
        with pytest.raises(ValueError, match="temperature"):
            Mixture(heads=2, temperature=0)
        with pytest.raises(MethodError, match="batch norms at least 2 images"):
            methods.get("spvit", {"train": {"batch": 2, "accumulate": 2}})

    def test_training_one_image_at_a_time_is_refused_before_the_search(self):
        model = timm_model("vit", "plain", torch.float32)
        with pytest.raises(RecipeError, match="at least 2 images at a time, but is 8 in 8 parts"):
            compress(model, "digits", method="spvit", epochs=1, train={"batch": 8, "accumulate": 8})

    def test_one_image(self):
        mixture = Mixture(heads=2, temperature=0.01)
        conv = Conv(6, ConvSpec(kernel=1, width=3, mixture=mixture, norm=True), FORM, prefix=1).train()
        with pytest.raises(DataError, match="at least 2 images at a time, but got 1"):
            conv(torch.randn(1, 7, 6))
        with pytest.raises(DataError, match="at least 2 images at a time, but got 1"):
            single_of("vit", "plain").train()(images(describe(adopted("vit", "plain")), 1))

    def test_masks_and_other_grids(self):
        conv = Conv(6, ConvSpec(kernel=3, width=3), FORM, grid=(2, 3), prefix=1)
        with pytest.raises(DataError, match="without masks"):
            conv(torch.randn(2, 7, 6), is_causal=True)
        with pytest.raises(DataError, match="2 x 3 patches of its grid, but got 8"):
            conv(torch.randn(2, 9, 6))

    def test_gated_and_grouped_values(self):
        """Neither is adopted, by whatever method; the command says so and ends with 2."""
        model = timm_model("vit", "plain", torch.float32)
        model.blocks[1].attn.gate = torch.nn.Linear(48, 48)
        with pytest.raises(AdoptError, match=r"blocks\.1\.attn: gated attention is not supported"):
            compress(model, method="spvit", budget="macs=0.5")
        model = timm_model("vit", "plain", torch.float32)
        model.blocks[0].attn.qkv = torch.nn.Linear(48, 48 + 2 * 16)
        with pytest.raises(AdoptError, match=r"blocks\.0\.attn\.qkv: .*as many keys and values as queries"):
            compress(model, method="spvit", budget="macs=0.5")

    @pytest.mark.parametrize(
        ("preset", "told"),
        [("scale_norms", "there is a norm over all heads in between"), ("dynamic", "dynamic_img_size is on")],
    )
    def test_models(self, preset, told):
        with pytest.raises(PlanError, match=told):
            layout(describe(adopted("vit", preset)))

    def test_plans(self):
        model = adopted("vit", "plain")
        spec = describe(model)
        keep = [BlockPlan()] * 2
        conv = ConvSpec(kernel=3, width=16)
        mixed = conv.model_copy(update={"mixture": Mixture(heads=3, temperature=1.0), "norm": True})
        kept = tuple(tuple(range(n)) for n in (16, 8, 16))
        for decision, told in (
            (BlockPlan(mixer=conv, tokens=Drop(kept=(1, 2))), "must have patches that fill a grid"),
            (BlockPlan(mixer=mixed.model_copy(update={"width": 5})), "as wide as every value head"),
            (BlockPlan(mixer=mixed, v=kept), "as wide as every value head"),
            (BlockPlan(mixer=conv, qk=kept), "no queries and keys"),
            (BlockPlan(mlp=Skip(leaves="norm")), "must leave nothing"),
        ):
            with pytest.raises(PlanError, match=told):
                apply(model, Plan.of(spec, [decision, *keep]))
        hybrid = apply(model, Plan.of(spec, [BlockPlan(mixer=conv), *keep]))
        other = BlockPlan(mixer=conv.model_copy(update={"kernel": 1}))
        with pytest.raises(PlanError, match="must stay as it is or be folded"):
            apply(hybrid, Plan.of(describe(hybrid), [other, *keep]))
        drop = [BlockPlan(tokens=Drop(kept=(1, 2))), *keep]
        with pytest.raises(PlanError, match="must have patches that fill a grid"):
            apply(hybrid, Plan.of(describe(hybrid), drop))
        block = describe(hybrid).stages[0].blocks[0]
        with pytest.raises(ValueError, match="must have patches that fill a grid"):
            Stage(**{**dict(spec.stages[0]), "blocks": (block.model_copy(update={"tokens": Drop(kept=(1,))}),)})


def test_the_grid_follows_the_input_size():
    model = adopt(timm_model("vit", "plain", torch.float32))
    spec = describe(model)
    conv = BlockPlan(mixer=ConvSpec(kernel=3, width=16, mixture=Mixture(heads=3, temperature=1.0), norm=True))
    plan = Plan.of(spec, [conv] * 3)
    first = apply(model, plan).eval()
    first.set_input_size((48, 32))
    model.set_input_size((48, 32))
    second = apply(model, plan).eval()
    x = torch.randn(2, 3, 48, 32)
    assert describe(first) == describe(second)
    with torch.no_grad():
        assert torch.equal(first(x), second(x))


@pytest.mark.parametrize("inherit", ["dense", "search"])
def test_what_training_goes_on_from(inherit):
    """The model's own weights with new mixtures and norms, or all that the search has trained."""
    model = adopt(timm_model("swin", "windows", torch.float32))
    settings = {"train": {**SHORT, "lr": 1e-3}, "gate_lr": 0.01, "start": 1.5, "inherit": inherit}
    found = methods.get("spvit", settings).search(model, digits(model), Budget.parse("macs=0.5"), seed=0)
    child = apply(found.parent, found.plan, grafts=found.grafts)
    convs = [(path, block.attn) for path, block in families.blocks_of(child) if isinstance(block.attn, Conv)]
    assert convs
    dense, searched = dict(families.blocks_of(model)), dict(families.blocks_of(found.parent))
    for path, conv in convs:
        values = {
            name: blocks[path].attn.qkv.weight.chunk(3)[2] for name, blocks in (("dense", dense), ("search", searched))
        }
        assert torch.equal(conv.v.weight, values[inherit])
        new = bool((conv.mix == 1).all()) and bool((conv.bn.running_var == 1).all()) and not conv.bn.num_batches_tracked
        assert new == (inherit == "dense")
    assert (found.parent is model) == (inherit == "dense")
    assert bool(found.grafts) == (inherit == "search")
    if inherit == "search":
        assert not torch.equal(values["dense"], values["search"])


@pytest.mark.parametrize(("inherit", "teaching"), [("dense", "hard"), ("search", "soft")])
def test_a_run_ends_folded(inherit, teaching, tmp_path):
    """Search, training of the hybrid, and a stored model of plain layers with its picture."""
    settings = {"train": {**SHORT, "drop_path": None}, "inherit": inherit, "gate_lr": 0.01}
    result = compress(
        adopt(timm_model("vit", "plain", torch.float32)), "digits", method="spvit", budget="macs=0.48", epochs=0.1,
        settings=settings, train={"batch": 32, "distill": {"kind": teaching}}, measure={"latency": False},
        out=tmp_path / "run",
    )  # fmt: skip
    child = describe(result.model)
    assert child == folded(child)
    assert any(isinstance(block.mixer, ConvSpec) for _, _, block in child.blocks())
    assert 0.48 * (1 - SLACK) <= result.measured["macs_ratio"] <= 0.48
    assert counted(result.model) == cost_of(child)
    stored = store.load(tmp_path / "run" / "model.safetensors")
    x = images(child, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(stored(x), result.model(x))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "convolution in place of attention" in page
    assert "became convolution" in page
    again = compress(result.model, method="magnitude", budget="macs=0.8", measure={"latency": False})
    assert counted(again.model) == cost_of(describe(again.model))


@pytest.mark.whole
@pytest.mark.parametrize(("family", "levels"), [("vit", (1, 2, 3)), ("swin", (2, 1, 3, 0))])
def test_an_export_is_folded(family, levels, tmp_path):
    """A file holds plain layers alone, whether or not the model was folded before, and gives its logits."""
    torch.manual_seed(0)
    module = families.get(family)
    parent = adopt(module.example().eval())
    spec = describe(parent)
    how = layout(spec)
    by_path = dict(zip(how.mixtures, levels, strict=True))
    child = apply(parent, _spvit_plan.planned(spec, how, by_path, {})).eval()
    x = images(spec, 3, torch.float32)
    done = export.export(child, tmp_path / "model.onnx")
    _, run = export.onnx_session(tmp_path / "model.onnx")
    assert done.apart < export.PARITY
    with torch.no_grad():
        assert apart(run(x), child(x)) < export.PARITY
    onnx = pytest.importorskip("onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert "BatchNormalization" not in kinds
    # One softmax an attention, none of a mixture.
    assert kinds.count("Softmax") == 1
    assert any(name.endswith("attn.mix") for name in child.state_dict())


RECIPES = sorted((Path(methods.__file__).parents[1] / "recipes").glob("*spvit*.toml"))
STARTS = {"deit_tiny": 1.26, "deit_small": 5.77, "deit_base": 10.60, "swin_tiny": 4.69, "swin_small": 4.22}
"""What the published penalties start at (section 3.1 of the specification)."""


def test_all_five_recipes_are_there():
    assert [path.stem.removesuffix("_spvit") for path in RECIPES] == sorted(STARTS)


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_recipes_are_strict_and_published(path):
    """The penalty starts where theirs does, and the released structure meets the budget and spends it."""
    recipe = read_recipe(path).resolved()
    method, text = recipe.found_method(), path.read_text(encoding="utf-8")
    structure = text.split("method.structure=")[1].split()[0]
    _, products, _, _, dense, _ = PUBLISHED[structure]
    assert recipe.model.name.startswith(structures()[structure]["model"])
    start = STARTS[path.stem.removesuffix("_spvit")]
    assert method.pressure * (dense - method.target) ** 2 == pytest.approx(start, rel=5e-3)
    limit = Budget.parse(recipe.budget).macs
    assert (1 - SLACK) * limit < products * 1e9 <= limit
    search, train = method.train, recipe.train
    assert (search.epochs, search.batch, search.lr, search.schedule) == (21, 1024, 1e-4, "constant")
    assert (train.epochs, train.batch, train.lr, train.min_lr, train.schedule) == (130, 1024, 1e-4, 1e-5, "cosine")
    same = "weight_decay drop_path mixup cutmix smoothing clip augment precision"
    assert all(getattr(search, name) == getattr(train, name) for name in same.split())
    assert (method.inherit, train.distill.kind, train.distill.alpha) == ("dense", "none", 0.5)
    assert all(f"# {word}:" in text for word in ("Run", "Cost", "Expect"))
    assert "measured" not in text
    distilled = merged(
        dump(recipe), overrides([word for word in text.split() if word.startswith(("train.", "teacher."))])
    )
    taught = load(Recipe, distilled, RecipeError)
    assert (taught.train.epochs, taught.train.distill.kind) == (200, "hard")
    assert taught.teacher is not None
    assert timm.is_model(taught.teacher.name)


def test_a_search_stops_at_the_first_epoch_that_meets_its_budget():
    model = adopt(timm_model("vit", "plain", torch.float32))
    train = {**SHORT, "epochs": 12, "drop_path": None, "lr": 1e-4}
    records = []
    settings = {"train": train, "gate_lr": 0.15, "first": 50.0, "closing": "penalty"}
    found = methods.get("spvit", settings).search(
        model, digits(model), Budget.parse("macs=0.6"), seed=0, log=records.append
    )
    epochs = max(record["epoch"] for record in records)
    assert epochs < 12
    assert found.trials[0]["macs_of_gates"] <= 0.6 * cost_of(describe(model)).macs
    assert {trial.get("operation") for trial in found.trials[1:]} <= {"skip", "1x1", "3x3", "attention"}
