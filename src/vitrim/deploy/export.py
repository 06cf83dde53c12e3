"""Export models to ONNX and torch.export, each compared with eager PyTorch before the file is written.

B images. The batch is dynamic; every other size, token counts included, is a constant of the file.
"""

import contextlib
import copy
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.cut.optimized import optimized
from vitrim.cut.surgery import fold
from vitrim.deploy.quiet import quiet
from vitrim.families import describe
from vitrim.measure.model import home_of, image_of
from vitrim.nn import fold_steps_
from vitrim.nn.parity import TOLERANCES, features_of, relative, tells_images_apart
from vitrim.nn.weights import why_not_held
from vitrim.words.errors import ExportError, VitrimError
from vitrim.words.plain import Node, followed, reason, writing

__all__ = [
    "KINDS",
    "OLDEST_OPSET",
    "OPSET",
    "PARITY",
    "Exported",
    "beside",
    "check_target",
    "export",
    "need",
    "onnx_session",
]

KINDS = {".onnx": "onnx", ".pt2": "program"}
"""Kind of file by suffix."""

OPSET = 20
"""The first operator set that has GELU as one operator."""

OLDEST_OPSET = 18
"""The oldest that PyTorch's exporter writes directly; a conversion to an older one would not be checked."""

PARITY = TOLERANCES["export"][torch.float32]
"""Allowed difference of logits, relative to the largest logit."""

_BATCHES = (1, 3, 5)
_LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


class Exported(Node):
    """The exported file, and how close it is to eager PyTorch.

    `apart` is the largest difference of a logit from eager's over batches of 1, 3 and 5, relative to the largest logit.
    """

    path: str
    kind: str
    opset: int | None
    bytes: int
    apart: float
    image: tuple[int, int, int]
    torch: str
    runtime: str


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    opset: int = OPSET,
    as_stored: bool = False,
    to_quantize: bool = False,
) -> Exported:
    """Export `model` in the form of `vitrim.deploy.optimized`; the model is not modified.

    Args:
        model: an adopted model, in any mode and on any device; it is exported in evaluation mode, in float32, on CPU.
        path: ``….onnx`` for ONNX, ``….pt2`` for torch.export.
        opset: ONNX operator set, at least 18.
        as_stored: whether the file contains the layers as they are stored instead, with convolutions and merges folded.
        to_quantize: whether the file will be quantized to eight bits (`vitrim.deploy.optimized` with ``torch.int8``).

    Raises:
        ExportError: if a package is missing, the opset is too old, the file cannot be written, the model cannot be
            traced, or the file's logits differ from the eager model's by more than 1e-4 of the largest. If the logits
            are the same for all images, the features are compared instead. Nothing is written in these cases.
    """
    file, kind = check_target(path, opset)
    still = _still(model)
    image = image_of(still)
    form = _form(still, as_stored, to_quantize)
    write = _onnx if kind == "onnx" else _program
    with beside(file) as part:
        runtime, run = write(_traced(form, torch.zeros(3, *image)), part, opset)
        worst, told = _compare("logits", still, run, image)
        if not told:
            _check_features(still, form, write, part.with_name(f"features{part.suffix}"), opset)
        size = part.stat().st_size
    return Exported(
        path=str(file),
        kind=kind,
        opset=opset if kind == "onnx" else None,
        bytes=size,
        apart=worst,
        image=image,
        torch=torch.__version__,
        runtime=runtime,
    )


def check_target(path: str | os.PathLike[str], opset: int = OPSET) -> tuple[Path, str]:
    """Raise an error if a file could not be written, before the work that produces it.

    Returns:
        The path, and its kind (`KINDS`).

    Raises:
        ExportError: if the kind is unknown, a package is missing, the opset is too old, or the file is not writable.
    """
    file = Path(path)
    kind = KINDS.get(file.suffix)
    if kind is None:
        raise ExportError(f"a file to export to must end in {' or '.join(KINDS)}, but got '{file.name}'")
    if opset < OLDEST_OPSET:
        raise ExportError(f"opset must be at least {OLDEST_OPSET}, but got {opset}; leave it out for {OPSET}")
    if kind == "onnx":
        need("onnx", "onnxscript", "onnxruntime")
    if file.is_dir():
        raise ExportError(f"{file}: a file must be named to write to, but this is a folder; name a file in it")
    try:
        with tempfile.TemporaryFile(dir=followed(file).parent):
            pass
    except OSError as problem:
        raise _unwritable(file, problem) from None
    return file, kind


def _unwritable(file: Path, problem: OSError) -> ExportError:
    return ExportError(f"{file}: must be writable, but is not: {reason(problem)}; choose another place")


