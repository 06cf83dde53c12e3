"""Checkpoints as people have them: what is taken out of them, what is inferred, and what is refused by what it is."""

import argparse
import collections
import datetime
import pathlib
import pickle
import re
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.tolerance import SINGLE
from vitrim.cli.shared import model_table
from vitrim.deploy.checkpoint import read_checkpoint
from vitrim.deploy.parent import _check_not_weights, open_parent, open_teacher, read_weights
from vitrim.words.errors import RecipeError, WeightsError

TINY: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
FREE = {key: value for key, value in TINY.items() if key not in ("img_size", "patch_size")}
State = dict[str, Tensor]


def vit(name: str = "test_vit", **arguments: Any) -> Any:
    """A small model whose weights are far from zero, so that any that is wrong shows."""
    model = timm.create_model(name, **{**TINY, "num_classes": 5, **arguments}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def under(prefix: str, state: State) -> State:
    return {f"{prefix}{name}": value for name, value in state.items()}


def without_head(state: State) -> State:
    return {name: value for name, value in state.items() if not name.startswith("head.")}


def apart(one: nn.Module, two: nn.Module) -> float:
    """Largest difference of outputs relative to the largest output."""
    size = one.patch_embed.img_size
    x = torch.randn(2, one.in_chans, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b = one(x), two(x)
    return float((a - b).abs().max() / b.abs().max())


@pytest.fixture
def opened(tmp_path):
    """Write a file and open it; gives the model and the lines that were said."""

    def run(held: Any, name: str = "test_vit", key: str | None = None, **arguments: Any) -> tuple[Any, str]:
        path, lines = tmp_path / "w.pth", []
        torch.save(held, path)
        given = arguments or (TINY if "swin" not in name else {})
        given = {name: value for name, value in given.items() if value is not None}
        model = open_teacher(name, weights=str(path), weights_key=key, arguments=given, say=lines.append)
        return model, "\n".join(lines)

    return run


@pytest.fixture
def refused(tmp_path):
    """Write a file, which must be refused in one sentence; gives it."""

    def run(held: Any, name: str = "test_vit", key: str | None = None, **arguments: Any) -> str:
        path = tmp_path / "w.pth"
        path.write_bytes(held) if isinstance(held, bytes) else torch.save(held, path)
        with pytest.raises(WeightsError) as caught:
            open_teacher(name, weights=str(path), weights_key=key, arguments=arguments or TINY)
        return sentence(caught.value)

    return run


def sentence(problem: Exception) -> str:
    """The text of an error, which must be one line without control characters that says what came."""
    text = str(problem)
    assert text.isprintable()
    assert "but" in text
    return text


# -- containers and prefixes

NESTED = {
    "plain": lambda s: s,
    "model": lambda s: {"model": s},
    "state_dict": lambda s: {"state_dict": s},
    "model_state_dict": lambda s: {"epoch": 3, "model_state_dict": s},
    "net": lambda s: {"net": s},
    "ema": lambda s: {"ema": s},
    "deep": lambda s: {"checkpoint": {"run": {"network": s}}},
    "in a list": lambda s: [s, {"lr": 0.1}],
    "ddp": lambda s: {"model": under("module.", s)},
    "compiled": lambda s: under("_orig_mod.", s),
    "compiled ddp": lambda s: under("module._orig_mod.", s),
    "ddp compiled": lambda s: under("_orig_mod.module.", s),
    "lightning": lambda s: {"state_dict": under("model.", s), "pytorch-lightning_version": "2.6.0", "loops": {}},
    "wrapped": lambda s: {"state_dict": under("net.model.backbone.", s)},
    "unheard of": lambda s: {"weights": {"x": under("vit_encoder_7._forward_module.", s)}},
}


@pytest.mark.parametrize("how", NESTED)
def test_containers_and_prefixes_in_any_order(how, opened):
    model = vit()
    found, _ = opened(NESTED[how](model.state_dict()))
    assert apart(found, model) == 0


def test_what_is_left_out_is_said(opened):
    model = vit()
    held = {
        "model": under("module.", model.state_dict()) | {"module.criterion.weight": torch.ones(5)},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
        "projector": {"0.weight": torch.ones(64, 32), "2.weight": torch.ones(8, 64)},
        "epoch": 3,
    }
    found, said = opened(held)
    assert apart(found, model) == 0
    assert said.splitlines() == [
        "w.pth: left out optimizer and projector",
        "w.pth: left out criterion, which only training needs",
    ]


AVERAGED = {
    "state_dict_ema": lambda old, new: {"state_dict": old, "state_dict_ema": new},
    "model_ema.module": lambda old, new: {"model": old, "model_ema": under("module.", new)},
    "teacher.backbone": lambda old, new: {
        "student": under("module.backbone.", old) | {"module.head.mlp.0.weight": torch.ones(64, 32)},
        "teacher": under("backbone.", new) | {"head.mlp.0.weight": torch.ones(64, 32)},
    },
    "state_dict.ema_model.module": lambda old, new: {
        "state_dict": under("model.", old) | under("ema_model.module.", new)
    },
    "swa_model.module": lambda old, new: {"model": old, "swa_model": under("module.", new)},
}


@pytest.mark.parametrize("key", AVERAGED)
def test_of_several_the_averaged_one_is_taken_and_named(key, opened):
    old, new = vit(), vit()
    held = AVERAGED[key](old.state_dict(), new.state_dict())
    found, said = opened(held)
    assert apart(found, new) == 0
    assert f"took {key}, the averaged weights; --weights-key takes " in said
    other = said.split("--weights-key takes ")[1].split(" instead")[0]
    found, _ = opened(held, key=other)
    assert apart(found, old) == 0
    found, _ = opened(held, key=key.split(".")[-1] if key != "state_dict_ema" else key)
    assert apart(found, new) == 0


def test_an_optimizer_that_keeps_names_is_no_model(opened):
    model = vit()
    state = model.state_dict()
    moments = {name: {"exp_avg": value * 0, "exp_avg_sq": value * 0} for name, value in state.items()}
    by_kind = {"exp_avg": {name: value * 0 for name, value in state.items()}}
    for optimizer in ({"state": moments}, by_kind, {"momentum_buffer": by_kind["exp_avg"]}):
        found, _ = opened({"model": state, "optimizer": optimizer})
        assert apart(found, model) == 0


def test_averaged_by_torch(opened):
    model = vit()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    found, said = opened({"raw": vit().state_dict(), "other": averaged.state_dict()})
    assert apart(found, model) == 0
    assert "took other.module, the averaged weights" in said
    found, said = opened(averaged.state_dict())
    assert said == "w.pth: left out n_averaged"


def test_two_names_of_one_memory_are_one(opened):
    model = vit()
    found, _ = opened({"state_dict": under("model.", model.state_dict()) | under("net.", model.state_dict())})
    assert apart(found, model) == 0


def test_a_teacher_of_another_size_is_not_taken(opened):
    model = vit()
    found, _ = opened({"model": model.state_dict(), "teacher": vit(embed_dim=64).state_dict()})
    assert apart(found, model) == 0


def test_what_cannot_be_chosen(refused):
    one, two = vit().state_dict(), vit().state_dict()
    assert "model and best are there and none is averaged; give --weights-key model" in refused(
        {"model": one, "best": two}
    )
    assert "several are averaged; give --weights-key ema" in refused({"model": one, "ema": two, "teacher": one})
    assert "'modl' does not; there is model and model_ema" in refused({"model": one, "model_ema": two}, key="modl")
    with pytest.raises(RecipeError, match="a weights key must be of a weights file"):
        open_parent("test_vit", random_weights=True, weights_key="model")


# -- heads

HEADS = {
    "fc": lambda h: under("fc.", h),
    "classifier": lambda h: under("classifier.", h),
    "head.fc": lambda h: under("head.fc.", h),
    "head.1": lambda h: under("head.1.", h),
    "heads.head": lambda h: under("heads.head.", h),
    "my_own": lambda h: under("my_own.", h),
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("beside", ["", "model.", "model.backbone."])
def test_heads_of_other_names(name, beside, opened):
    """Inside the state dict, and beside it where the backbone is a part of a larger module."""
    model = vit(num_classes=7)
    head = HEADS[name]({"weight": model.head.weight.detach(), "bias": model.head.bias.detach()})
    held = under(beside, without_head(model.state_dict())) | under(beside.removesuffix("backbone."), head)
    found, said = opened(held)
    assert apart(found, model) == 0
    assert f"took {beside.removesuffix('backbone.')}{name} for the model's head" in said


def test_a_head_without_bias(opened):
    model = vit()
    nn.init.zeros_(model.head.bias)
    state = {name: value for name, value in model.state_dict().items() if name != "head.bias"}
    found, said = opened(state)
    assert apart(found, model) == 0
    assert "the classifier has no bias, and gets zeros" in said


def test_no_head_gives_features(opened, refused):
    state = without_head(vit().state_dict())
    projector = {"proj_head.0.weight": torch.ones(64, 32), "proj_head.2.weight": torch.ones(8, 64)}
    for held in (
        state,
        under("backbone.", state) | projector,
        under("backbone.", state) | {"queue": torch.ones(32, 9)},
    ):
        found, said = opened(held)
        assert found.num_classes == 0
        assert "no classifier, so the model gives features" in said
    assert "5 classes must have a classifier in the file, but there is none" in refused(state, **TINY, num_classes=5)


def test_a_head_of_several_layers(opened, refused):
    several = {"head.0.weight": torch.ones(64, 32), "head.0.bias": torch.ones(64), "head.2.weight": torch.ones(5, 64)}
    held = without_head(vit().state_dict()) | several
    assert "a classifier must be one linear layer, but head has other layers in this file; --classes 0" in refused(held)
    found, said = opened(held, **TINY, num_classes=0)
    assert found.num_classes == 0
    assert "left out head, because no classes are asked for" in said


# -- training checkpoints


class CfgNode(dict):
    """A configuration as yacs pickles it."""


class AttributeDict(dict):
    """Hyperparameters as Lightning pickles them."""


class AnyNode:
    """A value of a configuration as OmegaConf pickles it."""

    def __init__(self):
        self._val = 3


FOREIGN_TYPES = {
    CfgNode: "yacs.config",
    AnyNode: "omegaconf.nodes",
    AttributeDict: "lightning_fabric.utilities.data",
}


def test_training_checkpoints(opened, monkeypatch):
    for kind, home in FOREIGN_TYPES.items():
        module = types.ModuleType(home)
        setattr(module, kind.__name__, kind)
        monkeypatch.setitem(sys.modules, home, module)
        monkeypatch.setitem(sys.modules, home.split(".")[0], types.ModuleType(home.split(".")[0]))
        monkeypatch.setattr(kind, "__module__", home)
    model = vit()
    held = {
        "model": model.state_dict(),
        "args": argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("runs/a"), when=datetime.datetime(2026, 1, 2)),
        "config": CfgNode(TRAIN=CfgNode(LR=[0.1], NAMES={"a"})),
        "hydra": AnyNode(),
        "hyper_parameters": AttributeDict(lr=0.1),
        "best": np.float64(80.5),
        "small": np.float32(1),
        "step": np.int64(3),
        "flag": np.bool_(True),
        "curve": np.arange(3.0),
        "meters": collections.defaultdict(list, {"loss": [1.0]}),
        "version": torch.__version__,
        "more": types.SimpleNamespace(a=frozenset({1}), b=collections.deque([1])),
    }
    before = set(torch.serialization.get_safe_globals())
    found, _ = opened(held)
    assert apart(found, model) == 0
    assert set(torch.serialization.get_safe_globals()) == before


def test_what_a_process_allows_stays_allowed(opened):
    torch.serialization.add_safe_globals([(argparse.Namespace, "argparse.Namespace")])
    try:
        opened({"model": vit().state_dict(), "args": argparse.Namespace()})
        assert (argparse.Namespace, "argparse.Namespace") in torch.serialization.get_safe_globals()
    finally:
        torch.serialization.clear_safe_globals()


def test_lightning_checkpoints(opened):
    """As Lightning writes them."""
    model = vit()
    held = {
        "epoch": 1,
        "global_step": 2,
        "pytorch-lightning_version": "2.6.6",
        "state_dict": under("model.", model.state_dict()) | {"criterion.weight": torch.ones(5)},
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_model_path": "", "best_model_score": torch.ones(())}},
        "optimizer_states": [{"state": {0: {"step": torch.ones(())}}, "param_groups": []}],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1},
    }
    found, said = opened(held)
    assert apart(found, model) == 0
    assert "left out state_dict.criterion, callbacks and optimizer_states" in said


class Custom:
    """A type of a training script."""


def test_what_would_run_code_is_refused_with_the_way_out(refused, tmp_path):
    path = str(tmp_path / "w.pth")
    model = vit()
    text = refused(model)
    assert "it holds a whole pickled model (timm.models.vision_transformer." in text
    read, write = re.findall(r"`([^`]+)`", text)
    assert (read, write) == (
        f"held = torch.load({path!r}, weights_only=False)",
        "torch.save(held.state_dict(), 'weights.pth')",
    )
    names: dict[str, Any] = {"torch": torch}
    exec(f"{read}\n{write.replace('weights.pth', path)}", names)
    assert apart(open_teacher("test_vit", weights=path, arguments=TINY), model) == 0

    text = refused({"model": model.state_dict(), "extra": Custom()})
    assert "it holds tests.test_checkpoints.Custom, whose code would have to run; where you trust the file" in text
    read, write = re.findall(r"`([^`]+)`", text)
    exec(f"{read}\n{write.replace('weights.pth', path)}", names)
    assert apart(open_teacher("test_vit", weights=path, arguments=TINY), model) == 0

    assert "torch.save(held['model'].state_dict(), 'weights.pth')" in refused({"model": model})
    assert "it holds a whole pickled model" in refused(nn.DataParallel(model))
    text = refused(pickle.dumps(dict(model.state_dict())))
    assert "it was written by pickle" in text
    read, write = re.findall(r"`([^`]+)`", text)
    exec(f"import pathlib, pickle\n{read}\n{write.replace('weights.pth', path)}", names)
    assert apart(open_teacher("test_vit", weights=path, arguments=TINY), model) == 0


def test_old_files_too(tmp_path):
    """Files from before zip archives are read alike, and what is wrong with them is found alike."""
    path, model = tmp_path / "old.pth", vit()
    held = {"model": model.state_dict(), "args": argparse.Namespace(lr=1), "best": np.float64(3)}
    torch.save(held, path, _use_new_zipfile_serialization=False)
    assert apart(open_teacher("test_vit", weights=str(path), arguments=TINY), model) == 0
    torch.save(held | {"x": Custom()}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(WeightsError, match=r"it holds tests.test_checkpoints.Custom, .*held\['model'\], 'weights.pth'"):
        read_checkpoint(path)
    torch.save(model, path, _use_new_zipfile_serialization=False)
    with pytest.raises(WeightsError, match="it holds a whole pickled model"):
        read_checkpoint(path)


def test_a_file_that_holds_itself(tmp_path):
    held: dict[str, Any] = {"model": {"a.weight": torch.ones(2)}}
    held["self"] = held
    torch.save(held, tmp_path / "w.pth")
    assert list(read_weights(tmp_path / "w.pth")) == ["model.a.weight"]


# -- sizes and settings


def test_another_image_size_is_resampled_by_timm_and_said(opened):
    model = vit(img_size=48)
    found, said = opened(model.state_dict(), **TINY)
    model.set_input_size(32)
    assert apart(found, model) < SINGLE
    assert said == "w.pth: resampled 37 positions to 17, as timm does for another image or patch size"
    wide, said = opened(vit(img_size=48).state_dict(), **TINY | {"img_size": (32, 64)})
    assert wide.patch_embed.grid_size == (4, 8)
    assert "resampled 37 positions to 33" in said


SHOWN: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "image size": ({"img_size": 48}, FREE | {"patch_size": 8}, "images of 48 x 48 pixels (36 positions;"),
    "channels": ({"in_chans": 1}, TINY, "1 channel"),
    "patch": ({"patch_size": 4}, FREE | {"img_size": 32}, "patches of 4 x 4 pixels"),
    "all three": (
        {"img_size": 48, "in_chans": 1, "patch_size": 4},
        FREE,
        "1 channel, patches of 4 x 4 pixels, images of 48 x 48 pixels (144 positions; --image-size resamples them)",
    ),
    "patch that is no square": ({"patch_size": (8, 4), "img_size": (32, 16)}, FREE | {"img_size": (32, 16)}, "8 x 4"),
    "mean pooling": ({"global_pool": "avg"}, TINY, "mean pooling (fc_norm)"),
    "layer scale": ({"init_values": 0.1}, TINY, "layer scale (ls1.gamma)"),
    "registers": ({"reg_tokens": 3}, FREE | {"patch_size": 8}, "3 register tokens"),
    "positions of patches alone": (
        {"reg_tokens": 3, "no_embed_class": True},
        FREE | {"patch_size": 8},
        "3 register tokens, no positions of prefix tokens, images of 32 x 32",
    ),
    "no bias": ({"qkv_bias": False}, TINY, "no bias of queries, keys and values"),
    "classes": ({"num_classes": 11}, TINY, ""),
}


@pytest.mark.parametrize("what", SHOWN)
def test_shapes_show_settings(what, opened):
    arguments, given, told = SHOWN[what]
    model = vit(**arguments)
    found, said = opened(model.state_dict(), **given)
    assert tuple(found.patch_embed.img_size) == tuple(model.patch_embed.img_size)
    assert apart(found, model) == 0
    assert told in said


def test_what_is_given_is_not_inferred(opened):
    found, said = opened(vit(img_size=48, patch_size=16).state_dict(), **TINY)
    assert tuple(found.patch_embed.patch_size) == (8, 8)
    assert "resampled 10 positions to 17" in said
    assert "resampled patches of 16 x 16 pixels to 8 x 8" in said
    model = vit()
    found, said = opened(model.state_dict(), **TINY | {"in_chans": 1})
    assert "adapted the patch embedding from 3 channels to 1, as timm does" in said
    grey = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.allclose(found(grey), model(grey.expand(-1, 3, -1, -1)), rtol=SINGLE, atol=SINGLE)


def test_positions_of_no_square(opened, refused):
    model = vit(img_size=(16, 72))
    for given in ({}, {"img_size": 64}):
        assert "18 are not; give --image-size HEIGHTxWIDTH of these, in multiples of 8" in refused(
            model.state_dict(), **FREE, patch_size=8, **given
        )
    found, _ = opened(model.state_dict(), **TINY | {"img_size": (16, 72)})
    assert apart(found, model) == 0
    square = vit(img_size=48)
    _, said = opened(square.state_dict(), **TINY | {"img_size": (32, 72)})
    assert "36 positions as a grid of 4 x 9" in said


def test_models_of_other_names_are_named(refused):
    text = refused(vit(embed_dim=64).state_dict())
    assert "the weights have width 64 and depth 2, test_vit has 32 and 2: name another model" in text
    whole = timm.create_model("vit_small_patch16_224", img_size=32, num_classes=2).state_dict()
    assert "width 384 and depth 12, vit_tiny_patch16_224 has 192 and 12: name vit_small_patch16_224" in refused(
        whole, "vit_tiny_patch16_224", img_size=32
    )
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, num_classes=2).state_dict()
    assert "they have a distillation token; name deit_tiny_distilled_patch16_224" in refused(
        distilled, "vit_tiny_patch16_224", img_size=32
    )
    plain = timm.create_model("deit_tiny_patch16_224", img_size=32, num_classes=2).state_dict()
    assert "they have no distillation token; name deit_tiny_patch16_224" in refused(
        plain, "deit_tiny_distilled_patch16_224", img_size=32
    )
    assert "norm_pre is a layer of CLIP's" in refused(vit(pre_norm=True).state_dict())
    before = "in the file the norm is before pooling: --set model.arguments.global_pool=token"
    assert before in refused(vit().state_dict(), **TINY, global_pool="avg")


