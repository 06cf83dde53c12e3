"""The commands that make a model smaller."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitrim.cli.shared import (
    Channels,
    Classes,
    ImageSize,
    Presets,
    Random,
    Settings,
    Source,
    Track,
    Weights,
    WeightsKey,
    app,
    laid,
    model_table,
    read,
    say,
    show_table,
    warn,
)
from vitrim.cli.transfer import transferred
from vitrim.words.errors import RecipeError

if TYPE_CHECKING:
    from vitrim.run.pipeline import Result


@app.command()
def compress(
    model: Annotated[
        str, typer.Argument(help="A timm name, an hf-hub: name, a stored file, or a folder of transformers.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Run folder to write; a stopped run continues from it.")],
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="A name from `vitrim methods`, or a .py file. Default: post_training, then --minutes where they help.",
        ),
    ] = None,
    budget: Annotated[
        str, typer.Option("--budget", help="macs=0.5, macs=2.3G, params=12M, latency=0.6, or several.")
    ] = "macs=0.5",
    data: Source = None,
    test: Annotated[str | None, typer.Option("--test", help="Images to measure on; no search uses them.")] = None,
    weights: Weights = None,
    weights_key: WeightsKey = None,
    random_weights: Random = False,
    image_size: ImageSize = None,
    classes: Classes = None,
    channels: Channels = None,
    epochs: Annotated[
        float | None, typer.Option("--epochs", help="Epochs to train the smaller model; 0 does not train.")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            "--minutes",
            min=0,
            help="Minutes to distill the smaller model from its parent, without labels. Default: 4 with the default "
            "method for budgets up to 0.5, else 0.",
        ),
    ] = None,
    recover: Annotated[
        str,
        typer.Option(
            "--recover",
            help="ridge: compensate for the cut in closed form; none; auto: ridge if nothing is trained afterwards.",
        ),
    ] = "auto",
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration", help="A calibration file that `vitrim pareto` wrote; sets --method post_training."
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    track: Track = None,
    preset: Presets = None,
    set_: Settings = None,
) -> None:
    """Make a model smaller and write a run folder."""
    from vitrim.run.defaults import minutes_for
    from vitrim.run.pipeline import run
    from vitrim.run.recipe import Recipe, merged, overrides
    from vitrim.run.track import names_of

    alone = method is None and calibration is None and data is not None and epochs is None and not preset
    if minutes is None and alone and not any(pair.startswith(("train.", "method.name=")) for pair in set_ or []):
        minutes = minutes_for(budget)
    minutes = minutes or None
    asked = {
        "model": model_table(model, weights, weights_key, random_weights, image_size, classes, channels),
        "data": {"train": data, "test": test},
        "method": _method(method, calibration),
        "budget": budget,
        "recover": recover,
        "train": {"epochs": epochs or 0} if minutes is None else {"minutes": minutes},
        "seed": seed,
    }
    more = {} if minutes is None else {"--minutes": _distilled(epochs)}
    recipe = read(Recipe, laid(merged(asked, overrides(set_ or [], asked)), preset, more))
    _show(run(recipe, out, say=say, track=names_of(track)))


def _method(name: str | None, calibration: Path | None) -> dict[str, str]:
    from vitrim.run.defaults import METHOD

    if calibration is None:
        return {"name": name or METHOD}
    if name not in (None, "post_training"):
        raise RecipeError(f"a calibration must be read by post_training, but --method is {name}; leave one of them out")
    return {"name": "post_training", "calibration": str(calibration)}


def _distilled(epochs: float | None) -> dict[str, Any]:
    """Return label-free distillation settings: divergence from the dense output, on images and their mirror images."""
    if epochs:
        raise RecipeError("training must be bounded by --epochs or by --minutes, but both are given; leave one out")
    from vitrim.train import DISTILLED

    return {"train": DISTILLED}


@app.command("run")
def run_(
    recipe: Annotated[Path, typer.Argument(help="A TOML recipe, or the name of one that `vitrim recipes` lists.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="Run folder; by default runs/NAME, or the folder of the recipe if that is a run folder."
        ),
    ] = None,
    track: Track = None,
    preset: Presets = None,
    set_: Settings = None,
) -> None:
    """Run a recipe."""
    from vitrim.run.pipeline import run
    from vitrim.run.recipe import Recipe, merged, overrides
    from vitrim.run.shipped import recipe_file
    from vitrim.run.track import names_of
    from vitrim.words.plain import read_toml

    recipe = recipe_file(recipe)
    written = read_toml(recipe)
    if written.get("task") == "segmentation":
        from vitrim.run.transfer import TransferRecipe

        if preset or track:
            what = "a preset" if preset else "a tracker"
            raise RecipeError(
                f"{recipe}: {what} must be used with a compression recipe, but this is a segmentation recipe"
            )
        whole = set(written) == set(TransferRecipe.model_fields)
        transferred(merged(written, overrides(set_ or [], written)), out or _folder(recipe, whole), at=str(recipe))
        return
    asked = read(Recipe, laid(merged(written, overrides(set_ or [], written)), preset), at=str(recipe))
    _show(run(asked, out or _folder(recipe, set(written) == set(Recipe.model_fields)), say=say, track=names_of(track)))


def _folder(recipe: Path, whole: bool) -> Path:
    """Return the default run folder.

    A recipe that contains every setting is a run folder's own, and its run continues in that folder.
    """
    return recipe.parent if recipe.name == "recipe.toml" and whole else Path("runs") / recipe.stem


def _show(result: "Result") -> None:
    from vitrim.report import result as side_by_side
    from vitrim.report import warnings

    measured = result.measured
    table = side_by_side(measured)
    show_table(f"{measured['model']}, {measured['method']} at {measured['budget']}", table.head, table.rows)
    for text in warnings(measured):
        warn(text)
    if result.folder is not None:
        say(f"model, plan, log and report are in {result.folder}")
