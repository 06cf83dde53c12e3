"""Opening the model that a recipe names, and saying in one sentence why not."""

import os
import pickle
import random
import re

import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.tolerance import SINGLE
from vitrim.deploy import store
from vitrim.deploy.parent import known_models, load_weights_, open_parent, read_weights, why_not_cut
from vitrim.families import adopt, blocks_of
from vitrim.words.errors import AdoptError, RecipeError, StoreError, VitrimError, WeightsError

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def tiny(classes: int = 10) -> torch.nn.Module:
    return timm.create_model("test_vit", num_classes=classes, **TINY).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


def refused(kind: type[VitrimError], name: str, **arguments) -> str:
    with pytest.raises(kind) as caught:
        open_parent(name, **arguments)
    text = str(caught.value)
    assert "\n" not in text
    assert "but" in text
    return text


def test_random_weights():
    model = open_parent("test_vit", random_weights=True, arguments={**TINY, "num_classes": 7})
    assert not model.training
    assert len(blocks_of(model)) == 2
    assert logits(model).shape == (2, 7)


@pytest.mark.parametrize("wrap", ["safetensors", "plain", "model", "state_dict", "state_dict_ema", "module", "pickled"])
def test_weights_files(wrap, tmp_path):
    model = tiny(5)
    state = model.state_dict()
    path = tmp_path / ("weights.safetensors" if wrap == "safetensors" else "weights.pth")
    if wrap == "safetensors":
        save_file(state, path)
    elif wrap == "module":
        torch.save({"model": {f"module.{name}": value for name, value in state.items()}, "epoch": 3}, path)
    elif wrap in ("plain", "pickled"):
        torch.save(state, path, _use_new_zipfile_serialization=wrap == "plain")
    else:
        torch.save({wrap: state, "epoch": 3, "lr": 0.1}, path)
    # The number of classes is that of the head in the file.
    opened = open_parent("test_vit", weights=str(path), arguments=TINY)
    assert torch.allclose(logits(opened), logits(model), rtol=SINGLE, atol=SINGLE)


def test_weights_that_do_not_fit(tmp_path):
    def told(change, **arguments) -> str:
        state = dict(tiny().state_dict())
        change(state)
        save_file(state, tmp_path / "w.safetensors")
        path = str(tmp_path / "w.safetensors")
        return refused(WeightsError, "test_vit", weights=path, arguments={**TINY, **arguments})

    assert "w.safetensors: weights must fit VisionTransformer, but the file misses norm.bias" in told(
        lambda s: s.pop("norm.bias")
    )
    assert "has unknown extra.weight" in told(lambda s: s.update({"extra.weight": torch.ones(1)}))
    assert "has another shape for norm.bias (3,) for (32,)" in told(lambda s: s.update({"norm.bias": torch.ones(3)}))
    assert "has another shape for head.weight (10, 32) for (3, 32)" in told(lambda s: None, num_classes=3)
    many = told(lambda s: [s.pop(name) for name in list(s) if name.startswith("blocks.0")])
    assert "misses blocks.0.attn.proj.bias, " in many
    assert "and 9 more" in many
    assert "weights must be finite, but head.bias holds NaN" in told(lambda s: s["head.bias"].fill_(float("nan")))
    assert "weights must be finite, but cls_token holds NaN" in told(lambda s: s["cls_token"].fill_(float("inf")))
    for kind in (torch.int32, torch.float8_e4m3fn):
        text = told(lambda s, kind=kind: s.update({"norm.bias": s["norm.bias"].to(kind)}))
        assert "weights must be floating-point numbers of 16 bits or more, but norm.bias is" in text


