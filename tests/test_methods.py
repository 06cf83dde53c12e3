"""Every method on every family, because its file exists; and what is particular to each."""

import copy
import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from tests.samples import WHOLE, adopted, images, timm_model
from tests.tolerance import EXACT
from vitrim import families, methods
from vitrim.cut.fill import fill, quantiles
from vitrim.cut.observe import axes, masked
from vitrim.families import adopt, describe
from vitrim.families.vit import example
from vitrim.methods import Data, magnitude, taylor, vit_slim
from vitrim.testing import check_method, digits, short
from vitrim.words.budget import Budget
from vitrim.words.errors import MethodError

FIRST = {family: next(iter(families.get(family).TEST_PRESETS)) for family in families.names()}


def small(family):
    return adopt(timm_model(family, FIRST[family], torch.float32))


LONG = {("post_training", family) for family in ("beit", "relpos", "swin_v2")}
PAIRS = [
    pair
    for pair in itertools.product(methods.names(), families.names())
    if pair != ("spvit", "swin_v2") and (WHOLE or pair not in LONG)
]


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_every_method_keeps_every_law(name, family):
    check_method(short(methods.get(name)), models=[small(family)])


def test_gates_before_norms_are_refused():
    with pytest.raises(MethodError, match="norms before its branches for spvit"):
        check_method(short(methods.get("spvit")), models=[small("swin_v2")])


def test_names_are_files():
    assert {"random", "magnitude", "taylor", "vit_slim"} <= set(methods.names())
    with pytest.raises(MethodError, match="did you mean 'taylor'"):
        methods.get("tailor")
    with pytest.raises(MethodError, match="did you mean 'choice'"):
        methods.get("taylor", {"choise": "even"})


@pytest.mark.parametrize("name", [n for n in methods.names() if methods.settings_of(n).needs != "nothing"])
def test_data_is_asked_for(name):
    with pytest.raises(MethodError, match="no data was given"):
        short(methods.get(name)).search(small("vit"), None, Budget.parse("macs=0.7"), seed=0)


def test_seeds_matter_to_random_alone():
    model = small("vit")
    plans = [methods.get("random").search(model, None, Budget.parse("macs=0.7"), seed=s).plan for s in (0, 1)]
    assert plans[0] != plans[1]
    plans = [methods.get("magnitude").search(model, None, Budget.parse("macs=0.7"), seed=s).plan for s in (0, 1)]
    assert plans[0] == plans[1]


def test_magnitude_by_hand():
    model = adopt(example().double())
    block = families.blocks_of(model)[0][1]
    qkv, proj = block.attn.qkv.weight, block.attn.proj.weight
    width = qkv.shape[0] // 3
    scores = {axis.name: magnitude._score(block, axis) for axis in block.axes()}
    wanted = qkv[2 * width :].norm(dim=1).log() + proj.norm(dim=0).log()
    assert torch.allclose(scores["v"], wanted.detach(), atol=EXACT)
    wanted = qkv[:width].norm(dim=1).log() + qkv[width : 2 * width].norm(dim=1).log()
    assert torch.allclose(scores["qk"], wanted.detach(), atol=EXACT)
    wanted = block.mlp.fc1.weight.norm(dim=1).log() + block.mlp.fc2.weight.norm(dim=0).log()
    assert torch.allclose(scores["hidden"], wanted.detach(), atol=EXACT)


def test_taylor_is_the_gradient_of_a_gate():
    """The sum over tokens of activation times gradient is the derivative by a gate at the tap, image by image."""
    model = adopted("vit", "plain")
    x, y = images(describe(model), 3), torch.tensor([1, 4, 7])
    scores = taylor.taylor_scores(model, [(x, y)], target="labels")
    for path in ("stages.0.blocks.1.hidden", "stages.0.blocks.2.v"):
        size = axes(model)[path].size
        total = torch.zeros(size, dtype=torch.float64)
        for i in range(3):
            gate = torch.ones(size, dtype=torch.float64, requires_grad=True)
            with masked(model, {path: gate}):
                loss = F.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
            total += torch.autograd.grad(loss, gate)[0].square()
        assert torch.allclose(scores[path], total / 6, rtol=1e-9, atol=1e-15)


