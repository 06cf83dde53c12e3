"""Every method at the same cost and with the same number of epochs, on a fine-tuned real model.

    python benchmarks/campaign.py DATA --out FOLDER [--size small|full|tiny] [--seeds 0 1 2] [--budgets 0.5 0.35]
        [--rows taylor cait ...] [--table]

DATA is a folder with a ViT-Ti/16 state dict (``vit_tiny_patch16_224.safetensors``: AugReg, input scaled to mean 0.5 and
std 0.5) and CIFAR-10 as ``cifar10_{train,test}_*.npz`` (fields data, offsets, labels and classes; data is the bytes of
encoded strips of 32 x 32 pictures, 500 one under another).

The model is fine-tuned once, with seed 0. Then each row is one run folder of `vitrim.run.pipeline.run`, so the command
resumes where it stopped. Search and training of a row take as many epochs as the dense control is trained on,
with the fine-tuned model as the teacher. Published methods start from closed forms (``init = "closed_form"``). `taylor`
and `random` cut bare; `taylor_ridge` compensates in closed form; `post_training` merges no patches
(docs/results.md). Results are appended to ``FOLDER/results.jsonl``. ``--table`` only prints the table and draws
``campaign.svg``. Differences to the control are paired, on the same test images and the same seed, with their standard
error.

- small: 64 px, 10,000 training and 5,000 test images, 3 epochs in all, batch 64: for two CPU cores.
- full: 160 px, 40,000 training and 5,000 test images, 12 epochs in all, batch 256, bfloat16: for a GPU.
- tiny: 32 px, 60 training and 40 test images: only to test this script.
"""

import argparse
import datetime
import io
import itertools
import json
import math
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from PIL import Image

from vitrim.data import Input, eval_loader, open_source
from vitrim.deploy import store
from vitrim.deploy.parent import open_parent
from vitrim.run.pipeline import run
from vitrim.run.recipe import Recipe
from vitrim.train import RATES, Train, fit
from vitrim.words.plain import load

HALF = [0.5, 0.5, 0.5]
STRIP = 32


class Size(NamedTuple):
    """The scale of a campaign: pixels, images, epochs of the parent and of each row, and how a step is made."""

    pixels: int
    train: int
    test: int
    parent: float
    epochs: float
    batch: int
    precision: str
    trials: int
    calibration: int | None
    held_out: int


SIZES = {
    "small": Size(64, 10_000, 5_000, 2, 3, 64, "fp32", 24, None, 500),
    "full": Size(160, 40_000, 5_000, 4, 12, 256, "bf16", 40, None, 2_000),
    "tiny": Size(32, 60, 40, 0.5, 1, 8, "fp32", 2, 16, 10),
}


def training(size: Size, epochs: float, **more: Any) -> dict[str, Any]:
    """Return the settings that all trainings share."""
    return {
        "epochs": epochs,
        "batch": size.batch,
        "lr": 2e-4,
        "weight_decay": 0.05,
        "warmup_epochs": min(0.5, epochs / 2),
        "precision": size.precision,
        "augment": {"kind": "light", "hflip": 0.5, "shift": 0.0625},
        "distill": {"kind": "soft", "alpha": 0.5},
        "mixup": 0,
        "cutmix": 0,
        "smoothing": 0,
        "drop_path": None,
        "ema": None,
        **more,
    }


