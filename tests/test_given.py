"""Models in memory as people bring them: wrapped, with another classifier, changed, of other libraries, quantised."""

import functools
import types
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torchvision import models as torchvision_models

import vitrim
from tests.tolerance import SINGLE
from vitrim.deploy import store
from vitrim.families import adopt, describe, get, names
from vitrim.words.errors import AdoptError, StoreError, VitrimError, WeightsError

TINY: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 32, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}


def vit(name: str = "vit_tiny_patch16_224", **arguments: Any) -> Any:
    torch.manual_seed(0)
    model = timm.create_model(name, **{**TINY, "num_classes": 5, **arguments}).eval()
    if isinstance(model.head, nn.Linear):
        nn.init.normal_(model.head.weight)
    return model


def swin() -> Any:
    torch.manual_seed(0)
    return timm.create_model("swin_tiny_patch4_window7_224", **SWIN, num_classes=5).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


def told(model: nn.Module, error: type[VitrimError] = AdoptError) -> str:
    with pytest.raises(error) as caught:
        adopt(model)
    text = str(caught.value)
    assert text.isprintable()
    assert "but" in text
    return text


# -- wrappers

WRAPPED = {
    "DataParallel": nn.DataParallel,
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "averaged": torch.optim.swa_utils.AveragedModel,
    "all of them": lambda m: nn.DataParallel(torch.compile(torch.optim.swa_utils.AveragedModel(m))),
    "compiled in place": lambda m: m.compile(backend="eager") or m,
}


@pytest.mark.parametrize("how", WRAPPED)
def test_wrappers_of_torch_come_off(how, tmp_path):
    model = vit()
    ours = adopt(WRAPPED[how](model))
    assert type(ours) is type(model)
    assert torch.allclose(logits(ours), logits(model), rtol=SINGLE, atol=SINGLE)
    assert torch.equal(logits(store.load(store.save(ours, tmp_path / "m.safetensors"))), logits(ours))


def test_where_a_wrapper_stays_it_is_named():
    model = vit()
    with pytest.raises(AdoptError, match=r"but got DataParallel, which wraps one; pass its \.module$"):
        describe(nn.DataParallel(model))
    with pytest.raises(AdoptError, match=r"but got OptimizedModule, which wraps one; pass its \._orig_mod$"):
        describe(torch.compile(model))

    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.neck, self.backbone = nn.Linear(2, 2), model

    assert told(Detector()).endswith("but got Detector, which wraps one; pass its .backbone")


# -- other libraries


def test_models_of_torchvision_are_called_what_they_are():
    with torch.device("meta"):
        known = {
            "vit_base_patch16_224": torchvision_models.vit_b_16(),
            "vit_large_patch32_224": torchvision_models.vit_l_32(),
            "swin_tiny_patch4_window7_224": torchvision_models.swin_t(),
            "swinv2_tiny_window8_256": torchvision_models.swin_v2_t(),
        }
        odd = torchvision_models.VisionTransformer(32, 8, 2, 2, 48, 64)
    for name, model in known.items():
        with pytest.raises(AdoptError, match=rf"torchvision's {type(model).__name__}; take {name} of timm$"):
            describe(model)
    with pytest.raises(AdoptError, match=r"VisionTransformer; take a model of timm, see `vitrim models`$"):
        describe(odd)


def test_models_of_transformers_are_called_what_they_are():
    kind = type("ViTModel", (nn.Module,), {"__module__": "transformers.models.vit.modeling_vit"})
    assert "but got ViTModel of Hugging Face transformers; vitrim.compress takes it" in told(kind())


# -- classifiers

TAKEN = {
    "linear": lambda m: nn.Linear(32, 7),
    "dropout and linear": lambda m: nn.Sequential(nn.Dropout(0.25), nn.Linear(32, 7)),
    "two dropouts": lambda m: nn.Sequential(nn.Dropout(0.5), nn.Identity(), nn.Dropout(0.5), nn.Linear(32, 7)),
    "nothing": lambda m: nn.Identity(),
}


@pytest.mark.parametrize("what", TAKEN)
def test_a_replaced_classifier_that_a_spec_can_say(what, tmp_path):
    model = vit(drop_rate=0.2)
    model.head = TAKEN[what](model)
    model.eval()
    before = dict(vars(model)), dict(model._modules)
    wanted = logits(model)
    ours: Any = adopt(model)
    assert (dict(vars(model)), dict(model._modules)) == before
    classes = 0 if what == "nothing" else 7
    assert (describe(ours).classes, ours.num_classes, wanted.shape[-1]) == (classes, classes, classes or 32)
    assert torch.allclose(logits(ours), wanted, rtol=SINGLE, atol=SINGLE)
    kept = {"dropout and linear": 0.8 * 0.75, "two dropouts": 0.8 * 0.25}.get(what, 0.8)
    assert ours.head_drop.p == pytest.approx(1 - kept)
    again: Any = store.load(store.save(ours, tmp_path / "m.safetensors"))
    assert torch.equal(logits(again), logits(ours))
    assert describe(again) == describe(ours)


