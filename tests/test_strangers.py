"""Methods of other authors: by an entry point, by the path of a file, as an instance; what a run records of them."""

import hashlib
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import timm
import torch

from tests.installed import METHOD, install
from tests.test_cli import call, refused  # noqa: F401
from vitrim import methods
from vitrim.methods import Data, Found, ScoreMethod, magnitude, taylor
from vitrim.methods._digest import digest_of
from vitrim.run.pipeline import compress, run
from vitrim.run.recipe import read_recipe
from vitrim.testing import check_method, digits, small_model
from vitrim.words.budget import Budget
from vitrim.words.errors import MethodError, RecipeError, RunError
from vitrim.words.plain import Node, dump, read_toml

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
QUIET = {"latency": False}
POINTS = "[vitrim.methods]\n"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """Install a distribution into a folder of its own on `sys.path`."""

    def put(name, version="1.0", points=POINTS, **modules):
        root = install(tmp_path / f"site-{name}-{version}", name, version, points, **modules)
        monkeypatch.syspath_prepend(str(root))
        for module in modules:
            monkeypatch.delitem(sys.modules, module, raising=False)
        return root

    return put


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder that commands run in."""
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    return place


def tiny() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", **TINY)


def shrink(method, out=None, **more):
    return compress(tiny(), method=method, budget="macs=0.6", measure=QUIET, out=out, recipe={"device": "cpu"}, **more)


def lasts(result) -> bool:
    """Whether the method of `METHOD` chose: each MLP keeps its last neurons."""
    size = result.parent.blocks[0].mlp.fc1.out_features
    kept = [block.hidden for block in result.plan.blocks() if block.hidden]
    return bool(kept) and all(row == tuple(range(size - len(row), size)) for row in kept)


# Entry points.


@pytest.mark.parametrize("value", ["last_ones", "last_ones:Method", "last_ones:ready"])
def test_an_entry_point_names_a_module_a_class_or_an_instance(site, value):
    code = METHOD + "\n\nready = Method(first=True)\n"
    site("vitrim-lasts", "1.2", f"{POINTS}lasts = {value}\n", last_ones=code)
    assert "lasts" in methods.names()
    found = methods.origin("lasts")
    assert (found.name, found.where) == ("lasts", "vitrim-lasts 1.2")
    assert found.source == f"vitrim-lasts 1.2 sha256:{hashlib.sha256(code.encode()).hexdigest()}"
    assert methods.get("lasts").first == value.endswith("ready")
    assert methods.get("lasts", {"first": False}).first is False
    with pytest.raises(MethodError, match=r"method\.lasts: Method has no field 'frist'; did you mean 'first'\?"):
        methods.get("lasts", {"frist": True})
    assert lasts(shrink("lasts", settings={"first": False}))
    with pytest.raises(MethodError, match="did you mean 'lasts'"):
        methods.get("last")


def test_every_python_file_of_a_package_counts(site):
    root = site("vitrim-lasts", points=f"{POINTS}lasts = lasts_package\n")
    folder = root / "lasts_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("from lasts_package.inside import Method\n", encoding="utf-8")
    (folder / "inside.py").write_text(METHOD, encoding="utf-8")
    try:
        before = methods.origin("lasts").source
        (folder / "more.py").write_text("x = 1\n", encoding="utf-8")
        assert methods.origin("lasts").source not in (None, before)
    finally:
        for name in [name for name in sys.modules if name.startswith("lasts_package")]:
            del sys.modules[name]


def test_a_name_of_two_distributions_is_refused(site, call):  # noqa: F811
    site("vitrim-a", "1.0", f"{POINTS}lasts = last_ones\n", last_ones=METHOD)
    assert "lasts" in methods.names()
    site("vitrim-b", "2.0", f"{POINTS}lasts = last_ones\n")
    for ask in (methods.names, lambda: methods.get("lasts"), lambda: methods.get("taylor")):
        with pytest.raises(MethodError, match=r"given by vitrim-a 1\.0 and vitrim-b 2\.0; uninstall one of them"):
            ask()
    refused(call("methods"), "lasts: each name in vitrim.methods must be given by one distribution")


def test_a_name_of_vitrim_is_refused(site):
    site("vitrim-mine", "3.1", f"{POINTS}taylor = last_ones\n", last_ones=METHOD)
    with pytest.raises(MethodError, match=r"taylor: .* given by vitrim \S+ and vitrim-mine 3\.1"):
        methods.get("taylor")


WRONG = {
    "import nothing_of_this_name\n": "raises ModuleNotFoundError, which says No module named 'nothing_of_this_name'",
    "raise SystemExit\n": "raises SystemExit",
    "x = 1\n": "must define a class of its own called Method, but does not",
    "from vitrim.methods import Method\n": "must define a class of its own called Method, but does not",
    "class Method:\n    needs = sentence = search = None\n": "derived from vitrim.words.plain.Node",
    METHOD.replace('sentence: ClassVar[str] = "keeps the last channels"', ""): "has no sentence; add it",
    METHOD.replace('"keeps the last channels"', '" "'): "sentence must say what the method does, but is ' '",
    METHOD.replace("def scores", "def marks"): "a method must define scores, but does not; add it",
    METHOD.replace("first", "source"): "must not be called name or source, but 'source' is; rename it",
    METHOD + '    needs: ClassVar[str] = "pictures"\n': "needs must be one of nothing, images, labels",
    METHOD
    + "    def search(self, model, data, budget, *, seed):\n        pass\n": "got an unexpected keyword argument",
    "from vitrim.words.plain import Node\n\n\nclass Method(Node):\n    x: int = 0\n": "has no needs and no sentence",
}


@pytest.mark.parametrize("code", list(WRONG), ids=range(len(WRONG)))
def test_what_is_no_method_is_refused_in_a_sentence(site, here, call, code):  # noqa: F811
    site("vitrim-wrong", points=f"{POINTS}wrong = wrong_ones\n", wrong_ones=code)
    with pytest.raises(MethodError) as caught:
        methods.get("wrong")
    assert WRONG[code] in str(caught.value)
    assert "of vitrim-wrong 1.0" in str(caught.value)
    exit_code, out, error = call("methods")
    assert (exit_code, error) == (0, "")
    assert WRONG[code] in out
    assert all(name in out for name in methods.names())

    (here / "wrong.py").write_text(code, encoding="utf-8")
    with pytest.raises(MethodError) as caught:
        methods.get("wrong.py")
    assert str(caught.value).startswith("wrong.py: ")
    assert WRONG[code] in str(caught.value)
    refused(call("compress", "test_vit", "--method", "wrong.py", "--out", "run"), "wrong.py: ")
    assert not Path("run").exists()


def test_methods_are_listed_with_where_they_come_from(site, call):  # noqa: F811
    site("vitrim-lasts", "1.2", f"{POINTS}lasts = last_ones\n", last_ones=METHOD)
    code, out, error = call("methods")
    assert (code, error) == (0, "")
    head, *rows = out.splitlines()
    assert head.split()[:3] == ["method", "from", "needs"]
    places = {row.split()[0]: row[head.index("from") : head.index("needs")].strip() for row in rows}
    assert places == dict.fromkeys(set(methods.names()) - {"lasts"}, "vitrim") | {"lasts": "vitrim-lasts 1.2"}


# Files.


def test_a_file_is_a_method(here, call):  # noqa: F811
    (here / "mine.py").write_text(METHOD, encoding="utf-8")
    digest = f"sha256:{hashlib.sha256((here / 'mine.py').read_bytes()).hexdigest()}"
    arguments = [f"model.arguments={TINY}".replace("'", '"'), "measure.latency=false", "device=cpu"]
    settings = [part for pair in arguments for part in ("--set", pair)]
    asked = ["compress", "test_vit", "--random-weights", "--budget", "macs=0.6", "--out", "run", *settings]
    code, _, error = call(*asked, "--method", "mine.py", "--set", "method.first=true")
    assert code == 0, error
    written = read_toml(Path("run/recipe.toml"))["method"]
    assert written == {"name": "mine.py", "first": True, "choice": "even", "source": digest}
    before = Path("run/model.safetensors").read_bytes()
    plan = Path("run/plan.json").read_bytes()

    for name in ("mine.py", "./mine.py", str(here / "mine.py")):
        code, _, error = call(*asked, "--method", name, "--set", "method.first=true")
        assert code == 0, error
    Path("mine.py").replace("moved.py")
    code, _, error = call(*asked, "--method", "moved.py", "--set", "method.first=true")
    assert code == 0, error
    refused(call(*asked, "--method", "moved.py"), "its recipe differs in method.first")
    refused(call("run", "run/recipe.toml"), "mine.py: a method's file must exist, but", "relative to the working")
    assert Path("run/model.safetensors").read_bytes() == before

    Path("moved.py").replace("mine.py")
    Path("run/model.safetensors").unlink()
    code, _, error = call("run", "run/recipe.toml")
    assert code == 0, error
    assert Path("run/plan.json").read_bytes() == plan

    (here / "mine.py").write_text(METHOD + "\n# another\n", encoding="utf-8")
    other = hashlib.sha256((here / "mine.py").read_bytes()).hexdigest()[:12]
    told = f"must resume with the method that it began with, mine.py ({digest[:19]}), but got mine.py (sha256:{other})"
    refused(
        call(*asked, "--method", "mine.py", "--set", "method.first=true"), f"run: a run {told}; restore that source"
    )
    refused(call("run", "run/recipe.toml"), f"a recipe {told}", "or begin another run with --set method.source=null")
    assert call("run", "run/recipe.toml", "--set", "method.source=null", "--out", "other")[0] == 0
    assert read_toml(Path("other/recipe.toml"))["method"]["source"].startswith(f"sha256:{other}")
    refused(call(*asked, "--method", "magnitude"), "run: a run must resume", "but got magnitude (of vitrim)")
    assert read_toml(Path("run/recipe.toml"))["method"] == written


def test_a_run_of_another_method_is_told_apart(here):
    (here / "mine.py").write_text(METHOD, encoding="utf-8")
    shrink("magnitude", out="run")
    with pytest.raises(RunError, match=r"its recipe differs in method\.first, method\.name, method\.source"):
        shrink("mine.py", out="run")


def test_paths_are_taken_from_where_the_command_runs(here, monkeypatch):
    (here / "sub").mkdir()
    (here / "sub" / "mine.py").write_text(METHOD, encoding="utf-8")
    assert methods.origin("sub/mine.py").name == "sub/mine.py"
    assert lasts(shrink(Path("sub/mine.py")))
    with pytest.raises(MethodError, match=r"mine\.py: a method's file must exist, but .*here/mine\.py does not"):
        methods.get("mine.py")
    monkeypatch.chdir(here / "sub")
    with pytest.raises(MethodError, match=r"or a \.py file, but got 'mine'; did you mean 'mine\.py'\?"):
        methods.get("mine")
    assert methods.get("mine.py") == methods.get("../sub/mine.py")
    monkeypatch.setenv("HOME", str(here))
    assert methods.settings_of("~/sub/mine.py") is methods.settings_of("mine.py")


def test_a_recipe_names_a_file(here):
    (here / "mine.py").write_text(METHOD, encoding="utf-8")
    arguments = "\n".join(f"{key} = {value}" for key, value in TINY.items())
    (here / "recipe.toml").write_text(
        'budget = "macs=0.6"\n[method]\nname = "mine.py"\nfirst = true\n[measure]\nlatency = false\n'
        f'[model]\nname = "test_vit"\nrandom_weights = true\n[model.arguments]\n{arguments}\n',
        encoding="utf-8",
    )
    result = run(read_recipe(Path("recipe.toml")), Path("out"))
    assert result.measured["method"] == "mine.py"
    assert not lasts(result)
    assert read_toml(Path("out/recipe.toml"))["method"]["first"] is True


def test_a_folder_is_a_method_with_all_its_files(here):
    folder = here / "mine"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from .inside import SIGN\n" + METHOD.replace("sign *", "SIGN * sign *"), encoding="utf-8"
    )
    (folder / "inside.py").write_text("SIGN = 1.0\n", encoding="utf-8")
    first = methods.origin("./mine")
    assert lasts(shrink("./mine"))
    assert methods.origin("./mine/__init__.py").kind is first.kind
    (folder / "inside.py").write_text("SIGN = -1.00\n", encoding="utf-8")
    assert methods.origin("./mine").source != first.source
    assert not lasts(shrink("./mine"))


def test_a_file_that_changes_is_read_again(here):
    (here / "mine.py").write_text(METHOD, encoding="utf-8")
    assert methods.settings_of("mine.py") is methods.settings_of("mine.py")
    assert not methods.get("mine.py").first
    (here / "mine.py").write_text(METHOD.replace("= False", "= True "), encoding="utf-8")
    assert methods.get("mine.py").first
    assert not list(here.rglob("__pycache__"))


def test_an_error_names_its_line(here):
    (here / "mine.py").write_text(METHOD + "\n\nx = 1 / 0\n", encoding="utf-8")
    with pytest.raises(MethodError, match=r"mine\.py: .* but line 23 raises ZeroDivisionError, which says") as caught:
        methods.get("mine.py")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    (here / "mine.py").write_text("x = 1\ny = (\n", encoding="utf-8")
    with pytest.raises(MethodError, match=r"mine\.py: .* but line 2 raises SyntaxError, which says"):
        methods.get("mine.py")
    (here / "mine.txt").write_text(METHOD, encoding="utf-8")
    with pytest.raises(MethodError, match=r"must be Python, but is not called \.py; rename it"):
        methods.get("./mine.txt")
    assert not [
        name for name in sys.modules if name.startswith("vitrim_method_") and str(here) in repr(sys.modules[name])
    ]


def test_a_shared_search_wants_trials(here, call):  # noqa: F811
    (here / "mine.py").write_text(METHOD, encoding="utf-8")
    told = call("search", "test_vit", "--storage", "sqlite:///x.db", "--method", "mine.py")
    refused(told, "a shared search must use a method with trials, but mine.py has none")


# Instances.


class Backwards(ScoreMethod):
    """Keep the first channels."""

    sentence: ClassVar[str] = "keeps the first channels"

    strength: float = 1.0

    def scores(self, model, data, *, seed):
        return {
            path: -self.strength * score for path, score in methods.get("random").scores(model, data, seed=1).items()
        }


class Bare(Node):
    """A method without a helper class."""

    needs: ClassVar[str] = "nothing"
    sentence: ClassVar[str] = "does as magnitude does"

    def search(self, model, data: Data | None, budget, *, seed, teacher=None, folder=None, log=None) -> Found:
        return methods.get("magnitude").search(model, data, budget, seed=seed)


def test_an_instance_of_vitrim_is_named(here):
    result = shrink(magnitude.Method(choice="free"), out="run")
    assert read_toml(Path("run/recipe.toml"))["method"] == {"name": "magnitude", "choice": "free", "width": False}
    assert result.plan == shrink("magnitude", settings={"choice": "free"}, out="run").plan
    again = run(read_recipe_of("run"), Path("again"))
    assert again.plan == result.plan


def read_recipe_of(folder: str):
    """The recipe of a run folder, for a model that has a name."""
    model = {"name": "test_vit", "random_weights": True, "arguments": TINY}
    known = read_recipe(Path(folder) / "recipe.toml")
    return known.model_copy(update={"model": type(known.model)(**model)})


def test_an_instance_of_an_entry_point_is_named(site, here):
    site("vitrim-lasts", "1.2", f"{POINTS}lasts = last_ones\n", last_ones=METHOD)
    method = methods.get("lasts", {"first": True})
    shrink(method, out="run")
    written = read_toml(Path("run/recipe.toml"))["method"]
    assert (written["name"], written["first"]) == ("lasts", True)
    assert written["source"].startswith("vitrim-lasts 1.2 sha256:")
    shrink("lasts", settings={"first": True}, out="run")


def test_another_version_of_a_distribution_is_another_method(site, here):
    site("vitrim-lasts", "1.2", f"{POINTS}lasts = last_ones\n", last_ones=METHOD)
    shrink("lasts", out="run")
    sys.path.pop(0)
    site("vitrim-lasts", "1.3", f"{POINTS}lasts = last_ones\n", last_ones=METHOD)
    with pytest.raises(
        RunError, match=r"lasts \(vitrim-lasts 1\.2 sha256:\w{12}\), but got lasts \(vitrim-lasts 1\.3 "
    ):
        shrink("lasts", out="run")


def test_an_instance_of_a_file_is_named_by_its_path(here, monkeypatch):
    (here / "mine_too.py").write_text(METHOD, encoding="utf-8")
    shrink(methods.get("./mine_too.py"), out="run")
    assert read_toml(Path("run/recipe.toml"))["method"]["name"] == "./mine_too.py"
    monkeypatch.syspath_prepend(str(here))
    import mine_too

    try:
        result = shrink(mine_too.Method(), out="run")
        shrink(mine_too.Method(), out="other")
        assert read_toml(Path("other/recipe.toml"))["method"]["name"] == "mine_too.py"
        assert result.plan == shrink("mine_too.py", out="other").plan
    finally:
        del sys.modules["mine_too"]


@pytest.mark.parametrize("kind", [Backwards, Bare])
def test_an_instance_that_no_recipe_finds_goes_on_when_it_is_passed_again(here, kind):
    result = shrink(kind(), out="run")
    written = read_toml(Path("run/recipe.toml"))["method"]
    assert written["name"] == f"(tests.test_strangers.{kind.__name__} in memory)"
    assert written["source"] == f"sha256:{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()}"
    assert {key: written[key] for key in dump(kind())} == dump(kind())
    for name in ("model.safetensors", "measured.json", "report.html"):
        Path("run", name).unlink()
    again = shrink(kind(), out="run")
    assert again.plan == result.plan
    with pytest.raises(
        MethodError, match=rf"\(tests.*{kind.__name__} in memory\) was passed as an instance by another program"
    ):
        run(read_recipe_of("run"), Path("again"))
    assert not Path("again").exists()


def test_an_instance_with_other_settings_is_told_apart(here):
    shrink(Backwards(), out="run")
    with pytest.raises(RunError, match=r"its recipe differs in method\.strength; choose another --out"):
        shrink(Backwards(strength=2.0), out="run")
    with pytest.raises(RecipeError, match="settings must be those of the instance, but settings are given too"):
        shrink(Backwards(), settings={"strength": 2.0})
    with pytest.raises(RecipeError, match="settings must be those of the instance, but recipe holds a method too"):
        compress(tiny(), method=Backwards(), recipe={"method": {"strength": 2.0}})
    with pytest.raises(MethodError, match="must be a name or an instance, but got the class Backwards; call it"):
        shrink(Backwards)
    with pytest.raises(MethodError, match="dict: a method must be a class derived from"):
        shrink({"name": "taylor"})


CELL = """
class Noted:
    def scores(self, model, data, *, seed):
        return {path: [x for x in (1, 2)] for path in data if path in {"hidden", "qk", "v"}}

    @property
    def size(self):
        return (lambda: 3)()
