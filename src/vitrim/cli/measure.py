"""The commands that measure a model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from vitrim.cli.shared import (
    Channels,
    Classes,
    ImageSize,
    Random,
    Settings,
    Weights,
    WeightsKey,
    app,
    model_table,
    read,
    say,
    show_table,
    warn,
)
from vitrim.cli.transfer import scored
from vitrim.words.errors import RecipeError, RunError

if TYPE_CHECKING:
    import torch


@app.command()
def evaluate(
    model: Annotated[
        str, typer.Argument(help="A timm name, an hf-hub: name, a stored file, or a folder of transformers.")
    ],
    data: Annotated[str, typer.Option("--data", help="Images to measure on; the test split if the source has splits.")],
    weights: Weights = None,
    weights_key: WeightsKey = None,
    random_weights: Random = False,
    image_size: ImageSize = None,
    classes: Classes = None,
    channels: Channels = None,
    set_: Settings = None,
) -> None:
    """Measure the top-1 accuracy of a model, or the mean IoU of a segmentation model on the scenes of --data."""
    from vitrim import measure
    from vitrim.data import Input, eval_loader
    from vitrim.deploy.parent import open_parent
    from vitrim.families import describe
    from vitrim.nn.weights import fingerprint
    from vitrim.report.tables import percent
    from vitrim.run.images import open_test
    from vitrim.run.machine import device_of
    from vitrim.run.recipe import DataRecipe, ModelRecipe, merged, overrides
    from vitrim.run.remarks import chance_of, standard_error, why_at_chance
    from vitrim.train import evaluate as evaluate_model
    from vitrim.train import ranks
    from vitrim.train.leading import check_alike
    from vitrim.words.plain import dump

    ranks.join()
    asked = {
        "model": model_table(model, weights, weights_key, random_weights, image_size, classes, channels),
        "data": {"test": data},
    }
    asked = merged(asked, overrides(set_ or [], asked))
    named = read(ModelRecipe, asked.pop("model"), at="recipe.model")
    source = read(DataRecipe, asked.pop("data"), at="recipe.data")
    if asked:
        raise RecipeError(f"a setting of evaluate must be of model or data, but got '{next(iter(asked))}'")
    net = open_parent(**dump(named), say=say)
    spec = describe(net)
    if ranks.count() > 1:
        check_alike({"model": fingerprint(net)})
    if spec.family == "segmentor":
        scored(net, model, data, source)
        return
    chosen = {key: value for key in ("mean", "std") if (value := getattr(source, key)) is not None}
    net = net.to(device_of("auto"))
    input = Input.of(net, **chosen)
    images = open_test(source, data, model=net, input=input, classes=spec.classes, say=say)
    if ranks.count() > 1:
        check_alike({"images": images.fingerprint()})
    place, mine = next(net.parameters()).device, ranks.part(len(images))
    found = evaluate_model(net, eval_loader(images, input, workers="auto", device=place, places=mine), shared=True)
    error = standard_error(found.top1, found.count)
    cost = measure.cost(spec)
    rows = [
        [
            model,
            f"{cost.macs / 1e9:.4f} G",
            f"{cost.params / 1e6:.3f} M",
            percent(found.top1, 2) + ("" if error is None else f" \N{PLUS-MINUS SIGN} {error:.2f}"),
            percent(found.top5, 2),
            str(found.count),
        ]
    ]
    show_table("", ["model", "MACs", "parameters", "top-1", "top-5", "images"], rows)
    chance = None if found.top1 is None else chance_of(images.labels)
    if (reason := why_at_chance(found.top1, chance, found.count)) is not None:
        warn(
            f"the model cannot classify these images: {reason}; check its weights, the numbers of the classes "
            "(data.class_order, data.class_map) and the normalization (data.mean, data.std)"
        )


@app.command()
def bench(
    models: Annotated[
        list[str], typer.Argument(help="Timm names, hf-hub: names, files that vitrim stored, or ONNX files.")
    ],
    reference: Annotated[
        str | None, typer.Option("--reference", help="A model to compare with, timed in turns with the first.")
    ] = None,
    runtimes: Annotated[
        str | None,
        typer.Option("--runtimes", help="eager, compile, cudagraph, onnxruntime, openvino; separate with commas."),
    ] = None,
    batch: Annotated[str, typer.Option("--batch", help="Images per batch; separate several with commas.")] = "8",
    threads: Annotated[int | None, typer.Option("--threads", min=1)] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, or mps.")] = None,
    seconds: Annotated[float, typer.Option("--seconds", min=0.1, help="Seconds to spend on each batch size.")] = 8.0,
    memory: Annotated[
        bool, typer.Option("--memory", help="Also measure peak memory, each model in its own process.")
    ] = False,
    as_stored: Annotated[
        bool,
        typer.Option("--as-stored", help="Time the layers as stored, instead of the form optimized for inference."),
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="JSON file to write, with a figure (.svg) of the same name.")
    ] = None,
) -> None:
    """Time models in turns and compare each with the first; models given by timm name get random weights."""
    import torch

    from vitrim.run.machine import device_of

    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in kinds:
        raise RecipeError(f"dtype must be one of {', '.join(kinds)}, but got '{dtype}'")
    place = device_of(device) if device is not None else None
    batches = [_whole(part) for part in batch.split(",")]
    if len(models) == 1 and runtimes is None and len(batches) == 1 and out is None and not memory:
        _pair(models[0], reference, batches[0], threads, kinds[dtype], place, seconds, as_stored)
        return
    if reference is not None:
        models = [reference, *models]
    _many(models, runtimes or "eager", batches, threads, kinds[dtype], place, seconds, memory, as_stored, out)


def _whole(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise RecipeError(f"batch must be whole numbers of at least 1, joined by commas, but got '{text.strip()}'")
    return int(text)


def _pair(
    model: str,
    reference: str | None,
    batch: int,
    threads: int | None,
    dtype: "torch.dtype",
    place: "torch.device | None",
    seconds: float,
    as_stored: bool,
) -> None:
    from vitrim import measure
    from vitrim.deploy.parent import has_weights, open_parent

    nets = [open_parent(name, random_weights=not has_weights(name)) for name in (model, reference) if name]
    taken = measure.latency(
        *nets, batch=batch, threads=threads, dtype=dtype, device=place, seconds=seconds, as_stored=as_stored
    )
    rows = [_row(model, batch, taken.seconds, taken.seconds_low, taken.seconds_high)]
    if reference is not None and taken.reference_seconds is not None:
        low, high = taken.reference_seconds_low or 0.0, taken.reference_seconds_high or 0.0
        rows.append(_row(reference, batch, taken.reference_seconds, low, high))
    show_table("", ["model", f"batch of {batch}", "10 - 90 %", "images/s"], rows)
    if taken.ratio is not None:
        Console().print(f"ratio {taken.ratio:.3f} ({taken.ratio_low:.3f} - {taken.ratio_high:.3f})", highlight=False)
    versions = f"torch {taken.torch}, timm {taken.timm}"
    say(f"{taken.device}, {taken.threads} threads, {taken.dtype}, {versions}, {taken.runs} runs")


def _row(name: str, batch: int, middle: float, low: float, high: float) -> list[str]:
    return [name, f"{1e3 * middle:.2f} ms", f"{1e3 * low:.2f} - {1e3 * high:.2f}", f"{batch / middle:.1f}"]


def _many(
    names: list[str],
    runtimes: str,
    batches: list[int],
    threads: int | None,
    dtype: "torch.dtype",
    place: "torch.device | None",
    seconds: float,
    memory: bool,
    as_stored: bool,
    out: Path | None,
) -> None:
    from vitrim.deploy.bench import bench as measured
    from vitrim.deploy.bench import write
    from vitrim.deploy.parent import has_weights, open_parent
    from vitrim.deploy.runtimes import check_runtimes
    from vitrim.report import names_apart
    from vitrim.words.plain import check_place

    asked = [part.strip() for part in runtimes.split(",")]
    check_runtimes(asked)
    if out is not None:
        check_place(out, RunError)
    if len(set(names)) < len(names):
        raise RecipeError(f"each model must be given once, but got {', '.join(names)}; leave one out")
    nets = {
        short: Path(name) if name.endswith(".onnx") else open_parent(name, random_weights=not has_weights(name))
        for short, name in zip(names_apart(names), names, strict=True)
    }
    found = measured(
        nets, runtimes=asked, batches=batches, threads=threads, dtype=dtype, device=place or "cpu", seconds=seconds,
        memory=memory, as_stored=as_stored, say=say,
    )  # fmt: skip
    for size in batches:
        rows = [
            [
                line.runtime,
                *_row(line.model, line.batch, line.seconds, line.seconds_low, line.seconds_high),
                "-" if line.ratio is None else f"{line.ratio:.3f} ({line.ratio_low:.3f} - {line.ratio_high:.3f})",
                f"{line.bytes / 1e6:.1f} MB",
                *(["-" if line.peak_bytes is None else f"{line.peak_bytes / 1e6:.0f} MB"] if memory else []),
            ]
            for line in found.lines
            if line.batch == size
        ]
        head = ["runtime", "model", f"batch of {size}", "10 - 90 %", "images/s", f"of {next(iter(nets))}", "on disk"]
        show_table("", [*head, *(["peak memory"] if memory else [])], rows)
    say(f"{found.device}, {found.threads} threads, {found.dtype}, {', '.join(found.versions.values())}")
    if out is not None:
        write(found, out)
        say(f"wrote {out} and {out.with_suffix('.svg')}")
