"""Export models to files of other runtimes, each compared with eager PyTorch before the file is written.

The kinds of files are those of `vitrim.deploy.writers`. Every size but the batch, token counts included, is a constant
of the file; the batch is dynamic where the runtime supports it.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.cut.optimized import optimized
from vitrim.cut.surgery import fold
from vitrim.deploy.quiet import quiet
from vitrim.deploy.writers import LOGGERS, WRITERS, Opened, Program, need, onnx_session
from vitrim.families import describe
from vitrim.measure.model import home_of, image_of
from vitrim.nn import fold_steps_
from vitrim.nn.copying import copied
from vitrim.nn.parity import TOLERANCES, features_of, relative, tells_images_apart
from vitrim.nn.weights import why_not_held
from vitrim.words.errors import ExportError, VitrimError
from vitrim.words.plain import Node, followed, reason, writing

__all__ = [
    "OLDEST_OPSET",
    "OPSET",
    "PARITY",
    "Exported",
    "beside",
    "check_target",
    "export",
    "files_of",
    "onnx_session",
    "program_of",
]

OPSET = 20
"""The first operator set that has GELU as one operator."""

OLDEST_OPSET = 18
"""The oldest that PyTorch's exporter writes directly; a conversion to an older one would not be checked."""

PARITY = TOLERANCES["export"][torch.float32]
"""Allowed difference of logits, relative to the largest logit."""

_BATCHES = (1, 3, 5)


class Exported(Node):
    """The exported file, and how close it is to eager PyTorch.

    `apart` is the largest difference of a logit from eager's over batches of 1, 3 and 5 (or the fixed batch), relative
    to the largest logit; None if the runtime of the file does not run on this platform. `batch` is None if the file
    takes any batch. `bytes` counts all files.
    """

    path: str
    kind: str
    opset: int | None
    bytes: int
    apart: float | None
    batch: int | None = None
    image: tuple[int, int, int]
    torch: str
    runtime: str


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    opset: int = OPSET,
    batch: int | None = None,
    as_stored: bool = False,
    to_quantize: bool = False,
) -> Exported:
    """Export `model` in the form of `vitrim.deploy.optimized`; the model is not modified.

    Args:
        model: an adopted model, in any mode and on any device; it is exported in evaluation mode, in float32, on CPU.
        path: ``….onnx`` for ONNX, ``….pt2`` for torch.export, ``….xml`` for OpenVINO (with a ``….bin`` file beside it),
            ``….pte`` for ExecuTorch (XNNPACK), ``….mlpackage`` (a folder) for Core ML.
        opset: ONNX operator set, at least 18.
        batch: number of images that the file takes, at least 1; if None, any number for ONNX, torch.export and
            OpenVINO, and one for ExecuTorch and Core ML.
        as_stored: whether the file contains the layers as they are stored instead, with convolutions and merges folded.
        to_quantize: whether the file will be quantized to eight bits (`vitrim.deploy.optimized` with ``torch.int8``).

    Raises:
        ExportError: if a package is missing, the opset is too old, the batch is not possible, the file cannot be
            written, the model cannot be traced, or the file's logits differ from the eager model's by more than 1e-4
            of the largest. If the logits are the same for all images, the features are compared instead. Nothing is
            written in these cases.
    """
    file = check_target(path, opset, batch)
    writer = WRITERS[file.suffix]
    fixed = writer.batch if batch is None else batch
    still = _still(model)
    image = image_of(still)
    form = _form(still, as_stored, to_quantize)

    def write(net: nn.Module, part: Path) -> Opened:
        return writer.write(_traced(net, image, fixed), part, opset)

    with beside(file) as part:
        opened = write(form, part)
        worst = None
        if opened.run is not None:
            batches = _BATCHES if fixed is None else (fixed,)
            worst, told = _compare("logits", still, opened.run, image, batches)
            if not told:
                _check_features(still, form, write, part.with_name(f"features{part.suffix}"), batches)
        size = sum(entry.stat().st_size for entry in files_of(part))
    return Exported(
        path=str(file),
        kind=writer.kind,
        opset=opset if writer.kind == "onnx" else None,
        bytes=size,
        apart=worst,
        batch=fixed,
        image=image,
        torch=torch.__version__,
        runtime=opened.runtime,
    )


def check_target(path: str | os.PathLike[str], opset: int = OPSET, batch: int | None = None) -> Path:
    """Raise an error if a file could not be written, before the work that produces it; return its path.

    Raises:
        ExportError: if the kind is unknown, a package is missing, the opset is too old, the batch is below 1, or the
            file is not writable.
    """
    file = Path(path)
    writer = WRITERS.get(file.suffix)
    if writer is None:
        raise ExportError(f"a file to export to must end in {' or '.join(WRITERS)}, but got '{file.name}'")
    if opset < OLDEST_OPSET:
        raise ExportError(f"opset must be at least {OLDEST_OPSET}, but got {opset}; leave it out for {OPSET}")
    if batch is not None and batch < 1:
        raise ExportError(f"batch must be at least 1, but got {batch}; leave it out for the default")
    need(*writer.packages, extra=writer.extra)
    if file.is_dir() and not writer.folder:
        raise ExportError(f"{file}: a file must be named to write to, but this is a folder; name a file in it")
    if file.exists() and writer.folder:
        raise ExportError(f"{file}: the folder of a model must be new, but it exists; remove it or name another")
    try:
        with tempfile.TemporaryFile(dir=followed(file).parent):
            pass
    except OSError as problem:
        raise _unwritable(file, problem) from None
    return file


