"""The command that runs a grid of recipes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vitrim.cli.shared import Track, app, say, show_table
from vitrim.words.errors import RecipeError, RunError

if TYPE_CHECKING:
    from vitrim.run.sweep import Ended


@app.command()
def sweep(
    recipe: Annotated[Path, typer.Argument(help="A TOML recipe, or the name of one that `vitrim recipes` lists.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of all runs, also shared by several machines; by default runs/NAME."),
    ] = None,
    control: Annotated[
        bool, typer.Option("--control", help="Also train the uncut model alike, for each seed.")
    ] = False,
    jobs: Annotated[int, typer.Option("--jobs", min=1, help="Runs at a time on this machine.")] = 1,
    track: Track = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=A,B", help="A setting and its values; repeat it for a grid."),
    ] = None,
) -> None:
    """Run a recipe for every combination of settings; the same command resumes, or joins from another machine.

    A setting of a method goes to the methods that have it. Values with commas are quoted:
    --set 'budget="macs=0.5,params=0.5",macs=0.7'.
    """
    from vitrim.run.shipped import recipe_file
    from vitrim.run.sweep import sweep as run_all
    from vitrim.run.track import names_of
    from vitrim.words.plain import read_toml

    recipe = recipe_file(recipe)
    written = read_toml(recipe)
    if written.get("task") == "segmentation":
        raise RecipeError(f"{recipe}: a sweep must be of a compression recipe, but this is a segmentation recipe")
    found = run_all(
        written,
        set_ or [],
        out or Path("runs") / recipe.stem,
        control=control,
        jobs=jobs,
        at=str(recipe),
        track=names_of(track),
        say=say,
    )
    show_table(str(found.folder), ["run", "state"], [[one.name, _state(one)] for one in found.runs], left=True)
    failed = found.named("failed")
    if failed:
        more = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
        raise RunError(
            f"every run of a sweep must end well, but {failed[0].name} did not{more}: {failed[0].why}; the same "
            "command tries them again"
        )
    say(f"tables: vitrim report {found.folder} --out page.html --csv runs.csv --latex table.tex")


def _state(one: "Ended") -> str:
    return one.why if one.state == "failed" else {"done": "done", "elsewhere": "in work elsewhere"}[one.state]
