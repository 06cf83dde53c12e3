"""Code that all commands share: the app, common options, and the printing of tables and messages."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitrim.words.errors import RecipeError
from vitrim.words.launched import first
from vitrim.words.private import hide_passwords

__all__ = [
    "Channels",
    "Classes",
    "ImageSize",
    "Presets",
    "Random",
    "Settings",
    "Source",
    "Track",
    "Weights",
    "WeightsKey",
    "app",
    "laid",
    "model_table",
    "print_table",
    "read",
    "say",
    "show_table",
    "warn",
]

app = typer.Typer(
    name="vitrim",
    help="Compress a trained Vision Transformer into a smaller, faster, dense one.",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Weights = Annotated[
    str | None, typer.Option("--weights", help="Weights file for a timm name (safetensors or PyTorch).")
]
WeightsKey = Annotated[
    str | None, typer.Option("--weights-key", help="The state dict to use if the file has several, such as model_ema.")
]
ImageSize = Annotated[
    str | None,
    typer.Option(
        "--image-size", help="Image size in pixels, such as 256 or 224x320; position embeddings are resampled."
    ),
]
Classes = Annotated[int | None, typer.Option("--classes", min=0, help="Number of classes; 0 removes the head.")]
Channels = Annotated[int | None, typer.Option("--channels", min=1, help="Channels of an image.")]
Random = Annotated[bool, typer.Option("--random-weights", help="Use random weights for a timm model.")]
Source = Annotated[
    str | None,
    typer.Option(
        "--data", help="digits, a folder, a tar, torch/NAME, hfds/NAME or wds/FOLDER; add :SPLIT for one split."
    ),
]
Presets = Annotated[
    list[str] | None,
    typer.Option(
        "--preset", metavar="NAME", help="imagenet or finetune, see `vitrim recipes`; other options override it."
    ),
]
Track = Annotated[
    str | None, typer.Option("--track", help="Send the run to tensorboard, wandb, trackio, or several with commas.")
]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting of a recipe.")]


def model_table(
    name: str,
    weights: str | None,
    weights_key: str | None,
    random_weights: bool,
    image_size: str | None = None,
    classes: int | None = None,
    channels: int | None = None,
) -> dict[str, Any]:
    """Build the table ``model`` of a recipe from the options of a command.

    Raises:
        RecipeError: if the image size is neither one number nor two numbers joined by an x.
    """
    sides = [] if image_size is None else image_size.lower().split("x")
    if len(sides) > 2 or not all(side.strip().isdecimal() and int(side) for side in sides):
        raise RecipeError(f"an image size must look like 256 or 224x320, but got '{image_size}'")
    pixels: int | list[int] | None = [int(side) for side in sides] or None
    if len(sides) == 1:
        pixels = int(sides[0])
    given = {"img_size": pixels, "num_classes": classes, "in_chans": channels}
    return {
        "name": name,
        "weights": weights,
        "weights_key": weights_key,
        "random_weights": random_weights,
        "arguments": {key: value for key, value in given.items() if value is not None},
    }


def say(text: str) -> None:
    """Print a progress message to stderr; of several processes, the first does, as with all that is printed here."""
    if first():
        Console(stderr=True, soft_wrap=True).print(Text(hide_passwords(text), style="dim"))


def warn(text: str) -> None:
    """Print a highlighted warning to stderr."""
    if first():
        Console(stderr=True, soft_wrap=True).print(Text(f"warning: {hide_passwords(text)}", style="bold yellow"))


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: bool = False) -> None:
    """Print rows under a title; columns after the first are numbers, to the right, unless `left`."""
    table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number and not left else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    print_table(table)


def print_table(table: Table) -> None:
    """Print a table."""
    console = Console()
    # A file or pipe has no width, and programs that read it need unbroken rows.
    if first():
        (console if console.is_terminal else Console(width=10_000)).print(table)


def laid(
    asked: Mapping[str, Any], names: Sequence[str] | None, more: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Return `asked` merged over the presets called `names` and over `more`; see `vitrim.run.presets.laid_under`."""
    from vitrim.run.presets import laid_under, preset, remark

    presets = {**(more or {}), **{f"preset {name}": preset(name) for name in names or []}}
    told = remark(asked, {name: table for name, table in presets.items() if name not in (more or {})})
    if told is not None:
        say(told)
    return laid_under(asked, presets)


def read(kind: Any, data: Any, at: str = "recipe") -> Any:
    """Build a node from plain values; see `vitrim.words.plain.load`."""
    from vitrim.words.plain import load

    return load(kind, data, RecipeError, at=at)
