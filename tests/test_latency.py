"""Budgets of time: a table of times is arithmetic, plans spend it, and what is measured decides."""

import math

import pytest
import timm
import torch

import vitrim
from tests.samples import PRESETS, adopted
from tests.tables import proportional
from vitrim import families, methods
from vitrim.cut.fill import fill
from vitrim.cut.observe import axes
from vitrim.cut.surgery import apply
from vitrim.families import describe
from vitrim.measure import Latency
from vitrim.measure.parts import fitted, half_widths, machine_of, make_table
from vitrim.measure.shapes import between_multiples, step_of
from vitrim.methods.spvit.planning import decide, planned
from vitrim.methods.spvit.prices import times
from vitrim.methods.spvit.search import SinglePath, layout
from vitrim.run import latency_budget
from vitrim.run.recipe import Measure
from vitrim.words.budget import Budget
from vitrim.words.costs import attention_macs, cost_of, mlp_macs
from vitrim.words.errors import BudgetError, ExportError, RecipeError, WeightsError
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Attention, Skip, folded
from vitrim.words.steps.drop import Drop
from vitrim.words.table import StageTimes, TimeTable


def small_vit(**arguments):
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=4,
        embed_dim=64,
        depth=3,
        num_heads=4,
        num_classes=10,
        **arguments,
    )
    return families.adopt(model.eval())


def stepped(spec, step):
    """The same machine, but channels of a head, and neurons, run in whole multiples of `step`."""

    def up(number):
        return math.ceil(number / step) * step

    table, stage = proportional(spec), spec.stages[0]
    times = table.stages[0]
    hidden = tuple(range(1, times.hidden[-1] + 1))
    attention = [
        [[1e-9 * attention_macs(n, stage.width, h * up(k), h * up(k)) for k in times.channels] for h in times.heads]
        for n in times.tokens
    ]
    mlp = [[1e-9 * mlp_macs(n, stage.width, up(m)) for m in hidden] for n in times.tokens]
    return table.model_copy(
        update={"stages": (StageTimes(**dict(times) | {"attention": attention, "hidden": hidden, "mlp": mlp}),)}
    )


# -- the table


def test_what_no_width_touches_is_known():
    """Norms and the residual stream stay however thin a branch gets, and go with the branch."""
    spec = describe(small_vit())
    table, stage = proportional(spec), spec.stages[0]
    bare = tuple(1e-6 * n for n in table.stages[0].tokens)
    table = table.model_copy(update={"stages": (table.stages[0].model_copy(update={"bare": bare}),), "branch": 2e-6})
    times = table.stages[0]
    rest = 1e-6 * stage.tokens
    assert times.feeds(stage.tokens, 1) == pytest.approx(max(rest, 1e-9 * mlp_macs(stage.tokens, stage.width, 1)))
    assert times.attends_evenly(stage.tokens, 1, 1e-3) == pytest.approx(rest)
    assert times.feeds(stage.tokens, 0) == 0
    assert table.fixed(spec) == pytest.approx(1e9 * (table.host + 6 * (rest + 2e-6)))
    thin = Plan.of(spec, [BlockPlan(qk=((0,),) * 4, v=((0,),) * 4, hidden=(0,))] * 3)
    gone = Plan.of(spec, [BlockPlan(mixer=Skip(), mlp=Skip())] * 3)
    assert table.latency(thin.child(spec)) >= table.fixed(spec)
    assert table.latency(gone.child(spec)) == table.fixed(gone.child(spec)) == round(1e9 * table.host)
    assert table.scaled(2).stages[0].bare == pytest.approx([2 * b for b in bare])


@pytest.mark.parametrize(("multiple", "wanted"), [(1, 1), (8, 8), (16, 16), (64, 64)])
def test_the_step_of_a_device_is_measured(multiple, wanted):
    """A device that takes twice as long where a width is no multiple of what it likes."""
    counts = between_multiples(1536)
    assert counts == (1473, 1474, 1476, 1480, 1488, 1504, 1536)
    assert step_of({n: 1e-6 * n * (1 if n % multiple == 0 else 2) for n in counts}) == wanted
    assert step_of({}) == 1
    assert between_multiples(100) == ()


