"""`vitrim pareto`, `--calibration`, `--recover` and `--minutes`: from the command line to the files."""

import sys
import xml.etree.ElementTree as ElementTree

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.test_cli import ARGUMENTS, CLASSES, TINY
from vitrim import cli
from vitrim.deploy import store
from vitrim.families import describe
from vitrim.run import curve
from vitrim.run.recipe import read_recipe
from vitrim.train import Train
from vitrim.words.errors import DataError
from vitrim.words.plain import read_json

QUICK = ("--set", ARGUMENTS, "--set", "device=cpu", "--set", "data.calibration=24", "--set", "data.validation=8")


def noisy(root, each):
    """Pictures that differ from place to place: statistics of plain ones would be refused."""
    draw = torch.Generator().manual_seed(each)
    for label in range(CLASSES):
        (root / f"class{label}").mkdir(parents=True)
        for number in range(each):
            values = torch.randint(0, 256, (32, 32, 3), generator=draw, dtype=torch.uint8)
            Image.fromarray(values.numpy()).save(root / f"class{label}" / f"{number}.png")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    noisy(root / "images" / "train", 8)
    noisy(root / "images" / "test", 2)
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=CLASSES, **TINY).state_dict(), root / "weights.safetensors")
    return root


@pytest.fixture
def call(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["vitrim", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code or 0, *capsys.readouterr()

    return run


def source(files):
    return ("test_vit", "--weights", files / "weights.safetensors", "--data", files / "images")


def test_one_calibration_many_budgets(call, files, tmp_path):
    out = tmp_path / "curve"
    timed = ("--set", "measure.seconds=0.1", "--set", "measure.threads=1")
    budgets = ("--budgets", "macs=0.8", "--budgets", "macs=0.6")
    code, text, error = call("pareto", *source(files), "--out", out, *budgets, *QUICK, *timed)
    assert code == 0, error
    assert "macs=0.8" in text
    assert "macs=0.6" in text
    made = {path.name for path in out.iterdir()}
    assert made == {"calibration.safetensors", "macs=0.8", "macs=0.6", "pareto.svg", "report.html"}
    root = ElementTree.parse(out / "pareto.svg").getroot()
    assert root.tag.endswith("svg")
    assert "Accuracy against cost" in (out / "report.html").read_text()
    written = (out / "calibration.safetensors").read_bytes()

    # a further budget is read off the same file, here or by compress
    code, text, error = call("pareto", *source(files), "--out", out, "--budgets", "macs=0.5", *QUICK, *timed)
    assert code == 0, error
    assert (out / "calibration.safetensors").read_bytes() == written
    calibrated = ("--calibration", out / "calibration.safetensors", "--set", "measure.latency=false")
    code, text, error = call(
        "compress", *source(files), "--out", tmp_path / "one", "--budget", "macs=0.5", *calibrated, *QUICK
    )
    assert code == 0, error
    one, other = (store.load(path / "model.safetensors") for path in (tmp_path / "one", out / "macs=0.5"))
    assert describe(one) == describe(other)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))

    # nothing is calibrated for another model, and nothing is half written
    torch.manual_seed(1)
    save_file(timm.create_model("test_vit", num_classes=CLASSES, **TINY).state_dict(), tmp_path / "other.safetensors")
    code, _, error = call(
        "pareto",
        "test_vit",
        "--weights",
        tmp_path / "other.safetensors",
        "--data",
        files / "images",
        "--out",
        out,
        *QUICK,
    )
    assert code == 2
    assert "its weights were others" in error
    code, _, error = call(
        "compress", *source(files), "--out", tmp_path / "two", "--method", "taylor", *calibrated, *QUICK
    )
    assert code == 2
    assert "leave one of them out" in error
    assert not (tmp_path / "two").exists()


def test_a_budget_that_fails_keeps_the_others(call, files, tmp_path, monkeypatch):
    out = tmp_path / "curve"
    quick = (*QUICK, "--set", "measure.latency=false")
    budgets = [part for budget in ("macs=0.8", "macs=0.7", "macs=0.6") for part in ("--budgets", budget)]
    real = curve.run

    def run(recipe, folder, **how):
        if recipe.budget == "macs=0.7":
            raise DataError("image 7 must decode, but does not")
        return real(recipe, folder, **how)

    monkeypatch.setattr(curve, "run", run)
    code, text, error = call("pareto", *source(files), "--out", out, *budgets, *quick)
    assert code == 2
    assert "macs=0.8" in text
    assert "macs=0.6" in text
    told = " ".join(error.split())
    assert "macs=0.7 did not: image 7 must decode, but does not; the calibration and the other budgets are kept" in told
    assert (out / "macs=0.6" / "measured.json").is_file()
    assert "macs=0.6" in (out / "report.html").read_text()
    before = (out / "calibration.safetensors").read_bytes()
    monkeypatch.setattr(curve, "run", real)
    code, text, error = call("pareto", *source(files), "--out", out, *budgets, *quick)
    assert code == 0, error
    assert "macs=0.7" in text
    assert (out / "calibration.safetensors").read_bytes() == before

    # However it ends, what is finished is drawn.
    def crash(recipe, folder, **how):
        if recipe.budget == "macs=0.6":
            raise MemoryError
        return real(recipe, folder, **how)

    (out / "report.html").unlink()
    monkeypatch.setattr(curve, "run", crash)
    with pytest.raises(MemoryError):
        curve.pareto(
            read_recipe(out / "macs=0.8" / "recipe.toml").model_dump(mode="json"), out, ("macs=0.8", "macs=0.6")
        )
    assert (out / "report.html").is_file()


def test_minutes_train_without_labels_and_end(call, files, tmp_path):
    code, _, error = call(
        "compress", *source(files), "--out", tmp_path / "run", "--method", "magnitude", "--budget", "macs=0.7",
        "--recover", "ridge", "--minutes", "0.005", "--set", "measure.latency=false", "--set", "train.log_every=1",
        *QUICK,
    )  # fmt: skip
    assert code == 0, error
    known = read_recipe(tmp_path / "run" / "recipe.toml")
    assert known.recover == "ridge"
    assert isinstance(known.train, Train)
    assert known.train.minutes == 0.005
    assert known.train.distill.alpha == 1
    log = [line for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines() if '"event": "step"' in line]
    assert 1 <= len(log) < 2000  # of the 2,000 steps that 1000 epochs would be
    assert read_json(tmp_path / "run" / "measured.json")["macs_ratio"] <= 0.7
    code, _, error = call(
        "compress", *source(files), "--out", tmp_path / "both", "--minutes", "1", "--epochs", "1", *QUICK
    )
    assert code == 2
    assert "both are given" in error


def test_ridge_is_refused_where_there_is_nothing_to_fit_with(call, files, tmp_path):
    code, _, error = call(
        "compress", "test_vit", "--weights", files / "weights.safetensors", "--out", tmp_path / "run", "--method",
        "magnitude", "--recover", "ridge", *QUICK[:4],
    )  # fmt: skip
    assert code == 2
    assert "recover=ridge must have images" in error
    code, _, error = call(
        "compress", *source(files), "--out", tmp_path / "own", "--method", "post_training", "--recover", "ridge", *QUICK
    )
    assert code == 2
    assert "makes its own" in error
    assert not (tmp_path / "own" / "model.safetensors").exists()
