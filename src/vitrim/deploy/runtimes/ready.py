"""Prepare a model to run in eager PyTorch, torch.compile, CUDA graphs, ONNX Runtime or OpenVINO, with one function.

B images, C channels, (h, w) height and width of the input.
"""

import inspect
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.deploy.export import export
from vitrim.deploy.writers import need, onnx_session, openvino_session
from vitrim.measure.model import running
from vitrim.nn.copying import copied
from vitrim.nn.parity import TOLERANCES, relative
from vitrim.nn.weights import why_not_held
from vitrim.words.errors import ExportError
from vitrim.words.plain import did_you_mean, reason

__all__ = ["READS_ONNX", "RUNTIMES", "Ready", "check_runtimes", "ready", "weights_bytes"]

RUNTIMES = ("eager", "compile", "cudagraph", "onnxruntime", "openvino")
"""Runtimes in the order of tables; ``cudagraph`` runs only on CUDA, the last two only on the CPU in float32."""

_PACKAGES = {
    "onnxruntime": (("onnx", "onnxscript", "onnxruntime"), "export"),
    "openvino": (("onnx", "onnxscript", "onnxruntime", "openvino"), "openvino"),
}
READS_ONNX = tuple(_PACKAGES)
"""Runtimes that run an ONNX file, on the CPU in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A model that is ready to run.

    Attributes:
        runtime: one of `RUNTIMES`.
        version: the runtime's name and version.
        run: maps images ``(B, C, h, w)``, of the device and type of the example images, to logits. Another B makes
            ``compile`` compile again, and raises an error with ``cudagraph``.
        bytes: size on disk: that of the ONNX file, or of the weights in a safetensors file.
        apart: largest difference of a logit from the eager model's on the example images, relative to the largest
            logit; None if there is no model to compare with.
    """

    runtime: str
    version: str
    run: Callable[[Tensor], Tensor]
    bytes: int
    apart: float | None


def check_runtimes(names: Sequence[str]) -> None:
    """Raise an error for runtimes that are unknown, not installed or not possible on this machine.

    Raises:
        ExportError: naming the known runtimes, or the extra that installs the missing one.
    """
    if not names:
        raise ExportError(f"runtimes must be at least one of {', '.join(RUNTIMES)}, but none is named")
    for name in names:
        if name not in RUNTIMES:
            near = did_you_mean(name, RUNTIMES)
            raise ExportError(f"a runtime must be one of {', '.join(RUNTIMES)}, but got '{name}'{near}")
        if name == "cudagraph" and not torch.cuda.is_available():
            raise ExportError("cudagraph must run on a CUDA device, but there is none here; choose eager or compile")
        packages, extra = _PACKAGES.get(name, ((), ""))
        need(*packages, extra=extra)


def ready(
    model: nn.Module | Path,
    images: Tensor,
    runtime: str = "eager",
    *,
    threads: int | None = None,
    onnx: Path | None = None,
    as_stored: bool = False,
) -> Ready:
    """Prepare a model to run, and compare its logits with those of the stored model in eager PyTorch.

    The model runs in the form of `vitrim.deploy.optimized`.

    Args:
        model: an adopted model, not modified; or an ONNX file for a runtime that reads one, which is run unchecked.
            A model that is not adopted runs as it is, in eager PyTorch, compiled or as a CUDA graph.
        images: an example batch ``(B, C, h, w)``, on the device and of the type in which the model will run;
            ``onnxruntime`` and ``openvino`` take float32 on the CPU, ``cudagraph`` any type on CUDA.
        runtime: one of `RUNTIMES`.
        threads: CPU threads of ``onnxruntime`` and ``openvino``; if not given, PyTorch's setting, which ``eager`` and
            ``compile`` always use.
        onnx: the file that `vitrim.deploy.export.export` wrote of this model, so that it is not exported again.
        as_stored: whether the model runs as it is stored instead.

    Raises:
        ExportError: if the runtime is unknown, not installed, or cannot take the model or the images, or if its logits
            differ from eager's by more than 1e-4 of the largest (in float32; by more than 0.1 in half precision).
    """
    check_runtimes([runtime])
    if isinstance(model, Path):
        return _of_file(model, runtime, threads)
    if runtime in READS_ONNX and (images.device.type != "cpu" or images.dtype != torch.float32):
        raise ExportError(
            f"{runtime} must run on cpu in float32, but got {images.dtype} on {images.device}; "
            "leave device and dtype out, or choose eager or compile"
        )
    if runtime == "cudagraph" and images.device.type != "cuda":
        raise ExportError(
            f"cudagraph must be given images on a CUDA device, but got them on {images.device}; move them"
        )
    still = _still(model, images)
    if runtime in READS_ONNX:
        with tempfile.TemporaryDirectory(prefix="vitrim-") as folder:
            file = Path(folder) / "model.onnx" if onnx is None else onnx
            if onnx is None:
                export(model, file, as_stored=as_stored)
            found = _of_file(file, runtime, threads)
    else:
        net = running(model, images.device, images.dtype, as_stored=as_stored)
        net = still if net is model else net.eval()
        run = _compiled(net) if runtime == "compile" else _eager(net)
        run = _Recorded(run, images) if runtime == "cudagraph" else run
        found = Ready(runtime=runtime, version=_torch(runtime), run=run, bytes=weights_bytes(still), apart=None)
    return _checked(found, still, images)


