"""Law 14, features are proved and not only logits: where a model is taken in, stored and exported."""

import math

import pytest
import torch
from torch import nn

from tests.samples import WHOLE, adopted, random_plan, timm_model
from vitrim.cut import surgery
from vitrim.deploy import export, store
from vitrim.families import adopt, describe
from vitrim.families._segmentor import segmentor
from vitrim.nn.parity import TOLERANCES, features_of, find_difference, relative, tells_images_apart
from vitrim.nn.segment import Head
from vitrim.nn.weights import FLOATS
from vitrim.words.errors import AdoptError, ExportError, StoreError

FAMILIES = pytest.mark.parametrize(("family", "preset"), [("vit", "plain"), ("t2t", "performer"), ("swin", "windows")])


@torch.no_grad()
def with_zero_head(model):
    """The model as fine-tuning starts with it."""
    head = model.head.fc if hasattr(model.head, "fc") else model.head
    head.weight.zero_()
    head.bias.zero_()
    return model


def blocks_in(model):
    stages = [layer.blocks for layer in model.layers] if hasattr(model, "layers") else [model.blocks]
    return [block for stage in stages for block in stage]


def folded_over(_module, _inputs, out):
    return out.abs()


@FAMILIES
def test_a_hook_behind_a_zero_head_is_seen_when_a_model_is_taken_in(family, preset):
    model = with_zero_head(timm_model(family, preset))
    adopt(model)
    handle = blocks_in(model)[1].register_forward_hook(folded_over)
    with pytest.raises(AdoptError, match=r"^\$: features must stay within 1\.0e-05 of .*'s, relative to the largest"):
        adopt(model)
    handle.remove()
    adopt(model)


@FAMILIES
def test_a_hook_behind_a_zero_head_is_seen_when_a_model_is_stored(family, preset, tmp_path):
    file = tmp_path / "model.safetensors"
    for model in (adopt(timm_model(family, preset)), surgery.apply(*_cut(family, preset))):
        with_zero_head(model)
        store.save(model, file)
        before = file.read_bytes()
        handle = blocks_in(model)[1].register_forward_hook(folded_over)
        with pytest.raises(StoreError, match="must give the features of the model in memory, but they differ by"):
            store.save(model, file)
        handle.remove()
        assert file.read_bytes() == before
        assert list(tmp_path.iterdir()) == [file]


def _cut(family, preset):
    parent = adopt(timm_model(family, preset))
    return parent, random_plan(describe(parent), 1, skips=False, drops="mixed")


def test_a_hook_on_the_backbone_of_a_segmentor_is_seen(tmp_path):
    backbone = timm_model("vit", "plain", torch.float32)
    model = segmentor(backbone, 4, Head(kind="linear", taps=(0, 0, 1, 2))).eval()
    with torch.no_grad():
        model.head.classifier.weight.zero_()
    store.save(model, tmp_path / "m.safetensors")
    blocks_in(model.backbone)[1].register_forward_hook(folded_over)
    with pytest.raises(StoreError, match="must give the features of the model in memory"):
        store.save(model, tmp_path / "m.safetensors")
    with pytest.raises(AdoptError, match="features must stay within"):
        adopt(model)


@pytest.fixture
def exporting(monkeypatch):
    """How often a model is traced."""
    traced, plain = [], torch.export.export

    def noted(*arguments, **options):
        traced.append("traced")
        return plain(*arguments, **options)

    monkeypatch.setattr(torch.export, "export", noted)
    return traced


@torch.no_grad()
def spoilt(model):
    model.norm.bias.add_(1)
    return model


