"""ViT-Slim as a search: what is kept for a share and for a budget (vit-slim.md, 6.3), and the published recipes."""

import copy
import dataclasses
import itertools
import math
from pathlib import Path

import pytest
import torch

from tests.samples import adopted, images
from tests.test_methods import small
from vitrim import methods
from vitrim.cut import surgery
from vitrim.cut.shares import consistent, kept_count, largest, share_plan, top, with_tokens
from vitrim.data import eval_loader
from vitrim.families import describe
from vitrim.methods import vit_slim
from vitrim.methods.vit_slim.pressure import PRESSURE, curvatures, kind_of
from vitrim.run.recipe import read_recipe
from vitrim.testing import SHORT, check_method, digits
from vitrim.train import Train, fit
from vitrim.train.optim import parameter_groups
from vitrim.words.budget import Budget
from vitrim.words.costs import cost_of
from vitrim.words.errors import BudgetError, MethodError
from vitrim.words.plan import Plan

RULES = ["suffix_or", "prefix_and"]
RECIPES = sorted((Path(methods.__file__).parents[1] / "recipes").glob("*vit_slim*.toml"))


def joint(**settings):
    return methods.get("vit_slim", {"train": SHORT, "token_l1": 2.5e-5, "gate_lr": 0.05} | settings)


def found(model, budget, **settings):
    return joint(**settings).search(model, digits(model), Budget.parse(budget), seed=0)


def moved(model, seed=0):
    """Gates of all kinds that have moved apart."""
    gated = vit_slim.gate_model(copy.deepcopy(model), tokens=True)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for gate in (*gated.gates.values(), *gated.tokens.values()):
            gate.add_(torch.randn(gate.shape, generator=draw))
    return gated


@pytest.mark.parametrize("family", ["vit", "t2t"])
def test_a_joint_search_keeps_every_law_of_a_method(family):
    """Channels, neurons and tokens together."""
    check_method(joint(), models=[small(family)])


class TestTokenSets:
    def sets(self, share, rule):
        scores = torch.randn(12, 196, generator=torch.Generator().manual_seed(0))
        lists = {str(i): row for i, row in enumerate(scores)}
        best = top(lists, kept_count(12 * 196, share))
        return consistent(torch.stack(list(best.values())), rule)

    @pytest.mark.parametrize("rule", RULES)
    def test_they_shrink_with_depth_and_are_nested(self, rule):
        before = torch.zeros(12, 196, dtype=torch.bool)
        for share in (0.0, 0.2, 0.5, 0.6, 0.9, 1.0):
            keep = self.sets(share, rule)
            assert all(bool((b <= a).all()) for a, b in itertools.pairwise(keep))
            assert bool((before <= keep).all())
            before = keep
        assert bool(keep.all())

    @pytest.mark.parametrize("share", [0.3, 0.6, 0.8])
    def test_more_or_fewer_than_nominal(self, share):
        more, fewer = (float(self.sets(share, rule).double().mean()) for rule in RULES)
        assert more >= share >= fewer

    def test_how_far_the_rules_are_apart(self):
        """Section 2.4: independent scores at 0.6 give 0.94 and 0.13."""
        assert float(self.sets(0.6, "suffix_or").double().mean()) == pytest.approx(0.94, abs=0.02)
        assert float(self.sets(0.6, "prefix_and").double().mean()) == pytest.approx(0.13, abs=0.02)

    @pytest.mark.parametrize("rule", RULES)
    def test_the_realised_share_can_be_asked_for(self, rule):
        spec = describe(adopted("vit", "plain"))
        tokens = vit_slim.token_scores(moved(adopted("vit", "plain")), "signed")
        method = joint(tokens=0.6, meet="realised", consistency=rule)
        steps = method._steps(top(tokens, method._count(tokens, spec)), spec)
        realised = sum(len(step.kept) for step in steps.values()) / (3 * 16)
        # One entry more or less moves up to three pairs of 48.
        assert 0.6 - 3 / 48 < realised <= 0.6

    def test_largest(self):
        for wanted in range(8):
            assert largest(7, lambda count, wanted=wanted: count <= wanted) == wanted