# -- official names


def clip(state: State) -> State:
    """Names of OpenAI's CLIP, with a part of its text tower."""
    named = {"visual.proj": state["head.weight"].T}
    for name, value in without_head(state).items():
        name = re.sub(r"^norm\.", "ln_post.", name).replace("norm_pre", "ln_pre")
        for ours, theirs in (
            ("patch_embed.proj", "conv1"),
            ("cls_token", "class_embedding"),
            ("pos_embed", "positional_embedding"),
            ("blocks.", "transformer.resblocks."),
            ("norm", "ln_"),
            ("attn.qkv.", "attn.in_proj_"),
            ("attn.proj", "attn.out_proj"),
            ("mlp.fc1", "mlp.c_fc"),
            ("mlp.fc2", "mlp.c_proj"),
        ):
            name = name.replace(ours, theirs)
        value = value[0, 0] if name == "class_embedding" else value[0] if name == "positional_embedding" else value
        named[f"visual.{name}"] = value
    return named | {"transformer.resblocks.0.ln_1.weight": torch.ones(16), "logit_scale": torch.ones(())}


def dinov2(state: State) -> State:
    named = {
        name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3"): value for name, value in state.items()
    } | {"mask_token": torch.zeros(1, 32)}
    if "reg_token" in named:
        half = named["cls_token"] / 2
        positions = torch.cat([half, named["pos_embed"]], dim=1)
        named |= {"register_tokens": named.pop("reg_token"), "cls_token": half, "pos_embed": positions}
    return named


