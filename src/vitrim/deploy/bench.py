"""Compare the speed of models in the common runtimes: one interleaved run, medians with their spread.

The other models are compared with the first one. Every (model, runtime) pair takes its turn in the order A B C C B A,
so that a slow phase of the machine affects all of them. A ratio is the median over neighboring turns.
"""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from vitrim import report
from vitrim.deploy import store
from vitrim.deploy.export import export
from vitrim.deploy.runtimes import READS_ONNX, Ready, check_runtimes, peak_bytes, ready
from vitrim.families import describe
from vitrim.measure.model import image_of
from vitrim.measure.turns import at_least, name_of, percentiles, place_of, threading, turns, waiting
from vitrim.nn.device import fitting, why_not_type
from vitrim.nn.steps import StepModule
from vitrim.words.costs import cost_of
from vitrim.words.errors import ExportError, RecipeError, RunError
from vitrim.words.plain import Node, dump, reason, write_json, write_text

__all__ = ["Bench", "Timed", "bench", "write"]


class Timed(Node):
    """One model in one runtime at one batch.

    Times are seconds per batch: the median, with the 10th and 90th percentile as `_low` and `_high`. `ratio` is the
    median of (this / the first model in the same runtime) over neighboring turns, or None if the first model does not
    run in that runtime. `against_first` is the same ratio to the first line of all. `bytes` is the size on disk,
    `peak_bytes` the memory that the process grows by. `apart` is the largest difference of a logit from the eager
    model's, relative to the largest logit.
    """

    model: str
    runtime: str
    batch: int
    seconds: float
    seconds_low: float
    seconds_high: float
    images_per_second: float
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    against_first: float
    bytes: int
    peak_bytes: int | None
    macs: int | None
    params: int | None
    apart: float | None


class Bench(Node):
    """The measurements and the machine they were made on; `runs` is the least number of samples of a line.

    `as_stored` is True if the models ran as they are stored, not in the form of `vitrim.deploy.optimized`. Records
    without this field are of models as stored.
    """

    lines: tuple[Timed, ...]
    versions: dict[str, str]
    threads: int
    dtype: str
    device: str
    runs: int
    torch: str
    timm: str
    as_stored: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """A model as it was given, with its image size and, once there is one, its ONNX file."""

    name: str
    model: nn.Module | Path
    image: tuple[int, int, int]
    folder: Path
    as_stored: bool

    def runs_in(self, runtime: str) -> bool:
        return isinstance(self.model, nn.Module) or runtime in READS_ONNX

    def onnx(self) -> Path:
        if isinstance(self.model, Path):
            return self.model
        file = self.folder / "model.onnx"
        if not file.is_file():
            export(self.model, file, as_stored=self.as_stored)
        return file

    def file(self, runtime: str) -> Path:
        """Return the file that a separate process opens to run this model in `runtime`."""
        if runtime != "eager":
            return self.onnx()
        assert isinstance(self.model, nn.Module)
        stored = self.folder / store.FILE
        return stored if stored.is_file() else store.save(self.model, stored)


