"""The command line. Exit 0: done. Exit 1: failed, a bug of ours. Exit 2: a wrong request, told in one sentence.

Rooms are imported where they are used: `vitrim explain` answers before torch would have been read.
"""

import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vitrim import __version__
from vitrim.errors import RecipeError, VitrimError

if TYPE_CHECKING:
    from vitrim.run import Result

__all__ = ["app", "main"]

_INTERRUPTED = 130
"""What typer returns for ctrl-C, the shell's own number for it."""

app = typer.Typer(
    name="vitrim",
    help="Takes a trained Vision Transformer and gives back a smaller, really faster, dense one.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Weights = Annotated[
    str | None, typer.Option("--weights", help="Weights file for a timm name (safetensors or PyTorch).")
]
Random = Annotated[bool, typer.Option("--random-weights", help="Leave a timm model's weights random.")]
Source = Annotated[
    str | None, typer.Option("--data", help="digits, a folder, a tar, torch/NAME, hfds/NAME or wds/NAME.")
]
Settings = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting of a recipe.")]


def _say(text: str) -> None:
    Console(stderr=True, soft_wrap=True).print(Text(text, style="dim"))


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    _print(table)


def _print(table: Table) -> None:
    console = Console()
    # A file or pipe has no width, and what reads it wants rows whole.
    (console if console.is_terminal else Console(width=10_000)).print(table)


def _version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"vitrim {__version__}\n")
        raise typer.Exit


@app.callback()
def _start(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which version this is.")
    ] = False,
) -> None:
    pass


@app.command()
def compress(
    model: Annotated[str, typer.Argument(help="A timm name, an hf-hub: name, or a file that vitrim stored.")],
    out: Annotated[Path, typer.Option("--out", help="Run folder to write; a stopped run goes on there.")],
    method: Annotated[str, typer.Option("--method", help="See `vitrim methods`.")] = "taylor",
    budget: Annotated[str, typer.Option("--budget", help="macs=0.5, macs=2.3G, params=12M, or several.")] = "macs=0.5",
    data: Source = None,
    test: Annotated[str | None, typer.Option("--test", help="Images to measure on; no search sees them.")] = None,
    weights: Weights = None,
    random_weights: Random = False,
    epochs: Annotated[float, typer.Option("--epochs", help="Train the child so long; 0 cuts only.")] = 0,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    set_: Settings = None,
) -> None:
    """Make a model smaller and write a run folder."""
    from vitrim.recipe import Recipe, merged, overrides
    from vitrim.run import run

    asked = {
        "model": {"name": model, "weights": weights, "random_weights": random_weights},
        "data": {"train": data, "test": test},
        "method": {"name": method},
        "budget": budget,
        "train": {"epochs": epochs},
        "seed": seed,
    }
    recipe = _load(Recipe, merged(asked, overrides(set_ or [])))
    _show(run(recipe, out, say=_say))


@app.command("run")
def run_(
    recipe: Annotated[Path, typer.Argument(help="A TOML recipe.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Run folder; runs/NAME by default, or the recipe's own.")
    ] = None,
    set_: Settings = None,
) -> None:
    """Carry out a recipe."""
    from vitrim.plain import read_toml
    from vitrim.recipe import Recipe, merged, overrides
    from vitrim.run import run

    written = read_toml(recipe)
    asked = _load(Recipe, merged(written, overrides(set_ or [])), at=str(recipe))
    # A run folder's own recipe, which alone names every setting, goes on where it lies.
    whole = recipe.name == "recipe.toml" and set(written) == set(Recipe.model_fields)
    _show(run(asked, out or (recipe.parent if whole else Path("runs") / recipe.stem), say=_say))


def _load(kind: Any, data: Any, at: str = "recipe") -> Any:
    from vitrim.plain import load

    return load(kind, data, RecipeError, at=at)


