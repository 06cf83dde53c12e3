"""Write eight-bit files with the quantizers of their runtimes, and measure their accuracy.

B images, C channels, (h, w) height and width of the input.

Static quantization, of ONNX Runtime: weights become int8, with one scale per output channel. Activations become uint8,
with one scale per tensor, wide enough for 99.99 % of the activations on the calibration images: LayerNorm leaves a few
channels with outliers, and a scale that covered them would waste most of its steps (`benchmarks/int8.py` has the
comparison). Only products with weights are quantized (linear layers and convolutions). Products of two activations
(queries with keys, attention with values), softmax, norms and GELU stay in float32, because they are few of the
multiply-accumulates. The file contains QDQ pairs (QuantizeLinear, DequantizeLinear), which ONNX Runtime and OpenVINO
each fuse in their own way. TensorRT takes only zero points of 0, which these activations do not have.

Of weights alone: each 64 weights of a row of a linear layer share one scale (ONNX Runtime's `MatMulNBits`), and
activations stay in float32, as does the classifier. The answers are nearly the float model's, and no image is needed to
calibrate.

An OpenVINO model (``.xml``) is converted from the ONNX file. ExecuTorch (``.pte``) has the quantizer of XNNPACK: int8
activations with one scale per tensor, or, where weights alone are asked for, with one scale per token that is computed
when it runs. Core ML (``.mlpackage``) has weights alone.
"""

import contextlib
import importlib
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitrim.cut.outputs import as_classes, gives_values
from vitrim.deploy.export import OPSET, beside, check_target, export, files_of, program_of
from vitrim.deploy.quiet import quiet
from vitrim.deploy.writers import LOGGERS, WRITERS, Program, as_openvino, coreml_session, need, onnx_session
from vitrim.families import describe
from vitrim.nn.modes import evaluating
from vitrim.words.errors import DataError, ExportError, VitrimError
from vitrim.words.plain import Node, reason

__all__ = ["PERCENTILE", "Quantized", "quantize"]

_KINDS = {".onnx": ".onnx", ".xml": ".onnx", ".pte": ".pte", ".mlpackage": ".mlpackage"}
"""Suffixes that can be written, and those of the float files that they are made from."""

_Written = tuple[str, Callable[[Tensor], Tensor] | None]
"""Name and version of what runs a file, and a function from images to logits; None if it does not run here."""

_SHARED = 64
"""Weights that share one scale where only weights are quantized; widths of ViTs are mostly multiples of it."""

PERCENTILE = 99.99
"""Share of the activations that a scale covers, percent."""

Batches = Iterable[tuple[Tensor, Tensor]]


class Quantized(Node):
    """The quantized file, and its loss of accuracy.

    Bytes are those of the file and of the same model in float32. `top1` and `top1_before` are percent on the test
    images, or None if there are no test images or no labels. `agreement` is how often both models predict the same
    class, in percent, on the test images, or else on the calibration images, which overstates it; it is None if the
    outputs are not classes. A segmentation model predicts a class for each pixel; `miou` and `miou_before` are its mean
    intersection over union on test scenes, in percent.
    """

    path: str
    opset: int | None
    weights_only: bool = False
    bytes: int
    bytes_before: int
    calibration_images: int
    test_images: int
    top1: float | None
    top1_before: float | None
    agreement: float | None
    miou: float | None = None
    miou_before: float | None = None
    torch: str
    runtime: str