@pytest.mark.parametrize("name", ["model.pt2", "model.onnx"] if WHOLE else ["model.pt2"])
def test_a_fault_behind_a_zero_head_is_seen_on_export(name, tmp_path, monkeypatch, exporting):
    theirs = timm_model("vit", "plain", torch.float32)
    theirs.blocks = theirs.blocks[:1]  # writing a file takes as long as it has operators, and this writes four
    model = with_zero_head(adopt(theirs))
    export.export(model, tmp_path / name)
    assert exporting == ["traced"] * 2
    assert [path.name for path in tmp_path.iterdir()] == [name]
    before = (tmp_path / name).read_bytes()
    form = export._form
    monkeypatch.setattr(export, "_form", lambda *how: spoilt(form(*how)))
    with pytest.raises(ExportError, match="features must stay within 1e-04 of eager's, but differ by"):
        export.export(model, tmp_path / name)
    assert (tmp_path / name).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_logits_that_tell_images_apart_are_proof_enough_on_export(tmp_path, monkeypatch, exporting):
    model = adopt(timm_model("vit", "plain", torch.float32))
    export.export(model, tmp_path / "model.pt2")
    assert exporting == ["traced"]
    form = export._form
    monkeypatch.setattr(export, "_form", lambda *how: spoilt(form(*how)))
    with pytest.raises(ExportError, match="logits must stay within"):
        export.export(model, tmp_path / "model.pt2")


def test_every_type_has_its_tolerance():
    for purpose in ("adopt", "store", "runtime"):
        assert set(TOLERANCES[purpose]) == set(FLOATS)
        for kind in FLOATS:
            assert torch.finfo(kind).eps < TOLERANCES[purpose][kind] <= 0.1
    assert set(TOLERANCES["export"]) == {torch.float32}


@pytest.mark.parametrize("kind", FLOATS, ids=str)
def test_a_model_is_itself_in_every_type(kind):
    model = adopt(timm_model("vit", "registers", torch.float32)).to(kind)
    spec = describe(model)
    assert find_difference(model, model, spec.image, "adopt") is None
    other = adopt(model)
    assert find_difference(other, model, spec.image, "store") is None
    with torch.no_grad():
        other.blocks[0].mlp.fc2.weight.mul_(1.5)
    found = find_difference(other, model, spec.image, "store")
    assert found is not None
    assert (found.what, found.allowed) == ("logits", TOLERANCES["store"][kind])
    assert found.apart > found.allowed


def test_differences_are_relative_and_never_hidden():
    a = torch.tensor([1.0, -4.0])
    assert relative(a, a) == 0
    assert relative(a + torch.tensor([0.0, 1.0]), a) == pytest.approx(0.25)
    assert relative(a, torch.zeros(2)) == pytest.approx(4e6)
    assert math.isinf(relative(a, torch.ones(3)))
    assert math.isinf(relative(a, (a,)))
    assert math.isinf(relative(None, None))
    assert math.isnan(relative(a, torch.tensor([1.0, math.nan])))
    assert math.isnan(relative((a, a * math.nan), (a, a)))
    assert relative({"x": a, "y": [a * 2]}, {"x": a, "y": [a]}) == pytest.approx(1)
    assert math.isinf(relative((a, a), (a,)))


def test_outputs_that_are_not_finite_are_no_parity():
    model = adopted("vit", "plain")
    other = adopt(model)
    other.register_forward_hook(lambda _module, _inputs, out: out * math.nan)
    found = find_difference(other, model, describe(model).image, "adopt")
    assert found is not None
    assert math.isnan(found.apart)


def test_logits_that_tell_images_apart():
    assert tells_images_apart(torch.eye(3), 1e-4)
    assert not tells_images_apart(torch.zeros(3, 4), 1e-4)
    assert not tells_images_apart(torch.ones(3, 4) + 1e-3 * torch.eye(3, 4), 1e-4)


class Pair(nn.Module):
    """Its features need more than images."""

    def forward_features(self, x, mask):
        return x * mask


def test_features_are_what_images_alone_give():
    assert features_of(nn.Linear(2, 2)) is None
    assert features_of(Pair()) is None
    model = adopted("swin", "windows")
    assert features_of(model) == model.forward_features