def swin(state: State) -> State:
    def name_of(name: str) -> str:
        name = re.sub(r"layers\.(\d+)\.downsample", lambda at: f"layers.{int(at[1]) - 1}.downsample", name)
        return name.replace("head.fc.", "head.")

    index = {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.long)}
    return {name_of(name): value for name, value in state.items()} | index


def beit3(state: State) -> State:
    """Names of BEiT-3's vision branch A, with a part of its other branch."""
    named = {"beit3.text_embed.weight": torch.ones(3, 3), "beit3.encoder.layers.0.ffn.B.fc1.weight": torch.ones(3, 3)}
    for name, value in state.items():
        if name == "pos_embed":
            named["beit3.encoder.embed_positions.A.weight"] = torch.cat([torch.zeros(2, 32), value[0]])
            continue
        fused = re.match(r"blocks\.(\d+)\.attn\.qkv\.(\w+)", name)
        if fused is not None:
            at = f"beit3.encoder.layers.{fused[1]}.self_attn"
            named |= {f"{at}.{x}_proj.A.{fused[2]}": part for x, part in zip("qkv", value.chunk(3), strict=True)}
            continue
        if not name.startswith("head."):
            for ours, theirs in (
                (r"^cls_token", "vision_embed.cls_token"),
                (r"^patch_embed\.", "vision_embed."),
                (r"\.attn\.norm\.", ".self_attn.inner_attn_ln.A."),
                (r"\.mlp\.norm\.", ".ffn.A.ffn_layernorm."),
                (r"\.norm1\.", ".self_attn_layer_norm.A."),
                (r"\.norm2\.", ".final_layer_norm.A."),
                (r"\.attn\.proj\.", ".self_attn.out_proj.A."),
                (r"\.mlp\.fc", ".ffn.A.fc"),
                (r"^blocks\.", "encoder.layers."),
            ):
                name = re.sub(ours, theirs, name)
            name = f"beit3.{name}"
        named[name] = value
    return named


