"""The words: budgets, specs, plans and recipes as text, and what they say of text that is wrong."""

import json
import os
import stat
import time
import tomllib
from pathlib import Path

import pytest

from vitrim.words.budget import Budget
from vitrim.words.costs import Cost, cost_of
from vitrim.words.errors import BudgetError, MethodError, PlanError, RecipeError, RunError, SpecError
from vitrim.words.plain import (
    check_place,
    did_you_mean,
    dump,
    load,
    read_json,
    read_toml,
    write_json,
    write_text,
    writing,
)
from vitrim.words.plan import BlockPlan, Plan, read_plan, write_plan
from vitrim.words.spec import Attention, Block, Form, Host, Norm, Skip, Spec, Stage

NORM = Norm(name="LayerNorm", eps=1e-6)


def form(**changes) -> Form:
    plain = {"qkv_bias": True, "out_bias": True, "mlp": "plain", "hidden_bias": True, "mlp_out_bias": True}
    return Form(norm=NORM, activation="GELU", **(plain | changes))


def spec(depth: int = 2, mixer=None, hidden: int | None = 16, **changes) -> Spec:
    """A model of heads 4 + 4 and 16 neurons at width 8; no family need know it."""
    mixer = mixer or Attention(qk=(4, 4), v=(4, 4), scale=0.5)
    block = Block(mixer=mixer, hidden=hidden)
    stage = Stage(width=8, grid=(2, 2), prefix=1, form=form(**changes), blocks=(block,) * depth)
    host = Host(name="none_such", arguments={}, macs=100, params=50)
    return Spec(family="vit", host=host, image=(8, 8), classes=3, stages=(stage,))


def plan(*blocks: dict, depth: int = 2) -> Plan:
    rows = [BlockPlan(**block) for block in blocks]
    return Plan.of(spec(depth), rows + [BlockPlan()] * (depth - len(rows)))


# Budgets.


@pytest.mark.parametrize(
    ("text", "macs", "params"),
    [
        ("macs=0.5", 0.5, None),
        ("macs=1", 1.0, None),
        ("macs=2.3G", 2.3e9, None),
        (" params = 12 M ", None, 12e6),
        ("params=12m,macs=0.25", 0.25, 12e6),
        ("macs=5e-1", 0.5, None),
        ("macs=1000", 1000.0, None),
        ("macs=0.5k", 500.0, None),
        ("macs=0.3333333333333333", 0.3333333333333333, None),
        ("macs=0.00001", 1e-5, None),
        ("macs=.5", 0.5, None),
        ("macs=1.", 1.0, None),
        ("macs=.5k", 500.0, None),
        ("macs=1.5e15", 1.5e15, None),
        ("macs=2e18", 2e18, None),
    ],
)
def test_a_budget_is_read_and_written(text, macs, params):
    budget = Budget.parse(text)
    assert (budget.macs, budget.params) == (macs, params)
    assert Budget.parse(str(budget)) == budget
    assert str(Budget.parse(str(budget))) == str(budget)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "must look like macs=0.5"),
        ("0.5", "must look like macs=0.5"),
        ("macs:0.5", "must look like macs=0.5"),
        ("macs=0.5,", "must look like macs=0.5"),
        ("mac=0.5", "did you mean 'macs'"),
        ("flops=0.5", "must bound macs, params or latency, but got 'flops'"),
        ("MACs=0.5", "must bound macs, params or latency, but got 'MACs'"),
        ("macs=0.5,macs=0.4", "must bound macs once"),
        ("macs=", "must be a number such as"),
        ("macs=half", "but got 'half'"),
        ("macs=-0.5", "but got '-0.5'"),
        ("macs=50%", "but got '50%'"),
        ("macs=2.3T", "but got '2.3T'"),
        ("macs=nan", "but got 'nan'"),
        ("macs=inf", "but got 'inf'"),
        ("macs=.", "but got '.'"),
        ("macs=1e999", "must be above 0"),
        ("macs=0", "must be above 0 and finite, but got '0'"),
        ("macs=0.0", "must be above 0"),
        ("macs=0G", "must be above 0"),
        ("macs=1.5", "must be a share in (0, 1] or a number with a unit"),
        ("macs=999", "must be a share in (0, 1] or a number with a unit"),
        ("macs=0.0005k", "must be above 1 where it has a unit"),
    ],
)
def test_a_malformed_budget_is_refused(text, told):
    with pytest.raises(BudgetError) as caught:
        Budget.parse(text)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_limits_of_a_budget():
    parent = Cost(macs=1001, params=5000)
    assert Budget.parse("macs=0.5,params=2.5k").limits(parent) == {"macs": 500, "params": 2500}
    assert Budget.parse("macs=1").limits(parent) == {"macs": 1001}
    budget = Budget.parse("macs=0.5")
    assert budget.admits(Cost(500, 9), parent)
    assert not budget.admits(Cost(501, 9), parent)
    assert budget.spent(Cost(495, 9), parent) == pytest.approx(0.99)
    with pytest.raises(BudgetError, match=r"macs must be at most 1,001, the model's own, but got 1,002"):
        Budget.parse("macs=1002").limits(parent)


