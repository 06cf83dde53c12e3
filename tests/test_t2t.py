"""T2T-ViT: the published structure, its stem by hand, the authors' names, timm's feature API, and what is refused."""

import copy
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN, resolve_model_data_config

import vitrim
from tests.samples import apart, random_plan, without_data
from tests.tolerance import EXACT, SINGLE
from vitrim import families
from vitrim.cut import surgery
from vitrim.data.inputs import Input
from vitrim.deploy.parent import known_models, open_parent
from vitrim.families import adopt, describe
from vitrim.families._t2t import sinusoid
from vitrim.measure import counted
from vitrim.measure.model import image_of
from vitrim.words.costs import block_cost, cost_of
from vitrim.words.errors import DataError, RecipeError, WeightsError

t2t = families.get("t2t")

# Section 7.2: trained and all parameters; G multiply-accumulates of the model, its stem and one block.
PUBLISHED = [
    ("t2t_vit_7", 4_255_694, 4_310_222, 1.147, 0.2845, 0.1232),
    ("t2t_vit_10", 5_834_702, 5_889_230, 1.516, 0.2845, 0.1232),
    ("t2t_vit_12", 6_887_374, 6_941_902, 1.763, 0.2845, 0.1232),
    ("t2t_vit_14", 21_465_806, 21_545_550, 4.783, 0.2990, 0.3203),
    ("t2t_vit_19", 39_085_070, 39_177_422, 8.480, 0.3062, 0.4302),
    ("t2t_vit_24", 64_000_974, 64_105_934, 13.662, 0.3134, 0.5562),
    ("t2t_vit_t_14", 21_465_422, 21_541_070, 6.089, 1.6042, 0.3203),
    ("t2t_vit_t_19", 39_084_686, 39_172_942, 9.785, 1.6115, 0.4302),
    ("t2t_vit_t_24", 64_000_590, 64_101_454, 14.967, 1.6187, 0.5562),
]
KINDS = ["performer", "transformer"]


def small(**arguments: Any) -> Any:
    torch.manual_seed(2)
    return t2t.example(**arguments).eval()


def stem_macs(kind: str, width: int) -> int:
    """The stem of section 7.1 by hand; the denominators of the performer are products too."""
    macs, c, m = 196 * 576 * width, 64, 32
    for tokens, unfolded in ((3136, 147), (784, 576)):
        macs += tokens * (3 * c * unfolded + 3 * c * c)
        macs += tokens * (4 * m * c + m) if kind == "performer" else 2 * tokens**2 * c
    return macs