def quantize(
    model: nn.Module,
    path: str | os.PathLike[str],
    calibration: Batches | None,
    *,
    test: Batches | None = None,
    miou: Callable[[nn.Module], float] | None = None,
    weights_only: bool = False,
    percentile: float = PERCENTILE,
    opset: int = OPSET,
    threads: int | None = None,
    as_stored: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Quantized:
    """Write `model` as an eight-bit file; the model is not modified.

    Args:
        model: an adopted model, on the CPU.
        path: ``….onnx``, ``….xml`` for OpenVINO, ``….pte`` for ExecuTorch, or ``….mlpackage`` for Core ML.
        calibration: batches of normalized images ``(B, C, h, w)`` and labels, which are not used. All images are held
            in memory, their activations one batch at a time. They are iterated twice if there is no `test`. If only
            weights are quantized, they are only compared on, and may be None if there is a `test`.
        test: batches to measure both models on; labels are -1 where unknown.
        miou: a function that returns the mean intersection over union of a segmentation model, in percent; called with
            the model, and with a module that runs the file.
        weights_only: whether activations stay in float32.
        percentile: share of the activations that a scale covers, in (50, 100]; 100 is their whole range.
        opset: ONNX operator set, at least 18.
        threads: CPU threads of the measurement; PyTorch's setting if not given.
        as_stored: whether the layers stay as they are stored; if not, they are in the form of
            `vitrim.deploy.optimized` for a quantizer.
        say: called with a line of text at each stage.

    Raises:
        ExportError: if a package is missing, the opset is too old, the file cannot be written, the model cannot be
            exported, or the quantizer refuses it. Nothing is written then.
        DataError: if an image cannot be read.
    """
    file = Path(path)
    if file.suffix not in _KINDS:
        raise ExportError(
            f"an int8 file must end in {', '.join(_KINDS)}, but got '{file.name}'; other kinds are exported in "
            "float32, without --int8"
        )
    if not weights_only and file.suffix == ".mlpackage":
        raise ExportError(
            f"an int8 file for Core ML must have weights alone in eight bits, but activations are asked for, too, of "
            f"'{file.name}'; use --int8-weights"
        )
    if not 50 < percentile <= 100:
        raise ExportError(
            f"percentile must be above 50 and at most 100, but got {percentile}; leave it out for {PERCENTILE}"
        )
    check_target(file, opset)
    compared = calibration if test is None else test
    if compared is None:
        raise ExportError("int8 must be compared with float32 on images, but there are none; give some")
    held = [] if weights_only else [images.numpy() for images, _ in _readable(calibration or ())]
    if not held and not weights_only:
        raise ExportError("int8 must be calibrated on images, but there are none; give some")
    with beside(file) as part, tempfile.TemporaryDirectory(prefix="vitrim-int8-") as folder:
        say("exporting in float32")
        kind = _KINDS[file.suffix]
        source = Path(folder) / f"float{kind}"
        before = export(model, source, opset=opset, as_stored=as_stored, to_quantize=True)
        say("quantizing weights" if weights_only else "calibrating")
        with _telling(kind):
            if kind == ".pte":
                program = program_of(model, batch=1, as_stored=as_stored, to_quantize=True)
                runtime, run = _for_executorch(program, part, held, weights_only)
            elif kind == ".mlpackage":
                runtime, run = _for_coreml(source, part)
            else:
                quantized = Path(folder) / "int8.onnx"
                if weights_only:
                    _weights_quantized(source, quantized)
                else:
                    _quantized(source, quantized, held, percentile)
                runtime, run = _placed(quantized, part, threads)
        after, found = _Compared(0, None, None, None), {}
        if run is not None:
            say("measuring both")
            after = _compared(model, run, _readable(compared))
            found = {} if miou is None else {"miou_before": miou(model), "miou": miou(_Running(run, model))}
        size = sum(each.stat().st_size for each in files_of(part))
    return Quantized(
        path=str(file),
        opset=opset if file.suffix == ".onnx" else None,
        weights_only=weights_only,
        bytes=size,
        bytes_before=before.bytes,
        calibration_images=sum(len(images) for images in held),
        test_images=0 if test is None else after.images,
        top1=None if test is None else after.top1,
        top1_before=None if test is None else after.top1_before,
        agreement=after.agreement,
        **found,
        torch=torch.__version__,
        runtime=runtime,
    )


def _readable(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the batches; report a file that the operating system cannot read in one sentence.

    Raises:
        DataError: naming the file.
    """
    try:
        yield from batches
    except OSError as problem:
        if isinstance(problem, VitrimError):
            raise
        raise DataError(f"{problem.filename or 'images'}: must be readable, but {reason(problem)}") from None


class _Running(nn.Module):
    """A module that runs an ONNX file in place of the model that it was made from."""

    def __init__(self, run: Callable[[Tensor], Tensor], model: nn.Module) -> None:
        super().__init__()
        self.run, self.num_classes = run, getattr(model, "num_classes", None)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


class _Compared(NamedTuple):
    images: int
    agreement: float | None
    top1: float | None
    top1_before: float | None


@torch.inference_mode()
def _compared(model: nn.Module, run: Callable[[Tensor], Tensor], batches: Batches) -> _Compared:
    """Compare both models' predictions; logits are ``(B, classes)``, or ``(B, classes, h, w)`` for segmentation."""
    images = answers = same = hits = hits_before = 0
    known, classes = True, describe(model).classes
    with evaluating(model):
        for pictures, labels in batches:
            before, after = (as_classes(each(pictures)) if classes == 1 else each(pictures) for each in (model, run))
            before, after = before.argmax(dim=1), after.argmax(dim=1)
            images += pictures.shape[0]
            answers += before.numel()
            same += int((before == after).sum())
            known = known and before.shape == labels.shape and bool((labels >= 0).all())
            if known:
                hits, hits_before = hits + int((after == labels).sum()), hits_before + int((before == labels).sum())
    return _Compared(
        images=images,
        agreement=None if gives_values(classes, known) else 100 * same / max(answers, 1),
        top1=100 * hits / images if known and images else None,
        top1_before=100 * hits_before / images if known and images else None,
    )


@contextlib.contextmanager
def _telling(kind: str) -> Iterator[None]:
    """Quiet the quantizers, and turn what they raise into one sentence."""
    try:
        with quiet("", "onnxruntime", *LOGGERS, prints=False):
            yield
    except Exception as problem:  # quantizers pass on many types of exceptions
        if isinstance(problem, VitrimError | OSError):
            raise
        who = {".pte": "ExecuTorch", ".mlpackage": "Core ML"}.get(kind, "ONNX Runtime")
        raise ExportError(f"{who} must be able to quantize this model, but says: {reason(problem)}") from problem


def _for_executorch(program: Program, part: Path, held: Sequence[Any], weights_only: bool) -> _Written:
    """Write a program with the quantizer of XNNPACK; a file takes one image."""
    need("torchao", extra="executorch")
    steps = importlib.import_module("torchao.quantization.pt2e.quantize_pt2e")
    xnnpack = importlib.import_module("executorch.backends.xnnpack.quantizer.xnnpack_quantizer")
    config = xnnpack.get_symmetric_quantization_config(is_per_channel=True, is_dynamic=weights_only)
    ready = steps.prepare_pt2e(program.module(), xnnpack.XNNPACKQuantizer().set_global(config))
    example = program.example_inputs[0] if program.example_inputs is not None else ()
    ready(*example)
    for images in held:
        for image in images:
            ready(torch.from_numpy(image[None]))
    with torch.no_grad():
        again = torch.export.export(steps.convert_pt2e(ready), tuple(example))
    return _one_by_one(*WRITERS[".pte"].write(again, part, 0))


def _one_by_one(runtime: str, run: Callable[[Tensor], Tensor] | None) -> _Written:
    """Return the same for any number of images, of a file that takes one."""
    return runtime, None if run is None else lambda images: torch.cat([run(image[None]) for image in images])


def _for_coreml(source: Path, part: Path) -> _Written:
    """Write a Core ML package with weights of eight bits, one scale per output channel; it runs on macOS alone."""
    coremltools = importlib.import_module("coremltools")
    optimize = importlib.import_module("coremltools.optimize.coreml")
    config = optimize.OptimizationConfig(global_config=optimize.OpLinearQuantizerConfig(mode="linear_symmetric"))
    model = coremltools.models.MLModel(str(source), skip_model_load=platform.system() != "Darwin")
    written = optimize.linear_quantize_weights(model, config)
    written.save(str(part))
    return _one_by_one(*coreml_session(written))


def _placed(source: Path, part: Path, threads: int | None) -> _Written:
    """Write the quantized ONNX file to `part` in the format of its suffix, and open it."""
    if part.suffix != ".xml":
        shutil.copyfile(source, part)
        return onnx_session(part, threads)
    return as_openvino(source, part, threads)


def _weights_quantized(source: Path, target: Path) -> None:
    """Write `target` from the float file `source`, with the weights of linear layers in eight bits."""
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(source), bits=8, block_size=_SHARED, is_symmetric=True)
    quantizer.process()
    quantizer.model.save_model_to_file(str(target))


def _quantized(source: Path, target: Path, held: Sequence[Any], percentile: float) -> None:
    """Write the quantized `target` from the float file `source` and batches of images (arrays)."""
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = source.with_name("prepared.onnx")
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    graph = onnx.load(prepared).graph
    quantize_static(
        prepared,
        target,
        _reader(graph.input[0].name, held),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["Conv", "Gemm", "MatMul"],
        nodes_to_exclude=_weightless(graph),
        calibrate_method=CalibrationMethod.Percentile,
        # One batch at a time, because otherwise the activations of all images would be held at once.
        extra_options={"CalibPercentile": percentile, "CalibStridedMinMax": 1},
    )


def _reader(name: str, held: Sequence[Any]) -> Any:
    """Return the reader that gives ONNX Runtime the calibration images, one batch for each requested range."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        waiting: list[Any]

        def __len__(self) -> int:
            return len(held)

        def set_range(self, start_index: int, end_index: int) -> None:
            self.waiting = list(held[start_index:end_index])

        def get_next(self) -> dict[str, Any] | None:
            return {name: self.waiting.pop(0)} if self.waiting else None

    return Reader()


def _weightless(graph: Any) -> list[str]:
    """Return the names of the products of two activations."""
    weights = {tensor.name for tensor in graph.initializer}
    return [node.name for node in graph.node if node.op_type == "MatMul" and not weights & set(node.input)]
