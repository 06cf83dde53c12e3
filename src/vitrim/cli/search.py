"""The command that runs one worker process of a shared search."""

from collections.abc import Mapping
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
    Weights,
    WeightsKey,
    app,
    laid,
    model_table,
    read,
    say,
    show_table,
)
from vitrim.words.errors import MethodError, RecipeError
from vitrim.words.parsing import shown

if TYPE_CHECKING:
    from vitrim.run.recipe import Recipe


@app.command()
def search(
    model: Annotated[str, typer.Argument(help="A recipe (a .toml or a name), or a model as for `vitrim compress`.")],
    storage: Annotated[
        str, typer.Option("--storage", help="sqlite:///FILE, mysql://..., postgresql://..., journal:///FILE.")
    ],
    budget: Annotated[str, typer.Option("--budget", help="macs=0.5, macs=2.3G, params=12M, or several.")] = "macs=0.5",
    method: Annotated[str, typer.Option("--method", help="A method that searches by trials.")] = "mdc",
    trials: Annotated[
        int | None, typer.Option("--trials", min=1, help="Total number of trials over all processes.")
    ] = None,
    data: Source = None,
    weights: Weights = None,
    weights_key: WeightsKey = None,
    random_weights: Random = False,
    image_size: ImageSize = None,
    classes: Classes = None,
    channels: Channels = None,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the best plan, written as plan.json.")] = None,
    preset: Presets = None,
    set_: Settings = None,
) -> None:
    """Search with several processes: each process that runs this command joins the study in the storage.

    The command ends when the study contains all trials. `vitrim compress --method mdc --set method.storage=URL` then
    cuts the model by the best plan.
    """
    from vitrim import methods
    from vitrim.run.recipe import Recipe, merged, overrides
    from vitrim.run.shipped import names, recipe_file
    from vitrim.words.plain import read_toml

    if model.endswith(".toml") or model in names("recipes"):
        asked = read_toml(recipe_file(Path(model)))
    else:
        asked = {
            "model": model_table(model, weights, weights_key, random_weights, image_size, classes, channels),
            "data": {"train": data},
            "method": {"name": method},
            "budget": budget,
            "seed": seed,
        }
    shared = {"storage": storage} | ({} if trials is None else {"trials": trials})
    asked = merged(asked, overrides(set_ or [], asked))
    table = asked.get("method", {})
    if not isinstance(table, Mapping):
        raise RecipeError(f"method: must be a table, such as method.name='mdc', but got {shown(table)}")
    name = table.get("name")
    if isinstance(name, str) and "storage" not in methods.settings_of(name).model_fields:
        raise MethodError(f"a shared search must use a method with trials, but {name} has none; use mdc")
    recipe = read(Recipe, laid(merged(asked, {"method": shared}), preset)).resolved()
    _run(recipe, out)


def _run(recipe: "Recipe", out: Path | None) -> None:
    from vitrim.methods import Data
    from vitrim.run.job import prepare
    from vitrim.train import ranks
    from vitrim.words.costs import cost_of
    from vitrim.words.plan import write_plan

    ranks.join()
    method = recipe.found_method()
    job = prepare(recipe, method, None, None, (recipe.data.train, None), say)
    if job.splits is None:
        raise RecipeError("a search must have images, but there are none; give --data SRC")
    parts = job.splits
    images = Data(train=parts.train, calibration=parts.calibration, validation=parts.validation, input=job.input)
    say(f"joining the search in {recipe.method['storage']}")
    found = method.search(job.parent, images, job.budget, seed=recipe.seed, teacher=job.parent)
    best: Mapping[str, Any] = next((trial for trial in found.trials if trial.get("best")), {})
    cost = cost_of(found.plan.child(job.spec))
    rows = [[str(best.get("trial", "-")), f"{best.get('score', 0.0):.4f}", f"{cost.macs / 1e9:.4f} G",
             f"{cost.params / 1e6:.3f} M"]]  # fmt: skip
    show_table(f"best of {len(found.trials)} trials", ["trial", "score", "MACs", "parameters"], rows)
    if out is not None and ranks.first():
        write_plan(out, job.spec, found.plan)
        say(f"wrote {out}")
