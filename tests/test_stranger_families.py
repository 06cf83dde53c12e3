"""Families of other authors: entry points that name a module, found by the classes that they host."""

import subprocess
import sys
import types

import pytest
import torch

from tests.installed import FAMILY, REGISTERED, install
from tests.test_cli import call, refused  # noqa: F401
from vitrim import families
from vitrim.deploy import store
from vitrim.families import adopt, describe, vit
from vitrim.testing import FAMILY_LAWS, check_family
from vitrim.words.errors import SpecError

POINTS = "[vitrim.families]\n"


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
def tinted(site):
    """The family of `FAMILY`, its module."""
    site("vitrim-tinted", "1.1", f"{POINTS}tinted = tinted_vits\n", tinted_vits=FAMILY)
    return families.get("tinted")


def test_a_family_keeps_every_law(tinted):
    assert "tinted" in families.names()
    check_family(tinted)


def test_a_model_of_it_is_stored_and_opened(tinted, tmp_path):
    model = adopt(tinted.example().eval())
    torch.nn.init.normal_(model.patch_embed.tint)
    assert describe(model).family == "tinted"
    same = store.load(store.save(model, tmp_path / "model.safetensors"))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert type(same) is tinted.TintedViT
        assert torch.equal(same.eval()(x), model(x))


def test_a_name_of_two_distributions_is_refused(tinted, site):
    site("vitrim-other", "2.0", f"{POINTS}tinted = tinted_vits\n")
    with pytest.raises(SpecError, match=r"given by vitrim-other 2\.0 and vitrim-tinted 1\.1; uninstall one of them"):
        families.names()
    with pytest.raises(SpecError, match="uninstall one of them"):
        adopt(vit.example())


@pytest.mark.parametrize("name", ["vit", "segmentor"])
def test_a_name_of_vitrim_is_refused(site, name):
    site("vitrim-other", "2.0", f"{POINTS}{name} = tinted_vits\n", tinted_vits=FAMILY)
    with pytest.raises(SpecError, match=rf"{name}: .* given by vitrim \S+ and vitrim-other 2\.0"):
        families.get("vit")


def test_a_class_of_two_families_is_refused(site):
    code = FAMILY.replace("HOSTS = (TintedViT,)", "HOSTS = (VisionTransformer,)")
    site("vitrim-other", "2.0", f"{POINTS}tinted = tinted_vits\n", tinted_vits=code)
    with pytest.raises(SpecError, match="VisionTransformer: a class must be hosted by one family, but tinted and vit"):
        adopt(vit.example())


@pytest.mark.parametrize(
    ("code", "point", "told"),
    [
        ("import nothing_of_this_name", "wrong", "raises ModuleNotFoundError, which says No module named"),
        (FAMILY.replace("HOSTS", "GUESTS"), "wrong", "a family must offer TEST_PRESETS, HOSTS, .* but has no HOSTS"),
        (FAMILY, "wrong:TintedViT", "a family must be a module, but is type; name the module alone"),
    ],
)
def test_what_is_no_family_is_refused_in_a_sentence(site, call, code, point, told):  # noqa: F811
    site("vitrim-wrong", "1.0", f"{POINTS}wrong = {point}\n", wrong=code)
    for ask in (lambda: families.get("wrong"), lambda: adopt(vit.example())):
        with pytest.raises(SpecError, match=f"of vitrim-wrong 1.0.* {told}"):
            ask()
    refused(call("models", "vit_tiny_patch16_224"), "of vitrim-wrong 1.0")


def test_a_family_that_is_imported_before_vitrim(tmp_path):
    """Its module and vitrim import each other; and timm knows the names of its models."""
    root = install(tmp_path, "vitrim-tinted", "1.1", f"{POINTS}tinted = tinted_vits\n", tinted_vits=REGISTERED)
    code = f"""
import sys
sys.path.insert(0, {str(root)!r})
import tinted_vits
from vitrim.deploy.parent import known_models, open_parent
from vitrim.families import describe
print(*(entry["name"] for entry in known_models("tinted*") if entry["reason"] is None))
print(describe(open_parent("tinted_vit_small", random_weights=True)).family)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "tinted_vit_small\ntinted\n", done.stderr


def test_an_import_survives_a_broken_family(tmp_path):
    root = install(tmp_path, "vitrim-wrong", "1.0", f"{POINTS}wrong = wrong\n", wrong="import nothing_of_this_name")
    code = f"import sys; sys.path.insert(0, {str(root)!r})\nimport vitrim.families as f\nf.name_of(f.nn.Linear(1, 1))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "SpecError: wrong: wrong of vitrim-wrong 1.0 must be importable" in done.stderr.splitlines()[-1]


SHARING = """blocks_by_stage = plain.blocks_by_stage


def host(model, blocks):
    made = plain.host(model, blocks)
    made.norm = model.norm
    return made
"""

COSTLY = """        y = super().forward(x + self.tint)
        return y if y.is_meta else y + 0 * (y @ torch.ones(y.shape[-1], 1, dtype=y.dtype))
"""

WRONG = {
    "family_is_found": ('plain.describe(model, "tinted"', 'plain.describe(model, "vit"'),
    "adopting_keeps_logits_and_names": ("blocks_by_stage, host = plain.blocks_by_stage, plain.host\n", SHARING),
    "cost_is_counted": ("        return super().forward(x + self.tint)\n", COSTLY),
}


@pytest.mark.parametrize("law", list(WRONG))
def test_a_law_that_does_not_hold_is_named(site, law):
    old, new = WRONG[law]
    assert FAMILY.count(old) == 1
    site("vitrim-tinted", "1.1", f"{POINTS}tinted = tinted_vits\n", tinted_vits=FAMILY.replace(old, new))
    assert law in {each.__name__ for each in FAMILY_LAWS}
    with pytest.raises(AssertionError, match=f"{law}, preset plain of tinted: "):
        check_family("tinted", presets=["plain"])


def test_a_family_that_is_not_installed_is_told():
    with pytest.raises(AssertionError, match=r"none in vitrim\.families names this module; declare it in pyproject"):
        check_family(types.ModuleType("lonely"))