def _show(result: "Result") -> None:
    from vitrim.report import result as side_by_side

    measured = result.measured
    table = side_by_side(measured)
    show_table(f"{measured['model']}, {measured['method']} at {measured['budget']}", table.head, table.rows)
    if result.folder is not None:
        _say(f"model, plan, log and report are in {result.folder}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A timm name, an hf-hub: name, or a file that vitrim stored.")],
    data: Annotated[str, typer.Option("--data", help="Images to measure on; of a divided source, its test split.")],
    weights: Weights = None,
    random_weights: Random = False,
    set_: Settings = None,
) -> None:
    """Measure top-1 of a model."""
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
    named = _load(ModelRecipe, asked.pop("model"), at="recipe.model")
    source = _load(DataRecipe, asked.pop("data"), at="recipe.data")
    if asked:
        raise RecipeError(f"a setting of evaluate must be of model or data, but got '{next(iter(asked))}'")
    net = open_parent(**dump(named))
    spec = describe(net)
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
def explain(plan: Annotated[Path, typer.Argument(help="plan.json of a run folder.")]) -> None:
    """Say what a plan keeps, block by block, and what that costs."""
    from vitrim.plan import read_plan
    from vitrim.report import plan_table

    table = plan_table(*read_plan(plan))
    show_table(str(plan), table.head, table.rows)


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
    _say(f"{taken.device}, {taken.threads} threads, {taken.dtype}, {versions}, {taken.runs} runs")


@app.command("report")
def report_(
    folders: Annotated[list[Path], typer.Argument(help="Run folders.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="HTML file; Markdown goes to the screen without it.")
    ] = None,
) -> None:
    """Report on run folders, as one HTML page or as Markdown."""
    from vitrim import report
    from vitrim.plain import write_text

    if out is None:
        sys.stdout.write(report.markdown(folders))
        return
    write_text(out, report.html(folders))
    _say(f"wrote {out}")


@app.command("methods")
def methods_() -> None:
    """List the methods and their settings."""
    from vitrim import methods

    rows = []
    for name in methods.names():
        kind: Any = methods.settings_of(name)
        rows.append([name, kind.needs, kind.sentence, ", ".join(f for f in kind.model_fields)])
    table = Table(box=None, pad_edge=False)
    for column in ("method", "needs", "what it does", "settings"):
        table.add_column(column)
    for row in rows:
        table.add_row(*map(Text, row))
    _print(table)


@app.command("models")
def models_(
    pattern: Annotated[str, typer.Argument(help="A timm name or a pattern such as 'deit*'.")] = "*",
    json_: Annotated[bool, typer.Option("--json", help="One JSON record a line.")] = False,
) -> None:
    """List the timm models that vitrim can cut, with their cost."""
    from vitrim.parent import guests

    rows = []
    for guest in guests(pattern):
        if json_:
            sys.stdout.write(json.dumps(guest) + "\n")
            continue
        cost = (
            [f"{guest['macs'] / 1e9:.4f} G", f"{guest['params'] / 1e6:.3f} M"]
            if guest["reason"] is None
            else ["-", "-"]
        )
        rows.append([str(guest["name"]), *cost, str(guest["reason"] or "yes")])
    if not json_:
        show_table("", ["model", "MACs", "parameters", "can be cut"], rows)


def main() -> None:
    """Run the command line and exit."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\..*|timm\..*")
    try:
        code = app(args=sys.argv[1:] or ["--help"], prog_name="vitrim", standalone_mode=False)
    except VitrimError as problem:
        _fail(str(problem))
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except Exception as problem:
        if not hasattr(problem, "format_message"):
            raise
        # A wrong option or argument.
        command = getattr(getattr(problem, "ctx", None), "command_path", "vitrim")
        _fail(f"{problem.format_message().rstrip('.')}; see `{command} --help`")
    if code == _INTERRUPTED:
        _fail("interrupted; the same command goes on from the last checkpoint")
    sys.exit(code)


def _fail(text: str) -> NoReturn:
    one_line = " ".join(text.split())
    Console(stderr=True, soft_wrap=True).print(Text.assemble(("error", "bold red"), " ", one_line))
    sys.exit(2)


if __name__ == "__main__":
    main()
