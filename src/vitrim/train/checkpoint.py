"""Checkpoints: one safetensors file with all tensors, and the rest of the state as JSON in its header.

It is one file, so that parts of different checkpoints cannot be mixed. It is not a pickle, so reading it runs no code.
"""

import dataclasses
import errno
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from vitrim.words.errors import RunError
from vitrim.words.parsing import parse_json
from vitrim.words.plain import reason, writing

__all__ = ["MADE_FROM", "Progressed", "check_made_from", "compare", "newest", "pack", "read", "unpack", "write"]

_KEY = "vitrim"
_FORMAT = 1


@dataclasses.dataclass
class Progressed:
    """Progress of a run, without its tensors.

    Attributes:
        step: number of optimizer steps taken.
        seconds: time spent so far, over all resumed parts.
        window: sums since the last log record: task loss, penalty, steps.
        epoch: the same sums since the beginning of the epoch.
        history: the records of finished epochs.
        scaler: state of the fp16 loss scaler.
    """

    step: int = 0
    seconds: float = 0.0
    window: list[float] = dataclasses.field(default_factory=lambda: [0.0, 0.0, 0.0])
    epoch: list[float] = dataclasses.field(default_factory=lambda: [0.0, 0.0, 0.0])
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    scaler: dict[str, Any] = dataclasses.field(default_factory=dict)


def pack(model: nn.Module, ema: nn.Module | None, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return CPU copies of all tensors that training changes, named `model.*`, `ema.*`, `optim.<parameter>.*`."""
    found = {f"model.{name}": value for name, value in model.state_dict().items()}
    if ema is not None:
        found |= {f"ema.{name}": value for name, value in ema.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            found[f"optim.{name}.{key}"] = value
    # CPU tensors are copied too, because safetensors rejects tensors that share memory, such as tied weights.
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in found.items()}


def unpack(
    tensors: dict[str, Tensor], model: nn.Module, ema: nn.Module | None, optimizer: torch.optim.Optimizer, path: Path
) -> None:
    """Load the tensors that `pack` returned into model, averaged weights and optimizer.

    Raises:
        RunError: the checkpoint belongs to another model; nothing is changed then.
    """
    wanted = {f"model.{name}": value for name, value in model.state_dict().items()}
    if ema is not None:
        wanted |= {f"ema.{name}": value for name, value in ema.state_dict().items()}
    for name, value in wanted.items():
        came = tensors.get(name)
        if came is None or came.shape != value.shape or came.dtype != value.dtype:
            found = "none" if came is None else f"{came.dtype} {tuple(came.shape)}"
            raise RunError(
                f"{path}: a checkpoint must be of this model, but has {found} for {name} "
                f"({value.dtype} {tuple(value.shape)}); use another folder"
            )
    with torch.no_grad():
        for name, value in wanted.items():
            value.copy_(tensors[name])
    for name, parameter in model.named_parameters():
        start = f"optim.{name}."
        state = {key[len(start) :]: value for key, value in tensors.items() if key.startswith(start)}
        inner = {key: value.to(parameter.device) for key, value in state.items() if "." not in key}
        if inner:
            optimizer.state[parameter] = inner


def write(
    folder: Path, stage: str, tensors: dict[str, Tensor], progressed: Progressed, run: dict[str, Any], keep: int
) -> Path:
    """Write a checkpoint atomically, then remove all but the newest `keep` of this stage.

    Args:
        folder: folder to write to; created if missing.
        stage: name of the stage.
        tensors: tensors returned by `pack`.
        progressed: progress of the run.
        run: settings of the run, see `compare`.
        keep: number of checkpoints to keep.

    Raises:
        RunError: the file cannot be written; earlier checkpoints are unchanged.
    """
    path = folder / f"{stage}-{progressed.step:08d}.safetensors"
    about = {"format": _FORMAT, "progressed": dataclasses.asdict(progressed), "run": run}
    data = save(tensors, {_KEY: json.dumps(about, allow_nan=False)})
    try:
        with writing(path) as temporary, temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as problem:
        earlier = newest(folder, stage)
        kept = f"the checkpoint {earlier} is unchanged" if earlier else "there is no earlier checkpoint"
        need = f"{len(data) / 2**20:.1f} MiB"
        why = "the disk is full" if problem.errno == errno.ENOSPC else reason(problem)
        raise RunError(f"{folder}: must have room for a checkpoint of {need}, but {why}; {kept}") from None
    for old in _all(folder, stage)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def _all(folder: Path, stage: str) -> list[Path]:
    found = [path for path in folder.glob("*.safetensors") if path.stem.rpartition("-")[0] == stage]
    return sorted(path for path in found if path.stem.rpartition("-")[2].isdigit())


def newest(folder: Path, stage: str) -> Path | None:
    """Return the newest checkpoint of a stage, or None."""
    found = _all(folder, stage)
    return found[-1] if found else None


def read(path: Path) -> tuple[dict[str, Tensor], Progressed, dict[str, Any]]:
    """Read a checkpoint: tensors on the CPU, progress, and the settings of the run.

    Raises:
        RunError: the file is damaged or is not a checkpoint.
    """
    try:
        with safe_open(path, framework="pt") as file:
            about = parse_json((file.metadata() or {})[_KEY], RunError, str(path))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if about["format"] != _FORMAT:
            raise RunError(f"{path}: a checkpoint must have format {_FORMAT}, but has {about['format']}")
        return tensors, Progressed(**about["progressed"]), about["run"]
    except (SafetensorError, KeyError, TypeError, ValueError) as problem:
        raise RunError(
            f"{path}: a checkpoint must be whole, but {reason(problem)}; remove it to start this stage again"
        ) from None


def compare(path: Path, was: dict[str, Any], now: dict[str, Any]) -> None:
    """Check that a checkpoint belongs to a run with these settings, and that it was made from the same (`MADE_FROM`).

    Raises:
        RunError: a setting differs; the message names the first one and both values.
    """
    old, new = (_flat({name: value for name, value in run.items() if name != MADE_FROM}) for run in (was, now))
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            raise RunError(
                f"{path}: {name} must be {old.get(name)!r} to resume from this checkpoint, but is {new.get(name)!r}; "
                "use another folder, or remove the checkpoint to start again"
            )
    check_made_from(was.get(MADE_FROM), now.get(MADE_FROM, {}), str(path), "use another folder")


MADE_FROM = "made_from"
"""Key of the fingerprints of what a run is made from: ``model``, ``teacher``, ``images``."""

_TOLD = {"model": "weights", "teacher": "teacher", "images": "images"}


def check_made_from(was: Any, now: Mapping[str, str], at: str, way: str) -> None:
    """Check that a run goes on with the weights, images and teacher that it began with.

    Args:
        was: fingerprints that were stored, by name; None, or without a name, if an older version stored none.
        now: fingerprints of this run.
        at: the file that stores them, for the message.
        way: the way out, besides restoring what was.

    Raises:
        RunError: if one differs.
    """
    for name, value in now.items():
        known = was.get(name, value) if isinstance(was, Mapping) else value
        if known != value:
            raise RunError(
                f"{at}: a run must resume with the {_TOLD[name]} that it began with, but they are others now "
                f"({str(known)[:8]} then, {value[:8]} now); restore them, or {way}"
            )


def _flat(values: dict[str, Any], at: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{at}{name}.") if isinstance(value, dict) else {at + name: value}
    return flat
