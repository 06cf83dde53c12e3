"""One straight line from a recipe to a run folder, broken off at every place and taken up again."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader, TensorDataset

import vitrim
from tests.conftest import HANGS
from vitrim.run import job, log
from vitrim.run.machine import on_machine
from vitrim.run.pipeline import Result, compress, run
from vitrim.run.recipe import Recipe, read_recipe
from vitrim.words import plain
from vitrim.words.budget import Budget
from vitrim.words.errors import (
    BudgetError,
    DataError,
    MethodError,
    RecipeError,
    RunError,
    StoreError,
    TrainError,
    VitrimError,
    WeightsError,
)
from vitrim.words.plain import load, read_json
from vitrim.words.plan import Plan, read_plan, write_plan
from vitrim.words.table import Machine, TimeTable

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
QUIET = {"latency": False}
FILES = {
    "recipe.toml",
    "data.json",
    "plan.json",
    "trials.jsonl",
    "log.jsonl",
    "model.safetensors",
    "measured.json",
    "report.html",
}
NUMBERS = "macs params macs_parent params_parent macs_ratio params_ratio seconds test_images".split()
SHORT = {
    "epochs": 0.5,
    "batch": 8,
    "checkpoint_every": 2,
    "log_every": 1,
    "augment": {"kind": "light"},
    "mixup": 0.5,
}
SLIM = {"train": {**SHORT, "epochs": 0.5, "schedule": "constant", "drop_path": 0.1}, "gate_lr": 0.01}


def tiny(seed: int = 0, **changes) -> torch.nn.Module:
    torch.manual_seed(seed)
    return timm.create_model("test_vit", **(TINY | changes))


PICTURES: list[Path] = []


@pytest.fixture(autouse=True, scope="module")
def _pictures(tmp_path_factory):
    """Twelve pictures of each of ten classes, in two splits; and one thread, for the models are tiny."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("pictures")
    class_folders(root / "train", each=8)
    class_folders(root / "test", each=4)
    PICTURES.append(root)
    yield
    torch.set_num_threads(threads)


def class_folders(root: Path, classes: int = 10, each: int = 3) -> Path:
    for label in range(classes):
        (root / f"class{label}").mkdir(parents=True)
        for number in range(each):
            Image.new("RGB", (32, 32), (20 * label, 30 * number, 7)).save(root / f"class{label}" / f"{number}.png")
    return root


def umask_of_the_process() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def asked(**changes) -> Recipe:
    base = {
        "model": {"name": "test_vit", "random_weights": True, "arguments": TINY},
        "data": {"train": str(PICTURES[0]), "calibration": 32},
        "method": {"name": "taylor"},
        "budget": "macs=0.6",
        "measure": QUIET,
        "device": "cpu",
    }
    return load(Recipe, base | changes)


def tensors(count: int = 48, classes: int = 10) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(count, 3, 32, 32, generator=generator), torch.arange(count) % classes)


def check(result: Result, share: float = 0.6) -> None:
    """What every result keeps: the budget spent, a true plan, flat and complete measurements."""
    measured = result.measured
    assert 0.98 * share <= measured["macs_ratio"] <= share
    assert vitrim.cost(result.model) == (measured["macs"], measured["params"])
    assert vitrim.cost(result.parent) == (measured["macs_parent"], measured["params_parent"])
    assert vitrim.describe(result.model) == result.plan.child(vitrim.describe(result.parent))
    assert not result.model.training
    assert all(value is None or isinstance(value, str | int | float) for value in measured.values())
    assert all(isinstance(measured[name], int | float) for name in NUMBERS)
    assert {"top1", "top1_parent", "agreement", "latency_ratio", "latency_ms", "device", "budget"} <= set(measured)


# From Python.


@pytest.mark.parametrize("method", ["random", "magnitude", "taylor", "vit_slim"])
def test_a_timm_model_becomes_smaller(method):
    model = tiny().train()
    before = state_of(model)
    settings = SLIM if method == "vit_slim" else {}
    data = {"taylor": tensors(), "vit_slim": PICTURES[0]}.get(method)
    result = compress(model, data, method=method, budget="macs=0.6", settings=settings, measure=QUIET)
    check(result)
    assert same(state_of(model), before)
    assert model.training
    assert type(model.blocks[0]).__module__.startswith("timm")
    assert all(parameter.grad is None for parameter in model.parameters())
    again = compress(model, data, method=method, budget="macs=0.6", settings=settings, measure=QUIET)
    assert again.plan == result.plan
    assert same(state_of(again.model), state_of(result.model))


