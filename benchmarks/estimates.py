"""Losses of single cuts that post_training estimates, beside the same losses measured.

    python benchmarks/estimates.py MODEL IMAGES --weights FILE --out RECORD.jsonl

MODEL is a timm name, IMAGES a tar or folder of training images. The model is calibrated twice on the same drawn images,
with ``estimates`` and without. Writes a line for each kind of cut: how many were estimated, and the mean and the
standard deviation of the logarithm of the estimated over the measured loss.
"""

import argparse
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from joint import versions

from vitrim import methods
from vitrim.data import Input, eval_loader, open_source
from vitrim.deploy.parent import open_parent
from vitrim.families import describe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("images_from")
    parser.add_argument("--weights")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--probe", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mean", type=float)
    parser.add_argument("--std", type=float)
    args = parser.parse_args()
    model = open_parent(args.model, weights=args.weights)
    given: dict[str, Any] = {} if args.mean is None else {"mean": (args.mean,) * 3, "std": (args.std,) * 3}
    shape = Input.of(model, **given)
    source = open_source(args.images_from, None, classes=describe(model).classes)
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(args.seed)).tolist()
    first, last = order[: args.images], order[args.images : args.images + args.probe]
    images, probe = ([x for x, _ in eval_loader(source.pick(sorted(part)), shape, batch=32)] for part in (first, last))
    data = methods.Data(train=None, calibration=None, validation=None, input=shape)
    made = {}
    for estimates in (True, False):
        method: Any = methods.get("post_training", {"estimates": estimates, "precision": "fp32", "merge": "none"})
        made[estimates] = method.calibrated(model, data, images, probe, args.seed)
        print(f"estimates={estimates}: {made[estimates].seconds:.0f} s", flush=True)
    ratios = defaultdict(list)
    for name, losses in made[False].losses.items():
        for measured, estimated in zip(losses, made[True].losses[name], strict=True):
            if measured != estimated:
                ratios[name.rpartition(".")[2]].append(math.log(estimated / measured))
    with args.out.open("w", encoding="utf-8") as file:
        for kind, values in ratios.items():
            line = {
                "kind": kind,
                "cuts": len(values),
                "mean_log_ratio": round(statistics.mean(values), 4),
                "spread_log_ratio": round(statistics.stdev(values), 4),
                "seconds": {str(key): round(one.seconds, 1) for key, one in made.items()},
                **versions(images=args.images, probe=args.probe, seed=args.seed),
            }
            file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
