"""The form that a model runs in computes what the stored model does, in shapes that hardware likes, and only runs."""

import contextlib
import copy
import json
import statistics
import types
import warnings
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from tests.children import CHOOSING, KINDS, ONE_OF_EACH, child, child_of, children, has
from tests.operators import operators
from tests.samples import FEW, IDS, PRESETS, WHOLE, adopted, apart, images
from tests.tolerance import EXACT, SINGLE
from vitrim import families
from vitrim.cut.optimized import optimize_block_
from vitrim.cut.optimized.stem import PatchProduct
from vitrim.cut.optimized.widths import padded_heads, up
from vitrim.cut.surgery import apply
from vitrim.deploy import optimized, runtimes, store
from vitrim.deploy.runtimes.ready import _Recorded
from vitrim.families import blocks_of, describe
from vitrim.measure import latency
from vitrim.measure.parts import machine_of, make_table
from vitrim.nn import Attention, Conv, Mlp
from vitrim.nn.masks import ROW
from vitrim.nn.segment import Head
from vitrim.words.errors import AdoptError, DataError, ExportError, PlanError, RecipeError, StoreError, WeightsError
from vitrim.words.plan import BlockPlan, Plan

EACH = pytest.mark.parametrize(("family", "preset"), PRESETS, ids=IDS)
SOME = pytest.mark.parametrize(
    ("family", "preset"), PRESETS if WHOLE else [each for each in PRESETS if each in FEW or PRESETS.index(each) % 2]
)
ONE_EACH = pytest.mark.parametrize(("family", "preset"), FEW, ids=[f"{family}-{preset}" for family, preset in FEW])
FORMS = ({}, {"multiple": 8, "pad_heads": True}, {"multiple": 10}, {"pad_heads": True})
"""As on a CPU, as on CUDA in 16 bits, and what may be asked for: 10 divides no width of the presets."""


def blocks(model):
    """The blocks of a model in the form that it runs in."""
    return [block for stage in families.family_of(model).blocks_by_stage(model) for block in stage]


def answers(model, x):
    """Features and logits."""
    with torch.no_grad():
        features = model.forward_features(x)
        return features, model.forward_head(features)


# -- the same function


@SOME
def test_it_is_the_same_function(family, preset):
    x = images(describe(adopted(family, preset)))
    for number, (kind, model) in enumerate(children(family, preset), IDS.index(f"{family}-{preset}")):
        wanted = answers(model, x)
        for form in FORMS if kind in ("dense", "free") else [FORMS[number % len(FORMS)]]:
            for found, want in zip(answers(optimized(model, **form), x), wanted, strict=True):
                assert apart(found, want) < EXACT, (kind, form)


def test_every_kind_of_child_is_met():
    met = dict.fromkeys(KINDS, 0)
    for family, preset in PRESETS:
        spec = describe(adopted(family, preset))
        for kind, plan in KINDS.items():
            with contextlib.suppress(PlanError):
                assert has(plan(spec).child(spec), kind), (family, preset, kind)
                met[kind] += 1
    assert min(met.values()) >= 10, met