def test_the_seed_decides():
    plans = [compress(tiny(), method="random", budget="macs=0.6", seed=seed, measure=QUIET).plan for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]


def test_an_adopted_model_and_a_child_of_one():
    parent = vitrim.adopt(tiny())
    before = state_of(parent)
    first = compress(parent, method="magnitude", budget="macs=0.8", measure=QUIET)
    second = compress(first.model, method="magnitude", budget="macs=0.8", measure=QUIET)
    check(first, 0.8)
    check(second, 0.8)
    assert second.measured["macs_parent"] == first.measured["macs"]
    assert same(state_of(parent), before)
    # A ViT's fourth block is no place to forget: the two plans are one.
    both = vitrim.apply(parent, first.plan.then(second.plan, vitrim.describe(parent)))
    assert same(state_of(both), state_of(second.model))


def test_a_name_with_random_weights():
    more = {"model": {"random_weights": True, "arguments": TINY}, "device": "cpu"}
    one, two = (compress("test_vit", method="random", budget="macs=0.6", measure=QUIET, recipe=more) for _ in range(2))
    check(one)
    assert one.measured["model"] == "test_vit"
    assert same(state_of(one.model), state_of(two.model))


@pytest.mark.parametrize("kind", ["digits", "source", "path", "dataset", "loader", "batches", "generator"])
def test_data_in_every_form(kind, tmp_path):
    images = tensors(32)
    data = {
        "digits": "digits",
        "source": str(PICTURES[0]),
        "path": class_folders(tmp_path / "images"),
        "dataset": images,
        "loader": DataLoader(images, batch_size=8),
        "batches": list(DataLoader(images, batch_size=8)),
        "generator": iter(DataLoader(images, batch_size=8)),
    }[kind]
    result = compress(
        tiny(),
        data,
        method="taylor",
        budget="macs=0.6",
        epochs=0.1,
        train={"batch": 16, "augment": {"kind": "none"}},
        measure=QUIET,
    )
    check(result)
    assert (result.measured["top1"] is not None) == (kind in ("digits", "source"))
    assert result.measured["agreement"] is not None


def test_a_test_set_in_memory_may_hold_fewer_classes():
    result = compress(tiny(), tensors(20, 4), method="taylor", budget="macs=0.6", test=tensors(9, 3), measure=QUIET)
    assert result.measured["test_images"] == 9
    assert result.measured["top1"] is not None


def test_test_images_alone_are_for_measuring(monkeypatch):
    seen = []

    def search(self, model, data, budget, **more):
        seen.append(data)
        return original(self, model, data, budget, **more)

    from vitrim.methods import magnitude

    original = magnitude.Method.search
    monkeypatch.setattr(magnitude.Method, "search", search)
    result = compress(tiny(), method="magnitude", budget="macs=0.6", test=tensors(16), measure=QUIET)
    assert seen == [None]
    assert result.measured["test_images"] == 16


@pytest.mark.parametrize(
    ("kind", "told", "given"),
    [
        (MethodError, "did you mean 'taylor'", {"method": "tailor"}),
        (MethodError, "did you mean 'choice'", {"settings": {"choise": "even"}}),
        (RecipeError, "has no field 'epoch'", {"train": {"epoch": 1}}),
        (RecipeError, "has no field 'latenzy'", {"measure": {"latenzy": 1}}),
        (RecipeError, "a model in memory must be taken as it is", {"recipe": {"model": {"random_weights": True}}}),
        (RecipeError, "must be one of this machine's, but got 'mps'", {"recipe": {"device": "mps"}}),
        (BudgetError, "must be at least 98,624 for this model, but got 4,837", {"budget": "macs=0.01"}),
        (BudgetError, "must be at most 483,776", {"budget": "macs=9G"}),
        (BudgetError, "must look like", {"budget": "half"}),
        (DataError, "taylor needs images; give --data SRC", {"data": None}),
        (DataError, "training needs images", {"data": None, "method": "random", "epochs": 1}),
        (DataError, "must be a source, a dataset or a loader", {"data": 3}),
        (DataError, "a loader must give (images, labels)", {"data": [1, 2]}),
        (DataError, "a multi-hot vector of 10 came", {"data": [(torch.zeros(2, 3, 32, 32), torch.zeros(2, 10))]}),
        (DataError, "must have at least one image", {"data": []}),
        (DataError, "must have the 10 classes of the model, but has 12", {"data": tensors(24, 12)}),
        (
            DataError,
            "must be (3, 32, 32) for this input",
            {"data": TensorDataset(torch.zeros(4, 3, 8, 8), torch.arange(4))},
        ),
        (DataError, "mean must have one value for each", {"recipe": {"data": {"mean": [0.5]}}}),
        (
            RecipeError,
            "must tell the model's 10 classes apart, but has 3; choose another",
            {"recipe": {"teacher": {"name": "resnet10t", "random_weights": True, "arguments": {"num_classes": 3}}}},
        ),
        (
            RecipeError,
            "must take images of 32 x 32, but says: ",
            {"recipe": {"teacher": {"name": "vit_tiny_patch16_224", "random_weights": True}}},
        ),
        (RecipeError, "a model must be a name that timm knows", {"recipe": {"teacher": {"name": "resnet10tt"}}}),
    ],
)
def test_wrong_requests(kind, told, given, tmp_path):
    model = tiny()
    before = state_of(model)
    out = tmp_path / "deep" / "run"
    asked = {"data": tensors(16), "method": "taylor", "budget": "macs=0.6", "measure": QUIET, "out": out}
    with pytest.raises(kind) as caught:
        compress(model, **(asked | given))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, VitrimError)
    assert not out.parent.exists()
    assert same(state_of(model), before)


