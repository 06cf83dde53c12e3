"""Budgets of time: how good the table is, and what it buys.

    python benchmarks/latency_budget.py --out FILE.json [--weights WEIGHTS --data TRAIN --test TEST]
        [--calibration FILE]

For a DeiT-S of random weights: seconds to make its table (must be at most 180), predicted against measured time of
children of every kind, seconds to plan under latency=0.5 (at most 10), and the measured time of the child (at most
0.525). With the ViT-Ti of `benchmarks/imagenet_vit_tiny.sh`: top-1 of the child at latency=0.6 next to that of a child
of macs whose measured time is the same, by Taylor scores with compensation, and by post_training where the FILE of a
``vitrim pareto`` of that model is given.
"""

import argparse
import json
import platform
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import vitrim
from vitrim import methods
from vitrim.cut.surgery import apply
from vitrim.deploy.parent import open_parent
from vitrim.families import adopt, describe
from vitrim.measure import latency
from vitrim.measure.parts import make_table
from vitrim.words.budget import Budget
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.steps.drop import Drop
from vitrim.words.steps.grid_merge import GridMerge
from vitrim.words.steps.merge import Merge
from vitrim.words.table import TimeTable

SHARES = (0.8, 0.65, 0.5, 0.35)


def children(dense: nn.Module) -> dict[str, Plan]:
    """Plans of many kinds."""
    spec = describe(dense)
    found = {}
    for name, choice in (("magnitude", "even"), ("magnitude", "heads"), ("random", "free")):
        for share in SHARES:
            searched = methods.get(name, {"choice": choice}).search(dense, None, Budget(macs=share), seed=0)
            found[f"{choice} macs={share}"] = searched.plan
    keep = [BlockPlan() for _ in spec.blocks()]
    merging = [BlockPlan(tokens=Merge(count=8)) for _ in spec.blocks()]
    found["merge 8 a block"] = Plan.of(spec, merging)
    grid = list(keep)
    grid[4], grid[8] = (BlockPlan(tokens=GridMerge(axis=axis)) for axis in ("w", "h"))
    found["grid 4w 8h"] = Plan.of(spec, grid)
    drop = BlockPlan(tokens=Drop(kept=tuple(range(0, 196, 2))))
    found["drop half from block 6"] = Plan.of(spec, [*keep[:6], *[drop] * 6])
    found["only prefix"] = Plan.of(spec, [*keep[:-1], BlockPlan(only_prefix=True)])
    return found


def foretold(dense: nn.Module, table: TimeTable, threads: int, seconds: float) -> list[dict[str, Any]]:
    """Predicted and measured share of the dense time, of every child."""
    lines, spec = [], describe(dense)
    for name, plan in children(dense).items():
        child = apply(dense, plan).eval()
        taken = latency(child, dense, batch=8, threads=threads, seconds=seconds)
        said = table.latency(describe(child)) / table.latency(spec)
        assert taken.ratio is not None
        lines.append({"child": name, "predicted": said, "measured": taken.ratio, "off": said / taken.ratio - 1})
        print(lines[-1], flush=True)
    return lines


def planned(dense: nn.Module, table: TimeTable, threads: int, seconds: float) -> dict[str, float]:
    """A plan at half the time, and how long both take."""
    start = time.perf_counter()
    budget = Budget(latency=0.5, table=table)
    found = methods.get("magnitude").search(dense, None, budget, seed=0)
    took = time.perf_counter() - start
    whole = vitrim.compress(
        dense, method="magnitude", budget="latency=0.5", measure={"threads": threads, "seconds": seconds}
    )
    cost, parent = budget.cost(found.plan.child(describe(dense))), budget.cost(describe(dense))
    return {
        "seconds_planning": took,
        "predicted": cost.latency / parent.latency,
        "measured": whole.measured["latency_ratio"],
        "macs_ratio": whole.measured["macs_ratio"],
    }


def compared(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Top-1 at latency=0.6 next to a budget of macs that takes as long, on a real ViT-Ti."""
    lines = []
    dense = open_parent("vit_tiny_patch16_224", weights=args.weights)
    given: dict[str, Any] = {
        "data": args.data,
        "test": args.test,
        "measure": {"threads": args.threads, "seconds": args.seconds},
        "recipe": {"data": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "validation": 80}},
    }
    ways: list[tuple[str, str, dict[str, Any]]] = [("taylor", "ridge", {})]
    if args.calibration:
        ways.append(("post_training", "none", {"calibration": args.calibration}))
    for method, recover, settings in ways:
        one = {"method": method, "recover": recover, "settings": settings, **given}
        timed = vitrim.compress(dense, budget="latency=0.6", **one).measured
        macs, tried = timed["macs_ratio"], []
        for _ in range(3):
            other = vitrim.compress(dense, budget=f"macs={macs:.4f}", **one).measured
            tried.append(other)
            if abs(other["latency_ratio"] / timed["latency_ratio"] - 1) < 0.03:
                break
            macs = min(1.0, macs * timed["latency_ratio"] / other["latency_ratio"])
        other = min(tried, key=lambda one: abs(one["latency_ratio"] - timed["latency_ratio"]))
        for kind, told in (("latency", timed), ("macs", other)):
            keys = ("top1", "top1_parent", "agreement", "macs_ratio", "latency_ratio", "seconds")
            lines.append({"method": method, "recover": recover, "planned by": kind} | {key: told[key] for key in keys})
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weights")
    parser.add_argument("--data")
    parser.add_argument("--test")
    parser.add_argument("--calibration")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=6.0)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    dense = adopt(timm.create_model("deit_small_patch16_224").eval())
    table = make_table(dense, batch=8, threads=args.threads)
    lines = foretold(dense, table, args.threads, args.seconds)
    found = {
        "model": "deit_small_patch16_224, random weights",
        "seconds_table": table.seconds,
        "dense_ms": 1e3 * table.dense,
        "host_share": table.host / table.dense,
        "off_median": statistics.median(abs(line["off"]) for line in lines),
        "off_most": max(abs(line["off"]) for line in lines),
        "half": planned(dense, table, args.threads, args.seconds),
        "children": lines,
        "vit_tiny": compared(args) if args.weights else [],
        "machine": str(table.machine),
        "cores": 2,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }
    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
