"""The results of a calibration: how far each single cut changes the model's output, and the file that stores them.

B images, L blocks, S schedules of merging.

The file is safetensors: losses as tensors, and in its metadata the model's spec and a fingerprint of its weights, which
prevent its use for another model.
"""

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vitrim.data import Input
from vitrim.families import describe
from vitrim.nn.weights import fingerprint
from vitrim.words.errors import MethodError
from vitrim.words.formats import parse_spec
from vitrim.words.parsing import parse_json, shown
from vitrim.words.plain import dump, load, reason, writing
from vitrim.words.spec import Attention, Spec

__all__ = ["Calibration", "read_calibration", "write_calibration"]

FORMAT = 4
"""Format 1 had another hash of the weights; format 2 holds losses of merging by keys; format 3 those of convolutions
whose prefix tokens get a constant."""
_KEY = "vitrim_calibration"


@dataclass(frozen=True, eq=False)
class Calibration:
    """Losses of single cuts: divergence from the dense output on separate images, nats.

    Attributes:
        spec: spec of the dense model.
        weights: hash of its weights (`vitrim.nn.weights.fingerprint`).
        input: size and normalization of the images.
        count: number of images used for the statistics.
        shares: by path of a cut (``stages.0.blocks.3.hidden``, ``….qk``, ``….v``), removed shares, increasing.
        losses: by the same paths, the losses measured there. ``….heads`` contains one loss for each head that is
            removed alone, followed by that of removing all.
        merges: patches merged in each block, ``(S, L)``, integers; the first schedule merges none. Numbers below 0
            halve the grid, see `vitrim.methods.post_training.schedule.merging`.
        merged: losses of these schedules, ``(S,)``.
        seconds: time that the calibration took.
    """

    spec: Spec
    weights: str
    input: Input
    count: int
    shares: Mapping[str, tuple[float, ...]]
    losses: Mapping[str, tuple[float, ...]]
    merges: tuple[tuple[int, ...], ...]
    merged: tuple[float, ...]
    seconds: float = 0.0

    @property
    def merge(self) -> str:
        """Return the kind of merging of the schedules: ``bipartite``, ``grid`` or ``none``."""
        numbers = [count for row in self.merges for count in row]
        return "grid" if min(numbers) < 0 else "bipartite" if max(numbers) else "none"

    def check(self, model: nn.Module, input: Input, at: str) -> None:
        """Raise an error for another model, other weights, or images of another size or normalization.

        Raises:
            MethodError: naming the difference.
        """
        way = "calibrate again, or name the model it was made for"
        if describe(model) != self.spec:
            name = self.spec.host.name or self.spec.family
            raise MethodError(
                f"{at}: the calibration must be of this model, but is of another structure ({name}); {way}"
            )
        if input.size != self.input.size:
            raise MethodError(
                f"{at}: images must be of the size {self.input.size} that was calibrated, but are {input.size}; {way}"
            )
        if (input.mean, input.std) != (self.input.mean, self.input.std):
            raise MethodError(f"{at}: images must be normalized as they were at calibration, but are not; {way}")
        if fingerprint(model) != self.weights:
            raise MethodError(f"{at}: the calibration must be of this model, but its weights were others; {way}")


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write a calibration atomically.

    Raises:
        MethodError: if the file cannot be written.
    """
    tensors: dict[str, Tensor] = {
        "merges": torch.tensor(calibration.merges, dtype=torch.int64),
        "merged": torch.tensor(calibration.merged, dtype=torch.float64),
    }
    for name, losses in calibration.losses.items():
        tensors[f"losses/{name}"] = torch.tensor(losses, dtype=torch.float64)
        tensors[f"shares/{name}"] = torch.tensor(calibration.shares[name], dtype=torch.float64)
    sheet = {
        "format": FORMAT,
        "spec": dump(calibration.spec),
        "weights": calibration.weights,
        "input": dump(calibration.input),
        "count": calibration.count,
        "seconds": calibration.seconds,
    }
    try:
        with writing(path) as part:
            save_file(tensors, part, metadata={_KEY: json.dumps(sheet)})
    except (OSError, SafetensorError) as problem:
        raise MethodError(
            f"{path}: the calibration must be written here, but {reason(problem)}; choose another place"
        ) from None


def read_calibration(path: Path) -> Calibration:
    """Read a file that `write_calibration` wrote.

    Raises:
        MethodError: if the file is missing, damaged, or holds something else.
    """
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            if text is not None:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise MethodError(
            f"{path}: the calibration must exist, but it does not; make one with `vitrim pareto`"
        ) from None
    except (OSError, SafetensorError) as problem:
        raise MethodError(
            f"{path}: the calibration must be whole safetensors, but {reason(problem)}; make it again"
        ) from None
    if text is None:
        raise MethodError(f"{path}: the file must hold a calibration, but holds something else; see `vitrim pareto`")
    return _of(path, text, tensors)


def _of(path: Path, text: str, tensors: Mapping[str, Tensor]) -> Calibration:
    try:
        sheet: dict[str, Any] = parse_json(text, MethodError, str(path))
        if sheet["format"] != FORMAT:
            raise ValueError(f"its format is {shown(sheet['format'])}, not {FORMAT}")
        losses = {name[7:]: tuple(value.tolist()) for name, value in tensors.items() if name.startswith("losses/")}
        found = Calibration(
            spec=parse_spec(sheet["spec"], MethodError, f"{path}: spec"),
            weights=str(sheet["weights"]),
            input=load(Input, sheet["input"], MethodError, at=f"{path}: input"),
            count=int(sheet["count"]),
            shares={name: tuple(tensors[f"shares/{name}"].tolist()) for name in losses},
            losses=losses,
            merges=tuple(tuple(row) for row in tensors["merges"].tolist()),
            merged=tuple(tensors["merged"].tolist()),
            seconds=float(sheet["seconds"]),
        )
    except (ValueError, KeyError, TypeError, OverflowError) as problem:
        if isinstance(problem, MethodError):
            raise
        raise MethodError(
            f"{path}: the calibration must be one of this version's, but {reason(problem)}; make it again"
        ) from None
    wrong = why_not_losses(found)
    if wrong is not None:
        raise MethodError(f"{path}: {wrong}; make it again")
    return found


def why_not_losses(found: Calibration) -> str | None:
    """Return why the numbers of a calibration cannot be losses of cuts of its model; None if they can."""
    blocks = {path: block for path, _, block in found.spec.blocks()}
    for name, losses in found.losses.items():
        path, _, kind = name.rpartition(".")
        shares = found.shares[name]
        if path not in blocks or kind not in ("qk", "v", "heads", "conv3", "conv1", "hidden", "block"):
            return f"losses must be of cuts of the model, but some are of {shown(name)}"
        if not losses or len(losses) != len(shares):
            return f"{name}: each loss must have a share, but there are {len(losses)} losses and {len(shares)} shares"
        if not all(map(math.isfinite, losses)):
            return f"{name}: losses must be finite, but one is not"
        rising = all(a < b for a, b in itertools.pairwise((0.0, *shares))) and shares[-1] <= 1
        mixer = blocks[path].mixer
        heads = len(mixer.v) if isinstance(mixer, Attention) else 0
        if kind == "heads" and len(losses) not in (1, heads + 1):
            return (
                f"{name}: there must be a loss for each of {heads} heads and one for all, but there are {len(losses)}"
            )
        if kind != "heads" and not rising:
            return f"{name}: removed shares must rise within 0 and 1, but do not"
    if len(found.merged) != len(found.merges) or not found.merges:
        return f"each schedule must have a loss, but there are {len(found.merged)} for {len(found.merges)} schedules"
    if any(len(row) != len(blocks) for row in found.merges):
        return f"schedules must be of the {len(blocks)} blocks of the model, but one is not"
    return None if all(map(math.isfinite, found.merged)) else "losses of schedules must be finite, but one is not"