def test_another_teacher_sees_the_images_as_it_knows_them(monkeypatch, tmp_path):
    """Any timm model teaches, normalised its own way; the recipe says who."""
    seen = []
    named = {"name": "resnet10t", "random_weights": True, "arguments": {"num_classes": 10, "stem_width": 8}}
    teach = job._teacher

    def keep(*given):
        teacher = teach(*given)
        teacher.teacher.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
        return teacher

    monkeypatch.setattr(job, "_teacher", keep)
    compress(
        tiny(), tensors(16), method="random", budget="macs=0.6", epochs=1, measure=QUIET, out=tmp_path / "run",
        train={"batch": 16, "augment": {"kind": "none"}}, recipe={"teacher": named, "data": {"validation": 0}},
    )  # fmt: skip
    mean, std = torch.tensor(((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))).view(2, 3, 1, 1)
    wanted = (tensors(16).tensors[0] / 2 + 0.5 - mean) / std
    assert len(seen) == 2  # one picture to see that it fits, and the step
    order = [pixels[:, 0, 0, 0].argsort() for pixels in (seen[1], wanted)]
    assert torch.allclose(seen[1][order[0]], wanted[order[1]], atol=1e-5)
    recipe = read_recipe(tmp_path / "run" / "recipe.toml")
    assert recipe.teacher is not None
    assert recipe.teacher.name == "resnet10t"


def test_weights_that_are_not_finite():
    model = tiny()
    with torch.no_grad():
        model.head.bias[3] = float("nan")
    with pytest.raises(WeightsError, match=r"head\.bias: weights must be finite"):
        compress(model, method="random", budget="macs=0.6")


# Run folders.


def test_a_budget_may_be_given_as_a_value():
    text, value = (
        compress(tiny(), method="magnitude", budget=budget, measure=QUIET)
        for budget in ("macs=0.6,params=0.9", Budget(macs=0.6, params=0.9))
    )
    assert text.plan == value.plan
    assert text.measured["budget"] == value.measured["budget"] == "macs=0.6,params=0.9"
    with pytest.raises(BudgetError, match=r"but bounds nothing; give macs=0\.5"):
        compress(tiny(), method="magnitude", budget=Budget(), measure=QUIET)
    made = TimeTable(
        machine=Machine(device="cpu", batch=1, threads=1, dtype="float32", torch="2"), stages=(), host=1.0, dense=1.0
    )
    with pytest.raises(BudgetError, match="must have no table"):
        compress(tiny(), method="magnitude", budget=Budget(latency=0.6, table=made), measure=QUIET)


def test_a_run_folder(tmp_path):
    out = tmp_path / "run"
    result = run(asked(train=SHORT), out)
    check(result)
    assert {path.name for path in out.iterdir()} == FILES
    assert read_json(out / "measured.json") == result.measured
    known = read_recipe(out / "recipe.toml").resolved()
    assert known == on_machine(asked(train=SHORT).resolved())
    assert "auto" not in (known.train.precision, known.train.workers, known.train.channels_last)
    parent, plan = read_plan(out / "plan.json")
    assert (parent, plan) == (vitrim.describe(result.parent), result.plan)
    assert same(load_file(out / "model.safetensors"), state_of(result.model))
    assert vitrim.describe(vitrim.load(out / "model.safetensors")) == vitrim.describe(result.model)
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {record["stage"] for record in records} == {"train"}
    assert "<svg" in (out / "report.html").read_text()
    assert {oct(path.stat().st_mode)[-3:] for path in out.iterdir()} == {oct(0o666 & ~umask_of_the_process())[-3:]}
    assert result.measured["test_images"] == 40

    # Done is done: a second call reads what is there.
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    again = run(asked(train=SHORT), out)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()} == before
    assert (again.plan, again.measured) == (result.plan, result.measured)
    assert same(state_of(again.model), state_of(result.model))

    # Another recipe does not touch it.
    with pytest.raises(RunError) as caught:
        run(asked(train=SHORT, seed=1, budget="macs=0.7"), out)
    assert "its recipe differs in budget, seed; choose another --out" in str(caught.value)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()} == before

    # What is missing is made again.
    (out / "measured.json").unlink()
    (out / "report.html").unlink()
    third = run(asked(train=SHORT), out)
    assert {path.name for path in out.iterdir()} == FILES
    changing = {"date"}
    assert {k: v for k, v in third.measured.items() if k not in changing} == {
        k: v for k, v in result.measured.items() if k not in changing
    }


