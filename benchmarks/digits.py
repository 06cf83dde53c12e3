"""ViT-Slim against its controls on scikit-learn's digits: ``python benchmarks/digits.py --out FOLDER``.

For each seed a small ViT is trained, then cut to each budget by every method and trained again against its parent, all
with the same training; and the dense parent is trained further for as long (the control `dense`). Writes a line a run
to ``benchmarks/digits.jsonl`` and prints the means.
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vitrim import store
from vitrim.data import Input, eval_loader, split
from vitrim.demo import CHILD, recipe, train_parent
from vitrim.run import run
from vitrim.train import evaluate, fit

RESULTS = Path(__file__).with_suffix(".jsonl")
KEPT = ("method", "budget", "seed", "macs_ratio", "params_ratio", "top1", "top1_parent", "agreement", "latency_ratio",
        "seconds", "threads", "torch", "timm", "date")  # fmt: skip


def dense(parent: Path, seed: int, out: Path) -> dict[str, Any]:
    """The dense parent, trained further for as long as every child, with itself as teacher."""
    model, teacher = store.load(parent), store.load(parent)
    data = split("digits", validation=0, seed=seed)
    loader = eval_loader(data.test, Input.of(model))
    before = evaluate(teacher, loader)
    fitted = fit(
        model, data.train, CHILD, input=Input.of(model), seed=seed, teacher=teacher, folder=out / f"dense-{seed}"
    )
    after = evaluate(fitted.model, loader, reference=teacher)
    return {"method": "dense", "budget": "macs=1", "seed": seed, "macs_ratio": 1.0, "params_ratio": 1.0,
            "top1": after.top1, "top1_parent": before.top1, "agreement": after.agreement}  # fmt: skip


def records(out: Path, seeds: list[int], budgets: list[str], names: list[str]) -> Iterator[dict[str, Any]]:
    """Every run, one after another."""
    for seed in seeds:
        parent = out / f"parent-{seed}.safetensors"
        out.mkdir(parents=True, exist_ok=True)
        train_parent(parent, seed)
        yield dense(parent, seed, out)
        for budget in budgets:
            for name in names:
                found = run(recipe(parent, budget, seed, name), out / f"{name}-{budget}-{seed}")
                yield {key: found.measured.get(key) for key in KEPT}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/digits"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", nargs="+", default=["macs=0.5"])
    parser.add_argument("--methods", nargs="+", default=["vit_slim", "taylor", "magnitude", "random"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    lines = []
    for record in records(args.out, args.seeds, args.budgets, args.methods):
        lines.append(record)
        args.results.write_text("".join(json.dumps(line) + "\n" for line in lines))
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
