"""Law 16, asking changes nothing: descriptions, costs, files and tables leave random states, flags and models alone."""

import contextlib
import functools
import gc
import random
import threading
import warnings
import weakref

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tests.samples import FEW, adopted, random_plan, timm_model
from vitrim import families
from vitrim.cut import surgery
from vitrim.deploy import store
from vitrim.families import _parts, adopt, blocks_of, describe
from vitrim.families._segmentor import segmentor
from vitrim.measure import cost, counted
from vitrim.measure.parts import make_table
from vitrim.nn.counter import operations
from vitrim.nn.modes import evaluating, modes_kept
from vitrim.nn.segment import Head
from vitrim.words.costs import cost_of
from vitrim.words.errors import AdoptError

EACH = pytest.mark.parametrize(("family", "preset"), FEW, ids=[f"{family}-{preset}" for family, preset in FEW])


def shared():
    """What all threads of the process share, as values that compare."""
    numbers = np.random.get_state()
    hooks = torch.nn.modules.module
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": (numbers[0], numbers[1].tolist(), *numbers[2:]),
        "python": random.getstate(),
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
        "math": torch.backends.cuda.math_sdp_enabled(),
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "warnings": list(warnings.filters),
        "hooks": (len(hooks._global_forward_pre_hooks), len(hooks._global_forward_hooks)),
    }


def owned(model):
    """What a model is to its owner, as values that compare."""
    return {
        "modes": [module.training for module in model.modules()],
        "kinds": [type(module) for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "fused": [getattr(module, "fused_attn", None) for module in model.modules()],
        "wanted": [parameter.requires_grad for parameter in model.parameters()],
        "identities": [id(parameter) for parameter in model.parameters()],
        "gradients": [parameter.grad is None for parameter in model.parameters()],
        "weights": [value.tolist() for value in model.state_dict().values()],
    }


@contextlib.contextmanager
def unchanged(*models):
    before, theirs = shared(), [owned(model) for model in models]
    yield
    after = shared()
    assert {key for key in before if before[key] != after[key]} == set()
    for model, mine in zip(models, theirs, strict=True):
        now = owned(model)
        assert {key for key in mine if mine[key] != now[key]} == set()


def mixed_modes(model):
    """Leave parts of a model in other modes and frozen, as owners do."""
    for number, module in enumerate(model.modules()):
        module.training = number % 2 == 0
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 != 0)
    return model


def the_models(family, preset):
    """A timm model, the same adopted, and a child whose tokens are cut where they can be."""
    ours = adopt(timm_model(family, preset))
    yield timm_model(family, preset)
    yield ours
    yield surgery.apply(ours, random_plan(describe(ours), 1, drops="mixed"))


@EACH
def test_asking_changes_nothing(family, preset, tmp_path):
    theirs, ours, child = map(mixed_modes, the_models(family, preset))
    for model in (theirs, ours, child):
        with unchanged(model):
            spec = describe(model)
            cost(model)
            families.build(spec)
            with torch.device("meta"):
                families.build(spec)
            counted(model)
    with unchanged(theirs):
        adopt(theirs)
    for model in (ours, child):
        with unchanged(model):
            blocks_of(model)
            store.save(model, tmp_path / "model.safetensors", provenance={"a": 1})
            store.load(tmp_path / "model.safetensors")
            store.read_spec(tmp_path)
            store.provenance(tmp_path)


def test_asking_a_segmentor_changes_nothing(tmp_path):
    backbone = timm_model("vit", "plain", torch.float32)
    model = mixed_modes(segmentor(backbone, 4, Head(kind="linear", taps=(0, 0, 1, 2)), size=(32, 32)).eval())
    with unchanged(model):
        describe(model)
        counted(model)
        blocks_of(model)
        store.save(model, tmp_path / "model.safetensors")
        store.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize(("family", "preset"), [("vit", "plain"), ("swin", "windows")])
def test_a_table_of_times_changes_nothing(family, preset):
    model = mixed_modes(adopt(timm_model(family, preset, torch.float32)))
    with unchanged(model):
        make_table(model, batch=1, seconds=0.01, rounds=1)


class Watching(nn.Dropout):
    """Dropout before the head that notes what is shared while it runs, also when it runs in a copy."""

    during = None

    def forward(self, x):
        type(self).during()
        return super().forward(x)


def watched(during):
    """A model that calls `during` as it runs; a class of its own, so that it is counted anew."""
    model = timm_model("vit", "plain", torch.float32)
    model.head_drop = type("Watching", (Watching,), {"during": staticmethod(during)})(0.0)
    return model.eval()


def ask_all(model, tmp_path):
    describe(model)
    counted(model)
    ours = adopt(model)
    store.save(ours, tmp_path / "model.safetensors") if isinstance(ours.head, nn.Linear) else None


