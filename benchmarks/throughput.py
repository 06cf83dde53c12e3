"""Training throughput of `vitrim.train.fit` against a bare PyTorch loop, in turns.

    python benchmarks/throughput.py --out benchmarks/throughput.json

Both train a timm ViT from the same weights on the same pictures (bytes that stay on the device), with the same batch,
fused AdamW, precision and layout; neither clips gradients. The bare loop does what a step needs and nothing else: no
checks, no records, no schedule. A sample is the time of some steps after two that do not count. The ratio is the median
over pairs of samples taken one after the other, the first of a pair in turns.

On a CPU the ratio of the processor time of the same samples is given, too (`ratio_processor`): other work on the
machine changes it less.

On a GPU the model is ViT-Ti at 224 pixels with batches of 512, on a CPU a small ViT at 64 pixels with batches of 32.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from vitrim.data import Augment, Images, Input
from vitrim.measure.turns import name_of, place_of, waiting
from vitrim.train import Distill, Stop, Train, fit
from vitrim.train.machine import autocast, settled, tf32_allowed

WARMUP = 2
BIG: dict[str, Any] = {"size": 224, "batch": 512, "steps": 12, "model": {"model_name": "vit_tiny_patch16_224"}}
SMALL: dict[str, Any] = {
    "size": 64, "batch": 32, "steps": 12,
    "model": {"model_name": "vit_tiny_patch16_224", "patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4},
}  # fmt: skip


def made(case: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(**case["model"], img_size=case["size"], num_classes=10)


def pictures(case: dict[str, Any]) -> Images:
    """Noise; two batches of it, so that an epoch has several steps."""
    size, count = case["size"], 2 * case["batch"]
    pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
    return Images(lambda i: Image.fromarray(pixels[i]), np.arange(count) % 10, classes=10, source="noise", fixed=True)


Times = tuple[float, float]
"""Seconds of a clock and of the processor."""


def clocks() -> Times:
    return time.perf_counter(), time.process_time()


def ours(case: dict[str, Any], images: Images, device: torch.device, settings: Train) -> Times:
    """Return the time of one step of `fit`."""
    wait, times, last = waiting(device), [], WARMUP + case["steps"] - 1

    def after_step(_: nn.Module, step: int) -> None:
        if step in (WARMUP - 1, last):
            wait()
            times.append(clocks())
        if step == last:
            raise Stop

    model = made(case)
    input = Input.of(model, crop_pct=1.0)
    fit(model, images, settings, input=input, seed=0, after_step=after_step, device=device)
    return per_step(times[0], times[1], case)


def per_step(start: Times, end: Times, case: dict[str, Any]) -> Times:
    return (end[0] - start[0]) / case["steps"], (end[1] - start[1]) / case["steps"]


def bare(case: dict[str, Any], images: Images, device: torch.device, settings: Train) -> Times:
    """Return the time of one step of a plain loop."""
    wait, model = waiting(device), made(case).to(device).train()
    if settings.channels_last is True:
        model.to(memory_format=torch.channels_last)
    x = torch.stack([torch.from_numpy(np.array(images[i][0])).permute(2, 0, 1) for i in range(len(images))]).to(device)
    y = torch.from_numpy(images.labels).to(device)
    mean, std = (torch.tensor([0.5] * 3, device=device).view(1, 3, 1, 1) for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay, fused=True)
    layout = torch.channels_last if settings.channels_last is True else torch.contiguous_format
    start = (0.0, 0.0)
    with tf32_allowed(device, settings.tf32):
        for step in range(WARMUP + case["steps"]):
            if step == WARMUP:
                wait()
                start = clocks()
            if step % 2 == 0:
                order = torch.randperm(len(x)).to(device)
            some = order[(step % 2) * case["batch"] : (step % 2 + 1) * case["batch"]]
            batch = ((x[some].float() / 255 - mean) / std).to(memory_format=layout)
            optimizer.zero_grad(set_to_none=True)
            with autocast(device, settings.precision):
                logits = model(batch)
            F.cross_entropy(logits.float(), y[some]).backward()
            optimizer.step()
        wait()
    return per_step(start, clocks(), case)


def compared(case: dict[str, Any], device: torch.device, pairs: int) -> dict[str, Any]:
    """Time both in turns.

    Returns:
        A flat record; `ratio` is the throughput of `fit` as a share of the bare loop's, `ratio_low` and `ratio_high`
        the smallest and the largest of the pairs.
    """
    asked = Train(
        epochs=1000, batch=case["batch"], clip=None, augment=Augment(kind="none"), distill=Distill(kind="none")
    )
    settings, images = settled(asked, device), pictures(case)
    loops: dict[str, Callable[..., Times]] = {"ours": ours, "bare": bare}
    taken: dict[str, list[Times]] = {name: [] for name in loops}
    for pair in range(pairs):
        for name in sorted(loops, reverse=bool(pair % 2)):
            taken[name].append(loops[name](case, images, device, settings))
    ratios, processor = (
        [b[clock] / a[clock] for a, b in zip(taken["ours"], taken["bare"], strict=True)] for clock in (0, 1)
    )
    return {
        "model": case["model"]["model_name"],
        "size": case["size"],
        "batch": case["batch"],
        "precision": settings.precision,
        "images_per_second": case["batch"] / statistics.median(wall for wall, _ in taken["ours"]),
        "bare_images_per_second": case["batch"] / statistics.median(wall for wall, _ in taken["bare"]),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "ratio_processor": statistics.median(processor) if device.type == "cpu" else None,
        "ratio_processor_low": min(processor) if device.type == "cpu" else None,
        "ratio_processor_high": max(processor) if device.type == "cpu" else None,
        "pairs": pairs,
        "steps": case["steps"],
        "device": name_of(device),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--pairs", type=int, default=8)
    args = parser.parse_args()
    device = place_of(args.device)
    found = compared(SMALL if device.type == "cpu" else BIG, device, args.pairs)
    print(json.dumps(found, indent=1))
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
