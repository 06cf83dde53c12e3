"""SPViT on scikit-learn's digits against the same budget by heads and neurons alone.

    python benchmarks/spvit_digits.py --model vit --out FOLDER [--parent 1 --search 10 --child 25]

For each seed a small ViT or Swin is trained. SPViT searches it once for each budget; ``heads`` cuts whole heads and
neurons by first-order Taylor scores. Every child, and the dense parent as a control, is trained as long in all: SPViT's
search counts as training, for its child goes on from the weights that it has moved. All of it twice, from the labels
alone and with the parent as teacher. Writes a line a child to ``benchmarks/spvit_digits_MODEL.jsonl``.

``--probe`` asks how fast gates must move instead: it searches with each of ``--gate-lr`` and looks at 200 training
images that the search has not seen, never at the test images (``benchmarks/spvit_digits_probe_MODEL.jsonl``).
"""

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from timm.models.swin_transformer import SwinTransformer
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from digits import shortened

from vitrim import methods
from vitrim.cut.surgery import apply, fold
from vitrim.data import Input, eval_loader, split
from vitrim.demo import CHILD, PARENT, SEARCH, small_vit, train_parent
from vitrim.families import describe
from vitrim.methods import Data, Found
from vitrim.train import Distill, Train, evaluate, fit, reference_logits
from vitrim.words.budget import Budget
from vitrim.words.costs import cost_of
from vitrim.words.plain import dump
from vitrim.words.spec import Attention, Conv, Spec, folded


def small_swin(seed: int) -> nn.Module:
    """A Swin for 32 x 32 digits: patch 4, window 4, two stages of two blocks, widths 48 and 96."""
    torch.manual_seed(seed)
    return SwinTransformer(
        img_size=32, patch_size=4, window_size=4, embed_dim=48, depths=(2, 2), num_heads=(3, 6), num_classes=10
    )


RESULTS = Path(__file__).parent
MODELS = {"vit": small_vit, "swin": small_swin}
METHODS = ("dense", "spvit", "heads")
TEACHING = {"labels": Distill(kind="none"), "teacher": CHILD.distill}


def operations(spec: Spec) -> str:
    """One letter a block: M attention, 3 and 1 convolutions, - nothing; stages apart."""
    blocks = [[block.mixer for block in stage.blocks] for stage in spec.stages]
    letters = {Attention: lambda _: "M", Conv: lambda mixer: str(mixer.kernel)}
    return " / ".join("".join(letters.get(type(m), lambda _: "-")(m) for m in stage) for stage in blocks)


def searched(name: str, parent: nn.Module, data: Data, budget: str, seed: int, search: Train, gate_lr: float) -> Found:
    """What a method finds."""
    settings: dict[str, Any] = {"choice": "heads"}
    if name == "spvit":
        # The published start and penalty, which short searches do not use by default.
        known = {"start": 1.5, "closing": "penalty", "inherit": "search"}
        settings = {"train": dump(search), "gate_lr": gate_lr, **known}
    return methods.get("spvit" if name == "spvit" else "taylor", settings).search(
        parent, data, Budget.parse(budget), seed=seed, teacher=parent
    )


