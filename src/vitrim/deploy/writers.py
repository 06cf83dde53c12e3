"""Write a traced model as a file of another runtime, and open that file: one writer for each suffix.

B images, C channels, (h, w) height and width of the input.
"""

import importlib
import importlib.metadata
import importlib.util
import io
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitrim.deploy.quiet import quiet
from vitrim.words.errors import ExportError
from vitrim.words.plain import reason

__all__ = [
    "LOGGERS",
    "WRITERS",
    "Opened",
    "Program",
    "Writer",
    "as_openvino",
    "coreml_session",
    "executorch_session",
    "need",
    "onnx_session",
    "openvino_session",
]

LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "executorch", "coremltools")
"""Loggers of libraries that report progress to their developers."""

Program = torch.export.ExportedProgram
"""What PyTorch traces a model to."""


class Opened(NamedTuple):
    """A file that was written.

    Attributes:
        runtime: name and version of what runs it.
        run: maps images ``(B, C, h, w)`` to logits; None if the runtime does not run on this platform.
    """

    runtime: str
    run: Callable[[Tensor], Tensor] | None


class Writer(NamedTuple):
    """A kind of file.

    Attributes:
        kind: its name.
        write: writes a program to a path with an ONNX operator set, which other kinds ignore, and opens the file.
        packages: packages that it needs.
        extra: the extra that installs them.
        batch: the batch if none is asked for; None for any batch.
        folder: whether the file is a folder.
    """

    kind: str
    write: Callable[[Program, Path, int], Opened]
    packages: tuple[str, ...] = ()
    extra: str = ""
    batch: int | None = None
    folder: bool = False


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


def _program(program: Program, part: Path, opset: int) -> Opened:
    # PyTorch's own writer of files ends the process where the disk is full.
    packed = io.BytesIO()
    torch.export.save(program, packed)
    part.write_bytes(packed.getbuffer())
    module: Any = torch.export.load(part).module()
    return Opened(f"torch {torch.__version__}", module)


def _onnx(program: Program, part: Path, opset: int) -> Opened:
    batch = torch.export.Dim("batch", min=1, max=4096)
    try:
        with quiet(*LOGGERS):
            written = torch.onnx.export(
                program, (), dynamo=True, verbose=False, input_names=["images"], output_names=["logits"],
                dynamic_shapes=({0: batch},) if program.range_constraints else None,
                opset_version=opset,
            )  # fmt: skip
            assert written is not None
    except Exception as problem:
        raise ExportError(
            f"every operator must have an ONNX form, but the exporter says: {reason(problem)}; please report it"
        ) from problem
    with quiet(*LOGGERS):
        written.save(part, external_data=False)
    return Opened(*onnx_session(part))


