"""Write eight-bit ONNX files with ONNX Runtime's static quantization, and measure their accuracy.

B images, C channels, (h, w) height and width of the input.

Weights become int8, with one scale per output channel. Activations become uint8, with one scale per tensor, wide enough
for 99.99 % of the activations on the calibration images: LayerNorm leaves a few channels with outliers, and a scale
that covered them would waste most of its steps (`benchmarks/int8.py` has the comparison). Only products with weights
are quantized (linear layers and convolutions). Products of two activations (queries with keys, attention with values),
softmax, norms and GELU stay in float32, because they are few of the multiply-accumulates. The file contains QDQ pairs
(QuantizeLinear, DequantizeLinear), which ONNX Runtime and OpenVINO each fuse in their own way. TensorRT takes only zero
points of 0, which these activations do not have.
"""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitrim.cut.outputs import as_classes, gives_values
from vitrim.deploy.export import OPSET, beside, check_target, export
from vitrim.deploy.quiet import quiet
from vitrim.deploy.writers import onnx_session
from vitrim.families import describe
from vitrim.nn.modes import evaluating
from vitrim.words.errors import DataError, ExportError, VitrimError
from vitrim.words.plain import Node, reason

__all__ = ["PERCENTILE", "Quantized", "quantize"]

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
    opset: int
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
    calibration: Batches,
    *,
    test: Batches | None = None,
    miou: Callable[[nn.Module], float] | None = None,
    percentile: float = PERCENTILE,
    opset: int = OPSET,
    threads: int | None = None,
    as_stored: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Quantized:
    """Write `model` as an eight-bit ONNX file; the model is not modified.

    Args:
        model: an adopted model, on the CPU.
        path: ``….onnx``.
        calibration: batches of normalized images ``(B, C, h, w)`` and labels, which are not used. All images are held
            in memory, their activations one batch at a time. They are iterated twice if there is no `test`.
        test: batches to measure both models on; labels are -1 where unknown.
        miou: a function that returns the mean intersection over union of a segmentation model, in percent; called with
            the model, and with a module that runs the file.
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
    if file.suffix != ".onnx":
        raise ExportError(f"an int8 file must end in .onnx, but got '{file.name}'; leave --int8 out for other kinds")
    if not 50 < percentile <= 100:
        raise ExportError(
            f"percentile must be above 50 and at most 100, but got {percentile}; leave it out for {PERCENTILE}"
        )
    check_target(file, opset)
    held = [images.numpy() for images, _ in _readable(calibration)]
    if not held:
        raise ExportError("int8 must be calibrated on images, but there are none; give some")
    with beside(file) as part, tempfile.TemporaryDirectory(prefix="vitrim-int8-") as folder:
        say("exporting in float32")
        before = export(model, Path(folder) / "float.onnx", opset=opset, as_stored=as_stored, to_quantize=True)
        say("calibrating")
        _quantized(Path(before.path), part, held, percentile)
        runtime, run = onnx_session(part, threads)
        say("measuring both")
        after = _compared(model, run, _readable(calibration if test is None else test))
        found = {} if miou is None else {"miou_before": miou(model), "miou": miou(_Running(run, model))}
        size = part.stat().st_size
    return Quantized(
        path=str(file),
        opset=opset,
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


def _quantized(source: Path, target: Path, held: Sequence[Any], percentile: float) -> None:
    """Write the quantized `target` from the float file `source` and batches of images (arrays)."""
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = source.with_name("prepared.onnx")
    try:
        with quiet("", prints=False):
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
    except Exception as problem:  # the quantizer passes on many types of exceptions
        if isinstance(problem, ExportError | OSError):
            raise
        raise ExportError(f"ONNX Runtime must be able to quantize this model, but says: {reason(problem)}") from problem


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
