"""Models of Hugging Face transformers: taken as they are, with the same logits, and given back to transformers."""

import json
import shutil
import sys
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from tests.tolerance import SINGLE
from vitrim import families
from vitrim.deploy import push, store
from vitrim.deploy.parent import has_weights, open_parent, open_teacher
from vitrim.deploy.transformers import as_timm, transformers_config
from vitrim.deploy.transformers.processor import read_input
from vitrim.families import adopt
from vitrim.run.pipeline import compress
from vitrim.words.errors import AdoptError, RecipeError, VitrimError, WeightsError

transformers = pytest.importorskip("transformers")  # no other file imports it, for that takes seconds
UNKNOWN = "ignore:.*there is no preprocessor_config"

DOUBLE = 1e-10
SIZES = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}
NAMES = ["ant", "bee", "cat", "dog", "eel"]
LABELS = {"id2label": dict(enumerate(NAMES)), "label2id": {name: n for n, name in enumerate(NAMES)}}
DINO = {key: value for key, value in SIZES.items() if key != "intermediate_size"} | {"mlp_ratio": 2}
SWIN = {
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 24,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "mlp_ratio": 2.0,
}
TOWERS = {
    "text_config": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 30,
    },
    "vision_config": SIZES,
}


def make(kind: str, config: str, **settings: Any) -> Any:
    """A model whose weights are far from zero, so that any that is wrong shows."""
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, config)(**settings)).eval()
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in name and name.endswith("weight") else 0.0, std=0.2)
    return model


