"""Latency of CAIT-style models next to their dense parents, and the share of the merges in it; random weights.

    python benchmarks/cait_speed.py [--seconds 12] [--threads 1] [--batch 8] [--device cpu] [--dtype float32]

Merging alone (after blocks 4 and 8), and with channels of the presets' budgets cut evenly. Each ratio is from one run
in turns (`vitrim.measure.latency`), of eager PyTorch as trained and with its merges folded, and on the CPU also of both
in ONNX Runtime. The share of the merges is timed inside forward passes. Writes ``cait_speed.json``.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from vitrim import adopt
from vitrim.cut.surgery import apply
from vitrim.deploy.export import export, onnx_session
from vitrim.families import describe
from vitrim.measure import latency
from vitrim.methods.cait.masks import merge_plan
from vitrim.nn import fold_steps_
from vitrim.nn.steps.grid_merge import GridMerged
from vitrim.words.costs import cost_of
from vitrim.words.plan import BlockPlan, Plan

CASES = [("deit_tiny", 64, 768), ("deit_small", 64, 1536), ("deit_tiny", 56, 768), ("deit_small", 48, 1184)]


def cut(name: str, width: int, hidden: int) -> tuple[nn.Module, nn.Module]:
    """A dense DeiT, and its child with merges, heads of `width` and `hidden` neurons in every block."""
    parent = adopt(timm.create_model(f"{name}_patch16_224")).eval()
    small = apply(parent, merge_plan(describe(parent), [(4, "w"), (8, "h")]))
    spec = describe(small)
    heads = (tuple(range(width)),) * len(spec.blocks()[0][2].mixer.v)  # type: ignore[union-attr]
    blocks = [BlockPlan(qk=heads, v=heads, hidden=tuple(range(hidden)))] * len(spec.blocks())
    return parent, apply(small, Plan.of(spec, blocks)).eval()


def in_runtime(child: nn.Module, parent: nn.Module, batch: int, threads: int, seconds: float) -> list[float]:
    """Latency of the child over its parent's in ONNX Runtime, in turns: median, 10th and 90th percentile."""
    images = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        sessions = []
        for name, model in (("child", child), ("parent", parent)):
            path = Path(folder) / f"{name}.onnx"
            export(model, path)
            sessions.append(onnx_session(path, threads)[1])
        ratios: list[float] = []
        start = time.perf_counter()
        while len(ratios) < 6 or time.perf_counter() - start < seconds:
            times = [0.0, 0.0]
            for place in (0, 1, 1, 0):
                before = time.perf_counter()
                sessions[place](images)
                times[place] += time.perf_counter() - before
            ratios.append(times[0] / times[1])
    tenths = statistics.quantiles(ratios[1:], n=10, method="inclusive")
    return [statistics.median(ratios[1:]), tenths[0], tenths[-1]]


@torch.inference_mode()
def share(model: nn.Module, runs: int = 15) -> float:
    """Median share of a forward pass, batch of 8, that passes in its merges."""
    spent = [0.0]
    for module in model.modules():
        if isinstance(module, GridMerged):
            inner = module.enter

            def timed(x: torch.Tensor, inner: Any = inner) -> torch.Tensor:
                start = time.perf_counter()
                out: torch.Tensor = inner(x)
                spent[0] += time.perf_counter() - start
                return out

            module.enter = timed  # type: ignore[method-assign]
    shares, images = [], torch.randn(8, 3, 224, 224)
    for _ in range(runs):
        spent[0], start = 0.0, time.perf_counter()
        model(images)
        shares.append(spent[0] / (time.perf_counter() - start))
    return statistics.median(shares[2:])


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--results", type=Path, default=Path(__file__).with_suffix(".json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    lines = []
    for name, width, hidden in CASES:
        parent, child = cut(name, width, hidden)
        how: dict[str, Any] = {"batch": args.batch, "threads": args.threads, "seconds": args.seconds}
        how |= {"device": args.device, "dtype": getattr(torch, args.dtype)}
        taken = latency(child, parent, **how)
        folded = latency(fold_steps_(child), parent, **how)
        _, again = cut(name, width, hidden)
        on_cpu = args.device == "cpu"
        runtime = in_runtime(again, parent, args.batch, args.threads, args.seconds) if on_cpu else None
        lines.append(
            {
                "model": name,
                "head_width": width,
                "hidden": hidden,
                "macs_ratio": cost_of(describe(again)).macs / cost_of(describe(parent)).macs,
                "ratio": [taken.ratio, taken.ratio_low, taken.ratio_high],
                "ratio_folded": [folded.ratio, folded.ratio_low, folded.ratio_high],
                "ratio_onnxruntime": runtime,
                "share_of_merges": share(again),
                "share_of_merges_folded": share(fold_steps_(cut(name, width, hidden)[1])),
                "batch": args.batch,
                "dtype": taken.dtype,
                "threads": taken.threads,
                "device": taken.device,
                "torch": torch.__version__,
                "timm": timm.__version__,
            }
        )
        print(json.dumps(lines[-1]), flush=True)
        args.results.write_text(json.dumps(lines, indent=1) + "\n")


if __name__ == "__main__":
    main()