def rows(size: Size) -> dict[str, tuple[dict[str, Any], float]]:
    """Return each row's method with its settings, and the epochs that its search takes."""
    part, flat = size.epochs * 5 / 12, {"schedule": "constant", "warmup_epochs": 0}
    shared = size.epochs * 0.6
    return {
        "dense": ({"name": "magnitude"}, 0),
        "random": ({"name": "random"}, 0),
        "taylor": ({"name": "taylor"}, 0),
        "taylor_ridge": ({"name": "taylor"}, 0),
        "post_training": ({"name": "post_training", "tokens": False}, 0),
        "vit_slim": (
            {
                "name": "vit_slim",
                "init": "closed_form",
                "train": training(size, part, **flat),
                "gate_lr": 3e-3,
            },
            part,
        ),
        "mdc": (
            {
                "name": "mdc",
                "init": "closed_form",
                "neurons": 0.9,
                "train": training(size, 0),
                "trials": size.trials,
                "initial": max(1, size.trials * 2 // 5),
                "measure": "loss",
            },
            0,
        ),
        "cait": ({"name": "cait", "init": "closed_form", "train": training(size, shared)}, shared),
        "spvit": (
            {
                "name": "spvit",
                "init": "closed_form",
                "rank": 32,
                "train": training(size, part, **flat),
                "inherit": "search",
            },
            part,
        ),
    }


def pictures(path: Path) -> Iterator[tuple[Image.Image, int]]:
    """Yield the pictures of a pack and their labels."""
    pack = np.load(path)
    data, offsets, labels = pack["data"], pack["offsets"], pack["labels"]
    count = 0
    for start, stop in itertools.pairwise(offsets):
        strip = Image.open(io.BytesIO(data[start:stop].tobytes())).convert("RGB")
        for top in range(0, strip.height, STRIP):
            yield strip.crop((0, top, STRIP, top + STRIP)), int(labels[count])
            count += 1


def unpack(data: Path, folder: Path, size: Size) -> Path:
    """Write the images that `size` needs as class folders, once; return the folder."""
    done = folder / "complete"
    if done.exists():
        return folder / "images"
    for split, wanted in (("train", size.train), ("test", size.test)):
        written = 0
        for pack in sorted(data.glob(f"cifar10_{split}_*.npz")):
            for picture, label in pictures(pack):
                if written == wanted:
                    break
                place = folder / "images" / split / str(label)
                place.mkdir(parents=True, exist_ok=True)
                picture.save(place / f"{written:05d}.png")
                written += 1
    done.touch()
    return folder / "images"


def parent(data: Path, folder: Path, images: Path, size: Size) -> Path:
    """Fine-tune the dense model once; return its file."""
    path = folder / "parent.safetensors"
    if not path.exists():
        arguments = {"img_size": size.pixels}
        weights = str(data / "vit_tiny_patch16_224.safetensors")
        model = open_parent("vit_tiny_patch16_224", weights=weights, arguments=arguments, seed=0)
        torch.manual_seed(0)
        model.reset_classifier(10)
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        settings = load(Train, training(size, size.parent, lr=1e-4, distill={"kind": "none"}))
        fitted = fit(
            model, open_source(f"{images}:train"), settings, input=Input.of(model, mean=HALF, std=HALF), seed=0,
            folder=folder / "parent",
        )  # fmt: skip
        store.save(fitted.model.cpu().eval(), path)
    return path


@torch.no_grad()
def right(model: torch.nn.Module, images: Path) -> np.ndarray:
    """Return for each test image whether the model's class is its label."""
    place = next(model.parameters()).device
    found = [
        (model(x.to(place)).argmax(1).cpu() == y.cpu()).numpy()
        for x, y in eval_loader(open_source(f"{images}:test"), Input.of(model, mean=HALF, std=HALF), batch=128)
    ]
    return np.concatenate(found)


def one(row: str, budget: float, seed: int, model: Path, images: Path, size: Size, folder: Path) -> dict[str, Any]:
    """Run one row, or read what an earlier command finished; return its record."""
    method, searched = rows(size)[row]
    where = folder / "runs" / f"{row}-{budget:g}-{seed}"
    start = time.perf_counter()
    child = training(size, size.epochs - searched)
    if row == "cait":  # its child continues the learning-rate cycle of the search
        child = {name: value for name, value in child.items() if name not in RATES}
    recipe = load(
        Recipe,
        {
            "model": {"name": str(model)},
            "data": {
                "train": f"{images}:train",
                "test": f"{images}:test",
                "mean": HALF,
                "std": HALF,
                "calibration": size.calibration,
                "validation": size.held_out,
            },
            "method": method,
            "budget": f"macs={1.0 if row == 'dense' else budget}",
            "recover": "ridge" if row == "taylor_ridge" else "none",
            "train": child,
            "measure": {"latency": False},
            "seed": seed,
        },
    )
    found = run(recipe, where, say=lambda text: print(f"  {text}", flush=True))
    hits = right(found.model.eval(), images)
    np.save(where / "right.npy", hits)
    return {
        "row": row,
        "budget": 1.0 if row == "dense" else budget,
        "seed": seed,
        "size": size_name(size),
        "epochs_search": searched,
        "epochs_child": size.epochs - searched,
        "macs_ratio": found.measured["macs_ratio"],
        "top1": 100 * float(hits.mean()),
        "top1_error": 100 * math.sqrt(hits.mean() * (1 - hits.mean()) / len(hits)),
        "agreement": found.measured.get("agreement"),
        "seconds": round(time.perf_counter() - start, 1),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "date": datetime.date.today().isoformat(),
    }


def size_name(size: Size) -> str:
    return next(name for name, other in SIZES.items() if other == size)


def paired(folder: Path, record: dict[str, Any]) -> tuple[float, float] | None:
    """Return the difference in top-1 to the control of the same seed, and its standard error, in points."""
    files = [
        folder / "runs" / f"{row}-{budget:g}-{record['seed']}" / "right.npy"
        for row, budget in (("dense", 1.0), (record["row"], record["budget"]))
    ]
    if not all(file.exists() for file in files):
        return None
    control, mine = (np.load(file).astype(float) for file in files)
    apart = mine - control
    return 100 * float(apart.mean()), 100 * float(apart.std(ddof=1) / math.sqrt(len(apart)))


def table(folder: Path) -> str:
    """Return a row for each method and budget: means over seeds, and the mean paired difference to the control."""
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    lines = ["| row | MACs | seeds | top-1 | against dense, trained on | epochs (search + child) |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | --- |")
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["row"], record["budget"]), []).append(record)
    for (row, budget), runs in sorted(groups.items(), key=lambda item: (-item[0][1], item[0][0])):
        top1 = [record["top1"] for record in runs]
        spread = f" ± {np.std(top1, ddof=1) / math.sqrt(len(top1)):.2f}" if len(top1) > 1 else ""
        pairs = [pair for record in runs if row != "dense" and (pair := paired(folder, record))]
        error = math.sqrt(sum(e**2 for _, e in pairs)) / len(pairs) if pairs else 0.0
        apart = f"{np.mean([d for d, _ in pairs]):+.2f} ± {error:.2f}" if pairs else "-"
        epochs = f"{runs[0]['epochs_search']:g} + {runs[0]['epochs_child']:g}"
        lines.append(f"| {row} | {budget:g} | {len(runs)} | {np.mean(top1):.2f}{spread} | {apart} | {epochs} |")
    return "\n".join(lines)


