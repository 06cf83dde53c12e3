"""ViT-Slim against shared/methods/vit-slim.md: counts (6.1), identities (6.2), edge cases (6.4)."""

import copy
import math

import pytest
import timm
import torch

from tests.samples import adopted, apart, images, masks_of, without_data
from tests.tolerance import EXACT, SINGLE
from vitrim import families, methods
from vitrim.cut import surgery
from vitrim.cut.observe import masked
from vitrim.cut.shares import kept_count, share_plan, top
from vitrim.deploy import store
from vitrim.families import describe
from vitrim.families.vit import example
from vitrim.methods import vit_slim
from vitrim.nn import Attention
from vitrim.words.budget import Budget
from vitrim.words.costs import cost_of
from vitrim.words.errors import MethodError
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.steps.drop import Drop

# P0, F0, dense parameters and MACs of DeiT-T, -S and -B: section 6.1.
NAMES = {
    "T": "deit_tiny_patch16_224",
    "S": "deit_small_patch16_224",
    "B": "deit_base_patch16_224",
    "swin": "swin_tiny_patch4_window7_224",
}
HOSTS = {"T": (392_872, 29_093_376), "S": (784_744, 58_186_752), "B": (1_568_488, 116_373_504)}
DENSE = {"T": (5_717_416, 1.2537), "S": (22_050_664, 4.5989), "B": (86_567_656, 17.5638)}
ROWS = [
    ("S", 70, 100, 3226, 18432, 19_923_766, 4.0734, 19.9, 4.1),
    ("S", 60, 100, 2765, 18432, 19_214_287, 3.8982, 19.2, 3.9),
    ("S", 50, 100, 2304, 18432, 18_504_808, 3.7229, 18.5, 3.7),
    ("S", 40, 100, 1844, 18432, 17_796_868, 3.5480, 17.8, 3.5),
    ("S", 100, 70, 4608, 12903, 17_798_863, 3.7624, 17.8, 3.8),
    ("S", 100, 60, 4608, 11060, 16_381_596, 3.4835, 16.4, 3.5),
    ("S", 100, 50, 4608, 9216, 14_963_560, 3.2045, 15.0, 3.2),
    ("S", 100, 40, 4608, 7373, 13_546_293, 2.9257, 13.5, 2.9),
    ("S", 80, 80, 3687, 14746, 17_798_711, 3.6910, 17.7, 3.7),
    ("S", 70, 70, 3226, 12903, 15_671_965, 3.2369, 15.6, 3.3),
    ("S", 60, 60, 2765, 11060, 13_545_219, 2.7828, 13.5, 2.8),
    ("S", 50, 50, 2304, 9216, 11_417_704, 2.3285, 11.4, 2.3),
    ("B", 60, 60, 5530, 22119, 52_570_141, 10.5853, 52.6, 10.6),
    ("T", 70, 70, 1613, 6452, 4_120_515, 0.8864, None, None),
    ("T", 60, 60, 1383, 5530, 3_588_215, 0.7640, None, None),
]


def spec_of(size):
    return describe(without_data(lambda: timm.create_model(NAMES[size])))


def random_scores(spec, seed=0):
    draw = torch.Generator().manual_seed(seed)
    scores, kinds = {}, {}
    for path, _, block in spec.blocks():
        scores[f"{path}.v"] = scores[f"{path}.qk"] = torch.randn(sum(block.mixer.v), generator=draw)
        scores[f"{path}.hidden"] = torch.randn(block.hidden, generator=draw)
        kinds |= {f"{path}.v": "attention", f"{path}.qk": "attention", f"{path}.hidden": "mlp"}
    return scores, kinds


def cut(spec, attention, mlp, seed=0):
    return share_plan(spec, *random_scores(spec, seed), {"attention": attention, "mlp": mlp})


def totals(spec):
    return sum(sum(b.mixer.v) for _, _, b in spec.blocks()), sum(b.hidden for _, _, b in spec.blocks())


def closed_form(size, spec):
    """Section 6.1, from the widths and tokens of every block."""
    stage = spec.stages[0]
    width, (params, macs), (channels, neurons) = stage.width, HOSTS[size], totals(spec)
    for block in stage.blocks:
        n = stage.tokens if block.tokens is None else 1 + len(block.tokens.kept)
        s = sum(block.mixer.v)
        macs += n * (4 * width * s + 2 * width * block.hidden) + 2 * n * n * s
    return macs, params + channels * (4 * width + 3) + neurons * (2 * width + 1)


