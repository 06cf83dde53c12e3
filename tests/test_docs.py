"""What the documentation shows is run, and every page of it is found."""

import importlib.util
import re
import sys
import types
import warnings
from pathlib import Path

import pytest
import timm
import torch

from tests.conformance.method import digits
from vitrim import families
from vitrim.cut import surgery
from vitrim.deploy import push, store
from vitrim.families import describe
from vitrim.words.budget import SLACK, Budget
from vitrim.words.costs import cost_of
from vitrim.words.plan import BlockPlan, Plan

DOCS = Path(__file__).parent.parent / "docs"
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 10}


def blocks(page: str) -> list[str]:
    """Every block of Python on a page."""
    return re.findall(
        r"^```python\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )


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


def test_the_method_of_the_page_keeps_its_promises(model, monkeypatch):
    (code,) = blocks("adding.md")
    module = types.ModuleType("page_method")
    monkeypatch.setitem(sys.modules, "page_method", module)
    exec(compile(code, "adding.md", "exec"), module.__dict__)
    method, budget, data = module.Method(), Budget.parse("macs=0.7"), digits(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found, again = (method.search(model, data, budget, seed=0) for _ in range(2))
    assert found.plan == again.plan
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    spec = describe(model)
    cost = cost_of(describe(surgery.apply(found.parent, found.plan)))
    assert budget.admits(cost, cost_of(spec))
    assert budget.spent(cost, cost_of(spec)) >= 1 - SLACK
    assert method.sentence
    assert method.needs == "images"
    other = module.Method(choice="free").search(model, data, budget, seed=0)
    assert other.plan != found.plan, "a setting reaches the search"


@pytest.fixture(scope="module")
def site():
    spec = importlib.util.spec_from_file_location("docs_site", DOCS / "_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_listed(site):
    found = site.nav(DOCS)
    listed = [page for entry in found for page in (entry["Methods"] if isinstance(entry, dict) else [entry])]
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
    assert listed[0] == "index.md"


def test_a_page_that_appears_is_listed(site, tmp_path):
    for name in ("index.md", "methods/zeta.md", "methods/spvit.md", "guide.md", "api.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert site.nav(tmp_path) == [
        "index.md",
        {"Methods": ["methods/spvit.md", "methods/zeta.md"]},
        "guide.md",
        "api.md",
    ]


def test_links_out_of_the_site_become_text(site, tmp_path):
    page = tmp_path / "docs" / "methods" / "a.md"
    text = "[here](../b.md#x) [out](../../benchmarks/c.md) [`d.py`](../../d.py) [web](https://x.org/y) [top](#x)"
    told = site.inside(text, page, tmp_path / "docs")
    assert told == "[here](../b.md#x) out (`benchmarks/c.md`) `d.py` [web](https://x.org/y) [top](#x)"


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
