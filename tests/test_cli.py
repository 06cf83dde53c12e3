"""The command line: what each command does, and one sentence for each request that cannot be met."""

import inspect
import json
import resource
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import timm
import torch
import typer
from PIL import Image
from safetensors.torch import save_file

import vitrim
from tests.conftest import HANGS
from tests.samples import WHOLE
from vitrim import cli, methods
from vitrim.run import shipped
from vitrim.run.recipe import read_recipe
from vitrim.words.errors import StoreError
from vitrim.words.plain import read_json, read_toml
from vitrim.words.settings import settings_of
from vitrim.words.stopping import Terminated

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
ARGUMENTS = f"model.arguments={json.dumps(TINY)}"
QUICK = ["--set", "measure.latency=false", "--set", "device=cpu", "--set", "data.calibration=16"]
CLASSES = 4

OPTIONS = {
    "compress": "model out method budget data test weights weights-key random-weights image-size classes "
    "channels epochs minutes recover calibration seed track preset set",
    "run": "recipe out track preset set",
    "pareto": "model data out test budgets weights weights-key random-weights image-size classes channels seed set",
    "export": "model out opset batch as-stored int8 int8-weights data test weights weights-key random-weights "
    "image-size classes channels set",
    "released": "model weights out leaves fold",
    "push": "model repository license folder dry-run private revision also",
    "explain": "plan",
    "report": "folders out csv latex baseline",
    "methods": "name",
    "recipes": "name",
    "models": "pattern json",
    "evaluate": "model data weights weights-key random-weights image-size classes channels set",
    "bench": "models reference runtimes batch threads dtype device seconds memory as-stored out",
    "search": "model storage budget method trials data weights weights-key random-weights image-size classes "
    "channels seed out preset set",
    "sweep": "recipe out control jobs track set",
    "transfer": "",
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """Pictures of four classes in two splits, and the weights of a tiny ViT that tells so many apart."""
    root = tmp_path_factory.mktemp("files")
    pictures(root / "images" / "train", 4)
    pictures(root / "images" / "test", 2)
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", num_classes=CLASSES, **TINY).state_dict(), root / "weights.safetensors")
    return root


def pictures(root: Path, each: int, classes: int = CLASSES) -> Path:
    for label in range(classes):
        (root / f"class{label}").mkdir(parents=True)
        for number in range(each):
            Image.new("RGB", (32, 32), (60 * label, 30 * number, 7)).save(root / f"class{label}" / f"{number}.png")
    return root


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a command line in this process; gives the exit code, the output and the error output."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vitrim", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        code = caught.value.code or 0
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def compress(call, files, tmp_path):
    """`vitrim compress` on the tiny model and pictures, with what a test adds."""

    def run(*more, model="test_vit", weights=None, data=None, out=None) -> tuple[int, str, str]:
        given = ["--weights", weights or files / "weights.safetensors", "--set", ARGUMENTS]
        source = ["--data", data or files / "images"]
        if "--method" not in more:
            source += ["--method", "taylor"]
        return call("compress", model, *given, *source, "--out", out or tmp_path / "run", *QUICK, *more)

    return run


def refused(found: tuple[int, str, str], *told: str, code: int = 2) -> None:
    """Exit 2 (or `code`) with one clear sentence on the error stream, and nothing on the other."""
    came, out, error = found
    lines = error.splitlines()
    assert came == code, error
    assert out == ""
    assert "Traceback" not in error
    assert lines[-1].startswith("error ")
    assert not any(line.startswith("error ") for line in lines[:-1])
    for part in told:
        assert part in lines[-1]


# The frame.


def test_the_options_are_frozen():
    """Whatever else can be set is set with --set, so that a recipe can say it too."""
    command = typer.main.get_command(cli.app)
    found = {
        name: " ".join(parameter.opts[0].lstrip("-") for parameter in each.params)
        for name, each in command.commands.items()
    }
    assert found == OPTIONS
    assert [parameter.opts for parameter in command.params] == [
        ["--version"], ["--install-completion"], ["--show-completion"],
    ]  # fmt: skip


def test_help_and_version(call):
    assert call("--version") == (0, f"vitrim {vitrim.__version__}\n", "")
    code, out, error = call()
    assert (code, error) == (0, "")
    assert call("-h")[:2] == call("--help")[:2] == (0, out)
    for name in OPTIONS:
        assert name in out
        code, text, error = call(name, "-h")
        assert (code, error) == (0, "")
        assert "Usage: vitrim" in text


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["comprss"], "No such command 'comprss'. Did you mean 'compress'?; see `vitrim --help`"),
        (["compress", "--bogus"], "No such option: --bogus"),
        (["compress", "x", "--out", "y", "--budgt", "macs=1"], "--budget"),
        (["compress", "x"], "Missing option '--out'; see `vitrim compress --help`"),
        (["compress"], "Missing argument"),
        (["compress", "x", "--out"], "requires an argument"),
        (["compress", "x", "--out", "y", "--epochs", "many"], "Invalid value for '--epochs'"),
        (["compress", "x", "--out", "y", "--seed", "1.5"], "Invalid value for '--seed'"),
        (["explain", "a", "b"], "unexpected extra argument"),
        (["bench", "x", "--batch", "0"], "batch must be whole numbers of at least 1"),
    ],
)
def test_wrong_usage(arguments, told, call):
    refused(call(*arguments), told)