def test_a_replaced_classifier_of_a_swin(tmp_path):
    model = swin()
    model.head.fc = nn.Sequential(nn.Dropout(0.5), nn.Linear(48, 7)).eval()
    wanted = logits(model)
    ours: Any = adopt(model)
    assert torch.allclose(logits(ours), wanted, rtol=SINGLE, atol=SINGLE)
    assert (describe(ours).classes, ours.num_classes, ours.head.drop.p) == (7, 7, 0.5)
    assert isinstance(model.head.fc, nn.Sequential)
    assert model.num_classes == 5
    assert describe(store.load(store.save(ours, tmp_path / "m.safetensors"))).classes == 7
    model = swin()
    model.head = nn.Linear(48, 7)
    assert "must be timm's ClassifierHead" in told(model)
    assert told(model).endswith("call model.reset_classifier(7) and fill model.head.fc")


def test_classifiers_that_a_spec_cannot_say():
    model = vit()
    model.head = nn.Sequential(nn.Linear(32, 16), nn.GELU(), nn.Linear(16, 7))
    assert "head: a classifier must be one linear layer, but got Sequential; call model.reset_classifier(7)" in told(
        model
    )
    model.head = nn.Linear(32, 7, bias=False)
    text = told(model)
    exec(text.split("`")[1], {"model": model, "torch": torch})
    ours = adopt(model)
    assert describe(ours).classes == 7
    assert torch.allclose(logits(ours), logits(model), rtol=SINGLE, atol=SINGLE)
    model = vit("deit_tiny_distilled_patch16_224")
    model.head = nn.Linear(32, 7)
    assert "two classifiers of as many classes, but has 7 and 5; call model.reset_classifier(7)" in told(model)
    model.reset_classifier(7)
    assert describe(adopt(model)).classes == 7


# -- additions


def add_buffer(model: Any) -> None:
    model.register_buffer("mean", torch.zeros(3))


def add_parameter(model: Any) -> None:
    model.patch_embed.prompt = nn.Parameter(torch.zeros(3))


@pytest.mark.parametrize(("add", "name"), [(add_buffer, "mean"), (add_parameter, "patch_embed.prompt")])
def test_added_tensors_are_refused_with_the_line_that_helps(add, name):
    model = vit()
    add(model)
    text = told(model)
    assert text.startswith(f"{name}: parameters and buffers must be those that timm's VisionTransformer has")
    exec(text.split("`")[1], {"model": model})
    adopt(model)


def test_a_buffer_that_is_not_saved_does_no_harm():
    model = vit()
    model.register_buffer("seen", torch.zeros(3), persistent=False)
    adopt(model)


def patched(model: Any, name: str) -> None:
    plain = getattr(model, name)
    setattr(model, name, functools.partial(plain))


@pytest.mark.parametrize("name", ["forward", "forward_head", "_pos_embed", "patch_embed.forward"])
def test_a_patched_method_is_refused_with_the_line_that_helps(name):
    """Also where it changes nothing: a copy's method would run the model that it was copied from."""
    model = vit()
    owner = model.patch_embed if "." in name else model
    leaf = name.split(".")[-1]
    setattr(owner, leaf, types.MethodType(getattr(type(owner), leaf), owner))
    text = told(model)
    assert text.startswith(f"{name}: must be the method of {type(owner).__name__}, but was replaced on this model")
    exec(text.split("`")[1], {"model": model})
    adopt(model)


@pytest.mark.parametrize(("family", "preset"), [(f, p) for f in names() for p in get(f).TEST_PRESETS])
def test_no_model_of_timm_is_taken_for_a_changed_one(family, preset):
    from vitrim.families._given import check_class, check_methods, with_own_head

    with torch.device("meta" if family == "vit" else "cpu"):
        model: Any = get(family).example(**get(family).TEST_PRESETS[preset])
    check_methods(model, [])
    check_class(model)
    assert with_own_head(model) is model


class Tripled(type(vit())):  # type: ignore[misc]
    """A class of one's own: it works in memory, but what is stored would be timm's."""

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None) -> torch.Tensor:
        return 3 * super().forward(x, attn_mask=attn_mask)


def hooked(model: Any) -> None:
    model.register_forward_hook(lambda _m, _i, out: 2 * out)


def tripled(model: Any) -> None:
    model.__class__ = Tripled


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (tripled, AdoptError, "forward: must be timm's, but Tripled has its own"),
        (hooked, StoreError, "must give the logits of the model in memory, but they differ"),
    ],
)
def test_what_could_not_be_stored_is_refused_before_the_search(change, error, says, tmp_path, monkeypatch):
    model = vit()
    change(model)

    def search(*_: Any, **__: Any) -> None:
        raise AssertionError("the search has begun")

    monkeypatch.setattr("vitrim.methods.magnitude.Method.search", search)
    with pytest.raises(error, match=says):
        vitrim.compress(model, method="magnitude", out=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    result = vitrim.compress(model, method="magnitude", measure={"latency": False})
    assert logits(result.model).shape == (2, 5)


# -- types that are not computed in


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_quantised_models_are_called_what_they_are():
    model = vit()
    assert "cls_token: weights must be float16, bfloat16, float32 or float64, but are" in told(
        vit().to(torch.float8_e4m3fn), WeightsError
    )
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert "blocks.0.attn.qkv: weights must be floating-point numbers, but this layer is quantised" in told(
        quantised, WeightsError
    )
