"""ViT-Slim with published and with measured penalty weights, on real digits and a small ViT.

    python -m benchmarks.penalty --out FOLDER [--parent 0.4] [--search 1] [--seeds 0 1 2]

The parents of `benchmarks/digits.py` (`--parent` and `--search` shorten their training and every search). The target of
a search is the dense model's own output. What is kept at each budget is read off the same search, cut bare, and
measured on 300 training images that the search has not seen, by which a choice may be made, and on the test images.
A row's factor multiplies the published weights. Appends a line a cut to ``benchmarks/penalty.jsonl`` and prints means
and standard errors over the seeds; differences from the first row are paired by seed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from benchmarks.recover_digits import shortened
from vitrim import methods
from vitrim.cut import surgery
from vitrim.data import Input, eval_loader, split
from vitrim.demo import PARENT, SEARCH, small_vit, train_parent
from vitrim.methods import Data
from vitrim.methods.vit_slim import PUBLISHED
from vitrim.train import Distill, evaluate
from vitrim.words.budget import Budget
from vitrim.words.plain import dump

RESULTS = Path(__file__).parent / "penalty.jsonl"
ROWS = ("published:2", "published:0.2", "measured:0.5", "measured:1", "measured:2")


def lines(args: argparse.Namespace, seed: int, row: str) -> Iterator[dict[str, Any]]:
    """Search once, and yield a record for each budget."""
    penalty, _, factor = row.partition(":")
    path = args.out / f"parent-{args.parent:g}-{seed}.safetensors"
    parent = train_parent(path, seed, small_vit, shortened(PARENT, args.parent)).eval()
    parts = split("digits", calibration=256, validation=300, seed=seed)
    data = Data(train=parts.train, calibration=parts.calibration, validation=None, input=Input.of(parent))
    train = shortened(SEARCH, args.search).model_copy(update={"distill": Distill(kind="soft", alpha=1.0)})
    settings = {"train": dump(train), "gate_lr": 0.02, "penalty": penalty}
    settings |= {f"{kind}_l1": float(factor) * PUBLISHED[kind] for kind in ("attention", "mlp")}
    told: list[Any] = []
    start = time.perf_counter()
    found = methods.get("vit_slim", settings).search(
        parent, data, Budget.parse(args.budgets[0]), seed=seed, teacher=parent, log=told.append
    )
    seconds = time.perf_counter() - start
    assert found.again is not None
    held, test = (eval_loader(images, data.input) for images in (parts.validation, parts.test))
    for budget in args.budgets:
        read = found.again(Budget.parse(budget))
        child = surgery.apply(read.parent, read.plan).eval()
        on_held, on_test = evaluate(child, held, reference=parent), evaluate(child, test, reference=parent)
        yield {
            "row": row, "budget": budget, "seed": seed, "parent": args.parent, "search": args.search,
            "weights": {key: told[0][f"{key}_l1"] for key in ("attention", "mlp")},
            "held_top1": on_held.top1, "held_loss": on_held.loss, "top1": on_test.top1, "loss": on_test.loss,
            "agreement": on_test.agreement, "top1_parent": evaluate(parent, test).top1, "seconds": seconds,
            "threads": torch.get_num_threads(), "torch": torch.__version__, "timm": timm.__version__,
        }  # fmt: skip


def mean(values: Sequence[float], digits: int = 2) -> str:
    """Return the mean with its standard error over seeds."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.{digits}f} ± {error:.{digits}f}"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", nargs="+", default=["macs=0.7", "macs=0.5"])
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    parser.add_argument("--parent", type=float, default=0.4)
    parser.add_argument("--search", type=float, default=1.0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.is_file() else []
    known = [line for line in known if (line["parent"], line["search"]) == (args.parent, args.search)]
    for seed in args.seeds:
        for row in args.rows:
            if (row, seed) in {(line["row"], line["seed"]) for line in known}:
                continue
            for line in lines(args, seed, row):
                known.append(line)
                with args.results.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    print("| budget | penalty | held-out loss | less the first row's | held-out top-1 | test top-1 | seeds |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for budget in args.budgets:
        first = {line["seed"]: line for line in known if (line["row"], line["budget"]) == (args.rows[0], budget)}
        for row in args.rows:
            group = [line for line in known if (line["row"], line["budget"]) == (row, budget)]
            less = [line["held_loss"] - first[line["seed"]]["held_loss"] for line in group]
            cells = [mean([line[key] for line in group], digits) for key, digits in
                     (("held_loss", 3), ("held_top1", 1), ("top1", 1))]  # fmt: skip
            print(f"| {budget} | {row} | {cells[0]} | {mean(less, 3)} | {cells[1]} | {cells[2]} | {len(group)} |")


if __name__ == "__main__":
    main()
