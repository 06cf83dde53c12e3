"""MDC: what its scores find in planted networks, and that a policy behind masks is the policy that is cut."""

import copy
import dataclasses
import functools
import json

import numpy as np
import pytest
import torch
from torch import nn

from tests.samples import PRESETS, adopted, apart, images, timm_model
from tests.tolerance import EXACT
from vitrim import families, methods
from vitrim.cut.outputs import divergence
from vitrim.cut.surgery import apply
from vitrim.data import eval_loader
from vitrim.families import adopt, describe
from vitrim.methods.mdc.decode import Bounds, Frame, natural
from vitrim.methods.mdc.scores import Settings, greedy, order, score
from vitrim.methods.mdc.share import Chooser, Shared
from vitrim.methods.mdc.steps import too_costly
from vitrim.methods.mdc.study import open_study
from vitrim.testing import digits
from vitrim.train import evaluate
from vitrim.words.budget import Budget
from vitrim.words.costs import cost_of
from vitrim.words.errors import BudgetError, MethodError, RunError
from vitrim.words.spec import why_not_mixed
from vitrim.words.steps.top_k import TopK

WAYS = ("unbiased_median", "biased_multi")


def net(width=192, depth=4, heads=3, scale=4.0, **arguments):
    """A small random ViT whose outputs vary with its images."""
    torch.manual_seed(0)
    model = families.get("vit").example(embed_dim=width, depth=depth, num_heads=heads, **arguments)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (parameter.dim() > 1 and "blocks" in name) or name.startswith("head"):
                parameter.mul_(scale)
    return adopt(model).eval()