def test_nothing_shared_is_changed_meanwhile(tmp_path):
    seen = []
    model = watched(lambda: seen.append(shared()))
    before = shared()
    ask_all(model, tmp_path)
    assert len(seen) >= 4
    for during in seen:
        during.pop("gradients")  # of this thread alone
        assert {key for key in during if before[key] != during[key]} == set()


class Kernels(TorchDispatchMode):
    """Notes what this thread's operations come down to."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def test_another_thread_attends_as_ever_meanwhile(tmp_path):
    heard = []

    def attend():
        q = torch.randn(1, 2, 16, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad(), Kernels() as kernels:
            F.scaled_dot_product_attention(q, q, q)
        heard.append(kernels.names)

    def elsewhere():
        other = threading.Thread(target=attend)
        other.start()
        other.join()

    elsewhere()
    usual = heard.pop()
    assert any("flash" in name for name in usual)
    ask_all(watched(elsewhere), tmp_path)
    assert len(heard) >= 4
    assert all(names == usual for names in heard)


# What is counted once.


@pytest.fixture
def counting(monkeypatch):
    """An entry for each run of PyTorch's counter; what was counted before is forgotten."""
    calls = []

    def noted(call):
        calls.append("counted")
        return operations(call)

    monkeypatch.setattr(_parts, "operations", noted)
    monkeypatch.setattr(_parts, "_KNOWN", {})
    return calls


@EACH
def test_stem_and_head_are_counted_once(family, preset, counting):
    for model in the_models(family, preset):
        first = describe(model)
        taken = len(counting)
        assert describe(model) == first
        assert describe(timm_model(family, preset)).host.macs == first.host.macs
        assert len(counting) == taken
        _parts._KNOWN.clear()
        assert describe(model) == first
        assert len(counting) > taken


ONCE = 2
"""Runs of the counter for one ViT: stem and head, and the same with one channel more of the residual stream."""


def test_deit_is_counted_once(counting):
    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
    for _ in range(3):
        describe(model)
    assert len(counting) == ONCE


def grouped_stem(model):
    model.patch_embed.proj = nn.Conv2d(3, 48, 8, stride=8, groups=3).to(model.patch_embed.proj.weight)


def two_layers(model):
    model.head = nn.Sequential(nn.Linear(48, 8), nn.GELU(), nn.Linear(8, 10))


def other_layers(model):
    model.head = nn.Sequential(nn.Linear(48, 16), nn.GELU(), nn.Linear(16, 10))


def no_head(model):
    model.head = nn.Identity()


def pooled(model):
    model.attn_pool = timm.layers.AttentionPoolLatent(48, num_heads=3, mlp_ratio=2.0)
    model.global_pool = "map"


def hooked(model):
    model.head.register_forward_hook(lambda _module, _inputs, out: out @ out.mT)


def hooked_before(model):
    model.head.register_forward_pre_hook(lambda _module, inputs: inputs[0] @ inputs[0].new_ones(48, 48))


def own_method(model):
    plain = model.forward_head
    model.forward_head = lambda x, **others: plain(x, **others) @ x.new_ones(10, 7)


def own_function(model):
    model.head.forward = lambda x: x @ x.new_ones(48, 7)


