"""What closed-form compensation gains after every method, without any training: real digits, a small ViT.

    python benchmarks/recover_digits.py --out FOLDER [--scale 0.2] [--seeds 0 1 2]

The parents of `benchmarks/digits.py` (`--scale` shortens their training and every search alike). Each method searches
once for each budget; what it found is cut bare, and cut with ``recovered`` (``--recover ridge``) on the same 256
training images. Appends a line a cut to ``benchmarks/recover_digits.jsonl`` and prints the means.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from vitrim import methods
from vitrim.cut import surgery
from vitrim.cut.compensate import recovered
from vitrim.data import Input, eval_loader, split
from vitrim.demo import PARENT, SEARCH, small_vit, train_parent
from vitrim.methods import Data
from vitrim.train import Train, evaluate
from vitrim.words.budget import Budget
from vitrim.words.plain import dump

RESULTS = Path(__file__).parent / "recover_digits.jsonl"
METHODS = ("magnitude", "taylor", "random", "mdc", "vit_slim", "cait")


def settings(name: str, scale: float) -> dict[str, Any]:
    """Searches of one length; ViT-Slim with fixed penalties, MDC with the heads of all blocks and by top-1."""
    train = dump(SEARCH.model_copy(update={"epochs": SEARCH.epochs * scale}))
    if name == "vit_slim":
        return {"train": train, "penalty": "published", "attention_l1": 1e-4, "mlp_l1": 2.5e-5, "gate_lr": 0.02}
    if name == "cait":
        return {"train": train}
    if name == "mdc":
        trials = {"trials": max(round(100 * scale), 10), "initial": max(round(40 * scale), 5)}
        return trials | {"measure": "top1", "head_blocks": "all"}
    return {}


def shortened(train: Train, scale: float) -> Train:
    """The same training over `scale` of its epochs."""
    return train.model_copy(update={"epochs": train.epochs * scale, "warmup_epochs": train.warmup_epochs * scale})


def lines(out: Path, seed: int, name: str, budget: str, scale: float) -> list[dict[str, Any]]:
    """Both cuts of one search."""
    parent: nn.Module = train_parent(out / f"parent-{seed}.safetensors", seed, small_vit, shortened(PARENT, scale))
    parent.eval()
    parts = split("digits", calibration=256, validation=128, seed=seed)
    data = Data(train=parts.train, calibration=parts.calibration, validation=parts.validation, input=Input.of(parent))
    found = methods.get(name, settings(name, scale)).search(
        parent, data, Budget.parse(budget), seed=seed, teacher=parent
    )
    test = eval_loader(parts.test, data.input)
    images = [x for x, _ in eval_loader(parts.calibration, data.input, batch=32)]
    rows = []
    for recover in ("none", "ridge"):
        grafts = recovered(found.parent, found.plan, images, seed=seed) if recover == "ridge" else {}
        child = surgery.apply(found.parent, found.plan, grafts=grafts).eval()
        seen = evaluate(child, test, reference=parent)
        rows.append(
            {
                "method": name,
                "budget": budget,
                "seed": seed,
                "recover": recover,
                "scale": scale,
                "top1": seen.top1,
                "agreement": seen.agreement,
                "top1_parent": evaluate(parent, test).top1,
                "torch": torch.__version__,
                "timm": timm.__version__,
            }
        )
    return rows


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", nargs="+", default=["macs=0.7", "macs=0.5"])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.is_file() else []
    done = {(line["method"], line["budget"], line["seed"], line["scale"]) for line in known}
    for seed in args.seeds:
        for name in args.methods:
            for budget in args.budgets:
                if (name, budget, seed, args.scale) in done:
                    continue
                for line in lines(args.out, seed, name, budget, args.scale):
                    known.append(line)
                    with args.results.open("a") as file:
                        file.write(json.dumps(line) + "\n")
    print("| method | budget | bare | with ridge | parent | seeds |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for name, budget in dict.fromkeys((line["method"], line["budget"]) for line in known):
        group = [line for line in known if (line["method"], line["budget"]) == (name, budget)]
        bare, ridge = ([line["top1"] for line in group if line["recover"] == kind] for kind in ("none", "ridge"))
        whole = statistics.mean(line["top1_parent"] for line in group)
        print(
            f"| {name} | {budget} | {statistics.mean(bare):.1f} | {statistics.mean(ridge):.1f} | {whole:.1f} "
            f"| {len(bare)} |"
        )


if __name__ == "__main__":
    main()
