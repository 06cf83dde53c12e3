"""What is done if nothing is named: the default method, compensation, distillation, and how long it takes."""

import re
from types import SimpleNamespace

import pytest
import timm
import torch
from torch.utils.data import TensorDataset

from tests.test_pareto import noisy
from vitrim import cli, methods
from vitrim.cut.surgery import apply
from vitrim.run import cutting, defaults, pipeline
from vitrim.run import found as found_
from vitrim.run.defaults import METHOD, MINUTES, minutes_for
from vitrim.run.pipeline import compress
from vitrim.run.recipe import read_recipe
from vitrim.train import DISTILLED
from vitrim.words.errors import DataError, MethodError

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 4}
QUICK = {"measure": {"latency": False}, "verbose": False}
FEW = {"device": "cpu", "data": {"calibration": 24, "validation": 8}}


def tiny(classes=4):
    torch.manual_seed(0)
    return timm.create_model("test_vit", **(TINY | {"num_classes": classes}))


def images(count=48, plain=False):
    draw = torch.Generator().manual_seed(1)
    x = torch.rand(count, 3, 32, 32, generator=draw)
    return TensorDataset(torch.zeros_like(x) if plain else x, torch.arange(count) % 4)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class TestCompensation:
    @pytest.mark.parametrize("method", ["random", "taylor"])
    def test_a_cut_without_training_is_compensated(self, method):
        how = {"method": method, "budget": "macs=0.5", **QUICK}
        few = {"device": "cpu", "data": {"calibration": 64}}
        bare, auto, ridge = (
            compress(tiny(10), "digits", recover=each, recipe=few, **how) for each in ("none", "auto", "ridge")
        )
        assert auto.plan == bare.plan
        assert same(auto.model, ridge.model)
        assert same(bare.model, apply(bare.parent, bare.plan))
        gain = {"random": 50, "taylor": 2}[method]
        assert auto.measured["agreement"] > gain + bare.measured["agreement"]

    def test_what_does_not_come_nearer_is_left(self, capsys, monkeypatch):
        real = found_.recovered

        def worse(*given, **how):
            return {name: value + 9 * torch.randn_like(value) for name, value in real(*given, **how).items()}

        monkeypatch.setattr(found_, "recovered", worse)
        how = {"method": "magnitude", "budget": "macs=0.5", "recipe": FEW, "measure": {"latency": False}}
        auto = compress(tiny(), images(), **how)
        assert "does not bring its outputs nearer" in capsys.readouterr().err
        assert same(auto.model, apply(auto.parent, auto.plan))

    def test_not_before_training_and_not_what_a_method_made(self, tmp_path):
        still = {"batch": 16, "lr": 1e-12, "min_lr": 0.0, "weight_decay": 0.0, "augment": {"kind": "none"}}
        trained = compress(tiny(), images(), method="random", epochs=1, train=still, recipe=FEW, **QUICK)
        bare = apply(trained.parent, trained.plan)
        for name, value in trained.model.state_dict().items():
            assert torch.allclose(value, bare.state_dict()[name], atol=1e-6), name
        with pytest.raises(MethodError, match="makes its own"):
            compress(tiny(), images(), recover="ridge", recipe=FEW, budget="macs=0.6", **QUICK)

    def test_what_cannot_be_compensated_is_told_and_left(self, capsys):
        loud = {**QUICK, "verbose": True}
        found = compress(tiny(), method="magnitude", recipe={"device": "cpu"}, **loud)
        assert "there are no images, so the cut is not compensated" in capsys.readouterr().err
        assert same(found.model, apply(found.parent, found.plan))

    def test_a_budget_of_time_is_compensated_once(self, monkeypatch):
        timed, calls = [], []
        real = cutting.recovered_by
        monkeypatch.setattr(cutting, "recovered_by", lambda *how: (calls.append(1), real(*how))[1])

        def meet(parent, budget, search, cut, time_of, **how):
            found = search(budget)
            timed.append(cut(found))
            return SimpleNamespace(found=found, predicted=0.9, ratio=0.9, measured=1)

        monkeypatch.setattr(cutting, "meet", meet)
        few = {"device": "cpu", "data": {"calibration": 64}}
        more = {"recipe": few, "measure": {"seconds": 0.01}, "verbose": False}
        done = compress(tiny(10), "digits", method="random", budget="latency=0.9", **more)
        assert len(calls) == 1
        assert same(timed[0], apply(done.parent, done.plan))
        assert not same(done.model, timed[0])


