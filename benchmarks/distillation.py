"""How far distillation without labels on a thousand images brings a compressed model towards its parent.

    python benchmarks/distillation.py DATA --campaign FOLDER --out FILE.jsonl [--rows NAME ...] [--budget macs=0.5]
    python benchmarks/distillation.py --table FILE.jsonl

DATA and FOLDER are those of ``benchmarks/campaign.py``, which has fine-tuned a ViT-Ti on CIFAR-10 at 64 pixels. It is
compressed by ``post_training`` (256 + 80 training images) and distilled on 920 of them as ``vitrim compress --minutes``
does, with changes: the learning rate, the batch, mixup, and which parameters are trained. Each row measures the
divergence from the parent's output after training, and on the way between the weights before and after it, on the
images of the training and on 2,000 images of the training split that neither parent nor child has seen. Gains are
paired, image by image, with standard errors. No test image is read.
"""

import argparse
import copy
import datetime
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from campaign import HALF, pictures
from joint import divergences
from torch import Tensor, nn

import vitrim
from vitrim import methods
from vitrim.cut.outputs import logits_of
from vitrim.cut.surgery import apply
from vitrim.data import Input, eval_loader, open_source
from vitrim.deploy import store
from vitrim.methods import Data
from vitrim.train import DISTILLED, Train, fit
from vitrim.words.budget import Budget
from vitrim.words.plain import load

ROWS: dict[str, dict[str, Any]] = {
    "as `--minutes`": {},
    "rate 5e-5": {"lr": 5e-5},
    "rate 1e-4": {"lr": 1e-4},
    "rate 1e-4, batch 64": {"lr": 1e-4, "batch": 64},
    "mixup": {"mixup": 1.0},
    "mixup, rate 5e-5": {"mixup": 1.0, "lr": 5e-5},
    "norms and biases, rate 2e-4": {"lr": 2e-4},
    "norms and biases, rate 1e-3": {"lr": 1e-3},
}
WAYS = (0.25, 0.5, 0.75, 1.0)
SEEN, OTHERS = 1000, 2000


def others(data: Path, folder: Path) -> Path:
    """Write images that the campaign does not use, once; return their folder."""
    place = folder / "others"
    if not place.exists():
        for number, (picture, label) in enumerate(pictures(sorted(data.glob("cifar10_train_*.npz"))[-1])):
            if number == OTHERS:
                break
            here = place / str(label)
            here.mkdir(parents=True, exist_ok=True)
            picture.save(here / f"{number:05d}.png")
    return place


class Bench:
    """The parent, its child, and the images."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.steps, self.seed = args.steps, args.seed
        self.parent = store.load(args.campaign / "parent.safetensors").eval()
        self.input = Input.of(self.parent, mean=HALF, std=HALF)
        train = open_source(f"{args.campaign / 'images'}:train")
        order = np.random.default_rng(args.seed).permutation(len(train))[:SEEN]
        seen, probe = np.concatenate([order[:256], order[336:]]), order[256:336]
        self.train = train.pick(np.sort(seen))
        data = Data(
            train=None,
            calibration=train.pick(np.sort(order[:256])),
            validation=train.pick(np.sort(probe)),
            input=self.input,
        )
        found = methods.get("post_training", {"probe": len(probe)}).search(
            self.parent, data, Budget.parse(args.budget), seed=args.seed
        )
        self.child = apply(found.parent, found.plan, grafts=found.grafts).eval()
        self.sides = {
            "seen": self._images(self.train),
            "others": self._images(open_source(str(others(args.data, args.campaign)))),
        }
        self.dense = {side: logits_of(self.parent, images) for side, images in self.sides.items()}
        self.before = {side: self.apart(self.child, side) for side in self.sides}

    def _images(self, images: Any) -> list[Tensor]:
        return [x for x, _ in eval_loader(images, self.input, batch=100)]

    def apart(self, model: nn.Module, side: str) -> Tensor:
        """The divergence of each image's output from the parent's."""
        return divergences(self.dense[side], logits_of(model.eval(), self.sides[side]))

    def record(self, row: str) -> dict[str, Any]:
        """Train as a row says, and measure on the way to the result."""
        settings = load(Train, {**DISTILLED, "epochs": self.steps * 16 / len(self.train), **ROWS[row]})
        trained = copy.deepcopy(self.child)
        for parameter in trained.parameters():
            parameter.requires_grad_(parameter.dim() == 1 or "norms" not in row)
        fit(trained, self.train, settings, input=self.input, seed=self.seed, teacher=self.parent)
        ends = [dict(model.named_parameters()) for model in (self.child, copy.deepcopy(trained))]
        told: dict[str, Any] = {"row": row, **{f"{side}_before": float(x.mean()) for side, x in self.before.items()}}
        for way in WAYS:
            with torch.no_grad():
                for name, parameter in trained.named_parameters():
                    parameter.copy_(torch.lerp(ends[0][name], ends[1][name], way))
            for side, before in self.before.items():
                gain = before - self.apart(trained, side)
                told |= {f"{side}_{way:g}": float(gain.mean()), f"{side}_{way:g}_error": error_of(gain)}
        return told


def error_of(values: Tensor) -> float:
    return float(values.std()) / len(values) ** 0.5


def table(lines: Sequence[dict[str, Any]]) -> str:
    """The records as Markdown."""
    ways = " | ".join(f"gain at {way:g}" for way in WAYS)
    text = [f"| training | divergence before | {ways} | on the images of the training |"]
    text.append("| --- | ---: |" + " ---: |" * (len(WAYS) + 1))
    for line in lines:
        gains = [f"{line[f'others_{way:g}']:+.4f} ± {line[f'others_{way:g}_error']:.4f}" for way in WAYS]
        seen = f"{line['seen_before']:.4f}, {line['seen_1']:+.4f}"
        text.append(f"| {line['row']} | {line['others_before']:.4f} | {' | '.join(gains)} | {seen} |")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--campaign", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--budget", default="macs=0.5")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", type=Path)
    args = parser.parse_args()
    if args.table is not None:
        print(table([json.loads(line) for line in args.table.read_text(encoding="utf-8").splitlines()]))
        return
    if None in (args.data, args.campaign, args.out):
        parser.error("DATA, --campaign and --out must be given, or --table FILE.jsonl")
    bench = Bench(args)
    about = {
        "budget": args.budget, "steps": args.steps, "seed": args.seed, "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(), "vitrim": vitrim.__version__,
        "torch": torch.__version__, "timm": timm.__version__, "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    for row in args.rows:
        line = bench.record(row) | about
        with args.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
