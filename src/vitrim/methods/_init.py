"""What closed forms give a search: channels in the order of their value, losses, and weights for what it found."""

from collections.abc import Sequence

from torch import Tensor, nn

from vitrim.cut.compensate import images_for_tokens, recovered, turned
from vitrim.cut.compensate.losses import Removal, removals
from vitrim.data import CALIBRATION, eval_loader
from vitrim.families import blocks_of
from vitrim.methods._contract import Data
from vitrim.nn.copying import copied
from vitrim.train import ranks
from vitrim.train.leading import led
from vitrim.words.errors import MethodError
from vitrim.words.plan import Plan
from vitrim.words.progress import progress
from vitrim.words.spec import Spec

__all__ = ["calibrates", "closed_form", "compensation", "few", "few_for", "first", "in_order"]

_TOKENS, _FEW_TOKENS = 16, 6
"""Tokens for each neuron of the widest layer: of all calibration images, and of those with which candidates are
compensated. With fewer, fits learn their images by heart. A ViT-Ti with 17 tokens at half its MACs is 0.083 nats from
its parent with 256 and 64 images, and 0.073 with 723 and 272 (three draws, docs/methods/post_training.md)."""

_MOST = 3
"""Times the usual number of calibration images that are asked for at most."""

_FEW = 64
"""Least number of images with which candidates are compensated."""


def calibrates(spec: Spec, init: str) -> int:
    """Return the number of calibration images that a method asks for, see `vitrim.methods.Method`.

    Args:
        spec: the model.
        init: ``closed_form`` asks for more images than others where they have few tokens.
    """
    if init != "closed_form":
        return CALIBRATION
    return min(max(CALIBRATION, images_for_tokens(spec, _TOKENS)), _MOST * CALIBRATION)


def few_for(spec: Spec) -> int:
    """Return the number of images, if there are as many, with which one of many candidates is compensated."""
    return max(_FEW, images_for_tokens(spec, _FEW_TOKENS))


def few(spec: Spec, data: Data) -> list[Tensor]:
    """Return the images with which one of many candidates is compensated, in batches.

    Raises:
        MethodError: if there are no calibration images.
    """
    return first(_images(data), few_for(spec))


def first(batches: Sequence[Tensor], count: int) -> list[Tensor]:
    """Return batches of the first `count` images, or of all if there are fewer."""
    found: list[Tensor] = []
    for batch in batches:
        if count > 0:
            found.append(batch[:count])
            count -= len(batch)
    return found


def closed_form(model: nn.Module, data: Data, seed: int) -> dict[str, Removal]:
    """Return what each part of `model` loses, see `vitrim.cut.compensate.losses.removals`.

    Raises:
        MethodError: if there are no calibration images.
    """
    images = _images(data)
    with progress("closed forms", len(blocks_of(model))) as advance:
        return removals(model, images, seed=seed, advance=advance)


def in_order(model: nn.Module, data: Data, seed: int) -> nn.Module:
    """Return a copy of `model` with the channels of each head in order, see `vitrim.cut.compensate.turned`.

    Of several processes, which must all call this, the first computes it.

    Raises:
        MethodError: if there are no calibration images.
    """

    def made() -> dict[str, Tensor]:
        images = _images(data)
        with progress("channels in order", len(blocks_of(model))) as advance:
            twin = turned(model, images, seed=seed, advance=advance)
        return {name: value.cpu() for name, value in twin.state_dict().items()}

    twin = copied(model)
    twin.load_state_dict(led(made))
    return twin


def compensation(parent: nn.Module, plan: Plan, data: Data, seed: int) -> dict[str, Tensor]:
    """Return the weights that compensate for a plan in closed form, see `vitrim.cut.compensate.recovered`.

    They are none if the plan cuts the residual width, for which there is no closed form, and on all processes but the
    first, whose result is not used.
    """
    if any(stage.width is not None for stage in plan.stages) or not ranks.first():
        return {}
    images = _images(data)
    with progress("compensation", len(plan.blocks())) as advance:
        return recovered(parent, plan, images, seed=seed, advance=advance)


def _images(data: Data) -> list[Tensor]:
    if data.calibration is None:
        raise MethodError("init=closed_form must have calibration images, but there are none; give data.calibration")
    return [x for x, _ in eval_loader(data.calibration, data.input, batch=32)]
