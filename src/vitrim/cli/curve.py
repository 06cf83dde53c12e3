"""The command that makes a series of smaller models, one for each budget."""

from pathlib import Path
from typing import Annotated, Any

import typer

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
    say,
    show_table,
    warn,
)
from vitrim.words.errors import RunError


@app.command()
def pareto(
    model: Annotated[
        str, typer.Argument(help="A timm name, an hf-hub: name, a stored file, or a folder of transformers.")
    ],
    data: Annotated[str, typer.Option("--data", help="Images to calibrate on; no labels are needed.")],
    out: Annotated[
        Path, typer.Option("--out", help="Folder to write; further budgets are added to those already in it.")
    ],
    test: Annotated[
        str | None, typer.Option("--test", help="Images to measure on; the calibration does not use them.")
    ] = None,
    budgets: Annotated[
        list[str] | None,
        typer.Option("--budgets", help="Budget of one model, such as macs=0.5; repeat the option for several."),
    ] = None,
    weights: Weights = None,
    weights_key: WeightsKey = None,
    random_weights: Random = False,
    image_size: ImageSize = None,
    classes: Classes = None,
    channels: Channels = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    set_: Settings = None,
) -> None:
    """Calibrate once, without labels or training, and cut one model for each budget."""
    from vitrim.report import warnings
    from vitrim.run.curve import BUDGETS
    from vitrim.run.curve import pareto as make
    from vitrim.run.recipe import merged, overrides

    asked: dict[str, Any] = {
        "model": model_table(model, weights, weights_key, random_weights, image_size, classes, channels),
        "data": {"train": data, "test": test},
        "seed": seed,
    }
    found = make(merged(asked, overrides(set_ or [], asked)), out, budgets or BUDGETS, say=say)
    rows = [_row(result.measured) for result in found.results]
    show_table(
        f"{model}, one calibration for all budgets", ["budget", "MACs", "top-1", "same answer", "latency", "s"], rows
    )
    for result in found.results:
        for text in warnings(result.measured):
            warn(f"{result.measured['budget']}: {text}")
    if found.failed:
        budget, why = found.failed[0]
        more = f", and {len(found.failed) - 1} more" if len(found.failed) > 1 else ""
        raise RunError(
            f"every budget must end well, but {budget} did not{more}: {why}; the calibration and the other budgets are "
            f"kept in {out}"
        )
    say(f"models, figure and report are in {out}; further budgets: --calibration {found.calibration}")


def _row(measured: dict[str, Any]) -> list[str]:
    def shown(name: str, form: str) -> str:
        value = measured.get(name)
        return "-" if value is None else format(value, form)

    return [
        str(measured["budget"]),
        shown("macs_ratio", ".3f"),
        shown("top1", ".2f"),
        shown("agreement", ".2f"),
        shown("latency_ratio", ".2f"),
        shown("seconds", ".0f"),
    ]
