"""The speed that the house must keep: ``python benchmarks/speed.py [--out benchmarks/speed.json]``.

Every timing is the median of interleaved runs on this machine; ratios compare two things timed in turns.
"""

import argparse
import copy
import dataclasses
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch.nn import functional as F

from vitrim import methods
from vitrim.cut.fill import fill
from vitrim.cut.surgery import apply
from vitrim.families import adopt, describe
from vitrim.measure import latency
from vitrim.methods.taylor import taylor_scores
from vitrim.methods.vit_slim import gate_model, l1_penalty
from vitrim.testing import random_data
from vitrim.words.budget import Budget
from vitrim.words.costs import cost_of
from vitrim.words.plan import write_plan


def median(call: Callable[[], Any], runs: int) -> float:
    """Median seconds of `runs` calls after one that does not count."""
    call()
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def ratio(one: Callable[[], Any], other: Callable[[], Any], pairs: int) -> float:
    """Median of one / other over pairs timed in turns."""
    one(), other()
    shares = []
    for index in range(pairs):
        taken = {}
        for name, call in sorted({"one": one, "other": other}.items(), reverse=bool(index % 2)):
            start = time.perf_counter()
            call()
            taken[name] = time.perf_counter() - start
        shares.append(taken["one"] / taken["other"])
    return statistics.median(shares)


def pricing() -> dict[str, float]:
    """Microseconds to price DeiT-S; at most 20."""
    spec = describe(timm.create_model("deit_small_patch16_224"))
    return {"pricing_us": 1e6 * median(lambda: [cost_of(spec) for _ in range(1000)], 5) / 1000}


def explaining() -> dict[str, float]:
    """Seconds of the whole process ``vitrim explain plan.json`` on DeiT-B; at most 0.3."""
    model = adopt(timm.create_model("deit_base_patch16_224"))
    plan = methods.get("random", {"choice": "free"}).search(model, None, Budget.parse("macs=0.5"), seed=0).plan
    cutting = median(lambda: apply(model, plan), 3)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        write_plan(path, describe(model), plan)
        command = [sys.executable, "-m", "vitrim", "explain", str(path)]
        explain = median(lambda: subprocess.run(command, check=True, capture_output=True), 5)
    return {"explain_s": explain, "apply_deit_base_s": cutting}


def importing() -> dict[str, float]:
    """Seconds of ``import vitrim``, the whole process less that of an empty one; at most 0.15."""
    empty, full = ([sys.executable, "-c", code] for code in ("", "import vitrim"))
    whole, bare = (median(lambda c=command: subprocess.run(c, check=True), 9) for command in (full, empty))
    return {"import_s": whole - bare}


def scoring() -> dict[str, float]:
    """Taylor scores and cut of DeiT-S against its forward and backward passes on the same images; at most 1.5."""
    model = adopt(timm.create_model("deit_small_patch16_224")).eval()
    x, y = torch.randn(16, 3, 224, 224), torch.arange(16)

    def passes() -> None:
        F.cross_entropy(model(x), y).backward()
        model.zero_grad(set_to_none=True)

    def scored() -> None:
        scores = taylor_scores(model, [(x, y)])
        apply(model, fill(describe(model), scores, Budget.parse("macs=0.5")))

    return {"taylor_over_passes": ratio(scored, passes, 5)}


def halved() -> dict[str, float]:
    """Latency of DeiT-S at half its MACs, whole heads first, against the dense model; at most 0.55."""
    model = adopt(timm.create_model("deit_small_patch16_224")).eval()
    found = {}
    for choice in ("heads", "even", "free"):
        method = methods.get("magnitude", {"choice": choice})
        child = apply(model, method.search(model, None, Budget.parse("macs=0.5"), seed=0).plan)
        taken = latency(child, model, batch=8, seconds=30)
        found[f"deit_small_half_{choice}"] = taken.ratio or 0.0
        found[f"deit_small_half_{choice}_low"] = taken.ratio_low or 0.0
        found[f"deit_small_half_{choice}_high"] = taken.ratio_high or 0.0
    return found


def adopted() -> dict[str, float]:
    """An adopted dense model against timm's own, eager and compiled; within 2 %."""
    theirs = timm.create_model("deit_small_patch16_224").eval()
    ours = adopt(theirs)
    eager = latency(ours, theirs, batch=8, seconds=30)
    compiled = latency(torch.compile(ours), torch.compile(theirs), image=(3, 224, 224), batch=8, seconds=30)
    return {"adopted_eager": eager.ratio or 0.0, "adopted_compiled": compiled.ratio or 0.0}