def test_taylor_of_a_query_channel_is_that_of_its_product():
    """Cutting a q/k channel takes q_c k_c from the logits once: half the derivative of a gate on both taps."""
    model = adopted("vit", "plain")
    x, y = images(describe(model), 1), torch.tensor([3])
    path = "stages.0.blocks.1.qk"
    scores = taylor.taylor_scores(model, [(x, y)], target="labels")
    gate = torch.ones(axes(model)[path].size, dtype=torch.float64, requires_grad=True)
    with masked(model, {path: gate}):
        loss = F.cross_entropy(model(x), y)
    both = torch.autograd.grad(loss, gate)[0]
    assert torch.allclose(scores[path], 0.5 * (both / 2).square(), rtol=1e-9, atol=1e-15)


def test_taylor_finds_dead_neurons():
    model = copy.deepcopy(adopted("vit", "plain"))
    with torch.no_grad():
        model.blocks[1].mlp.fc2.weight[:, ::2] = 0
    spec = describe(model)
    batch = [(images(spec, 4), torch.tensor([0, 1, 2, 3]))]
    scores = taylor.taylor_scores(model, batch)["stages.0.blocks.1.hidden"]
    assert float(scores[::2].max()) == 0
    assert float(scores[1::2].min()) > 0


def test_taylor_without_labels_draws_them():
    model = small("vit")
    x = images(describe(model), 4, torch.float32)
    unknown = torch.full((4,), -1)
    first = taylor.taylor_scores(model, [(x, unknown)], seed=3)
    again = taylor.taylor_scores(model, [(x, unknown)], seed=3)
    assert all(torch.equal(first[path], again[path]) for path in first)
    with pytest.raises(MethodError, match="target=output"):
        taylor.taylor_scores(model, [(x, unknown)], target="labels")


