"""A report is a pure function of run folders: complete, self-contained, and harmless whatever the names are."""

import csv as reading
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.axes
import pytest

from vitrim import cli
from vitrim.report import csv, html, markdown, sheet, total
from vitrim.report.blocks import HOST, fates, widths
from vitrim.report.curves import curves, trials
from vitrim.report.fronts import courses, front, fronts
from vitrim.report.picture import picture
from vitrim.report.tables import gated, outcome, scored, short
from vitrim.words.costs import cost_of
from vitrim.words.errors import PlanError, RunError
from vitrim.words.plan import BlockPlan, Plan, write_plan
from vitrim.words.spec import Attention, Block, Form, Host, Norm, Skip, Spec, Stage
from vitrim.words.steps.merge import Merge

HOSTILE = '<script>alert("1")</script>|$\\frac{_a*`'


def deit_small(depth: int = 12, heads: int = 6) -> Spec:
    norm = Norm(name="LayerNorm", eps=1e-6)
    form = Form(
        norm=norm, qkv_bias=True, out_bias=True, mlp="plain", activation="GELU", hidden_bias=True, mlp_out_bias=True
    )
    block = Block(mixer=Attention(qk=(64,) * heads, v=(64,) * heads, scale=0.125), hidden=1536)
    stage = Stage(width=384, grid=(14, 14), prefix=1, form=form, blocks=(block,) * depth)
    host = Host(name="deit_small_patch16_224", arguments={}, macs=58_186_752, macs_per_token=3, params=757_096)
    return Spec(family="vit", host=host, image=(224, 224), classes=1000, stages=(stage,))


def uneven(spec: Spec) -> Plan:
    """Uneven heads, dead heads, a branch of dead heads only, skipped branches, and an untouched block."""

    def kept(*counts: int) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(range(count)) for count in counts)

    plans = []
    for index in range(len(spec.blocks())):
        rising = [16 + 4 * ((index + 3 * head) % 12) for head in range(6)]
        plans.append(BlockPlan(qk=kept(*rising), v=kept(*reversed(rising)), hidden=tuple(range(1536 - 100 * index))))
    plans[1] = BlockPlan(qk=kept(64, 0, 48, 64, 0, 16), v=kept(32, 0, 64, 64, 0, 64), hidden=tuple(range(768)))
    plans[3] = BlockPlan(mixer=Skip(), hidden=tuple(range(1200)))
    plans[4] = BlockPlan(qk=kept(64, 64, 64, 0, 0, 0), mlp=Skip())
    plans[5] = BlockPlan(v=kept(0, 0, 0, 0, 0, 0), hidden=())
    plans[6] = BlockPlan()
    plans[7] = BlockPlan(mixer=Skip(), mlp=Skip())
    return Plan.of(spec, plans)


def run_folder(path: Path, **changes: object) -> Path:
    path.mkdir(parents=True)
    parent = deit_small()
    plan = uneven(parent)
    before, after = cost_of(parent), cost_of(plan.child(parent))
    measured = {
        "macs": after.macs,
        "params": after.params,
        "macs_parent": before.macs,
        "params_parent": before.params,
        "macs_ratio": after.macs / before.macs,
        "params_ratio": after.params / before.params,
        "top1": 78.42,
        "top1_parent": 79.84,
        "agreement": 91.2,
        "latency_ms": 41.234,
        "latency_parent_ms": 77.801,
        "latency_ratio": 0.531,
        "latency_ratio_low": 0.502,
        "latency_ratio_high": 0.56,
        "seconds": 912.4,
        "device": "cpu x86_64",
        "threads": 2,
        "batch": 8,
        "dtype": "float32",
        "torch": "2.15.0",
        "timm": "1.0.31",
        "vitrim": "0.1.0",
        "python": "3.11.7",
        "method": "vit_slim",
        "model": "deit_small_patch16_224",
        "budget": "macs=0.5",
        "seed": 0,
        "epochs": 3,
        "date": "2026-11-21",
    } | changes
    (path / "measured.json").write_text(json.dumps(measured))
    (path / "recipe.toml").write_text('[method]\nname = "vit_slim"\n')
    write_plan(path / "plan.json", parent, plan)
    (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log()))
    trials = [{"trial": i, "score": 70 + (i * 7 % 11), "macs": 2e9 + 1e8 * (i % 5)} for i in range(20)]
    (path / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in trials))
    return path