def test_nested_and_monotone_in_every_share():
    model = adopted("vit", "plain")
    spec, gated = describe(model), moved(model)
    scores, kinds = vit_slim.gate_scores(gated, "signed")
    tokens = vit_slim.token_scores(gated, "signed")
    before = None
    for share in (0.1, 0.35, 0.6, 0.85, 1.0):
        method = joint(tokens=share)
        steps = method._steps(top(tokens, method._count(tokens, spec)), spec)
        plan = with_tokens(spec, share_plan(spec, scores, kinds, {"attention": share, "mlp": share}), steps)
        kept = [
            [set(block.hidden or ()), set(block.tokens.kept), *map(set, block.qk), *map(set, block.v)]
            for block in plan.blocks()
        ]
        cost = cost_of(plan.child(spec))
        if before is not None:
            assert all(
                a <= b for less, more in zip(before[0], kept, strict=True) for a, b in zip(less, more, strict=True)
            )
            assert before[1].macs < cost.macs
            assert before[1].params < cost.params
        before = kept, cost
    assert plan.child(spec) == spec


class TestBudgets:
    def test_shares_are_kept_and_tokens_meet_the_budget(self):
        model = small("vit")
        result = found(model, "macs=0.55", attention=0.7, mlp=0.7, choice="free")
        spec = describe(model)
        child = result.plan.child(spec)
        assert sum(sum(b.mixer.v) for _, _, b in child.blocks()) == kept_count(3 * 48, 0.7)
        assert sum(b.hidden for _, _, b in child.blocks()) == kept_count(3 * 192, 0.7)
        tokens = [1.0 if b.tokens is None else len(b.tokens.kept) / 16 for _, _, b in child.blocks()]
        assert tokens == [record["tokens"] for record in result.trials]
        assert all(r["tokens_nominal"] <= r["tokens"] for r in result.trials)
        assert min(tokens) < 1
        assert [r["path"] for r in result.trials] == [path for path, _, _ in spec.blocks()]

    def test_tokens_are_kept_and_channels_meet_the_budget(self):
        model = small("vit")
        result = found(model, "macs=0.45", tokens=0.6, meet="realised", choice="free")
        assert 0.5 < sum(r["tokens"] for r in result.trials) / 3 <= 0.6
        assert all(block.hidden is None or len(block.hidden) for block in result.plan.blocks())

    @pytest.mark.parametrize(
        ("weights", "untouched"),
        [
            ({"attention_l1": 0, "mlp_l1": 0}, ("attention", "mlp")),
            ({"mlp_l1": 0, "token_l1": 0}, ("mlp", "tokens")),
            ({"attention_l1": 0, "token_l1": 0}, ("attention", "tokens")),
        ],
        ids=["tokens", "attention", "mlp"],
    )
    def test_searches_of_a_single_kind(self, weights, untouched):
        model = small("vit")
        budget = "macs=0.8" if "tokens" in untouched else "macs=0.75"
        result = found(model, budget, choice="free", **weights)
        for record in result.trials:
            assert all(record[kind] == 1 for kind in untouched)
        assert Budget.parse(budget).admits(cost_of(result.plan.child(describe(model))), cost_of(describe(model)))

    def test_shares_that_miss_the_budget_say_what_would_meet_it(self):
        model = small("vit")
        shares = {"attention": 0.7, "mlp": 0.7, "token_l1": 0, "choice": "free"}
        with pytest.raises(BudgetError, match=r"macs must be at least [\d,]+, what the shares .* keep, but is"):
            found(model, "macs=0.5", **shares)
        with pytest.raises(MethodError, match=r"must spend at least 98% of macs=0.9, but can spend no more than 8\d"):
            found(model, "macs=0.9", **shares)

    def test_a_share_of_channels_that_norms_tie_is_refused(self):
        model = adopted("vit", "scale_norms")
        with pytest.raises(MethodError, match="attention must be 1 for this model, whose norms tie its channels"):
            joint(attention=0.5, choice="free").decide(describe(model), moved(model), Budget.parse("macs=0.7"))

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"tokens": 0.5, "token_l1": 0}, r"tokens must be 1 where it is not searched, but is 0.5; set token_l1"),
            ({"mlp": 0.5, "mlp_l1": 0, "choice": "free"}, "mlp must be 1 where it is not searched"),
            ({"attention": 0.5}, "shares of channels need choice=free, but choice is even"),
            ({"tokens": 1.5}, "less than or equal to 1"),
            ({"consistency": "or"}, "suffix_or"),
        ],
        ids=["tokens", "mlp", "choice", "range", "rule"],
    )
    def test_bad_settings(self, settings, words):
        with pytest.raises(MethodError, match=words):
            joint(**settings)