class TestCounts:
    @pytest.mark.parametrize("size", HOSTS)
    def test_dense(self, size):
        spec = spec_of(size)
        cost = cost_of(spec)
        assert cost.params == DENSE[size][0]
        assert cost.macs / 1e9 == pytest.approx(DENSE[size][1], abs=5e-5)
        assert cost == closed_form(size, spec)

    @pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]}-{row[1]}-{row[2]}")
    def test_rows_of_channels_and_neurons(self, row):
        size, attention, mlp, channels, neurons, params, gmacs, published_params, published_gmacs = row
        spec = spec_of(size)
        child = cut(spec, attention / 100, mlp / 100, seed=attention).child(spec)
        cost = cost_of(child)
        assert totals(child) == (channels, neurons)
        assert cost.params == params
        assert cost.macs / 1e9 == pytest.approx(gmacs, abs=5.1e-5)
        assert cost == closed_form(size, child)
        if published_params:
            assert cost.params / 1e6 == pytest.approx(published_params, rel=0.02)
            assert cost.macs / 1e9 == pytest.approx(published_gmacs, rel=0.02)

    @pytest.mark.parametrize(("fraction", "published"), [(0.96, 3.1), (0.90, 2.9), (0.87, 2.8)])
    def test_rows_of_tokens(self, fraction, published):
        spec = spec_of("S")
        step = Drop(kept=sorted(torch.randperm(196)[: round(fraction * 196)].tolist()))
        tokens = Plan.of(spec, [BlockPlan(tokens=step)] + [BlockPlan()] * 11)
        child = cut(spec, 0.7, 0.7).child(tokens.child(spec))
        assert cost_of(child) == closed_form("S", child)
        assert cost_of(child).params == 15_671_965
        assert cost_of(child).macs / 1e9 == pytest.approx(published, rel=0.02)

    @pytest.mark.parametrize("share", [0.8, 0.7])
    def test_swin_by_stage(self, share):
        spec = spec_of("swin")
        child = cut(spec, share, share).child(spec)
        assert totals(child) == (kept_count(4416, share), kept_count(17664, share))
        macs, params = 188_626_944, 2_378_914
        rates = [(387, 1_511_552), (771, 678_944), (1539, 320_264), (3075, 155_330)]
        neurons = [(193, 602_112), (385, 301_056), (769, 150_528), (1537, 75_264)]
        for stage, (p, m), (q, n) in zip(child.stages, rates, neurons, strict=True):
            channels, hidden = sum(sum(b.mixer.v) for b in stage.blocks), sum(b.hidden for b in stage.blocks)
            macs, params = macs + channels * m + hidden * n, params + channels * p + hidden * q
        # A head that is dead takes its column of biases along, which the constants leave out.
        heads = [len(b.mixer.v) for _, _, b in spec.blocks()], [len(b.mixer.v) for _, _, b in child.blocks()]
        assert cost_of(child) == (macs, params - 169 * (sum(heads[0]) - sum(heads[1])))


def gated_at_random(model, tokens=False, seed=0):
    """Gates of every kind drawn at random, some negative."""
    gated = vit_slim.gate_model(copy.deepcopy(model), tokens=tokens)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for gate in (*gated.gates.values(), *gated.tokens.values()):
            gate.copy_(torch.randn(gate.shape, generator=draw))
    return gated


def zeroed(gated, plan):
    """Set the gates of all that `plan` cuts to 0."""
    spec = describe(gated.model)
    with torch.no_grad():
        for path, mask in masks_of(spec, plan).items():
            if gated.has_gate(path):
                gated.gate(path).mul_(mask)