def rms(found, wanted):
    return float((found.double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


@(EACH if WHOLE else ONE_EACH)
def test_rounding_in_bfloat16_is_that_of_the_stored_model(family, preset):
    x = images(describe(adopted(family, preset)), 6)
    dense, ratios = None, []
    for kind, model in children(family, preset):
        with torch.no_grad():
            wanted = model(x)
            stored = rms(copy.deepcopy(model).to(torch.bfloat16)(x.bfloat16()), wanted)
            found = rms(optimized(model, dtype=torch.bfloat16)(x.bfloat16()), wanted)
        dense = stored if dense is None else dense
        if kind not in CHOOSING:
            assert found < 3 * max(stored, dense), kind
            ratios.append(found / stored)
    assert statistics.geometric_mean(ratios) < 1.25


@pytest.mark.parametrize("kind", CHOOSING)
def test_tokens_are_chosen_alike_in_float32(kind):
    model = child("vit", "plain", kind)
    x = images(describe(model), 4)
    with torch.no_grad():
        assert apart(optimized(model, dtype=torch.float32)(x.float()).double(), model(x)) < 1e-4


@pytest.mark.parametrize(("family", "preset"), [("vit", "registers"), ("swin", "windows"), ("t2t", "performer")])
@pytest.mark.parametrize("kind", ["even", "grid-linear", "random-conv-0"])
def test_features_of_blocks_are_kept(family, preset, kind):
    model = child(family, preset, kind)
    if model is None:
        pytest.skip("windows keep their grid")
    x = images(describe(model))
    with torch.no_grad():
        wanted = model.forward_intermediates(x, intermediates_only=True, norm=False)
        found = optimized(model, multiple=8).forward_intermediates(x, intermediates_only=True, norm=False)
    for a, b in zip(found, wanted, strict=True):
        assert apart(a, b) < EXACT


@pytest.mark.parametrize(
    ("family", "preset", "size"),
    [("vit", "dynamic", (40, 24)), ("swin", "dynamic", (40, 24)), ("swin", "dynamic", (32, 32))],
)
def test_images_of_several_sizes(family, preset, size):
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for kind in ("dense", "free"):
        model = child(family, preset, kind)
        with torch.no_grad():
            assert apart(optimized(model, multiple=8)(x), model(x)) < EXACT


@pytest.mark.parametrize("kind", ["fpn", "linear"])
def test_a_segmentor(kind):
    pytest.importorskip("segmentation_models_pytorch")
    from vitrim.families._segmentor import segmentor

    torch.manual_seed(0)
    backbone = child("vit", "plain", "grid-linear")
    model = segmentor(backbone, 5, Head(kind=kind, width=32, channels=32)).double().eval()
    x = images(describe(model))
    found = optimized(model, multiple=8, pad_heads=True)
    with torch.no_grad():
        assert apart(found(x), model(x)) < EXACT
    assert isinstance(found.backbone.patch_embed.proj, PatchProduct)


# -- the patch embedding


@pytest.mark.parametrize("multiple", [1, 8, 16])
@pytest.mark.parametrize(("patch", "size"), [((14, 14), (28, 42)), ((4, 6), (9, 20)), ((16, 16), (32, 32))])
@pytest.mark.parametrize("channels", [1, 3])
def test_patches_are_one_product(patch, size, channels, multiple):
    conv = nn.Conv2d(channels, 10, patch, stride=patch, bias=channels == 3).double()
    product = PatchProduct(conv, multiple)
    assert product.weight.shape[1] % multiple == 0
    assert product.weight.shape[1] < channels * patch[0] * (patch[1] + multiple)
    x = torch.randn(2, channels, *size, dtype=torch.float64)
    with torch.no_grad():
        found, wanted = product(x), conv(x)
    assert apart(found, wanted) < EXACT
    assert found.permute(0, 2, 3, 1).is_contiguous()


def test_a_stem_of_another_kind_stays():
    model = families.adopt(timm.create_model("vit_tiny_r_s16_p8_224", img_size=32, num_classes=10, depth=1).eval())
    assert not any(isinstance(module, PatchProduct) for module in optimized(model).modules())
    one = families.adopt(timm.create_model("vit_tiny_patch16_224", img_size=32, in_chans=1, depth=1).eval())
    stem = optimized(one).patch_embed
    assert (type(stem.proj), stem.in_chans) == (PatchProduct, 1)
    stem = copy.deepcopy(one)
    stem.patch_embed.proj.padding = (1, 1)
    assert type(optimized(stem).patch_embed.proj) is nn.Conv2d


# -- widths


@EACH
@pytest.mark.parametrize(("form", "multiple"), [({"dtype": torch.bfloat16}, 8), ({"multiple": 16}, 16)])
def test_widths_are_multiples_where_no_norm_ties_them(family, preset, form, multiple):
    for kind in ("free", "random-1", "conv1-folded-zero", "conv3-mixed-norm"):
        model = child(family, preset, kind)
        if model is None:
            continue
        for block, stored in zip(blocks(optimized(model, **form)), blocks(model), strict=True):
            if isinstance(block.attn, Attention):
                assert block.attn.tied_qk or not any(k % multiple for k in block.attn.qk)
                assert block.attn.tied_v or not any(k % multiple for k in block.attn.v)
                assert all(0 <= new - old < multiple for new, old in zip(block.attn.v, stored.attn.v, strict=True))
                assert block.attn.qkv.weight.shape[0] == sum(block.attn.sizes) == block.attn.qkv.out_features
                assert block.attn.proj.weight.shape[1] == sum(block.attn.v)
            elif isinstance(block.attn, Conv):
                assert block.attn.conv.weight.shape[0] % multiple == 0
            if isinstance(block.mlp, Mlp):
                hidden = block.mlp.get_submodule(block.mlp.last).in_features
                assert block.mlp.tied or hidden % multiple == 0
                assert 0 <= hidden - stored.mlp.hidden < multiple


def test_heads_of_several_widths_become_alike_where_that_is_asked_for():
    assert padded_heads((5, 9), (3, 4), 8, one_width=False) == ((8, 16), (8, 8))
    assert padded_heads((5, 9), (3, 4), 8, one_width=True) == ((16, 16), (16, 16))
    assert padded_heads((5, 9), (30, 4), 1, one_width=True) == ((30, 30), (30, 30))
    assert padded_heads((12, 12), (3, 4), 8, one_width=True, tied_qk=True) == ((12, 12), (12, 12))
    assert padded_heads((12, 12), (30, 4), 8, one_width=True, tied_qk=True) == ((12, 12), (32, 32))
    assert padded_heads((5, 9), (12, 12), 8, one_width=True, tied_v=True) == ((12, 12), (12, 12))
    assert padded_heads((5, 9), (7, 7), 8, one_width=True, tied_v=True) == ((16, 16), (7, 7))
    assert padded_heads((12, 12), (7, 7), 8, one_width=True, tied_qk=True, tied_v=True) == ((12, 12), (7, 7))
    assert [up(n, 8) for n in (1, 8, 9)] == [8, 8, 16]
    model = child("vit", "plain", "free")
    assert not any(block.attn.even for block in blocks(optimized(model)))
    assert all(block.attn.even for block in blocks(optimized(model, pad_heads=True)))


def test_a_tap_that_is_listened_to_keeps_its_width():
    model = copy.deepcopy(child("vit", "plain", "even"))
    block = blocks(model)[0]
    block.mlp.tap.register_forward_hook(lambda *_: None)
    block.attn.v_tap = nn.Identity()
    first, second, _ = blocks(optimized(model, multiple=16))
    assert (first.mlp.hidden, first.attn.v) == (block.mlp.hidden, block.attn.v)
    assert second.mlp.hidden % 16 == 0


# -- folds


def test_norms_and_scales_are_folded_where_nothing_else_reads_them():
    model = child("vit", "registers", "dense")
    for block in blocks(optimized(model)):
        assert isinstance(block.ls1, nn.Identity)
        assert isinstance(block.ls2, nn.Identity)
        for norm in (block.norm1, block.norm2):
            assert bool((norm.weight == 1).all())
            assert bool((norm.bias == 0).all())
    exact, normed = (child("vit", "registers", kind) for kind in ("dropped-exact", "conv1-folded-norm"))
    for kept in (exact, normed):
        for block, stored in zip(blocks(optimized(kept)), blocks(kept), strict=True):
            assert torch.equal(block.norm1.weight, stored.norm1.weight)
            assert bool((block.norm2.weight == 1).all())
    plain = child("vit", "swiglu", "dropped-exact")
    assert all(block.norm1.weight is None for block in blocks(optimized(plain)))


def test_constant_branches_become_biases():
    model = child("vit", "plain", "dead")
    found = [(type(block.attn).__name__, type(block.mlp).__name__) for block in blocks(optimized(model))]
    assert found == [("Constant", "Mlp"), ("Attention", "NoneType"), ("NoneType", "Constant")]


def test_what_a_short_type_cannot_resolve_stays_as_it_is_stored():
    torch.manual_seed(0)
    model = families.adopt(families.get("vit").example(init_values=1e-5).eval())
    spec = describe(model)
    dead = apply(model, Plan.of(spec, [BlockPlan(hidden=())] * 3))
    with torch.no_grad():
        for block in blocks(dead):
            block.mlp.bias.normal_()
    x = images(spec, 2, torch.float32)
    for net in (model, dead):
        half = optimized(net, dtype=torch.float16)
        assert all(not isinstance(block.ls1, nn.Identity) for block in blocks(half))
        assert all(isinstance(block.ls1, nn.Identity) for block in blocks(optimized(net, dtype=torch.bfloat16)))
        with torch.no_grad():
            assert rms(half(x.half()), net(x).double()) < 5e-3


def test_a_quantizer_gets_its_widths_and_norms_as_they_are():
    model = child("vit", "registers", "free")
    x = images(describe(model))
    net = optimized(model, dtype=torch.int8)
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}
    for block, stored in zip(blocks(net), blocks(model), strict=True):
        assert torch.equal(block.norm1.weight, stored.norm1.weight.float())
        assert not any(width % 16 for width in (*block.attn.qk, *block.attn.v, block.mlp.hidden))
    with torch.no_grad():
        assert apart(net(x.float()).double(), model(x)) < 10 * SINGLE


# -- masks


def test_masks_are_left_out_where_all_tokens_count_alike():
    even = child("vit", "average", "grid-mean-sized")
    assert describe(even).stages[0].prefix == 0
    for block in blocks(optimized(even)):
        assert block.step.keys(torch.zeros(1, 1, 1))[1] is None
    counted = child("vit", "plain", "grid-mean-sized")
    for block in blocks(optimized(counted)):
        x = torch.zeros(2, block.step.attended.total, 48, dtype=torch.float64)
        given, mask = block.step.keys(x)
        assert given is x
        assert mask.shape == (1, 1, 1, x.shape[1])
        assert all(stride % ROW == 0 for stride in mask.stride()[:-1])


@pytest.mark.parametrize("preset", ["windows", "padded", "always", "sizes"])
def test_biases_of_windows_lie_as_kernels_want_them(preset):
    for block in blocks(optimized(child("swin", preset, "dense"), dtype=torch.bfloat16)):
        mask, area = block.attn._bias(block.blocked), block.window.area
        assert mask.shape[-2:] == (area, area)
        assert mask.dtype == torch.bfloat16
        assert all(stride % ROW == 0 for stride in mask.stride()[:-1])


# -- operators


OPERATORS = json.loads((Path(__file__).parent / "operators.json").read_text(encoding="utf-8"))
"""By preset and kind of child: operators that compute something in one pass, of the model as stored, in the form that
it runs in on a CPU, and in that of CUDA in 16 bits. ``python -m tests.operators`` writes it."""


@pytest.mark.parametrize("name", OPERATORS)
def test_no_operator_is_added_unseen(name):
    family, preset = name.split("-")
    for kind, model in children(family, preset):
        x = images(describe(model))
        forms = (model, optimized(model), optimized(model, multiple=8, pad_heads=True))
        told = [operators(net, x).total() for net in forms]
        most = OPERATORS[name][kind]
        assert all(found <= allowed for found, allowed in zip(told, most, strict=True)), (
            f"{kind}: operators must be at most {most}, but are {told}; if they must be, run python -m tests.operators"
        )


def test_an_added_operator_is_seen():
    model = optimized(child("vit", "plain", "dense"))
    x = images(describe(child("vit", "plain", "dense")))
    before = operators(model, x)
    blocks(model)[1].drop_path2 = nn.Softplus()
    assert (operators(model, x) - before).total() == 1
    views = nn.Sequential(model, nn.Flatten(0), nn.Unflatten(0, (2, -1)))
    assert operators(views, x).total() == before.total() + 1


def test_a_dense_block_runs_ten_operators():
    """Two norms, four linear layers, attention, an activation and two sums."""
    model = optimized(child("vit", "plain", "dense"))
    x = images(describe(child("vit", "plain", "dense")))
    whole = operators(model, x)
    model.blocks = model.blocks[:-1]
    less = operators(model, x)
    assert (whole - less).total() == 10
    assert whole["convolution"] == 0


# -- compiled


@pytest.mark.parametrize(("family", "preset"), [("vit", "plain"), ("swin", "windows"), ("t2t", "performer")])
def test_compilers_take_every_child_whole(family, preset):
    for kind, model in children(family, preset):
        if not WHOLE and family != "vit" and kind not in ("dense", "free", "dead", "merged"):
            continue  # convolutions, steps and what is skipped are those of a ViT, which is tried whole
        if not WHOLE and (kind not in ONE_OF_EACH or kind.startswith("random")):
            continue  # in this form convolutions of all states are the folded one, and merges one linear layer
        x = images(describe(model), 2, torch.float32)
        net = optimized(model, dtype=torch.float32)
        torch._dynamo.reset()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            told = torch._dynamo.explain(net)(x)
        assert (told.graph_count, told.graph_break_count) == (1, 0), (kind, told.break_reasons)


# -- only to be run


@ONE_EACH
def test_what_was_given_is_left_as_it_was(family, preset):
    model = copy.deepcopy(child(family, preset, "random-0")).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    spec, wanted = describe(model), [parameter.requires_grad for parameter in model.parameters()]
    net = optimized(model, dtype=torch.float32, multiple=16, pad_heads=True)
    assert describe(model) == spec
    assert model.training
    assert not net.training
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    mine = {p.data_ptr() for p in model.parameters()} | {b.data_ptr() for b in model.buffers()}
    assert not mine & {t.data_ptr() for t in (*net.parameters(), *net.buffers())} - {0}
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_it_cannot_be_described_cut_stored_or_resized(tmp_path):
    model = child("vit", "plain", "even")
    net = optimized(model)
    for act in (
        lambda: describe(net),
        lambda: blocks_of(net),
        lambda: families.adopt(net),
        lambda: apply(net, Plan.keep(describe(model))),
        lambda: store.save(net, tmp_path / "model.safetensors"),
        lambda: optimized(net),
    ):
        with pytest.raises((AdoptError, StoreError), match=r"the model that (it|the copy) was made from"):
            act()
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="set it on the model that it was made from"):
        net.set_input_size(img_size=(64, 64))


