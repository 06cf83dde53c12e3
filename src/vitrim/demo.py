"""The demonstration ``make demo``: compress a model, on data that ships with scikit-learn.

Trains a small ViT on scikit-learn's 1,797 handwritten digits, compresses it with ViT-Slim to half its
multiply-accumulates, trains the child with its parent as teacher, and shows both side by side.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from rich.console import Console
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitrim.data import Augment, Input, split
from vitrim.deploy import store
from vitrim.families import adopt
from vitrim.report import result
from vitrim.run.pipeline import Result, run
from vitrim.run.recipe import DataRecipe, Measure, ModelRecipe, Recipe
from vitrim.train import Distill, Train, fit
from vitrim.words.plain import dump, load

__all__ = ["demo", "main", "small_vit"]

LIGHT = Augment(kind="light")

PARENT = Train(epochs=60, batch=64, lr=1e-3, warmup_epochs=3, weight_decay=0.05, smoothing=0.1, augment=LIGHT)

SEARCH = Train(
    epochs=10, batch=64, lr=3e-4, schedule="constant", weight_decay=1e-3, augment=LIGHT, distill=Distill(kind="soft")
)

CHILD = Train(
    epochs=25,
    batch=64,
    lr=5e-4,
    warmup_epochs=2,
    augment=LIGHT,
    distill=Distill(kind="soft", alpha=0.7, temperature=2.0),
)


def small_vit(seed: int) -> VisionTransformer:
    """Build a ViT for 32 x 32 digits: patch 8, width 96, depth 6, 3 heads, 12 M multiply-accumulates."""
    torch.manual_seed(seed)
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=96, depth=6, num_heads=3, num_classes=10, drop_path_rate=0.05
    )


def train_parent(
    path: Path, seed: int, build: Callable[[int], nn.Module] = small_vit, settings: Train = PARENT
) -> nn.Module:
    """Train the dense model and store it, or load it if the file already exists."""
    if path.is_file():
        return store.load(path)
    model = adopt(build(seed))
    splits = split("digits", validation=0, seed=seed)
    fitted = fit(model, splits.train, settings, input=Input.of(model), seed=seed, folder=path.with_suffix(""))
    store.save(fitted.model.eval(), path)
    return fitted.model


def recipe(
    parent: Path, budget: str, seed: int, method: str = "vit_slim", search: Train = SEARCH, child: Train = CHILD
) -> Recipe:
    """Return a recipe that compresses `parent` to `budget` and trains the child; all methods get the same training."""
    gates = {"train": dump(search), "gate_lr": 0.02}
    return load(
        Recipe,
        dump(
            Recipe(
                model=ModelRecipe(name=str(parent)),
                data=DataRecipe(train="digits", validation=0),
                method={"name": method, **(gates if method == "vit_slim" else {})},
                budget=budget,
                train=child,
                measure=Measure(batch=64, seconds=5),
                seed=seed,
            )
        ),
    )


def demo(out: Path, seed: int = 0, budget: str = "macs=0.5") -> Result:
    """Run the whole demonstration in the folder `out`."""
    console = Console(stderr=True)
    console.print(f"training a small ViT on digits for {PARENT.epochs:g} epochs", style="dim")
    out.mkdir(parents=True, exist_ok=True)
    parent = out / f"parent-{seed}.safetensors"
    train_parent(parent, seed)
    return run(
        recipe(parent, budget, seed), out / f"vit_slim-{seed}", say=lambda text: console.print(text, style="dim")
    )


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", default="macs=0.5")
    args = parser.parse_args()
    start = time.perf_counter()
    found = demo(args.out, args.seed, args.budget)
    from vitrim.cli.shared import show_table

    table = result(found.measured)
    show_table(f"digits, ViT-Slim at {args.budget}", table.head, table.rows)
    Console(stderr=True).print(
        f"[dim]timm {timm.__version__}, torch {torch.__version__}, {time.perf_counter() - start:.0f} s; "
        f"the report is {found.folder}/report.html[/dim]",
        highlight=False,
    )


if __name__ == "__main__":
    main()
