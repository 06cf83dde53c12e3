"""Dense, merged and CAIT-style ViT-Ti backbones for segmentation of street scenes, side by side.

    python benchmarks/cait_camvid.py WEIGHTS IMAGENET CAMVID --out FOLDER [--epochs 5] [--size 96x128]

WEIGHTS is a ViT-Ti/16 224 state dict (AugReg; input scaled to mean 0.5, std 0.5), IMAGENET training images in wnid
folders or a tar of them, CAMVID the scenes (`train` and `test` with images, masks and classes.txt; `Unlabelled` does
not count). Backbones:

- `dense`: as it is;
- `merged`: neighbours merged after blocks 4 and 8, merges that start as means and are trained with the head;
- `joint`: method `cait` on IMAGENET at `--budget` of the MACs, its masks chosen and its child trained there for
  `--compress-epochs` in all, distilled from the dense model (hard labels, as the presets);
- `channels`, where asked for: the same at the same budget without merges.

Head, schedule, data and seed are the same for all. Latencies are of whole segmentors, in turns with the dense one, at
`--size` and at 192x256. Writes ``cait_camvid.jsonl``, prints a table.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import timm
import torch

from vitrim.cut.surgery import apply
from vitrim.deploy import store
from vitrim.deploy.parent import open_parent
from vitrim.families import describe
from vitrim.measure import cost, latency
from vitrim.methods.cait.masks import merge_plan
from vitrim.nn.segment import Segmentor
from vitrim.run.pipeline import compress
from vitrim.run.transfer import TransferRecipe, transfer
from vitrim.words.plain import load

RESULTS = Path(__file__).with_suffix(".jsonl")
INPUT = {"mean": [0.5] * 3, "std": [0.5] * 3}
LARGE = (192, 256)


def backbone(row: str, args: argparse.Namespace) -> Path:
    """A stored backbone, made once."""
    path: Path = args.out / f"{row}.safetensors"
    if path.is_file():
        return path
    parent = open_parent("vit_tiny_patch16_224", weights=args.weights)
    if row == "dense":
        return store.save(parent, path)
    if row == "merged":
        return store.save(apply(parent, merge_plan(describe(parent), [(4, "w"), (8, "h")], "linear", False)), path)
    common = {
        "batch": 16, "lr": 1e-4, "min_lr": 1e-6, "weight_decay": 0.05, "schedule": "cosine", "warmup_epochs": 0,
        "mixup": 0, "cutmix": 0, "smoothing": 0,
        "augment": {"kind": "light", "hflip": 0.5}, "distill": {"kind": "hard", "alpha": 0.5},
    }  # fmt: skip
    merges = [[4, "w"], [8, "h"]] if row == "joint" else []
    done = compress(
        parent,
        args.imagenet,
        method="cait",
        budget=f"macs={args.budget}",
        epochs=0.4 * args.compress_epochs,
        settings={"merges": merges, "train": common | {"epochs": 0.6 * args.compress_epochs}},
        train={key: value for key, value in common.items() if key != "epochs"},
        measure={"latency": False},
        recipe={"data": {**INPUT, "calibration": 1, "validation": 1}},
        out=args.out / f"compress-{row}",
    )
    return store.save(done.model, path)


def asked(path: Path, args: argparse.Namespace) -> TransferRecipe:
    """The recipe that all backbones are given."""
    return load(
        TransferRecipe,
        {
            "model": {"name": str(path)},
            "data": {"train": args.camvid, "ignore": ["Unlabelled"], "size": args.size.split("x"), **INPUT},
            "head": {"width": args.width, "channels": args.width},
            "augment": {"ratio": [0.75, 1.5]},
            "train": {"epochs": args.epochs, "batch": 8, "lr": 3e-4, "weight_decay": 0.01, "warmup_epochs": 0.5},
            "measure": {"seconds": 1, "threads": args.threads},
            "seed": args.seed,
        },
    )


def timed(model: torch.nn.Module, dense: torch.nn.Module, args: argparse.Namespace) -> dict[str, float | None]:
    """Latency over the dense segmentor's, at the size trained on and at the larger."""
    rows: dict[str, float | None] = {}
    for name in ("", "_large"):
        taken = latency(model, dense, batch=8, threads=args.threads, seconds=args.seconds)
        rows |= {f"ratio{name}": taken.ratio, f"low{name}": taken.ratio_low, f"high{name}": taken.ratio_high}
        for each in (model, dense):
            assert isinstance(each, Segmentor)
            each.set_input_size(LARGE)
    return rows


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights")
    parser.add_argument("imagenet")
    parser.add_argument("camvid")
    parser.add_argument("--out", type=Path, default=Path("runs/cait_camvid"))
    parser.add_argument("--rows", nargs="+", default=["dense", "merged", "joint"])
    parser.add_argument("--budget", type=float, default=0.55)
    parser.add_argument("--compress-epochs", type=float, default=0.5)
    parser.add_argument("--epochs", type=float, default=5.0)
    parser.add_argument("--size", default="96x128")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    print("| backbone | MACs of backbone | of segmentor | mIoU | pixel accuracy | latency ratio | at 192 x 256 |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in args.rows:
        path = backbone(row, args)
        done = transfer(asked(path, args), args.out / f"seg-{row}", say=lambda text: print(text, flush=True))
        known = done.measured
        ratio = timed(done.model, store.load(args.out / "seg-dense"), args) if row != "dense" else {}
        line = {
            "backbone": row, "macs_backbone": cost(store.load(path)).macs, "seconds_compressed": seconds_of(row, args),
            **known, **ratio, "scale": {"epochs": args.epochs, "size": args.size, "width": args.width},
            "iou": {each["name"]: each["iou"] for each in done.classes}, "timm": timm.__version__,
        }  # fmt: skip
        line["model"] = "vit_tiny_patch16_224"
        lines.append(line)
        args.results.write_text("".join(json.dumps(each) + "\n" for each in lines))
        print(
            f"| {row} | {line['macs_backbone'] / 1e9:.3f} G | {known['macs'] / 1e9:.3f} G | {known['miou']:.1f} | "
            f"{known['accuracy']:.1f} | {ratio.get('ratio') or 1:.2f} | {ratio.get('ratio_large') or 1:.2f} |",
            flush=True,
        )


def seconds_of(row: str, args: argparse.Namespace) -> float:
    """Seconds that compressing took."""
    path = args.out / f"compress-{row}" / "measured.json"
    return float(json.loads(path.read_text())["seconds"]) if path.is_file() else 0.0


if __name__ == "__main__":
    main()
