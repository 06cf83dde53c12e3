"""What MDC's parts cost.

    python -m benchmarks.mdc_speed [--images 256] --out benchmarks/mdc_speed.json

Scores of all heads and neurons of a DeiT-S over its forward passes on the same images (must be at most 3); the peak
memory of a process that scores a DeiT-B (at most 4 GB); a proposal at 100 trials (at most 2 s); what evaluating a
policy takes besides the forward passes (at most 50 ms). Random weights and images; processor time of one thread, which
other work on the machine lengthens less than the clock's.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import timm
import torch
from optuna.trial import TrialState, create_trial
from torch import nn

from vitrim.families import adopt, describe
from vitrim.methods.mdc import bayes
from vitrim.methods.mdc.decode import Bounds, Frame, natural
from vitrim.methods.mdc.policy import sample
from vitrim.methods.mdc.scores import Settings, score
from vitrim.methods.mdc.share import Chooser
from vitrim.words.budget import Budget


def model_of(name: str) -> nn.Module:
    """A random model, adopted."""
    torch.manual_seed(0)
    return adopt(timm.create_model(name)).eval()


def batches(images: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random images, 64 at a time."""
    draw = torch.Generator().manual_seed(0)
    return [(torch.randn(64, 3, 224, 224, generator=draw), torch.zeros(64).long()) for _ in range(max(1, images // 64))]


def scoring(images: int) -> dict[str, Any]:
    """Seconds of the scores over those of the forward passes, batch by batch in turns."""
    model, ratios, both = model_of("deit_small_patch16_224"), [], [0.0, 0.0]
    for batch in batches(images):
        start = time.process_time()
        with torch.no_grad():
            model(batch[0])
        middle = time.process_time()
        score(model, [batch], Settings())
        taken = middle - start, time.process_time() - middle
        ratios.append(taken[1] / taken[0])
        both = [a + b for a, b in zip(both, taken, strict=True)]
    return {
        "scores_over_forward": both[1] / both[0],
        "by_batch": ratios,
        "forward_s": both[0],
        "images": 64 * len(ratios),
    }


def memory() -> dict[str, Any]:
    """Peak of a fresh process."""
    code = "from benchmarks.mdc_speed import *; torch.set_num_threads(1); print(peak())"
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    return {"peak_gb_deit_base": float(found.stdout.split()[-1])}


def peak() -> float:
    """Score a DeiT-B on one batch; gigabytes, with Python, the libraries and the images."""
    score(model_of("deit_base_patch16_224"), batches(64), Settings())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def proposing() -> dict[str, Any]:
    """Seconds of the proposals for trials 101 to 105 of a DeiT-S, in memory."""
    with torch.device("meta"):
        spec = describe(timm.create_model("deit_small_patch16_224"))
    frame = Frame(spec, natural(spec), Budget.parse("macs=0.6"), Bounds(heads=0.5, neurons=0.5, tokens=0.5))
    space, study = frame.space, optuna.create_study(direction="maximize")
    rng = np.random.default_rng(0)
    ranges = {
        n: optuna.distributions.FloatDistribution(0, float(u)) for n, u in zip(space.names, space.upper, strict=True)
    }
    for policy in sample(space, 100, rng):
        params = {name: float(ratio) for name, ratio in zip(space.names, policy, strict=True)}
        value = float(-np.square(policy - 0.2).sum())
        study.add_trial(create_trial(params=params, distributions=ranges, value=value, state=TrialState.COMPLETE))
    last, taken = time.process_time(), []

    def objective(policy: np.ndarray[Any, Any]) -> tuple[float, dict[str, Any]]:
        taken.append(time.process_time() - last)
        return float(-np.square(policy - 0.2).sum()), {}

    for trials in range(101, 106):
        last = time.process_time()
        bayes.search(study, space, objective, trials=trials, initial=10, seed=0)
    return {"proposal_s": statistics.median(taken), "proposals_s": taken}


def evaluating() -> dict[str, Any]:
    """Milliseconds of putting a policy on a DeiT-S and taking it away, without running it."""
    model = model_of("deit_small_patch16_224")
    spec = describe(model)
    frame = Frame(spec, natural(spec), Budget.parse("macs=0.6"), Bounds(heads=0.5, neurons=0.5, tokens=0.5))
    chooser, taken = Chooser(frame), []
    for policy in sample(frame.space, 9, np.random.default_rng(0)):
        start = time.process_time()
        with chooser.chosen(model, policy):
            pass
        taken.append(1e3 * (time.process_time() - start))
    return {"policy_ms": statistics.median(taken)}


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found: dict[str, Any] = {"torch": torch.__version__, "optuna": optuna.__version__, "threads": 1}
    for part in (evaluating, proposing, memory, lambda: scoring(args.images)):
        found |= part()
        print(json.dumps(found, indent=1), flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
