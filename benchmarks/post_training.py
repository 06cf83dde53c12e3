"""post_training on a real ImageNet ViT-Ti, without labels and without training, next to what else needs neither.

    python benchmarks/post_training.py WEIGHTS TRAIN TEST --out FOLDER [--tasks joint:0:0.5 merging:0:0.5 ...]

WEIGHTS is a ViT-Ti/16 224 state dict (AugReg; input scaled to mean 0.5, std 0.5), TRAIN and TEST are tars or folders of
ImageNet images in wnid folders. A task is KIND:DRAW:SHARE; DRAW decides which 256 of the TRAIN images make the
statistics and which other 80 judge single cuts. Nothing is chosen on TEST. Kinds:

- ``joint``: patches merged and layers narrowed; ``widths``: layers narrowed alone, every patch in every block.
- ``tabled``: as joint, with the table of draw 0: another draw of the images for the compensation alone.
- ``merging``: the best measured schedule of merging and the exact last block, no widths; ``constant``: as many patches
in
  every block but the last, and the exact last block.
- ``taylor``, ``magnitude``: channels chosen by these methods; ``taylor_ridge``, ``magnitude_ridge``: then compensated.
- ``distil4``: the joint model after four minutes of label-free distillation on TRAIN.

Appends a line a task to ``benchmarks/post_training.jsonl``; tasks that are there are skipped. Differences to the dense
model are paired, on the same images, with their standard error.
"""

import argparse
import datetime
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrim import measure, methods
from vitrim.budget import Budget
from vitrim.compensate import compensated, importances, recovered
from vitrim.contract import Data
from vitrim.costs import cost_of
from vitrim.data import Images, Input, eval_loader, open_source
from vitrim.families import describe
from vitrim.methods._budgets import read_off
from vitrim.methods._calibration import Calibration, read_calibration, write_calibration
from vitrim.methods._sensitivity import calibrate, logits_of, merging
from vitrim.parent import open_parent
from vitrim.plan import Plan
from vitrim.surgery import apply
from vitrim.train import Train, fit

RESULTS = Path(__file__).parent / "post_training.jsonl"
BATCH = 32


@dataclass(frozen=True, eq=False)
class Bench:
    """What all tasks share."""

    model: nn.Module
    input: Input
    train: Images
    images: Tensor
    test: Tensor
    labels: Tensor
    dense: Tensor
    out: Path


def opened(weights: str, train: str, test: str, out: Path) -> Bench:
    """Read everything once; 1,000 and 500 images take 0.9 GB."""
    out.mkdir(parents=True, exist_ok=True)
    model = open_parent("vit_tiny_patch16_224", weights=weights)
    input_ = Input.of(model, mean=(0.5,) * 3, std=(0.5,) * 3)
    source = open_source(train, None, classes=1000)
    pictures = torch.cat([x for x, _ in eval_loader(source, input_)])
    pairs = list(eval_loader(open_source(test, None, classes=1000), input_))
    seen, labels = torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])
    return Bench(model, input_, source, pictures, seen, labels, logits_of(model, seen.split(BATCH)), out)


def drawn(bench: Bench, draw: int) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """256 images for statistics and 80 others, and the numbers of the first."""
    order = torch.randperm(len(bench.images), generator=torch.Generator().manual_seed(draw))
    first, second = order[:256], order[256:336]
    return list(bench.images[first].split(BATCH)), list(bench.images[second].split(40)), first.tolist()


def calibration(bench: Bench, draw: int) -> Calibration:
    """The table of a draw, made once."""
    path = bench.out / f"calibration-{draw}.safetensors"
    if not path.is_file():
        images, probe, _ = drawn(bench, draw)
        made = calibrate(bench.model, images, probe, bench.input, seed=draw, strength=1e-2, merge=True, exact=True)
        write_calibration(path, made)
    return read_calibration(path)


def joint(bench: Bench, draw: int, share: float, *, merge: bool = True, table: int | None = None) -> nn.Module:
    """The method, or its widths alone."""
    images, _, _ = drawn(bench, draw)
    known = calibration(bench, draw if table is None else table)
    chosen = read_off(known, Budget(macs=share), merge=merge, widths=True, exact=merge)
    steps = merging(describe(bench.model), chosen.merges, chosen.exact)
    base = apply(bench.model, steps) if steps != Plan.keep(describe(bench.model)) else bench.model
    worth = importances(base, images, seed=draw)
    alpha = 0.0 if any(chosen.merges) else 0.3
    plan, grafts = compensated(base, chosen.choices, images, worth, alpha=alpha)
    return apply(base, plan, grafts=grafts)


def merged(bench: Bench, draw: int, share: float) -> nn.Module:
    """Merging alone, with the same search over schedules."""
    chosen = read_off(calibration(bench, draw), Budget(macs=share), merge=True, widths=False, exact=True)
    return apply(bench.model, merging(describe(bench.model), chosen.merges, chosen.exact))


