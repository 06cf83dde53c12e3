"""Settings say what they do: a key that is named changes that key alone, at every depth and wherever it is named."""

import copy
import dataclasses
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

import vitrim
from tests.samples import PRESETS, adopted, digits, timm_model, without_data
from vitrim import methods
from vitrim.cut.shares import check_shares, kept_count, share_plan
from vitrim.families import adopt, describe
from vitrim.methods import vit_slim
from vitrim.methods.spvit.paths import Paths
from vitrim.methods.spvit.search import SinglePath
from vitrim.run import shipped
from vitrim.run.found import check_budget
from vitrim.run.presets import laid_under, preset, remark
from vitrim.run.recipe import DataRecipe, Measure, ModelRecipe, Recipe, merged, overrides
from vitrim.run.transfer.recipe import TransferRecipe
from vitrim.testing import SHORT
from vitrim.train import DISTILLED, RATES, Distill, Train
from vitrim.train.optim import learning_rate, optimizer
from vitrim.words.budget import Budget
from vitrim.words.costs import cost_of
from vitrim.words.errors import BudgetError, MethodError, RecipeError
from vitrim.words.plain import NONE, Node, dump, load, read_toml
from vitrim.words.plan import BlockPlan, Plan

LAWS = settings(deadline=None, database=None, max_examples=40)
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
METHODS = methods.names()
TRAINING = [name for name in METHODS if "train" in methods.settings_of(name).model_fields]

OTHER = dump(
    Train(
        epochs=7, minutes=3, batch=48, accumulate=2, lr=3e-4, lr_batch=32, weight_decay=0.02, betas=(0.8, 0.99),
        warmup_epochs=0.5, warmup_lr=1e-7, min_lr=2e-7, schedule="poly", power=0.7, clip=2.0, mixup=0.3, cutmix=0.4,
        smoothing=0.05, ema=0.9, precision="bf16", tf32=False, compile=True,
        channels_last=True, checkpointing=True, drop_path=0.2, workers=1, checkpoint_every=5, keep=2, log_every=3,
        augment={"kind": "none", "hflip": 0.25, "shift": 0.1, "rotate": 3, "scale": 0.5, "auto": "", "jitter": 0.1,
                 "erase": 0.1, "repeats": 2},
        distill={"kind": "token", "alpha": 0.7, "temperature": 3},
    )
)  # fmt: skip
"""A valid training of which no value is any method's default."""


