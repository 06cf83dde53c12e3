"""What runs say, record and compare of their images, and what they warn of."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tests.test_data_order import MANY, grey_folders
from tests.test_run import TINY
from vitrim import families, report
from vitrim.cli import main
from vitrim.data import Images, Input
from vitrim.deploy import store
from vitrim.run.images import FILE
from vitrim.run.pipeline import compress, run
from vitrim.run.recipe import Recipe
from vitrim.run.remarks import chance_of, remarks, standard_error, why_at_chance
from vitrim.train import Train, fit
from vitrim.words.errors import DataError, RunError
from vitrim.words.plain import load, read_json

QUIET = {"latency": False}


def coloured(root: Path, names: list[str], each: int = 8, seed: int = 0) -> Path:
    """Class folders of a color each, with noise."""
    draw = np.random.default_rng(seed)
    for place, name in enumerate(names):
        (root / name).mkdir(parents=True)
        colour = np.asarray([(place % 2) * 200, (place // 2 % 2) * 200, (place // 4) * 200])
        for number in range(each):
            pixels = (colour + draw.integers(0, 40, (32, 32, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


NAMES = ["10", "9", "1", "2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """Folders of four colors, and a model that was trained on them with the numbers of plain order, stored."""
    root = tmp_path_factory.mktemp("colors")
    coloured(root / "data" / "train", NAMES, 16)
    coloured(root / "data" / "test", NAMES, 8, seed=1)
    torch.manual_seed(0)
    model = families.adopt(timm.create_model("test_vit", **(TINY | {"num_classes": 4})))
    pictures = [(path, sorted(NAMES).index(path.parent.name)) for path in sorted((root / "data/train").glob("*/*.png"))]
    images = Images(lambda n: Image.open(pictures[n][0]).convert("RGB"), [label for _, label in pictures], classes=4)
    fit(model, images, Train(epochs=12, batch=16, lr=2e-3), input=Input.of(model), seed=0)
    store.save(model.eval(), root / "parent.safetensors")
    return root / "parent.safetensors", root / "data"


def recipe(model: Path, data: Path, **changes) -> Recipe:
    base = {
        "model": {"name": str(model)},
        "data": {"train": str(data), "calibration": 16, "validation": 0},
        "method": {"name": "taylor"},
        "budget": "macs=0.8",
        "measure": QUIET,
        "device": "cpu",
    }
    return load(Recipe, base | changes)


def test_a_run_finds_says_and_keeps_the_order(trained, tmp_path):
    said: list[str] = []
    result = run(recipe(*trained), tmp_path / "run", say=said.append)
    assert result.measured["top1_parent"] > 90
    told = "\n".join(said)
    assert "classes are numbered in plain order, according to the model" in told
    assert "64 images of data (train), 4 classes in plain order (0 '1', 1 '10', 2 '2', ...); nothing left out" in told
    record = read_json(tmp_path / "run" / FILE)
    assert (record["class_order"], record["names"]) == ("plain", ["1", "10", "2", "9"])
    assert record["line"] == result.measured["data"]
    assert record["parts"]["test"]["images"] == result.measured["test_images"] == 32

    # Asked for the other order, the parent is at 17 % or so, which is warned of.
    for order, least, most in (("natural", 0, 60), ("plain", 90, 100)):
        told_so = recipe(*trained)
        told_so = told_so.model_copy(update={"data": told_so.data.model_copy(update={"class_order": order})})
        assert least <= run(told_so, tmp_path / order).measured["top1_parent"] <= most


def test_a_resumed_run_reads_what_it_began_with(trained, tmp_path):
    model, source = trained
    data = shutil.copytree(source, tmp_path / "data")
    out = tmp_path / "run"
    run(recipe(model, data), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    said: list[str] = []
    run(recipe(model, data), out, say=said.append)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not any("according to the model" in line for line in said), "the order is known"

    def refused(what: str) -> None:
        with pytest.raises(RunError, match=what):
            run(recipe(model, data), out)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before

    shutil.copy(data / "train" / "1" / "0.png", data / "train" / "1" / "more.png")
    refused("must resume with the images that it began with, but the number of images differ")
    (data / "train" / "1" / "more.png").unlink()
    for split in ("train", "test"):
        (data / split / "10").rename(data / split / "11")
    refused("the classes differ: number 1 was '10' and is '11'")
    record = json.loads((out / FILE).read_text())
    for split in ("train", "test"):
        (data / split / "11").rename(data / split / "10")
    for text in ("{", "[]", json.dumps(record | {"parts": 3}), json.dumps(record | {"class_order": 1})):
        (out / FILE).write_text(text)
        with pytest.raises(RunError, match=r"data\.json: the file must be"):
            run(recipe(model, data), out)


def test_a_random_parent_is_refused_or_warned_of(trained, tmp_path):
    arguments = TINY | {"num_classes": 4}
    unknown = recipe(*trained).model_copy(
        update={"model": recipe(*trained).model.model_copy(
            update={"name": "test_vit", "random_weights": True, "arguments": arguments})}
    )  # fmt: skip
    with pytest.raises(DataError, match="the predictions of the model do not decide it: it is correct on"):
        run(unknown, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# The command line.


@pytest.fixture
def call(monkeypatch, capsys):
    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vitrim", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        else:
            code = 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_compress_prints_its_images_and_warns(trained, call, tmp_path):
    model, data = trained
    asked = ["compress", model, "--method", "random", "--budget", "macs=0.35", "--set", "measure.latency=false",
             "--set", "device=cpu", "--data", data]  # fmt: skip
    code, _, err = call(*asked, "--out", tmp_path / "run", "--seed", 3)
    assert code == 0
    assert "64 images of data (train), 4 classes in plain order" in err
    measured = read_json(tmp_path / "run" / "measured.json")
    assert measured["agreement"] < 50, "a random cut to a third is meant to lose the parent's answers"
    assert "warning: " in err
    assert "the child gives its parent's answer on" in err
    assert "gives its parent" in (measured["warnings"] or "")
    page = (tmp_path / "run" / "report.html").read_text()
    assert '<p class="warning"><strong>Warning:</strong>' in page
    assert "**Warning:** " in report.markdown([tmp_path / "run"])
    assert f"± {measured['top1_error']:.1f} on 32 images of data (test)" in page
    code, _, err = call("compress", model, "--method", "taylor", "--budget", "macs=0.95", "--set", "device=cpu",
                        "--set", "measure.latency=false", "--data", data, "--out", tmp_path / "good")  # fmt: skip
    assert (code, "warning" in err) == (0, False)
    assert read_json(tmp_path / "good" / "measured.json")["warnings"] is None


def test_evaluate_says_error_and_source_and_never_measures_training_images(trained, call, tmp_path):
    model, data = trained
    code, out, err = call("evaluate", model, "--data", data)
    assert code == 0
    assert "32 images of data (test), 4 classes in plain order" in err
    assert "±" in out
    assert out.split()[-1] == "32"
    code, out, err = call("evaluate", model, "--data", data, "--set", "data.class_order=natural")
    assert code == 0
    shutil.copytree(data / "train", tmp_path / "only" / "train")
    code, _, err = call("evaluate", model, "--data", tmp_path / "only")
    assert code == 2
    assert "must not be training images" in err
    code, out, _ = call("evaluate", model, "--data", f"{tmp_path / 'only'}:train")
    assert (code, out.split()[-1]) == (0, "64")


def test_evaluate_warns_of_chance(tmp_path, call):
    source = grey_folders(tmp_path / "grey", [f"class{n:02d}" for n in range(10)], each=4)
    torch.manual_seed(0)
    store.save(families.adopt(timm.create_model("test_vit", **TINY)).eval(), tmp_path / "random.safetensors")
    code, _, err = call("evaluate", tmp_path / "random.safetensors", "--data", source)
    assert code == 0
    assert "warning: the model cannot classify these images: its top-1 of" in err


def test_two_levels_and_order_are_refused_on_the_command_line(trained, call, tmp_path):
    model, _ = trained
    coloured(tmp_path / "deep" / "a", ["w", "x"])
    coloured(tmp_path / "deep" / "b", ["y", "z"])
    out = tmp_path / "run"
    asked = ["compress", model, "--data", tmp_path / "deep", "--out", out, "--budget", "macs=0.9"]
    code, _, err = call(*asked)
    assert (code, out.exists()) == (2, False)
    assert "data.depth=1 gives 2 classes (a, b), data.depth=2 gives 4 classes (w, x, y, ...)" in err
    assert call(*asked, "--set", "data.depth=2", "--set", "measure.latency=false")[0] == 0
    assert read_json(out / FILE)["names"] == ["w", "x", "y", "z"]
    source = grey_folders(tmp_path / "many", MANY, each=2)
    torch.manual_seed(0)
    model = families.adopt(timm.create_model("test_vit", **(TINY | {"num_classes": 40})))
    store.save(model.eval(), tmp_path / "forty.safetensors")
    code, _, err = call("compress", tmp_path / "forty.safetensors", "--data", source, "--out", tmp_path / "two")
    assert (code, (tmp_path / "two").exists()) == (2, False)
    assert "data.class_map" in err


# By hand.


def test_the_standard_error_is_that_of_a_share():
    assert standard_error(50.0, 100) == pytest.approx(5.0)
    assert standard_error(100.0, 100) == 0.0
    assert standard_error(None, 100) is None
    assert standard_error(50.0, 0) is None
    assert chance_of(np.asarray([0, 0, 1, 2])) == 50.0


def test_chance_is_told_from_knowledge():
    assert why_at_chance(11.0, 10.0, 450) is not None
    assert why_at_chance(15.0, 10.0, 450) is None
    assert why_at_chance(None, 10.0, 450) is None
    assert why_at_chance(100.0, 100.0, 4) is None, "one class"


@pytest.mark.parametrize(
    ("measured", "told"),
    [
        ({"top1": 90.0, "top1_parent": 92.0, "agreement": 95.0, "chance": 10.0, "test_images": 400}, []),
        ({"agreement": 11.0, "compared_images": 256}, ["gives its parent's answer on 11.0 % of 256 images only"]),
        (
            {"top1": 40.0, "top1_parent": 92.0, "agreement": 60.0, "chance": 10.0, "test_images": 400},
            ["top-1 drops from 92.0 to 40.0 %"],
        ),
        (
            {"top1": 11.0, "top1_parent": 92.0, "agreement": 12.0, "chance": 10.0, "test_images": 400},
            ["the child has lost its parent's accuracy", "gives its parent's answer"],
        ),
        (
            {"top1": 9.0, "top1_parent": 10.0, "agreement": 90.0, "chance": 10.0, "test_images": 400},
            ["the parent cannot classify these images: its top-1 of 10.0 % on 400 images is that of chance"],
        ),
        (
            {"latency_ratio_low": 0.15, "latency_ratio_high": 4.9},
            ["the ratio of times ranges from 0.15 to 4.90"],
        ),
        ({"latency_ratio_low": 0.5, "latency_ratio_high": 0.6}, []),
    ],
)
def test_remarks(measured, told):
    found = remarks(measured)
    assert len(found) == len(told)
    assert all(part in text for part, text in zip(told, found, strict=True))


def test_measuring_on_training_images_is_remarked(trained):
    model, data = trained
    source = str(data / "train")
    more = {"data": {"class_order": "plain", "calibration": 16, "validation": 0}}
    result = compress(str(model), source, budget="macs=0.95", test=source, measure=QUIET, recipe=more)
    assert "top-1 was measured on the training images" in result.measured["warnings"]