@pytest.mark.parametrize("by", ["score", "density"])
def test_whole_branches_go_before_thin_widths(by):
    """On a machine where most of a branch is what no width touches, thinning everything would leave no macs."""
    spec = describe(small_vit())
    times = proportional(spec).stages[0]
    fixed = {
        "attention": [[[0.7 * t[-1][-1] + 0.3 * k for k in h] for h in t] for t in times.attention],
        "mlp": [[0.7 * t[-1] + 0.3 * m for m in t] for t in times.mlp],
        "bare": [0.7 * t[-1] for t in times.mlp],
    }
    table = proportional(spec).model_copy(update={"stages": (StageTimes(**dict(times) | fixed),)})
    draw = torch.Generator().manual_seed(0)
    scores = {path: torch.rand(axis.size, generator=draw) for path, axis in axes(small_vit()).items()}
    child = fill(spec, scores, Budget(latency=0.5, table=table), by=by).child(spec)
    gone = sum((not getattr(block.mixer, "v", ())) + (not block.hidden) for _, _, block in child.blocks())
    assert gone >= 2
    assert cost_of(child).macs >= 0.35 * cost_of(spec).macs


@pytest.mark.parametrize("choice", ["free", "even"])
def test_plans_by_time_keep_to_the_step(choice):
    model = small_vit()
    spec = describe(model)
    table = proportional(spec)
    table = table.model_copy(update={"stages": (table.stages[0].model_copy(update={"step": 32}),)})
    scores = {path: torch.rand(axis.size) for path, axis in axes(model).items()}
    by_time = fill(spec, scores, Budget(latency=0.6, table=table), choice=choice).child(spec)
    by_macs = fill(spec, scores, Budget(macs=0.6, table=table), choice="free").child(spec)
    kept = [block.hidden for _, _, block in by_time.blocks()]
    # Single neurons are put back at the end, where a budget is not used up otherwise.
    assert sum(hidden % 32 == 0 for hidden in kept) >= 2
    assert any(block.hidden % 32 for _, _, block in by_macs.blocks())


def test_a_table_adds_up_what_its_branches_take():
    spec = describe(small_vit())
    table = proportional(spec)
    macs = cost_of(spec).macs - spec.host.macs
    assert table.latency(spec) == round(1e5 + macs)
    child = Plan.of(
        spec,
        [
            BlockPlan(mixer=Skip()),
            BlockPlan(hidden=tuple(range(17)), tokens=Drop(kept=tuple(range(0, 64, 2)))),
            BlockPlan(mlp=Skip(), tokens=Drop(kept=tuple(range(0, 64, 2)))),
        ],
    ).child(spec)
    assert table.latency(child) == round(1e5 + cost_of(child).macs - child.host.macs)
    blocks = [
        table.block(block, stage, here)
        for (_, stage, block), here in zip(child.blocks(), child.arrivals(), strict=True)
    ]
    assert table.latency(child) == 100_000 + sum(blocks)


def test_the_last_block_is_cheap_where_prefix_tokens_alone_ask():
    spec = describe(small_vit())
    table = proportional(spec, host=0.0)
    child = Plan.of(spec, [BlockPlan(), BlockPlan(), BlockPlan(only_prefix=True)]).child(spec)
    assert table.latency(child) < 0.8 * table.latency(spec)
    rest = cost_of(child).macs - child.host.macs
    # One token's MLP is below the first number of tokens that was measured, where the line goes on to nothing.
    assert abs(table.latency(child) - rest) < 0.01 * rest


def test_times_between_points_lie_on_lines_and_never_below_zero():
    spec = describe(small_vit())
    stage = proportional(spec).stages[0]
    coarse = stage.model_copy(update={"hidden": (64, 128), "mlp": tuple((1.0, 3.0) for _ in stage.tokens)})
    for neurons, seconds in ((64, 1.0), (96, 2.0), (128, 3.0), (160, 4.0), (32, 0.0), (8, 0.0), (0, 0.0)):
        assert coarse.feeds(stage.tokens[-1], neurons) == pytest.approx(seconds)