def need(*packages: str, extra: str = "export") -> None:
    """Raise an error if one of these packages is not installed.

    Raises:
        ExportError: naming the packages and the extra that installs them.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"{' and '.join(missing)} must be installed for this, but {'is' if len(missing) == 1 else 'are'} not; "
            f"run pip install 'vitrim[{extra}]'"
        )


def _still(model: nn.Module) -> nn.Module:
    """Return a copy to trace: evaluation mode, float32, CPU."""
    describe(model)
    missing = why_not_held(model)
    if missing is not None:
        raise ExportError(missing)
    place, kind = home_of(model)
    twin = copy.deepcopy(model)
    return (twin if (place.type, kind) == ("cpu", torch.float32) else twin.to("cpu", torch.float32)).eval()


def _form(still: nn.Module, as_stored: bool, to_quantize: bool) -> nn.Module:
    """Return the form of a model that is written."""
    if as_stored:
        return fold(fold_steps_(copy.deepcopy(still))).eval()
    return optimized(still, dtype=torch.int8 if to_quantize else None)


def _traced(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=4096)
    try:
        with torch.no_grad(), quiet(*_LOGGERS):
            return torch.export.export(model, (example,), dynamic_shapes=({0: batch},), strict=False)
    except Exception as problem:
        # The exporter passes on any exception of an operator that it cannot trace.
        raise ExportError(
            f"the model must be traceable with any batch, but torch.export says: {reason(problem)}; please report it"
        ) from problem


def _onnx(program: torch.export.ExportedProgram, part: Path, opset: int) -> tuple[str, Callable[[Tensor], Tensor]]:
    try:
        with quiet(*_LOGGERS):
            written = torch.onnx.export(
                program, (), dynamo=True, verbose=False, input_names=["images"], output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},), opset_version=opset,
            )  # fmt: skip
            assert written is not None
            written.save(part, external_data=False)
    except Exception as problem:
        raise ExportError(
            f"every operator must have an ONNX form, but the exporter says: {reason(problem)}; please report it"
        ) from problem
    return onnx_session(part)


def onnx_session(path: Path, threads: int | None = None) -> tuple[str, Callable[[Tensor], Tensor]]:
    """Open an ONNX file in ONNX Runtime on CPU.

    Args:
        path: the file.
        threads: threads of one operator; the process's setting if None.

    Returns:
        The runtime's name and version, and a function that maps images ``(B, 3, height, width)`` to logits.
    """
    need("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
    # Threads that spin after a call would take the processor from the models that are timed in turns with this one.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images.numpy()})[0])

    return f"onnxruntime {onnxruntime.__version__}", run


def _program(program: torch.export.ExportedProgram, part: Path, opset: int) -> tuple[str, Callable[[Tensor], Tensor]]:
    torch.export.save(program, part)
    module: Any = torch.export.load(part).module()
    return f"torch {torch.__version__}", module


@torch.no_grad()
def _compare(
    what: str, eager: Callable[[Tensor], Any], run: Callable[[Tensor], Tensor], image: tuple[int, int, int]
) -> tuple[float, bool]:
    """Compare the outputs of a file with eager PyTorch's on random images.

    Returns:
        The largest relative difference, and whether the eager outputs vary from image to image.

    Raises:
        ExportError: if the difference is too large, or not finite.
    """
    generator, worst, told = torch.Generator().manual_seed(0), 0.0, False
    for count in _BATCHES:
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


def _check_features(still: nn.Module, folded: nn.Module, write: Any, part: Path, opset: int) -> None:
    """Export and compare the features too, because with a head of zeros any features give the same logits.

    Raises:
        ExportError: if they differ.
    """
    wanted = features_of(still)
    if wanted is None:
        return
    image = image_of(still)
    _, run = write(_traced(_Features(folded).eval(), torch.zeros(3, *image)), part, opset)
    _compare("features", wanted, run, image)


@contextlib.contextmanager
def beside(file: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, which is renamed to `file` on success.

    Raises:
        ExportError: if the file cannot be written. Other errors pass, also those about other files.
    """
    try:
        with (
            writing(file) as place,
            tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{file.name}.") as folder,
        ):
            part = Path(folder) / file.name
            yield part
            part.replace(place)
    except OSError as problem:
        if isinstance(problem, VitrimError) or not _is_about(problem, file):
            raise
        raise _unwritable(file, problem) from problem


def _is_about(problem: OSError, file: Path) -> bool:
    """Return whether an error concerns the folder of `file`, or names no file (as for a full disk)."""
    if problem.errno is None:
        return False
    return problem.filename is None or Path(os.fsdecode(problem.filename)).is_relative_to(followed(file).parent)