def aimv2(state: State) -> State:
    named = {}
    for name, value in state.items():
        for ours, theirs in (
            (r"^patch_embed\.", "preprocessor.patchifier."),
            (r"^pos_embed", "preprocessor.pos_embed"),
            (r"^blocks\.", "trunk.blocks."),
            (r"^norm\.", "trunk.post_trunk_norm."),
            (r"\.norm([12])\.", r".norm_\1."),
            (r"\.fc1_g\.", ".fc1."),
            (r"\.fc1_x\.", ".fc3."),
        ):
            name = re.sub(ours, theirs, name)
        named[name] = value
    return named


SMALL_SWIN = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 24,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "window_size": 4,
}
OFFICIAL: dict[str, tuple[str, dict[str, Any], Any]] = {
    "DeiT-III": (
        "deit3_small_patch16_224",
        {},
        lambda s: {re.sub(r"ls(\d).gamma", r"gamma_\1", n): v for n, v in s.items()},
    ),
    "DINOv2": ("vit_giant_patch14_dinov2", {"num_classes": 0}, dinov2),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", {"num_classes": 0}, dinov2),
    "CLIP": ("vit_base_patch16_clip_quickgelu_224", {}, clip),
    "OpenCLIP": (
        "vit_base_patch16_clip_quickgelu_224",
        {},
        lambda s: under("visual.trunk.", without_head(s)) | {"visual.head.proj.weight": s["head.weight"]},
    ),
    "BEiT-3": ("beit3_base_patch16_224", {}, beit3),
    "AIMv2": ("aimv2_large_patch14_224", {"num_classes": 0}, aimv2),
    "Swin": ("swin_tiny_patch4_window7_224", SMALL_SWIN, swin),
}


