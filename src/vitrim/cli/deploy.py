"""The commands that take a model elsewhere."""

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vitrim.cli.shared import Random, Settings, Weights, app, read, say, show_table
from vitrim.errors import DataError, ExportError, RecipeError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["export", "push"]


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A timm name, an hf-hub: name, or a file that vitrim stored.")],
    out: Annotated[Path, typer.Option("--out", help="File to write: .onnx, or .pt2 for torch.export.")],
    opset: Annotated[int | None, typer.Option("--opset", help="ONNX operator set; 20 by default.")] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Eight bits, by ONNX Runtime's static quantisation.")] = False,
    data: Annotated[str | None, typer.Option("--data", help="Images that --int8 calibrates on.")] = None,
    test: Annotated[str | None, typer.Option("--test", help="Images that --int8 is measured on.")] = None,
    weights: Weights = None,
    random_weights: Random = False,
    set_: Settings = None,
) -> None:
    """Write a model for another runtime, once its logits there are eager PyTorch's; or in int8, with its accuracy."""
    from vitrim.export import OPSET, check_target
    from vitrim.export import export as export_model
    from vitrim.parent import open_parent

    chosen = OPSET if opset is None else opset
    check_target(out, chosen)
    if int8 and data is None:
        raise DataError("int8 must be calibrated on images, but none are given; give --data SRC")
    if not int8 and (data is not None or test is not None or set_):
        raise ExportError("--data, --test and --set must go with --int8, but it is not given; leave them out or add it")
    net = open_parent(model, weights=weights, random_weights=random_weights)
    if int8:
        _int8(net, out, chosen, {"train": data, "test": test}, set_ or [])
        return
    done = export_model(net, out, opset=chosen)
    row = [done.path, f"{done.bytes / 1e6:.2f} MB", "-" if done.opset is None else str(done.opset), f"{done.apart:.1e}"]
    show_table("", ["file", "size", "opset", "logits apart"], [row])
    say(f"checked in {done.runtime}; the batch is dynamic, images are {'x'.join(map(str, done.image))}")


def _int8(net: "nn.Module", out: Path, opset: int, sources: dict[str, Any], settings: list[str]) -> None:
    from vitrim.data import Input, check_classes, eval_loader, split
    from vitrim.families import describe
    from vitrim.quantize import quantize
    from vitrim.recipe import DataRecipe, merged, overrides

    asked = merged({"data": sources}, overrides(settings))
    source = read(DataRecipe, asked.pop("data"), at="recipe.data")
    if asked:
        raise RecipeError(f"a setting of export must be of data, but got '{next(iter(asked))}'")
    classes = describe(net).classes
    known = split(
        source.train or "", source.test, calibration=source.calibration, validation=0, seed=0,
        class_map=source.class_map, classes=classes,
    )  # fmt: skip
    for part in (known.train, known.test):
        if part is not None:
            check_classes(part, classes)
    if known.calibration is None:
        raise DataError("int8 must be calibrated on images, but data.calibration is 0; leave it out for 256")
    fitting = Input.of(net, **{key: value for key in ("mean", "std") if (value := getattr(source, key)) is not None})
    test = None if known.test is None else eval_loader(known.test, fitting, batch=32)
    done = quantize(net, out, eval_loader(known.calibration, fitting, batch=8), test=test, opset=opset, say=say)
    rows = [
        ["size", f"{done.bytes_before / 1e6:.2f} MB", f"{done.bytes / 1e6:.2f} MB"],
        ["top-1", _percent(done.top1_before), _percent(done.top1)],
        ["same answer", "", _percent(done.agreement)],
    ]
    show_table(done.path, ["", "float32", "int8"], rows)
    where = f"{done.test_images} test images" if done.test_images else "the calibration images, which flatters"
    say(f"calibrated on {done.calibration_images} images, measured on {where}; opset {done.opset}, {done.runtime}")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"


@app.command()
def push(
    model: Annotated[str, typer.Argument(help="A run folder, or a file that vitrim stored.")],
    repository: Annotated[str, typer.Argument(help="owner/name on the Hugging Face Hub.")],
    licence: Annotated[
        str | None, typer.Option("--license", help="Of the parent's weights, such as apache-2.0; timm's by default.")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--folder", help="Write there what would be pushed, and push nothing.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the card and push nothing.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch to push to.")] = None,
) -> None:
    """Push a model to the Hub, with a card written from its run."""
    from vitrim.deliver import CARD
    from vitrim.deliver import push as deliver

    with tempfile.TemporaryDirectory(prefix="vitrim-push-") as scratch:
        place = Path(scratch) / "dry" if dry_run and folder is None else folder
        done = deliver(
            model, repository, licence=licence, folder=place, private=private, revision=revision, say=say
        )  # fmt: skip
        if dry_run and done.folder is not None:
            sys.stdout.write((done.folder / CARD).read_text(encoding="utf-8"))
    size = ", ".join(f"{name} ({count / 1e6:.2f} MB)" for name, count in done.files.items())
    say(f"{'would push' if done.folder is not None else 'pushed'} {size} to {repository}")