def test_weights_of_another_architecture_leave_the_model_alone():
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = dict(tiny().state_dict())
    state["norm.bias"] = torch.full((32,), float("nan"))
    with pytest.raises(WeightsError):
        load_weights_(model, state, "somewhere")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_damaged_weights(tmp_path):
    whole = tmp_path / "whole.safetensors"
    save_file(tiny().state_dict(), whole)
    data, noise = whole.read_bytes(), random.Random(0).randbytes(4096)
    cases = {
        "half.safetensors": data[: len(data) // 2],
        "head.safetensors": data[:7],
        "noise.safetensors": noise,
        "empty.safetensors": b"",
        "noise.pth": noise,
        "brace.pth": b"{" + noise,
        "empty.pth": b"",
    }
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        text = refused(WeightsError, "test_vit", weights=str(tmp_path / name), arguments=TINY)
        assert f"{name}: the weights file must be whole and readable, but " in text
    torch.save(tiny().state_dict(), tmp_path / "whole.pth")
    (tmp_path / "half.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:20000])
    assert "half.pth: the weights file must be whole" in refused(
        WeightsError, "test_vit", weights=str(tmp_path / "half.pth"), arguments=TINY
    )
    assert "must exist, but it does not" in refused(WeightsError, "test_vit", weights=str(tmp_path / "none.pth"))
    assert "must exist, but it does not" in refused(WeightsError, "test_vit", weights=str(tmp_path))


def test_a_file_that_is_no_state_dict(tmp_path):
    for number, held in enumerate(([1, 2], {"model": 3}, {"epoch": 4}, torch.ones(2))):
        path = tmp_path / f"{number}.pth"
        torch.save(held, path)
        with pytest.raises(WeightsError, match="must hold a state dict of tensors"):
            read_weights(path)


class Mischief:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_weights_file_does_not_run(tmp_path):
    harm = tmp_path / "harm"
    torch.save({"model": {"head.weight": Mischief(harm)}}, tmp_path / "bad.pth")
    (tmp_path / "worse.pth").write_bytes(pickle.dumps(Mischief(harm)))
    for name in ("bad.pth", "worse.pth"):
        assert f"{name}: the weights file must be whole" in refused(
            WeightsError, "test_vit", weights=str(tmp_path / name)
        )
    assert not harm.exists()


def test_unknown_names():
    assert "did you mean 'vit_tiny_patch16_224'?" in refused(RecipeError, "vit_tinny_patch16_224")
    assert "`vitrim models` lists" in refused(RecipeError, "qqqqqqqqqqqq")
    assert "must be a timm name or a file that vitrim stored" in refused(RecipeError, "some/where")
    assert "must exist, but it does not" in refused(StoreError, "some/where.safetensors")
    assert "passed as an instance by another program" in refused(RecipeError, "(VisionTransformer in memory, 12345678)")


def test_weights_come_from_one_place(tmp_path):
    text = refused(RecipeError, "test_vit", weights="w.safetensors", random_weights=True)
    assert "both a file and random weights" in text


def test_pretrained_weights_out_of_reach(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    text = refused(WeightsError, "vit_tiny_patch16_224")
    assert text.startswith("vit_tiny_patch16_224: pretrained weights must be found, but ")
    assert text.endswith("; give --weights FILE or --random-weights")


def test_wrong_arguments():
    assert "unexpected keyword argument 'imgsize'" in refused(
        RecipeError, "test_vit", random_weights=True, arguments={"imgsize": 32}
    )
    text = refused(RecipeError, "test_vit", random_weights=True, arguments={**TINY, "num_heads": 5})
    assert text.startswith("test_vit: timm must build this model, but ")
    assert "Invalid pretrained tag" in refused(RecipeError, "test_vit.none_such", random_weights=True)


def test_a_stored_model(tmp_path):
    path = tmp_path / "stored.safetensors"
    model = adopt(tiny())
    store.save(model, path)
    assert torch.equal(logits(open_parent(str(path))), logits(model))
    for more in ({"weights": "w.pth"}, {"random_weights": True}, {"arguments": {"num_classes": 3}}):
        assert "a stored model must be taken as it is" in refused(RecipeError, str(path), **more)
    bare = tmp_path / "bare.safetensors"
    save_file(tiny().state_dict(), bare)
    assert "pass this file as --weights" in refused(StoreError, str(bare))
    path.write_bytes(path.read_bytes()[:-100])
    assert "must be whole safetensors" in refused(StoreError, str(path))


def test_a_model_that_no_family_takes_in():
    with pytest.raises(TypeError, match="but got ResNet"):
        open_parent("test_resnet", random_weights=True)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hiera_tiny_224", "but this is Hiera, and its attention pools"),
        ("naflexvit_base_patch16_gap", "but this is NaFlexViT, and its images change in size"),
        ("swinv2_cr_tiny_224", "but this is Swin V2 in another author's form"),
        ("samvit_base_patch16", "but this is SAM's encoder"),
        ("vit_base_patch16_xp_224", "blocks.0: a block must be timm's plain pre-norm Block, but got ParallelScaling"),
        ("vit_giant_patch16_sapiens2", "blocks.0.gamma_2: layer scale must be on both branches"),
        ("resnet50", "but this is a network of convolutions"),
    ],
)
def test_refusals_come_before_weights_and_name_what_is_near(name, words, monkeypatch):
    monkeypatch.setattr("vitrim.deploy.parent._create", lambda *_, **__: pytest.fail("weights were asked for"))
    said = refused(AdoptError, name)
    assert said.startswith(f"{name}: {words}") or words in said
    near = re.search(r"; near is (\S+)$", said)[1]
    assert near != name
    assert why_not_cut(near) is None


def test_guests():
    found = {entry["name"]: entry for entry in known_models("vit_tiny*")}
    tiny16 = found["vit_tiny_patch16_224"]
    assert set(tiny16) == {"name", "family", "macs", "params", "reason"}
    assert (tiny16["family"], tiny16["params"], tiny16["reason"]) == ("vit", 5_717_416, None)
    assert round(tiny16["macs"] / 1e9, 4) == 1.2537
    assert all(entry["reason"] is None or entry["macs"] == 0 for entry in found.values())
    (resnet,) = known_models("resnet50")
    assert (resnet["family"], resnet["macs"]) == ("", 0)
    assert "but this is a network of convolutions, and its blocks are convolutions" in resnet["reason"]
    with pytest.raises(RecipeError, match="but got 'vit_tny"):
        list(known_models("vit_tny*"))
