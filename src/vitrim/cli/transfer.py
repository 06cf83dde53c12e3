"""The commands that fine-tune a model for another task."""

from pathlib import Path
from typing import Annotated, Any

import typer

from vitrim.cli.shared import Random, Settings, Weights, WeightsKey, app, model_table, read, say, show_table
from vitrim.words.errors import RecipeError

__all__ = ["scored", "seg", "transferred"]

tasks = typer.Typer(help="Fine-tune a dense or compressed model for another task.", no_args_is_help=True)
app.add_typer(tasks, name="transfer")


@tasks.command()
def seg(
    backbone: Annotated[
        str,
        typer.Option("--backbone", help="A timm name, an hf-hub: name, a stored file, or a folder of transformers."),
    ],
    data: Annotated[str, typer.Option("--data", help="Folder or tar of images/, masks/ and classes.txt.")],
    out: Annotated[Path, typer.Option("--out", help="Run folder to write; a stopped run continues from it.")],
    head: Annotated[str, typer.Option("--head", help="fpn or linear.")] = "fpn",
    test: Annotated[
        str | None, typer.Option("--test", help="Scenes to measure on; by default those of --data.")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option("--ignore", help="A class of classes.txt to leave out of the score; repeatable.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option("--size", help="Height x width of crops, such as 512x512; by default the model's image size."),
    ] = None,
    weights: Weights = None,
    weights_key: WeightsKey = None,
    random_weights: Random = False,
    epochs: Annotated[float | None, typer.Option("--epochs", help="Epochs over the scenes; 20 by default.")] = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    set_: Settings = None,
) -> None:
    """Fine-tune a model for semantic segmentation and write a run folder."""
    from vitrim.run.recipe import merged, overrides
    from vitrim.run.transfer import TransferRecipe

    asked: dict[str, Any] = {
        "model": model_table(backbone, weights, weights_key, random_weights),
        "data": {"train": data, "test": test, "ignore": ignore or [], "size": _size(size)},
        "head": {"kind": head},
        "seed": seed,
    }
    if epochs is not None:
        asked["train"] = {"epochs": epochs}
    transferred(merged(asked, overrides(set_ or [], kind=TransferRecipe)), out)


def written_by(net: Any, name: str, over: Any) -> tuple[Any, Any]:
    """Return the recipe that a stored segmentation model was trained with, and its input; `over` sets mean and std."""
    from vitrim.data import Input
    from vitrim.deploy import store
    from vitrim.run.transfer import TransferRecipe

    written = store.given(name).get("recipe")
    if written is None:
        raise RecipeError(
            f"{name}: a segmentation model must say how its images are read, but this file holds no recipe; measure "
            "the model of a run folder"
        )
    recipe = read(TransferRecipe, written, name)
    given = {key: getattr(over, key) or getattr(recipe.data, key) for key in ("mean", "std")}
    return recipe, Input.of(net, **{key: value for key, value in given.items() if value is not None})


def scenes_of(source: str, recipe: Any, split: str | None = None) -> Any:
    """Return scenes with the classes of a recipe; the recipe's test split if `split` is None."""
    from vitrim.data import open_scenes, scene_splits

    wanted = (split or recipe.data.split) if scene_splits(source) else None
    return open_scenes(source, wanted, ignore=recipe.data.ignore)


def scored(net: Any, name: str, data: str, over: Any) -> None:
    """Measure a stored segmentation model with its recipe's settings, and print a row for each class."""
    from vitrim.report import class_table
    from vitrim.run.machine import device_of
    from vitrim.run.transfer import score
    from vitrim.run.transfer.score import by_class

    recipe, input = written_by(net, name, over)
    scenes = scenes_of(data, recipe)
    found, _ = score(net.to(device_of("auto")), scenes, input, recipe.test, shared=True)
    rows = [[name, f"{found.miou:.2f} %", f"{found.accuracy:.2f} %", str(found.scenes)]]
    show_table("", ["model", "mean IoU", "pixel accuracy", "scenes"], rows)
    table = class_table(by_class(found, scenes.names, [""] * scenes.classes))
    show_table("", table.head, table.rows)


def _size(text: str | None) -> list[str] | None:
    return None if text is None else text.lower().split("x")


def transferred(asked: dict[str, Any], out: Path, at: str = "recipe") -> None:
    """Run a transfer recipe given as plain values, and print the result."""
    from vitrim.report import class_table, segmented
    from vitrim.run.transfer import TransferRecipe, transfer

    done = transfer(read(TransferRecipe, asked, at), out, say=say)
    table = segmented(done.measured)
    show_table(f"{done.measured['model']}, head {done.measured['head']}", table.head, table.rows)
    classes = class_table(done.classes)
    show_table("", classes.head, classes.rows)
    say(f"model, log, pictures and report are in {done.folder}")
