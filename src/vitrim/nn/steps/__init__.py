"""Token steps as modules: one file a kind, of the same name as the word in `vitrim.words.steps`."""

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
    """The module of a block's step where `arriving` comes; None if the block runs on all tokens as they are.

    A block without a step still counts tokens of a merged grid in its attention, where an earlier step asks for that.
    """
    if step is not None:
        return _maker(type(step))(step, stage, arriving)
    if arriving.constant_sizes and arriving.grid is not None:
        return ConstantSizes(arriving, stage.grid)
    return None
