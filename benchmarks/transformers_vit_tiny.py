"""A real ViT-Ti through Hugging Face transformers and back.

    python benchmarks/transformers_vit_tiny.py WEIGHTS TRAIN TEST --out benchmarks/transformers_vit_tiny.json

WEIGHTS are those of timm's vit_tiny_patch16_224 (mean and std 0.5), TRAIN and TEST sources of ImageNet images. The
weights are put into transformers' ViTForImageClassification and saved as a folder; vitrim compresses that folder
(taylor, ridge, no training); what it pushes is opened by transformers and asked for the classes of all test images.
"""

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import timm
import torch
import transformers
from safetensors.torch import load_file
from timm.data import ImageNetInfo

import vitrim
from vitrim.data import Input, eval_loader, split
from vitrim.deploy import push, store
from vitrim.deploy.parent import open_parent
from vitrim.nn.parity import relative
from vitrim.run.pipeline import run
from vitrim.run.recipe import Recipe


def as_transformers(weights: Path, folder: Path) -> transformers.ViTForImageClassification:
    """Save timm's ViT-Ti as a folder of transformers, with the names of ImageNet's classes and its processor."""
    info = ImageNetInfo()
    labels = dict(enumerate(info.index_to_description(n) for n in range(1000)))
    config = transformers.ViTConfig(
        hidden_size=192, num_attention_heads=3, intermediate_size=768, layer_norm_eps=1e-6, id2label=labels,
        label2id={name: n for n, name in labels.items()},
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    given, state = load_file(weights), {}
    names = {
        "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj",
        "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
    }  # fmt: skip
    for leaf in ("weight", "bias"):
        for n in range(12):
            for part, rows in zip("qkv", given[f"blocks.{n}.attn.qkv.{leaf}"].chunk(3), strict=True):
                state[f"vit.layers.{n}.attention.{part}_proj.{leaf}"] = rows
            for mine, theirs in names.items():
                state[f"vit.layers.{n}.{theirs}.{leaf}"] = given[f"blocks.{n}.{mine}.{leaf}"]
        state[f"vit.embeddings.patch_embeddings.projection.{leaf}"] = given[f"patch_embed.proj.{leaf}"]
        state[f"vit.layernorm.{leaf}"], state[f"classifier.{leaf}"] = given[f"norm.{leaf}"], given[f"head.{leaf}"]
    state["vit.embeddings.cls_token"] = given["cls_token"]
    state["vit.embeddings.position_embeddings"] = given["pos_embed"]
    model.load_state_dict(state)
    model.save_pretrained(folder)
    transformers.ViTImageProcessor(resample=3).save_pretrained(folder)
    return model


def main() -> None:
    """Run it and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("weights", "train", "test"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--budget", default="macs=0.8")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        folder, out, pushed = (Path(place) / name for name in ("vit_tiny", "half", "pushed"))
        dense = as_transformers(asked.weights, folder)
        opened = open_parent(str(folder))
        recipe = Recipe.model_validate(
            {
                "model": {"name": str(folder)},
                "data": {"train": str(asked.train), "test": str(asked.test)},
                "method": {"name": "taylor"},
                "budget": asked.budget,
                "recover": "ridge",
                "measure": {"latency": False},
                "seed": asked.seed,
            }
        )
        measured = run(recipe, out).measured
        push.push(out, "owner/vit-tiny-smaller", licence="other", folder=pushed)
        back = transformers.AutoModelForImageClassification.from_pretrained(pushed).eval()
        images = split(str(asked.train), str(asked.test), calibration=1, validation=0, seed=0, classes=1000).test
        loader = eval_loader(images, Input.of(opened), batch=50)
        child = store.load(out)
        right, apart, apart_back = 0, 0.0, 0.0
        with torch.no_grad():
            for x, labels in loader:
                apart = max(apart, relative(opened(x), dense(pixel_values=x).logits))
                logits = back(pixel_values=x).logits
                apart_back = max(apart_back, relative(logits, child(x)))
                right += int((logits.argmax(-1) == labels).sum())
        record = {
            "model": "ViTForImageClassification",
            "images": len(images),
            "logits_apart": apart,
            "classes": back.config.num_labels,
            "first_classes": [back.config.id2label[n] for n in range(3)],
            "budget": asked.budget,
            "method": "taylor, ridge",
            "seed": asked.seed,
            "top1_parent": measured["top1_parent"],
            "top1": measured["top1"],
            "top1_by_transformers": 100 * right / len(images),
            "logits_apart_by_transformers": apart_back,
            "seconds": round(time.perf_counter() - start, 1),
            "processor": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "timm": timm.__version__,
            "transformers": transformers.__version__,
            "vitrim": vitrim.__version__,
        }
    asked.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
