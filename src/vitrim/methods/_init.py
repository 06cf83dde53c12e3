"""What a search starts from: the losses of closed forms on the calibration images."""

from torch import nn

from vitrim.cut.compensate.losses import Removal, removals
from vitrim.data import eval_loader
from vitrim.families import blocks_of
from vitrim.methods._contract import Data
from vitrim.words.errors import MethodError
from vitrim.words.progress import progress

__all__ = ["closed_form"]


def closed_form(model: nn.Module, data: Data, seed: int) -> dict[str, Removal]:
    """Return what each part of `model` loses, see `vitrim.cut.compensate.losses.removals`.

    Raises:
        MethodError: if there are no calibration images.
    """
    if data.calibration is None:
        raise MethodError("init=closed_form must have calibration images, but there are none; give data.calibration")
    images = [x for x, _ in eval_loader(data.calibration, data.input, batch=32)]
    with progress("closed forms", len(blocks_of(model))) as advance:
        return removals(model, images, seed=seed, advance=advance)
