"""What the documentation shows is run, and every page of it is found."""

import hashlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path

import pytest
import timm
import torch

import vitrim
from tests.installed import DOCS, install, listings
from vitrim import cli, families, methods
from vitrim.cut import surgery
from vitrim.deploy import push, store
from vitrim.families import describe
from vitrim.words.plain import read_toml
from vitrim.words.plan import BlockPlan, Plan, read_plan

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}


def page(name: str) -> str:
    """The text of a page."""
    return (DOCS / name).read_text(encoding="utf-8")


def blocks(name: str) -> list[str]:
    """Every block of Python on a page."""
    return re.findall(r"^```python\n(.*?)^```$", page(name), flags=re.DOTALL | re.MULTILINE)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return families.adopt(timm.create_model("test_vit", **TINY).eval())


def test_the_loader_page_runs(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = describe(model)
    small = surgery.apply(model, Plan.of(spec, [BlockPlan(hidden=tuple(range(40)))] * 2))
    store.save(small, "small.safetensors")
    push.push("small.safetensors", "owner/name", licence="mit", folder=Path("pushed"))
    names: dict[str, object] = {"__name__": "page"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for code in blocks("loader.md"):
            exec(compile(code, "loader.md", "exec"), names)
    assert names["logits"].shape == (2, 10)
    assert describe(names["same"]) == describe(small)
    assert (names["other"].num_classes, names["features"].num_classes) == (7, 0)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(names["same"](x), small(x))
    assert describe(store.load("finetuned.safetensors")).classes == 5
    assert names["trainer"].global_step == 2
    assert {"loss_classifier", "loss_objectness"} <= set(names["losses"])
    assert names["pixels"].shape == (2, 4, 32, 32)


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """A folder outside the package with the files that adding.md shows, which commands run in."""
    for name, code in listings("adding.md").items():
        (tmp_path / name).write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for module in ("variance", "tinted_vits"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    yield tmp_path
    for module in ("variance", "tinted_vits"):
        sys.modules.pop(module, None)


def test_the_method_of_the_page_runs_as_a_file(outside, monkeypatch, capsys):
    (command,) = re.findall(r"^```bash\nvitrim (compress .*)\n```$", page("adding.md"), flags=re.MULTILINE)
    more = "--set measure.latency=false --set device=cpu --set data.calibration=32 --set model.arguments.img_size=32"
    monkeypatch.setattr(sys, "argv", ["vitrim", *shlex.split(f"{command} {more}")])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert not caught.value.code, capsys.readouterr().err
    recipe = read_toml(outside / "runs" / "variance" / "recipe.toml")
    assert recipe["method"]["name"] == "variance.py"
    assert recipe["method"]["source"] == f"sha256:{hashlib.sha256(Path('variance.py').read_bytes()).hexdigest()}"
    spec, plan = read_plan(outside / "runs" / "variance" / "plan.json")
    assert plan.child(spec) == describe(store.load(outside / "runs" / "variance" / "model.safetensors"))


def test_the_method_of_the_page_runs_as_an_instance(outside):
    code = listings("adding.md")["program.py"].replace(
        'out="runs/instance")',
        'out="runs/instance", measure={"latency": False}, recipe={"device": "cpu", "data": {"calibration": 32}})',
    )
    names: dict[str, object] = {"__name__": "page"}
    exec(compile(code.replace("num_classes=10", "num_classes=10, img_size=32"), "adding.md", "exec"), names)
    written = read_toml(outside / "runs" / "instance" / "recipe.toml")["method"]
    assert (written["name"], written["batch"], written["choice"]) == ("variance.py", 64, "free")
    assert names["result"].measured["macs_ratio"] <= 0.6


def test_the_tests_of_the_page_pass_where_its_package_is_installed(outside, monkeypatch):
    """As pip would leave it: the modules of the page, and the entry points that its pyproject.toml declares."""
    project = tomllib.loads(listings("adding.md")["pyproject.toml"])["project"]
    points = "\n".join(
        f"[{group}]\n" + "\n".join(f"{name} = {value}" for name, value in entries.items())
        for group, entries in project["entry-points"].items()
    )
    install(outside, project["name"], project["version"], points)
    source = Path(vitrim.__file__).parents[1]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-W",
            "error",
            "-c",
            "/dev/null",
            "--rootdir=.",
        ],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(outside), str(source)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "2 passed" in done.stdout, done.stdout + done.stderr
    assert methods.origin("variance").where == "vitrim-variance 1.0"


@pytest.fixture(scope="module")
def site():
    spec = importlib.util.spec_from_file_location("docs_site", DOCS / "_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_listed(site):
    found = site.nav(DOCS)
    listed = [page for group in found for pages in group.values() for page in pages]
    listed = ["index.md" if page == {"Overview": "index.md"} else page for page in listed]
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
    assert listed[0] == "index.md"


def test_a_page_that_appears_is_listed(site, tmp_path):
    for name in ("index.md", "methods/zeta.md", "methods/spvit.md", "guide.md", "api.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert site.nav(tmp_path) == [
        {"Start": [{"Overview": "index.md"}]},
        {"Methods": ["methods/spvit.md", "methods/zeta.md"]},
        {"More": ["guide.md"]},
        {"Reference": ["api.md"]},
    ]


def test_links_out_of_the_site_become_text(site, tmp_path):
    page = tmp_path / "docs" / "methods" / "a.md"
    text = "[here](../b.md#x) [out](../../benchmarks/c.md) [`d.py`](../../d.py) [web](https://x.org/y) [top](#x)"
    text += " ![bars](../../benchmarks/d.svg) ![own](e.svg)"
    told = site.inside(text, page, tmp_path / "docs")
    links = "[here](../b.md#x) out (`benchmarks/c.md`) `d.py` [web](https://x.org/y) [top](#x)"
    assert told == f"{links} ![bars](../benchmarks/d.svg) ![own](e.svg)"


@pytest.mark.parametrize("page", sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s#]+)", text):
        if "://" not in target:
            assert ((DOCS / page).parent / target).exists(), f"{page} links to {target}"


def test_everything_in_the_reference_is_there():
    for name in re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(encoding="utf-8"), flags=re.MULTILINE):
        module, _, attribute = name.rpartition(".")
        assert getattr(importlib.import_module(module), attribute).__doc__, name