@pytest.mark.parametrize(
    ("bounds", "told"),
    [
        ({"macs": -1}, "budget of macs must be above 0 and finite, but got -1"),
        ({"macs": 0}, "must be above 0 and finite, but got 0"),
        ({"params": float("nan")}, "must be above 0 and finite, but got nan"),
        ({"params": float("inf")}, "must be above 0 and finite, but got inf"),
        ({"latency": 3.0}, "budget of latency must be a share of the parent's in (0, 1], but got 3.0"),
        ({"latency": -0.5}, "must be above 0 and finite, but got -0.5"),
        ({"macs": 50}, "or a number of at least 1000, but got 50; if that many are meant, give the text '0.05k'"),
        ({"macs": True}, "must be a number such as 0.5 or 2.3e9, but got True"),
        ({"macs": [0.5]}, "must be a number such as 0.5 or 2.3e9, but got [0.5]"),
        ({"macs": "half"}, "must be a number such as 0.5, 2.3G or 12M, but got 'half'"),
        ({"macs": "50"}, "must be a share in (0, 1] or a number with a unit"),
        ({"mac": 0.5}, "Budget has no field 'mac'; did you mean 'macs'?"),
        ({"table": 3}, "budget.table: "),
    ],
)
def test_a_wrong_budget_is_refused_where_it_is_made(bounds, told):
    with pytest.raises(BudgetError) as caught:
        Budget(**bounds)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("bounds", "text"),
    [
        ({"macs": 0.5}, "macs=0.5"),
        ({"macs": 1}, "macs=1"),
        ({"macs": 2_300_000_000, "latency": 0.5}, "macs=2.3G,latency=0.5"),
        ({"macs": "2.3G", "params": None}, "macs=2.3G"),
        ({"params": "0.5k"}, "params=0.5k"),
        ({"params": 1000}, "params=1000"),
    ],
)
def test_a_budget_of_numbers_is_that_of_their_text(bounds, text):
    budget = Budget(**bounds)
    assert budget == Budget.parse(text)
    assert load(Budget, dump(budget)) == budget
    assert Budget.model_validate_json(budget.model_dump_json()) == budget


def test_a_budget_that_bounds_nothing_cannot_be_spent():
    parent = Cost(macs=1001, params=5000)
    assert Budget().bounds() == Budget().limits(parent) == {}
    with pytest.raises(BudgetError, match="must bound macs, params or latency to be spent, but bounds nothing"):
        Budget().spent(parent, parent)


def test_a_budget_takes_other_bounds():
    budget = Budget.parse("macs=0.5,params=0.5")
    assert budget.bounded({"latency": 5_000_000}).bounds() == {"latency": 5_000_000}
    assert budget.bounded(budget.bounds()) == budget


# Plain values.


def test_a_near_name_is_suggested():
    assert did_you_mean("taylr", ["taylor", "random"]) == "; did you mean 'taylor'?"
    assert did_you_mean("zzz", ["b", "a"]) == "; known are a, b"
    assert did_you_mean("zzz", []) == ""


