"""Half, bfloat16 and double parents: every method, training, evaluation, compensation, curves and transfer."""

import copy
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import vitrim
from tests.samples import WHOLE, digits
from tests.test_transfer import write_scenes
from vitrim import methods
from vitrim.cut.surgery import apply
from vitrim.data import eval_loader
from vitrim.deploy import store
from vitrim.families import adopt
from vitrim.nn import attention as attend
from vitrim.nn.feed import fed, wide
from vitrim.run.curve import pareto
from vitrim.run.transfer import TransferRecipe
from vitrim.run.transfer.run import transfer
from vitrim.train import Distill, Train, evaluate, fit, reference_logits
from vitrim.train.widen import narrow_, widen_
from vitrim.words.budget import Budget
from vitrim.words.plain import load

TYPES = (torch.float16, torch.bfloat16, torch.float64) if WHOLE else (torch.bfloat16, torch.float64)
SHORT = {"epochs": 0.5, "batch": 32, "augment": {"kind": "light"}, "mixup": 0, "cutmix": 0, "warmup_epochs": 0}
QUICK: dict[str, Any] = {"train": SHORT, "trials": 3, "initial": 2}

each_type = pytest.mark.parametrize("dtype", TYPES, ids=lambda kind: str(kind).removeprefix("torch."))


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small(dtype: torch.dtype, depth: int = 3) -> nn.Module:
    """A model of a few blocks on 4 x 4 patches, whose outputs differ from image to image."""
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": depth, "num_heads": 2, "num_classes": 10}
    model = timm.create_model("vit_tiny_patch16_224", **sizes).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return adopt(model.to(dtype))


def images(count: int) -> TensorDataset:
    """Pictures in memory, of all ten classes."""
    pictures = torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(count))
    return TensorDataset(pictures, torch.arange(count) % 10)


def types_of(model: nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters()}


@each_type
@pytest.mark.parametrize("name", methods.names())
def test_every_method_searches_and_trains_in_it(name, dtype):
    model, fields = small(dtype), methods.settings_of(name).model_fields
    data = digits(model)
    method = methods.get(name, {key: value for key, value in QUICK.items() if key in fields})
    found = method.search(model, data, Budget.parse("macs=0.7"), seed=0, teacher=model)
    assert types_of(found.parent) == {dtype}
    child = apply(found.parent, found.plan, grafts=found.grafts)
    assert types_of(child) == {dtype}
    before = {key: value.clone() for key, value in child.state_dict().items()}
    settings = Train(**SHORT, lr=1e-3, ema=0.9, distill=Distill(kind="soft"))
    fitted = fit(child, data.train, settings, input=data.input, seed=0, teacher=model)
    assert types_of(child) == types_of(fitted.ema) == {dtype}
    assert sum(not torch.equal(value, before[key]) for key, value in child.state_dict().items()) > len(before) / 2
    loader = eval_loader(data.validation, data.input)
    measured = evaluate(child, loader, reference=reference_logits(model, loader), classes=10)
    assert measured.top1 is not None
    assert types_of(model) == {dtype}


@each_type
def test_what_is_found_is_what_float32_finds(dtype):
    """Scores are sums in a wider type; a shorter one only rounds what goes in."""
    kept = []
    for kind in (dtype, torch.float32):
        model = small(kind)
        plan = methods.get("taylor").search(model, digits(model), Budget.parse("macs=0.7"), seed=0).plan
        kept.append([set(block.hidden or ()) for block in plan.blocks()])
    same = sum(len(mine & theirs) for mine, theirs in zip(*kept, strict=True))
    assert same > 0.9 * sum(len(theirs) for theirs in kept[1]) > 0


@each_type
def test_a_whole_run_with_compensation(dtype, tmp_path):
    result = vitrim.compress(
        small(dtype),
        images(40),
        test=images(20),
        method="magnitude",
        recover="ridge",
        budget="macs=0.7",
        epochs=0.5,
        train={"batch": 10, "augment": {"kind": "light"}, "mixup": 0, "cutmix": 0},
        recipe={"data": {"calibration": 10, "validation": 10}},
        measure={"seconds": 0.1, "batch": 1},
        out=tmp_path / "run",
    )
    assert types_of(result.model) == {dtype}
    assert types_of(store.load(tmp_path / "run" / "model.safetensors")) == {dtype}
    assert result.measured["top1"] is not None
    assert result.measured["latency_ratio"] > 0


