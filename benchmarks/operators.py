"""Convolutions in place of attention on a real ImageNet ViT-Ti, fitted in closed form, without labels or training.

    python benchmarks/operators.py WEIGHTS TRAIN [--draws 0 1 2] [--only NAME ...] [--out FILE.jsonl]
    python benchmarks/operators.py --table [--out FILE.jsonl]

WEIGHTS is a ViT-Ti/16 224 state dict (AugReg; input scaled to mean 0.5, std 0.5), TRAIN a tar or folder of ImageNet
training images. A draw decides which images the fits are made of (256, or --fitted) and which others every number is
measured on (200, or --apart): the divergence from the dense model's output in nats, with its standard error, and the
share of equal answers. No image of a test split is read, so these numbers may choose settings.

Structures are written as in the paper: M attention, 3 and 1 convolutions, - nothing. A row is one structure and one
change of the settings that are the default: bottleneck 64, ridge 1e-3, tokens weighted by their importance and
directions by the metric, prefix tokens keep the attention, each block fitted to its own output on the stream as it is.

Appends a line a row to FILE; rows that are there are skipped. ``--table`` prints FILE as Markdown, means over draws.
"""

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vitrim
from vitrim.cut.compensate import BlockChoice, Importance, compensated, importances
from vitrim.cut.outputs import logits_of
from vitrim.cut.surgery import apply
from vitrim.data import Input, eval_loader, open_source
from vitrim.deploy.parent import open_parent
from vitrim.families import describe
from vitrim.words.costs import cost_of
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Conv, Mixture, Skip

RECORD = Path(__file__).parent / "operators.jsonl"
BATCH = 32
FITTED, APART = 256, 200


@dataclass(frozen=True)
class Row:
    """One structure with one set of settings."""

    name: str
    structure: str
    width: int = 64
    ridge: float = 1e-3
    weighted: bool = True
    metric: bool = True
    alpha: float = 0.0
    prefix: str = "attention"


def rows() -> Iterator[Row]:
    """Every row that is measured."""
    early, sparse = "33MMMMMMMMMM", "M1MMM1MM1M1M"
    for structure in (sparse, early, "11MMMMMMMMMM", "MMMMMM333333", "MMMMMM111111", "MMMMMMMM1111"):
        yield Row("default", structure)
        yield Row("prefix mean", structure, prefix="mean")
    for structure in (sparse, early):
        yield Row("published", structure)
        yield Row("nothing", structure)
    changes: dict[str, dict[str, Any]] = {
        "unweighted tokens": {"weighted": False},
        "no metric": {"metric": False},
        "neither": {"weighted": False, "metric": False},
        **{f"ridge {ridge:g}": {"ridge": ridge} for ridge in (1e-5, 1e-2, 1e-1)},
        **{f"alpha {alpha:g}": {"alpha": alpha} for alpha in (0.3, 1.0)},
        **{f"width {width}": {"width": width} for width in (32, 128)},
        **{f"prefix {prefix}": {"prefix": prefix} for prefix in ("norm", "zero")},
    }
    for structure in (sparse, early):
        for name, change in changes.items():
            yield replace(Row(name, structure), **change)


@dataclass(frozen=True, eq=False)
class Bench:
    """What all rows of a draw share."""

    model: nn.Module
    images: list[Tensor]
    apart: list[Tensor]
    dense: Tensor
    worth: dict[str, Importance]


def opened(weights: str, train: str, draw: int, fitted: int, apart: int) -> Bench:
    """Read the images of a draw, run the dense model on them, and weigh them."""
    model = open_parent("vit_tiny_patch16_224", weights=weights)
    input_ = Input.of(model, mean=(0.5,) * 3, std=(0.5,) * 3)
    source = open_source(train, None, classes=1000)
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(draw)).tolist()
    parts = (order[apart : apart + fitted], order[:apart])
    images, others = ([x for x, _ in eval_loader(source.pick(sorted(part)), input_, batch=BATCH)] for part in parts)
    return Bench(model, images, others, logits_of(model, others).double(), importances(model, images, seed=draw))