def test_load_is_the_inverse_of_dump():
    for value in (spec(), spec(mixer=Skip(), hidden=None), plan({"hidden": (1, 2)}), Budget.parse("macs=0.5")):
        assert load(type(value), dump(value)) == value
        assert load(type(value), json.loads(json.dumps(dump(value)))) == value


def broken(change) -> dict:
    sheet = dump(spec())
    change(sheet)
    return sheet


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s.update(clases=3), "here: Spec has no field 'clases'; did you mean 'classes'?"),
        (lambda s: s.pop("classes"), "here.classes: this field is required"),
        (lambda s: s.update(classes="many"), "here.classes: "),
        (lambda s: s["host"].update(nme=1), "here.host: Host has no field 'nme'; did you mean 'name'?"),
        (
            lambda s: s["stages"][0]["blocks"][1].update(hiden=1),
            "here.stages.0.blocks.1: Block has no field 'hiden'; did you mean 'hidden'?",
        ),
        (
            lambda s: s["stages"][0]["blocks"][1]["mixer"].update(qq=1),
            "here.stages.0.blocks.1.mixer: Attention has no field 'qq'",
        ),
        (
            lambda s: s["stages"][0]["blocks"][1].update(mixer={"kind": "skip", "v": 1}),
            "here.stages.0.blocks.1.mixer: Skip has no field 'v'",
        ),
        (lambda s: s["stages"][0]["blocks"][0]["mixer"].pop("scale"), "here.stages.0.blocks.0.mixer.scale: this field"),
        (lambda s: s["stages"][0]["blocks"][0]["mixer"]["v"].append(4), "qk and v must name the same heads"),
        (lambda s: s["stages"][0]["blocks"][0]["mixer"].update(qk=[0, 4]), "blocks.0.mixer.qk.0: "),
        (lambda s: s["stages"][0]["blocks"][0].update(mixer={"kind": "fourier"}), "blocks.0.mixer: "),
        (lambda s: s["stages"][0].update(blocks=3), "here.stages.0.blocks: "),
        (lambda s: s["stages"].append(7), "here.stages.1: this must be a table of names and values, but got 7"),
        (lambda s: s["stages"][0]["form"]["norm"].update(eps=float("nan")), "here.stages.0.form.norm.eps: "),
    ],
)
def test_a_wrong_spec_is_refused_with_its_path(change, told):
    with pytest.raises(SpecError) as caught:
        load(Spec, broken(change), SpecError, at="here")
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_values_are_frozen_and_compare():
    assert spec() == spec()
    assert spec() != spec(hidden=8)
    with pytest.raises(ValueError, match="frozen"):
        spec().classes = 4


def test_writing_is_one_step(tmp_path):
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"a": 1})
    assert read_json(path) == {"a": 1}

    def fail():
        with writing(path) as beside:
            beside.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert read_json(path) == {"a": 1}
    assert [entry.name for entry in path.parent.iterdir()] == ["file.json"]
    with pytest.raises(ValueError, match="Out of range"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": 1}
    assert [entry.name for entry in path.parent.iterdir()] == ["file.json"]


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(("mask", "left"), [(0o077, 0o600), (0o027, 0o640), (0o022, 0o644)])
def test_writing_respects_the_umask(mask, left, tmp_path):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "new", "text")
        with writing(tmp_path / "private") as beside:
            # As a library does that writes a private file of its own and renames it.
            other = beside.with_name("other")
            other.touch(mode=0o600)
            other.replace(beside)
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert (mode(tmp_path / "new"), mode(tmp_path / "private")) == (left, left)


def test_a_file_that_is_replaced_keeps_its_mode(tmp_path):
    path = tmp_path / "file"
    path.touch()
    path.chmod(0o604)
    write_text(path, "text")
    assert mode(path) == 0o604