def constant(bench: Bench, draw: int, share: float) -> nn.Module:
    """As many patches in every block but the last."""
    spec = describe(bench.model)
    for count in range(1, 60):
        left, counts = spec.stages[0].patches, []
        for _ in range(len(spec.blocks()) - 1):
            counts.append(min(count, left // 2))
            left -= counts[-1]
        steps = merging(spec, (*counts, 0), True)
        if cost_of(steps.child(spec)).macs <= share * cost_of(spec).macs:
            return apply(bench.model, steps)
    raise SystemExit(f"merging must reach {share}, but cannot")


def other(name: str, ridge: bool) -> Callable[[Bench, int, float], nn.Module]:
    """Another method, with or without compensation after it; taylor draws its labels from the model, as ours does."""

    def made(bench: Bench, draw: int, share: float) -> nn.Module:
        images, _, numbers = drawn(bench, draw)
        data = Data(train=None, calibration=bench.train.pick(numbers), validation=None, input=bench.input)
        settings = {"target": "output"} if name == "taylor" else {}
        found = methods.get(name, settings).search(bench.model, data, Budget(macs=share), seed=draw)
        grafts = recovered(bench.model, found.plan, images, seed=draw) if ridge else {}
        return apply(bench.model, found.plan, grafts=grafts)

    return made


def distilled(bench: Bench, draw: int, share: float) -> nn.Module:
    """The joint model after four minutes on the training images and their mirror images, without labels."""
    path = bench.out / f"joint-{draw}-{share}.pt"
    child = torch.load(path, weights_only=False) if path.is_file() else joint(bench, draw, share)
    settings = Train(
        epochs=1000, minutes=4, batch=16, lr=1e-4, augment={"kind": "light", "shift": 0, "hflip": 0.5},
        distill={"kind": "soft", "alpha": 1},
    )  # fmt: skip
    child.requires_grad_(True)
    fitted = fit(child, bench.train, settings, input=bench.input, seed=draw, teacher=bench.model)
    print(f"{fitted.steps} steps in {fitted.seconds:.0f} s")
    return fitted.model.eval()


KINDS: dict[str, Callable[[Bench, int, float], nn.Module]] = {
    "joint": joint,
    "tabled": lambda bench, draw, share: joint(bench, draw, share, table=0),
    "widths": lambda bench, draw, share: joint(bench, draw, share, merge=False),
    "merging": merged,
    "constant": constant,
    "taylor": other("taylor", False),
    "taylor_ridge": other("taylor", True),
    "magnitude": other("magnitude", False),
    "magnitude_ridge": other("magnitude", True),
    "distil4": distilled,
}


def divergences(dense: Tensor, logits: Tensor) -> Tensor:
    """Divergence from the dense output, image by image."""
    ours, theirs = logits.double().log_softmax(-1), dense.double().log_softmax(-1)
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)


def record(bench: Bench, name: str, seconds: float) -> dict[str, Any]:
    """Measure the model of a task, which lies in the folder."""
    kind, draw, share = name.split(":")
    child = torch.load(bench.out / f"{kind}-{draw}-{share}.pt", weights_only=False).eval()
    logits = logits_of(child, bench.test.split(BATCH))
    apart = divergences(bench.dense, logits)
    torch.save(apart, bench.out / f"{kind}-{draw}-{share}.kl")
    hits, before = ((x.argmax(-1) == bench.labels).double() * 100 for x in (logits, bench.dense))
    root = len(hits) ** 0.5
    spec = describe(child)
    taken = measure.latency(child, bench.model, batch=8, threads=1, seconds=12)
    found: dict[str, Any] = {
        "kind": kind,
        "draw": int(draw),
        "budget": float(share),
        "macs_ratio": cost_of(spec).macs / cost_of(describe(bench.model)).macs,
        "top1": float(hits.mean()),
        "top1_dense": float(before.mean()),
        "change": float((hits - before).mean()),
        "change_error": float((hits - before).std()) / root,
        "kl": float(apart.mean()),
        "kl_error": float(apart.std()) / root,
        "agreement": 100 * float((logits.argmax(-1) == bench.dense.argmax(-1)).double().mean()),
        "seconds": round(seconds, 1),
        "latency_ratio": taken.ratio,
        "latency_ratio_low": taken.ratio_low,
        "latency_ratio_high": taken.ratio_high,
        "merges": [getattr(block.tokens, "count", 0) for _, _, block in spec.blocks()],
    }
    rival = bench.out / f"merging-{draw}-{share}.kl"
    if kind in ("joint", "tabled", "distil4") and rival.is_file():
        gap = apart - torch.load(rival)
        found |= {"kl_over_merging": float(gap.mean()), "kl_over_merging_error": float(gap.std()) / root}
    return found | {
        "threads": torch.get_num_threads(),
        "device": taken.device,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("weights", "train", "test"):
        parser.add_argument(name)
    parser.add_argument("--out", type=Path, required=True)
    joints = [f"{kind}:0:{share}" for share in (0.7, 0.6, 0.5, 0.4) for kind in ("merging", "constant", "joint")]
    parser.add_argument("--tasks", nargs="+", default=[*joints, "distil4:0:0.4"])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    bench = opened(args.weights, args.train, args.test, args.out)
    lines = args.results.read_text().splitlines() if args.results.is_file() else []
    done = {(line["kind"], line["draw"], line["budget"]) for line in map(json.loads, lines)}
    for task in args.tasks:
        kind, draw, share = task.split(":")
        if (kind, int(draw), float(share)) in done:
            continue
        path, start = args.out / f"{kind}-{draw}-{share}.pt", time.perf_counter()
        if not path.is_file():
            torch.save(KINDS[kind](bench, int(draw), float(share)), path)
        found = record(bench, task, time.perf_counter() - start)
        with args.results.open("a") as file:
            file.write(json.dumps(found) + "\n")
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