class TestIdentities:
    @pytest.mark.parametrize(("family", "preset"), [("vit", "plain"), ("swin", "windows"), ("t2t", "performer")])
    def test_gates_of_one_are_timms_model(self, family, preset):
        module = families.get(family)
        theirs = module.example(**module.TEST_PRESETS[preset]).eval()
        gated = vit_slim.gate_model(families.adopt(theirs))
        x = images(describe(theirs), dtype=torch.float32)
        with torch.no_grad():
            assert apart(gated(x), theirs(x)) < SINGLE

    def test_token_gates_start_below_one_and_pass_at_one(self):
        model = adopted("vit", "distilled")
        gated = vit_slim.gate_model(copy.deepcopy(model), tokens=True)
        x = images(describe(model))
        assert all(gate.numel() == 16 for gate in gated.tokens.values())
        assert float(next(iter(gated.squashed().values())).detach()[0]) == pytest.approx(0.995055, abs=1e-6)
        with torch.no_grad():
            assert 1e-6 < apart(gated(x), model(x)) < 0.1
            for gate in gated.tokens.values():
                gate.fill_(30.0)
            assert torch.equal(gated(x), model(x))

    @pytest.mark.parametrize(("family", "preset"), [("vit", "plain"), ("swin", "windows"), ("vit", "qk_norm")])
    def test_gated_is_cut_and_folded(self, family, preset):
        """Swin's blocks are shifted and not, and have biases at every offset."""
        model = adopted(family, preset)
        spec = describe(model)
        gated = gated_at_random(model)
        scores, kinds = vit_slim.gate_scores(gated, "signed")
        plan = share_plan(spec, scores, kinds, {"attention": 0.5, "mlp": 0.6})
        zeroed(gated, plan)
        x = images(spec)
        with torch.no_grad():
            wanted = gated(x)
            assert apart(surgery.apply(gated.fold_(), plan)(x), wanted) < EXACT

    def test_gated_by_zero_and_one_is_cut_and_binarized(self):
        model = adopted("vit", "plain")
        spec = describe(model)
        gated = gated_at_random(model)
        scores, kinds = vit_slim.gate_scores(gated, "absolute")
        plan = share_plan(spec, scores, kinds, {"attention": 0.5, "mlp": 0.6})
        with torch.no_grad():
            for gate in gated.gates.values():
                gate.fill_(1)
        zeroed(gated, plan)
        with torch.no_grad():
            assert apart(surgery.apply(gated.model, plan)(images(spec)), gated(images(spec))) < EXACT

    @pytest.mark.parametrize("preset", ["plain", "distilled", "registers"])
    def test_masked_tokens_are_the_exact_form(self, preset):
        """With channels cut and folded besides; tokens that are gone are another function."""
        model = adopted("vit", preset)
        spec = describe(model)
        gated = gated_at_random(model, tokens=True)
        children = {}
        for dropping in ("drop_exact", "drop"):
            settings = {"token_l1": 1, "tokens": 0.5, "attention": 0.7, "mlp": 0.7, "dropping": dropping}
            method = methods.get("vit_slim", settings | {"choice": "free"})
            children[dropping] = _decided(method, spec, gated)
        plan = children["drop_exact"]
        for path, _, block in plan.child(spec).blocks():
            raw = gated.tokens[f"{path}.tokens".replace(".", "/")]
            with torch.no_grad():
                # Beyond the reach of float: tanh gives 1; 0 stays 0.
                raw.zero_().index_fill_(0, torch.tensor(block.tokens.kept), 40.0)
        zeroed(gated, plan)
        x = images(spec)
        with torch.no_grad():
            wanted = gated(x)
            parent = gated.fold_()
            exact, gone = (surgery.apply(parent, children[name])(x) for name in ("drop_exact", "drop"))
        assert apart(exact, wanted) < EXACT
        assert apart(gone, wanted) > 1e-4

    def test_uneven_heads_are_a_loop_with_the_parents_scale(self):
        parent = adopted("vit", "plain")
        spec = describe(parent)
        kept = ((0, 3, 7), (1,), tuple(range(16)))
        child = surgery.apply(parent, Plan.of(spec, [BlockPlan(qk=kept, v=kept)] + [BlockPlan()] * 2))
        attention = child.blocks[0].attn
        assert isinstance(attention, Attention)
        y = torch.randn(2, 17, 48, dtype=torch.float64)

        def loop(scale_of):
            q, k, v = (part.split([3, 1, 16], dim=-1) for part in attention.qkv(y).chunk(3, dim=-1))
            heads = [
                (scale_of(a.shape[-1]) * a @ b.transpose(1, 2)).softmax(dim=-1) @ c
                for a, b, c in zip(q, k, v, strict=True)
            ]
            return attention.proj(torch.cat(heads, dim=-1))

        with torch.no_grad():
            assert apart(attention(y), loop(lambda _: 16**-0.5)) < EXACT
            assert apart(attention(y), loop(lambda width: width**-0.5)) > 1e-3

    def test_gradients_of_the_penalty_at_the_start(self):
        gated = vit_slim.gate_model(copy.deepcopy(adopted("vit", "plain")), tokens=True)
        vit_slim.l1_penalty(2e-4, 5e-5, 1e-4)(gated).backward()
        slope = 1e-4 * (1 - math.tanh(3) ** 2)
        assert slope == pytest.approx(0.00987e-4, rel=1e-2)
        for gate in gated.tokens.values():
            assert torch.allclose(gate.grad, torch.full_like(gate, slope), rtol=1e-4)
        for path, gate in gated.gates.items():
            assert torch.allclose(gate.grad, torch.full_like(gate, 5e-5 if path.endswith("hidden") else 2e-4))

    def test_cut_stored_and_read_without_shares(self, tmp_path):
        model = families.adopt(example())
        gated = gated_at_random(model, tokens=True)
        method = methods.get("vit_slim", {"token_l1": 1, "tokens": 0.4, "attention": 0.5, "mlp": 0.5, "choice": "free"})
        child = surgery.apply(gated.fold_(), _decided(method, describe(model), gated)).eval()
        store.save(child, tmp_path / "child.safetensors")
        again = store.load(tmp_path / "child.safetensors")
        x = images(describe(child), dtype=torch.float32)
        with torch.no_grad():
            assert torch.equal(again(x), child(x))
            program = torch.export.export(again, (x,))
            assert apart(program.module()(x), child(x)) < SINGLE