class TestTraining:
    def test_every_gate_is_in_the_decaying_group_and_no_other_kind_exists(self):
        gated = vit_slim.gate_model(small("vit"), mlp=False, tokens=True)
        method = joint(mlp_l1=0)
        first, *rest = parameter_groups(gated, method.train, method._groups)
        wanted = {id(p) for name, p in gated.named_parameters() if not name.startswith("model.")}
        assert {id(p) for p in first["params"]} == wanted
        assert first["weight_decay"] == method.train.weight_decay
        assert not wanted & {id(p) for group in rest for p in group["params"]}
        assert not any("hidden" in name for name, _ in gated.named_parameters())

    @pytest.mark.parametrize("kind", ["attention", "mlp", "token"])
    def test_only_the_penalised_kind_falls(self, kind):
        gated = vit_slim.gate_model(small("vit"), tokens=True)
        weights = [0.05 * (kind == name) for name in ("attention", "mlp", "token")]
        settings = Train(epochs=6, batch=16, lr=1e-4, schedule="constant", distill={"kind": "none"}, clip=None)

        def sums():
            squashed = list(gated.squashed().values())
            lists = [[g for p, g in gated.gates.items() if p.endswith(end)] for end in ("/v", "/hidden")] + [squashed]
            return [float(torch.cat([g.detach().flatten() for g in gates]).abs().mean()) for gates in lists]

        data, before = digits(gated.model), sums()

        def groups(model):
            return [{"params": [*model.gates.values(), *model.tokens.values()], "lr": 0.02}]

        fit(gated, data.train, settings, input=data.input, seed=0, penalty=vit_slim.l1_penalty(*weights), groups=groups)
        fallen = [b - a for a, b in zip(sums(), before, strict=True)]
        place = ("attention", "mlp", "token").index(kind)
        assert fallen[place] > (0.003 if kind == "token" else 0.2)  # at the start the slope of tanh is 0.0099
        assert all(abs(fall) < 0.1 for i, fall in enumerate(fallen) if i != place)

    def test_the_hooks_of_a_search_are_gone_after_it(self):
        model = small("vit")
        result = found(model, "macs=0.6")
        child = surgery.apply(result.parent, result.plan)
        assert not any(m._forward_hooks for net in (result.parent, child) for m in net.modules())
        assert child(images(describe(child), dtype=torch.float32)).shape == (2, 10)