class TestDefaultMethod:
    def test_minutes_are_for_small_budgets(self):
        assert METHOD in methods.names()
        assert [minutes_for(text) for text in ("macs=0.5", "macs=0.4,params=0.9", "macs=0.6", "macs=2.3G")] == [
            MINUTES, MINUTES, None, None,
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("more", "minutes"),
        [
            ([], MINUTES),
            (["--budget", "macs=0.7"], None),
            (["--minutes", "0"], None),
            (["--epochs", "2"], None),
            (["--epochs", "0"], None),
            (["--method", "taylor"], None),
            (["--set", "train.epochs=1"], None),
            (["--preset", "finetune"], None),
            (["--calibration", "known.safetensors"], None),
        ],
    )
    def test_what_the_command_line_asks_for(self, more, minutes, tmp_path, monkeypatch):
        asked = []

        def run(recipe, folder, **how):
            asked.append(recipe)
            raise MethodError("enough")

        monkeypatch.setattr(pipeline, "run", run)
        with pytest.raises(MethodError, match="enough"):
            cli.app(
                ["compress", "test_vit", "--data", "x", "--out", str(tmp_path / "run"), *more], standalone_mode=False
            )
        (recipe,) = asked
        assert recipe.method["name"] == ("taylor" if "taylor" in more else METHOD)
        assert recipe.recover == "auto"
        assert recipe.train.minutes == minutes
        if minutes:
            assert (recipe.train.lr, recipe.train.distill.alpha) == (DISTILLED["lr"], 1)

    def test_from_python_it_is_the_same(self, tmp_path, monkeypatch):
        folder = tmp_path / "images"
        noisy(folder / "train", 10)
        monkeypatch.setattr(defaults, "MINUTES", 0.003)
        found = compress(tiny(), str(folder), recipe=FEW, out=tmp_path / "run", **QUICK)
        recipe = read_recipe(tmp_path / "run" / "recipe.toml")
        assert (recipe.method["name"], recipe.train.minutes, recipe.train.distill.alpha) == (METHOD, 0.003, 1)
        assert found.measured["macs_ratio"] <= 0.5

    def test_few_images_are_enough(self, capsys):
        more = {"data": {"calibration": 24}, "device": "cpu"}
        found = compress(tiny(), images(40), budget="macs=0.6", recipe=more, measure={"latency": False})
        assert found.measured["macs_ratio"] <= 0.6
        error = capsys.readouterr().err
        assert "too few images to hold out the 80 that post_training asks for; a fifth is held out" in error
        assert "8 for validation" in error
        more = {"data": {"calibration": 24, "validation": 50}, "device": "cpu"}
        with pytest.raises(DataError, match="must leave images to train on, but takes 50 of 40"):
            compress(tiny(), images(40), budget="macs=0.6", recipe=more, **QUICK)

    def test_the_time_is_told_at_the_start(self, capsys):
        compress(
            tiny(), images(), method="taylor", budget="macs=0.6", recipe=FEW, measure={"seconds": 0.02}, verbose=True
        )
        lines = capsys.readouterr().err.splitlines()
        (line,) = [line for line in lines if line.startswith("this will take")]
        assert re.fullmatch(
            r"this will take about [\d.]+ s on this machine: search \d+ s, compensation \d+ s, measuring \d+ s", line
        )
        assert lines.index(line) < next(index for index, each in enumerate(lines) if each.startswith("searching"))


def test_the_forecast_counts_what_is_done(monkeypatch):
    monkeypatch.setattr(defaults, "_pass", lambda job: 0.01)
    told = []
    monkeypatch.setattr(
        pipeline, "forecast", lambda job, method: told.append(defaults.forecast(job, method)) or told[-1]
    )
    how = {"recipe": FEW, "measure": {"latency": False}, "verbose": False}
    with pytest.raises(MethodError, match="enough"):
        _stopped(
            monkeypatch,
            compress,
            tiny(),
            images(),
            method="magnitude",
            budget="macs=0.5",
            epochs=10,
            test=images(100),
            **how,
        )
    # 40 images 10 times, each a step of half the cost and a teacher's pass; then both models on 100 images.
    assert told == ["this will take about 12 s on this machine: search 0 s, training 10 s, measuring 2 s"]


def _stopped(monkeypatch, call, *arguments, **how):
    def stop(*_):
        raise MethodError("enough")

    monkeypatch.setattr(pipeline, "cut", stop)
    return call(*arguments, **how)
