"""Token steps as modules: one file for each kind, with the same name as its file in `vitrim.words.steps`."""

import functools
import importlib

from vitrim.nn.steps._base import Maker, StepModule
from vitrim.nn.steps._constant_sizes import ConstantSizes
from vitrim.words.spec import Stage
from vitrim.words.steps import StepBase, Tokens, kinds

__all__ = ["StepModule", "make_step"]


@functools.cache
def _maker(kind: type[StepBase]) -> Maker:
    name = next(name for name, known in kinds().items() if known is kind)
    make: Maker = importlib.import_module(f"{__name__}.{name}").make
    return make


def make_step(step: StepBase | None, stage: Stage, arriving: Tokens) -> StepModule | None:
    """Return the module of a block's token step, for the tokens `arriving`; None if the block needs none.

    A block without a step gets a `ConstantSizes` if an earlier step requires that attention weights tokens by their
    number of patches.
    """
    if step is not None:
        return _maker(type(step))(step, stage, arriving)
    if arriving.constant_sizes and arriving.grid is not None:
        return ConstantSizes(arriving, stage.grid)
    return None