@pytest.mark.parametrize("what", OFFICIAL)
def test_official_names_as_timm_converts_them(what, opened):
    name, arguments, rename = OFFICIAL[what]
    small = arguments if "depths" in arguments else {**TINY, **arguments}
    model = timm.create_model(name, **{"num_classes": 5, **small}).eval()
    for key, parameter in model.named_parameters():
        nn.init.zeros_(parameter) if key == "head.bias" else nn.init.normal_(parameter, std=0.1)
    official = rename(model.state_dict())
    for held in (official, {"state_dict": under("module.", official)}):
        found, said = opened(held, name, **small)
        assert apart(found, model) == 0
    assert ("left out mask_token" in said) == ("mask_token" in official)
    assert ("left out transformer and logit_scale" in said) == ("logit_scale" in official)
    overlay = {"state_dict": official, "num_classes": model.num_classes, "custom_load": False}
    timms = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=overlay, **{"num_classes": model.num_classes, **small}
    ).eval()
    assert apart(found, timms) == 0


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
@pytest.mark.parametrize("name", ["vit_small_patch16_224", "flexivit_small", "swin_tiny_patch4_window7_224"])
def test_resampled_exactly_as_timm_does(name, opened):
    swins = name.startswith("swin")
    old, new = (SMALL_SWIN, SMALL_SWIN | {"window_size": 2}) if swins else (TINY | {"img_size": 48}, TINY)
    state = timm.create_model(name, num_classes=5, **old).state_dict()
    found, said = opened(state, name, **new)
    overlay = {"state_dict": state, "num_classes": 5, "custom_load": False}
    timms = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5, **new).eval()
    assert apart(found, timms) == 0
    positions = "resampled 36 positions to 16" if name.startswith("flexi") else "resampled 37 positions to 17"
    assert ("resampled 4 tables of relative positions" if swins else positions) in said