def batch(count=48, labels=10, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return [(torch.randn(count, 3, 32, 32, generator=draw), torch.arange(count) % labels)]


def plant_head(block, head, value=0.5):
    width = block.attn.v[0]
    rows = slice(block.attn.sizes[0] * 2 + head * width, block.attn.sizes[0] * 2 + (head + 1) * width)
    with torch.no_grad():
        block.attn.qkv.weight[rows] = 0
        block.attn.qkv.bias[rows] = value


def plant_neuron(block, neuron):
    with torch.no_grad():
        block.mlp.fc1.weight[neuron] = 0
        block.mlp.fc1.bias[neuron] = 1.0


@functools.cache
def planted(scale=4.0):
    model = net(scale=scale)
    for index in (1, 2):
        plant_head(model.blocks[index], 1)
        for neuron in (5, 100):
            plant_neuron(model.blocks[index], neuron)
    return model


class TestScores:
    @pytest.mark.parametrize("estimator", WAYS)
    def test_what_is_planted_goes_first(self, estimator):
        found = score(planted(), batch(), Settings(estimator=estimator)).ranking
        for index in (1, 2):
            assert found[f"stages.0.blocks.{index}.heads"].tolist()[-1] == 1
            assert set(found[f"stages.0.blocks.{index}.hidden"].tolist()[-2:]) == {5, 100}

    def test_the_published_mix_keeps_it_to_the_last(self):
        """A loud constant has no dependence and a large activation: nine parts of the score."""
        settings = Settings(neurons_by="released", estimator="biased_multi")
        found = score(planted(scale=1.5), batch(), settings).ranking
        for index in (1, 2):
            assert set(found[f"stages.0.blocks.{index}.hidden"].tolist()[:2]) == {5, 100}

    @pytest.mark.parametrize("heads_by", ["released", "greedy"])
    def test_a_copy(self, heads_by):
        """Greedy keeps one of two equal heads among the first H - 1; static scores cannot tell them apart."""
        model = net(width=96, depth=2, heads=4).double()
        block = model.blocks[0]
        with torch.no_grad():
            for part in range(3):
                start = part * 96
                block.attn.qkv.weight[start + 72 : start + 96] = block.attn.qkv.weight[start : start + 24]
                block.attn.qkv.bias[start + 72 : start + 96] = block.attn.qkv.bias[start : start + 24]
        data = [(x.double(), y) for x, y in batch()]
        found = score(model, data, Settings(heads_by=heads_by))
        path = "stages.0.blocks.0.heads"
        if heads_by == "greedy":
            assert len({0, 3} & set(found.ranking[path].tolist()[:3])) == 1
        else:
            values = found.values[path]
            assert float(values[0] - values[3]) == pytest.approx(0, abs=EXACT)

    def test_greedy_by_hand(self):
        alike = torch.eye(4, dtype=torch.float64)
        alike[:3, 3] = alike[3, :3] = torch.tensor([0.7, 0.6, 0.3], dtype=torch.float64)
        alike[0, 1] = alike[1, 0] = 1.0
        assert greedy(alike, torch.ones(3)).tolist() == [0, 2, 1]
        alike[2, 2] = 0
        assert greedy(alike, torch.ones(3)).tolist() == [0, 1, 2]

    def test_scores_by_hand(self):
        """Of one neuron, one head and the places, against the definitions on activations fetched here."""
        from vitrim.methods.mdc import hsic

        model = net(width=96, depth=2, heads=4).double()
        data = [(x.double(), y) for x, y in batch(8)]
        place = "stages.0.blocks.0"
        found = score(model, data, Settings(place=place))
        heard = {}
        block = model.blocks[0]
        handles = [
            block.mlp.tap.register_forward_hook(lambda m, i, o: heard.__setitem__("hidden", o)),
            block.attn.v_tap.register_forward_hook(lambda m, i, o: heard.__setitem__("v", o)),
            block.attn.proj.register_forward_pre_hook(lambda m, i: heard.__setitem__("mixed", i[0])),
        ]
        with torch.no_grad():
            g = hsic.linear(model(data[0][0]).softmax(dim=-1))
        for handle in handles:
            handle.remove()
        kernel = hsic.median_gaussian
        wanted = hsic.unbiased(kernel(heard["hidden"][:, :, 7]), g)
        assert float(found.values[f"{place}.hidden"][7] - wanted.clamp(min=0)) == pytest.approx(0, abs=1e-12)
        grams = [kernel(part.mean(dim=-1)) for part in heard["mixed"].split(24, dim=-1)]
        likeness = [float(hsic.cka(grams[0], other, "unbiased")) for other in grams[1:]]
        wanted = float(hsic.cka(grams[0], g, "unbiased")) - 0.1 * sum(likeness) / 3
        assert float(found.values[f"{place}.heads"][0]) == pytest.approx(wanted, abs=1e-9)
        by_place = torch.stack([hsic.unbiased(kernel(heard["v"][:, j]), g) for j in range(1, 17)])
        wanted = (by_place - by_place.min()) / (by_place.max() - by_place.min())
        assert torch.allclose(found.places, wanted, atol=1e-9)

    def test_batches_are_averaged(self):
        model = net(width=96, depth=1).double()
        first, second = ([(x.double(), y) for x, y in batch(8, seed=s)] for s in (1, 2))
        path = "stages.0.blocks.0.hidden"
        settings = Settings(neurons_by="hsic", estimator="biased_multi")
        apart_, together = ([score(model, data, settings).values[path] for data in (first, second)],
                            score(model, first + second, settings).values[path])  # fmt: skip
        assert torch.allclose(together, apart_[0] + apart_[1], atol=1e-12)

    def test_ties_go_by_energy_then_by_place(self):
        values, energy = torch.tensor([0.0, 0.0, 1.0, 0.0]), torch.tensor([1.0, 2.0, 0.0, 1.0])
        assert order(values, energy).tolist() == [2, 1, 0, 3]

    def test_half_of_the_image_that_nobody_needs(self):
        """Trained on labels of the left half, a head that sees nothing but the right half ranks last."""
        torch.manual_seed(0)
        draw = torch.Generator().manual_seed(0)
        y = torch.randint(2, (96,), generator=draw)
        x = 0.5 * torch.randn(96, 3, 32, 32, generator=draw)
        x[:, :, :, :16] += (2.0 * y - 1)[:, None, None, None]
        model = adopt(families.get("vit").example(depth=1, num_heads=2, embed_dim=32, num_classes=2))
        half = torch.arange(16) % 4 < 2
        blind = torch.cat([torch.tensor([True]), half])[None, :, None]

        def only_right(module, given, out):
            return torch.cat([out[..., :16], out[..., 16:].masked_fill(blind, 0.0)], dim=-1)

        handle = model.blocks[0].attn.v_tap.register_forward_hook(only_right)
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(40):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        assert float((model(x).argmax(1) == y).float().mean()) > 0.95
        found = score(model.eval(), [(x, y)], Settings())
        handle.remove()
        values = found.values["stages.0.blocks.0.heads"]
        assert found.ranking["stages.0.blocks.0.heads"].tolist() == [0, 1]
        assert float(values[0]) > 2 * float(values[1])

    def test_what_cannot_be_scored(self):
        model = net(width=48, depth=1)
        with pytest.raises(MethodError, match="at least 4 images, but got 3"):
            score(model, batch(3), Settings())
        with pytest.raises(MethodError, match="but got none"):
            score(model, [], Settings())
        with pytest.raises(MethodError, match="two classes at least"):
            score(model, batch(8, labels=1), Settings(target="labels"))
        with pytest.raises(MethodError, match="some are missing"):
            score(model, [(batch(8)[0][0], torch.full((8,), -1))], Settings(target="labels"))
        broken = copy.deepcopy(model)
        with torch.no_grad():
            broken.head.bias[0] = torch.nan
        with pytest.raises(MethodError, match="outputs must be finite"):
            score(broken, batch(8), Settings())

    def test_identical_predictions_rank_nothing(self):
        """A batch of them adds nothing; if there is no other, that is said."""
        model = net(width=48, depth=1)
        same = (batch(1)[0][0].expand(8, -1, -1, -1), torch.zeros(8).long())
        path, settings = "stages.0.blocks.0.hidden", Settings()
        alone, both = score(model, batch(8), settings), score(model, [same, *batch(8)], settings)
        assert torch.allclose(both.values[path], alone.values[path], atol=1e-9)
        with torch.no_grad():
            model.head.weight.zero_()
        with pytest.raises(MethodError, match="outputs must vary from image to image"):
            score(model, batch(8), settings)


@pytest.mark.parametrize(("family", "preset"), PRESETS)
def test_masked_is_cut(family, preset):
    """Masks and token steps on the dense model give what the cut one gives, at random policies."""
    model = adopted(family, preset)
    spec = describe(model)
    tokens = 0.6 if why_not_mixed(spec.stages[0]) is None else 0.0
    frame = Frame(spec, natural(spec), Budget.parse("macs=1"), Bounds(heads=0.7, neurons=0.9, tokens=tokens))
    chooser = Chooser(frame)
    x = images(spec)
    for policy in np.random.default_rng(0).random((3, len(frame.space.names))) * frame.space.upper:
        child = apply(model, chooser.plan(policy))
        with torch.no_grad():
            with chooser.chosen(model, policy):
                masked = model(x)
            assert apart(child(x), masked) < EXACT
            assert apart(torch.cat([child(x[:1]), child(x[1:])]), child(x)) < EXACT
    assert not any(block.step for block in model.blocks) if family == "vit" else True


def test_nothing_is_identity():
    model = adopted("vit", "plain")
    spec = describe(model)
    chooser = Chooser(Frame(spec, natural(spec), Budget.parse("macs=1"), Bounds(heads=0.5, neurons=0.5, tokens=0.5)))
    whole = np.zeros(len(chooser.frame.space.names))
    assert chooser.plan(whole).child(spec) == spec
    with torch.no_grad(), chooser.chosen(model, whole):
        masked = model(images(spec))
    with torch.no_grad():
        assert torch.equal(masked, model(images(spec)))


def small():
    return adopt(timm_model("vit", "plain", torch.float32))


QUICK = {"trials": 5, "initial": 3}


class TestMethod:
    def search(self, model=None, budget="macs=0.7", folder=None, data=None, **settings):
        model = small() if model is None else model
        method = methods.get("mdc", QUICK | settings)
        data = digits(model) if data is None else data
        return method.search(model, data, Budget.parse(budget), seed=0, teacher=model, folder=folder)

    def test_the_best_measured_is_what_is_cut(self):
        model = small()
        found = self.search(model, measure="agreement")
        best = next(trial for trial in found.trials if trial["best"])
        assert best["score"] == max(trial["score"] for trial in found.trials)
        child = apply(found.parent, found.plan)
        assert (cost_of(describe(child)).macs, cost_of(describe(child)).params) == (best["macs"], best["params"])
        data = digits(model)
        again = evaluate(child, eval_loader(data.validation, data.input), reference=model)
        assert again.agreement == pytest.approx(best["score"], abs=1e-9)

    @pytest.mark.parametrize("heads_by", ["released", "greedy"])
    @pytest.mark.parametrize("proposal", ["random", "even"])
    def test_controls(self, heads_by, proposal):
        settings = {"heads_by": heads_by, "tokens_by": "hsic_attn", "tokens": 0.8, "heads": 0.3, "neurons": 0.2}
        found = self.search(proposal=proposal, measure="loss", **settings)
        steps = [block.tokens for block in found.plan.blocks() if block.tokens is not None]
        assert [step.by for step in steps] == ["hsic_attn"] + ["cls_attn"] * (len(steps) - 1)
        assert len(steps[0].weights) == 16

    @pytest.mark.parametrize(("alone", "field"), [("heads", "v"), ("neurons", "hidden"), ("tokens", "tokens")])
    def test_each_dimension_alone(self, alone, field):
        bounds = {"heads": 0.0, "neurons": 0.0, "tokens": 0.0} | {alone: 0.8}
        spec = describe(small())
        frame = Frame(spec, natural(spec), Budget.parse("macs=1"), Bounds(**bounds))
        # So few heads and tokens leave gaps between costs: a budget that some policy meets.
        macs = int(frame.costs(np.full((1, len(frame.space.names)), 0.4)).macs[0])
        found = self.search(budget=f"macs={macs}", **bounds)
        for name in ("v", "hidden", "tokens"):
            cut = any(getattr(block, name) is not None for block in found.plan.blocks())
            assert cut == (name == field)

    def test_a_budget_that_leaves_everything(self):
        found = self.search(budget="macs=1.0")
        assert found.plan.child(describe(small())) == describe(small())

    def test_the_study_lies_in_the_folder_and_is_refused_to_others(self, tmp_path):
        first = self.search(folder=tmp_path)
        assert (tmp_path / "trials.db").is_file()
        again = self.search(folder=tmp_path)
        assert again.plan == first.plan
        assert [t["score"] for t in again.trials] == [t["score"] for t in first.trials]
        other = small()
        with torch.no_grad():
            other.head.bias.add_(1)
        with pytest.raises(RunError, match="of the same model"):
            self.search(other, folder=tmp_path)
        with pytest.raises(RunError, match="of the same space"):
            self.search(folder=tmp_path, heads=0.4)
        longer = self.search(folder=tmp_path, trials=6)
        assert [t["score"] for t in longer.trials[:5]] == [t["score"] for t in first.trials]

    def test_shared_weights_move_and_the_parent_does_not(self):
        model = small()
        train = {"epochs": 0.5, "batch": 16, "lr": 1e-3, "augment": {"kind": "none"}}
        before = {name: value.clone() for name, value in model.state_dict().items()}
        found = self.search(model, train=train)
        moved = [name for name, value in found.parent.state_dict().items() if not torch.equal(value, before[name])]
        assert len(moved) > len(before) / 2
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert list(found.parent.state_dict()) == list(before)

    def test_each_step_shares_its_own_policy(self):
        model = small()
        spec = describe(model)
        frame = Frame(spec, natural(spec), Budget.parse("macs=0.7"), Bounds(heads=0.5, neurons=0.5, tokens=0.5))
        shared = Shared(model, Chooser(frame), 0)
        x = images(spec, 2, torch.float32)
        with torch.no_grad():
            first, same = shared(x), shared(x)
            shared.taken(shared, 0)
            second = shared(x)
        assert torch.equal(first, same)
        assert not torch.equal(first, second)

    def test_bad_requests(self):
        model = small()
        data = digits(model)
        few = dataclasses.replace(data, calibration=data.calibration.pick(range(3)))
        with pytest.raises(MethodError, match="at least 4 images, but got 3"):
            self.search(model, data=few)
        with pytest.raises(BudgetError, match=r"budget of macs must be at least [\d,]+ for this model"):
            self.search(budget="macs=0.05")
        with pytest.raises(MethodError, match="held-out training images, but there are none"):
            self.search(model, data=dataclasses.replace(data, validation=None))
        with pytest.raises(MethodError, match="without training images"):
            self.search(model, data=dataclasses.replace(data, train=None), train={"epochs": 1})
        with pytest.raises(MethodError, match="heads, neurons or tokens must be above 0"):
            methods.get("mdc", {"heads": 0, "neurons": 0, "tokens": 0})
        swin = adopt(timm_model("swin", next(p for f, p in PRESETS if f == "swin"), torch.float32))
        with pytest.raises(MethodError, match="tokens must be 0 for this model"):
            self.search(swin, tokens=0.5)
        chosen = apply(model, self.search(model, tokens=0.8, heads=0, neurons=0.2).plan)
        with pytest.raises(MethodError, match="for a model whose tokens are cut already"):
            self.search(chosen, tokens=0.5)
        with pytest.raises(MethodError, match="must be of the model's 12 blocks"):
            self.search(preset="deit_small_60")

    def test_a_model_that_was_cut_before(self):
        model = small()
        once = apply(model, self.search(model, tokens=0).plan)
        twice = self.search(once, budget="macs=0.8", tokens=0)
        assert Budget.parse("macs=0.8").admits(cost_of(twice.plan.child(describe(once))), cost_of(describe(once)))

    def test_one_head_and_odd_sizes(self):
        torch.manual_seed(0)
        model = adopt(families.get("vit").example(num_heads=1, mlp_ratio=2.56, img_size=48))
        found = self.search(model, budget="macs=0.8")
        assert all(block.v is None for block in found.plan.blocks())
        assert len(found.plan.blocks()[0].hidden or range(122)) <= 122

    def test_no_class_token(self):
        model = adopt(timm_model("vit", "average", torch.float32))
        found = self.search(model, heads=0, tokens=0.9, budget="macs=0.6")
        assert any(isinstance(block.tokens, TopK) for block in found.plan.blocks())

    def test_unlabelled_images_are_compared_by_the_divergence_from_the_dense_output(self):
        model = small()
        data = digits(model)
        blind = dataclasses.replace(data, validation=Unlabelled(data.validation))
        found = self.search(model, data=blind)
        assert {trial["measure"] for trial in found.trials} == {"divergence"}
        x = torch.cat([x for x, _ in eval_loader(data.validation, data.input)])
        child = apply(found.parent, found.plan)
        with torch.no_grad():
            away = divergence(model.eval()(x), child.eval()(x))
        assert max(trial["score"] for trial in found.trials) == pytest.approx(-away, rel=1e-4)
        agreeing = self.search(model, data=blind, measure="auto")
        assert {trial["measure"] for trial in agreeing.trials} == {"agreement"}
        with pytest.raises(MethodError, match="measure=top1 must have labels"):
            self.search(model, data=blind, measure="top1")

    def test_by_default_the_least_loss_wins(self):
        model = small()
        data = digits(model)
        found = self.search(model, data=data)
        best = next(trial for trial in found.trials if trial["best"])
        child = apply(found.parent, found.plan)
        again = evaluate(child, eval_loader(data.validation, data.input))
        assert best["measure"] == "loss"
        assert best["score"] == max(trial["score"] for trial in found.trials) == pytest.approx(-again.loss, rel=1e-5)


class TestSteps:
    """Which heads are too costly, on losses that are known."""

    FIRST, SECOND, THIRD = (f"stages.0.blocks.{index}.heads" for index in range(3))

    def frame(self, macs=0.8, fixed=(), **bounds):
        spec = describe(small())
        bounds = Bounds(**{"heads": 0.5, "neurons": 0.8, "tokens": 0.0} | bounds)
        return Frame(spec, natural(spec), Budget.parse(f"macs={macs}"), bounds, fixed=fixed)

    def loses(self, frame, heads, seen=None):
        """Return a loss of a nat for each multiply-accumulate that neurons save, and `heads` for those of heads."""

        def of(policy):
            total, none = 0.0, np.zeros((1, len(policy)))
            for column in np.flatnonzero(policy):
                alone = none.copy()
                alone[0, column] = policy[column]
                saved = int(frame.costs(none).macs[0]) - int(frame.costs(alone).macs[0])
                total += heads.get(frame.space.names[column], 1.0) * saved
            if seen is not None:
                seen.append(policy)
            return total

        return of

    def test_a_head_is_too_costly_if_it_loses_more_than_the_neurons_that_it_saves(self):
        frame, seen = self.frame(), []
        loses = self.loses(frame, {self.FIRST: 0.8, self.SECOND: 1.2, self.THIRD: 8.0}, seen)
        assert too_costly(frame, loses) == [self.SECOND, self.THIRD]
        assert len(seen) == 4
        spent = frame.space.spent(np.array(seen))
        assert float(spent.max()) <= 1
        assert float(spent.min()) > 0.99

    def test_heads_that_the_budget_needs_are_kept(self):
        frame = self.frame(0.85, neurons=0.1)
        assert too_costly(frame, self.loses(frame, dict.fromkeys((self.FIRST, self.SECOND, self.THIRD), 99.0))) == []
        assert too_costly(self.frame(heads=0.0), self.loses(frame, {})) == []

    def test_what_is_too_costly_is_not_searched(self):
        made = self.frame(fixed=[self.FIRST, self.THIRD])
        assert [name for name in made.space.names if name.endswith("heads")] == [self.SECOND]
        heads, _ = zip(*made.counts(made.space.upper[None])[0], strict=True)
        assert [int(count[0]) for count in heads] == [3, 2, 3]

    def test_the_search_keeps_it_in_its_study(self, tmp_path):
        TestMethod().search(folder=tmp_path, trials=2, initial=2)
        study = open_study(f"sqlite:///{tmp_path / 'trials.db'}", "mdc", {})
        costly = set(study.user_attrs["costly"])
        searched = {name for name in study.trials[0].params if name.endswith("heads")}
        assert costly
        assert costly | searched == {self.FIRST, self.SECOND, self.THIRD}
        assert not costly & searched


class Unlabelled(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index][0], -1


def test_dashboards_can_read_what_is_kept(tmp_path):
    import optuna

    TestMethod().search(folder=tmp_path)
    study = optuna.load_study(study_name="mdc", storage=f"sqlite:///{tmp_path / 'trials.db'}")
    assert "stages.0.blocks.0.hidden" in study.best_trial.params
    assert {"macs", "params", "heads", "neurons", "tokens"} <= set(study.best_trial.user_attrs)
    assert json.loads(study.user_attrs["space"])["budget"] == "macs=0.7"
    assert len(study.user_attrs["ranking.stages.0.blocks.0.hidden"]) == 192