def records(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every child, one after another."""
    search = shortened(SEARCH, args.search / SEARCH.epochs)
    args.out.mkdir(parents=True, exist_ok=True)
    for seed in args.seeds:
        parent = parent_of(args, seed)
        parts = split("digits", validation=0, seed=seed)
        data = Data(train=parts.train, calibration=parts.calibration, validation=None, input=Input.of(parent))
        loader = eval_loader(parts.test, data.input)
        theirs = reference_logits(parent, loader)
        before, whole = evaluate(parent, loader).top1, cost_of(describe(parent))
        for budget, name in [("macs=1", "dense"), *((b, n) for b in args.budgets for n in METHODS[1:])]:
            if name not in args.methods:
                continue
            start = time.perf_counter()
            found = searched(name, parent, data, budget, seed, search, args.gate_lr[0]) if name != "dense" else None
            child = apply(found.parent, found.plan, grafts=found.grafts) if found else copy.deepcopy(parent)
            seconds = time.perf_counter() - start
            spec = folded(describe(child))
            for teaching, distill in TEACHING.items():
                epochs = args.child + (0 if name == "spvit" else args.search)
                settings = shortened(CHILD, epochs / CHILD.epochs).model_copy(update={"distill": distill})
                fitted = fit(copy.deepcopy(child), parts.train, settings, input=data.input, seed=seed, teacher=parent)
                after = evaluate(fold(fitted.model.eval()), loader, reference=theirs)
                yield {
                    "model": args.model, "method": name, "teaching": teaching, "budget": budget, "seed": seed,
                    "macs_ratio": cost_of(spec).macs / whole.macs, "params_ratio": cost_of(spec).params / whole.params,
                    "operations": operations(spec), "hidden": [block.hidden for _, _, block in spec.blocks()],
                    "top1": after.top1, "top1_parent": before, "agreement": after.agreement,
                    "search_seconds": round(seconds, 1), "seconds": round(fitted.seconds, 1),
                    "epochs": [args.parent, args.search, args.child], "torch": torch.__version__,
                } | ({"gate_lr": args.gate_lr[0]} if name == "spvit" else {})  # fmt: skip


def probes(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What searches find whose gates move faster or slower, on training images that they have not seen."""
    search = shortened(SEARCH, args.search / SEARCH.epochs)
    for seed in args.seeds:
        parent = parent_of(args, seed)
        parts, whole = split("digits", validation=200, seed=seed), cost_of(describe(parent))
        data = Data(train=parts.train, calibration=parts.calibration, validation=None, input=Input.of(parent))
        assert parts.validation is not None
        loader = eval_loader(parts.validation, data.input)
        for budget in args.budgets:
            for gate_lr in args.gate_lr:
                found = searched("spvit", parent, data, budget, seed, search, gate_lr)
                child = apply(found.parent, found.plan, grafts=found.grafts)
                straight = evaluate(child.eval(), loader).top1
                settings = shortened(CHILD, args.child / CHILD.epochs)
                fitted = fit(child, parts.train, settings, input=data.input, seed=seed, teacher=parent)
                yield {
                    "model": args.model, "budget": budget, "seed": seed, "gate_lr": gate_lr,
                    "macs_ratio_of_gates": found.trials[0]["macs_of_gates"] / whole.macs,
                    "operations": operations(folded(found.plan.child(describe(parent)))),
                    "top1_unseen_straight": straight, "top1_unseen": evaluate(fitted.model.eval(), loader).top1,
                    "epochs": [args.parent, args.search, args.child], "torch": torch.__version__,
                }  # fmt: skip


def parent_of(args: argparse.Namespace, seed: int) -> nn.Module:
    """The dense model, trained once."""
    path = args.out / f"{args.model}-{seed}.safetensors"
    return train_parent(path, seed, MODELS[args.model], shortened(PARENT, args.parent / PARENT.epochs)).eval()


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="vit")
    parser.add_argument("--out", type=Path, default=Path("runs/spvit_digits"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", nargs="+", default=["macs=0.6", "macs=0.45"])
    parser.add_argument("--parent", type=float, default=60, help="epochs of the parent")
    parser.add_argument("--search", type=float, default=10, help="epochs of the search")
    parser.add_argument("--child", type=float, default=25, help="epochs of every child after that")
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=METHODS)
    parser.add_argument(
        "--gate-lr", type=float, nargs="+", default=[0.02], help="of SPViT; the first, or all of a probe"
    )
    parser.add_argument("--probe", action="store_true")
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    lines: list[dict[str, Any]] = []
    if args.probe:
        path = args.results or RESULTS / f"spvit_digits_probe_{args.model}.jsonl"
        for record in probes(args):
            lines.append(record)
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
            print(record, flush=True)
        return
    for record in records(args):
        lines.append(record)
        path = args.results or RESULTS / f"spvit_digits_{args.model}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        print({key: record[key] for key in ("method", "teaching", "budget", "seed", "top1", "operations")}, flush=True)
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for line in lines:
        groups.setdefault((line["budget"], line["method"], line["teaching"]), []).append(line)
    print("| MACs | method | taught by | top-1, mean | against parent (least to most) | same answer | attention |")
    print("| ---: | --- | --- | ---: | ---: | ---: | --- |")
    for (budget, name, teaching), group in groups.items():
        change = [line["top1"] - line["top1_parent"] for line in group]
        print(
            f"| {budget.removeprefix('macs=')} | {name} | {teaching} | "
            f"{statistics.mean(line['top1'] for line in group):.2f} | "
            f"{statistics.mean(change):+.2f} ({min(change):+.2f} to {max(change):+.2f}) | "
            f"{statistics.mean(line['agreement'] for line in group):.2f} | "
            f"{', '.join('`' + line['operations'] + '`' for line in group)} |"
        )


if __name__ == "__main__":
    main()
