"""Which Gaussian process finds better policies: BoTorch's over a feasible pool, or Optuna's sampler?

    python -m benchmarks.mdc_search synthetic [--seeds 10] [--noise 0.3] [--searches random botorch optuna]
    python -m benchmarks.mdc_search digits --out FOLDER [--seeds 3]

`synthetic`: ``f = 80 - sum a n^2 - sum b h^2 - 25 t^2 - 5 t mean(n)`` over the policies of a DeiT-S (25 ratios), a, b
drawn from 6 LogNormal(0, 1), priced as DeiT-S is; each search has 30 measurements, the first 10 of them drawn. Told
are the true values of what each search takes for the best. `digits`: the held-out loss of a small trained ViT, no
retraining, 40 measurements, 15 drawn. `optuna` is what vitrim uses (`vitrim.methods.mdc.bayes`), `botorch` the
contender in `benchmarks/botorch_search.py`. Appends lines to ``benchmarks/mdc_search.jsonl``, prints means.
"""

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import timm
import torch

from vitrim.cut.spend import Policies as Array
from vitrim.cut.spend import Space
from vitrim.data import Input, split
from vitrim.demo import PARENT, small_vit, train_parent
from vitrim.deploy import store
from vitrim.families import describe
from vitrim.methods import Data, mdc
from vitrim.methods.mdc import bayes
from vitrim.methods.mdc.decode import Bounds, Frame, natural
from vitrim.methods.mdc.policy import sample
from vitrim.methods.mdc.share import Chooser
from vitrim.words.budget import Budget

RESULTS = Path(__file__).parent / "mdc_search.jsonl"
Value = Callable[[Array], float]


def ours(kind: str) -> Callable[[Space, Value, int, int, int], tuple[Array, float]]:
    """A search of ours in memory: the policy that it takes for the best, and the seconds of its proposals."""

    def run(space: Space, value: Value, seed: int, trials: int, initial: int) -> tuple[Array, float]:
        study = optuna.create_study(direction="maximize")
        inside = [0.0]

        def objective(policy: Array) -> tuple[float, dict[str, Any]]:
            start = time.perf_counter()
            found = value(policy)
            inside[0] += time.perf_counter() - start
            return found, {}

        start = time.perf_counter()
        bayes.search(study, space, objective, trials=trials, initial=initial, seed=seed, proposal=kind)
        seconds = time.perf_counter() - start - inside[0]
        return bayes.best_of(bayes.trials_of(study, space)).policy, seconds / trials

    return run


def botorch(space: Space, value: Value, seed: int, trials: int, initial: int) -> tuple[Array, float]:
    """The contender, from the same draws."""
    from benchmarks.botorch_search import propose

    rng = np.random.default_rng([seed, 1])
    start, inside = time.perf_counter(), 0.0
    policies, values = np.zeros((0, len(space.names))), np.zeros(0)
    for trial in range(trials):
        drawn = sample(space, 16, np.random.default_rng([seed, trial]))[0] if trial < initial else None
        policy = propose(space, policies, values, rng) if drawn is None else drawn
        before = time.perf_counter()
        found = value(policy)
        inside += time.perf_counter() - before
        policies, values = np.vstack([policies, policy]), np.append(values, found)
    best: Array = policies[int(values.argmax())]
    return best, (time.perf_counter() - start - inside) / trials


SEARCHES = {"random": ours("random"), "optuna": ours("gp"), "botorch": botorch}


def deit_small(keep: float) -> Space:
    """The policies of a DeiT-S."""
    with torch.device("meta"):
        spec = describe(timm.create_model("deit_small_patch16_224"))
    bounds = Bounds(heads=0.5, neurons=0.5, tokens=0.5)
    return Frame(spec, natural(spec), Budget.parse(f"macs={keep}"), bounds).space