@pytest.mark.parametrize(
    ("name", "trained", "whole", "giga", "stem", "block"), PUBLISHED, ids=[p[0] for p in PUBLISHED]
)
def test_published_structures(name, trained, whole, giga, stem, block):
    model = without_data(lambda: timm.create_model(name))
    spec = describe(model)
    cost = cost_of(spec)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained
    assert cost.params == sum(p.numel() for p in model.parameters()) == whole
    assert spec.family == "t2t"
    assert families.name_of(model) == "t2t"
    # The table has four digits, so that half of its last one is 5e-4 G at most.
    assert cost.macs / 1e9 == pytest.approx(giga, abs=5e-4, rel=1e-4)
    stage, head = spec.stages[0], 1000 * spec.stages[0].width
    assert (spec.host.macs - head) / 1e9 == pytest.approx(stem, abs=2e-4)
    assert spec.host.macs - head == stem_macs(model.patch_embed.tokens, stage.width)
    assert block_cost(stage.blocks[0], stage)[0] / 1e9 == pytest.approx(block, abs=5e-5)
    assert {node.mixer.scale for node in stage.blocks} == {64**-0.5}
    assert {node.mixer.qk[0] for node in stage.blocks} == {64}
    assert (stage.form.norm.eps, stage.form.qkv_bias, stage.form.out_bias) == (1e-5, False, True)
    assert [node.rates.mlp_path for node in stage.blocks] == pytest.approx(
        torch.linspace(0, 0.1, len(stage.blocks)).tolist()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_cost_is_counted_with_and_without_the_fused_kernel(kind):
    model = small(tokens=kind, token_width=64)
    for fused in (True, False):
        for layer in (model.patch_embed.token1, model.patch_embed.token2):
            layer.fused_attn = fused
        assert counted(model).macs == cost_of(describe(model)).macs


# -- what is not trained


def test_fixed_tensors_are_not_trained():
    model = small(drop_path_rate=0.0).train()
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    still = {name for name, p in model.named_parameters() if p.grad is None}
    assert still == {"pos_embed", "patch_embed.token1.features", "patch_embed.token2.features"}
    assert still == {name for name, p in adopt(model).named_parameters() if not p.requires_grad}
    assert bool(model.patch_embed.token1.kqv.weight.grad.abs().sum() > 0)
    assert torch.equal(model.pos_embed[0], sinusoid(5, 64))


def test_weights_drawn_anew_keep_the_positions():
    empty = without_data(small)
    model = empty.to_empty(device="cpu")
    model.init_weights()
    assert torch.equal(model.pos_embed[0], sinusoid(5, 64))
    features = model.patch_embed.token1.features
    assert apart(features @ features.T, 8 * torch.eye(8)) < 1e-5
    assert bool(model(torch.randn(1, 3, 32, 32)).isfinite().all())


# -- the authors' names


def official(state: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """A state dict as the authors' release names it."""
    inner = {"features": "w", "kqv": "kqv", "mlp.fc1": "mlp.0", "mlp.fc2": "mlp.2"}
    if kind == "transformer":
        inner = {"qkv": "attn.qkv", "proj": "attn.proj"}
    renamed = {}
    for name, value in state.items():
        if name.startswith("patch_embed.token"):
            number, rest = name.removeprefix("patch_embed.token").split(".", 1)
            old = next((key for key in inner if rest == key or rest.startswith(f"{key}.")), None)
            rest = rest if old is None else inner[old] + rest.removeprefix(old)
            name = f"tokens_to_token.attention{number}.{rest}"
        renamed[name.replace("patch_embed.proj", "tokens_to_token.project")] = value
    return renamed


@pytest.mark.parametrize("kind", KINDS)
def test_official_names_give_the_same_logits(kind, tmp_path):
    name = "t2t_vit_7" if kind == "performer" else "t2t_vit_t_14"
    arguments = {"depth": 2, "embed_dim": 64, "num_heads": 2, "img_size": 32, "num_classes": 7}
    model = timm.create_model(name, **arguments).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    weights = official(model.state_dict(), kind)
    assert not [key for key in weights if "patch_embed" in key]
    torch.save({"state_dict_ema": weights}, tmp_path / "official.pth.tar")
    opened = open_parent(name, weights=str(tmp_path / "official.pth.tar"), arguments=arguments)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert apart(opened(x), model(x)) < SINGLE
    loaded = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay={"state_dict": weights, "num_classes": 7}, **arguments
    ).eval()
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_native_names_and_another_size_load_too(tmp_path):
    model = small()
    save_file(model.state_dict(), tmp_path / "native.safetensors")
    arguments = {"depth": 3, "embed_dim": 64, "num_heads": 4, "token_width": 16, "mlp_ratio": 3.0}
    same = open_parent(
        "t2t_vit_7", weights=str(tmp_path / "native.safetensors"), arguments=arguments | {"img_size": 32}
    )
    assert torch.equal(same.pos_embed, model.pos_embed)
    wide = open_parent(
        "t2t_vit_7", weights=str(tmp_path / "native.safetensors"), arguments=arguments | {"img_size": (32, 64)}
    )
    model.set_input_size((32, 64))
    x = torch.randn(2, 3, 32, 64)
    with torch.no_grad():
        assert apart(wide(x), model(x)) < SINGLE
    with pytest.raises(WeightsError, match=r"must fit T2TVisionTransformer, but the file misses .*blocks\.3"):
        open_parent(
            "t2t_vit_7",
            weights=str(tmp_path / "native.safetensors"),
            arguments=arguments | {"depth": 4, "img_size": 32},
        )


# -- timm's API, and what is refused


def test_feature_api():
    model = small(depth=4)
    model.pretrained_cfg = timm.create_model("t2t_vit_7", depth=1).pretrained_cfg
    spec = describe(model)
    child: Any = surgery.apply(adopt(model), random_plan(spec, 3))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for net in (model, child):
            features = net.forward_features(x)
            assert features.shape == (2, 5, net.num_features)
            assert torch.equal(net.forward_head(features), net(x))
            final, maps = net.forward_intermediates(x, indices=[1, 3])
            assert [tuple(each.shape) for each in maps] == [(2, 64, 2, 2)] * 2
            assert torch.equal(final, features)
            assert net.forward_head(features, pre_logits=True).shape == (2, 64)
            assert [info["reduction"] for info in net.feature_info] == [16] * 4
            assert resolve_model_data_config(net)["mean"] == IMAGENET_DEFAULT_MEAN
            assert resolve_model_data_config(net)["crop_pct"] == 0.9
            assert set(net.group_matcher()) == {"stem", "blocks"}
    child.set_grad_checkpointing()
    child.train()(x).sum().backward()
    child.eval().reset_classifier(3, "avg")
    assert child(x).shape == (2, 3)
    assert describe(child).host.arguments["global_pool"] == "avg"
    assert torch.equal(copy.deepcopy(child)(x), child(x))


def test_timm_builds_feature_backbones():
    backbone = timm.create_model("t2t_vit_7", depth=2, img_size=32, features_only=True, out_indices=(0, 1))
    assert [tuple(each.shape) for each in backbone(torch.zeros(1, 3, 32, 32))] == [(1, 256, 2, 2)] * 2


@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.whole)])
def test_it_compiles_whole(backend):
    model: Any = adopt(small())
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        assert apart(compiled(x), model(x)) < SINGLE