def searching() -> dict[str, float]:
    """A step of ViT-Slim's search against a plain training step of DeiT-Ti at batch 32; at most 1.15."""
    model = adopt(timm.create_model("deit_tiny_patch16_224"))
    gated = gate_model(copy.deepcopy(model))
    penalty = l1_penalty(5e-5, 1.25e-5)
    x, y = torch.randn(32, 3, 224, 224), torch.arange(32)
    plain_optimizer, gate_optimizer = (torch.optim.AdamW(net.parameters(), lr=1e-4) for net in (model, gated))

    def plain() -> None:
        F.cross_entropy(model(x), y).backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()

    def search() -> None:
        (F.cross_entropy(gated(x), y) + penalty(gated)).backward()
        gate_optimizer.step()
        gate_optimizer.zero_grad()

    return {"vit_slim_step": ratio(search, plain, 7)}


def other_families() -> dict[str, float]:
    """Adopted Swin-T and T2T-ViT-14 against their own forward; within 3 %. Swin-T at half its MACs; at most 0.65."""
    found = {}
    for name in ("swin_tiny_patch4_window7_224", "t2t_vit_14"):
        theirs = timm.create_model(name).eval()
        ours = adopt(theirs)
        short = name.split("_")[0]
        found[f"adopted_{short}"] = latency(ours, theirs, batch=8, seconds=25).ratio or 0.0
        if short == "swin":
            method = methods.get("magnitude", {"choice": "even"})
            child = apply(ours, method.search(ours, None, Budget.parse("macs=0.5"), seed=0).plan)
            found["swin_tiny_half_even"] = latency(child, theirs, batch=8, seconds=20).ratio or 0.0
    return found


def calibrating() -> dict[str, float]:
    """Seconds of the calibration of DeiT-S on 256 and 80 pictures of noise, and of one budget; at most 240 together.

    The budget is read from the table, without candidates.
    """
    return _searched("deit_small_patch16_224", {"candidates": 0})


def calibrating_base() -> dict[str, float]:
    """The same for ViT-B; at most 720. It takes many minutes, so it is left out unless it is asked for."""
    found = _searched("vit_base_patch16_224", {"candidates": 0})
    return {f"base_{name}": value for name, value in found.items()}


def looking() -> dict[str, float]:
    """The whole search of DeiT-S for one budget, with all candidates and swaps; left out unless it is asked for."""
    return {f"whole_{name}": value for name, value in _searched("deit_small_patch16_224", {}).items()}


def _searched(name: str, settings: dict[str, Any]) -> dict[str, float]:
    model = adopt(timm.create_model(name)).eval()
    noise = random_data(model, 672)
    assert noise.calibration is not None
    data = dataclasses.replace(noise, calibration=noise.calibration.pick(range(256)))
    start = time.perf_counter()
    method = methods.get("post_training", settings)
    found = method.search(model, data, Budget.parse("macs=0.5"), seed=0)
    whole, tables = time.perf_counter() - start, found.trials[0]["calibration_seconds"]
    return {"calibration_s": tables, "one_budget_s": whole - tables, "calibration_and_budget_s": whole}


LIMITS = {
    "pricing_us": 20,
    "import_s": 0.15,
    "explain_s": 0.3,
    "apply_deit_base_s": 2,
    "taylor_over_passes": 1.5,
    "deit_small_half_heads": 0.55,
    "adopted_eager": 1.02,
    "adopted_compiled": 1.02,
    "vit_slim_step": 1.15,
    "adopted_swin": 1.03,
    "adopted_t2t": 1.03,
    "swin_tiny_half_even": 0.65,
    "calibration_and_budget_s": 240,
    "base_calibration_and_budget_s": 720,
}


def main() -> None:
    """Measure, print, and write what was found with its provenance."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*")
    args = parser.parse_args()
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    usual = (pricing, importing, explaining, scoring, halved, adopted, searching, other_families, calibrating)
    for part in (*usual, calibrating_base, looking):
        if part.__name__ in args.only if args.only else part in usual:
            found |= part()
    for name, value in found.items():
        limit = LIMITS.get(name)
        verdict = "" if limit is None else f"  (at most {limit}: {'kept' if value <= limit else 'MISSED'})"
        print(f"{name:32s} {value:10.4f}{verdict}")
    found |= {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