def test_wrong_requests():
    model = child("vit", "plain", "dense")
    for multiple in (0, 65, -8, 2.0, True):
        with pytest.raises(RecipeError, match="multiple must be a whole number from 1 to 64, but got"):
            optimized(model, multiple=multiple)
    for dtype in (torch.int32, torch.complex64, torch.float8_e4m3fn):
        with pytest.raises(
            RecipeError, match="dtype must be one of float64, float32, bfloat16, float16, int8, but got"
        ):
            optimized(model, dtype=dtype)
    with pytest.raises(AdoptError, match=r"call vitrim\.adopt"):
        optimized(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1))
    with pytest.raises(AdoptError, match=r"call vitrim\.adopt"):
        optimized(nn.Linear(2, 2))
    with torch.device("meta"):
        empty = families.build(describe(model))
    with pytest.raises(WeightsError, match="must have weights"):
        optimized(empty)


# -- where it is used


def test_measurements_run_it_unless_they_are_told_not_to(monkeypatch):
    model, theirs = child("vit", "plain", "free"), timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    ran, x, real = [], images(describe(model), 1), type(model).forward
    assert type(theirs) is type(model)
    monkeypatch.setattr(type(model), "forward", lambda self, x: (ran.append(self), real(self, x))[1])
    for as_stored in (False, True):
        ran.clear()
        taken = latency(model, model, batch=1, seconds=1e-6, runs=2, warmup=1, as_stored=as_stored)
        assert taken.as_stored == as_stored
        assert {isinstance(net.patch_embed.proj, PatchProduct) for net in ran} == {not as_stored}
        assert (ran[0] is model) == as_stored
        found = runtimes.ready(model, x, as_stored=as_stored)
        ran.clear()
        found.run(x)
        assert isinstance(ran[0].patch_embed.proj, PatchProduct) != as_stored
        assert found.apart < SINGLE
        assert machine_of(model, as_stored=as_stored).as_stored == as_stored
    ran.clear()
    latency(theirs, image=(3, 32, 32), batch=1, seconds=1e-6, runs=2, warmup=1)
    assert {type(net.patch_embed.proj) for net in ran} == {nn.Conv2d}