def _decided(method, spec, gated):
    """What the shares of `method` keep, whatever that costs."""
    scores, kinds = vit_slim.gate_scores(gated, method.ranking)
    tokens = vit_slim.token_scores(gated, method.ranking)
    steps = method._steps(top(tokens, method._count(tokens, spec)), spec)
    plan = share_plan(spec, scores, kinds, {"attention": method.attention, "mlp": method.mlp})
    return vit_slim.with_tokens(spec, plan, steps)


class TestEdges:
    @pytest.mark.parametrize("share", [0.0, 0.02])
    def test_nearly_nothing_is_left_and_the_model_still_runs(self, share):
        """Dead heads, heads of one channel, dead branches and blocks that only add their biases."""
        model = adopted("vit", "distilled")
        spec = describe(model)
        gated = gated_at_random(model, tokens=True)
        settings = {"token_l1": 1, "tokens": share, "attention": share, "mlp": share, "choice": "free"}
        method = methods.get("vit_slim", settings | {"dropping": "drop_exact"})
        plan = _decided(method, spec, gated)
        zeroed(gated, plan)
        for (_, _, block), gate in zip(plan.child(spec).blocks(), gated.tokens.values(), strict=True):
            with torch.no_grad():
                gate.zero_().index_fill_(0, torch.tensor(block.tokens.kept, dtype=torch.long), 40.0)
        x = images(spec)
        with torch.no_grad():
            wanted = gated(x)
            child = surgery.apply(gated.fold_(), plan)
            assert apart(child(x), wanted) < EXACT
        if not share:
            assert totals(describe(child)) == (0, 0)

    @pytest.mark.parametrize(
        ("arguments", "tokens", "prefix"),
        [
            ({"distilled": True}, 18, 2),
            ({"class_token": False, "global_pool": "avg"}, 16, 0),
            ({"reg_tokens": 4}, 21, 5),
            ({"img_size": (24, 40)}, 16, 1),
            ({"img_size": 56}, 50, 1),
        ],
        ids=["distilled", "no-class-token", "registers", "not-square", "odd"],
    )
    def test_gates_follow_the_tokens(self, arguments, tokens, prefix):
        model = families.adopt(example(**arguments))
        for included in (False, True):
            gated = vit_slim.gate_model(copy.deepcopy(model), tokens=True, prefix=included)
            assert {gate.numel() for gate in gated.tokens.values()} == {tokens if included else tokens - prefix}
            assert torch.isfinite(gated(images(describe(model), dtype=torch.float32))).all()

    @pytest.mark.parametrize(
        ("name", "tokens"), [("deit_base_patch16_384", 577), ("deit_base_distilled_patch16_384", 578)]
    )
    def test_gates_at_384(self, name, tokens):
        model = without_data(lambda: timm.create_model(name))
        assert describe(model).stages[0].tokens == tokens

    def test_prefix_tokens_count_for_parity_and_stay(self):
        """The authors' list has 197 x 12 = 2364 entries."""
        spec = spec_of("S")
        scores = {f"{path}.tokens": torch.arange(197.0) for path, _, _ in spec.blocks()}
        method = methods.get("vit_slim", {"token_l1": 1, "tokens": 0.6, "prefix": "included"})
        best = top(scores, method._count(scores, spec))
        assert sum(int(keep.sum()) for keep in best.values()) == 2364 - int(0.4 * 2364)
        assert not any(bool(keep[0]) for keep in best.values())
        steps = method._steps(best, spec)
        assert vit_slim.with_tokens(spec, Plan.keep(spec), steps).child(spec).stages[0].prefix == 1

    @pytest.mark.parametrize("family", ["vit", "swin"])
    def test_fresh_gates_are_all_tied_and_cut_exactly(self, family):
        model = adopted(family, {"vit": "plain", "swin": "windows"}[family])
        spec = describe(model)
        scores, kinds = vit_slim.gate_scores(vit_slim.gate_model(copy.deepcopy(model)), "signed")
        channels, neurons = totals(spec)
        for share in (0.0, 0.31, 0.5, 0.97, 1.0):
            child = share_plan(spec, scores, kinds, {"attention": share, "mlp": share}).child(spec)
            assert totals(child) == (kept_count(channels, share), kept_count(neurons, share))

    def test_a_gate_that_is_no_number_is_refused(self):
        gated = vit_slim.gate_model(copy.deepcopy(adopted("vit", "plain")), tokens=True)
        with torch.no_grad():
            next(iter(gated.tokens.values()))[3] = math.nan
        with pytest.raises(MethodError, match=r"blocks\.0\.tokens: gates must be finite"):
            vit_slim.token_scores(gated, "signed")
        with pytest.raises(MethodError, match="scores must be finite"):
            top({"a": torch.tensor([1.0, math.nan])}, 1)

    def test_windows_have_no_token_gates(self):
        model = copy.deepcopy(adopted("swin", "windows"))
        with pytest.raises(
            MethodError, match="token_l1 must be 0 for this model: token cuts are not possible on window"
        ):
            methods.get("vit_slim", {"token_l1": 1e-4}).decide(
                describe(model), vit_slim.gate_model(model, tokens=True), Budget.parse("macs=0.7")
            )

    def test_tokens_that_were_dropped_are_not_gated_again(self):
        model = adopted("vit", "plain")
        spec = describe(model)
        child = surgery.apply(model, Plan.of(spec, [BlockPlan(tokens=Drop(kept=(1, 2)))] * 3))
        with pytest.raises(MethodError, match="whose tokens were dropped before"):
            vit_slim.gate_model(child, tokens=True)
        assert vit_slim.gate_model(child).tokens.keys() == set()

    def test_training_with_drop_path_passes_through_the_gates(self):
        model = families.adopt(example(drop_path_rate=0.5)).train()
        gated = vit_slim.gate_model(model, tokens=True)
        gated(images(describe(model), dtype=torch.float32)).square().mean().backward()
        assert all(float(gate.grad.abs().max()) > 0 for gate in gated.tokens.values())
        assert not any(module._forward_hooks for module in model.modules())

    def test_masks_of_tokens_are_gates_of_tokens(self):
        """The same function as a multiplication at the outputs of both norms, prefix tokens left out."""
        model = adopted("vit", "registers")
        spec = describe(model)
        gated = gated_at_random(model, tokens=True)
        with torch.no_grad():
            for gate in gated.gates.values():
                gate.fill_(1)
        prefix = torch.ones(spec.stages[0].prefix)
        taps = {path: torch.cat([prefix, gate.detach()]).double() for path, gate in gated.squashed().items()}
        with masked(model, taps), torch.no_grad():
            wanted = model(images(spec))
        with torch.no_grad():
            assert apart(gated(images(spec)), wanted) < EXACT