MODELS = {
    "vit": ("ViTForImageClassification", "ViTConfig", {**SIZES, **LABELS}),
    "vit features": ("ViTModel", "ViTConfig", {**SIZES, "qkv_bias": False, "hidden_act": "gelu_new"}),
    "vit oblong": ("ViTForImageClassification", "ViTConfig", {**SIZES, **LABELS, "image_size": [32, 48]}),
    "deit": ("DeiTForImageClassification", "DeiTConfig", {**SIZES, **LABELS}),
    "deit distilled": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", {**SIZES, **LABELS}),
    "deit features": ("DeiTModel", "DeiTConfig", SIZES),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", {**DINO, **LABELS}),
    "dinov2 features": ("Dinov2Model", "Dinov2Config", {**DINO, "use_swiglu_ffn": True}),
    "registers": ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", {**DINO, **LABELS}),
    "registers features": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", {**DINO, "num_register_tokens": 2}),
    "swin": ("SwinForImageClassification", "SwinConfig", {**SWIN, **LABELS}),
    "swin features": ("SwinModel", "SwinConfig", {**SWIN, "qkv_bias": False}),
    "beit": ("BeitForImageClassification", "BeitConfig", {**SIZES, **LABELS, "use_relative_position_bias": True}),
    "beit features": (
        "BeitModel",
        "BeitConfig",
        {
            **SIZES,
            "use_shared_relative_position_bias": True,
            "use_absolute_position_embeddings": True,
            "use_mean_pooling": False,
            "layer_scale_init_value": 0.0,
        },
    ),
    "data2vec": (
        "Data2VecVisionForImageClassification",
        "Data2VecVisionConfig",
        {**SIZES, **LABELS, "use_relative_position_bias": True},
    ),
    "clip": ("CLIPForImageClassification", "CLIPConfig", {**TOWERS, **LABELS}),
    "clip features": ("CLIPVisionModel", "CLIPVisionConfig", SIZES),
    "clip projection": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {**SIZES, "projection_dim": 20}),
    "clip both towers": ("CLIPModel", "CLIPConfig", {**TOWERS, "projection_dim": 20}),
    "siglip": ("SiglipForImageClassification", "SiglipConfig", {**TOWERS, **LABELS}),
    "siglip features": ("SiglipVisionModel", "SiglipVisionConfig", SIZES),
    "siglip no head": ("SiglipVisionModel", "SiglipVisionConfig", {**SIZES, "vision_use_head": False}),
    "siglip both towers": ("SiglipModel", "SiglipConfig", TOWERS),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders that transformers saved, made once for each model."""
    root, made = tmp_path_factory.mktemp("hf"), {}

    def folder(name: str) -> Any:
        if name not in made:
            model, place = make(*MODELS[name][:2], **MODELS[name][2]), root / name.replace(" ", "_")
            model.save_pretrained(place)
            processor = {"do_normalize": True, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
            processor |= {"do_resize": True, "size": {"height": 32, "width": 48 if "oblong" in name else 32}}
            (place / "preprocessor_config.json").write_text(json.dumps(processor))
            made[name] = model, place
        return made[name]

    return folder


@pytest.fixture
def copied(folders, tmp_path):
    """Give a copy of a folder to damage."""

    def copy(name: str = "vit") -> Any:
        shutil.copytree(folders(name)[1], tmp_path / "copy", dirs_exist_ok=True)
        return tmp_path / "copy"

    return copy


def answer(model: Any, x: torch.Tensor) -> torch.Tensor:
    """What transformers computes, called as its documentation has it."""
    with torch.no_grad():
        if hasattr(model, "get_image_features"):
            found = model.get_image_features(pixel_values=x)
            return found if isinstance(found, torch.Tensor) else found.pooler_output
        found = model(pixel_values=x)
    for name in ("logits", "image_embeds"):
        if getattr(found, name, None) is not None:
            return getattr(found, name)
    if found.pooler_output is None or type(model).__name__ in ("ViTModel", "DeiTModel"):
        return found.last_hidden_state.mean(1) if found.pooler_output is None else found.last_hidden_state[:, 0]
    return found.pooler_output


def opening(name: str) -> Any:
    """What opens a model: adopted, if vitrim has a family for it."""
    kind = name.split()[0]
    known = kind not in ("beit", "data2vec") or "beit" in families.names()
    return open_parent if known else open_teacher


def images(model: Any) -> torch.Tensor:
    x = torch.randn(2, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(1))
    return x.to(next(model.parameters()))


def apart(one: torch.Tensor, two: torch.Tensor) -> float:
    assert one.shape == two.shape
    return float((one - two).abs().max() / two.abs().max())


def edit(folder: Any, file: str = "config.json", **changes: Any) -> str:
    """Change entries of a JSON file; None takes one out."""
    held = json.loads((folder / file).read_text()) | changes
    (folder / file).write_text(json.dumps({key: value for key, value in held.items() if value is not None}))
    return str(folder)


def refused(name: str, kind: type[VitrimError] = RecipeError, **arguments: Any) -> str:
    with pytest.raises(kind) as caught:
        open_teacher(name, **arguments)
    text = str(caught.value)
    assert text.isprintable()
    assert "but" in text
    return text


# -- in


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_gives_the_same_logits(name, folders):
    model, folder = folders(name)
    opened = opening(name)(str(folder))
    x = images(opened)
    with torch.no_grad():
        assert apart(opened(x), answer(model, x)) < SINGLE
    has = getattr(opened, "num_classes", 0)
    assert has == (5 if "id2label" in MODELS[name][2] else 20 if "projection_dim" in MODELS[name][2] else 0)
    assert opened.pretrained_cfg.get("label_names") == (tuple(NAMES) if has == 5 else None)
    assert timm.data.resolve_model_data_config(opened)["mean"] == (0.4, 0.5, 0.6)


@pytest.mark.filterwarnings(UNKNOWN)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_in_memory_gives_the_same_logits_in_float64(name):
    model = make(*MODELS[name][:2], **MODELS[name][2]).double()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    made = as_timm(model)
    adopted = adopt(made) if opening(name) is open_parent else made
    x = images(adopted)
    assert x.dtype == torch.float64
    with torch.no_grad():
        assert apart(adopted(x), answer(model, x)) < DOUBLE
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_names_of_both_versions_of_transformers(folders, copied):
    """In its files version 5 writes the names of version 4; in memory it has others."""
    for name in ("vit", "dinov2 features", "swin"):
        model, _ = folders(name)
        folder = copied(name)
        old = set(load_file(folder / "model.safetensors"))
        state = {key: value.clone() for key, value in model.state_dict().items()}
        assert old != set(state) or transformers.__version__ < "5", "the two differ, or this test shows nothing"
        save_file(state, folder / "model.safetensors")
        opened = open_teacher(str(folder))
        x = images(opened)
        with torch.no_grad():
            assert apart(opened(x), answer(model, x)) < SINGLE


def test_weights_in_several_files(folders, tmp_path):
    model, whole = folders("vit")
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    parts = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(parts) > 1
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(open_teacher(str(tmp_path))(x), open_teacher(str(whole))(x))
    parts[1].unlink()
    assert f"{parts[1].name} is not; copy or download it again" in refused(str(tmp_path), WeightsError)
    index = {"weight_map": {"vit.layernorm.weight": "../w.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "must name the files beside it" in refused(str(tmp_path), WeightsError)


def test_a_repository_on_the_hub(folders, monkeypatch):
    model, folder = folders("vit")
    asked = []

    def fetch(name, file):
        asked.append((name, file))
        return folder / file if (folder / file).is_file() else None

    monkeypatch.setattr("vitrim.deploy.transformers.files.fetch", fetch)
    opened = open_parent("hf-hub:owner/ants@v1")
    x = images(opened)
    with torch.no_grad():
        assert apart(opened(x), answer(model, x)) < SINGLE
    assert {name for name, _ in asked} == {"hf-hub:owner/ants@v1"}
    assert asked[0][1] == "config.json"


def test_what_is_said(folders, copied):
    lines: list[str] = []
    folder = copied("clip both towers")
    (folder / "preprocessor_config.json").unlink()
    opened = open_teacher(str(folder), say=lines.append)
    text = "\n".join(line.removeprefix(f"{folder}: ") for line in lines)
    assert "left out logit_scale, text_model and text_projection" in text
    assert "there is no preprocessor_config.json, so images are normalised with mean 0.481455" in text
    assert opened.pretrained_cfg["description"] == "CLIPModel of Hugging Face transformers"


def test_other_sizes_classes_and_channels(folders):
    folder = folders("vit")[1]
    lines: list[str] = []
    opened = open_teacher(str(folder), arguments={"img_size": 48, "num_classes": 0, "in_chans": 1}, say=lines.append)
    assert opened(torch.randn(1, 1, 48, 48)).shape == (1, 48)
    assert "resampled 17 positions to 37 for 48 pixels" in "\n".join(lines)
    assert "classes must be those of the weights, but there are 5" in refused(str(folder), arguments={"num_classes": 3})
    assert "but got depth; only img_size" in refused(str(folder), arguments={"depth": 3})
    assert "with its own weights, but random weights" in refused(str(folder), random_weights=True)


@pytest.mark.parametrize("name", ["dinov2", "registers features"])
def test_dinov2_takes_the_size_of_its_processor(name, folders, copied):
    """transformers resamples its positions for any image, and its processors crop to less than the size of the file."""
    model, folder = folders(name)[0], copied(name)
    processor = {"do_resize": True, "size": {"shortest_edge": 54}, "do_center_crop": True}
    edit(folder, "preprocessor_config.json", **processor, crop_size={"height": 48, "width": 48})
    opened = open_parent(str(folder))
    assert tuple(opened.patch_embed.img_size) == (48, 48)
    x = images(opened)
    with torch.no_grad():
        assert apart(opened(x), answer(model, x)) < SINGLE
    assert opened.pretrained_cfg["crop_pct"] == pytest.approx(48 / 54)


def test_processors():
    vit = {"do_resize": True, "size": {"height": 224, "width": 224}, "resample": 2, "image_mean": [0.5] * 3}
    assert read_input({**vit, "image_std": [0.25] * 3}, (224, 224), "p") == {
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "squash",
    }
    deit = {"size": 256, "do_center_crop": True, "crop_size": 224, "feature_extractor_type": "DeiTFeatureExtractor"}
    found = read_input(deit, (224, 224), "p")
    assert (found["crop_pct"], found["crop_mode"]) == (0.875, "squash")
    clip = {"size": 224, "do_center_crop": True, "crop_size": 224, "feature_extractor_type": "CLIPFeatureExtractor"}
    assert read_input(clip, (224, 224), "p")["crop_mode"] == "center"
    for resized in range(225, 400):
        share = read_input({"size": {"shortest_edge": resized}, "do_center_crop": True}, (224, 224), "p")["crop_pct"]
        assert int(224 / share) == resized
    # x / 127.5 normalised by (1, 1) is x / 255 normalised by (0.5, 0.5).
    found = read_input({"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}, (8, 8), "p")
    assert (found["mean"], found["std"]) == ([0.5] * 3, [0.5] * 3)
    for wrong in ({"image_std": [0.0] * 3}, {"image_mean": "x"}, {"image_mean": [0.1, 0.2]}, {"rescale_factor": -1}):
        with pytest.raises(RecipeError):
            read_input(wrong, (8, 8), "p")


# -- refused


def test_a_processor_of_another_size(copied):
    folder = edit(copied(), "preprocessor_config.json", size={"height": 48, "width": 48})
    text = refused(folder)
    assert "must make images of the model's 32 x 32 pixels, but makes 48 x 48; give --image-size 32" in text
    for size in (32, 48):
        assert open_teacher(folder, arguments={"img_size": size}).patch_embed.img_size == (size, size)


def test_labels_that_do_not_count_the_classes(copied):
    folder = copied()
    for wrong, told in (
        ({"id2label": {"0": "ant", "1": "bee"}}, "but has 2 names and class 2 has none"),
        ({"id2label": {str(n): f"n{n}" for n in range(7)}}, "but has 7 names and there is one for 6"),
        ({"id2label": {"a": "ant"}}, "id2label must name numbers of classes, but has ['a']"),
        ({"id2label": LABELS["id2label"], "label2id": {"bee": 0}}, "label2id must say the same as id2label"),
        ({"id2label": None, "label2id": None, "num_labels": 7}, "num_labels must be the 5 classes"),
    ):
        assert told in refused(edit(folder, **wrong))
    edit(folder, id2label=None, label2id=None, num_labels=None)
    assert "label_names" not in open_teacher(str(folder)).pretrained_cfg
    edit(folder, id2label={str(n): f"LABEL_{n}" for n in range(5)})
    assert "label_names" not in open_teacher(str(folder)).pretrained_cfg
    edit(folder, id2label=None, label2id={name: n for n, name in enumerate(NAMES)})
    assert open_teacher(str(folder)).pretrained_cfg["label_names"] == tuple(NAMES)


def test_another_architecture(copied):
    folder = copied()
    (folder / "model.safetensors").unlink()  # refused before any weights are read
    assert "but is bert; see `vitrim models`" in refused(edit(folder, model_type="bert"))
    assert "clip_text_model is the text tower" in refused(edit(folder, model_type="clip_text_model"))
    assert "hidden_act must be one of gelu" in refused(edit(folder, model_type="vit", hidden_act="relu6"))
    assert "settings must be those of a vit model" in refused(edit(folder, hidden_act="gelu", image_size="x"))
    assert "at least one patch" in refused(edit(folder, image_size=4))
    (folder / "config.json").write_text("{")
    assert "the file must be JSON" in refused(str(folder))


def test_missing_and_wrong_weights(copied, folders):
    folder = copied()
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    assert "must have its weights in model.safetensors, but there are none" in refused(str(folder), WeightsError)
    (folder / "adapter_config.json").write_text("{}")
    assert "it holds an adapter alone" in refused(str(folder), WeightsError)
    torch.save(state, folder / "pytorch_model.bin")
    assert open_teacher(str(folder)).num_classes == 5
    for change, told in (
        ({"vit.embeddings.register_tokens": torch.zeros(1, 2, 48)}, "which has no reg_token, but hold register tokens"),
        ({"embeddings.token_embedding.weight": torch.zeros(9, 48)}, "but hold a token embedding"),
        ({"vit.layernorm.bias": torch.full((48,), torch.nan)}, "weights must be finite, but norm.bias"),
        ({"vit.extra": torch.zeros(1)}, "has unknown extra"),
    ):
        torch.save(state | change, folder / "pytorch_model.bin")
        assert told in refused(str(folder), WeightsError)
    short = {name: value for name, value in state.items() if "0.attention.attention.key.bias" not in name}
    torch.save(short, folder / "pytorch_model.bin")
    assert "queries, keys and values must all be in the file" in refused(str(folder), WeightsError)


def test_a_configuration_of_other_weights(copied):
    """Refused before a model of its sizes is built, however large they are."""
    folder = copied()
    for wrong, told in (
        ({"num_hidden_layers": 10**9}, "which says 1000000000 blocks, but have 3"),
        ({"num_hidden_layers": 3, "hidden_size": 10**9}, "which says a patch embedding of shape (1000000000, 3, 8, 8)"),
        ({"hidden_size": 48, "image_size": 10**9}, "which says 15625000000000000 patches, but have 17 positions"),
        ({"image_size": 32, "intermediate_size": 10**9}, "which says 1000000000 neurons, but have 96"),
    ):
        assert told in refused(edit(folder, **wrong), WeightsError, arguments={"img_size": 32})
    assert transformers_config("x/" * 5000) is None


def test_windows_that_would_be_padded(copied):
    folder = copied("swin")
    text = refused(edit(folder, image_size=40), arguments={"img_size": 40})
    assert "but stage 0 has 10 x 10 patches for images of 40 x 40" in text
    assert "use_absolute_embeddings must be false" in refused(edit(folder, use_absolute_embeddings=True))


@pytest.mark.filterwarnings(UNKNOWN)
def test_a_model_in_memory_that_is_more_than_its_weights():
    model = make(*MODELS["vit"][:2], **MODELS["vit"][2])
    hook = model.classifier.register_forward_hook(lambda _, __, out: out + 1)
    with pytest.raises(AdoptError, match=r"outputs must be those of its weights in timm's model .* but differ by"):
        as_timm(model)
    hook.remove()
    as_timm(model)
    with pytest.raises(TypeError, match=r"vitrim\.compress takes it"):
        adopt(model)
    backbone = make("Dinov2Backbone", "Dinov2Config", **DINO)
    with pytest.raises(AdoptError, match="gives neither; pass its encoder"):
        as_timm(backbone)


def test_latency_and_bench_take_a_folder(folders, tmp_path):
    folder = str(folders("vit")[1])
    assert has_weights(folder)
    assert not has_weights("vit_tiny_patch16_224")
    state = load_file(f"{folder}/model.safetensors")
    torch.save(state, tmp_path / "pytorch_model.bin")
    shutil.copy(f"{folder}/config.json", tmp_path)
    assert has_weights(str(tmp_path))


def test_the_files_are_enough(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert open_parent(str(folders("swin")[1])).num_classes == 5


# -- out again


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory):
    """A run folder of a model of transformers."""
    out = tmp_path_factory.mktemp("runs") / "half"
    compress(str(folders("vit")[1]), method="magnitude", budget="macs=0.7", out=out, measure={"latency": False})
    return out


@pytest.fixture(scope="module")
def pushed(run, tmp_path_factory):
    place = tmp_path_factory.mktemp("hub") / "ants"
    push.push(run, "owner/ants", licence="mit", folder=place)
    return place


def same(model: Any, run: Any) -> None:
    """Both models give the same logits, bit for bit."""
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(model(pixel_values=x).logits, store.load(run)(x))


def test_transformers_opens_what_was_pushed(run, pushed):
    model = transformers.AutoModelForImageClassification.from_pretrained(pushed)
    same(model, run)
    assert model.config.id2label == dict(enumerate(NAMES))
    prepare = transformers.AutoImageProcessor.from_pretrained(pushed)
    pixels = prepare(Image.new("RGB", (40, 40), (102, 128, 153)))["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    assert pixels.abs().max() < 0.02, "the colour is the processor's mean"


def test_a_pipeline_tells_names(pushed):
    classify = transformers.pipeline("image-classification", model=str(pushed), device="cpu")
    found = classify(Image.new("RGB", (40, 40), (102, 128, 153)), top_k=5)
    assert sorted(each["label"] for each in found) == NAMES


def test_the_wrapper_saves_what_reloads(run, pushed, tmp_path):
    model = transformers.AutoModelForImageClassification.from_pretrained(pushed)
    model.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "again")
    same(again, run)
    assert again.config.id2label == dict(enumerate(NAMES))
    x = torch.randn(2, 3, 32, 32)
    opened = open_parent(str(tmp_path / "again"))
    with torch.no_grad():
        assert torch.equal(opened(x), store.load(run)(x))
    assert opened.pretrained_cfg["label_names"] == tuple(NAMES)
    assert "must be taken as it is, but got img_size" in refused(str(tmp_path / "again"), arguments={"img_size": 48})


def test_the_trainer_trains_it_and_vitrim_takes_it_back(pushed, tmp_path):
    model = transformers.AutoModelForImageClassification.from_pretrained(
        pushed, num_labels=3, ignore_mismatched_sizes=True
    )
    before = model.timm_model.patch_embed.proj.weight.detach().clone()
    data = [{"pixel_values": torch.randn(3, 32, 32), "labels": n % 3} for n in range(4)]
    settings = transformers.TrainingArguments(
        str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(model, settings, train_dataset=data)
    trainer.train()
    assert not torch.equal(model.timm_model.patch_embed.proj.weight, before)
    trainer.save_model(tmp_path / "trained")
    opened = open_parent(str(tmp_path / "trained"))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        wanted = model.eval()(pixel_values=x).logits
        assert torch.equal(opened(x), wanted)
        if transformers.__version__ >= "5":  # version 4 saves the old names beside the new number of classes
            again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "trained")
            assert torch.equal(again(pixel_values=x).logits, wanted)


def test_a_model_without_names_of_classes_saves_what_reloads(tmp_path):
    torch.manual_seed(0)
    net = timm.create_model("test_vit", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=10)
    child = compress(net, method="magnitude", budget="macs=0.7", measure={"latency": False}).model
    push.push(store.save(child, tmp_path / "m.safetensors"), "o/n", licence="mit", folder=tmp_path / "out")
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    same(model, tmp_path / "m.safetensors")
    model.save_pretrained(tmp_path / "again")
    same(transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "again"), tmp_path / "m.safetensors")
    features = transformers.AutoModel.from_pretrained(tmp_path / "again")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(features(pixel_values=x).last_hidden_state, child.forward_features(x))


def test_what_timm_alone_opens_needs_no_vitrim_in_transformers(tmp_path):
    torch.manual_seed(0)
    net = timm.create_model("test_vit", img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=4)
    file = store.save(adopt(net.eval()), tmp_path / "m.safetensors")
    push.push(file, "o/n", licence="mit", folder=tmp_path / "out")
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert type(model.timm_model.blocks[0]).__module__ == "timm.models.vision_transformer"
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert apart(model(pixel_values=x).logits, store.load(file)(x)) < SINGLE


def test_a_wrapped_model_of_timm(tmp_path):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    config = transformers.TimmWrapperConfig(architecture="test_vit", model_args=sizes, num_labels=3)
    model = transformers.TimmWrapperForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    opened, x = open_parent(str(tmp_path)), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert apart(opened(x), model(pixel_values=x).logits) < SINGLE
    assert as_timm(model) is model.timm_model
    assert "must be a name that timm knows, but is 'nothing'" in refused(edit(tmp_path, architecture="nothing"))


def test_labels_are_in_reports_and_cards(run, pushed):
    line = "5: ant; bee; cat; dog; eel"
    assert line in (run / "report.html").read_text(encoding="utf-8")
    text = (pushed / "README.md").read_text(encoding="utf-8")
    assert f"| classes | {line} |" in text
    assert "| parent | vit, ViTForImageClassification of Hugging Face transformers |" in text
    assert "base_model" not in text
    assert 'AutoModelForImageClassification.from_pretrained("owner/ants")' in text
    assert store.read_spec(run).host.pretrained["label_names"] == tuple(NAMES)


def test_the_card_of_the_parent_states_its_licence(copied, tmp_path):
    folder = copied()
    (folder / "README.md").write_text("---\ntags: [x]\nlicense: apache-2.0\n---\n# Ants\n")
    compress(str(folder), method="magnitude", budget="macs=0.7", out=tmp_path / "run", measure={"latency": False})
    push.push(tmp_path / "run", "owner/ants", folder=tmp_path / "out")
    assert "\nlicense: apache-2.0\n" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_compress_takes_a_model_in_memory(folders):
    model, folder = folders("vit")
    with pytest.warns(UserWarning, match="images are normalised with mean 0.5, 0.5, 0.5 and std"):
        found = compress(model, method="magnitude", budget="macs=0.7", measure={"latency": False})
    assert found.measured["model"].startswith("(ViTForImageClassification in memory, ")
    assert found.model.pretrained_cfg["label_names"] == tuple(NAMES)
    reloaded = transformers.ViTForImageClassification.from_pretrained(folder)
    assert as_timm(reloaded).pretrained_cfg["mean"] == (0.4, 0.5, 0.6), "the processor beside the files"