def test_a_bug_of_ours_is_no_wrong_request(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vitrim", "methods"])
    monkeypatch.setattr(methods, "names", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main()


# What each command does.


def test_compress_then_all_that_reads_it(compress, call, files, tmp_path):
    code, out, error = compress("--budget", "macs=0.7", "--epochs", "1", "--set", "train.batch=4")
    assert code == 0, error
    assert out.startswith("test_vit, taylor at macs=0.7\n") or "test_vit, taylor at macs=0.7" in out.splitlines()[0]
    for row in ("parent", "multiply-accumulates", "parameters", "top-1", "same answer"):
        assert row in out
    assert "opening" not in out
    assert "opening test_vit" in error
    measured = read_json(tmp_path / "run" / "measured.json")
    # Without --test a divided source gives its own.
    assert measured["test_images"] == 8
    assert measured["top1"] is not None
    assert 0.68 < measured["macs_ratio"] <= 0.7

    code, out, error = call("explain", tmp_path / "run" / "plan.json")
    assert (code, error) == (0, "")
    assert "stages.0.blocks.1" in out
    assert "total" in out

    stored = tmp_path / "run" / "model.safetensors"
    code, out, error = call("evaluate", stored, "--data", files / "images")
    assert code == 0, error
    assert f"{measured['top1']:.2f} %" in out
    assert out.splitlines()[-1].split()[-1] == "8"

    code, out, error = call("bench", stored, "--reference", "test_vit", "--seconds", "0.1", "--batch", "1")
    assert code == 0, error
    assert "images/s" in out
    assert "ratio " in out
    assert "threads" in error

    code, out, error = call("report", tmp_path / "run")
    assert (code, error) == (0, "")
    assert out.startswith("#")
    code, out, error = call("report", tmp_path / "run", "--out", tmp_path / "page.html")
    assert (code, out) == (0, "")
    assert "<svg" in (tmp_path / "page.html").read_text()

    # The child is a model like any other.
    code, out, error = call(
        "compress", stored, "--method", "magnitude", "--budget", "macs=0.8", "--out", tmp_path / "next", *QUICK
    )
    assert code == 0, error
    assert read_json(tmp_path / "next" / "measured.json")["macs_parent"] == measured["macs"]

    # The folder's own recipe goes on where it lies, and finds nothing to do.
    before = (tmp_path / "run" / "measured.json").stat().st_mtime_ns
    code, out, error = call("run", tmp_path / "run" / "recipe.toml")
    assert code == 0, error
    assert (tmp_path / "run" / "measured.json").stat().st_mtime_ns == before


def test_run_a_recipe(call, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("small.toml").write_text(
        f"""
        budget = "params=0.8"
        device = "cpu"
        [model]
        name = "test_vit"
        random_weights = true
        [model.arguments]
        num_classes = {CLASSES}
        img_size = 32
        patch_size = 8
        embed_dim = 32
        depth = 2
        num_heads = 2
        [data]
        train = "{files / "images"}"
        [method]
        name = "taylor"
        choice = "heads"
        [measure]
        seconds = 0.1
        batch = 1
        """
    )
    code, out, error = call("run", "small.toml", "--set", "seed=3", "--set", "method.batch=8")
    assert code == 0, error
    known = read_recipe(Path("runs/small/recipe.toml"))
    assert (known.seed, known.method["batch"], known.method["choice"]) == (3, 8, "heads")
    measured = read_json(Path("runs/small/measured.json"))
    assert 0.78 < measured["params_ratio"] <= 0.8
    assert measured["latency_ratio"] > 0
    assert "latency, batch of 1" in out
    refused(call("run", "small.toml"), "its recipe differs in method.batch, seed; choose another --out")


def test_settings_reach_the_recipe(compress, tmp_path):
    code, _, error = compress(
        *("--method", "random", "--budget", "macs=0.9", "--seed", "7"),
        *("--set", "data.mean=[0.5,0.5,0.5]", "--set", "train.clip=none", "--set", "train.distill.kind=none"),
        *("--set", "method.choice=free"),
    )
    assert code == 0, error
    written = read_toml(tmp_path / "run" / "recipe.toml")
    assert written["data"]["mean"] == [0.5, 0.5, 0.5]
    assert written["train"]["clip"] == "none"
    assert written["train"]["distill"]["kind"] == "none"
    assert written["method"] == {"name": "random", "choice": "free", "width": False}
    assert written["seed"] == 7


def test_methods(call):
    code, out, error = call("methods")
    assert (code, error) == (0, "")
    assert all(name in out for name in methods.names())
    code, out, error = call("methods", "taylor")
    assert (code, error) == (0, "")
    assert out.startswith("taylor: ")
    (row,) = [line.split("  ") for line in out.splitlines() if line.startswith("method.batch ")]
    told = [cell.strip() for cell in row if cell.strip()]
    assert told[:3] == ["method.batch", "whole number > 0", "32"]
    assert len(told) == 4
    refused(call("methods", "taylr"), "did you mean 'taylor'?")


@pytest.mark.parametrize("name", methods.names())
def test_every_setting_of_every_method_has_a_meaning(name):
    found = settings_of(methods.settings_of(name))
    assert [each.name for each in found if not each.kind or not each.meaning] == []
    assert all(each.default or each.kind in ("table", "text") for each in found)


def test_recipes(call):
    code, out, error = call("recipes")
    assert (code, error) == (0, "")
    listed = [line.split()[0] for line in out.splitlines()]
    assert {*shipped.names("recipes"), *shipped.names("presets")} <= set(listed)
    for name in ("deit_small_cait_046_short", "imagenet"):
        assert call("recipes", name) == (0, shipped.text_of(name), "")
    refused(call("recipes", "imagnet"), "`vitrim recipes` lists, but got 'imagnet'; did you mean 'imagenet'?")
    refused(call("run", "deit_small_spvt"), "did you mean 'deit_small_spvit'?")
    refused(call("run", "recipes/deit_small_spvit.toml"), "vitrim comes with one, `vitrim run deit_small_spvit`")
    refused(call("run", "ade20k_fpn_deit_small", "--preset", "imagenet"), "this is a segmentation recipe")
    listing = "import sys; from vitrim import cli; cli.app(['recipes'], standalone_mode=False)"
    code = f"{listing}; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def test_a_preset_lies_under_what_is_asked(compress, tmp_path):
    own = ["--epochs", "0.5", "--set", "train.batch=4", "--set", "train.warmup_epochs=0"]
    code, _, error = compress("--method", "random", "--preset", "finetune", *own)
    assert code == 0
    assert "train.batch is 4 as asked, not 64 as in preset finetune" in error
    train = read_recipe(tmp_path / "run" / "recipe.toml").train
    assert (train.epochs, train.batch, train.lr, train.augment.hflip) == (0.5, 4, 2e-4, 0.5)
    again = {"out": tmp_path / "again"}
    refused(
        compress("--preset", "imagenet", "--preset", "finetune", **again), "presets must agree, but train.batch is 1024"
    )
    refused(compress("--minutes", "1", "--preset", "finetune", **again), "presets must agree", "in --minutes and 64 in")
    refused(compress("--preset", "small", **again), "a preset must be one that `vitrim recipes` lists, but got 'small'")
    assert not (tmp_path / "again").exists()


def test_models(call):
    code, out, error = call("models", "vit_tiny_patch16_2*", "--json")
    assert (code, error) == (0, "")
    names = [json.loads(line)["name"] for line in out.splitlines()]
    assert "vit_tiny_patch16_224" in names
    code, out, error = call("models", "vit_tiny_patch16_224")
    assert (code, error) == (0, "")
    assert out.splitlines()[-1].split() == ["vit_tiny_patch16_224", "1.2537", "G", "5.717", "M", "yes"]
    refused(call("models", "resnetx*"), "a pattern must fit a name that timm knows")


# What cannot be done.


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--method", "taylr"], "did you mean 'taylor'?"),
        (["--set", "method.choise=even"], "Method has no field 'choise'; did you mean 'choice'?"),
        (["--set", "trian.lr=1"], "Recipe has no field 'trian'; did you mean 'train'?"),
        (["--set", "train.lrr=1"], "recipe.train: Train has no field 'lrr'; did you mean 'lr'?"),
        (["--set", "lr"], "a setting must look like train.epochs=1, but got 'lr'"),
        (["--set", "model=5"], "model: a setting must be a value or a table, but is given as both"),
        (["--set", "train=5"], "recipe.train: this must be a table of names and values, but got 5"),
        (["--set", "device=gpu"], "recipe.device: "),
        (["--epochs", "-1"], "recipe.train.epochs: "),
        (["--seed", "-1"], "recipe.seed: "),
        (["--budget", "macs=0.01"], "budget of macs must be at least 98,"),
        (["--budget", "half"], "a budget must look like macs=0.5"),
        (["--budget", "macs=1.5"], "must be a share in (0, 1]"),
        (["--budget", "macs=5G"], "must be at most"),
        (["--budget", "flops=0.5"], "a budget must bound macs, params or latency, but got 'flops'"),
        (["--random-weights"], "both a file and random weights"),
        (["--test", "nowhere"], "nowhere: a source must exist"),
        (["--set", "data.class_map=nowhere.txt"], "nowhere.txt: the class map must exist"),
        (["--set", "model.arguments.nothing=1"], "unexpected keyword argument 'nothing'"),
        (["--set", "data.std=[0,0,0]"], "std must be above 0"),
        (["--set", "data.validation=999"], "validation must leave images to train on"),
        (["--set", "train.batch=0"], "recipe.train.batch: "),
        (["--set", "train.precision=fp8"], "recipe.train.precision: "),
    ],
)
def test_wrong_requests(more, told, compress, tmp_path):
    refused(compress(*more), told)
    assert list(tmp_path.iterdir()) == []


def test_wrong_models(compress, call, files, tmp_path):
    out = tmp_path / "run"
    refused(compress(model="vit_tinny_patch16_224"), "did you mean 'vit_tiny_patch16_224'?")
    refused(compress(model="test_resnet", weights=files / "weights.safetensors"), "but")
    state = dict(timm.create_model("test_vit", num_classes=CLASSES, **TINY).state_dict())
    data = (files / "weights.safetensors").read_bytes()
    cases = {
        "short": ({name: value for name, value in state.items() if name != "norm.bias"}, "misses norm.bias"),
        "nan": (
            state | {"norm.bias": torch.full((32,), float("nan"))},
            "norm.bias holds NaN",
        ),
        "other": (timm.create_model("test_vit2", num_classes=CLASSES, img_size=32).state_dict(), "must fit"),
        "classes": (state | {"head.weight": torch.ones(6, 32), "head.bias": torch.ones(6)}, "6 classes of the model"),
        "half": (data[: len(data) // 2], "half.safetensors: the weights file must be whole and readable"),
        "noise": (b"\x10" * 500, "noise.safetensors: the weights file must be whole and readable"),
    }
    for name, (content, told) in cases.items():
        path = tmp_path / f"{name}.safetensors"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            save_file(content, path)
        refused(compress(weights=path), told)
        assert not out.exists()
    path = tmp_path / "half.safetensors"
    refused(call("compress", path, "--data", files / "images", "--out", out), "must be whole safetensors")
    refused(call("evaluate", path, "--data", files / "images"), "must be whole safetensors")
    refused(call("bench", path), "must be whole safetensors")
    assert not out.exists()


def test_wrong_data(compress, tmp_path):
    out = tmp_path / "run"

    def said(data: Path, *told: str, more=()) -> None:
        refused(compress(*more, data=data), *told)
        assert not out.exists()

    good = pictures(tmp_path / "good", 3)
    said(tmp_path / "goood", "a source must exist", "did you mean")
    (tmp_path / "void").mkdir()
    said(tmp_path / "void", "must have at least one image")
    said(pictures(tmp_path / "five", 2, classes=5), "must have the 4 classes of the model, but has 5")
    (pictures(tmp_path / "gap", 2) / "class4").mkdir()
    said(tmp_path / "gap", "every class folder must contain an image, but 'class4' is empty")
    bad = pictures(tmp_path / "bad", 2) / "class1" / "1.png"
    bad.write_bytes(bad.read_bytes()[:60])
    said(tmp_path / "bad", "class1/1.png: every image must decode, but")
    bad.write_bytes(b"no image")
    tar = tmp_path / "good.tar"
    with tarfile.open(tar, "w") as file:
        file.add(good, arcname=".")
    whole = tar.read_bytes()
    assert compress("--budget", "macs=0.9", data=tar, out=tmp_path / "fine")[0] == 0
    tar.write_bytes(whole[: len(whole) // 2])
    said(tar, "good.tar: the tar must be whole")
    tar.write_bytes(b"\x00\x01" * 999)
    said(tar, "good.tar: the tar must be whole")


def test_an_image_found_damaged_while_training(compress, tmp_path):
    bad = pictures(tmp_path / "bad", 2) / "class1" / "1.png"
    good = bad.read_bytes()
    bad.write_bytes(good[:60])
    asked = ["--epochs", "1", "--method", "random", "--set", "data.validation=0"]
    refused(compress(*asked, data=tmp_path / "bad"), "class1/1.png: every image must decode, but")
    assert not (tmp_path / "run" / "model.safetensors").exists()
    bad.write_bytes(good)
    assert compress(*asked, data=tmp_path / "bad")[0] == 0


def test_the_loss_must_be_finite(compress, tmp_path):
    steps = ["--set", "train.batch=4", "--set", "train.checkpoint_every=1", "--set", "train.warmup_epochs=0.6"]
    found = compress("--epochs", "2", "--set", "train.lr=1e30", *steps)
    refused(found, "must be finite", "lower train.lr", "the last good checkpoint is kept at")
    assert list((tmp_path / "run" / "training").iterdir())
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_folders_of_others(compress, call, files, tmp_path):
    assert compress("--budget", "macs=0.7")[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    refused(compress("--budget", "macs=0.6"), "its recipe differs in budget; choose another --out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    refused(compress(out=tmp_path / "mine"), "it holds other files; choose another --out")
    refused(compress(out=tmp_path / "mine" / "thesis.txt"), "must be a folder, but it is a file")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_plans_and_reports_that_cannot_be_read(call, tmp_path):
    refused(call("explain", tmp_path / "plan.json"), "plan.json: the file must exist, but it does not")
    refused(call("explain", tmp_path), "the file must be readable, but")
    (tmp_path / "plan.json").write_text('{"parent": {}, "plan": {}}')
    refused(call("explain", tmp_path / "plan.json"), "plan.json.parent.family: this field is required")
    (tmp_path / "plan.json").unlink()
    refused(call("report", tmp_path), "a folder of runs must contain a run")
    refused(call("run", tmp_path / "recipe.toml"), "recipe.toml: the file must exist")
    (tmp_path / "recipe.toml").write_text("budget = 3")
    refused(call("run", tmp_path / "recipe.toml"), "this field is required")
    assert not (tmp_path / "runs").exists()


def test_wrong_requests_to_the_others(call, files):
    images = files / "images"
    plain = ["evaluate", "test_vit", "--random-weights", "--data", images]
    refused(call(*plain), "must have the 1000 classes of the model, but has 4")
    refused(call(*plain, "--set", "seed=1"), "a setting of evaluate must be of model or data, but got 'seed'")
    refused(call(*plain, "--set", "model=1"), "recipe.model: this must be a table")
    refused(call(*plain, "--set", "data.meen=1"), "did you mean 'mean'")
    refused(call("bench", "test_vitt"), "did you mean 'test_vit'")
    refused(call("bench", "test_vit", "--dtype", "int8"), "dtype must be one of float32, bfloat16, float16")
    refused(call("bench", "test_vit", "--device", "abacus"), "device must be one of this machine's, but got 'abacus'")


@pytest.mark.parametrize("problem", [KeyboardInterrupt, typer.Abort])
def test_interrupted(problem, call, monkeypatch):
    def stop(*arguments, **more):
        raise problem

    monkeypatch.setattr(methods, "names", stop)
    refused(call("methods"), "interrupted; the same command continues from the last checkpoint", code=130)


@pytest.mark.parametrize(
    ("problem", "told"),
    [
        (OSError(28, "No space left on device"), "a file: must be readable or writable, but is not: no space left"),
        (OSError(30, "Read-only file system", "/x"), "/x: must be readable or writable, but is not: read-only"),
        (MemoryError(), "there must be enough memory for this command"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "there must be enough memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), "enough memory"),
    ],
)
def test_the_machine_refuses(problem, told, call, monkeypatch):
    """What no command foresees of a file system or of memory is a sentence all the same."""

    def stop(*arguments, **more):
        raise problem

    monkeypatch.setattr(methods, "names", stop)
    refused(call("methods"), told)


def test_a_closed_pipe_is_no_error():
    piped = f"{sys.executable} -m vitrim recipes | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", piped], capture_output=True, text=True, check=False)
    assert done.stdout.strip() in ("0", "141")
    assert done.stderr == ""


# As a process.


def process(*arguments) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vitrim", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_explain_answers_at_once(compress, tmp_path):
    assert compress("--method", "random")[0] == 0
    plan = tmp_path / "run" / "plan.json"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = process("explain", plan)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    # Seconds of processor time, which a busy machine does not stretch; 0.3 on a quiet one (benchmarks/speed.py).
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    code = f"import sys; from vitrim import cli\nsys.argv = ['vitrim', 'explain', {str(plan)!r}]\n" + inspect.cleandoc(
        """
        try:
            cli.main()
        finally:
            assert not {"torch", "timm"} & set(sys.modules)
        """
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("stop", "code", "words"), [(KeyboardInterrupt, 130, "interrupted; "), (Terminated, 143, "terminated; ")]
)
@pytest.mark.parametrize("raised", [RuntimeError("trying to pop from empty mode stack"), StoreError("not whole")])
def test_a_stop_that_breaks_a_library_is_a_stop(raised, stop, code, words, monkeypatch, capsys):
    """A signal between two lines of PyTorch leaves its stack of modes uneven, which then raises an error of its own."""

    def broken(*_, **__):
        try:
            raise stop
        finally:
            raise raised

    monkeypatch.setattr(cli, "app", broken)
    monkeypatch.setattr("sys.argv", ["vitrim", "models"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == code
    assert f"{words}the same command continues" in " ".join(capsys.readouterr().err.split())


def test_a_wrong_request_as_a_process(tmp_path):
    done = process("compress", "vit_tinny_patch16_224", "--method", "random", "--out", tmp_path / "run")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].endswith("did you mean 'vit_tiny_patch16_224'?")
    assert not (tmp_path / "run").exists()


STOPPED = [(signal.SIGINT, 130, "interrupted; "), (signal.SIGTERM, 143, "terminated; ")]


@pytest.mark.parametrize(("number", "code", "told"), STOPPED if WHOLE else STOPPED[:1])
def test_a_stop_leaves_a_run_that_goes_on(number, code, told, files, tmp_path):
    weights = ["--weights", files / "weights.safetensors", "--set", ARGUMENTS]
    asked = ["test_vit", *weights, "--data", files / "images", "--method", "random", "--epochs", "5000", *QUICK]
    steps = ["--set", "train.batch=4", "--set", "train.log_every=1"]
    command = [sys.executable, "-m", "vitrim", "compress", *map(str, asked), *steps, "--out", str(tmp_path / "run")]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "log.jsonl"
    try:
        while not log.exists() and running.poll() is None:
            time.sleep(0.02)
        running.send_signal(number)
        out, error = running.communicate(timeout=HANGS)
    finally:
        running.kill()
    found = (running.returncode, out, error)
    refused(found, f"{told}the same command continues from the last checkpoint", code=code)
    assert len(list((tmp_path / "run" / "training").glob("train-*.safetensors"))) == 1
    assert not (tmp_path / "run" / "model.safetensors").exists()
