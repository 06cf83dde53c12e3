"""Budgets of time where plans cut the residual width: a table of times at two widths, and what is planned by it."""

import pytest
import timm
import torch

import vitrim
from tests.samples import adopted
from tests.tables import proportional
from tests.test_latency import reading, small_vit, zeros
from vitrim import families
from vitrim.cut.fill import fill
from vitrim.families import describe
from vitrim.measure.parts import fitted_narrow, machine_of, make_table, narrowed
from vitrim.run import latency_budget
from vitrim.words.budget import Budget
from vitrim.words.costs import cost_of
from vitrim.words.errors import BudgetError, MethodError
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.table import TimeTable


def at_width(spec, *widths):
    """The plan that keeps so many channels of each stage, and nothing else."""
    return Plan.of(spec, [BlockPlan()] * len(spec.blocks()), [tuple(range(n)) for n in widths])


@pytest.mark.parametrize("narrow", [(0.5,), (0.75, 0.25)])
def test_times_change_with_the_residual_width(narrow):
    """Macs are linear in it, so a machine that is proportional to them is told exactly, at any width and any cut."""
    spec = describe(small_vit())
    table = proportional(spec, narrow=narrow)
    draw = torch.Generator().manual_seed(0)
    for width in (1, 7, 16, 32, 48, 64, 63):
        hidden = tuple(range(int(torch.randint(1, 257, (), generator=draw))))
        cut = at_width(spec, width).then(
            Plan.of(at_width(spec, width).child(spec), [BlockPlan(hidden=hidden)] * 3), spec
        )
        child = cut.child(spec)
        macs = cost_of(child).macs - child.host.macs
        assert table.latency(child) == pytest.approx(macs + 1e5 * width / 64, abs=5)
        assert table.outside(child) == pytest.approx(1e-4 * width / 64)
    assert table.latency(spec) == proportional(spec).latency(spec)
    assert table.scaled(2.0).latency(child) == pytest.approx(2 * table.latency(child) - 1e5 * width / 64, abs=5)
    assert TimeTable.model_validate_json(table.model_dump_json()) == table


def test_what_no_width_touches_changes_with_the_residual_width():
    spec = describe(small_vit())
    table = proportional(spec, narrow=(0.5,))
    (times,) = table.stages
    bare = tuple(1e-6 * n for n in times.tokens)
    smaller = times.narrower[0].model_copy(update={"bare": tuple(t / 2 for t in bare)})
    table = table.model_copy(update={"stages": (times.model_copy(update={"bare": bare, "narrower": (smaller,)}),)})
    for width in (16, 32, 64):
        share = width / 64
        assert table.fixed(at_width(spec, width).child(spec)) == pytest.approx(share * (1e5 + 6e9 * bare[-1]), abs=5)


def test_stages_are_priced_each_at_its_own_width():
    spec = describe(adopted("swin", "windows"))
    table = proportional(spec, narrow=(0.5,))
    child = at_width(spec, 20, 30).child(spec)
    mean = (20 / 24 + 30 / 48) / 2
    assert table.latency(child) == pytest.approx(proportional(child, host=1e-4 * mean).latency(child), abs=5)


def test_a_table_of_one_width_prices_no_other():
    spec = describe(small_vit())
    child = at_width(spec, 32).child(spec)
    assert not proportional(spec).narrows
    with pytest.raises(BudgetError, match="must have two residual widths to price a third"):
        proportional(spec).latency(child)
    wide = describe(
        families.adopt(timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=1).eval())
    )
    with pytest.raises(BudgetError, match="has no stage of width 192"):
        proportional(spec, narrow=(0.5,)).latency(wide)


def test_a_narrow_model_is_fitted_to_its_own_time():
    spec = describe(small_vit())
    small = at_width(spec, 32).child(spec)
    table = proportional(spec, narrow=(0.5,)).model_copy(update={"branch": 2e-5})
    found = fitted_narrow(table, small, 2e-3)
    assert found.latency(small) == pytest.approx(2e6, abs=10)
    assert found.latency(spec) == table.latency(spec)
    assert fitted_narrow(table, small, 1e-6) == table


def test_a_table_is_measured_at_two_widths():
    model = small_vit()
    spec = describe(model)
    assert [stage.width for stage in narrowed(spec).child(spec).stages] == [32]
    odd = describe(families.adopt(families.get("vit").example(embed_dim=6, num_heads=3)))
    assert [stage.width for stage in narrowed(odd).child(odd).stages] == [3]
    table = make_table(model, batch=1, threads=1, seconds=0.01, rounds=1, width=True)
    assert table.narrows
    assert [one.width for one in table.stages[0].narrower] == [32]
    assert table.latency(spec) / 1e9 == pytest.approx(table.dense, rel=1e-3)
    assert table.latency(narrowed(spec).child(spec)) > table.hosts[0] * 1e9
    assert TimeTable.model_validate_json(table.model_dump_json()) == table
    with pytest.raises(MethodError, match="width must not be cut in this model"):
        make_table(families.adopt(families.get("vit").example(global_pool="prr")), width=True)


@pytest.mark.parametrize("share", [0.7, 0.4])
@pytest.mark.parametrize("by", ["score", "density"])
def test_plans_by_time_cut_the_residual_width(by, share):
    """Where a channel of the stream is worth little, it goes, and the plan is as fast as asked for."""
    model = small_vit()
    spec = describe(model)
    draw = torch.Generator().manual_seed(5)
    scores = {path: torch.rand(zero.shape, generator=draw) for path, zero in zeros(model).items()}
    budget = Budget(latency=share, table=proportional(spec, narrow=(0.5,)))
    stream = torch.rand(64, generator=draw)
    plan = fill(spec, {**scores, "stages.0.width": 1e-3 * stream}, budget, by=by)
    child = plan.child(spec)
    assert child.stages[0].width < 64
    assert set(plan.widths()[0]) == set(stream.argsort(descending=True)[: child.stages[0].width].tolist())
    assert 0.93 * share <= budget.cost(child).latency / budget.cost(spec).latency <= share
    kept = fill(spec, {**scores, "stages.0.width": 1e3 * stream}, budget).child(spec)
    assert kept.stages[0].width == 64
    assert budget.cost(kept).latency <= share * budget.cost(spec).latency


@pytest.mark.parametrize("name", ["magnitude", "random"])
def test_methods_that_cut_the_width_plan_by_time(name, monkeypatch, tmp_path):
    """The whole run: a table of two widths is asked for, and the child is met by the clock."""
    model, asked = small_vit(), []
    spec = describe(model)

    def make(model, **given):
        asked.append(given.pop("width"))
        narrow = (0.5,) if asked[-1] else ()
        return proportional(describe(model), narrow=narrow).model_copy(
            update={"machine": machine_of(model, **{key: given[key] for key in given if key != "seconds"})}
        )

    def clock(child, parent, **given):
        found = proportional(spec, narrow=(0.5,))
        return reading(1.1 * found.latency(describe(child)) / found.latency(spec))

    monkeypatch.setenv("VITRIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(latency_budget, "make_table", make)
    monkeypatch.setattr(latency_budget, "latency", clock)
    found = vitrim.compress(model, method=name, budget="latency=0.6", out=tmp_path / "a", settings={"width": True})
    assert asked == [True]
    assert abs(found.measured["latency_ratio"] - 0.6) <= 0.03
    assert found.plan.child(spec).stages[0].width < 64
    vitrim.compress(model, method=name, budget="latency=0.6", out=tmp_path / "b")
    assert asked == [True, False]
    assert len(list((tmp_path / "cache" / "latency").iterdir())) == 2
