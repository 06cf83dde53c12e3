"""How fast SPViT's parts are: ``python benchmarks/spvit_speed.py [--out benchmarks/spvit_speed.json]``.

Every number is a median of ratios of two things timed in turns on this machine, with the 10th and 90th percentile.

- a step of the search over a plain training step (at most 1.3), DeiT-Ti at batch 16 and Swin-T at batch 4;
- a block whose attention became a convolution over the dense block, at 196 patches: eager, compiled, in ONNX Runtime;
- the released structure of DeiT-B (8.4 G) over dense DeiT-B at batch 8, random weights (at most 0.55).
"""

import argparse
import copy
import io
import json
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.nn import functional as F

from vitrim import methods
from vitrim.cut.surgery import apply, fold
from vitrim.families import adopt, describe
from vitrim.measure import latency
from vitrim.methods.spvit.search import SinglePath, layout
from vitrim.words.budget import Budget
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Conv


def turns(one: Callable[[], Any], other: Callable[[], Any], pairs: int) -> list[float]:
    """Median, 10th and 90th percentile of one / other over pairs timed in turns."""
    one(), other()
    shares = []
    for index in range(pairs):
        taken = {}
        for name, call in sorted({"one": one, "other": other}.items(), reverse=bool(index % 2)):
            start = time.perf_counter()
            call()
            taken[name] = time.perf_counter() - start
        shares.append(taken["one"] / taken["other"])
    tenths = statistics.quantiles(shares, n=10, method="inclusive")
    return [statistics.median(shares), tenths[0], tenths[-1]]


def _stepped(net: nn.Module, x: torch.Tensor, y: torch.Tensor, more: Callable[[nn.Module], Any]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        (F.cross_entropy(net(x), y) + more(net)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def searching() -> dict[str, list[float]]:
    """A step of the search against a plain training step."""
    found = {}
    for name, batch in (("deit_tiny_patch16_224", 16), ("swin_tiny_patch4_window7_224", 4)):
        model = adopt(timm.create_model(name)).train()
        spec = describe(model)
        how = layout(spec)
        single = SinglePath(copy.deepcopy(model), how).train()
        penalty = methods.get("spvit").penalty(spec, how, Budget.parse("macs=0.5"))
        x, y = torch.randn(batch, 3, 224, 224), torch.arange(batch)
        found[f"search_step_{name.split('_')[0]}"] = turns(
            _stepped(single, x, y, penalty), _stepped(model, x, y, lambda _: 0.0), 9
        )
    return found


def _session(block: nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    import onnxruntime

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(block, (x,), dynamo=True, verbose=False)
    assert program is not None
    program.save(buffer)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(buffer.getvalue(), options, providers=["CPUExecutionProvider"])
    given = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, given)


@torch.no_grad()
def blocks() -> dict[str, list[float]]:
    """A whole block, convolution in place of attention, against the dense one."""
    found: dict[str, list[float]] = {}
    for name in ("deit_tiny_patch16_224", "deit_base_patch16_224"):
        dense = adopt(timm.create_model(name)).eval()
        spec = describe(dense)
        x = torch.randn(8, 197, spec.stages[0].width)
        for kernel in (1, 3):
            decisions = [BlockPlan(mixer=Conv(kernel=kernel, width=64))] * len(spec.blocks())
            child = apply(dense, Plan.of(spec, decisions)).eval()
            pair = [net.blocks[0] for net in (child, dense)]
            short = f"block_{name.split('_')[1]}_{kernel}x{kernel}"
            found[f"{short}_eager"] = turns(*(partial(net, x) for net in pair), 25)
            compiled = [torch.compile(net) for net in pair]
            found[f"{short}_compiled"] = turns(*(partial(net, x) for net in compiled), 25)
            try:
                sessions = [_session(net, x) for net in pair]
            except ImportError:
                continue
            found[f"{short}_onnx"] = turns(*sessions, 25)
    return found


def whole() -> dict[str, list[float]]:
    """The released structure of DeiT-B against the dense model."""
    dense = adopt(timm.create_model("deit_base_patch16_224")).eval()
    found = methods.get("spvit", {"structure": "deit_b_t60"}).search(dense, None, Budget.parse("macs=8.41G"), seed=0)
    child = fold(apply(found.parent, found.plan)).eval()
    taken = latency(child, dense, batch=8, seconds=40)
    return {"deit_base_t60": [taken.ratio or 0.0, taken.ratio_low or 0.0, taken.ratio_high or 0.0]}


def main() -> None:
    """Measure, print, and write what was found with its provenance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*")
    args = parser.parse_args()
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    for part in (searching, blocks, whole):
        if not args.only or part.__name__ in args.only:
            found |= part()
    for name, (middle, low, high) in found.items():
        print(f"{name:32s} {middle:7.3f} ({low:.3f} to {high:.3f})")
    found |= {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
              "torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()}  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
