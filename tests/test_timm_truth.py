"""A compressed model is still timm's: every method of the host tells the truth about a child after any cut."""

import copy
import functools
import inspect
from typing import Any

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models._features import FeatureGetterNet
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn

from tests.samples import adopted, apart, images
from tests.tolerance import EXACT, SINGLE
from vitrim import families
from vitrim.cut.surgery import apply
from vitrim.families import describe
from vitrim.measure import counted
from vitrim.nn import Attention
from vitrim.words.costs import cost_of
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Skip, Spec

EVERY = tuple(range(16))
PLANS = {
    # Heads of uneven widths, one of them gone; then no channel left in either branch; then a branch gone.
    "uneven": (
        BlockPlan(qk=(EVERY[:5], (), EVERY[3:14]), v=(EVERY[:7], (), EVERY[1:4]), hidden=tuple(range(0, 96, 3))),
        BlockPlan(qk=((), (), ()), v=((), (), ()), hidden=()),
        BlockPlan(mixer=Skip(), hidden=tuple(range(40))),
    ),
    "thin": (
        BlockPlan(qk=(EVERY[:8],) * 3, v=(EVERY[8:],) * 3, mlp=Skip()),
        BlockPlan(mixer=Skip(), mlp=Skip()),
        BlockPlan(hidden=tuple(range(7, 90))),
    ),
    "heads": (BlockPlan(v=(EVERY, (), EVERY)), BlockPlan(v=((), EVERY, ())), BlockPlan()),
}
PRESETS = ("plain", "distilled", "registers", "average", "map", "clip", "glu", "dynamic")
CHILDREN = [(preset, plan) for preset in PRESETS for plan in ("uneven", "thin")] + [
    (preset, "heads") for preset in ("plain", "qk_norm", "swiglu")
]
EACH = pytest.mark.parametrize(("preset", "plan"), CHILDREN, ids=[f"{a}-{b}" for a, b in CHILDREN])
SOME = pytest.mark.parametrize(
    ("preset", "plan"), [("plain", "uneven"), ("registers", "thin"), ("qk_norm", "heads")], ids=str
)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """These models are so small that a second thread costs more than it gives."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def _child(preset: str, plan: str) -> nn.Module:
    parent = adopted("vit", preset)
    return apply(parent, Plan.of(describe(parent), PLANS[plan]))


def child(preset: str, plan: str) -> Any:
    return copy.deepcopy(_child(preset, plan))


def by_hand(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """The tokens after each block, by timm's parts alone."""
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
    steps = []
    for block in model.blocks:
        x = block(x)
        steps.append(x)
    return steps


def grid_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    rows, columns = model.patch_embed.grid_size
    patches = tokens[:, model.num_prefix_tokens :]
    return patches.transpose(1, 2).reshape(len(tokens), -1, rows, columns)


def check_priced(model: nn.Module) -> Spec:
    """The model's own description is true: its cost is PyTorch's count, and it can be built and priced again."""
    spec = describe(model)
    bare = copy.deepcopy(model).requires_grad_(False).eval()
    logits = bare(images(spec, 1))
    assert cost_of(spec) == counted(model)
    again = families.build(spec).double().eval()
    assert describe(again) == spec
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(images(spec, 1)), logits)
    return spec