def child_of(bench: Bench, row: Row) -> nn.Module:
    """The model of a row."""
    spec = describe(bench.model)
    if row.name in ("published", "nothing"):
        return apply(bench.model, Plan.of(spec, [without_fit(row, mark) for mark in row.structure])).eval()
    reads = row.prefix == "attention"
    choices = [
        BlockChoice()
        if mark == "M"
        else BlockChoice(conv=Conv.model_validate(
            {"kernel": int(mark), "width": row.width, "prefix": row.prefix, "act": "none",
             "heads": block.mixer if reads else None}
        ))
        for mark, (_, _, block) in zip(row.structure, spec.blocks(), strict=True)
    ]  # fmt: skip
    worth = {path: flat(one, row) for path, one in bench.worth.items()}
    plan, grafts = compensated(bench.model, choices, bench.images, worth, alpha=row.alpha, ridge=row.ridge)
    return apply(bench.model, plan, grafts=grafts).eval()


def without_fit(row: Row, mark: str) -> BlockPlan:
    """The published start of a convolution, whose batch norm is new, or nothing in its place."""
    if mark == "M":
        return BlockPlan()
    if row.name == "nothing":
        return BlockPlan(mixer=Skip())
    mixture = Mixture(heads=3, temperature=0.01)
    return BlockPlan(mixer=Conv(kernel=3 if mark == "3" else 1, width=64, mixture=mixture, norm=True))


def flat(one: Importance, row: Row) -> Importance:
    """Importance without what a row leaves out."""
    weights = one.weights if row.weighted else torch.ones_like(one.weights)
    return Importance(weights, one.metric if row.metric else torch.eye(len(one.metric), dtype=torch.float64))


@torch.no_grad()
def measured(bench: Bench, row: Row, draw: int) -> dict[str, Any]:
    """Cut, fit, and compare with the dense model on the images kept apart."""
    start = time.perf_counter()
    child = child_of(bench, row)
    seconds = time.perf_counter() - start
    ours, dense = logits_of(child, bench.apart).double(), bench.dense
    losses = F.kl_div(ours.log_softmax(-1), dense.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    same = (ours.argmax(-1) == dense.argmax(-1)).double()
    whole = cost_of(describe(bench.model)).macs
    return {
        **vars(row),
        "draw": draw,
        "fitted": sum(map(len, bench.images)),
        "apart": len(dense),
        "kl": round(float(losses.mean()), 5),
        "kl_error": round(float(losses.std() / len(losses) ** 0.5), 5),
        "same_answer": round(float(same.mean()), 4),
        "macs_ratio": round(cost_of(describe(child)).macs / whole, 4),
        "seconds": round(seconds, 1),
    }


def about() -> Mapping[str, Any]:
    """Where and with what a row was measured."""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "threads": torch.get_num_threads(),
        "cpu": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "vitrim": vitrim.__version__,
    }


def key(found: Mapping[str, Any]) -> tuple[Any, ...]:
    return found["name"], found["structure"], found["draw"]


def table(out: Path) -> str:
    """The record as Markdown: means over draws, and the standard error of a mean over images and draws."""
    found = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in found:
        groups.setdefault((one["structure"], one["name"]), []).append(one)
    lines = [
        "| structure | settings | MACs | draws | KL | same answer | seconds |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (structure, name), several in groups.items():
        kl = statistics.mean(one["kl"] for one in several)
        error = statistics.mean(one["kl_error"] for one in several) / len(several) ** 0.5
        same = statistics.mean(one["same_answer"] for one in several)
        seconds = statistics.mean(one["seconds"] for one in several)
        lines.append(
            f"| `{structure}` | {name} | {several[0]['macs_ratio']:.3f} | {len(several)} | {kl:.3f} ± {error:.3f} | "
            f"{100 * same:.1f} | {seconds:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", nargs="?")
    parser.add_argument("train", nargs="?")
    parser.add_argument("--draws", type=int, nargs="+", default=[0])
    parser.add_argument("--fitted", type=int, default=FITTED, help="images to fit on")
    parser.add_argument("--apart", type=int, default=APART, help="images to measure on")
    parser.add_argument("--only", nargs="+", help="names of rows")
    parser.add_argument("--out", type=Path, default=RECORD)
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        print(table(args.out))
        return
    if args.train is None:
        parser.error("give WEIGHTS and TRAIN, or --table")
    known = set()
    if args.out.is_file():
        known = {key(json.loads(line)) for line in args.out.read_text(encoding="utf-8").splitlines()}
    for draw in args.draws:
        bench = opened(args.weights, args.train, draw, args.fitted, args.apart)
        for row in rows():
            if (row.name, row.structure, draw) in known or (args.only and row.name not in args.only):
                continue
            found = measured(bench, row, draw) | about()
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