def test_the_stored_child_is_compressed_further(tmp_path):
    first = run(asked(method={"name": "magnitude"}, budget="macs=0.8"), tmp_path / "one")
    model = {"name": str(tmp_path / "one" / "model.safetensors")}
    second = run(asked(model=model, method={"name": "magnitude"}, budget="macs=0.8"), tmp_path / "two")
    check(second, 0.8)
    assert second.measured["macs_parent"] == first.measured["macs"]


def test_folders_that_are_not_for_a_run(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="must be new, empty or a run's, but it holds other files"):
        run(asked(), tmp_path)
    with pytest.raises(RunError, match="must be a folder, but it is a file"):
        run(asked(), tmp_path / "notes.txt")
    with pytest.raises(RunError, match="must be writable and have free space, but not a directory"):
        run(asked(), tmp_path / "notes.txt" / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_damaged_run_folder(tmp_path):
    run(asked(method={"name": "random"}, data={}), tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-50])
    with pytest.raises(StoreError, match="must be whole safetensors"):
        run(asked(method={"name": "random"}, data={}), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole)
    (tmp_path / "recipe.toml").write_text("budget = ")
    with pytest.raises(RecipeError, match="must be TOML"):
        run(asked(method={"name": "random"}, data={}), tmp_path)


def test_a_plan_of_another_model_in_the_folder(tmp_path):
    recipe = asked(method={"name": "random"}, data={})
    run(recipe, tmp_path)
    other = vitrim.describe(tiny(embed_dim=48))
    write_plan(tmp_path / "plan.json", other, Plan.keep(other))
    with pytest.raises(RunError, match="must be for test_vit, but was made for another model"):
        run(recipe, tmp_path)


def test_a_model_in_memory_is_known_again(tmp_path):
    first = compress(tiny(0), method="random", budget="macs=0.6", measure=QUIET, out=tmp_path)
    again = compress(tiny(0), method="random", budget="macs=0.6", measure=QUIET, out=tmp_path)
    assert again.measured == first.measured
    with pytest.raises(RunError, match=r"its recipe differs in model\.name"):
        compress(tiny(1), method="random", budget="macs=0.6", measure=QUIET, out=tmp_path)
    with pytest.raises(RecipeError, match="passed as an instance by another program"):
        run(read_recipe(tmp_path / "recipe.toml"), tmp_path)


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tmp_path):
    recipe = asked(train={**SHORT, "lr": 1e30, "checkpoint_every": 1, "warmup_epochs": 0.25, "mixup": 0})
    with pytest.raises(TrainError, match=r"must be finite, but is .*the last good checkpoint is kept at") as caught:
        run(recipe, tmp_path)
    kept = Path(str(caught.value).rpartition(" ")[2])
    assert kept.is_file()
    assert all(bool(torch.isfinite(value).all()) for value in load_file(kept).values() if value.is_floating_point())
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["recipe.toml", "plan.json", "measured.json", "report.html", "log.jsonl"])
def test_a_full_disk(name, tmp_path, monkeypatch):
    recipe = asked(train={**SHORT, "epochs": 0.3})
    out = tmp_path / "run"
    for kind in ("write_text", "open"):
        original = getattr(Path, kind)

        def full(self, *arguments, _original=original, **more):
            if name in self.name:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))
            return _original(self, *arguments, **more)

        monkeypatch.setattr(Path, kind, full)
    with pytest.raises(RunError, match="must be writable and have free space, but no space left on device") as caught:
        run(recipe, out)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    if name == "recipe.toml":
        assert not out.exists()
    else:
        assert not [path.name for path in out.iterdir() if path.name.startswith(".")]
        assert not (out / name).exists()
    check(run(recipe, out))
    assert {path.name for path in out.iterdir()} == FILES