@EACH
@torch.no_grad()
def test_forward_is_its_parts(preset: str, plan: str):
    model = child(preset, plan)
    x = images(describe(model))
    assert isinstance(model, VisionTransformer)
    assert type(model) is type(adopted("vit", preset))
    features = model.forward_features(x)
    assert torch.equal(features, model.norm(by_hand(model, x)[-1]))
    assert torch.equal(model.forward_head(features), model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    assert model.head_hidden_size == model.num_features == model.embed_dim == 48


@EACH
@torch.no_grad()
def test_intermediates(preset: str, plan: str):
    model = child(preset, plan)
    x = images(describe(model))
    steps = by_hand(model, x)
    last, found = model.forward_intermediates(x)
    assert torch.equal(last, model.norm(steps[-1]))
    assert all(torch.equal(a, grid_of(model, b)) for a, b in zip(found, steps, strict=True))
    found = model.forward_intermediates(x, indices=[0, 1], norm=True, stop_early=True, intermediates_only=True)
    assert [f.shape[1] for f in found] == [48, 48]
    assert all(torch.equal(a, grid_of(model, model.norm(b))) for a, b in zip(found, steps[:2], strict=True))
    flat = model.forward_intermediates(
        x, indices=1, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
    )
    tokens = torch.cat(flat[0][::-1], dim=1) if model.num_prefix_tokens else flat[0]
    assert torch.equal(tokens, steps[-1])
    dino = model.get_intermediate_layers(x, n=[1], reshape=True, norm=True)
    assert torch.equal(dino[0], grid_of(model, model.norm(steps[1])))


@EACH
@torch.no_grad()
def test_feature_info(preset: str, plan: str):
    model = child(preset, plan)
    assert [info["module"] for info in model.feature_info] == [f"blocks.{i}" for i in range(3)]
    assert [info["num_chs"] for info in model.feature_info] == [48] * 3
    x = images(describe(model))
    wrapped = FeatureGetterNet(copy.deepcopy(model), out_indices=[0, 2])
    found = wrapped(x)
    steps = by_hand(model, x)
    assert all(torch.equal(a, grid_of(model, steps[i])) for a, i in zip(found, (0, 2), strict=True))
    reduction = wrapped.feature_info.reduction()
    assert [f.shape[1] for f in found] == wrapped.feature_info.channels()
    assert [x.shape[-1] // f.shape[-1] for f in found] == reduction


@pytest.mark.parametrize(("preset", "plan"), [c for c in CHILDREN if c[0] != "distilled"], ids=str)
@torch.no_grad()
def test_pruned_layers(preset: str, plan: str):
    model = child(preset, plan)
    x = images(describe(model))
    steps = by_hand(model, x)
    assert model.prune_intermediate_layers([0, 1], prune_norm=True) == [0, 1]
    assert len(model.blocks) == 2
    assert apart(model.forward_features(x), steps[1]) == 0
    check_priced(model)


@EACH
def test_another_classifier(preset: str, plan: str):
    model = child(preset, plan)
    model.reset_classifier(7)
    model.double()  # timm before 1.0.21 builds what it sets anew in float32
    assert model(images(describe(model))).shape == (2, 7)
    assert check_priced(model).classes == 7
    if preset != "distilled":
        model.reset_classifier(3, global_pool="avg")
        model.double()
        assert model(images(describe(model))).shape == (2, 3)
        assert check_priced(model).host.arguments["global_pool"] == "avg"
    model.reset_classifier(0)
    check_priced(model)


@EACH
def test_another_image_size(preset: str, plan: str):
    model = child(preset, plan)
    before = describe(model)
    model.set_input_size(img_size=(64, 40))
    spec = check_priced(model)
    assert spec.image == (64, 40)
    assert (spec.stages[0].grid, before.stages[0].blocks) == ((8, 5), spec.stages[0].blocks)
    assert cost_of(spec).macs > cost_of(before).macs
    model.set_input_size(img_size=32, patch_size=4)
    model.double()
    assert check_priced(model).stages[0].grid == (8, 8)


@torch.no_grad()
def test_images_of_any_size():
    model = child("dynamic", "uneven")
    x = torch.randn(2, 3, 48, 64, dtype=torch.float64)
    logits = model(x)
    fixed = copy.deepcopy(model)
    fixed.set_input_size(img_size=(48, 64))
    assert apart(fixed(x), logits) < SINGLE
    assert model.forward_intermediates(x, intermediates_only=True)[0].shape[-2:] == (6, 8)


@EACH
def test_layer_decay_covers_every_parameter_once(preset: str, plan: str):
    model = child(preset, plan)
    groups = param_groups_layer_decay(model, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5)
    seen = [id(p) for group in groups for p in group["params"]]
    assert sorted(seen) == sorted(id(p) for p in model.parameters())
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    depth = {i: {scale[id(p)] for p in block.parameters()} for i, block in enumerate(model.blocks)}
    assert all(len(scales) <= 1 for scales in depth.values())
    lowest, highest = scale[id(model.patch_embed.proj.weight)], scale[id(model.head.weight)]
    assert all(lowest < value < highest for scales in depth.values() for value in scales)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    model(images(describe(model))).square().mean().backward()
    optimizer.step()


@EACH
def test_gradient_checkpointing(preset: str, plan: str):
    model = child(preset, plan)
    x = images(describe(model))
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model.train()(x).square().mean().backward() if preset != "distilled" else sum(
            out.square().mean() for out in model.train()(x)
        ).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(apart(gradients[1][name], value) < EXACT for name, value in gradients[0].items())


@SOME
@pytest.mark.skipif(
    "is_causal" not in inspect.signature(VisionTransformer.forward).parameters,
    reason="this timm passes no causal masks",
)
@torch.no_grad()
def test_masks_reach_the_heads(preset: str, plan: str):
    model = child(preset, plan)
    x = images(describe(model))
    tokens = describe(model).stages[0].tokens
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    causal = model(x, is_causal=True)
    assert apart(model(x, attn_mask=seen), causal) < EXACT
    assert (
        apart(model(x, attn_mask=torch.zeros(tokens, tokens).masked_fill(~seen, -torch.inf).double()), causal) < EXACT
    )
    assert apart(causal, model(x)) > 1e-3
    for module in model.modules():
        if isinstance(module, Attention):
            module.fused_attn = not module.fused_attn
    assert apart(model(x, is_causal=True), causal) < EXACT
    assert apart(model(x, attn_mask=seen), causal) < EXACT


@pytest.mark.parametrize("fused", [True, False])
@SOME
@torch.no_grad()
def test_compiled(preset: str, plan: str, fused: bool):
    model = child(preset, plan).float()
    for module in model.modules():
        if isinstance(module, Attention):
            module.fused_attn = fused
    x = images(describe(model), dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert apart(compiled(x), model(x)) < SINGLE


@SOME
@torch.no_grad()
def test_exported(preset: str, plan: str):
    model = child(preset, plan).float()
    x = images(describe(model), 3, torch.float32)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=False)
    answer = program.module()
    for count in (1, 5):
        x = images(describe(model), count, torch.float32)
        assert apart(answer(x), model(x)) < SINGLE


@EACH
@torch.no_grad()
def test_copies(preset: str, plan: str):
    model = _child(preset, plan)
    x = images(describe(model))
    twin = copy.deepcopy(model)
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}
    assert torch.equal(twin(x), model(x))
    for parameter in twin.parameters():
        parameter.zero_()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), model(x))
    assert {p.device.type for p in twin.to("meta").parameters()} == {"meta"}
    assert describe(twin) == describe(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@EACH
@torch.no_grad()
def test_other_types(preset: str, plan: str, dtype: torch.dtype):
    model = child(preset, plan)
    x = images(describe(model))
    expected = model(x)
    logits = model.to(dtype)(x.to(dtype))
    assert logits.dtype == dtype
    assert apart(logits.double(), expected) < (1e-4 if dtype == torch.float32 else 0.1)


@EACH
def test_autocast(preset: str, plan: str):
    model = child(preset, plan).float()
    x = images(describe(model), dtype=torch.float32)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(x)
        logits.float().square().mean().backward()
    assert apart(logits.float(), expected) < 0.1
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())


