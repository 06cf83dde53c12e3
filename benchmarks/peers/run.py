"""Peers side by side: the same dense weights, calibration images, budget and recovery time, measured in one run.

    python benchmarks/peers/run.py WEIGHTS TRAIN TEST --out benchmarks/peers/vit_tiny

WEIGHTS are those of --model (timm's vit_tiny_patch16_224), TRAIN and TEST image sources. Writes OUT.jsonl, a line a
model, and OUT.md, the table. All are scored on the same calibration images; --minutes of distillation from the dense
model follow, for all alike (none by default). Top-1 is that of TEST; latencies are taken in turns of all models; MACs
are counted by PyTorch, for each kind of model alike. Needs `pip install torch-pruning==1.6.1`.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import timm
import torch
from torch.nn import functional as F

import vitrim
from vitrim import families
from vitrim.cut import surgery
from vitrim.data import Input, eval_loader, split
from vitrim.deploy.parent import open_teacher
from vitrim.families import describe
from vitrim.measure import counted
from vitrim.measure.turns import percentiles, turns
from vitrim.train import evaluate
from vitrim.words.costs import cost_of
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.steps.merge import Merge

OURS = ("taylor", "post_training")
PEERS = ("torch-pruning width", "torch-pruning inner", "torch-pruning heads", "tome")


def tome(model, share):
    """Token merging by bipartite matching as published (Bolya et al. 2023): the same number of patches in every block.

    Our own implementation of the method (`vitrim.words.spec.Merge`), with the least number that meets the budget.
    """
    net = families.adopt(model)
    spec = describe(net)
    limit = share * cost_of(spec).macs
    for count in range(1, spec.stages[0].patches):
        left, blocks = spec.stages[0].patches, []
        for _ in spec.blocks():
            here = min(count, left // 2)
            blocks.append(BlockPlan(tokens=Merge(count=here)) if here else BlockPlan())
            left -= here
        plan = Plan.of(spec, blocks)
        if cost_of(plan.child(spec)).macs <= limit:
            return surgery.apply(net, plan)
    raise ValueError(f"tome: no number of merged patches meets {share}")


def make(name, model, source, known, fitting, share, seed):
    """The model that `name` makes of timm's `model`."""
    image = (fitting.channels, *fitting.size)
    batches = list(eval_loader(known.calibration, fitting, batch=16))
    if name == "dense":
        return model
    if name == "tome":
        return tome(model, share)
    if name.startswith("torch-pruning"):
        from benchmarks.peers.torch_pruning_fixed import prune

        return prune(model, batches, image, share, name.split()[1])
    # The same source, numbers and seed give the same calibration images.
    given = {"mean": list(fitting.mean), "std": list(fitting.std)}
    given |= {"calibration": len(known.calibration), "validation": len(known.validation)}
    found = vitrim.compress(
        model,
        source,
        method=name,
        budget=f"macs={share}",
        seed=seed,
        recover="none",  # as the peers
        measure={"latency": False},
        recipe={"data": given},
    )
    return found.model


def recover(model, dense, known, fitting, minutes, seed):
    """Distil for so long: AdamW, 1e-4 falling to 0, divergence from the dense output, some batches mirrored."""
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)
    start, generator = time.perf_counter(), torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(known.train), generator=generator).tolist()
        for images, _ in eval_loader(known.train.pick(order), fitting, batch=16):
            spent = (time.perf_counter() - start) / (60 * minutes)
            if spent >= 1:
                return model.eval().requires_grad_(False)
            if torch.rand((), generator=generator) < 0.5:
                images = images.flip(-1)
            for group in optimizer.param_groups:
                group["lr"] = 1e-4 * (1 - spent)
            with torch.no_grad():
                target = dense(images).log_softmax(-1)
            loss = F.kl_div(model(images).log_softmax(-1), target, log_target=True, reduction="batchmean")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def dense_model(name, weights):
    """The model of timm with these weights."""
    return open_teacher(name, weights=str(weights)).requires_grad_(False)


