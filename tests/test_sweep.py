"""A grid of runs: what is run, what is resumed, what is shared, and the table that comes out of it."""

import json
import os
import statistics
import sys

import pytest
import timm
import torch
from filelock import FileLock
from safetensors.torch import save_file

from vitrim import cli, report
from vitrim.report.folder import read_runs
from vitrim.report.groups import group_numbers
from vitrim.run import sweep as sweeping
from vitrim.run.grid import controls, grid, values_of
from vitrim.run.lock import holding
from vitrim.run.recipe import overrides
from vitrim.run.sweep import sweep
from vitrim.words.errors import MethodError, RecipeError, RunError
from vitrim.words.plain import read_json

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
BASE = {
    "model": {"name": "test_vit", "random_weights": True, "arguments": TINY},
    "method": {"name": "random"},
    "budget": "macs=0.6",
    "measure": {"latency": False},
    "device": "cpu",
}
GRID = ["seed=0,1", "method.name=random,magnitude"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "runs"
    return sweep(BASE, GRID, folder)


class TestGrid:
    def test_values_are_divided_outside_of_brackets_and_quotes(self):
        assert values_of("seed=0,1,2") == ("seed", ["0", "1", "2"])
        assert values_of("budget=macs=0.7,macs=0.5") == ("budget", ["macs=0.7", "macs=0.5"])
        assert values_of('budget="macs=0.7,params=0.7",macs=0.5')[1] == ['"macs=0.7,params=0.7"', "macs=0.5"]
        assert values_of("data.mean=[0.5,0.5,0.5],[0,0,0]")[1] == ["[0.5,0.5,0.5]", "[0,0,0]"]
        for wrong in ("seed", "seed=", "seed=0,,1", "=1"):
            with pytest.raises(RecipeError, match="must look like seed=0,1,2"):
                values_of(wrong)

    def test_every_combination_is_one_run_with_a_name(self):
        names = [one.name for one in grid(BASE, [*GRID, "budget=macs=0.7,macs=0.5"])]
        assert len(names) == len(set(names)) == 8
        assert "random_macs=0.7_seed=0" in names
        assert "magnitude_macs=0.5_seed=1" in names

    def test_a_joint_budget_is_one_value(self):
        (one,) = grid(BASE, ['budget="macs=0.7,params=0.7"'])
        assert one.recipe.budget == "macs=0.7,params=0.7"
        assert one.name == "random_macs=0.7+params=0.7_seed=0"

    def test_settings_go_to_the_methods_that_have_them(self):
        found = grid(
            {**BASE, "method": {"name": "taylor", "batch": 8}}, ["method.name=taylor,magnitude", "method.batch=4,8"]
        )
        assert sorted((one.recipe.method["name"], one.recipe.method.get("batch")) for one in found) == [
            ("magnitude", None), ("taylor", 4), ("taylor", 8),
        ]  # fmt: skip
        with pytest.raises(MethodError, match="magnitude, random have none called 'choise'; did you mean 'choice'"):
            grid(BASE, ["method.name=magnitude,random", "method.choise=even"])

    def test_a_control_is_trained_as_long_as_search_and_training(self):
        asked = {**BASE, "data": {"train": "digits"}, "train": {"epochs": 2, "lr": 1e-3}}
        planned = grid(
            asked, ["seed=0,1", "budget=macs=0.7,macs=0.5", "method.name=taylor,vit_slim", "method.train.epochs=3"]
        )
        assert len(planned) == 8
        found = controls(planned)
        assert sorted((one.recipe.seed, one.recipe.train.epochs) for one in found) == [(0, 2), (0, 5), (1, 2), (1, 5)]
        assert {one.recipe.budget for one in found} == {"macs=1"}
        assert {one.recipe.train.lr for one in found} == {1e-3}
        assert len({one.name for one in found}) == 4
        with pytest.raises(RecipeError, match="no run of this sweep trains"):
            controls(grid(BASE, GRID))


class TestSweep:
    def test_all_runs_are_made_and_reported(self, swept):
        assert [one.state for one in swept.runs] == ["done"] * 4
        for one in swept.runs:
            assert read_json(one.folder / "measured.json")["macs_ratio"] <= 0.6
        page = (swept.folder / "report.html").read_text()
        assert "4 runs" in page
        assert read_json(swept.folder / "sweep.json")["settings"] == GRID

    def test_again_runs_nothing_and_more_values_add_runs(self, swept, monkeypatch):
        done = []
        real = sweeping.run
        monkeypatch.setattr(
            sweeping, "run", lambda recipe, folder, **how: (done.append(folder.name), real(recipe, folder, **how))
        )
        assert [one.state for one in sweep(BASE, GRID, swept.folder).runs] == ["done"] * 4
        assert done == []
        # Another setting in the names: what is there is found by its recipe.
        more = sweep(BASE, [*GRID, "method.choice=even"], swept.folder)
        assert done == []
        assert {one.folder for one in more.runs} == {one.folder for one in swept.runs}

    def test_a_run_that_another_process_holds_is_left_alone(self, tmp_path):
        lock = FileLock(tmp_path / ".random_macs=0.6_seed=0.lock")
        with lock:
            found = sweep(BASE, ["seed=0,1"], tmp_path)
        assert [one.state for one in found.runs] == ["elsewhere", "done"]
        assert not (tmp_path / "random_macs=0.6_seed=0").exists()
        with holding(tmp_path / "random_macs=0.6_seed=0"):  # as `vitrim run` does
            assert [one.state for one in sweep(BASE, ["seed=0,1"], tmp_path).runs] == ["elsewhere", "done"]
        assert [one.state for one in sweep(BASE, ["seed=0,1"], tmp_path).runs] == ["done", "done"]

    def test_a_failure_stops_no_other_run(self, tmp_path, monkeypatch):
        real = sweeping.run

        def run(recipe, folder, **how):
            if recipe.seed == 0:
                raise MemoryError("out of memory")
            return real(recipe, folder, **how)

        monkeypatch.setattr(sweeping, "run", run)
        found = sweep(BASE, ["seed=0,1", "budget=macs=0.6"], tmp_path)
        assert [one.state for one in found.runs] == ["failed", "done"]
        assert "MemoryError, which says out of memory" in found.runs[0].why

    def test_runs_with_other_images_are_refused(self, swept, tmp_path):
        folder = tmp_path / "runs"
        found = sweep(BASE, ["seed=0,1"], folder)
        for one, count in zip(found.runs, (100, 90), strict=True):
            parts = {"train": {"images": 500}, "test": {"images": count}}
            (one.folder / "data.json").write_text(json.dumps({"parts": parts, "names": [], "class_order": "plain"}))
        told = "seed=0 and random_macs=0.6_seed=1 differ in the number of test images: 100 and 90"
        with pytest.raises(RunError, match=told):
            sweep(BASE, ["seed=0,1"], folder)
        with pytest.raises(RunError, match=told):
            report.html([folder])

    def test_wrong_folders_are_refused(self, swept, tmp_path):
        with pytest.raises(RunError, match="this is a run folder"):
            sweep(BASE, GRID, swept.runs[0].folder)
        with pytest.raises(RecipeError, match="jobs must be at least 1"):
            sweep(BASE, GRID, tmp_path, jobs=0)
        with pytest.raises(RecipeError, match="seed is given twice"):
            sweep(BASE, ["seed=0", "seed=1"], tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_a_process_gets_its_share_of_threads(self, monkeypatch):
        import multiprocessing

        threads = torch.get_num_threads()
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        try:
            count = multiprocessing.get_context("spawn").Value("i", 0)
            torch.set_num_threads(4)
            for place in range(2):
                os.environ.pop("CUDA_VISIBLE_DEVICES", None)
                torch.set_num_threads(4)
                sweeping._begin(count, 2)
                assert (torch.get_num_threads(), os.environ["CUDA_VISIBLE_DEVICES"]) == (2, str(place))
        finally:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
            torch.set_num_threads(threads)


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["vitrim", *map(str, arguments)])
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code or 0, *capsys.readouterr()


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", **TINY).state_dict(), tmp_path / "weights.safetensors")
    recipe = tmp_path / "small.toml"
    recipe.write_text(
        f"""
        device = "cpu"
        [model]
        name = "test_vit"
        weights = "{tmp_path / "weights.safetensors"}"
        arguments = {{{", ".join(f"{key} = {value}" for key, value in TINY.items())}}}
        [measure]
        latency = false
        """
    )
    grid = ["--set", "budget=macs=0.7,macs=0.01", "--set", "method.name=magnitude"]
    code, out, error = call(monkeypatch, capsys, "sweep", recipe, "--out", tmp_path / "runs", *grid)
    assert code == 2
    assert "magnitude_macs=0.7_seed=0" in out
    assert "magnitude_macs=0.01_seed=0 did not: budget of macs must be at least" in " ".join(error.split())
    code, out, error = call(monkeypatch, capsys, "report", tmp_path / "runs", "--latex", tmp_path / "table.tex")
    assert code == 0, error
    assert (tmp_path / "table.tex").read_text().count(r"\\") == 2
    code, out, error = call(monkeypatch, capsys, "report", tmp_path / "runs", "--baseline", "magnitud")
    assert code == 2
    assert "did you mean 'magnitude'" in error
    code, out, error = call(monkeypatch, capsys, "sweep", "ade20k_fpn_deit_small")
    assert code == 2
    assert "this is a segmentation recipe" in error


def test_text_stays_text():
    found = overrides(
        ["model.weights=123", "data.class_map=1", "data.train=1e3", "seed=3", "method.calibration=7"],
        {"method": {"name": "post_training"}},
    )
    assert found == {
        "model": {"weights": "123"}, "data": {"class_map": "1", "train": "1e3"}, "seed": 3,
        "method": {"calibration": "7"},
    }  # fmt: skip
    assert overrides(["data.train=none", "train.clip=none", "data.depth=2", "model.arguments.depth=3"]) == {
        "data": {"train": "none", "depth": 2}, "train": {"clip": "none"}, "model": {"arguments": {"depth": 3}},
    }  # fmt: skip


# The table: what is grouped, paired and averaged.


def made(path, method, seed, top1, budget="macs=0.5", epochs=5, search=0, ratio=0.5):
    path.mkdir(parents=True)
    measured = {"method": method, "budget": budget, "seed": seed, "epochs": epochs, "top1": top1, "top1_parent": 80.0,
                "macs_ratio": ratio, "params_ratio": ratio, "model": "m"}  # fmt: skip
    (path / "measured.json").write_text(json.dumps(measured))
    searched = f"[method.train]\nepochs = {search}\n" if search else ""
    tables = f'[model]\nname = "m"\n[method]\nname = "{method}"\n{searched}[train]\nepochs = {epochs}\n'
    (path / "recipe.toml").write_text(f'seed = {seed}\nbudget = "{budget}"\n{tables}')


@pytest.fixture
def table(tmp_path):
    scores = {"vit_slim": (78.0, 79.0, 80.0), "random": (70.0, 72.0, 71.0)}
    for method, values in scores.items():
        for seed, top1 in enumerate(values):
            made(
                tmp_path / f"{method}{seed}",
                method,
                seed,
                top1,
                search=3 if method == "vit_slim" else 0,
                epochs=2 if method == "vit_slim" else 5,
            )
    for seed, top1 in enumerate((81.0, 80.0, 82.0)):
        made(tmp_path / f"dense{seed}", "magnitude", seed, top1, budget="macs=1", ratio=1)
    return tmp_path


def test_means_deviations_and_paired_differences(table):
    rows = {row.group.method: row for row in group_numbers(read_runs([table]))}
    assert set(rows) == {"dense", "random", "vit_slim"}
    assert {row.finished for row in rows.values()} == {3}
    slim = rows["vit_slim"]
    assert slim.score == (79.0, 1.0, 3)
    assert slim.parent.mean == pytest.approx(-1.0)
    differences = [78 - 81, 79 - 80, 80 - 82]
    assert slim.control.mean == pytest.approx(statistics.fmean(differences))
    assert slim.control.deviation == pytest.approx(statistics.stdev(differences))
    differences = [78 - 70, 79 - 72, 80 - 71]
    assert slim.baseline.mean == pytest.approx(statistics.fmean(differences))
    assert slim.baseline.deviation == pytest.approx(statistics.stdev(differences))
    assert rows["dense"].control is rows["dense"].baseline is rows["random"].baseline is None
    text = report.markdown([table])
    assert "against random" in text
    assert "| 2 |" not in text.split("# Mean")[1].split("\n\n")[1]
    assert "3 + 2" in text


def test_an_unfinished_run_is_counted_and_told(table):
    (table / "vit_slim2" / "measured.json").unlink()
    (table / "vit_slim2" / "log.jsonl").write_text('{"stage": "search", "step": 1200, "loss": 1.0}\n')
    rows = {row.group.method: row for row in group_numbers(read_runs([table]))}
    assert (rows["vit_slim"].finished, rows["vit_slim"].score.size) == (2, 2)
    text = report.markdown([table])
    assert "2 of 3" in text
    assert "not finished: searching, step 1,200" in text
    assert "searching, step 1,200" in report.html([table])
    assert r"vit\_slim is not finished: searching" in report.markdown([table / "vit_slim2"])


def test_names_colors_and_places_of_runs(table):
    made(table / "vit_slim-b", "vit_slim", 0, 78.0, epochs=2, search=3)
    runs = read_runs([table])
    names = [run.name for run in runs]
    assert len(set(names)) == len(names)
    assert "vit_slim, macs=0.5, seed 0 (vit_slim-b)" in names
    assert "dense, seed 0" in names
    page = report.html([table])
    # Two runs at one place share a label with both of their numbers.
    first, other = sorted(
        names.index(f"vit_slim, macs=0.5, seed 0 ({path})") + 1 for path in ("vit_slim0", "vit_slim-b")
    )
    assert f">{first}, {other}</text>" in page
    assert page.count('class="swatch" style="background:var(--ink)"') == 3


def test_a_setting_that_differs_is_in_the_name_and_parts_the_groups(tmp_path):
    for number, choice in enumerate(("even", "free")):
        made(tmp_path / choice, "taylor", 0, 70.0 + number)
        with (tmp_path / choice / "recipe.toml").open("a") as file:
            file.write(f'[extra]\nchoice = "{choice}"\n')
    rows = group_numbers(read_runs([tmp_path]))
    assert [row.group.method for row in rows] == ["taylor (choice=even)", "taylor (choice=free)"]


def test_latex_and_formulas(table):
    made(table / "odd", "-1+1_%", 0, 70.0)
    text = report.latex([table])
    assert text.startswith("% Mean")
    assert r"-1+1\_\%" in text
    assert text.count(r"\\") == text.count(" & ") / 8 == 5
    assert "'-1+1_%" in report.csv([table])
    assert ",-1.0," in report.groups_csv([table])


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"must contain a run .* but contains none"):
        report.markdown([tmp_path])
    with pytest.raises(RunError, match="none here"):
        report.markdown([tmp_path / "nowhere"])