def hills(space: Space, seed: int) -> Value:
    """The synthetic objective, without noise."""
    rng = np.random.default_rng(seed)
    neurons = [i for i, name in enumerate(space.names) if name.endswith("hidden")]
    heads = [i for i, name in enumerate(space.names) if name.endswith("heads")]
    a, b = 6 * rng.lognormal(0, 1, len(neurons)), 6 * rng.lognormal(0, 1, len(heads))

    def value(policy: Array) -> float:
        ratios = space.realised(policy[None])[0]
        n, h, t = ratios[neurons], ratios[heads], policy[-1]
        return float(80 - a @ n**2 - b @ h**2 - 25 * t**2 - 5 * t * n.mean())

    return value


def blurred(true: Value, noise: float, rng: np.random.Generator) -> Value:
    """The same with noise on every measurement."""
    return lambda policy: true(policy) + noise * rng.normal()


def synthetic(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every search on every seed and budget."""
    lines = []
    for keep in args.budgets:
        space = deit_small(keep)
        for seed in range(args.seeds):
            true = hills(space, seed)
            for name in args.searches:
                noisy = blurred(true, args.noise, np.random.default_rng([seed, 2]))
                policy, seconds = SEARCHES[name](space, noisy, seed, 30, 10)
                lines.append({"objective": "synthetic", "noise": args.noise, "keep": keep, "seed": seed,
                              "search": name, "value": true(policy), "seconds": seconds})  # fmt: skip
                keep_line(lines[-1])
    return lines


def digits(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The same on a small trained ViT; `value` is the held-out loss, negated."""
    lines = []
    for seed in range(args.seeds):
        parent = args.out / f"parent-{seed}.safetensors"
        args.out.mkdir(parents=True, exist_ok=True)
        train_parent(parent, seed, small_vit, PARENT.model_copy(update={"epochs": PARENT.epochs * args.scale,
                     "warmup_epochs": PARENT.warmup_epochs * args.scale}))  # fmt: skip
        model = store.load(parent).eval()
        parts = split("digits", calibration=256, validation=0.2, seed=seed)
        data = Data(
            train=parts.train, calibration=parts.calibration, validation=parts.validation, input=Input.of(model)
        )
        method, spec = mdc.Method(measure="loss"), describe(model)
        for keep in args.budgets:
            budget = Budget.parse(f"macs={keep}")
            study = optuna.create_study(direction="maximize")
            ranking, places = method._scores(model, spec, data, study)
            frame = Frame(spec, ranking, budget, method._bounds(spec))
            objective = method._objective(model, model, Chooser(frame, True, places), data)
            for name in args.searches:
                policy, seconds = SEARCHES[name](frame.space, lambda p, o=objective: o(p)[0], seed, 40, 15)
                lines.append({"objective": "digits", "noise": 0.0, "keep": keep, "seed": seed, "search": name,
                              "value": objective(policy)[0], "seconds": seconds})  # fmt: skip
                keep_line(lines[-1])
    return lines


def keep_line(line: dict[str, Any]) -> None:
    """Append a record."""
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("objective", choices=["synthetic", "digits"])
    parser.add_argument("--searches", nargs="+", choices=SEARCHES, default=list(SEARCHES))
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.7, 0.6, 0.5, 0.4])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--scale", type=float, default=0.2)
    parser.add_argument("--out", type=Path, default=Path("runs/mdc_search"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    lines = synthetic(args) if args.objective == "synthetic" else digits(args)
    print("| keep | search | mean best | gain over random: mean, least | better than random | seconds a proposal |")
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    for keep in args.budgets:
        found = {
            n: np.array([x["value"] for x in lines if (x["keep"], x["search"]) == (keep, n)]) for n in args.searches
        }
        for name, values in found.items():
            gain = values - found.get("random", values)
            took = np.mean([x["seconds"] for x in lines if (x["keep"], x["search"]) == (keep, name)])
            print(f"| {keep} | {name} | {values.mean():.3f} | {gain.mean():+.3f}, {gain.min():+.3f} | "
                  f"{int((gain > 0).sum())} of {len(gain)} | {took:.2f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