def table(records):
    """The records as Markdown, best top-1 first within a budget."""
    lines = [
        "| budget | model | MACs, share | parameters | latency, share (10 to 90 %) | top-1 | same answer | seconds |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in sorted(records, key=lambda r: (-r["budget"], -r["top1"])):
        time_ = f"{r['latency']:.3f} ({r['latency_low']:.3f} to {r['latency_high']:.3f})"
        lines.append(
            f"| {r['budget']:g} | {r['model']} | {r['macs_ratio']:.3f} | {r['params'] / 1e6:.2f} M | {time_} "
            f"| {r['top1']:.1f} | {r['agreement']:.1f} | {r['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def compare(
    dense, source, known, fitting, shares, names, *, minutes=0.0, seed=0, batch=8, seconds=20.0, smaller=()
):  # fmt: skip
    """Make every model at every budget, and measure all; records as in the table.

    `known` are the splits of `source` with this seed.
    """
    image = (fitting.channels, *fitting.size)
    test = list(eval_loader(known.test, fitting, batch=50))
    whole = counted(dense, image)
    logits = torch.cat([dense(images) for images, _ in test])
    made = [("dense", 1.0, dense, 0.0)]
    made += [(name, 1.0, dense_model(name, weights), 0.0) for name, weights in smaller]
    for share in shares:
        for name in names:
            start = time.perf_counter()
            model = make(name, dense, source, known, fitting, share, seed)
            if minutes:
                model = recover(model, dense, known, fitting, minutes, seed)
            made.append((name, share, model, time.perf_counter() - start))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, *image, generator=generator)

    def call(model):
        def run():
            with torch.inference_mode():
                return model(images)

        return run

    samples = turns([call(model) for _, _, model, _ in made], seconds=seconds).samples
    records = []
    for (name, share, model, taken), mine in zip(made, samples, strict=True):
        cost, found = counted(model, image), evaluate(model, test, reference=logits)
        low, middle, high = percentiles([a / b for a, b in zip(mine, samples[0], strict=True)])
        records.append(
            {
                "model": name,
                "budget": share,
                "macs": cost.macs,
                "macs_ratio": cost.macs / whole.macs,
                "params": cost.params,
                "latency": middle,
                "latency_low": low,
                "latency_high": high,
                "top1": found.top1,
                "agreement": found.agreement,
                "seconds": taken,
                "minutes": minutes,
                "images": found.count,
                "seed": seed,
                "batch": batch,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "timm": timm.__version__,
            }
        )
    return records


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("weights", "train", "test"):
        parser.add_argument(name)
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--mean", type=float, nargs=3, default=(0.5, 0.5, 0.5))
    parser.add_argument("--std", type=float, nargs=3, default=(0.5, 0.5, 0.5))
    parser.add_argument("--shares", type=float, nargs="+", default=(0.9, 0.7))
    parser.add_argument("--names", nargs="+", default=[*OURS, *PEERS])
    parser.add_argument("--smaller", nargs=2, action="append", default=[], metavar=("NAME", "WEIGHTS"))
    parser.add_argument("--calibration", type=int, default=128)
    parser.add_argument("--validation", type=int, default=80, help="images that a search compares candidates on")
    parser.add_argument("--test-images", type=int, default=0, help="first so many; 0 for all")
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    dense = dense_model(asked.model, asked.weights)
    fitting = Input.of(dense, mean=tuple(asked.mean), std=tuple(asked.std))
    classes = dense.num_classes
    known = split(
        asked.train, asked.test, calibration=asked.calibration, validation=asked.validation, seed=asked.seed,
        classes=classes,
    )  # fmt: skip
    if asked.test_images:
        test = known.test.pick(range(min(asked.test_images, len(known.test))))
        known = replace(known, test=test)
    records = compare(
        dense, asked.train, known, fitting, asked.shares, asked.names, minutes=asked.minutes, seed=asked.seed,
        seconds=asked.seconds, smaller=asked.smaller,
    )  # fmt: skip
    asked.out.with_suffix(".jsonl").write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    text = table(records)
    asked.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