def log() -> list[dict]:
    search = [
        {"stage": "search", "epoch": 0, "step": i, "loss": 3 / (1 + i / 40) + 0.1 * (i % 3), "task": 2 / (1 + i / 40)}
        | {"penalty": 1 / (1 + i / 90), "lr": 1e-3}
        for i in range(200)
    ]
    train = [{"stage": "train", "epoch": i // 100, "step": i, "loss": 1.5 / (1 + i / 99)} for i in range(1000)]
    for i in range(99, 1000, 100):
        train[i]["top1"] = 70 + 8 * (1 - 90 / (i + 1))
    return [*search, *train]


class Reader(HTMLParser):
    """Collects tags and their attributes, and refuses tags that do not close in order."""

    VOID = frozenset({"meta", "br", "img", "input", "link", "hr"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def check_self_contained(page: str) -> Reader:
    reader = Reader(page)
    for tag, attributes in reader.tags:
        assert tag not in {"script", "link", "iframe", "object", "base"}
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in {"src", "href", "xlink:href", "srcset", "data"}:
                assert (value or "").startswith("#")
    assert "@import" not in page
    assert set(re.findall(r"url\((.)", page)) <= {"#"}
    return reader


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_folder(tmp_path_factory.mktemp("runs") / "half")


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return html([folder])


def test_the_page_is_self_contained(page: str):
    check_self_contained(page)


def test_the_page_tells_the_numbers(page: str):
    words = Reader(page).words
    for text in ("78.4 %", "79.8 %", "\N{MINUS SIGN}1.4 points", "0.531 (0.502 to 0.560)", "41.23 ms", "77.80 ms"):
        assert text in words
    for text in ("cpu x86_64", "2.15.0", "macs=0.5", 'name = "vit_slim"', "91.2 %"):
        assert text in words


def test_every_block_is_in_the_page(page: str):
    words = Reader(page).words
    for path, *_ in deit_small().blocks():
        assert page.count(f">{path}<") == 2, "once in the picture, once in the table"
    assert "attention skipped" in words
    assert "MLP skipped" in words
    assert "output bias stays" in words


def test_dead_heads_are_drawn_empty(page: str):
    assert page.count('<rect class="dead"') == 2 + 3 + 6
    assert page.count('<rect class="qk"') == page.count('<rect class="v"') == 9 * 6 + 6 - 2 - 3 - 6


def test_figures_say_what_they_show(page: str):
    pictures = [attributes for tag, attributes in Reader(page).tags if tag == "svg"]
    assert len(pictures) == 3
    assert all(attributes["role"] == "img" and attributes["aria-label"] for attributes in pictures)


def test_plots_take_their_colours_from_the_page(page: str):
    for plot in re.findall(r'<svg class="plot".*?</svg>', page, flags=re.DOTALL):
        assert "var(--" in plot
        assert re.findall(r"#0\d0\d0\d", plot) == []
        assert "DejaVu" not in plot


def test_the_same_folder_gives_the_same_bytes(folder: Path, page: str):
    assert html([folder]) == page
    assert markdown([folder]) == markdown([folder])


def test_several_runs_are_compared(tmp_path: Path):
    folders = [
        run_folder(tmp_path / name / "out", method=name, macs_ratio=share)
        for name, share in zip("ab", (0.5, 0.7), strict=True)
    ]
    reader = check_self_contained(html(folders))
    assert "2 runs" in reader.words
    assert "a/out" in reader.words
    assert "b/out" in reader.words
    text = markdown(folders)
    row = next(line for line in text.splitlines() if line.startswith("| a | macs=0.5 |"))
    assert row.endswith("| a/out |")


def test_hostile_names_stay_text(tmp_path: Path):
    folders = [run_folder(tmp_path / name, method=HOSTILE, model=HOSTILE, device=HOSTILE) for name in ("_$\\x{", "<b>")]
    for path in folders:
        (path / "recipe.toml").write_text(f"# {HOSTILE}")
        (path / "log.jsonl").write_text(json.dumps({"stage": HOSTILE, "step": 1, "loss": 1.0}))
    for chosen in (folders, folders[:1]):
        assert HOSTILE in check_self_contained(html(chosen)).words
        assert "<script" not in markdown(chosen)


@pytest.mark.parametrize("name", ["recipe.toml", "plan.json", "trials.jsonl", "log.jsonl"])
def test_an_unfinished_part_is_left_out(tmp_path: Path, name: str):
    path = run_folder(tmp_path / "run")
    (path / name).unlink()
    assert "78.4 %" in check_self_contained(html([path])).words
    assert "78.4 %" in markdown([path])


def test_bare_results_are_enough(tmp_path: Path):
    path = tmp_path / "run"
    path.mkdir()
    (path / "measured.json").write_text('{"macs": null, "top1": NaN, "params": "many", "seed": null, "x": [1]}')
    check_self_contained(html([path]))
    check_self_contained(html([path, path]))
    assert markdown([path, path])


def test_a_folder_without_results_is_refused(tmp_path: Path):
    with pytest.raises(RunError, match="none: a run folder must exist, but there is none here"):
        html([tmp_path / "none"])
    with pytest.raises(RunError, match="at least one run folder"):
        markdown([])


@pytest.mark.parametrize(
    ("name", "text", "error", "words"),
    [
        ("measured.json", "[]", RunError, "must contain names and values"),
        ("measured.json", "{", RunError, "must be JSON"),
        ("plan.json", "{}", PlanError, "required"),
        ("log.jsonl", "{\n{}\n", RunError, "line 1 is not"),
        ("trials.jsonl", "[1]\n", RunError, "line 1 contains"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, text: str, error: type[Exception], words: str):
    path = run_folder(tmp_path / "run")
    (path / name).write_text(text)
    with pytest.raises(error, match=words) as caught:
        html([path])
    assert name in str(caught.value)


def test_half_a_last_line_is_left_out(tmp_path: Path):
    path = run_folder(tmp_path / "run")
    with (path / "log.jsonl").open("a") as file:
        file.write('{"stage": "tra')
    check_self_contained(html([path]))


def test_markdown_tables_parse(folder: Path):
    text = markdown([folder])
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 4  # the result, the blocks, the trials, where it came from
    for table in tables:
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in table}
        assert len(columns) == 1
        assert re.fullmatch(r"\| ---( \| ---:)+ \|", table[1])
    assert any("4.60 G" in line and "parent" not in line for line in tables[0])


@pytest.mark.parametrize("plan", [uneven(deit_small()), Plan.keep(deit_small())])
def test_the_sheet_sums_to_the_cost(plan: Plan):
    parent = deit_small()
    rows = sheet(parent, plan)
    assert [row.path for row in rows] == [*(path for path, *_ in parent.blocks()), HOST]
    sums, before, after = total(rows), cost_of(parent), cost_of(plan.child(parent))
    assert (sums.macs_before, sums.params_before) == before[:2]
    assert (sums.macs, sums.params) == after[:2]
    assert sums.share == after.macs / before.macs


def test_the_sheet_says_what_is_kept():
    parent = deit_small()
    rows = {row.path.rpartition(".")[2]: row for row in sheet(parent, uneven(parent))}
    assert rows["1"][1:5] == ("4 of 6", "64 + 48 + 64 + 16", "32 + 3x64", "768 of 1,536")
    assert rows["3"][1:5] == ("skipped", "", "", "1,200 of 1,536")
    assert rows["4"][1:5] == ("3 of 6", "3x64", "3x64", "skipped")
    assert rows["5"][1:5] == ("0 of 6", "0", "0", "0 of 1,536")
    assert rows["6"][1:5] == ("6 of 6", "6x64", "6x64", "1,536 of 1,536")
    assert (rows["6"].share, rows["7"].macs, rows["7"].share) == (1.0, 0, 0.0)


def test_a_parent_without_branches_is_told_so():
    block = Block(mixer=Skip(), hidden=None)
    parent = deit_small(1)
    bare = parent.model_copy(update={"stages": (parent.stages[0].model_copy(update={"blocks": (block,)}),)})
    row = sheet(bare, Plan.keep(bare))[0]
    assert (row.heads, row.hidden, row.share) == ("none", "none", None)


def test_a_plan_for_another_model_is_refused():
    with pytest.raises(PlanError, match="another model"):
        fates(deit_small(), Plan.keep(deit_small(3)))


def test_many_widths_become_a_range():
    assert widths((8, 16, 24, 32, 40)) == "8 to 40, sum 120"
    assert widths((64,) * 16) == "16x64"
    assert widths(()) == "0"


@pytest.mark.parametrize(
    ("value", "text"),
    [(4_598_882_304, "4.60 G"), (22_050_664, "22.1 M"), (134_936, "135 k"), (12, "12"), (1e9, "1.00 G")],
)
def test_counts_have_units(value: float, text: str):
    assert short(value) == text


def test_the_outcome_says_only_what_is_known():
    assert "of parent.safetensors;" in outcome({"model": "/home/me/parent.safetensors", "top1": 70.0})
    assert outcome({"method": "taylor"}) == "taylor made a smaller model."
    assert outcome({"method": "m", "macs_ratio": 0.5, "top1": 70.0}) == (
        "m made a model with 50.0 % of the multiply-accumulates; top-1 is 70.0 %."
    )
    assert "+0.0 points" in outcome({"top1": 70.0, "top1_parent": 70.01})


@pytest.mark.parametrize("stages", [1, 2, 3, 5])
def test_each_stage_has_its_panels(stages: int):

    lines = [{"stage": f"s{i}", "step": j, "loss": 1.0 / (j + 1), "top1": j} for i in range(stages) for j in range(3)]
    words = Reader(curves(lines)).words
    for i in range(stages):
        assert f"loss, s{i}" in words
        assert f"top-1 in percent, s{i}" in words


def test_without_numbers_there_are_no_plots():

    assert curves([]) is None
    assert curves([{"stage": "train", "step": 1, "loss": None}]) is None
    assert trials([{"trial": 1}]) is None
    assert trials([{"stage": "latency", "macs": 5}]) is None
    assert fronts([]) is None
    assert courses([]) is None


@pytest.mark.parametrize(("name", "best"), [("score", [70, 74, 74, 77]), ("loss", [70, 70, 66, 66])])
def test_trials_are_drawn_with_the_best_so_far(name, best, monkeypatch):
    drawn = []
    real = matplotlib.axes.Axes.step
    monkeypatch.setattr(
        matplotlib.axes.Axes, "step", lambda self, x, y, **how: (drawn.append((x, y)), real(self, x, y, **how))
    )
    records = [{"trial": 3, "macs": 5}, {"trial": 0, "macs": 5}, {"trial": 2, "macs": 5}, {"trial": 1, "macs": 5}]
    values = (77, 70, 66, 74)
    records = [record | {name: value} for record, value in zip(records, values, strict=True)]
    words = Reader(trials(records)).words
    assert drawn == [([0, 1, 2, 3], best)]
    assert "best so far" in words
    assert "multiply-accumulates" not in words, "all cost the same"
    assert (
        "multiply-accumulates"
        in Reader(trials([{**record, "macs": 9} if not n else record for n, record in enumerate(records)])).words
    )


def test_scores_of_held_out_images_are_drawn_and_listed_as_what_they_are():
    records = [
        {
            "trial": n,
            "score": -loss,
            "measure": "loss",
            "macs": 2_000_000,
            "params": 9,
            "heads": [3, 2],
            "neurons": [4, 4],
        }
        | {"tokens": [17, 12], "best": loss == 1.25}
        for n, loss in enumerate([1.5, 1.25, *(2.0 + n for n in range(12))])
    ]
    table = scored(records)
    assert table.caption == "The best 10 of 14 trials"
    assert table.rows[0] == ("1", "loss 1.2500 nats", "2.00 M", "9", "5", "8", "17, 12", "taken")
    assert table.rows[1][1] == "loss 1.5000 nats"
    assert "Loss of 14 trials" in trials(records)
    assert scored([{"trial": 0, "score": 71.5, "measure": "top1"}]).rows == [("0", "top1 71.50 %", "–", "–", "")]  # noqa: RUF001
    assert scored([{"trial": 0, "loss": 1.0}, {"trial": 1, "score": None}]) is None


def test_what_gates_left_is_a_row_for_each_block():
    records = [{"path": f"b{n}", "mlp": 0.5 / (n + 1), "macs": 1000 * n, "revived": n, "gates": [1]} for n in range(2)]
    table = gated(records)
    assert table.head == ("block", "mlp", "macs", "revived")
    assert table.rows == [("b0", "0.5", "0", "0"), ("b1", "0.25", "1,000", "1")]
    assert gated([{"trial": 1, "score": 2.0}]) is None


def test_a_front_is_what_none_beats():
    points = [(0.5, 70.0), (0.4, 60.0), (0.5, 72.0), (0.6, 71.0), (0.9, 72.0), (0.3, 40.0), (0.8, 75.0), (0.4, 60.0)]
    assert front(points) == [(0.3, 40.0), (0.4, 60.0), (0.5, 72.0), (0.8, 75.0)]
    assert front([]) == []


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("three")
    changes = ({"top1": 70.0}, {"top1": 75.0, "macs_ratio": 0.7}, {"top1": 78.0, "macs_ratio": 0.9})
    return [run_folder(root / f"run{i}", method=f"m{i}", **change) for i, change in enumerate(changes)]


def test_many_runs_have_fronts_strips_and_courses(three):
    page = html(three)
    reader = check_self_contained(page)
    labels = [attributes["aria-label"] for tag, attributes in reader.tags if tag == "svg"]
    assert labels[0] == "Top-1 against cost of 3 runs"
    assert labels[1] == "Share of the multiply-accumulates that 3 runs keep of each block"
    assert labels[2] == "Training of 3 runs over steps"
    for words in (
        "multiply-accumulates, of the parent",
        "parameters, of the parent",
        "measured latency, of the parent",
    ):
        assert words in reader.words
    assert "Pareto front" in reader.words
    ids = {attributes["id"] for _, attributes in reader.tags if "id" in attributes}
    for tag, attributes in reader.tags:
        if tag == "a":
            assert attributes["href"].removeprefix("#") in ids
    assert page.count("% of its multiply-accumulates</title>") == 3 * 12


def test_costs_of_different_parents_are_absolute(three, tmp_path):
    other = run_folder(tmp_path / "other", macs_parent=1, device="another")
    words = Reader(html([*three, other])).words
    assert "multiply-accumulates, of the parent" not in words
    assert "measured latency, of the parent" in words, "times of two devices do not compare"
    same = run_folder(tmp_path / "same", macs_parent=1)
    assert "measured latency, ms of a batch" in Reader(html([*three, same])).words


def test_mean_iou_is_the_score_of_segmentation(tmp_path):
    folders = [run_folder(tmp_path / name, top1=None, miou=51.0, miou_parent=53.5) for name in "ab"]
    words = Reader(html(folders)).words
    assert "mean IoU in percent" in words
    assert "\N{MINUS SIGN}2.5 points" in words


def test_agreement_stands_in_for_accuracy(tmp_path):
    folders = [run_folder(tmp_path / name, top1=None, top1_parent=None) for name in "ab"]
    assert "same answer as the parent, percent" in Reader(html(folders)).words


def test_tables_can_be_copied(three):
    words = Reader(html(three)).words
    text = csv(three)
    assert text in words
    lines = list(reading.DictReader(text.splitlines()))
    assert [line["run"] for line in lines] == ["run0", "run1", "run2"]
    for line, folder in zip(lines, three, strict=True):
        measured = json.loads((folder / "measured.json").read_text())
        assert {key: line[key] for key in measured} == {key: str(value) for key, value in measured.items()}
    assert markdown(three).split("\n\n")[1] in words


def test_a_spreadsheet_runs_no_formula(tmp_path):
    folder = run_folder(tmp_path / "run", method="=1+1", model="@x", budget='a,"b"\nc')
    line = next(reading.DictReader(io.StringIO(csv([folder]))))
    assert (line["method"], line["model"], line["budget"]) == ("'=1+1", "'@x", 'a,"b"\nc')


def test_csv_from_the_command_line(three, tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["vitrim", "report", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code or 0, " ".join(capsys.readouterr().err.split())

    assert run(*three, "--csv", tmp_path / "new" / "runs.csv")[0] == 0
    assert (tmp_path / "new" / "runs.csv").read_text() == csv(three)
    code, told = run(*three, "--out", tmp_path / "new" / "runs.csv" / "page.html")
    assert code == 2
    assert "the place must be writable, but is not" in told


def test_the_picture_of_blocks_shows_tokens_where_some_are_lost():
    spec = deit_small()
    merging = Plan.of(
        spec, [BlockPlan(tokens=Merge(count=12)) if index in (3, 6) else BlockPlan() for index in range(12)]
    )
    drawn, whole = picture(fates(spec, merging)), picture(fates(spec, uneven(spec)))
    assert "tokens after" not in whole
    assert 'class="tokens"' not in whole
    widths = [float(width) for width in re.findall(r'<rect class="tokens"[^>]*width="([\d.]+)"', drawn)]
    left = [fate.tokens / fate.tokens_before for fate in fates(spec, merging)]
    assert left[0] == 1
    assert left[3] == 185 / 197
    assert left[-1] == 173 / 197
    assert widths == pytest.approx([84 * share for share in left], abs=0.01)
    assert "stages.0.blocks.3: heads" in drawn
    assert "; 185 of 197 tokens; " in drawn