def onnx_session(path: Path, threads: int | None = None) -> tuple[str, Callable[[Tensor], Tensor]]:
    """Open an ONNX file in ONNX Runtime on CPU.

    Args:
        path: the file.
        threads: threads of one operator; the process's setting if None.

    Returns:
        The runtime's name and version, and a function that maps images ``(B, C, h, w)`` to logits.
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


def _openvino(program: Program, part: Path, opset: int) -> Opened:
    with tempfile.TemporaryDirectory(prefix="vitrim-") as folder:
        file = Path(folder) / "model.onnx"
        _onnx(program, file, opset)
        return Opened(*as_openvino(file, part))


def as_openvino(source: Path, part: Path, threads: int | None = None) -> tuple[str, Callable[[Tensor], Tensor]]:
    """Write an ONNX file as an OpenVINO model, and open that; see `openvino_session`."""
    import openvino

    openvino.save_model(openvino.convert_model(source), part, compress_to_fp16=False)
    return openvino_session(part, threads)


def openvino_session(path: Path, threads: int | None = None) -> tuple[str, Callable[[Tensor], Tensor]]:
    """Open an ONNX file or an OpenVINO model in OpenVINO on CPU, in float32.

    Args:
        path: the ``.onnx`` or ``.xml`` file.
        threads: threads of one operator; the process's setting if None.

    Returns:
        The runtime's name and version, and a function that maps images ``(B, C, h, w)`` to logits.
    """
    import openvino

    # On processors with bfloat16, OpenVINO computes in it unless the type is set; the other runtimes do not.
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads() if threads is None else threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", settings)

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(compiled([images.numpy()])[0])

    return f"openvino {importlib.metadata.version('openvino')}", run


def _executorch(program: Program, part: Path, opset: int) -> Opened:
    with quiet("", *LOGGERS, prints=False):
        exir = importlib.import_module("executorch.exir")  # first: its parts import each other in a circle
        partitioner = importlib.import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
        try:
            lowered = exir.to_edge_transform_and_lower(program, partitioner=[partitioner.XnnpackPartitioner()])
            packed = lowered.to_executorch().buffer
        except Exception as problem:  # of whichever pass cannot take an operator
            raise ExportError(
                f"every operator must have an ExecuTorch form, but the exporter says: {reason(problem)}; report it"
            ) from problem
    part.write_bytes(packed)
    return Opened(*executorch_session(part))


def executorch_session(path: Path) -> tuple[str, Callable[[Tensor], Tensor]]:
    """Open an ExecuTorch program on CPU.

    Returns:
        The runtime's name and version, and a function that maps images ``(B, C, h, w)`` to logits, with the B that the
        program was written for.
    """
    with quiet("", *LOGGERS, prints=False):
        importlib.import_module("executorch.exir")
        runtime: Any = importlib.import_module("executorch.runtime").Runtime.get()
    # The program is read from memory, so that the file can be moved while it is open. Nothing else holds the bytes and
    # the program: a method that outlives them reads what was written there since, and ends the process.
    packed = path.read_bytes()
    program = runtime.load_program(packed)
    held = (packed, program, program.load_method("forward"))

    def run(images: Tensor) -> Tensor:
        logits: Tensor = held[2].execute([images])[0].clone()
        return logits

    return f"executorch {importlib.metadata.version('executorch')} (XNNPACK)", run


def _without_aliases(program: Program) -> Program:
    """Remove operators that return their argument, of which coremltools 9.0 knows no form; changes `program`."""
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten.alias.default:
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
    program.graph_module.recompile()
    return program


def _coreml(program: Program, part: Path, opset: int) -> Opened:
    with quiet("", *LOGGERS, prints=False):
        import coremltools

        try:
            target = coremltools.target.iOS17
            precision = coremltools.precision.FLOAT32
            model: Any = coremltools.convert(
                _without_aliases(program.run_decompositions({})),
                minimum_deployment_target=target,
                compute_precision=precision,
            )
        except Exception as problem:  # of whichever operator has no form there
            raise ExportError(
                f"every operator must have a Core ML form, but coremltools says: {reason(problem)}; please report it"
            ) from problem
        model.save(str(part))
    return Opened(*coreml_session(model))


def coreml_session(model: Any) -> tuple[str, Callable[[Tensor], Tensor] | None]:
    """Return the version of coremltools, and a function from images to logits; None elsewhere than on macOS."""
    version = f"coremltools {importlib.metadata.version('coremltools')}"
    if platform.system() != "Darwin":
        return version, None
    name = model.get_spec().description.input[0].name

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(next(iter(model.predict({name: images.numpy()}).values())))

    return version, run


_ONNX = ("onnx", "onnxscript", "onnxruntime")

WRITERS = {
    ".onnx": Writer("onnx", _onnx, _ONNX, "export"),
    ".pt2": Writer("program", _program),
    ".xml": Writer("openvino", _openvino, (*_ONNX, "openvino"), "openvino"),
    ".pte": Writer("executorch", _executorch, ("executorch",), "executorch", batch=1),
    ".mlpackage": Writer("coreml", _coreml, ("coremltools",), "coreml", batch=1, folder=True),
}
"""Writers by suffix of the file."""