def leaves(table: Mapping[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every path to a value of nested tables, with the value."""
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, (*at, key))
        else:
            yield (*at, key), value


def nested(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """``{"a": {"b": value}}`` for the path ``("a", "b")``."""
    for key in reversed(path):
        value = {key: value}
    return value


def together(pairs: list[tuple[tuple[str, ...], Any]]) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    for path, value in pairs:
        whole = merged(whole, nested(path, value))
    return whole


def recipe(**changes: Any) -> Recipe:
    asked = {"model": {"name": "test_vit"}, "method": {"name": "taylor"}, "budget": "macs=0.5"} | changes
    return load(Recipe, asked, RecipeError, at="recipe")


class TestOneKey:
    """Naming a key leaves all others as they were."""

    @pytest.mark.parametrize("name", METHODS)
    def test_a_key_named_with_its_default_changes_nothing(self, name):
        default = methods.get(name)
        for path, value in leaves(dump(default)):
            assert methods.get(name, nested(path, value)) == default, path
            if value is None:
                assert methods.get(name, nested(path, NONE)) == default, path

    @pytest.mark.parametrize("name", TRAINING)
    def test_no_value_of_the_other_training_is_a_default(self, name):
        theirs = dict(leaves(dump(methods.get(name))["train"]))
        assert [path for path, value in leaves(OTHER) if theirs[path] == value] == []

    @pytest.mark.parametrize("name", TRAINING)
    @given(st.data())
    @LAWS
    def test_named_keys_change_and_no_others(self, name, data):
        named = data.draw(st.lists(st.sampled_from(list(leaves(OTHER))), unique_by=lambda pair: pair[0]))
        over = {"train": together(named)}
        default = methods.get(name)
        assert dump(methods.get(name, over)) == merged(dump(default), over)

    @given(st.data())
    @LAWS
    def test_of_a_recipe_too(self, data):
        named = data.draw(st.lists(st.sampled_from(list(leaves(OTHER))), unique_by=lambda pair: pair[0]))
        over = together(named)
        assert dump(recipe(train=over).train) == merged(dump(Train(epochs=0)), over)

    def test_published_defaults_survive_a_named_epoch(self):
        slim = methods.get("vit_slim", {"train": {"epochs": 50}})
        assert slim == methods.get("vit_slim")
        train = methods.get("vit_slim", {"train": {"epochs": 3, "distill": {"alpha": 0.3}}}).train
        assert (train.epochs, train.batch, train.schedule, train.clip, train.mixup) == (3, 1024, "constant", None, 0.8)
        assert train.distill == Distill(kind="none", alpha=0.3)

    def test_the_command_line_lays_over_defaults_as_well(self):
        pairs = ["method.train.augment.hflip=0.5", "method.train.clip=none", "train.lr=1e-3", "measure.batch=2"]
        found = recipe(**merged({"method": {"name": "vit_slim"}}, overrides(pairs))).resolved()
        train = found.found_method().train
        default = methods.get("vit_slim").train
        assert train == default.model_copy(
            update={"clip": None, "augment": default.augment.model_copy(update={"hflip": 0.5})}
        )
        assert found.train == Train(epochs=0, lr=1e-3)
        assert found.measure == Measure(batch=2)

    def test_a_transfer_keeps_its_own_defaults(self):
        asked = {"model": {"name": "test_vit"}, "data": {"train": "scenes"}, "train": {"epochs": 2}}
        train = load(TransferRecipe, asked).train
        assert (train.epochs, train.batch, train.lr, train.schedule) == (2, 16, 2e-4, "poly")

    def test_values_may_be_none_and_nodes(self):
        assert methods.get("cait", {"train": {"clip": None}}).train.clip is None
        assert methods.get("vit_slim", {"train": {"clip": 1.0}}).train.clip == 1.0
        given_whole = methods.get("vit_slim", {"train": Train(epochs=2)})
        assert given_whole.train == Train(epochs=2)
        inside = methods.get("vit_slim", {"train": {"distill": Distill(kind="hard")}})
        assert inside.train == methods.get("vit_slim").train.model_copy(update={"distill": Distill(kind="hard")})
        assert recipe(teacher={"name": "a", "weights": "b"}).teacher == ModelRecipe(name="a", weights="b")
        assert recipe(teacher="none").teacher is None

    def test_wrong_keys_are_refused_at_every_depth(self):
        for over, told in (
            ({"train": {"epoch": 1}}, r"method.vit_slim.train: Train has no field 'epoch'; did you mean 'epochs'"),
            ({"train": {"distill": {"alfa": 1}}}, r"method.vit_slim.train.distill: Distill has no field 'alfa'"),
            ({"train": {"augment": {"kind": "ful"}}}, r"method.vit_slim.train.augment.kind: .* got 'ful'"),
            ({"train": 3}, r"method.vit_slim.train: this must be a table"),
            ({"train": None}, r"method.vit_slim.train: this must be a table"),
            ({"train": {"batch": 3}}, r"batch must be even for mixup and cutmix, but is 3"),
        ):
            with pytest.raises(MethodError, match=told):
                methods.get("vit_slim", over)


class TestWhole:
    """What was dumped reads as itself."""

    @pytest.mark.parametrize("name", METHODS)
    def test_dumped_methods(self, name):
        found = methods.get(name)
        assert load(type(found), dump(found)) == found
        assert type(found).model_validate(found.model_dump()) == found
        assert type(found).model_validate_json(found.model_dump_json()) == found

    @pytest.mark.parametrize("name", TRAINING)
    @given(st.data())
    @LAWS
    def test_dumped_methods_whatever_was_named(self, name, data):
        named = data.draw(st.lists(st.sampled_from(list(leaves(OTHER))), unique_by=lambda pair: pair[0]))
        found = methods.get(name, {"train": together(named)})
        assert methods.get(name, dump(found)) == found

    def test_dumped_recipes(self):
        for kind in (DataRecipe, Measure, Train):
            assert load(kind, dump(kind())) == kind()
        found = recipe(method={"name": "spvit", "train": {"epochs": 2}}, train={"clip": "none"}).resolved()
        assert load(Recipe, dump(found)).resolved() == found


class Round(Node):
    kind: Literal["round"] = "round"
    radius: float = 1.0
    rim: float | None = 0.1


class Square(Node):
    kind: Literal["square"] = "square"
    side: float = 1.0
    rim: float | None = 0.2


class Plate(Node):
    shape: Annotated[Round | Square, Field(discriminator="kind")] = Round(radius=5.0)
    maybe: Square | None = Square(side=7.0)
    free: dict[str, Any] = {"a": 1}  # noqa: RUF012 pydantic copies defaults
    stack: tuple[Square, ...] = (Square(side=2.0),)


class Table(Node):
    plate: Plate = Plate(shape=Square(side=3.0, rim=None), maybe=Square(side=8.0))


class TestUnions:
    """Kinds of a union are told apart before anything is laid over."""

    def test_the_same_kind_is_laid_over(self):
        assert Plate(shape={"rim": 0.5}).shape == Round(radius=5.0, rim=0.5)
        assert Plate(shape={"kind": "round", "rim": 0.5}).shape == Round(radius=5.0, rim=0.5)

    def test_another_kind_is_taken_by_itself(self):
        assert Plate(shape={"kind": "square"}).shape == Square()
        assert Table(plate={"shape": {"kind": "round"}}).plate == Plate(maybe=Square(side=8.0))
        assert Table(plate={"maybe": {"kind": "square", "rim": 1}}).plate.maybe == Square(side=8.0, rim=1.0)

    def test_the_outermost_default_counts(self):
        assert Table(plate={"shape": {"side": 4.0}}).plate == Plate(
            shape=Square(side=4.0, rim=None), maybe=Square(side=8.0)
        )
        assert Table(plate={"maybe": {"rim": "none"}}).plate.maybe == Square(side=8.0, rim=None)

    def test_none_is_none(self):
        assert Plate(maybe=None).maybe is None
        assert Plate(maybe="none").maybe is None
        assert Plate(shape={"rim": None}).shape == Round(radius=5.0, rim=None)

    def test_free_tables_and_lists_are_not_merged(self):
        assert Plate(free={"b": 2}).free == {"b": 2}
        assert Plate(stack=[{"rim": 0.5}]).stack == (Square(rim=0.5),)

    def test_wrong_kinds_and_keys_are_refused(self):
        with pytest.raises(RecipeError, match=r"\$\.shape: "):
            load(Plate, {"shape": {"kind": "oval"}})
        with pytest.raises(RecipeError, match=r"\$\.shape: Round has no field 'side'"):
            load(Plate, {"shape": {"side": 1}})

    @given(
        st.builds(
            Table,
            plate=st.builds(
                Plate,
                shape=st.builds(Round, radius=st.floats(0, 9)) | st.builds(Square, side=st.floats(0, 9)),
                maybe=st.none() | st.builds(Square, rim=st.none() | st.floats(0, 1)),
                free=st.dictionaries(st.text(), st.none() | st.integers()),
            ),
        )
    )
    @LAWS
    def test_whole_dumps_read_as_themselves(self, table):
        assert load(Table, dump(table)) == table
        assert Table.model_validate(table.model_dump()) == table


class TestRates:
    """The rate by the batch, and one cycle for search and child."""

    def test_the_rate_follows_the_batch_where_it_is_asked_to(self):
        assert Train(lr=1e-3, batch=128).rate == 1e-3
        assert Train(lr=1e-3, batch=128, lr_batch=512).rate == pytest.approx(2.5e-4)
        with pytest.raises(ValueError, match=r"min_lr must be at most lr 2e-06"):
            Train(lr=1e-3, batch=2, lr_batch=1000, min_lr=1e-5)

    @given(lr=st.floats(1e-5, 1.0), batch=st.integers(1, 4096), lr_batch=st.integers(1, 4096), step=st.integers(0, 99))
    @LAWS
    def test_a_scaled_rate_is_that_rate_everywhere(self, lr, batch, lr_batch, step):
        scaled = Train(lr=lr, batch=batch, lr_batch=lr_batch, min_lr=0, warmup_lr=0)
        plain = scaled.model_copy(update={"lr": lr * batch / lr_batch, "lr_batch": None})
        assert learning_rate(step, 100, 10, scaled) == learning_rate(step, 100, 10, plain)
        model, gate = torch.nn.Linear(2, 2), torch.nn.Linear(1, 1)
        model.gate = gate

        def groups(_):
            return [{"params": gate.parameters(), "lr": 0.5}]

        made = [optimizer(model, each, groups).param_groups for each in (scaled, plain)]
        assert [group["lr"] for group in made[0]] == [group["lr"] for group in made[1]]
        assert [group["share"] for group in made[0]] == [group["share"] for group in made[1]]
        assert made[0][0]["lr"] == 0.5

    def test_what_a_child_is_not_told_is_its_searches(self):
        search = {"lr": 3e-4, "lr_batch": 64, "batch": 32, "warmup_epochs": 0.5, "min_lr": 1e-7}
        found = recipe(method={"name": "cait", "train": search}, train={"epochs": 2, "clip": 2.0}).resolved()
        theirs = found.found_method().train
        assert {name: getattr(found.train, name) for name in RATES} == {name: getattr(theirs, name) for name in RATES}
        assert (found.train.epochs, found.train.clip, found.train.lr) == (2, 2.0, 3e-4)
        assert load(Recipe, dump(found)).resolved() == found
        assert recipe(method={"name": "vit_slim"}, train={"epochs": 2}).train == Train(epochs=2)

    @pytest.mark.parametrize("name", RATES)
    def test_another_value_is_refused(self, name):
        told = (
            rf"train.{name} must be .* as in method.train, because cait continues .* but is .*; leave train.{name} out"
        )
        value = dump(
            Train(lr_batch=8, batch=8, schedule="constant", power=0.5, warmup_epochs=0.25, min_lr=1e-8, lr=0.1)
        )[name]
        with pytest.raises(RecipeError, match=told):
            recipe(method={"name": "cait"}, train={"epochs": 2, name: value}).resolved()
        recipe(method={"name": "cait", "train": {name: value}}, train={"epochs": 2, name: value}).resolved()
        recipe(method={"name": "cait"}, train={"epochs": 0, name: value}).resolved()
        alone = recipe(method={"name": "cait", "cut": 1.0}, train={"epochs": 2, name: value}).resolved()
        assert getattr(alone.train, name) == value

    def test_whole_trainings_are_compared_too(self):
        with pytest.raises(RecipeError, match=r"train.lr must be 0.0002 as in method.train"):
            recipe(method={"name": "cait"}, train=Train(epochs=2)).resolved()

    def test_the_rate_goes_on_where_the_search_stopped(self):
        """The documented command: 18 epochs of search, 12 of the child, of 100 steps each."""
        found = recipe(method={"name": "cait", "train": {"epochs": 18}}, train={"epochs": 12}).resolved()
        search, child = found.found_method().train, found.train
        warmup = round(100 * search.warmup_epochs)
        rates = [learning_rate(step, 3000, warmup, search if step < 1800 else child) for step in range(3000)]
        jumps = np.abs(np.diff(rates[warmup:]))
        assert jumps.max() < 2 * np.pi / 3000 * search.rate
        assert rates[1800] > 0.3 * search.rate


class TestHeldOut:
    """Images are held out where a method asks for some, and what is held out is looked at."""

    @pytest.mark.parametrize("name", METHODS)
    def test_only_methods_that_compare_hold_images_out(self, name):
        wanted = {"mdc": 0.1, "post_training": 80}
        assert recipe(method={"name": name}).resolved().data.validation == wanted.get(name, 0)
        assert recipe(method={"name": name}, data={"validation": 5}).resolved().data.validation == 5
        assert recipe(method={"name": name}, data={"validation": "none"}).resolved().data.validation == wanted.get(
            name, 0
        )

    def test_a_method_that_searches_nothing_holds_none_out(self):
        for method in (
            {"name": "mdc", "preset": "deit_small_60"},
            {"name": "mdc", "proposal": "even"},
            {"name": "post_training", "calibration": "file"},
        ):
            assert recipe(method=method).resolved().data.validation == 0
        assert recipe(method={"name": "post_training", "probe": 7}).resolved().data.validation == 7

    def test_all_published_recipes_train_on_all_images(self):
        for name in shipped.names("recipes"):
            written = read_toml(shipped.path_of("recipes", name))
            if written.get("task") == "segmentation":
                continue
            found = load(Recipe, written).resolved()
            asks = found.method["name"] in ("mdc", "post_training") and not found.method.get("preset")
            assert bool(found.data.validation) == asks, name

    @pytest.mark.parametrize("held", [0, 80])
    def test_accuracy_of_each_epoch_is_logged_and_drawn(self, held, tmp_path):
        model = timm.create_model("test_vit", **TINY)
        vitrim.compress(
            model, "digits", method="random", budget="macs=0.7", epochs=2, train={"batch": 128, "warmup_epochs": 0},
            measure={"latency": False}, recipe={"data": {"validation": held}, "device": "cpu"}, out=tmp_path / "run",
        )  # fmt: skip
        log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
        epochs = [line for line in log if line["event"] == "epoch"]
        assert len(epochs) == 2
        assert all(("top1" in line) == bool(held) for line in epochs)
        assert all(0 <= line["top1"] <= 100 for line in epochs if held)
        assert epochs[-1]["step"] == 2 * ((1347 - held) // 128)  # 1,347 training digits
        page = (tmp_path / "run" / "report.html").read_text()
        assert ("top-1 in percent, train" in page) == bool(held)

    @pytest.mark.parametrize("name", ["vit_slim", "spvit", "cait"])
    def test_searches_that_train_look_at_them_too(self, name):
        model = adopt(timm_model("vit", "plain", torch.float32))
        records: list[Mapping[str, Any]] = []
        method = methods.get(name, {"train": {**SHORT, "epochs": 2, "batch": 32}})
        method.search(model, digits(model), Budget.parse("macs=0.7"), seed=0, teacher=model, log=records.append)
        assert [0 <= line["top1"] <= 100 for line in records if line.get("event") == "epoch"][:1] == [True]


class TestPresets:
    """Presets lie under what a recipe says itself."""

    @pytest.mark.parametrize("preset_name", shipped.names("presets"))
    @pytest.mark.parametrize("name", METHODS)
    def test_every_preset_fits_every_method(self, name, preset_name):
        table = preset(preset_name)
        asked = {"model": {"name": "m"}, "method": {"name": name}, "budget": "macs=0.5", "train": {"epochs": 2}}
        found = load(Recipe, laid_under(asked, {preset_name: table})).resolved()
        shared = getattr(found.found_method(), "shared", ())
        for path, value in leaves(table):
            if path[0] == "method" and name not in TRAINING:
                continue
            have = dump(found)
            for key in path:
                have = have[key]
            if path[0] == "train" and path[-1] in shared:
                assert have == getattr(found.found_method().train, path[-1])
            else:
                assert have == value, path

    def test_imagenet_says_what_it_is_for(self):
        train = preset("imagenet")["train"]
        assert {"augment", "workers", "precision", "warmup_epochs", "lr", "lr_batch", "batch"} <= set(train)
        assert train["augment"]["auto"].startswith("rand-")
        assert train["augment"]["hflip"] == 0.5

    @pytest.mark.parametrize("preset_name", shipped.names("presets"))
    @given(st.data())
    @LAWS
    def test_a_key_of_the_users_wins(self, preset_name, data):
        named = data.draw(st.lists(st.sampled_from(list(leaves({"train": OTHER}))), unique_by=lambda pair: pair[0]))
        asked, table = together(named), preset(preset_name)
        whole = laid_under(asked, {preset_name: table})
        for path, value in leaves(asked):
            have = whole
            for key in path:
                have = have[key]
            assert have == value
        assert merged(table, asked)["train"] == whole.get("train", {})

    def test_what_the_user_overrules_is_told(self):
        table = preset("imagenet")
        assert remark({"train": {"batch": 1024, "epochs": 3}}, {"preset imagenet": table}) is None
        told = remark({"train": {"batch": 64}}, {"preset imagenet": table})
        assert told == "train.batch is 64 as asked, not 1024 as in preset imagenet"

    def test_presets_that_disagree_are_refused(self):
        both = {"preset imagenet": preset("imagenet"), "preset finetune": preset("finetune")}
        with pytest.raises(
            RecipeError, match=r"presets must agree, but train.batch is 1024 in preset imagenet and 64 in"
        ):
            laid_under({"train": {"batch": 32}}, both)
        with pytest.raises(RecipeError, match=r"presets must agree"):
            laid_under({}, {"--minutes": {"train": DISTILLED}, "preset finetune": preset("finetune")})
        agreeing = {"one": {"train": {"batch": 8}}, "two": {"train": {"batch": 8, "lr": 0.1}}}
        assert laid_under({}, agreeing) == {"train": {"batch": 8, "lr": 0.1}}

    def test_laying_leaves_the_tables_alone(self):
        table, asked = {"train": dict(DISTILLED)}, {"method": {"name": "cait"}}
        whole = laid_under(asked, {"--minutes": table})
        assert "lr" not in whole["train"]
        assert whole["train"]["epochs"] == 1000
        assert table == {"train": DISTILLED}
        assert asked == {"method": {"name": "cait"}}

    def test_the_calls_lay_them_under(self):
        with pytest.raises(
            RecipeError, match="must be one that `vitrim recipes` lists, but got 'imagnet'; did you mean"
        ):
            vitrim.compress("m", method="random", preset="imagnet")
        with pytest.raises(RecipeError, match="presets must agree"):
            vitrim.compress("m", method="random", preset=["imagenet", "finetune"])
        model = timm.create_model("test_vit", **TINY)
        found = vitrim.compress(
            model, "digits", method="random", preset="finetune", epochs=0.1, measure={"latency": False},
            train={"warmup_epochs": 0, "augment": {"hflip": 0}}, recipe={"device": "cpu"},
        )  # fmt: skip
        assert found.measured["epochs"] == 0.1


class TestShares:
    """What shares cost is known before a search, so a budget that they miss is refused before it."""

    @pytest.mark.parametrize(("family", "name"), [each for each in PRESETS if each != ("vit", "scale_norms")])
    @pytest.mark.parametrize("shares", [{"attention": 0.6, "mlp": 0.4}, {"mlp": 0.5}, {"attention": 0.0, "mlp": 0.1}])
    def test_no_ranking_leaves_the_bounds(self, family, name, shares):
        model = adopted(family, name)
        spec = describe(model)
        gated = vit_slim.gate_model(copy.deepcopy(model))
        scores, kinds = vit_slim.gate_scores(gated, "signed")
        shares = {kind: share for kind, share in shares.items() if kind in set(kinds.values())}
        generator = torch.Generator().manual_seed(0)
        for turn in range(6):
            drawn = {path: torch.randn(len(values), generator=generator) for path, values in scores.items()}
            if turn >= 2:  # whole blocks first, from the front or the back, by the size of their axes
                order = sorted(drawn, key=lambda path: len(drawn[path]), reverse=turn % 2 == 0)
                drawn = {path: drawn[path] + 99.0 * order.index(path) for path in drawn}
            drawn |= {path: drawn[f"{path[:-3]}.v"] for path in drawn if path.endswith(".qk")}
            full = shares | dict.fromkeys(set(kinds.values()) - set(shares), float(turn % 2))
            cost = cost_of(share_plan(spec, drawn, kinds, full).child(spec))
            for bound in ("macs", "params"):
                value = getattr(cost, bound)
                check_shares(spec, kinds, shares, Budget(**{bound: float(value)}))

    def test_of_a_plain_vit_the_cost_itself_is_known(self):
        spec = describe(without_data(lambda: timm.create_model("deit_small_patch16_224")))
        kinds = {f"{path}.{axis}": kind for path, _, _ in spec.blocks()
                 for axis, kind in (("v", "attention"), ("qk", "attention"), ("hidden", "mlp"))}  # fmt: skip
        shares = {"attention": 0.7, "mlp": 0.7}
        generator = torch.Generator().manual_seed(0)
        scores = {path: torch.randn(1536 if path.endswith("hidden") else 384, generator=generator) for path in kinds}
        macs = cost_of(share_plan(spec, scores, kinds, shares).child(spec)).macs
        check_shares(spec, kinds, shares, Budget(macs=float(macs)))
        with pytest.raises(
            BudgetError, match=rf"must be at least {macs:,}, what the shares attention=0.7, mlp=0.7 keep"
        ):
            check_shares(spec, kinds, shares, Budget(macs=float(macs - 1)))
        check_shares(spec, kinds, shares, Budget(macs=float(int(macs / 0.981))))
        with pytest.raises(MethodError, match=r"the shares attention=0.7, mlp=0.7 must spend at least 98% .* 97.9%"):
            check_shares(spec, kinds, shares, Budget(macs=float(int(macs / 0.979))))
        check_shares(spec, kinds, {"attention": 0.7}, Budget(macs=float(macs)))
        check_shares(spec, kinds, shares, Budget(macs=float(macs - 1)), tokens=True)
        with pytest.raises(MethodError, match="can spend no more than"):
            check_shares(spec, kinds, shares, Budget(macs=0.95), tokens=True)

    @pytest.mark.parametrize(
        ("settings", "budget", "error"),
        [
            ({"attention": 0.5, "mlp": 0.5}, "macs=0.3", BudgetError),
            ({"attention": 0.5, "mlp": 0.5}, "macs=0.9", MethodError),
            ({"mlp": 0.9}, "params=0.2", BudgetError),
            ({"attention": 0.5, "mlp": 0.5, "token_l1": 1e-4}, "macs=0.9", MethodError),
        ],
    )
    def test_the_search_does_not_begin(self, settings, budget, error, monkeypatch):
        def begun(*_, **__):
            raise AssertionError("the search began")

        monkeypatch.setattr(vit_slim, "fit", begun)
        model = adopt(timm_model("vit", "plain", torch.float32))
        method = methods.get("vit_slim", {"choice": "free", "train": SHORT, **settings})
        with pytest.raises(error, match="shares"):
            method.search(model, digits(model), Budget.parse(budget), seed=0)
        free = methods.get("vit_slim", {"train": SHORT})
        with pytest.raises(AssertionError, match="the search began"):
            free.search(model, digits(model), Budget.parse(budget), seed=0)

    def test_a_kept_count_is_that_of_the_plan(self):
        assert [kept_count(10, share) for share in (0.0, 0.31, 1.0)] == [0, 4, 10]


class TestHints:
    """What a refusal advises can be done."""

    @pytest.mark.parametrize("name", METHODS)
    def test_a_hint_names_settings_that_the_method_has(self, name):
        model = adopted("vit", "plain")
        spec = describe(model)
        parent = cost_of(spec)
        job = SimpleNamespace(
            recipe=recipe(method={"name": name}).resolved(), spec=spec, budget=Budget.parse("macs=0.9, params=0.95")
        )
        child = _smaller(spec)
        with pytest.raises(MethodError, match="must spend at least 98%") as caught:
            check_budget(job, child)
        fields = methods.settings_of(name).model_fields
        assert [key for key in re.findall(r"method\.(\w+)", str(caught.value)) if key not in fields] == []
        if "choice" not in fields:
            hint = re.search(r"--budget (\S+)$", str(caught.value))
            assert hint is not None
            reached = Budget.parse(hint[1])
            assert reached.admits(cost_of(child), parent)
            assert reached.spent(cost_of(child), parent) > 0.98

    def test_finer_widths_are_not_advised_where_they_are_the_finest(self):
        spec = describe(adopted("vit", "plain"))
        job = SimpleNamespace(
            recipe=recipe(method={"name": "taylor", "choice": "free"}).resolved(), spec=spec, budget=Budget(macs=0.9)
        )
        with pytest.raises(MethodError, match=r"ask for what it reaches, --budget macs=0\.\d+$"):
            check_budget(job, _smaller(spec))


def _smaller(spec):
    """A child of half the neurons."""
    blocks = [BlockPlan(hidden=tuple(range(block.hidden // 2))) for _, _, block in spec.blocks()]
    return Plan.of(spec, blocks).child(spec)


class TestParts:
    """What the pages say of `accumulate` where gates are drawn and batch norms see one part."""

    @pytest.mark.parametrize(("parts", "draws"), [(1, 4), (4, 4), (1, 1), (4, 1)])
    def test_spvit_draws_its_gates_as_often_in_any_number_of_parts(self, parts, draws, monkeypatch):
        """With four draws a step, one part or four are four draws of four images; each part has one draw at least."""
        drawn, seen = [], []
        draw, forward = SinglePath._draw, Paths.forward

        def counted(single):
            drawn.append(single.training)
            return draw(single)

        def heard(beside, inner, *rest):
            if beside.training:
                seen.append(len(inner[0]))
            return forward(beside, inner, *rest)

        monkeypatch.setattr(SinglePath, "_draw", counted)
        monkeypatch.setattr(Paths, "forward", heard)
        model = adopt(timm_model("vit", "plain", torch.float32))
        data = digits(model)
        steps = {"epochs": 0.25, "batch": 16, "accumulate": parts}  # one step of the 64 images
        method = methods.get("spvit", {"train": {**SHORT, **steps}, "draws": draws})
        method.search(model, dataclasses.replace(data, validation=None), Budget.parse("macs=0.9"), seed=0)
        assert sum(drawn) == max(parts, draws)
        assert set(seen) == {16 // max(parts, draws)}


class TestShipped:
    """Recipes and presets come with the package."""

    def test_every_file_is_in_the_wheel(self):
        package = Path(vitrim.__file__).parent
        config = tomllib.loads((package.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
        globs = config["tool"]["setuptools"]["package-data"]["vitrim"]
        packed = {path for glob in globs for path in package.glob(glob)}
        assert set(package.rglob("*.toml")) <= packed
        assert len(shipped.names("recipes")) == 26
        assert shipped.names("presets") == ["finetune", "imagenet"]

    def test_every_one_says_what_it_is_and_how_to_run_it(self):
        for kind in ("recipes", "presets"):
            for name in shipped.names(kind):
                assert shipped.about(kind, name)
                text = shipped.text_of(name)
                assert "recipes/" not in text
                for other in re.findall(r"vitrim run (\w+)", text):
                    assert other in shipped.names("recipes")

    def test_names_and_files_are_found(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        known = shipped.path_of("recipes", "deit_small_spvit")
        assert shipped.recipe_file(Path("deit_small_spvit")) == known
        assert shipped.recipe_file(Path("deit_small_spvit.toml")) == known
        Path("deit_small_spvit.toml").write_text("")
        assert shipped.recipe_file(Path("deit_small_spvit.toml")) == Path("deit_small_spvit.toml")
        for asked, told in (
            ("recipes/deit_base_spvit.toml", "vitrim comes with one, `vitrim run deit_base_spvit`"),
            ("deit_base_spvt", "did you mean 'deit_base_spvit'"),
            ("nothing.toml", "must exist, or be a recipe that `vitrim recipes` lists, but does not$"),
        ):
            with pytest.raises(RecipeError, match=told):
                shipped.recipe_file(Path(asked))