@each_type
def test_curves(dtype, tmp_path):
    store.save(small(dtype, depth=2), tmp_path / "parent.safetensors")
    asked = {
        "model": {"name": str(tmp_path / "parent.safetensors")},
        "data": {"train": "digits", "calibration": 32, "validation": 32},
        "measure": {"latency": False},
    }
    made = pareto(asked, tmp_path / "curve", ["macs=0.7"])
    assert types_of(made.results[0].model) == {dtype}


@each_type
def test_transfer(dtype, tmp_path):
    torch.manual_seed(0)
    sizes = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
    backbone = adopt(timm.create_model("vit_tiny_patch16_224", **sizes).eval().to(dtype))
    asked = {
        "model": {"name": "(a model)"},
        "data": {"train": str(write_scenes(tmp_path / "street", (("train", 3), ("test", 2))))},
        "head": {"width": 32, "channels": 32},
        "train": {"epochs": 1, "batch": 2, "ema": 0.9},
        "measure": {"latency": False},
    }
    done = transfer(load(TransferRecipe, asked), tmp_path / "run", backbone=backbone)
    assert types_of(done.model) == {dtype}
    assert 0 <= done.measured["miou"] <= 100


def test_types_come_back_as_they_were():
    """Each parameter its own, and the objects the same; what is float32 or double is not touched."""
    model = nn.Sequential(
        nn.Linear(2, 2).half(), nn.Linear(2, 2), nn.BatchNorm1d(2).bfloat16(), nn.Linear(2, 2).double()
    )
    before, objects = {name: value.clone() for name, value in model.state_dict().items()}, list(model.parameters())
    types = widen_(model)
    assert {value.dtype for value in model.parameters()} == {torch.float32, torch.float64}
    assert model[2].running_mean.dtype == torch.float32
    narrow_(model, types)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: value.dtype for name, value in model.state_dict().items()} == {n: v.dtype for n, v in before.items()}
    assert all(a is b for a, b in zip(objects, model.parameters(), strict=True))
    assert widen_(nn.Linear(2, 2)) == {}


def test_images_in_the_type_of_a_model():
    x = torch.randn(1, 3, 2, 2)
    assert fed(x, nn.Linear(2, 2).half()).dtype == torch.float16
    assert fed(x, nn.ReLU()) is x
    assert fed(x, nn.Linear(2, 2)) is x
    assert wide(x.half()).dtype == torch.float32
    assert wide(x.double()).dtype == torch.float64


@pytest.mark.parametrize("masked", [False, True])
def test_fused_attention_in_bf16_has_its_gradients_in_float32_on_a_cpu(masked, monkeypatch):
    """Its backward pass in bf16 is slow there. Outputs stay bf16, and the gradients are no worse than bf16's."""
    real, kinds = F.scaled_dot_product_attention, []

    def heard(q, k, v, **rest):
        kinds.append((q.dtype, k.dtype, v.dtype))
        return real(q, k, v, **rest)

    attention = small(torch.float32).blocks[0].attn
    monkeypatch.setattr(F, "scaled_dot_product_attention", heard)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 17, 32, generator=draw)
    bias = torch.randn(3, 1, 1, 17, generator=draw) if masked else None

    def gradient(kind, fused=True):
        part = copy.deepcopy(attention).to(kind)
        part.fused_attn = fused
        given = x.to(kind).requires_grad_()
        out = part(given, key_bias=None if bias is None else bias.to(kind))
        assert out.dtype == kind
        return torch.autograd.grad(out.square().sum(), given)[0].double()

    exact = gradient(torch.float64, fused=False)
    ours = gradient(torch.bfloat16)
    with torch.no_grad():
        attention.bfloat16()(x.bfloat16(), key_bias=None if bias is None else bias.bfloat16())
    assert kinds == [(torch.float32,) * 3, (torch.bfloat16,) * 3]
    monkeypatch.setattr(attend, "_slow_backward", lambda *_: False)
    plain = gradient(torch.bfloat16)
    assert kinds[-1] == (torch.bfloat16,) * 3
    assert float((ours - exact).norm()) <= 1.05 * float((plain - exact).norm())