def _unwritable(file: Path, problem: OSError) -> ExportError:
    return ExportError(f"{file}: must be writable, but is not: {reason(problem)}; choose another place")


def _still(model: nn.Module) -> nn.Module:
    """Return a copy to trace: evaluation mode, float32, CPU."""
    describe(model)
    missing = why_not_held(model)
    if missing is not None:
        raise ExportError(missing)
    place, kind = home_of(model)
    twin = copied(model)
    return (twin if (place.type, kind) == ("cpu", torch.float32) else twin.to("cpu", torch.float32)).eval()


def _form(still: nn.Module, as_stored: bool, to_quantize: bool) -> nn.Module:
    """Return the form of a model that is written."""
    if as_stored:
        return fold(fold_steps_(copied(still))).eval()
    return optimized(still, dtype=torch.int8 if to_quantize else None)


def program_of(model: nn.Module, *, batch: int | None, as_stored: bool, to_quantize: bool) -> Program:
    """Return the program of a model in the form that is written; see `export` for the arguments."""
    still = _still(model)
    return _traced(_form(still, as_stored, to_quantize), image_of(still), batch)


def _traced(model: nn.Module, image: tuple[int, int, int], batch: int | None) -> Program:
    # An example of one image would make the batch a constant.
    example = torch.zeros(3 if batch is None else batch, *image)
    dims = None if batch is not None else ({0: torch.export.Dim("batch", min=1, max=4096)},)
    try:
        with torch.no_grad(), quiet(*LOGGERS):
            return _without_places(torch.export.export(model, (example,), dynamic_shapes=dims, strict=False))
    except Exception as problem:
        # The exporter passes on any exception of an operator that it cannot trace.
        raise ExportError(
            f"the model must be traceable, but torch.export says: {reason(problem)}; please report it"
        ) from problem


def _without_places(program: Program) -> Program:
    """Take out of a program the lines of source that each operator came from: they name folders of this machine."""
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
    return program


@torch.no_grad()
def _compare(
    what: str,
    eager: Callable[[Tensor], Any],
    run: Callable[[Tensor], Tensor],
    image: tuple[int, int, int],
    batches: Sequence[int],
) -> tuple[float, bool]:
    """Compare the outputs of a file with eager PyTorch's on random images.

    Returns:
        The largest relative difference, and whether the eager outputs vary from image to image.

    Raises:
        ExportError: if the difference is too large, or not finite.
    """
    generator, worst, told = torch.Generator().manual_seed(0), 0.0, False
    for count in batches:
        images = torch.randn(count, *image, generator=generator)
        want, got = eager(images), run(images)
        if got.shape != want.shape:
            raise ExportError(f"{what} must keep the shape {tuple(want.shape)}, but have {tuple(got.shape)}")
        apart = relative(got, want)
        if not apart <= PARITY:
            raise ExportError(
                f"{what} must stay within {PARITY:.0e} of eager's, but differ by {apart:.1e} in a batch of {count}; "
                "please report this model"
            )
        worst, told = max(worst, apart), told or tells_images_apart(want, PARITY)
    return worst, told


class _Features(nn.Module):
    """A model up to its head."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        """Return the features that the head reads."""
        features = features_of(self.model)
        assert features is not None
        return features(x)


def _check_features(
    still: nn.Module, form: nn.Module, write: Callable[[nn.Module, Path], Opened], part: Path, batches: Sequence[int]
) -> None:
    """Export and compare the features too, because with a head of zeros any features give the same logits.

    Raises:
        ExportError: if they differ.
    """
    wanted = features_of(still)
    if wanted is None:
        return
    run = write(_Features(form).eval(), part).run
    assert run is not None
    _compare("features", wanted, run, image_of(still), batches)


@contextlib.contextmanager
def beside(file: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, which is renamed to `file` on success.

    Files that are written beside the temporary path with its stem (the weights of OpenVINO) are moved with it.

    Raises:
        ExportError: if the file cannot be written. Other errors pass, also those about other files.
    """
    folders = file.suffix in WRITERS and WRITERS[file.suffix].folder
    target = contextlib.nullcontext(followed(file)) if folders else writing(file)
    try:
        with (
            target as place,
            tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{file.name}.") as folder,
        ):
            part = Path(folder) / file.name
            yield part
            for other in files_of(part, inside=False):
                if other != part:
                    other.replace(followed(file.with_name(other.name)))
            part.replace(place)
    except OSError as problem:
        if isinstance(problem, VitrimError) or not _is_about(problem, file):
            raise
        raise _unwritable(file, problem) from problem


def files_of(part: Path, *, inside: bool = True) -> list[Path]:
    """Return the files of an export: `part` and those with its stem, or all files in it if it is a folder."""
    if part.is_dir():
        return [path for path in part.rglob("*") if path.is_file()] if inside else [part]
    return sorted(path for path in part.parent.glob(f"{part.stem}.*") if path.is_file())


def _is_about(problem: OSError, file: Path) -> bool:
    """Return whether an error concerns the folder of `file`, or names no file (as for a full disk)."""
    if problem.errno is None:
        return False
    return problem.filename is None or Path(os.fsdecode(problem.filename)).is_relative_to(followed(file).parent)
