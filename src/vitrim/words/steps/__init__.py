"""Token steps: which tokens a block runs on, and how many reach each of its parts.

A step acts at the input of a block, or between its attention and its MLP. Each kind is one file in this folder, which
is discovered by its presence, and one file of the same name in `vitrim.nn.steps`, which acts on tensors. Costs, plans,
tables, reports and modules use only the methods of `StepBase`, so a new kind does not change them.

N tokens, P prefix tokens, D width.
"""

import functools
import importlib
import operator
import pkgutil
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from vitrim.words.steps._base import Flow, StepBase, Tokens

__all__ = ["Flow", "Step", "StepBase", "Tokens", "flow_of", "kinds", "why_not_tokens"]


@functools.cache
def kinds() -> dict[str, type[StepBase]]:
    """Return the class of every kind of step, by the name of its file."""
    found: dict[str, type[StepBase]] = {}
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda module: module.name):
        if module.name.startswith("_"):
            continue
        loaded = importlib.import_module(f"{__name__}.{module.name}")
        (found[module.name],) = (
            value
            for value in vars(loaded).values()
            if isinstance(value, type) and issubclass(value, StepBase) and value.__module__ == loaded.__name__
        )
    return found


if TYPE_CHECKING:
    Step = StepBase
else:
    _union: Any = functools.reduce(operator.or_, kinds().values())
    Step = Annotated[_union, Field(discriminator="kind")]
    """Any kind of step; the field `kind` selects the class."""


def why_not_tokens(step: StepBase | None, arriving: Tokens, patches: int) -> str | None:
    """Return why a block with `step` cannot run on the tokens `arriving`; None if it can."""
    if step is not None:
        return step.why_not(arriving, patches)
    return None if arriving.places is None else "patches that were dropped before cannot be kept, but all are kept here"


def flow_of(step: StepBase | None, arriving: Tokens, patches: int, only_prefix: bool = False) -> Flow:
    """Return the tokens at each part of a block without a window.

    Args:
        step: the block's token step; None if it has none.
        arriving: the tokens after the block before.
        patches: number of patches of the dense grid.
        only_prefix: whether queries, MLP and output are computed for the prefix tokens only.
    """
    flow = Flow.same(arriving) if step is None else step.flow(arriving, patches)
    if not only_prefix:
        return flow
    leaves = flow.leaves._replace(patches=0, grid=None, places=())
    return flow._replace(queries=arriving.prefix, rows=arriving.prefix, leaves=leaves)
