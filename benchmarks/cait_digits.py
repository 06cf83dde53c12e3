"""CAIT-style compression and its ablations on scikit-learn's digits, against ViT-Slim and Taylor at equal MACs.

    python benchmarks/cait_digits.py --out FOLDER [--scale 0.3]

The parents and trainings of `benchmarks/digits.py`; `--scale` shortens all trainings but the parents'. The budget of
all rows is what merging after blocks 2 and 4 costs (a third and two thirds of 6): `merging` cuts no channel, `channels`
merges nothing, `joint` merges once, after block 3, and cuts channels to the rest. Each CAIT-style run takes search and
child's training together as one cycle, split at 60 %; `vit_slim` searches and trains its child for as long in all,
`taylor` trains its child for all of it. `dense` is the parent trained further for as long. Writes
``cait_digits.jsonl`` and prints the means.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from digits import KEPT, dense, shortened

from vitrim.demo import CHILD, PARENT, SEARCH, recipe, small_vit, train_parent
from vitrim.deploy import store
from vitrim.families import describe
from vitrim.methods.cait.masks import merge_plan
from vitrim.run.pipeline import run
from vitrim.run.recipe import Recipe, merged
from vitrim.train import Train
from vitrim.words.costs import cost_of
from vitrim.words.errors import RecipeError
from vitrim.words.plain import dump, load

RESULTS = Path(__file__).with_suffix(".jsonl")
CUT = 0.6
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "joint": ("cait", {"merges": [[3, "w"]]}),
    "merging": ("cait", {"merges": [[2, "w"], [4, "h"]], "prune_attention": False, "prune_mlp": False}),
    "channels": ("cait", {"merges": []}),
    "vit_slim": ("vit_slim", {"penalty": "published", "attention_l1": 1e-4, "mlp_l1": 2.5e-5}),
    "taylor": ("taylor", {}),
}


def asked(row: str, parent: Path, budget: str, seed: int, scale: float) -> Recipe:
    """The recipe of a row; every row trains for as many epochs in all."""
    name, settings = ROWS[row]
    search, child = shortened(SEARCH, scale), shortened(CHILD, scale)
    epochs = search.epochs + child.epochs
    known = dump(recipe(parent, budget, seed, name, search, child))
    over: dict[str, Any] = {"method": settings, "measure": {"seconds": 1.5}}
    if name == "cait":
        first = part(child, epochs * CUT)
        over = merged(over, {"method": {"train": dump(first)}, "train": dump(part(child, epochs * (1 - CUT)))})
    elif name == "taylor":
        over = merged(over, {"train": {"epochs": epochs}})
    return load(Recipe, merged(known, over), RecipeError, at=row)


def part(settings: Train, epochs: float) -> Train:
    """The same training over other epochs."""
    return settings.model_copy(update={"epochs": epochs})


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/cait"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--parent-scale", type=float, default=1.0)
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []

    def write(line: dict[str, Any]) -> None:
        lines.append(line | {"scale": args.scale, "parent_scale": args.parent_scale})
        args.results.write_text("".join(json.dumps(each) + "\n" for each in lines))

    for seed in args.seeds:
        parent = args.out / f"parent-{seed}.safetensors"
        train_parent(parent, seed, small_vit, shortened(PARENT, args.parent_scale))
        spec = describe(store.load(parent))
        macs = cost_of(merge_plan(spec, [(2, "w"), (4, "h")]).child(spec)).macs
        budget = f"macs={macs}"
        longer = part(shortened(CHILD, args.scale), (SEARCH.epochs + CHILD.epochs) * args.scale)
        write(dense(parent, seed, args.out, longer))
        for row in args.rows:
            found = run(asked(row, parent, budget, seed, args.scale), args.out / f"{row}-{seed}")
            write({key: found.measured.get(key) for key in KEPT} | {"method": row})
    print("| row | MACs | top-1 | against parent | latency ratio |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for row in ("dense", *args.rows):
        group = [line for line in lines if line["method"] == row]
        change = [line["top1"] - line["top1_parent"] for line in group]
        timed = [line["latency_ratio"] for line in group if line.get("latency_ratio")]
        print(
            f"| {row} | {statistics.mean(line['macs_ratio'] for line in group):.3f} | "
            f"{statistics.mean(line['top1'] for line in group):.2f} | "
            f"{statistics.mean(change):+.2f} ({min(change):+.2f} to {max(change):+.2f}) | "
            f"{statistics.mean(timed) if timed else 1.0:.2f} |"
        )


if __name__ == "__main__":
    main()