def weights_bytes(model: nn.Module) -> int:
    """Return the bytes of all weights and stored buffers of `model`."""
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())


def _torch(runtime: str) -> str:
    return f"torch {torch.__version__}" + (" (inductor)" if runtime == "compile" else "")


def _still(model: nn.Module, images: Tensor) -> nn.Module:
    """Return a copy in evaluation mode, on the device and of the type of `images`."""
    missing = why_not_held(model)
    if missing is not None:
        raise ExportError(missing)
    return copied(model).to(images.device, images.dtype).eval()


def _eager(model: nn.Module) -> Callable[[Tensor], Tensor]:
    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = model(images)
            return logits

    return run


def _compiled(model: nn.Module) -> Callable[[Tensor], Tensor]:
    # Programs of earlier calls count against the limit of compiled programs, beyond which PyTorch falls back to eager.
    apart = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    options: dict[str, Any] = {"isolate_recompiles": True} if apart else {}
    quick: Any = torch.compile(model, fullgraph=True, dynamic=False, **options)

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = quick(images)
            return logits

    return run


class _Recorded:
    """One pass that was recorded on CUDA and is replayed without PyTorch's work for each operator.

    Args:
        run: the pass.
        images: ``(B, C, h, w)`` on CUDA; only such batches can be replayed.

    Raises:
        ExportError: if the pass cannot be recorded.
    """

    def __init__(self, run: Callable[[Tensor], Tensor], images: Tensor) -> None:
        self.run = run  # which holds the weights whose addresses are in the graph
        self.images, self.graph = images.clone(), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(images.device):
                self.logits = self._record()
        except Exception as problem:  # whatever an operator raises that cannot be recorded
            raise _unable("cudagraph", problem) from problem

    def _record(self) -> Tensor:
        # Libraries must be initialized and kernels chosen before, on another stream (PyTorch's notes on CUDA graphs).
        current = torch.cuda.current_stream()
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            for _ in range(3):
                self.run(self.images)
        current.wait_stream(side)
        with torch.cuda.graph(self.graph):
            return self.run(self.images)

    def __call__(self, images: Tensor) -> Tensor:
        """Replay; the logits are a copy, for the next pass writes where this one wrote.

        Raises:
            ExportError: if the images have another shape, type or device.
        """
        mine = self.images
        if (images.shape, images.dtype, images.device) != (mine.shape, mine.dtype, mine.device):
            raise ExportError(
                f"cudagraph must be given {_told(mine)}, with which it was recorded, but got {_told(images)}; call "
                "ready with such images"
            )
        with torch.cuda.device(mine.device):
            mine.copy_(images)
            self.graph.replay()
            return self.logits.clone()


def _told(images: Tensor) -> str:
    return f"images {tuple(images.shape)} of {images.dtype} on {images.device}"


def _of_file(file: Path, runtime: str, threads: int | None) -> Ready:
    if runtime not in READS_ONNX:
        raise ExportError(f"{file}: an ONNX file must run in {' or '.join(READS_ONNX)}, but {runtime} is asked for")
    if not file.is_file():
        raise ExportError(f"{file}: the ONNX file must exist, but it does not")
    try:
        version, run = (onnx_session if runtime == "onnxruntime" else openvino_session)(file, threads)
    except Exception as problem:  # each runtime raises its own class for a file that it cannot read
        raise ExportError(f"{file}: {runtime} must be able to read the file, but says: {reason(problem)}") from None
    return Ready(runtime=runtime, version=version, run=run, bytes=file.stat().st_size, apart=None)


def _unable(runtime: str, problem: Exception) -> ExportError:
    return ExportError(f"{runtime} must be able to run this model here, but says: {reason(problem)}")


def _checked(found: Ready, still: nn.Module, images: Tensor) -> Ready:
    with torch.inference_mode():
        want = still(images)
    try:
        got = found.run(images)
    except Exception as problem:  # a missing compiler, or an operator that cannot be compiled
        raise _unable(found.runtime, problem) from problem
    allowed = TOLERANCES["runtime"][images.dtype]
    apart = relative(got, want)
    if not apart <= allowed:
        raise ExportError(
            f"{found.runtime} must give eager's logits within {allowed:g} of the largest, but they differ by "
            f"{apart:.1e}; please report this model"
        )
    return Ready(runtime=found.runtime, version=found.version, run=found.run, bytes=found.bytes, apart=apart)