@pytest.mark.parametrize("target", ["there", "missing", "deep/missing"])
def test_writing_follows_a_link(target, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "there").write_text("old")
    link, second = tmp_path / "link", tmp_path / "second"
    link.symlink_to(Path("real") / target)
    second.symlink_to(link)
    check_place(second)
    write_text(second, "new")
    assert second.is_symlink()
    assert link.is_symlink()
    assert (tmp_path / "real" / target).read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} == {"real", "link", "second"}


def test_a_failed_write_through_a_link_leaves_all_as_it_was(tmp_path):
    (tmp_path / "there").write_text("old")
    (tmp_path / "link").symlink_to("there")

    def fail():
        with writing(tmp_path / "link") as beside:
            beside.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (tmp_path / "there").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"there", "link"}


def test_links_in_a_circle_are_refused(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"):
        write_text(tmp_path / "a", "text")
    with pytest.raises(RunError, match=r"a: the place must be writable, but is not: .*symbolic links"):
        check_place(tmp_path / "a", RunError)
    assert all((tmp_path / name).is_symlink() for name in "ab")


def test_a_folder_is_no_place_for_a_file(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    for place in (tmp_path, tmp_path / "link"):
        with pytest.raises(RunError, match="must be named to write to, but this is a folder"):
            check_place(place, RunError)


@pytest.mark.parametrize("reader", [read_json, read_toml])
def test_a_file_that_cannot_be_read(reader, tmp_path):
    with pytest.raises(RecipeError, match=r"nowhere: the file must exist, but it does not"):
        reader(tmp_path / "nowhere")
    with pytest.raises(RecipeError, match="the file must be readable, but"):
        reader(tmp_path)
    bad = tmp_path / "bad"
    bad.write_text("a = \n{,}")
    with pytest.raises(RecipeError, match=r"bad: the file must be (JSON|TOML), but .*line 1"):
        reader(bad)
    bad.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="the file must be readable, but"):
        reader(bad)


# Plans.


def test_the_plan_that_keeps_all():
    keep = Plan.keep(spec())
    assert keep.child(spec()) == spec()
    assert keep == Plan.of(spec(), [BlockPlan()] * 2)
    assert len(keep.blocks()) == 2
    assert keep.then(keep, spec()) == keep


def test_the_child_of_a_plan():
    child = plan({"qk": ((0, 2), ()), "v": ((1,), ()), "hidden": (3,)}, {"mixer": Skip(), "mlp": Skip()}).child(spec())
    first, second = (block for _, _, block in child.blocks())
    assert first == Block(mixer=Attention(qk=(2,), v=(1,), scale=0.5), hidden=1)
    assert second == Block(mixer=Skip(), hidden=None)
    gone = plan({"v": ((), (0,))}).child(spec()).blocks()[0][2]
    assert gone.mixer == Attention(qk=(4,), v=(1,), scale=0.5)


@pytest.mark.parametrize(
    ("block", "told"),
    [
        ({"hidden": (0, 16)}, "blocks.0.hidden: kept indices must rise within [0, 16), but got (0, 16)"),
        ({"hidden": (2, 1)}, "blocks.0.hidden: kept indices must rise"),
        ({"hidden": (1, 1)}, "blocks.0.hidden: kept indices must rise"),
        ({"hidden": (-1,)}, "blocks.0.hidden: kept indices must rise"),
        ({"qk": ((0,), (4,)), "v": ((0,), (0,))}, "blocks.0.heads.1.qk: kept indices must rise within [0, 4)"),
        ({"v": ((0,),)}, "blocks.0.v: kept channels must be given for each of 2 heads, but got 1"),
        ({"qk": ((0,), (0,), (0,))}, "blocks.0.qk: kept channels must be given for each of 2 heads, but got 3"),
        ({"qk": ((0,), ()), "v": ((0,), (0,))}, "blocks.0.heads.1: a head must keep channels of both qk and v"),
        ({"mixer": Skip(), "qk": ((0,), (0,))}, "a skipped mixer must keep no channels"),
        ({"mlp": Skip(), "hidden": (0,)}, "a skipped MLP must keep no neurons"),
    ],
)
def test_a_wrong_plan_is_refused(block, told):
    with pytest.raises(PlanError) as caught:
        plan(block).child(spec())
    assert told in str(caught.value)
    assert str(caught.value).startswith("stages.0.")


def test_a_plan_for_another_model_is_refused():
    with pytest.raises(
        PlanError, match=r"must decide for the model's blocks \[3\], but decides for \[2\]; it was made"
    ):
        plan().child(spec(depth=3))
    with pytest.raises(PlanError, match="must decide for each of 2 blocks, but decides for 1"):
        Plan.of(spec(), [BlockPlan()])
    skipped = spec(mixer=Skip(), hidden=None)
    with pytest.raises(PlanError, match="channels must be kept of an attention, but the block's mixer is skip"):
        plan({"v": ((0,), (0,))}).child(skipped)
    with pytest.raises(PlanError, match="neurons must be kept of an MLP, but the block has none"):
        plan({"hidden": (0,)}).child(skipped)


@pytest.mark.parametrize(
    ("changes", "block", "told"),
    [
        ({"head_norm": NORM, "head_norm_width": 4}, {"qk": ((0, 1), (0, 1))}, "under a q/k norm must be kept together"),
        ({"mixed_norm": NORM}, {"v": ((0, 1, 2, 3), ())}, "under a norm over all heads must be kept together"),
        ({"hidden_norm": NORM}, {"hidden": (0,)}, "neurons under a norm must be kept together"),
    ],
)
def test_what_a_norm_ties_is_not_cut(changes, block, told):
    with pytest.raises(PlanError, match=told):
        plan(block).child(spec(**changes))


def test_a_head_under_a_norm_goes_as_a_whole():
    tied = spec(head_norm=NORM, head_norm_width=4)
    assert plan({"qk": ((), (0, 1, 2, 3))}).child(tied).blocks()[0][2].mixer.qk == (4,)


def test_a_plan_file(tmp_path):
    path = tmp_path / "plan.json"
    cut = plan({"hidden": (3, 4)})
    write_plan(path, spec(), cut)
    assert read_plan(path) == (spec(), cut)
    good = read_json(path)

    def spoilt(change) -> str:
        sheet = json.loads(json.dumps(good))
        change(sheet)
        write_json(path, sheet)
        with pytest.raises(PlanError) as caught:
            read_plan(path)
        return str(caught.value)

    assert "has no field 'plann'; did you mean 'plan'?" in spoilt(lambda s: s.update(plann=1))
    assert "plan.json.parent: this field is required" in spoilt(lambda s: s.pop("parent"))
    assert "must rise within [0, 16)" in spoilt(lambda s: s["plan"]["stages"][0]["blocks"][0].update(hidden=[99]))
    assert "made for another model" in spoilt(lambda s: s["plan"]["stages"][0]["blocks"].pop())
    assert "plan.stages.0.blocks.0.hidden" in spoilt(lambda s: s["plan"]["stages"][0]["blocks"][0].update(hidden="all"))
    for text, told in (("[1, 2]", "must be a table"), ('{"plan"', "must be JSON, but line 1 is not"), ("", "line 1")):
        write_text(path, text)
        with pytest.raises(PlanError, match=told):
            read_plan(path)


def test_a_spec_is_priced_in_no_time():
    big = spec(depth=12)
    cost_of(big)
    times = []
    for _ in range(50):
        start = time.process_time()
        cost_of(big)
        times.append(time.process_time() - start)
    assert sorted(times)[25] < 200e-6


# Recipes. These import torch, through the methods.


def recipe(**changes):
    from vitrim.run.recipe import Recipe

    asked = {"model": {"name": "test_vit"}, "method": {"name": "taylor"}, "budget": "macs=0.50"} | changes
    return load(Recipe, asked, RecipeError, at="recipe")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": {"name": "vit_slim"}},
        {"method": {"name": "vit_slim", "gate_lr": 0.1, "train": {"epochs": 1, "clip": "none"}}},
        {"train": {"epochs": 2, "clip": None, "ema": 0.9, "distill": {"kind": "none"}}, "budget": "macs=0.5k"},
        {"data": {"train": "digits", "mean": [0.5, 0.5, 0.5], "validation": 3}, "seed": 4, "device": "cpu"},
        {"model": {"name": "test_vit", "arguments": {"img_size": [32, 64], "pos_embed": "none", "x": None}}},
    ],
)
def test_a_resolved_recipe_comes_back(changes, tmp_path):
    from vitrim.run.recipe import Recipe, read_recipe, write_recipe

    known = recipe(**changes).resolved()
    path = tmp_path / "recipe.toml"
    write_recipe(path, known)
    assert read_recipe(path).resolved() == known
    assert known.resolved() == known
    assert set(tomllib.loads(path.read_text())) == set(Recipe.model_fields)
    assert read_recipe(path).found_method() == known.found_method()


