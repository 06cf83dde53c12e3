"""The commands that export a model, push it to the Hub, or convert what others released."""

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
    read,
    say,
    show_table,
)
from vitrim.cli.transfer import scenes_of, written_by
from vitrim.words.errors import DataError, ExportError, RecipeError

if TYPE_CHECKING:
    from torch import nn

    from vitrim.deploy.quantize import Quantized
    from vitrim.run.recipe import DataRecipe

__all__ = ["export", "push", "released"]


@app.command()
def export(
    model: Annotated[
        str, typer.Argument(help="A timm name, an hf-hub: name, a stored file, or a folder of transformers.")
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            help="File to write: .onnx, .pt2 (torch.export), .xml (OpenVINO), .pte (ExecuTorch), .mlpackage (Core ML).",
        ),
    ],
    opset: Annotated[int | None, typer.Option("--opset", help="ONNX operator set; 20 by default.")] = None,
    batch: Annotated[
        int | None,
        typer.Option("--batch", help="A fixed number of images, as TensorRT likes it; any number by default."),
    ] = None,
    as_stored: Annotated[
        bool,
        typer.Option("--as-stored", help="Keep the layers as stored, instead of the form optimized for inference."),
    ] = False,
    int8: Annotated[
        bool,
        typer.Option(
            "--int8", help="Quantize weights and activations to eight bits, calibrated on --data; .onnx, .xml, .pte."
        ),
    ] = False,
    int8_weights: Annotated[
        bool,
        typer.Option("--int8-weights", help="The weights of linear layers in eight bits, without calibration."),
    ] = False,
    data: Annotated[str | None, typer.Option("--data", help="Images to calibrate and to compare int8 on.")] = None,
    test: Annotated[str | None, typer.Option("--test", help="Images to measure the int8 model on.")] = None,
    weights: Weights = None,
    weights_key: WeightsKey = None,
    random_weights: Random = False,
    image_size: ImageSize = None,
    classes: Classes = None,
    channels: Channels = None,
    set_: Settings = None,
) -> None:
    """Export a model and check its logits against eager PyTorch, or quantize it to int8 and report its accuracy."""
    from vitrim.deploy.export import OPSET, check_target
    from vitrim.deploy.export import export as export_model
    from vitrim.deploy.parent import open_parent
    from vitrim.run.recipe import merged, overrides

    chosen = OPSET if opset is None else opset
    check_target(out, chosen, batch)
    if int8 and int8_weights:
        raise ExportError("--int8 and --int8-weights must not go together, but both are given; drop one")
    int8 = int8 or int8_weights
    if int8 and data is None:
        raise DataError("int8 must be calibrated and compared on images, but none are given; give --data SRC")
    if not int8 and (data is not None or test is not None or set_):
        raise ExportError("--data, --test and --set must go with --int8, but it is not given; leave them out or add it")
    if int8 and batch is not None:
        raise ExportError("--batch must not go with --int8, whose files take any batch, but both are given; drop one")
    asked = model_table(model, weights, weights_key, random_weights, image_size, classes, channels)
    net = open_parent(**asked, say=say)
    if int8:
        asked = merged({"data": {"train": data, "test": test}}, overrides(set_ or []))
        _int8(net, model, out, {"opset": chosen, "as_stored": as_stored, "weights_only": int8_weights}, asked)
        return
    done = export_model(net, out, opset=chosen, batch=batch, as_stored=as_stored)
    apart = "-" if done.apart is None else f"{done.apart:.1e}"
    row = [done.path, f"{done.bytes / 1e6:.2f} MB", "-" if done.opset is None else str(done.opset), apart]
    show_table("", ["file", "size", "opset", "logits apart"], [row])
    how = "written by" if done.apart is None else "checked in"
    images = f"any number of images of {'x'.join(map(str, done.image))}"
    if done.batch is not None:
        images = f"{done.batch} image{'s' if done.batch > 1 else ''} of {'x'.join(map(str, done.image))} at a time"
    say(f"{how} {done.runtime}; the file takes {images}")
    if done.apart is None:
        say(f"logits were not compared: {Path(done.path).suffix} files do not run on this platform")


def _int8(net: "nn.Module", name: str, out: Path, how: dict[str, Any], asked: dict[str, Any]) -> None:
    from vitrim.families import describe
    from vitrim.report.tables import percent
    from vitrim.run.recipe import DataRecipe

    source = read(DataRecipe, asked.pop("data"), at="recipe.data")
    if asked:
        raise RecipeError(f"a setting of export must be of data, but got '{next(iter(asked))}'")
    scenes = describe(net).family == "segmentor"
    done = (_int8_of_scenes if scenes else _int8_of_images)(net, name, out, how, source)
    rows = [
        ["size", f"{done.bytes_before / 1e6:.2f} MB", f"{done.bytes / 1e6:.2f} MB"],
        ["mean IoU", percent(done.miou_before, 2), percent(done.miou, 2)]
        if scenes
        else ["top-1", percent(done.top1_before, 2), percent(done.top1, 2)],
        ["same answer", "", percent(done.agreement, 2)],
    ]
    show_table(done.path, ["", "float32", "int8"], rows)
    how_done = "weights alone" if done.weights_only else f"calibrated on {done.calibration_images} images"
    opset = "" if done.opset is None else f"; opset {done.opset}"
    if done.agreement is None and done.top1 is None and done.miou is None:
        say(f"{how_done}; answers were not compared: {out.suffix} files do not run on this platform")
    else:
        where = "the training images" if done.weights_only else "the calibration images, which overstates agreement"
        where = f"{done.test_images} test images" if done.test_images else where
        say(f"{how_done}, answers compared on {where}{opset}")
    say(f"run by {done.runtime}")