@pytest.mark.whole
def test_it_is_exported_for_any_batch():
    model: Any = adopt(small())
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
        assert apart(exported(x[:2]), model(x[:2])) < SINGLE


def test_an_image_does_not_see_its_batch():
    model = small().double()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        assert apart(model(x)[1:2], model(x[1:2])) < EXACT


@pytest.mark.parametrize("channels", [1, 3])
def test_everyone_learns_the_input_from_the_model(channels):
    model = small(in_chans=channels, img_size=(32, 48))
    assert image_of(model) == (channels, 32, 48)
    read = Input.of(model)
    assert (read.size, read.channels) == ((32, 48), channels)


def test_another_size():
    model = small()
    with pytest.raises(DataError, match=r"images must be 32 x 32, .* but are 48 x 32; resize them"):
        model(torch.randn(1, 3, 48, 32))
    with pytest.raises(RecipeError, match=r"multiples of 16 .* but got 30 x 32; the nearest is 32 x 32"):
        small(img_size=(30, 32))
    before = model.pos_embed
    with pytest.raises(RecipeError, match="multiples of 16"):
        model.set_input_size((40, 40))
    assert model.pos_embed is before
    assert model.patch_embed.img_size == (32, 32)
    model.set_input_size((48, 64))
    assert not model.pos_embed.requires_grad
    assert model(torch.randn(1, 3, 48, 64)).shape == (1, 10)
    assert describe(adopt(model)).stages[0].grid == (3, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dynamic_img_size": True}, "must keep its own stem and positions, but got dynamic_img_size"),
        ({"tokens": "performers"}, "tokens must be one of performer, transformer, .*did you mean 'performer'"),
        ({"patch_size": 8}, "patch_size must be 16"),
        ({"token_width": 7}, "token_width must be even"),
        ({"img_size": 8}, "multiples of 16"),
    ],
)
def test_what_the_stem_cannot_be_is_refused(arguments, message):
    with pytest.raises(RecipeError, match=message):
        small(**arguments)


def test_opening_says_what_is_wrong():
    with pytest.raises(RecipeError, match=r"must take each of them, but .*bogus"):
        open_parent("t2t_vit_7", random_weights=True, arguments={"bogus": 1})
    with pytest.raises(WeightsError, match="pretrained weights must be found"):
        open_parent("t2t_vit_7")


def test_the_family_is_listed():
    rows = list(known_models("t2t_vit_*7"))
    assert [(row["name"], row["family"], row["reason"]) for row in rows] == [("t2t_vit_7", "t2t", None)]


@pytest.mark.parametrize("preset", t2t.TEST_PRESETS)
def test_stored_and_loaded(preset, tmp_path):
    model = adopt(small(**t2t.TEST_PRESETS[preset]))
    child = surgery.apply(model, random_plan(describe(model), 5))
    again = vitrim.load(vitrim.save(child, tmp_path / "child.safetensors"))
    assert type(again) is type(child)
    assert describe(again) == describe(child)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in child.named_parameters() if p.requires_grad
    }
    x = torch.randn(2, *image_of(child))
    with torch.no_grad():
        assert torch.equal(again(x), child(x))