def test_none_is_a_word_where_a_setting_may_be_none():
    asked = recipe(train={"clip": "none", "distill": {"kind": "none"}, "augment": {"kind": "none"}})
    assert asked.train.clip is None
    assert asked.train.distill.kind == "none"
    assert asked.train.augment.kind == "none"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"modell": 1}, "recipe: Recipe has no field 'modell'; did you mean 'model'?"),
        ({"train": {"epoch": 1}}, "recipe.train: Train has no field 'epoch'; did you mean 'epochs'?"),
        (
            {"train": {"distill": {"alfa": 1}}},
            "recipe.train.distill: Distill has no field 'alfa'; did you mean 'alpha'",
        ),
        ({"train": {"lr": -1}}, "recipe.train.lr: "),
        ({"train": 3}, "recipe.train: this must be a table of names and values, but got 3"),
        ({"model": {}}, "recipe.model.name: this field is required, but it is missing"),
        ({"budget": 0.5}, "recipe.budget: "),
        ({"seed": -1}, "recipe.seed: "),
        ({"device": "gpu"}, "recipe.device: "),
    ],
)
def test_a_wrong_recipe_is_refused_with_its_path(changes, told):
    with pytest.raises(RecipeError) as caught:
        recipe(**changes)
    assert told in str(caught.value)