class TestPenalty:
    def gated(self):
        return vit_slim.gate_model(copy.deepcopy(small("vit")), tokens=True)

    def test_it_is_measured_by_the_curvature_of_the_divergence(self):
        """Against the Fisher information by its definition; the images of a batch do not count as one."""
        gated = self.gated()
        x = images(describe(gated.model), 6, torch.float32)
        gates = [*gated.gates.values(), *gated.tokens.values()]
        names = [*map(kind_of, gated.gates), *["token"] * len(gated.tokens)]
        squares, counts = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
        for one in x:
            logs = gated.eval()(one[None]).log_softmax(-1)[0]
            for log in logs:
                found = torch.autograd.grad(log, gates, retain_graph=True)
                for name, gradient in zip(names, found, strict=True):
                    squares[name] += float(log.detach().exp() * gradient.square().sum()) / len(x)
        for name, gate in zip(names, gates, strict=True):
            counts[name] += gate.numel()
        squares["token"] /= (1 - math.tanh(3) ** 2) ** 2
        batches = [(part, torch.full((len(part),), -1)) for part in x.split(3)]
        drawn = [curvatures(gated, batches, seed=seed) for seed in range(40)]
        for name, square in squares.items():
            mean = sum(each[name] for each in drawn) / len(drawn)
            assert mean == pytest.approx(square / counts[name], rel=0.4), name
        assert all(parameter.grad is None for parameter in gated.parameters())
        assert all(parameter.requires_grad for parameter in gated.parameters())

    def test_measured_weights_are_in_proportion_to_those_named(self):
        gated = self.gated()
        data = digits(gated.model)
        found = joint().weights(gated, data, 0)
        more = joint(attention_l1=1e-4, mlp_l1=0).weights(gated, data, 0)
        measured = curvatures(gated, eval_loader(data.calibration, data.input, batch=16), seed=0)
        assert found == {**{kind: PRESSURE * value for kind, value in measured.items()}, "width": 0.0}
        assert more == found | {"attention": 2 * found["attention"], "mlp": 0.0}

    def test_published_weights_are_taken_as_they_are(self):
        blind = dataclasses.replace(digits(small("vit")), calibration=None)
        method = joint(penalty="published")
        assert method.weights(self.gated(), blind, 0) == {
            "attention": 5e-5,
            "mlp": 1.25e-5,
            "token": 2.5e-5,
            "width": 0,
        }
        told = []
        method.search(small("vit"), blind, Budget.parse("macs=0.6"), seed=0, log=told.append)
        assert told[0] == {"stage": "gates", "event": "penalty"} | {
            "attention_l1": 5e-5, "mlp_l1": 1.25e-5, "token_l1": 2.5e-5, "width_l1": 0.0}  # fmt: skip

    def test_gates_without_a_gradient_cannot_be_measured(self):
        model = copy.deepcopy(small("vit"))
        torch.nn.init.zeros_(model.head.weight)
        with pytest.raises(MethodError, match=r"gates of attention must have gradients .* but all are zero"):
            found(model, "macs=0.6")


def test_all_seven_recipes_are_there():
    assert len(RECIPES) == 7


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_strict_and_published(path):
    recipe = read_recipe(path).resolved()
    method = recipe.found_method()
    assert recipe.method["name"] == "vit_slim"
    assert Budget.parse(recipe.budget).bounds()
    assert (method.train.epochs, method.train.lr, method.train.schedule) == (50, 5e-4, "constant")
    assert (method.penalty, method.attention_l1, method.mlp_l1) == ("published", 5e-5, 1.25e-5)
    assert method.export == "binarize"
    assert recipe.train.epochs == 300
    assert recipe.train.distill.kind == "none"
    text = path.read_text(encoding="utf-8")
    assert all(f"# {word}:" in text for word in ("Run", "Cost", "Expect"))
    assert "published" in text
    assert "measured" not in text


@pytest.mark.parametrize(
    "path", [p for p in RECIPES if "_js_" not in p.stem and "swin" not in p.stem], ids=lambda p: p.stem
)
def test_the_shares_of_a_recipe_spend_its_budget(path):
    """Random gates do: what the shares of channels keep does not depend on which."""
    from tests.test_vit_slim import NAMES, random_scores, spec_of

    recipe = read_recipe(path).resolved()
    method, budget = recipe.found_method(), Budget.parse(recipe.budget)
    size = next(size for size, name in NAMES.items() if recipe.model.name.startswith(name))
    spec = spec_of(size)
    plan = share_plan(spec, *random_scores(spec), {"attention": method.attention, "mlp": method.mlp})
    cost, parent = cost_of(plan.child(spec)), cost_of(spec)
    assert budget.admits(cost, parent)
    assert budget.spent(cost, parent) > 0.995
    assert plan != Plan.keep(spec)