def bench(
    models: Mapping[str, nn.Module | Path],
    *,
    runtimes: Sequence[str] = ("eager",),
    batches: Sequence[int] = (8,),
    threads: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seconds: float = 8.0,
    runs: int = 6,
    memory: bool = False,
    as_stored: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Bench:
    """Time models in runtimes, all in turns.

    Args:
        models: by name, adopted models (not modified) or ONNX files; the others are compared with the first. A file
            runs only in ``onnxruntime`` and ``openvino``.
        runtimes: of `vitrim.deploy.runtimes.RUNTIMES`.
        batches: batch sizes, each at least 1; each is timed in its own series of turns.
        threads: CPU threads; the process's setting if not given.
        dtype: floating-point type; ``onnxruntime`` and ``openvino`` accept only float32.
        device: where eager and compiled models run; ``onnxruntime`` and ``openvino`` run on the CPU.
        seconds: time to spend on each batch size, above 0; `runs` samples of each line are taken even if they take
            longer.
        runs: least number of samples of each line, at least 2.
        memory: whether to measure peak memory too, each line in its own process; eager models are measured as they are
            stored.
        as_stored: whether models run as they are stored, not in the form of `vitrim.deploy.optimized`.
        say: called with a line of text at each stage.

    Raises:
        ExportError: if a runtime is unknown, not installed, or does not give eager's logits.
        RecipeError: if a setting is out of its range.
        RunError: if a batch does not fit into memory.
    """
    check_runtimes(runtimes)
    for name, values in (("models", list(models)), ("batches", batches), ("runtimes", runtimes)):
        if not values or len(set(values)) < len(values):
            raise RecipeError(f"{name} must be given, each once, but got {', '.join(map(str, values)) or 'none'}")
    for batch in batches:
        at_least("batch", batch, 1)
    if threads is not None:
        at_least("threads", threads, 1)
    place = place_of(device)
    missing = why_not_type(dtype, place)
    if missing is not None:
        raise RecipeError(f"dtype must be one that the device has, but {missing}; use another")
    with _entries(models, as_stored) as entries, threading(threads):
        for entry in entries:
            if not any(entry.runs_in(runtime) for runtime in runtimes):
                raise ExportError(f"{entry.name}: an ONNX file must run in onnxruntime or openvino; add one of them")
        for why in sorted({why for entry in entries for why in _why_slow(entry, dtype, place)}):
            say(why)
        lines: list[Timed] = []
        versions: dict[str, str] = {}
        least = 0
        for batch in batches:
            with fitting("batch", batch, place, "time smaller ones"):
                opened = list(_opened(entries, runtimes, batch, dtype, place, say))
                say(f"timing {len(opened)} in turns, batch of {batch}")
                calls = [_pass(found, images) for _, found, images in opened]
                samples = turns(calls, wait=waiting(place), seconds=seconds, runs=runs).samples
            least = min(least or len(samples[0]), len(samples[0]))
            versions |= {found.runtime: found.version for _, found, _ in opened}
            peaks = [_peak(entry, found.runtime, batch, place) if memory else None for entry, found, _ in opened]
            lines += _lines([(entry, found) for entry, found, _ in opened], samples, peaks, batch)
        return Bench(
            lines=tuple(lines),
            versions=versions,
            threads=torch.get_num_threads(),
            dtype=str(dtype).removeprefix("torch."),
            device=name_of(place),
            runs=least,
            torch=torch.__version__,
            timm=timm.__version__,
            as_stored=as_stored,
        )


def write(found: Bench, path: Path) -> None:
    """Write the measurements as JSON, and their figure as an SVG file of the same name.

    Raises:
        RunError: if the place cannot be written to.
    """
    try:
        write_json(path, dump(found))
        write_text(path.with_suffix(".svg"), report.times([dump(line) for line in found.lines]))
    except OSError as problem:
        raise RunError(
            f"{path}: the place must be writable, but is not: {reason(problem)}; choose another place"
        ) from None


@contextlib.contextmanager
def _entries(models: Mapping[str, nn.Module | Path], as_stored: bool) -> Iterator[list[_Entry]]:
    with tempfile.TemporaryDirectory(prefix="vitrim-bench-") as root:
        entries = []
        for number, (name, model) in enumerate(models.items()):
            folder = Path(root) / str(number)
            folder.mkdir()
            image = _image_in(model) if isinstance(model, Path) else image_of(model)
            entries.append(_Entry(name=name, model=model, image=image, folder=folder, as_stored=as_stored))
        yield entries


def _image_in(file: Path) -> tuple[int, int, int]:
    """Return the channels, height and width of the images that an ONNX file takes."""
    import onnx

    try:
        shape = onnx.load(file, load_external_data=False).graph.input[0].type.tensor_type.shape.dim
    except Exception as problem:  # protobuf raises a class of its own
        raise ExportError(f"{file}: the file must be readable ONNX, but {str(problem)[:200]}") from None
    sizes = tuple(dim.dim_value for dim in shape)
    if len(sizes) != 4 or min(sizes[1:]) < 1:
        raise ExportError(f"{file}: the file must take images (B, C, h, w) of one size, but takes {sizes}")
    return sizes[1], sizes[2], sizes[3]


def _opened(
    entries: Sequence[_Entry],
    runtimes: Sequence[str],
    batch: int,
    dtype: torch.dtype,
    place: torch.device,
    say: Callable[[str], None],
) -> Iterator[tuple[_Entry, Ready, Tensor]]:
    for runtime in runtimes:
        for entry in entries:
            if not entry.runs_in(runtime):
                continue
            say(f"{runtime}: opening {entry.name}, batch of {batch}")
            generator = torch.Generator().manual_seed(0)
            images = torch.randn(batch, *entry.image, generator=generator).to(place, dtype)
            file = entry.onnx() if runtime in READS_ONNX and place.type == "cpu" else None
            yield entry, ready(entry.model, images, runtime, onnx=file, as_stored=entry.as_stored), images


def _why_slow(entry: _Entry, dtype: torch.dtype, place: torch.device) -> set[str]:
    """Return why steps of a model run in many operators where there is a fused kernel."""
    if entry.as_stored or not isinstance(entry.model, nn.Module):
        return set()
    steps = [module for module in entry.model.modules() if isinstance(module, StepModule)]
    return {why for step in steps if (why := step.why_slow(dtype, place)) is not None}


def _pass(found: Ready, images: Tensor) -> Callable[[], Tensor]:
    return lambda: found.run(images)


def _peak(entry: _Entry, runtime: str, batch: int, place: torch.device) -> int | None:
    if place.type != "cpu" or runtime == "compile":
        return None
    return peak_bytes(entry.file(runtime), entry.image, runtime, batch, torch.get_num_threads())


def _lines(
    opened: Sequence[tuple[_Entry, Ready]],
    samples: Sequence[list[float]],
    peaks: Sequence[int | None],
    batch: int,
) -> Iterator[Timed]:
    first = opened[0][0].name
    reference = {
        found.runtime: mine for (entry, found), mine in zip(opened, samples, strict=True) if entry.name == first
    }
    for (entry, found), mine, peak in zip(opened, samples, peaks, strict=True):
        low, middle, high = percentiles(mine)
        theirs = reference.get(found.runtime)
        ratios = None if theirs is None else percentiles([a / b for a, b in zip(mine, theirs, strict=True)])
        cost = cost_of(describe(entry.model)) if isinstance(entry.model, nn.Module) else None
        yield Timed(
            model=entry.name,
            runtime=found.runtime,
            batch=batch,
            seconds=middle,
            seconds_low=low,
            seconds_high=high,
            images_per_second=batch / middle,
            ratio=None if ratios is None else ratios[1],
            ratio_low=None if ratios is None else ratios[0],
            ratio_high=None if ratios is None else ratios[2],
            against_first=percentiles([a / b for a, b in zip(mine, samples[0], strict=True)])[1],
            bytes=found.bytes,
            peak_bytes=peak,
            macs=None if cost is None else cost.macs,
            params=None if cost is None else cost.params,
            apart=found.apart,
        )