def test_a_recipe_knows_its_method():
    with pytest.raises(MethodError, match="did you mean 'taylor'"):
        recipe(method={"name": "taylr"}).resolved()
    with pytest.raises(MethodError, match=r"method.taylor: Method has no field 'choise'; did you mean 'choice'"):
        recipe(method={"name": "taylor", "choise": "free"}).resolved()
    with pytest.raises(RecipeError, match="must name its method, but got None"):
        recipe(method={}).resolved()
    with pytest.raises(BudgetError, match="must look like"):
        recipe(budget="half").resolved()


def test_settings_given_one_by_one():
    from vitrim.run.recipe import merged, overrides

    pairs = [
        "train.epochs=1.5",
        "train.clip=none",
        "a=x=y",
        "b.c=[1, 2]",
        "b.d=true",
        "e=None",
        "f=",
        "g=null",
        "h=1e3",
    ]
    assert overrides(pairs) == {
        "train": {"epochs": 1.5, "clip": "none"},
        "a": "x=y",
        "b": {"c": [1, 2], "d": True},
        "e": None,
        "f": "",
        "g": None,
        "h": 1000.0,
    }
    assert overrides(["a=1", "a=2"]) == {"a": 2}
    base = {"a": {"b": 1, "c": 2}, "d": 3}
    assert merged(base, {"a": {"b": 9}, "e": 4}) == {"a": {"b": 9, "c": 2}, "d": 3, "e": 4}
    assert base == {"a": {"b": 1, "c": 2}, "d": 3}
    for wrong in ("epochs", "=1", ".a=1", "a..b=1", ""):
        with pytest.raises(RecipeError, match=r"must look like train\.epochs=1, but got"):
            overrides([wrong])
    for both in (["a=1", "a.b=2"], ["a.b=2", "a=1"]):
        with pytest.raises(RecipeError, match="a value or a table, but is given as both"):
            overrides(both)
