"""Merging neighbours without training on a real ViT-Ti: where, how often, and whether merged tokens are counted.

    python benchmarks/cait_merging.py WEIGHTS TEST [--seconds 6] [--threads 1]

WEIGHTS is a ViT-Ti/16 224 state dict (AugReg; input scaled to mean 0.5, std 0.5), TEST are ImageNet images in wnid
folders or a tar of them. Each row takes the mean of neighbours (form `mean`) at the sites named. As a control, `taylor`
channels cut to the same multiply-accumulates are in ``imagenet_vit_tiny.md``. Writes
``cait_merging.jsonl``, prints a table.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import timm
import torch

from vitrim.cut.surgery import apply
from vitrim.data import Input, eval_loader, open_source
from vitrim.deploy.parent import open_parent
from vitrim.families import describe
from vitrim.measure import latency
from vitrim.methods.cait.masks import merge_plan
from vitrim.train import evaluate, reference_logits
from vitrim.words.costs import cost_of

RESULTS = Path(__file__).with_suffix(".jsonl")
SITES = ["", *"8w 10h,4w 8h,2w 4h,6w 9h,10w,6w,4w,4h 8w".split(",")]


def sites_of(text: str) -> list[tuple[int, Any]]:
    """``4w 8h`` as merges: after block 4 along the columns, after block 8 along the rows."""
    return [(int(site[:-1]), site[-1]) for site in text.split()]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights")
    parser.add_argument("test")
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    parent = open_parent("vit_tiny_patch16_224", weights=args.weights)
    spec, input = describe(parent), Input.of(parent, mean=(0.5,) * 3, std=(0.5,) * 3)
    images = open_source(args.test, "train", classes=1000)  # all that an undivided source has
    loader = eval_loader(images, input)
    theirs = reference_logits(parent, loader)
    lines: list[dict[str, Any]] = []
    print("| merges | counted | MACs | top-1 | same answer | latency ratio |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for sites in SITES:
        for counted in (True, False) if sites else (False,):
            child = apply(parent, merge_plan(spec, sites_of(sites), "mean", counted)).eval()
            found = evaluate(child, loader, reference=theirs)
            timed = latency(child, parent, batch=8, threads=args.threads, seconds=args.seconds)
            ratio = cost_of(describe(child)).macs / cost_of(spec).macs
            line = {"merges": sites, "size_bias": counted, "macs_ratio": ratio, "top1": found.top1,
                    "agreement": found.agreement, "latency_ratio": timed.ratio, "latency_ratio_low": timed.ratio_low,
                    "latency_ratio_high": timed.ratio_high, "images": len(images), "batch": 8,
                    "threads": timed.threads, "device": timed.device, "torch": torch.__version__,
                    "timm": timm.__version__}  # fmt: skip
            lines.append(line)
            args.results.write_text("".join(json.dumps(each) + "\n" for each in lines))
            print(
                f"| {sites or 'none'} | {'yes' if counted else 'no'} | {ratio:.3f} | {found.top1:.1f} | "
                f"{found.agreement:.1f} | {timed.ratio:.2f} ({timed.ratio_low:.2f} to {timed.ratio_high:.2f}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