def test_masked_autoencoders(opened):
    model = vit("vit_base_patch16_224.mae", num_classes=0)
    decoder = {"decoder_embed.weight": torch.ones(4, 4), "decoder_blocks.0.norm1.weight": torch.ones(4)}
    held = (
        model.state_dict() | {"mask_token": torch.zeros(1, 1, 32), "decoder_pos_embed": torch.ones(1, 17, 4)} | decoder
    )
    found, said = opened({"model": held}, "vit_base_patch16_224.mae", **TINY)
    assert apart(found, model) == 0
    assert "left out mask_token" in said
    assert "left out decoder_pos_embed, decoder_embed and decoder_blocks, which only training needs" in said


def test_joint_embedding(opened):
    """I-JEPA: the averaged one of two encoders, and no predictor."""
    model = vit(num_classes=0)
    old = under("module.", vit(num_classes=0).state_dict())
    held = {"encoder": old, "target_encoder": under("module.", model.state_dict())}
    found, said = opened({**held, "predictor": {"module.predictor_embed.weight": torch.ones(3, 3)}})
    assert apart(found, model) == 0
    assert "took target_encoder.module, the averaged weights; --weights-key takes encoder.module instead" in said
    assert "left out predictor" in said


def test_radio_as_timm_converts_it(opened):
    """Its 128 x 128 positions say nothing of the image size."""
    name, at = "vit_base_patch16_radio_v3", "radio_model.model."
    state = vit(name, num_classes=0).state_dict()
    held = {
        f"{at}patch_generator.embedder.weight": state["patch_embed.proj.weight"].flatten(1),
        f"{at}patch_generator.pos_embed": torch.randn(1, 128 * 128, 32, generator=torch.Generator().manual_seed(0)),
        f"{at}patch_generator.cls_token.token": torch.cat([state["cls_token"][0], state["reg_token"][0]]),
        **{f"{at}{key}": value for key, value in state.items() if key.startswith("blocks.")},
        "input_conditioner.norm_mean": torch.ones(3, 1, 1),
    }
    found, said = opened(held, name)
    assert found.patch_embed.img_size == (32, 32)
    assert "left out input_conditioner" in said
    timms = timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay={"state_dict": held, "num_classes": 0}, num_classes=0, **TINY
    ).eval()
    assert apart(found, timms) == 0