CHANGES = {
    "fewer classes": lambda model: model.reset_classifier(5),
    "no classes": lambda model: model.reset_classifier(0),
    "another size": lambda model: model.set_input_size((64, 32)),
    "a stem in groups": grouped_stem,
    "two layers": two_layers,
    "no head": no_head,
    "attention that pools": pooled,
    "a hook": hooked,
    "a hook before": hooked_before,
    "a function": own_function,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("taken_in", [False, True], ids=["timm", "ours"])
def test_a_changed_stem_or_head_is_counted_again(change, taken_in, counting):
    model = timm_model("vit", "plain", torch.float32)
    model = adopt(model) if taken_in else model
    before = describe(model).host.macs
    change(model)
    told = describe(model).host
    _parts._KNOWN.clear()
    assert describe(model).host == told
    assert told.macs != before
    assert cost_of(describe(model)) == counted(model)


def test_two_heads_of_one_kind_are_told_apart(counting):
    macs = []
    for change in (two_layers, other_layers, two_layers):
        model = timm_model("vit", "plain", torch.float32)
        change(model)
        macs.append(describe(model).host.macs)
    assert macs[0] == macs[2] != macs[1]


def test_a_method_of_ones_own_is_no_known_structure(counting):
    model = timm_model("vit", "plain", torch.float32)
    describe(model)
    own_method(model)
    taken = len(counting)
    # It is the original's, and so cannot run without data; what was counted before is not told instead.
    with pytest.raises(AdoptError, match="must run on the meta device to be counted"):
        describe(model)
    assert len(counting) > taken


@pytest.mark.filterwarnings("ignore::UserWarning")  # timm's, as it resizes the table of biases
@pytest.mark.parametrize("preset", ["windows", "sizes"])
def test_a_changed_swin_is_counted_again(preset, counting):
    for change in (lambda m: m.reset_classifier(5), lambda m: m.set_input_size((64, 64))):
        model = timm_model("swin", preset, torch.float32)
        before = describe(model).host.macs
        change(model)
        told = describe(model).host
        _parts._KNOWN.clear()
        assert describe(model).host == told
        assert told.macs != before


def test_a_shared_layer_is_no_other_of_its_kind(counting):
    macs = []
    for shared_layer in (True, False):
        model = timm_model("vit", "plain", torch.float32)
        layer = nn.Linear(10, 10)
        model.head = nn.Sequential(nn.Linear(48, 10), layer, layer if shared_layer else nn.Linear(10, 10))
        macs.append(describe(model).host)
    assert macs[0].macs == macs[1].macs
    assert macs[0].params == macs[1].params - 110


def closing_over(value):
    return lambda x: x + value


def with_default(x, value=nn.Identity()):  # noqa: B008 what is tested
    return value(x)


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(2),
        torch.ones(2).add,
        [].append,
        object(),
        nn.Linear(2, 2),
        [nn.Linear(2, 2)],
        {"layer": nn.Linear(2, 2)},
        closing_over(3),
        with_default,
        functools.partial(closing_over(3)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_attribute_of_another_kind_is_no_known_structure(value, counting):
    model = timm_model("vit", "plain", torch.float32)
    vars(model.head)["own"] = value
    told = [describe(model).host, describe(model).host]
    assert told[0] == told[1]
    assert len(counting) == 2 * ONCE
    assert _parts._KNOWN == {}


@pytest.mark.parametrize(
    "values",
    [(True, 1), (1, 1.0), (0, None), ("1", 1), ((1,), [1]), (F.gelu, F.relu), (nn.GELU, nn.ReLU)],
    ids=lambda pair: "-".join(type(one).__name__ + getattr(one, "__name__", "") for one in pair),
)
def test_plain_attributes_tell_structures_apart(values, counting):
    for value in (*values, *values):
        model = timm_model("vit", "plain", torch.float32)
        model.head.own = value
        describe(model)
    assert len(counting) == 2 * ONCE


def test_what_is_remembered_is_bounded_and_keeps_no_model(counting, monkeypatch):
    monkeypatch.setattr(_parts, "_MOST", 2)
    for classes in range(2, 8):
        model = timm_model("vit", "plain", torch.float32)
        model.reset_classifier(classes)
        describe(model)
    assert 1 <= len(_parts._KNOWN) <= 2
    for change in (lambda _: None, own_method, pooled):
        model = timm_model("vit", "plain", torch.float32)
        change(model)
        with contextlib.suppress(AdoptError):
            describe(model)
        gone = weakref.ref(model)
        del model
        gc.collect()
        assert gone() is None


@EACH
def test_paths_of_blocks_need_no_price(family, preset, monkeypatch):
    model = adopted(family, preset)
    spec = describe(model)

    def fail(*_):
        raise AssertionError("nothing is to be counted")

    monkeypatch.setattr(_parts, "operations", fail)
    monkeypatch.setattr(_parts, "_KNOWN", {})
    assert [path for path, _ in blocks_of(model)] == [path for path, _, _ in spec.blocks()]
    assert [block.spec for _, block in blocks_of(model)] == [block for _, _, block in spec.blocks()]
    with pytest.raises(AdoptError, match=r"its blocks are not vitrim's; call vitrim\.adopt"):
        blocks_of(timm_model(family, preset))


@EACH
def test_the_count_is_that_of_pytorchs_counter(family, preset):
    for model in the_models(family, preset):
        x = torch.zeros(1, 3, *describe(model).image, dtype=torch.float64)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model.requires_grad_(False)(x)
        model.requires_grad_(True)
        assert operations(lambda model=model, x=x: model(x)) == counter.get_total_flops()
        with torch.inference_mode():
            assert operations(lambda model=model, x=x: model(x)) == counter.get_total_flops()


# What is put back.


def test_modes_and_wanted_gradients_are_put_back():
    model = mixed_modes(timm_model("vit", "plain"))
    other = mixed_modes(timm_model("swin", "windows"))
    with unchanged(model, other):
        with evaluating(model, None, other, frozen=True):
            assert not any(module.training for net in (model, other) for module in net.modules())
            assert not any(parameter.requires_grad for net in (model, other) for parameter in net.parameters())
        with evaluating(model):
            assert any(parameter.requires_grad for parameter in model.parameters())
        with modes_kept(model):
            model.train()

    def fail():
        with evaluating(model, frozen=True):
            raise KeyboardInterrupt

    with unchanged(model), pytest.raises(KeyboardInterrupt):
        fail()