def _int8_of_images(net: "nn.Module", name: str, out: Path, how: dict[str, Any], source: "DataRecipe") -> "Quantized":
    from vitrim.data import Input, eval_loader
    from vitrim.deploy.quantize import quantize
    from vitrim.families import describe
    from vitrim.run.images import open_splits

    fitting = Input.of(net, **{key: value for key in ("mean", "std") if (value := getattr(source, key)) is not None})
    known = open_splits(
        source, source.train, source.test, model=net, input=fitting, classes=describe(net).classes, seed=0,
        validation=0, say=say,
    )  # fmt: skip
    assert known is not None
    assert known.calibration is not None
    test = None if known.test is None else eval_loader(known.test, fitting, batch=32)
    return quantize(net, out, eval_loader(known.calibration, fitting, batch=8), test=test, say=say, **how)


def _int8_of_scenes(net: "nn.Module", name: str, out: Path, how: dict[str, Any], source: "DataRecipe") -> "Quantized":
    """Calibrate on crops of training scenes and measure in windows of the exported image size."""
    from vitrim.data import CALIBRATION, SceneAugment, SceneLoader
    from vitrim.deploy.quantize import quantize
    from vitrim.run.transfer import score

    recipe, fitting = written_by(net, name, source)
    train = scenes_of(source.train or "", recipe, "train")
    count = source.calibration or CALIBRATION
    stride = max(1, len(train) // count)
    some = train.pick(range(0, len(train), stride)[:count])
    plain = SceneAugment(ratio=(1.0, 1.0), hflip=0, distort=False)
    loader = SceneLoader(
        some, fitting, plain, batch=min(8, len(some)), seed=0, workers=0, rank=0, world=1, accumulate=1, even=False,
        device=None,
    )  # fmt: skip
    windows = recipe.test.model_copy(update={"mode": "slide"})
    test = None if source.test is None else scenes_of(source.test, recipe)
    return quantize(
        net,
        out,
        list(loader.epoch(0)),
        miou=None if test is None else lambda model: score(model, test, fitting, windows)[0].miou,
        say=say,
        **how,
    )


@app.command()
def push(
    model: Annotated[str, typer.Argument(help="A run folder, or a file that vitrim stored.")],
    repository: Annotated[str, typer.Argument(help="owner/name on the Hugging Face Hub.")],
    licence: Annotated[
        str | None,
        typer.Option(
            "--license", help="License of the parent's weights, such as apache-2.0; by default the one timm records."
        ),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--folder", help="Write the files to this folder instead of pushing them.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the model card and push nothing.")] = False,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch to push to.")] = None,
    also: Annotated[
        list[str] | None,
        typer.Option("--also", metavar="FORM", help="onnx or pt2 (torch.export): write the model in this form too."),
    ] = None,
) -> None:
    """Push a model to the Hugging Face Hub, with a model card written from its run."""
    from vitrim.deploy import push
    from vitrim.deploy.push import CARD

    with tempfile.TemporaryDirectory(prefix="vitrim-push-") as scratch:
        place = Path(scratch) / "dry" if dry_run and folder is None else folder
        done = push.push(
            model, repository, licence=licence, folder=place, private=private, revision=revision, also=also or (),
            say=say,
        )  # fmt: skip
        if dry_run and done.folder is not None:
            sys.stdout.write((done.folder / CARD).read_text(encoding="utf-8"))
    size = ", ".join(f"{name} ({count / 1e6:.2f} MB)" for name, count in done.files.items())
    say(f"{'would push' if done.folder is not None else 'pushed'} {size} to {repository}")


@app.command()
def released(
    model: Annotated[str, typer.Argument(help="The timm name of the dense model, such as deit_tiny_patch16_224.")],
    weights: Annotated[str, typer.Argument(help="A checkpoint of SPViT's authors: searched, fine-tuned or folded.")],
    out: Annotated[Path, typer.Option("--out", help="File to write, .safetensors.")],
    leaves: Annotated[
        Literal["zero", "norm"] | None,
        typer.Option(
            "--leaves",
            help="Output of a skipped attention, zero or norm. Default: zero for a searched file, else norm.",
        ),
    ] = None,
    fold: Annotated[
        bool, typer.Option("--fold", help="Fold mixtures and batch norms into plain layers, for use without training.")
    ] = False,
) -> None:
    """Convert a checkpoint that SPViT's authors released to a file that vitrim opens."""
    from vitrim.cut.surgery import fold as folded
    from vitrim.deploy import store
    from vitrim.deploy.parent import open_parent
    from vitrim.families import describe
    from vitrim.methods.spvit.released import open_released
    from vitrim.words.costs import cost_of
    from vitrim.words.errors import StoreError
    from vitrim.words.plain import check_place

    check_place(out, StoreError)
    open_parent(model, random_weights=True)  # says what is wrong with the name
    net = open_released(model, weights, leaves=leaves)
    net = folded(net) if fold else net
    store.save(net, out)
    cost = cost_of(describe(net))
    say(f"wrote {out}: {cost.macs / 1e9:.3f} G multiply-accumulates, {cost.params / 1e6:.3f} M parameters")