def test_a_full_disk_while_a_model_is_stored(tmp_path, monkeypatch):
    def full(*arguments, **more):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("vitrim.deploy.store.save_file", full)
    with pytest.raises(StoreError, match="but no space left on device; make room"):
        run(asked(), tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    monkeypatch.undo()
    check(run(asked(), tmp_path))


def test_a_log_that_was_broken_off(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [{"stage": "search", "step": 9}, {"stage": "train", "step": 1}, {"stage": "train", "step": 2}]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"stage": "tr')
    write = log.logger(path)
    assert write is not None
    write({"stage": "train", "step": 2, "new": True})
    write({"stage": "train", "step": 3})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        lines[0],
        lines[1],
        {"stage": "train", "step": 2, "new": True},
        {"stage": "train", "step": 3},
    ]
    assert log.logger(None) is None


# Killed.

ZYGOTE = """
import json, os, signal, sys
from pathlib import Path
import torch
import vitrim.run.pipeline, vitrim.words.plain, vitrim.train.loop, vitrim.words.plan
from vitrim.words.plain import load
from vitrim.run.recipe import Recipe

recipe = load(Recipe, json.loads(sys.argv[1]))
root = Path(sys.argv[2])


def dying(original, dies):
    def call(*arguments, **more):
        if dies(arguments):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **more)
    return call


def interrupted(original):
    def call(*arguments, **more):
        found = original(*arguments, **more)
        os.kill(os.getpid(), signal.SIGINT)
        return found
    return call


def at(moment):
    kind, _, name = moment.partition(" ")
    if kind == "step":
        stage, number = name.split()
        loop = vitrim.train.loop
        loop.learning_rate = dying(
            loop.learning_rate, lambda a, seen=[0]: STAGE[0] == stage and a[0] == int(number)
        )
        record = loop.Loop.go
        def go(self, bar):
            STAGE[0] = self.stage
            return record(self, bar)
        loop.Loop.go = go
    elif kind == "rename":
        original = Path.replace
        Path.replace = dying(original, lambda a: a[1].name == name)
    elif kind == "ctrl-C":
        loop = vitrim.train.loop
        loop.Loop._step = interrupted(loop.Loop._step)


STAGE = [""]


def child(moment, folder):
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code = 1
    try:
        torch.set_num_threads(1)
        if moment:
            at(moment)
        vitrim.run.pipeline.run(recipe, root / folder)
        code = 0
    except KeyboardInterrupt:
        code = 2
    finally:
        os._exit(code)


codes = {"": [child(None, "whole")]}
for number, moment in enumerate(sys.argv[3:]):
    folder = f"killed{number}"
    codes[moment] = [child(moment, folder)]
    codes[moment].append(sorted(p.name for p in (root / folder).rglob("*")))
    codes[moment].append(child(None, folder))
print(json.dumps(codes))
"""

MOMENTS = [
    "rename recipe.toml",
    "step search 3",
    "rename plan.json",
    "rename cut.safetensors",
    "step train 3",
    "rename train-00000004.safetensors",
    "rename model.safetensors",
    "rename measured.json",
    "rename report.html",
    "ctrl-C",
]


@pytest.mark.whole
def test_a_killed_run_ends_like_a_whole_one(tmp_path):
    recipe = asked(method={"name": "vit_slim", **SLIM}, train=SHORT)
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error::UserWarning",
            "-c",
            ZYGOTE,
            json.dumps(plain.dump(recipe)),
            str(tmp_path),
            *MOMENTS,
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=HANGS,
    )
    assert done.returncode == 0, done.stderr
    codes = json.loads(done.stdout)
    assert codes.pop("") == [0], done.stderr
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    measured = read_json(tmp_path / "whole" / "measured.json")
    changing = {"seconds", "date"}
    for number, (moment, (first, left, second)) in enumerate(codes.items()):
        folder = tmp_path / f"killed{number}"
        assert first == (2 if moment == "ctrl-C" else -9), (moment, done.stderr)
        assert "report.html" not in left, moment
        assert second == 0, (moment, done.stderr)
        assert {path.name for path in folder.iterdir()} == FILES, moment
        assert (folder / "plan.json").read_bytes() == (tmp_path / "whole" / "plan.json").read_bytes(), moment
        assert same(load_file(folder / "model.safetensors"), whole), moment
        mine = read_json(folder / "measured.json")
        assert {k: v for k, v in mine.items() if k not in changing} == {
            k: v for k, v in measured.items() if k not in changing
        }, moment
        records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        steps = [(r["stage"], r["event"], r.get("step")) for r in records]
        assert len(steps) == len(set(steps)), moment
