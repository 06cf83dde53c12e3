"""The commands that measure a model."""

from typing import Annotated

import typer
from rich.console import Console

from vitrim.cli.shared import Random, Settings, Weights, app, read, say, show_table
from vitrim.cli.transfer import scored
from vitrim.errors import RecipeError


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A timm name, an hf-hub: name, or a file that vitrim stored.")],
    data: Annotated[str, typer.Option("--data", help="Images to measure on; of a divided source, its test split.")],
    weights: Weights = None,
    random_weights: Random = False,
    set_: Settings = None,
) -> None:
    """Measure top-1 of a model, or the mean IoU of a segmentor on the scenes of --data."""
    import torch

    from vitrim import measure
    from vitrim.data import Input, check_classes, eval_loader, open_source, splits_of
    from vitrim.families import describe
    from vitrim.parent import open_parent
    from vitrim.plain import dump
    from vitrim.recipe import DataRecipe, ModelRecipe, merged, overrides
    from vitrim.train import evaluate as evaluate_model

    asked = {
        "model": {"name": model, "weights": weights, "random_weights": random_weights},
        "data": {"test": data},
    }
    asked = merged(asked, overrides(set_ or []))
    named = read(ModelRecipe, asked.pop("model"), at="recipe.model")
    source = read(DataRecipe, asked.pop("data"), at="recipe.data")
    if asked:
        raise RecipeError(f"a setting of evaluate must be of model or data, but got '{next(iter(asked))}'")
    net = open_parent(**dump(named))
    spec = describe(net)
    if spec.family == "segmentor":
        scored(net, model, data, source)
        return
    known = splits_of(data)
    split = next((name for name in ("test", "validation") if name in known), None)
    images = open_source(data, split, class_map=source.class_map, classes=spec.classes)
    check_classes(images, spec.classes)
    chosen = {key: value for key in ("mean", "std") if (value := getattr(source, key)) is not None}
    net = net.to("cuda" if torch.cuda.is_available() else "cpu")
    found = evaluate_model(net, eval_loader(images, Input.of(net, **chosen)), classes=spec.classes)
    cost = measure.cost(spec)
    rows = [
        [
            model,
            f"{cost.macs / 1e9:.4f} G",
            f"{cost.params / 1e6:.3f} M",
            _percent(found.top1),
            _percent(found.top5),
            str(found.count),
        ]
    ]
    show_table("", ["model", "MACs", "parameters", "top-1", "top-5", "images"], rows)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="A timm name, an hf-hub: name, or a file that vitrim stored.")],
    reference: Annotated[str | None, typer.Option("--reference", help="A model to time in turns with.")] = None,
    batch: Annotated[int, typer.Option("--batch", min=1)] = 8,
    threads: Annotated[int | None, typer.Option("--threads", min=1)] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, mps.")] = None,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="Time to spend.")] = 8.0,
) -> None:
    """Time a model, in turns with another; timm names get random weights, which take as long."""
    import torch

    from vitrim import measure, store
    from vitrim.job import device_of
    from vitrim.parent import open_parent

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in kinds:
        raise RecipeError(f"dtype must be one of {', '.join(kinds)}, but got '{dtype}'")
    place = device_of(device) if device is not None else None
    nets = [open_parent(name, random_weights=not store.is_stored(name)) for name in (model, reference) if name]
    taken = measure.latency(*nets, batch=batch, threads=threads, dtype=kinds[dtype], device=place, seconds=seconds)
    rows = [
        [
            model,
            f"{1e3 * taken.seconds:.2f} ms",
            f"{1e3 * taken.seconds_low:.2f} - {1e3 * taken.seconds_high:.2f}",
            f"{taken.images_per_second:.1f}",
        ]
    ]
    if reference is not None and taken.reference_seconds is not None:
        low, high = taken.reference_seconds_low or 0.0, taken.reference_seconds_high or 0.0
        per_second = batch / taken.reference_seconds
        rows.append(
            [
                reference,
                f"{1e3 * taken.reference_seconds:.2f} ms",
                f"{1e3 * low:.2f} - {1e3 * high:.2f}",
                f"{per_second:.1f}",
            ]
        )
    show_table("", ["model", f"batch of {batch}", "10 - 90 %", "images/s"], rows)
    if taken.ratio is not None:
        Console().print(f"ratio {taken.ratio:.3f} ({taken.ratio_low:.3f} - {taken.ratio_high:.3f})", highlight=False)
    versions = f"torch {taken.torch}, timm {taken.timm}"
    say(f"{taken.device}, {taken.threads} threads, {taken.dtype}, {versions}, {taken.runs} runs")
