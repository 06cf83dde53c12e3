"""Forms of token merging at equal schedules: the divergence from the dense output, image by image.

    python benchmarks/merging.py MODEL IMAGES --weights FILE --out RECORD.jsonl --images 320 --seed 7

MODEL is a timm name, IMAGES a tar or folder of training images, of which some are drawn. Schedules are those that
post_training measures, nearest to the shares of MACs asked for; nothing else is cut. Writes a line for each
schedule and form: the mean divergence in nats, and its paired difference to the published form, with standard errors.
"""

import argparse
import datetime
import json
import platform
from pathlib import Path
from typing import Any

import timm
import torch
from joint import divergences
from torch import Tensor

import vitrim
from vitrim.cut.surgery import apply
from vitrim.data import Input, eval_loader, open_source
from vitrim.deploy.parent import open_parent
from vitrim.families import describe
from vitrim.methods.post_training.schedule import merging, schedules
from vitrim.methods.post_training.sensitivity import logits_of
from vitrim.words.costs import cost_of
from vitrim.words.plan import Plan
from vitrim.words.steps.merge import Merge

FORMS: dict[str, dict[str, Any]] = {
    "keys": {},
    "keys, norm kept": {"keeps_norm": True},
    "tokens": {"by": "tokens"},
    "tokens, norm kept": {"by": "tokens", "keeps_norm": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("images_from")
    parser.add_argument("--weights")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--shares", nargs="+", type=float, default=[0.72, 0.58, 0.46, 0.38])
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--mean", type=float)
    parser.add_argument("--std", type=float)
    args = parser.parse_args()
    model = open_parent(args.model, weights=args.weights)
    given: dict[str, Any] = {} if args.mean is None else {"mean": (args.mean,) * 3, "std": (args.std,) * 3}
    spec, shape = describe(model), Input.of(model, **given)
    source = open_source(args.images_from, None, classes=spec.classes)
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(args.seed)).tolist()
    images = [x for x, _ in eval_loader(source.pick(sorted(order[: args.images])), shape, batch=32)]
    dense, whole = logits_of(model, images), cost_of(spec).macs
    rows = schedules(spec, "bipartite", exact=True)
    shares = [cost_of(merging(spec, row, exact=True).child(spec)).macs / whole for row in rows]
    for wanted in args.shares:
        row = rows[min(range(len(rows)), key=lambda number: abs(shares[number] - wanted))]
        plain: Tensor | None = None
        for name, form in FORMS.items():
            blocks = [
                one.model_copy(update={"tokens": Merge(count=one.tokens.count, **form)}) if one.tokens else one
                for one in merging(spec, row, exact=True).blocks()
            ]
            plan = Plan.of(spec, blocks)
            found = divergences(dense, logits_of(apply(model, plan).eval(), images))
            plain = found if plain is None else plain
            gap, root = found - plain, len(found) ** 0.5
            line = {
                "form": name,
                "macs_ratio": cost_of(plan.child(spec)).macs / whole,
                "schedule": row,
                "kl": float(found.mean()),
                "kl_error": float(found.std()) / root,
                "less_keys": float(gap.mean()),
                "less_keys_error": float(gap.std()) / root,
                "images": len(found),
                "seed": args.seed,
                "machine": platform.processor() or platform.machine(),
                "vitrim": vitrim.__version__,
                "torch": torch.__version__,
                "timm": timm.__version__,
                "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            }
            with args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{line['macs_ratio']:.3f} {name}: {line['kl']:.4f} ({line['less_keys']:+.4f})", flush=True)


if __name__ == "__main__":
    main()