class TestViTSlim:
    def test_gates_of_one_are_the_model(self):
        model = copy.deepcopy(adopted("vit", "plain"))
        x = images(describe(model))
        gated = vit_slim.gate_model(copy.deepcopy(model))
        with torch.no_grad():
            assert torch.equal(gated(x), model(x))

    def test_query_key_and_value_share_a_gate(self):
        model = copy.deepcopy(adopted("vit", "plain"))
        spec = describe(model)
        gated = vit_slim.gate_model(model)
        masks = {}
        for path, axis in axes(model).items():
            owner = path if axis.name == "hidden" else f"{path.rpartition('.')[0]}.v"
            gate = gated.gate(owner)
            with torch.no_grad():
                gate.copy_(torch.linspace(-1, 1, gate.numel()))
            masks[path] = gate.detach().double()
        with masked(model, masks), torch.no_grad():
            wanted = model(images(spec))
        with torch.no_grad():
            got = gated(images(spec))
        assert float((got - wanted).abs().max() / wanted.abs().max()) < 1e-6

    def test_penalty_and_its_gradient(self):
        gated = vit_slim.gate_model(small("vit"))
        penalty = vit_slim.l1_penalty(2e-4, 5e-5)(gated)
        spec = describe(gated.model)
        channels = sum(sum(block.mixer.v) for _, _, block in spec.blocks())
        neurons = sum(block.hidden for _, _, block in spec.blocks())
        assert float(penalty.detach()) == pytest.approx(2e-4 * channels + 5e-5 * neurons, rel=1e-5)
        penalty.backward()
        for path, gate in gated.gates.items():
            assert torch.allclose(gate.grad, torch.full_like(gate, 5e-5 if path.endswith("hidden") else 2e-4))

    def test_a_kind_without_penalty_has_no_gate(self):
        gated = vit_slim.gate_model(small("vit"), mlp=False)
        assert all(path.endswith("/v") for path in gated.gates)
        scores, kinds = vit_slim.gate_scores(gated, "signed")
        assert set(kinds.values()) == {"attention"}
        assert not any(path.endswith("hidden") for path in scores)

    @pytest.mark.parametrize("penalty", [{"penalty": "published", "mlp_l1": 1e-2}, {"penalty": "measured"}])
    def test_unused_channels_sink(self, penalty):
        """Gates of neurons that reach nothing fall by the penalty alone; those in use are held up by the loss."""
        model = small("vit")
        with torch.no_grad():
            for block in model.blocks:
                block.mlp.fc2.weight[:, : block.mlp.hidden // 2] = 0
        data = digits(model)
        settings = {"epochs": 12, "batch": 16, "lr": 1e-3, "schedule": "constant", "augment": {"kind": "none"}}
        settings |= {"mixup": 0, "cutmix": 0, "weight_decay": 0, "drop_path": 0}
        method = methods.get(
            "vit_slim", {"train": settings, "attention_l1": 0, "gate_lr": 0.01, "choice": "free"} | penalty
        )
        found = method.search(model, data, Budget.parse("macs=0.8"), seed=0)
        kept = [block.hidden for block in found.plan.blocks() if block.hidden is not None]
        half = model.blocks[0].mlp.hidden // 2
        dead = sum(sum(1 for i in hidden if i < half) for hidden in kept)
        assert dead < 0.5 * sum(map(len, kept))

    @pytest.mark.parametrize("share", [0.8, 0.7, 0.5])
    def test_kept_sets_are_nested_and_shares_equal(self, share):
        model = small("vit")
        gated = vit_slim.gate_model(model)
        with torch.no_grad():
            for gate in gated.gates.values():
                gate.copy_(torch.randn(gate.shape))
        scores, kinds = vit_slim.gate_scores(gated, "signed")
        ranks = quantiles(scores, kinds)
        spec = describe(model)
        small_plan = fill(spec, ranks, Budget.parse(f"macs={share - 0.1:.2f}"), choice="free", by="score")
        large_plan = fill(spec, ranks, Budget.parse(f"macs={share}"), choice="free", by="score")
        pairs = zip(small_plan.blocks(), large_plan.blocks(), strict=True)
        less = sum(len(set(a.hidden or ()) - set(b.hidden or range(10**6))) for a, b in pairs)
        # what is given back at the end may differ by single channels of the last rungs
        assert less <= 2

    def test_signed_and_absolute(self):
        gated = vit_slim.gate_model(small("vit"))
        with torch.no_grad():
            next(iter(gated.gates.values())).copy_(torch.linspace(-2, 1, next(iter(gated.gates.values())).numel()))
        signed, _ = vit_slim.gate_scores(gated, "signed")
        absolute, _ = vit_slim.gate_scores(gated, "absolute")
        path = next(path for path in signed if float(signed[path].min()) < 0)
        assert int(signed[path].argmin()) == 0
        assert int(absolute[path].argmax()) == 0

    def test_a_gate_that_is_not_a_number_is_refused(self):
        gated = vit_slim.gate_model(small("vit"))
        with torch.no_grad():
            next(iter(gated.gates.values()))[0] = math.nan
        with pytest.raises(MethodError, match="gates must be finite"):
            vit_slim.gate_scores(gated, "signed")

    def test_fold_keeps_the_function_and_binarize_drops_it(self):
        model = small("vit")
        data = digits(model)
        parents = {}
        for export in ("fold", "binarize"):
            method = short(methods.get("vit_slim")).model_copy(update={"export": export, "gate_lr": 0.05})
            parents[export] = method.search(model, data, Budget.parse("macs=1.0"), seed=0).parent
        folded, bare = (dict(parents[e].named_parameters()) for e in ("fold", "binarize"))
        assert not torch.equal(folded["blocks.0.mlp.fc2.weight"], bare["blocks.0.mlp.fc2.weight"])
        assert torch.equal(folded["blocks.0.mlp.fc1.weight"], bare["blocks.0.mlp.fc1.weight"])

    def test_gates_decay_with_the_weights_and_may_have_their_own_rate(self):
        gated = vit_slim.gate_model(small("vit"))
        method = methods.get("vit_slim", {"gate_lr": 0.01})
        (group,) = method._groups(gated)
        assert group["weight_decay"] == method.train.weight_decay == 1e-3
        assert group["lr"] == 0.01
        assert {id(p) for p in group["params"]} == {id(p) for p in gated.gates.values()}

    def test_no_training_images(self):
        empty = Data(train=None, calibration=None, validation=None, input=digits(small("vit")).input)
        with pytest.raises(MethodError, match="no data was given"):
            methods.get("vit_slim").search(small("vit"), empty, Budget.parse("macs=0.7"), seed=0)