def test_tables_of_both_forms_are_told_apart(monkeypatch):
    model = child("vit", "plain", "dense")
    parts = []
    monkeypatch.setattr("vitrim.measure.parts.optimize_block_", lambda *given: parts.append(optimize_block_(*given)))
    tables = [make_table(model, batch=1, threads=1, seconds=0.01, rounds=1, as_stored=form) for form in (True, False)]
    assert [table.machine.as_stored for table in tables] == [True, False]
    assert "as stored" in str(tables[0].machine)
    assert "as stored" not in str(tables[1].machine)
    assert len(parts) > 20
    assert all(type(block.drop_path1) is nn.Identity for block in parts)
    with pytest.raises(AdoptError):
        make_table(optimized(model), batch=1)


# -- CUDA graphs


def test_a_graph_needs_cuda(monkeypatch):
    model = child("vit", "plain", "dense")
    x = images(describe(model), 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ExportError, match="cudagraph must run on a CUDA device, but there is none here; choose eager"):
        runtimes.ready(model, x, "cudagraph")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ExportError, match="cudagraph must be given images on a CUDA device, but got them on cpu"):
        runtimes.ready(model, x, "cudagraph")


def test_a_graph_is_recorded_once_and_replayed_with_new_images(monkeypatch):
    """Without a card: recording runs the pass, and replaying runs it again where the first one wrote."""
    for name in ("Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: types.SimpleNamespace(wait_stream=lambda _: None))
    for name in ("stream", "graph", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", types.SimpleNamespace)
    calls = []
    recorded = _Recorded(lambda x: (calls.append(x), x * 2)[1], torch.ones(2, 3))
    assert len(calls) == 4
    assert {id(x) for x in calls} == {id(recorded.images)}
    recorded.graph.replay = lambda: recorded.logits.copy_(recorded.run(recorded.images))
    first, second = recorded(torch.full((2, 3), 3.0)), recorded(torch.full((2, 3), 4.0))
    assert (float(first[0, 0]), float(second[0, 0])) == (6, 8)
    for other in (torch.ones(3, 3), torch.ones(2, 3, dtype=torch.float64)):
        with pytest.raises(ExportError, match=r"cudagraph must be given images \(2, 3\) of torch.float32 on cpu, with"):
            recorded(other)

    def fails(_):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    with pytest.raises(ExportError, match="cudagraph must be able to run this model here, but says: operation not"):
        _Recorded(fails, torch.ones(2))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("random")])