def test_training_uses_dropout_and_reaches_every_parameter():
    torch.manual_seed(3)
    parent = families.get("vit").example(drop_path_rate=0.4, proj_drop_rate=0.2, attn_drop_rate=0.2, init_values=0.5)
    parent = families.adopt(parent)
    for name in ("uneven", "thin", "heads"):
        model: Any = apply(parent, Plan.of(describe(parent), PLANS[name])).train()
        assert model.blocks[2].drop_path2.drop_prob == pytest.approx(0.4)
        x = torch.randn(32, 3, 32, 32)
        assert not torch.equal(model(x), model(x))
        model(x).square().mean().backward()
        missing = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.abs().sum() > 0)]
        assert missing == []
        assert torch.equal(model.eval()(x), model(x))


@torch.no_grad()
def test_distilled_training_gives_both_heads():
    model = child("distilled", "uneven")
    x = images(describe(model))
    model.set_distilled_training(True)
    both = model.train()(x)
    assert [out.shape for out in both] == [(2, 10), (2, 10)]
    assert apart((both[0] + both[1]) / 2, model.eval()(x)) < EXACT


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_xsmall_patch16_clip_224", "test_vit"])
def test_the_input_of_the_parent(name: str):
    parent = timm.create_model(name, depth=3, num_classes=5)
    ours = families.adopt(parent)
    spec = describe(ours)
    model = apply(ours, Plan.of(spec, [BlockPlan(hidden=tuple(range(8)))] * len(spec.blocks())))
    assert resolve_model_data_config(model) == resolve_model_data_config(parent)
    with torch.device("meta"):
        again = families.build(describe(model))
    assert resolve_model_data_config(again) == resolve_model_data_config(parent)