def test_counters_of_tools_are_dropped(opened):
    model = vit()
    held = model.state_dict() | {"total_ops": torch.ones(1), "blocks.0.attn.total_params": torch.ones(1)}
    found, said = opened(held)
    assert apart(found, model) == 0
    assert "left out total_ops and blocks.0.attn.total_params, which only training needs" in said


def test_other_classes_than_those_of_the_file(refused):
    text = refused(vit().state_dict(), **TINY, num_classes=7)
    assert "head.weight (5, 32) for (7, 32), head.bias (5,) for (7,)" in text
    assert text.endswith("leave --classes out for the 5 classes of the file, or give --classes 0 for features")


def test_names_of_other_libraries(refused):
    other = {"vit.encoder.layer.0.attention.attention.query.weight": torch.ones(3, 3)}
    assert "they are those of a model of Hugging Face transformers" in refused(other)
    other = {"encoder.layers.encoder_layer_0.ln_1.weight": torch.ones(3), "conv_proj.weight": torch.ones(3)}
    assert "they are those of torchvision's VisionTransformer" in refused(other)


# -- what is no weights file


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_quantised_weights(refused):
    state = vit().state_dict()
    for dtype in (torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2):
        held = {name: (value * 99).to(dtype) if value.dim() == 2 else value for name, value in state.items()}
        text = refused(held)
        assert f"blocks.0.attn.qkv.weight is {dtype}, so they are quantized" in text
    packed = torch.quantize_per_tensor(torch.randn(5, 32), 0.1, 0, torch.qint8)
    dynamic = state | {"head._packed_params._packed_params": (packed, torch.zeros(5)), "head.scale": torch.tensor(1.0)}
    assert "head._packed_params._packed_params.0 is quantized to torch.qint8" in refused(dynamic)


FOREIGN = {
    "a git-LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 12345\n",
    "a GGUF model": b"GGUF\x03\0\0\0" + bytes(64),
    "an ONNX model": b"\x08\x0a\x12\x07pytorch\x1a\x0c2.14.1+cu13" + bytes(64),
    "a TensorFlow model": b"\x08\x01\x12\xff\x01" + bytes(64),
    "an HDF5 file": b"\x89HDF\r\n\x1a\n" + bytes(64),
    "a TensorFlow Lite model": b"\x1c\0\0\0TFL3" + bytes(64),
    "an HTML page": b"\n<!DOCTYPE html><html><head><title>404</title>",
    "a JSON file": b'{"metadata": {"total_size": 1}, "weight_map": {}}',
    "compressed by gzip": b"\x1f\x8b\x08" + bytes(64),
}


@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize("suffix", [".pth", ".bin"])
def test_files_of_other_kinds_are_called_what_they_are(what, suffix, tmp_path):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(FOREIGN[what])
    with pytest.raises(WeightsError, match=rf"must hold weights of PyTorch or safetensors, but it is {what}") as caught:
        read_checkpoint(path)
    sentence(caught.value)