def test_heads_of_several_widths_take_longer():
    spec = describe(small_vit())
    stage = proportional(spec).stages[0].model_copy(update={"run": 5e-6, "unequal": 1.5, "with_sizes": 2.0})
    flow = spec.flows()[0]
    even = Attention(qk=(8,) * 4, v=(8,) * 4, scale=1.0)
    mixed = Attention(qk=(4, 12, 8, 8), v=(4, 12, 8, 8), scale=1.0)
    apart = Attention(qk=(4,) * 4, v=(12,) * 4, scale=1.0)
    assert stage.attends(mixed, flow, False) == pytest.approx(stage.attends(even, flow, False) + 2 * 5e-6)
    assert stage.attends(apart, flow, False) == pytest.approx(1.5 * stage.attends(even, flow, False))
    assert stage.attends(even, flow, True) == pytest.approx(2 * stage.attends(even, flow, False))


def test_a_table_of_another_model_is_refused():
    other = describe(families.adopt(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1).eval()))
    with pytest.raises(BudgetError, match="has no stage of width 192"):
        proportional(describe(small_vit())).latency(other)


@pytest.mark.parametrize(("family", "preset"), [next(p for p in PRESETS if p[0] == name) for name in families.names()])
def test_a_measured_table_gives_the_dense_model_its_own_time(family, preset):
    model = adopted(family, preset)
    spec = describe(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    table = make_table(model, batch=1, threads=1, seconds=0.01, rounds=1)
    assert len(table.stages) == len(spec.stages)
    assert table.machine == machine_of(model, batch=1, threads=1)
    assert table.latency(spec) / 1e9 == pytest.approx(table.dense, rel=1e-3)
    bare = Plan.of(spec, [BlockPlan(mixer=Skip(), mlp=Skip()) for _ in spec.blocks()]).child(spec)
    assert table.latency(bare) == round(table.host * 1e9)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert TimeTable.model_validate_json(table.model_dump_json()) == table


@pytest.mark.parametrize("norm", [{}, {"qk_norm": True}])
def test_a_table_learns_what_branches_cost_within_a_model(norm):
    spec = describe(small_vit(**norm))
    alone = proportional(spec)
    truth = alone.scaled(1.3).model_copy(update={"branch": 2e-5})
    dense, half = truth.latency(spec) / 1e9, truth.latency(half_widths(spec)) / 1e9
    found = fitted(alone.model_copy(update={"dense": dense}), spec, half)
    for child in (spec, half_widths(spec), Plan.keep(spec).child(spec), headless(spec)):
        assert found.latency(child) == pytest.approx(truth.latency(child), abs=10)


def headless(spec):
    blocks = [BlockPlan(mixer=Skip()), BlockPlan(mlp=Skip()), *[BlockPlan() for _ in spec.blocks()[2:]]]
    return Plan.of(spec, blocks).child(spec)


@pytest.mark.parametrize("half", [0.0, 0.2, 5.0])
def test_a_table_fitted_to_noise_still_gives_the_dense_model_its_own_time(half):
    spec = describe(small_vit())
    table = proportional(spec).model_copy(update={"dense": 3e-3})
    found = fitted(table, spec, half * table.dense)
    assert found.branch >= 0
    assert found.latency(spec) / 1e9 == pytest.approx(table.dense, abs=1e-7)
    assert found.latency(half_widths(spec)) < found.latency(spec)


# -- plans


def zeros(model):
    return {path: torch.zeros(axis.size) for path, axis in axes(model).items()}


@pytest.mark.parametrize("choice", ["even", "heads", "free"])
@pytest.mark.parametrize("share", [0.8, 0.5, 0.3])
def test_plans_spend_the_time_they_are_given(choice, share):
    model = small_vit()
    spec = describe(model)
    budget = Budget(latency=share, table=proportional(spec))
    scores = {
        path: torch.rand(zero.shape, generator=torch.Generator().manual_seed(1)) for path, zero in zeros(model).items()
    }
    child = fill(spec, scores, budget, choice=choice).child(spec)
    ratio = budget.cost(child).latency / budget.cost(spec).latency
    assert 0.93 * share <= ratio <= share


def test_widths_follow_the_steps_of_the_table():
    model = small_vit()
    spec = describe(model)
    scores = {
        path: torch.rand(zero.shape, generator=torch.Generator().manual_seed(2)) for path, zero in zeros(model).items()
    }
    child = fill(spec, scores, Budget(latency=0.6, table=stepped(spec, 32)), choice="even").child(spec)
    # A width between two steps costs as much as the next step: nobody would take less than he pays for.
    assert all(block.hidden % 32 == 0 for _, _, block in child.blocks())
    plain = fill(spec, scores, Budget(latency=0.6, table=proportional(spec)), choice="even").child(spec)
    assert any(block.hidden % 32 for _, _, block in plain.blocks())


def test_time_and_macs_and_parameters_bound_together():
    model = small_vit()
    spec = describe(model)
    budget = Budget(latency=0.7, macs=0.5, params=0.9, table=proportional(spec))
    child = fill(spec, zeros(model), budget)
    parent, cost = budget.cost(spec), budget.cost(child.child(spec))
    assert budget.admits(cost, parent)
    assert cost.macs > 0.95 * 0.5 * parent.macs


def test_what_no_widths_reach_is_refused_with_the_fastest():
    model = small_vit()
    spec = describe(model)
    with pytest.raises(BudgetError, match=r"latency must be at least 0\.\d+ .* but got 0\.100"):
        fill(spec, zeros(model), Budget(latency=0.1, table=proportional(spec, host=5e-3)))


def test_a_budget_of_time_needs_a_table_and_a_share():
    assert str(Budget.parse("latency=0.6, macs=0.5")) == "macs=0.5,latency=0.6"
    with pytest.raises(BudgetError, match="share of the parent's"):
        Budget.parse("latency=2G")
    spec = describe(small_vit())
    with pytest.raises(BudgetError, match="measure one first"):
        fill(spec, {}, Budget.parse("latency=0.6"))


def test_spvit_trains_and_decides_by_time():
    model = small_vit()
    spec, how = describe(model), layout(describe(model))
    table = proportional(spec)
    single = SinglePath(model, how).eval()
    priced = times(spec, how, Budget(latency=0.5, table=table))
    with torch.no_grad():
        for gate in single.gate_parameters():
            gate.fill_(9.0)
    total = priced.total(single)
    assert float(total.detach()) == pytest.approx(table.latency(spec), rel=1e-3)
    total.backward()
    assert all(bool((gate.grad > 0).all()) for gate in single.gate_parameters())
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for gate in single.gate_parameters():
            gate.copy_(torch.randn(gate.shape, generator=draw))
    for share in (0.8, 0.5, 0.3):
        budget = Budget(latency=share, table=table)
        child = planned(spec, how, *decide(spec, single, how, budget)).child(spec)
        assert 0.98 * share <= budget.cost(folded(child)).latency / table.latency(spec) <= share


# -- measured


def reading(ratio, spread=0.01, runs=40):
    return Latency(
        seconds=ratio,
        seconds_low=ratio,
        seconds_high=ratio,
        images_per_second=1.0,
        ratio=ratio,
        ratio_low=ratio * (1 - spread / 2),
        ratio_high=ratio * (1 + spread / 2),
        runs=runs,
        repeats=1,
        batch=8,
        image=(3, 32, 32),
        threads=1,
        dtype="float32",
        device="none",
        torch="0",
        timm="0",
    )


def met(model, table, clock, share=0.6, name="magnitude", is_timed=True, spread=0.01):
    """Meet a budget of time on a machine that takes what `clock` says of the child's share of the table's time."""
    method, spec, said = methods.get(name), describe(model), []
    budget = Budget(latency=share, table=table)
    dense = table.latency(spec)
    found = latency_budget.meet(
        model,
        budget,
        lambda b: method.search(model, None, b, seed=0),
        lambda f: apply(f.parent, f.plan),
        lambda child: reading(clock(table.latency(describe(child)) / dense), spread),
        plans_by_time=is_timed,
        say=said.append,
    )
    return found, said


@pytest.mark.parametrize("is_timed", [True, False])
@pytest.mark.parametrize("clock", [lambda t: t, lambda t: 1.25 * t, lambda t: 0.2 + 0.8 * t, lambda t: t**1.5])
def test_what_is_measured_comes_within_five_percent(is_timed, clock):
    model = small_vit()
    found, said = met(model, proportional(describe(model)), clock, is_timed=is_timed)
    assert abs(found.ratio - 0.6) <= 0.05 * 0.6
    assert found.measured == len(said)
    assert found.ratio == pytest.approx(clock(found.predicted))


def test_a_good_table_needs_one_measurement():
    model = small_vit()
    found, _ = met(model, proportional(describe(model)), lambda t: t)
    assert found.measured == 1


def test_a_machine_that_leaps_gets_the_slowest_child_that_meets_the_budget():
    model = small_vit()
    found, said = met(model, proportional(describe(model)), lambda t: 0.3 if t < 0.7 else 1.0)
    assert found.ratio == 0.3
    assert said[-1] == "no plan is nearer to 0.6 of the time than 0.300, which is faster"


def test_a_machine_that_gets_no_faster_is_refused_with_the_best():
    model = small_vit()
    with pytest.raises(BudgetError, match=r"the fastest takes 0\.9\d+ of the dense time, not 0\.6"):
        met(model, proportional(describe(model)), lambda t: 0.9 + 0.1 * t)


def test_a_noisy_machine_is_refused_with_its_spread():
    model = small_vit()
    with pytest.raises(BudgetError, match=r"40 samples of the ratio range from 0\.\d+ to 0\.\d+; stop other work"):
        met(model, proportional(describe(model)), lambda t: t, spread=0.9)


def test_a_run_meets_its_time(monkeypatch, tmp_path):
    model = small_vit()
    spec = describe(model)
    table = here(model)
    monkeypatch.setenv("VITRIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(latency_budget, "make_table", lambda model, **given: table)

    def clock(child, parent, **given):
        return reading(1.1 * table.latency(describe(child)) / table.latency(spec))

    monkeypatch.setattr(latency_budget, "latency", clock)
    for name in ("magnitude", "random"):
        found = vitrim.compress(model, method=name, budget="latency=0.6", out=tmp_path / name)
        assert abs(found.measured["latency_ratio"] - 0.6) <= 0.03
        again = vitrim.compress(model, method=name, budget="latency=0.6", out=tmp_path / name)
        assert again.plan == found.plan
    assert "0.6" in (tmp_path / "random" / "report.html").read_text(encoding="utf-8")
    (tables,) = (tmp_path / "cache" / "latency").iterdir()
    monkeypatch.setattr(latency_budget, "make_table", lambda model, **given: pytest.fail("the table is in the cache"))
    assert latency_budget.table_for(model, Measure()) == table
    other = table.machine.model_copy(update={"device": "another card"})
    tables.write_text(table.model_copy(update={"machine": other}).model_dump_json())
    with pytest.raises(
        BudgetError, match=r"json: the table of times must be of .*, but was made on another card; .*; rem"
    ):
        latency_budget.table_for(model, Measure())
    tables.write_text("{}")
    with pytest.raises(BudgetError, match=str(tables)):
        latency_budget.table_for(model, Measure())


def test_a_runtime_that_reads_onnx_meets_its_time_itself():
    model = small_vit()
    spec = describe(model)
    half = apply(model, fill(spec, zeros(model), Budget(macs=0.5)))
    taken = latency_budget.time_child(half, model, Measure(runtime="onnxruntime", batch=2, threads=1, seconds=0.2))
    assert 0 < taken.ratio < 1.2
    assert taken.dtype == "float32"
    with pytest.raises(ExportError, match=r"must run in float32, but .* is bfloat16"):
        latency_budget.time_child(half, model, Measure(runtime="onnxruntime", dtype="bfloat16"))


def test_a_runtime_that_is_not_there_is_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(ExportError, match=r"vitrim\[openvino\]"):
        vitrim.compress(small_vit(), method="random", budget="latency=0.6", measure={"runtime": "openvino"})


def here(model, **given):
    """A made-up table of the machine that was asked for."""
    given.pop("seconds", None)
    given.pop("width", None)
    return proportional(describe(model)).model_copy(update={"machine": machine_of(model, **given)})


def test_tables_of_other_settings_are_other_files(monkeypatch, tmp_path):
    model = small_vit()
    monkeypatch.setenv("VITRIM_CACHE", str(tmp_path))
    monkeypatch.setattr(latency_budget, "make_table", here)
    for settings in ({}, {"batch": 1}, {"threads": 7}, {"dtype": "bfloat16"}, {"runtime": "compile"}):
        latency_budget.table_for(model, Measure(**settings))
    latency_budget.table_for(small_vit(global_pool="avg"), Measure())
    latency_budget.table_for(model, Measure())
    assert len(list((tmp_path / "latency").iterdir())) == 6


def test_a_table_of_another_version_is_another_file(monkeypatch, tmp_path):
    model, made = small_vit(), []

    def make(model, **given):
        made.append(model)
        return here(model, **given)

    monkeypatch.setenv("VITRIM_CACHE", str(tmp_path))
    monkeypatch.setattr(latency_budget, "make_table", make)
    for _ in range(2):
        latency_budget.table_for(model, Measure())
    assert len(made) == 1
    for name, value in (("__version__", "0.0.1"), ("FORMAT", 0)):
        with monkeypatch.context() as other:
            other.setattr(latency_budget, name, value)
            latency_budget.table_for(model, Measure())
    assert len(made) == len(list((tmp_path / "latency").iterdir())) == 3


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"batch": True}, "batch must be a whole number of at least 1, but got True"),
        ({"batch": 0}, "batch must be a whole number of at least 1, but got 0"),
        ({"batch": 1.5}, "batch must be a whole number of at least 1, but got 1.5"),
        ({"batch": "8"}, "batch must be a whole number of at least 1, but got 8"),
        ({"threads": True}, "threads must be a whole number of at least 1, but got True"),
        ({"threads": 0}, "threads must be a whole number of at least 1, but got 0"),
        ({"runs": True}, "runs must be a whole number of at least 2, but got True"),
        ({"warmup": 0}, "warmup must be a whole number of at least 1, but got 0"),
        ({"seconds": float("nan")}, "seconds must be above 0 and finite, but got nan"),
        ({"seconds": "long"}, "seconds must be above 0 and finite, but got long"),
        ({"seconds": True}, "seconds must be above 0 and finite, but got True"),
        ({"device": "abacus"}, "device must be one of this machine's, but got 'abacus'"),
        ({"device": "meta"}, "device must be one of this machine's, but got 'meta'"),
        ({"dtype": torch.int32}, "dtype must be a floating-point type, but got torch.int32"),
        ({"image": (3, 32)}, "image must be (channels, height, width)"),
        ({"image": 32}, "image must be (channels, height, width)"),
    ],
)
def test_a_time_is_asked_for_as_it_can_be_measured(asked, told):
    with pytest.raises(RecipeError) as caught:
        vitrim.latency(small_vit(), **{"seconds": 0.01, **asked})
    assert told in str(caught.value)


@pytest.mark.parametrize("which", ["model", "reference"])
def test_a_model_without_data_has_no_time(which):
    given = {"model": small_vit(), "reference": small_vit()}
    given[which].to("meta")
    with pytest.raises(WeightsError, match=r"cls_token: weights must hold data, but these are on the meta device"):
        vitrim.latency(**given, seconds=0.01)
    with pytest.raises(WeightsError, match="meta device"):
        vitrim.compress(given[which], method="magnitude", measure={"latency": False})