"""

NOTED = """
import runpy, sys
cell = {"__name__": "a_notebook"}
exec(compile(sys.argv[2], "<cell>", "exec"), cell)
print(runpy.run_path(sys.argv[1])["digest_of"](cell["Noted"]))
"""


def noted(code: str, hashing: str) -> str:
    """The digest of a class of a notebook, whose module has no file, in a process whose sets have another order."""
    done = subprocess.run(
        [sys.executable, "-c", NOTED, digest_of.__code__.co_filename, code],
        env=os.environ | {"PYTHONHASHSEED": hashing},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def test_a_class_of_a_notebook_is_known_by_its_code():
    digest = noted(CELL, "1")
    assert digest.startswith("sha256:")
    assert noted("\n\n\n" + CELL, "2") == digest
    assert noted(CELL.replace("x in (1, 2)", "x in (1, 3)"), "1") != digest
    assert noted(CELL.replace('"qk", ', ""), "1") != digest
    assert noted(CELL.replace("lambda: 3", "lambda: 4"), "1") != digest


PROGRAM = """
from typing import ClassVar

import timm
import torch

import vitrim
from vitrim import methods


class Mine(methods.ScoreMethod):
    sentence: ClassVar[str] = "does as magnitude does"

    def scores(self, model, data, *, seed):
        return methods.get("magnitude").scores(model, data, seed=seed)


torch.manual_seed(0)
model = timm.create_model("test_vit", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=10)
result = vitrim.compress(model, method=Mine(), budget="macs=0.6", measure={"latency": False}, out="run")
"""


def test_an_instance_of_a_program_goes_on_in_another(here):
    """A script that defines its method, run twice: the second goes on, and refuses once the script has changed."""
    script = here / "script.py"
    script.write_text(PROGRAM, encoding="utf-8")
    for _ in range(2):
        result = runpy.run_path("script.py", run_name="__main__")["result"]
        assert result.measured["method"] == "(Mine in memory)"
    script.write_text(PROGRAM + "\n# another\n", encoding="utf-8")
    with pytest.raises(RunError, match=r"that it began with, \(Mine in memory\) \(sha256:\w{12}\), but got \(Mine in"):
        runpy.run_path("script.py", run_name="__main__")


# The helper class.


def test_a_method_of_scores_alone_reads_other_budgets_off_them():
    model, less = small_model("vit"), Budget.parse("macs=0.5")
    check_method(Backwards(choice="free"), models=[model])
    found = taylor.Method().search(model, digits(model), Budget.parse("macs=0.7"), seed=0)
    assert found.again(less).plan == taylor.Method().search(model, digits(model), less, seed=0).plan
