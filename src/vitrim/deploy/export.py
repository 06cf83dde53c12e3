"""Models for other runtimes: ONNX and torch.export, each compared with eager PyTorch before anything is written.

B images. The batch is dynamic; every other size, token counts included, is a constant of the file.
"""

import contextlib
import copy
import importlib.util
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.cut.optimized import optimized
from vitrim.cut.surgery import fold
from vitrim.families import describe
from vitrim.measure.model import home_of, image_of, resting
from vitrim.nn import fold_merges_
from vitrim.words.errors import ExportError
from vitrim.words.plain import Node

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
"""Kind of file by the end of its name."""

OPSET = 20
"""The first that has GELU as one operator."""

OLDEST_OPSET = 18
"""What PyTorch's exporter translates to; older ones would be converted after, without a check of ours."""

PARITY = 1e-4
"""Allowed difference of logits, relative to the largest: another runtime fuses, and so rounds, otherwise."""

_BATCHES = (1, 3, 5)


class Exported(Node):
    """What was written, and how near it is to eager PyTorch.

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
    """Write `model` for another runtime, in the form of `vitrim.deploy.optimized`; the model is left as it was.

    Args:
        model: an adopted model, in any mode and on any device; it is exported in evaluation mode, in float32, on CPU.
        path: ``….onnx`` for ONNX, ``….pt2`` for torch.export.
        opset: ONNX operator set, at least 18.
        as_stored: whether the file holds the layers as they are stored instead, convolutions and merges folded.
        to_quantize: whether eight bits are made of the file (`vitrim.deploy.optimized` with ``torch.int8``).

    Raises:
        ExportError: if a package is missing, the opset is too old, the place cannot be written to, the model cannot be
            traced, or the file's logits differ from eager's by more than 1e-4 of the largest. Nothing is written then.
    """
    file, kind = check_target(path, opset)
    still = _still(model)
    image = image_of(still)
    with beside(file) as part:
        program = _traced(_form(still, as_stored, to_quantize), torch.zeros(3, *image))
        runtime, run = (_onnx if kind == "onnx" else _program)(program, part, opset)
        worst = _compare(still, run, image)
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
    """Refuse a file that could not be written, before the work whose result is to lie there.

    Returns:
        the path, and its kind (`KINDS`).

    Raises:
        ExportError: if the kind is unknown, a package is missing, the opset too old, or the place not writable.
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
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as problem:
        raise _unwritable(file, problem) from None
    return file, kind


def _unwritable(file: Path, problem: OSError) -> ExportError:
    return ExportError(f"{file}: must be writable, but is not: {problem.strerror or problem}; choose another place")


def need(*packages: str, extra: str = "export") -> None:
    """Refuse to go on without these packages.

    Raises:
        ExportError: naming them and the extra that brings them.
    """
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(
            f"{' and '.join(missing)} must be installed for this, but {'is' if len(missing) == 1 else 'are'} not; "
            f"run pip install 'vitrim[{extra}]'"
        )


def _still(model: nn.Module) -> nn.Module:
    """A copy to trace: evaluation mode, float32, CPU."""
    describe(model)
    place, kind = home_of(model)
    if place.type == "meta":
        raise ExportError("a model to export must have weights, but this one is on the meta device; load them first")
    twin = copy.deepcopy(model)
    return (twin if (place.type, kind) == ("cpu", torch.float32) else twin.to("cpu", torch.float32)).eval()


def _form(still: nn.Module, as_stored: bool, to_quantize: bool) -> nn.Module:
    """What is written of a model."""
    if as_stored:
        return fold(fold_merges_(copy.deepcopy(still))).eval()
    return optimized(still, dtype=torch.int8 if to_quantize else None)


def _traced(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=4096)
    try:
        with torch.no_grad(), _quiet():
            return torch.export.export(model, (example,), dynamic_shapes=({0: batch},), strict=False)
    except Exception as problem:
        # The exporter raises whatever the operator that it cannot trace raises.
        raise ExportError(
            f"the model must be traceable with any batch, but torch.export says: {_first(problem)}; please report it"
        ) from problem


def _onnx(program: torch.export.ExportedProgram, part: Path, opset: int) -> tuple[str, Callable[[Tensor], Tensor]]:
    try:
        with _quiet():
            written = torch.onnx.export(
                program, (), dynamo=True, verbose=False, input_names=["images"], output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=4096)},), opset_version=opset,
            )  # fmt: skip
            assert written is not None
            written.save(part, external_data=False)
    except Exception as problem:
        raise ExportError(
            f"every operator must have an ONNX form, but the exporter says: {_first(problem)}; please report it"
        ) from problem
    return onnx_session(part)


def onnx_session(path: Path, threads: int | None = None) -> tuple[str, Callable[[Tensor], Tensor]]:
    """Open an ONNX file in ONNX Runtime on CPU.

    Args:
        path: the file.
        threads: of one operator; the process's setting if None.

    Returns:
        the runtime's name and version, and what maps images ``(B, 3, height, width)`` to logits.
    """
    need("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
    # Threads that spin after a call would take the processor from whatever runs in turns with this one.
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
def _compare(model: nn.Module, run: Callable[[Tensor], Tensor], image: tuple[int, int, int]) -> float:
    """The largest relative difference from eager on random images.

    Raises:
        ExportError: if it is too large, or a logit is not finite.
    """
    generator, worst = torch.Generator().manual_seed(0), 0.0
    for count in _BATCHES:
        images = torch.randn(count, *image, generator=generator)
        with resting(model):
            want = model(images)
        got = run(images)
        if got.shape != want.shape:
            raise ExportError(f"logits must keep the shape {tuple(want.shape)}, but have {tuple(got.shape)}")
        apart = float((got - want).abs().max() / want.abs().max().clamp_min(1e-6))
        if not apart <= PARITY:
            raise ExportError(
                f"logits must stay within {PARITY:.0e} of eager's, but differ by {apart:.1e} in a batch of {count}; "
                "please report this model"
            )
        worst = max(worst, apart)
    return worst


@contextlib.contextmanager
def beside(file: Path) -> Iterator[Path]:
    """A path to write to; what lies there takes the place of `file` if all goes well.

    Raises:
        ExportError: if the place cannot be written to.
    """
    try:
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as folder:
            part = Path(folder) / file.name
            yield part
            part.replace(file)
    except OSError as problem:
        raise _unwritable(file, problem) from problem


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' own remarks, none of which a user can act on."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _first(problem: Exception) -> str:
    text = str(problem).strip() or type(problem).__name__
    return text.splitlines()[0][:200]