def test_an_lfs_pointer_of_safetensors(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(FOREIGN["a git-LFS pointer"])
    with pytest.raises(WeightsError, match=r"git-LFS pointer .*run `git lfs pull`"):
        read_checkpoint(path)


def test_a_real_onnx_file(tmp_path):
    onnx = pytest.importorskip("onnx")
    graph = onnx.helper.make_graph([], "g", [], [])
    path = tmp_path / "model.bin"
    onnx.save(onnx.helper.make_model(graph, producer_name="me"), path)
    with pytest.raises(WeightsError, match="it is an ONNX model"):
        read_checkpoint(path)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_archives_of_other_kinds(tmp_path):
    path = tmp_path / "w.pt"

    def told() -> str:
        with pytest.raises(WeightsError) as caught:
            read_checkpoint(path)
        return sentence(caught.value)

    layer = nn.Linear(2, 2)
    names: dict[str, Any] = {"torch": torch}
    torch.jit.trace(layer, torch.zeros(1, 2)).save(path)
    text = told()
    assert "it is a TorchScript archive" in text
    exec("\n".join(re.findall(r"`([^`]+)`", text)).replace("weights.pth", str(path)), names)
    assert torch.equal(read_checkpoint(path)["weight"], layer.weight)
    torch.export.save(torch.export.export(layer, (torch.zeros(1, 2),)), tmp_path / "w.pt2")
    path = tmp_path / "w.pt2"
    text = told()
    assert "it is a program of torch.export" in text
    path = tmp_path / "w.npz"
    np.savez(path, a=np.zeros(2))
    assert "it is a NumPy archive" in told()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "it is a zip archive of other files" in told()


def test_contents_and_not_suffixes_tell(tmp_path):
    model = vit()
    save_file(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert apart(open_teacher("test_vit", weights=str(tmp_path / "pytorch_model.bin"), arguments=TINY), model) == 0


def test_the_length_of_a_header_is_no_sign_of_a_pickle(tmp_path):
    """The first byte of a safetensors file may be that of a pickle: it is the length of the header."""
    file = tmp_path / "model.safetensors"
    for length in (0x80, 0x0403_4B50):
        file.write_bytes(length.to_bytes(8, "little") + b"{")
        _check_not_weights(str(file))


def test_weights_in_the_place_of_a_name(tmp_path):
    path = tmp_path / "w.pth"
    torch.save(vit().state_dict(), path)
    with pytest.raises(
        RecipeError, match=r"but this is a weights file; name the timm model, and give --weights .*w.pth"
    ):
        open_parent(str(path))


# -- the command line


def test_options_of_a_model():
    asked = model_table("vit", "w.pth", "ema", False, "224x320", 7, 1)
    assert asked == {
        "name": "vit",
        "weights": "w.pth",
        "weights_key": "ema",
        "random_weights": False,
        "arguments": {"img_size": [224, 320], "num_classes": 7, "in_chans": 1},
    }
    assert model_table("vit", None, None, True, "256", 0)["arguments"] == {"img_size": 256, "num_classes": 0}
    assert model_table("vit", None, None, True)["arguments"] == {}
    for wrong in ("", "x", "12x", "1x2x3", "a", "0", "-3"):
        with pytest.raises(RecipeError, match="an image size must look like 256 or 224x320"):
            model_table("vit", None, None, False, wrong)


def test_a_run_from_a_training_checkpoint(tmp_path, capsys, monkeypatch):
    """The whole way by the command line, which says what it took."""
    from vitrim.cli import main
    from vitrim.deploy import store

    model = vit("vit_tiny_patch16_224", in_chans=1)
    held = {"model": vit("vit_tiny_patch16_224", in_chans=1).state_dict(), "model_ema": model.state_dict()}
    torch.save(
        held | {"args": argparse.Namespace(lr=1), "optimizer": {"state": {0: torch.ones(1)}}}, tmp_path / "w.pth"
    )
    command = ["compress", "vit_tiny_patch16_224", "--weights", str(tmp_path / "w.pth"), "--method", "magnitude"]
    sizes = [f"--set=model.arguments.{key}={TINY[key]}" for key in ("embed_dim", "depth", "num_heads")]
    more = ["--image-size", "48", "--budget", "macs=0.6", "--set", "measure.latency=false", "--out"]
    monkeypatch.setattr(sys, "argv", ["vitrim", *command, *sizes, *more, str(tmp_path / "run")])
    with pytest.raises(SystemExit) as done:
        main()
    said = capsys.readouterr().err
    assert done.value.code in (0, None), said
    assert "w.pth: took model_ema, the averaged weights; --weights-key takes model instead" in said
    assert "the shapes show 1 channel, patches of 8 x 8 pixels" in said
    assert "resampled 17 positions to 37" in said
    child = store.load(tmp_path / "run" / "model.safetensors")
    assert (child.in_chans, child.num_classes, tuple(child.patch_embed.img_size)) == (1, 5, (48, 48))


def test_released_spvit_files_are_read_alike(tmp_path):
    """A training file of SPViT's: nested, averaged, with its arguments."""
    from vitrim.methods.spvit.released import open_released

    model, other = (vit("vit_tiny_patch16_224") for _ in range(2))
    held = {"model": under("module.", other.state_dict()), "model_ema": model.state_dict()}
    torch.save(held | {"args": argparse.Namespace(a=1)}, tmp_path / "w.pth")
    found = open_released(other, tmp_path / "w.pth")
    assert apart(found, model) < SINGLE


def test_the_page_runs(tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, flags=re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5)
    torch.save({"model": vit().state_dict(), "model_ema": model.state_dict()}, "checkpoint.pth")
    names: dict[str, Any] = {}
    exec(compile(code, "checkpoints.md", "exec"), names)
    child = names["found"].model
    assert (child.num_classes, tuple(child.patch_embed.img_size)) == (5, (48, 48))