def test_a_graph_replays_one_batch(kind):
    model = child("vit", "plain", kind)
    x = images(describe(model), 4, torch.float32).cuda()
    found = runtimes.ready(model, x, "cudagraph")
    first, second = found.run(x), found.run(x + 1)
    with torch.no_grad():
        net = copy.deepcopy(model).float().cuda()
        assert apart(first, net(x)) < 1e-3
        assert apart(second, net(x + 1)) < 1e-3
    with pytest.raises(ExportError, match=r"cudagraph must be given images \(4, 3, 32, 32\)"):
        found.run(x[:2])


@pytest.mark.gpu
@EACH
def test_on_a_card_in_bfloat16(family, preset):
    x = images(describe(adopted(family, preset)), 4)
    for kind, model in children(family, preset):
        if kind in CHOOSING:
            continue
        with torch.no_grad():
            wanted = model(x)
            stored = rms(copy.deepcopy(model).to("cuda", torch.bfloat16)(x.to("cuda", torch.bfloat16)).cpu(), wanted)
            net = optimized(model, "cuda", torch.bfloat16)
            assert rms(net(x.to("cuda", torch.bfloat16)).cpu(), wanted) < 3 * max(stored, 0.01), kind
        for block in blocks(net):
            assert not isinstance(block.attn, Attention) or block.attn.even


def test_a_child_that_is_drawn_is_the_one_that_is_asked_for():
    parent = adopted("vit", "qk_norm")
    assert child_of(parent, "heads") is not None
    assert child_of(adopted("vit", "scale_norms"), "heads") is None