def figure(folder: Path) -> None:
    """Draw the top-1 of each row with its standard error over seeds, a color for each budget, and the dense control."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    records = [json.loads(line) for line in (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()]
    groups: dict[tuple[str, float], list[float]] = {}
    for record in records:
        groups.setdefault((record["row"], record["budget"]), []).append(record["top1"])
    dense = groups.pop(("dense", 1.0), [])
    names = list(dict.fromkeys(row for row, _ in sorted(groups, key=lambda group: np.mean(groups[group]))))
    plt.rcParams.update({"svg.hashsalt": "vitrim", "svg.fonttype": "path"})
    drawn, axes = plt.subplots(figsize=(6.4, 0.7 + 0.4 * max(4, len(names))), layout="constrained")
    for budget in sorted({budget for _, budget in groups}, reverse=True):
        mine = [name for name in names if (name, budget) in groups]
        each = [groups[name, budget] for name in mine]
        axes.errorbar(
            [float(np.mean(top1)) for top1 in each],
            [names.index(name) for name in mine],
            xerr=[float(np.std(top1, ddof=1) / math.sqrt(len(top1))) if len(top1) > 1 else 0.0 for top1 in each],
            fmt="o",
            capsize=3,
            label=f"{budget:g} of the MACs",
        )
    if dense:
        axes.axvline(float(np.mean(dense)), color="0.4", linestyle="--", linewidth=1, label="dense, trained on")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("top-1, %")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    drawn.savefig(folder / "campaign.svg", metadata={"Date": None}, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.35])
    parser.add_argument("--rows", nargs="+", choices=rows(SIZES["small"]), default=list(rows(SIZES["small"])))
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if not args.table:
        size: Size = SIZES[args.size]
        args.out.mkdir(parents=True, exist_ok=True)
        images = unpack(args.data, args.out, size)
        model = parent(args.data, args.out, images, size)
        results = args.out / "results.jsonl"
        known = set()
        if results.exists():
            for line in results.read_text(encoding="utf-8").splitlines():
                record = json.loads(line)
                known.add((record["row"], record["budget"], record["seed"]))
        for seed in args.seeds:
            for row in args.rows:
                for budget in [1.0] if row == "dense" else args.budgets:
                    if (row, budget, seed) in known:
                        continue
                    print(f"{row} at {budget:g}, seed {seed}", flush=True)
                    record = one(row, budget, seed, model, images, size, args.out)
                    with results.open("a", encoding="utf-8") as lines:
                        lines.write(json.dumps(record) + "\n")
                    print(f"  top-1 {record['top1']:.2f} % in {record['seconds']} s", flush=True)
    print(table(args.out))
    figure(args.out)


if __name__ == "__main__":
    main()
