"""MDC against its parts and its controls, at equal macs, without retraining and with a little.

    python -m benchmarks.mdc vit --out FOLDER            scikit-learn's digits, a small ViT (t2t: a small T2T-ViT)
    python -m benchmarks.mdc imagenet --weights WEIGHTS --train TRAIN --test TEST --out FOLDER    a real ViT-Ti/16

Rows: `joint` (heads, neurons and tokens by the Gaussian process), `joint all heads` (with the heads of all blocks),
`joint published` (so, and with policies drawn first), each dimension alone, `random` (as many policies, drawn) and
`even` (one share of every bound, no search), both with the heads of all blocks, `taylor` (widths by gradients, no
search), and `dense` (nothing is cut, the control of the training). Bounds of a single dimension are 0.9, of several
0.5. Candidates are compared by their loss on held-out training images; the test split is seen once, by what was found.
No search trains, so all rows have the same epochs. Appends a line a cut to ``benchmarks/mdc_MODEL.jsonl`` and prints
the table of all lines; `--figure` draws the trials.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.digits import small_t2t
from vitrim import methods
from vitrim.cut.surgery import apply
from vitrim.data import Augment, Input, eval_loader, split
from vitrim.demo import CHILD, PARENT, small_vit, train_parent
from vitrim.deploy import store
from vitrim.deploy.parent import open_parent
from vitrim.families import adopt, describe
from vitrim.methods import Data
from vitrim.train import Distill, Train, evaluate, fit, reference_logits
from vitrim.words.budget import Budget
from vitrim.words.costs import cost_of
from vitrim.words.errors import BudgetError, MethodError

RESULTS = Path(__file__).parent
ALONE = {"heads": 0, "neurons": 0, "tokens": 0}
ROWS: dict[str, dict[str, Any]] = {
    "joint": {},
    "joint all heads": {"head_blocks": "all"},
    "joint published": {"corners": False, "head_blocks": "all"},
    "joint greedy": {"heads_by": "greedy"},
    "joint released": {"neurons_by": "released"},
    "heads": ALONE | {"heads": 0.9},
    "neurons": ALONE | {"neurons": 0.9},
    "tokens": ALONE | {"tokens": 0.9},
    "random": {"proposal": "random", "head_blocks": "all"},
    "even": {"proposal": "even", "head_blocks": "all"},
}


def digits_case(args: argparse.Namespace, seed: int) -> tuple[nn.Module, Any, Input, Train]:
    """A small model trained on digits, and its data."""
    parent, scale = args.out / f"{args.model}-{seed}.safetensors", args.scale
    args.out.mkdir(parents=True, exist_ok=True)
    short = {"epochs": PARENT.epochs * scale, "warmup_epochs": PARENT.warmup_epochs * scale}
    train_parent(parent, seed, {"vit": small_vit, "t2t": small_t2t}[args.model], PARENT.model_copy(update=short))
    model = store.load(parent).eval()
    retrain = CHILD.model_copy(update={"epochs": args.epochs, "warmup_epochs": 0})
    return (
        model,
        split("digits", calibration=args.calibration, validation=args.validation, seed=seed),
        Input.of(model),
        retrain,
    )


def imagenet_case(args: argparse.Namespace, seed: int) -> tuple[nn.Module, Any, Input, Train]:
    """A real ViT-Ti and its images."""
    model = adopt(open_parent("vit_tiny_patch16_224", weights=args.weights)).eval()
    parts = split(args.train, args.test, calibration=args.calibration, validation=args.validation, seed=seed)
    half = (0.5, 0.5, 0.5)
    retrain = Train(epochs=args.epochs, batch=16, lr=args.lr, weight_decay=0.0, warmup_epochs=args.epochs / 5,
                    augment=Augment(kind="light"), distill=Distill(kind="soft", alpha=1))  # fmt: skip
    return model, parts, Input.of(model, mean=half, std=half), retrain


def measured(model: nn.Module, loader: Any, reference: nn.Module | Any) -> dict[str, Any]:
    """Top-1 and agreement on the test images."""
    found = evaluate(model, loader, reference=reference)
    return {"top1": found.top1, "agreement": found.agreement}


def records(args: argparse.Namespace, seed: int) -> None:
    """Every row at every budget."""
    model, parts, given, retrain = (imagenet_case if args.model == "imagenet" else digits_case)(args, seed)
    data = Data(train=parts.train, calibration=parts.calibration, validation=parts.validation, input=given)
    test = eval_loader(parts.test, given)
    spec, theirs = describe(model), reference_logits(model, test)
    dense = 100 * float((theirs.argmax(-1) == torch.as_tensor(parts.test.labels)).double().mean())
    if "dense" in args.rows and args.epochs:
        fitted = fit(copy.deepcopy(model), parts.train, retrain, input=given, seed=seed, teacher=model).model
        trained = {f"{key}_retrained": value for key, value in measured(fitted.eval(), test, theirs).items()}
        line = {"model": args.model, "budget": "macs=1", "row": "dense", "seed": seed, "top1_parent": dense}
        keep(args, line | {"macs_ratio": 1.0, "top1": dense, "agreement": 100.0, "epochs": args.epochs} | trained)
    for text in args.budgets:
        budget = Budget.parse(text)
        for name in args.rows:
            if name == "dense":
                continue
            settings = {} if name == "taylor" else {"measure": "loss", "trials": args.trials, "initial": args.initial}
            if name == "tokens":
                settings |= {"trials": min(args.trials, 6), "initial": 3}
            method = methods.get("taylor" if name == "taylor" else "mdc", settings | ROWS.get(name, {}))
            line: dict[str, Any] = {
                "model": args.model,
                "budget": text,
                "row": name,
                "seed": seed,
                "top1_parent": dense,
            }
            start = time.perf_counter()
            try:
                found = method.search(model, data, budget, seed=seed, teacher=model)
            except (BudgetError, MethodError) as problem:
                keep(args, line | {"refused": str(problem)})
                continue
            line["seconds"] = time.perf_counter() - start
            child = apply(found.parent, found.plan)
            line |= {"macs_ratio": cost_of(describe(child)).macs / cost_of(spec).macs, **measured(child, test, theirs)}
            line["trials"] = [[trial.get("trial"), trial.get("score")] for trial in found.trials if "trial" in trial]
            line["kept"] = next((dict(trial) for trial in found.trials if trial.get("best")), None)
            if args.epochs and name in args.retrain:
                fit(child, parts.train, retrain, input=given, seed=seed, teacher=model)
                line |= {f"{key}_retrained": value for key, value in measured(child.eval(), test, theirs).items()}
                line["epochs"] = args.epochs
            keep(args, line)


def keep(args: argparse.Namespace, line: dict[str, Any]) -> None:
    """Append a record and say it."""
    line |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    with _results(args).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print({key: value for key, value in line.items() if key not in ("trials", "kept", "torch")}, flush=True)


def table(args: argparse.Namespace) -> None:
    """Print all that was measured, as means over the seeds."""
    lines = [json.loads(line) for line in _results(args).read_text(encoding="utf-8").splitlines()]
    print("| MACs | row | one-shot | same answer | trained | same answer | seeds |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for budget, row in dict.fromkeys((line["budget"], line["row"]) for line in lines):
        group = [line for line in lines if (line["budget"], line["row"]) == (budget, row)]
        known = [line for line in group if "top1" in line]
        cells = [
            f"{statistics.mean(line[key] for line in known):.2f}"
            if known and all(key in line for line in known)
            else "-"
            for key in ("top1", "agreement", "top1_retrained", "agreement_retrained")
        ]
        print(f"| {budget} | {row} | " + " | ".join(cells) + f" | {len(known)} of {len(group)} |")


def _results(args: argparse.Namespace) -> Path:
    return RESULTS / f"mdc_{args.model}.jsonl"


def figure(args: argparse.Namespace) -> None:
    """The held-out loss of every trial, guided and drawn."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "vitrim"
    from matplotlib import pyplot

    path = _results(args)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    budgets = sorted({line["budget"] for line in lines if line.get("trials")}, reverse=True)
    sheet, axes = pyplot.subplots(1, len(budgets), figsize=(5 * len(budgets), 3.4), squeeze=False)
    for axis, budget in zip(axes[0], budgets, strict=True):
        for name, colour in (("random", "0.6"), ("joint", "tab:blue")):
            runs = [line["trials"] for line in lines if line["budget"] == budget and line["row"] == name]
            for number, trials in enumerate(runs):
                losses = [-value for _, value in trials]
                best = [min(losses[: i + 1]) for i in range(len(losses))]
                axis.plot(range(1, len(best) + 1), best, color=colour, label=None if number else f"{name}: best so far")
                axis.plot(range(1, len(losses) + 1), losses, ".", color=colour, alpha=0.5)
        axis.set(title=budget, xlabel="trial", ylabel="loss on held-out images", yscale="log")
        axis.legend()
    sheet.tight_layout()
    sheet.savefig(path.with_suffix(".svg"), metadata={"Date": None})


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["vit", "t2t", "imagenet"])
    parser.add_argument("--out", type=Path, default=Path("runs/mdc"))
    parser.add_argument("--weights")
    parser.add_argument("--train")
    parser.add_argument("--test")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--budgets", nargs="+", default=["macs=0.8", "macs=0.6"])
    parser.add_argument("--rows", nargs="+", default=[*ROWS, "taylor", "dense"])
    parser.add_argument("--retrain", nargs="+", default=[*ROWS, "taylor"], help="Rows that are retrained.")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--initial", type=int, default=15)
    parser.add_argument("--epochs", type=float, default=0)
    parser.add_argument("--lr", type=float, default=2e-5, help="Rate of the retraining; the digits have their own.")
    parser.add_argument("--scale", type=float, default=0.2, help="Share of the digits parent's epochs.")
    parser.add_argument("--calibration", type=int, default=256)
    parser.add_argument("--validation", type=float, default=0.1)
    parser.add_argument("--figure", action="store_true", help="Draw what was measured, and measure nothing.")
    args = parser.parse_args()
    if args.figure:
        figure(args)
        return
    for seed in args.seeds:
        records(args, seed)
    table(args)


if __name__ == "__main__":
    main()
