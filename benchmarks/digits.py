"""ViT-Slim against its controls on scikit-learn's digits.

    python benchmarks/digits.py --model vit --out FOLDER [--scale 0.25]

For each seed a small ViT, Swin or T2T-ViT is trained, then cut to each budget by every method and trained again against
its parent; and the dense parent is trained further for as long (control `dense`). All train for as many epochs in all:
those of ViT-Slim's search are taken off its child's. Writes a line a run to ``benchmarks/digits_MODEL.jsonl`` and
prints the means. `--scale` shortens every training alike.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from vitrim import families
from vitrim.data import Input, eval_loader, split
from vitrim.demo import CHILD, PARENT, SEARCH, recipe, small_vit, train_parent
from vitrim.deploy import store
from vitrim.run.pipeline import run
from vitrim.train import Train, evaluate, fit

RESULTS = Path(__file__).parent
KEPT = ("method", "budget", "seed", "macs_ratio", "params_ratio", "top1", "top1_parent", "agreement", "latency_ratio",
        "seconds", "threads", "torch", "timm", "date")  # fmt: skip


def small_swin(seed: int) -> nn.Module:
    """A Swin for 32 x 32 digits: patch 2, window 4, two stages of two blocks, widths 48 and 96."""
    torch.manual_seed(seed)
    return SwinTransformer(
        img_size=32, patch_size=2, window_size=4, embed_dim=48, depths=(2, 2), num_heads=(3, 6), num_classes=10
    )


def small_t2t(seed: int) -> nn.Module:
    """A T2T-ViT for digits enlarged to 64 x 64 (its stem divides sides by 16): 6 blocks of width 96 on 4 x 4 tokens."""
    torch.manual_seed(seed)
    return families.get("t2t").example(img_size=64, embed_dim=96, depth=6, num_heads=3, token_width=32)


MODELS = {"vit": small_vit, "swin": small_swin, "t2t": small_t2t}


def shortened(settings: Train, scale: float) -> Train:
    """The same training over `scale` of its epochs."""
    short = {"epochs": settings.epochs * scale, "warmup_epochs": settings.warmup_epochs * scale}
    return settings.model_copy(update=short)


def dense(parent: Path, seed: int, out: Path, settings: Train) -> dict[str, Any]:
    """The dense parent, trained further for as long as every child, with itself as teacher."""
    model, teacher = store.load(parent), store.load(parent)
    data = split("digits", validation=0, seed=seed)
    loader = eval_loader(data.test, Input.of(model))
    before = evaluate(teacher, loader)
    fitted = fit(
        model, data.train, settings, input=Input.of(model), seed=seed, teacher=teacher, folder=out / f"dense-{seed}"
    )
    after = evaluate(fitted.model, loader, reference=teacher)
    return {"method": "dense", "budget": "macs=1", "seed": seed, "macs_ratio": 1.0, "params_ratio": 1.0,
            "top1": after.top1, "top1_parent": before.top1, "agreement": after.agreement}  # fmt: skip


def records(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every run, one after another."""
    search, child = shortened(SEARCH, args.scale), shortened(CHILD, args.scale)
    after = child.model_copy(update={"epochs": child.epochs - search.epochs})
    for seed in args.seeds:
        parent = args.out / f"parent-{seed}.safetensors"
        args.out.mkdir(parents=True, exist_ok=True)
        train_parent(parent, seed, MODELS[args.model], shortened(PARENT, args.scale))
        yield dense(parent, seed, args.out, child)
        for budget in args.budgets:
            for name in args.methods:
                train = after if name == "vit_slim" else child
                found = run(recipe(parent, budget, seed, name, search, train), args.out / f"{name}-{budget}-{seed}")
                yield {key: found.measured.get(key) for key in KEPT} | {"epochs": child.epochs}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="vit")
    parser.add_argument("--out", type=Path, default=Path("runs/digits"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", nargs="+", default=["macs=0.7", "macs=0.5"])
    parser.add_argument("--methods", nargs="+", default=["vit_slim", "taylor", "magnitude", "random"])
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    lines = []
    for record in records(args):
        lines.append(record)
        (args.results or RESULTS / f"digits_{args.model}.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines)
        )
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["budget"], line["method"]), []).append(line)
    print("| budget | method | top-1 | against parent | same answer | latency ratio |")
    print("| --- | --- | --- | --- | --- | --- |")
    for (budget, name), group in groups.items():
        change = [line["top1"] - line["top1_parent"] for line in group]
        timed = [line["latency_ratio"] for line in group if line.get("latency_ratio")]
        print(
            f"| {budget} | {name} | {statistics.mean(line['top1'] for line in group):.2f} | "
            f"{statistics.mean(change):+.2f} ({min(change):+.2f} to {max(change):+.2f}) | "
            f"{statistics.mean(line['agreement'] for line in group):.2f} | "
            f"{statistics.mean(timed) if timed else 1.0:.2f} |"
        )


if __name__ == "__main__":
    main()
