"""Token steps as words: which tokens a block runs on, and how many reach each of its parts.

N tokens, P prefix tokens (they come first and always stay), D width, Q channels of all queries (or keys) together.

A step acts at the input of a block, or between its attention and its MLP. What stands between two blocks is a `Tokens`;
each kind of step says what it makes of them, so that costs, plans, reports and modules agree on every count.
"""

import itertools
from typing import Literal, NamedTuple, Self

from pydantic import NonNegativeInt, model_validator

from vitrim.plain import Node

__all__ = ["Drop", "Flow", "Step", "Tokens", "flow_of", "lost"]


class Tokens(NamedTuple):
    """The tokens between two blocks."""

    prefix: int
    """P."""
    patches: int
    """Tokens that are no prefix tokens."""
    grid: tuple[int, int] | None = None
    """Rows and columns, while patches fill a grid."""
    places: tuple[int, ...] | None = None
    """Where on the dense grid the patches stand, if some were dropped and these places are the same for all images."""
    sized: bool = False
    """Whether a token may stand for several patches, and attention counts it as so many."""

    @property
    def total(self) -> int:
        """N."""
        return self.prefix + self.patches


class Flow(NamedTuple):
    """How many tokens each part of a block sees."""

    projected: int
    """Tokens whose keys and values are made."""
    queries: int
    keys: int
    rows: int
    """Tokens of the MLP."""
    leaves: Tokens
    """What the next block gets."""


class Base(Node):
    """What all steps have in common: by default they change nothing."""

    def wrong(self, arriving: Tokens, patches: int) -> str | None:
        """What is wrong with this step where `arriving` comes, on a dense grid of `patches`; None if nothing is."""
        raise NotImplementedError

    def flow(self, arriving: Tokens, patches: int) -> Flow:
        """Tokens at each part of the block."""
        raise NotImplementedError

    def extra(self, arriving: Tokens, width: int, qk: int) -> tuple[int, int]:
        """Multiply-accumulates and parameters of the step itself.

        Args:
            arriving: the tokens at the block's input.
            width: D.
            qk: Q of the block.
        """
        return 0, 0


class Drop(Base):
    """A block runs on some patches only; the others have left the model before it.

    `kept` are their places in the grid of the dense model (row by row from 0, rising), whatever was dropped before, so
    that a place has one number everywhere. Prefix tokens always stay.

    `exact`: whether attention meets one key and value more, made of a token of zeros, whose logit is raised by the
    logarithm of how many patches are missing. That is what the missing patches answer with where a mask multiplies the
    outputs of both norms by zero, so the block then computes what the masked one does (ViT-Slim's training form).
    """

    kind: Literal["drop"] = "drop"
    kept: tuple[NonNegativeInt, ...]
    exact: bool = False

    @model_validator(mode="after")
    def _rise(self) -> Self:
        if any(a >= b for a, b in itertools.pairwise(self.kept)):
            raise ValueError("kept places must rise")
        return self

    def wrong(self, arriving: Tokens, patches: int) -> str | None:
        """See `Base.wrong`."""
        if self.kept and self.kept[-1] >= patches:
            return f"kept places must lie within the grid's {patches}, but one is {self.kept[-1]}"
        if arriving.places is None and arriving.patches != patches:
            return "patches must be dropped before others are merged or chosen, but here they have lost their places"
        missing = set(self.kept) - set(arriving.places) if arriving.places is not None else set()
        if missing:
            return f"patches that were dropped before must stay away, but {sorted(missing)[:8]} are kept here"
        return None

    def flow(self, arriving: Tokens, patches: int) -> Flow:
        """See `Base.flow`; in the exact form one token more goes through attention, for all that are missing."""
        count, missing = len(self.kept), patches - len(self.kept)
        here = arriving.prefix + count
        seen = here + (1 if self.exact and missing else 0)
        leaves = arriving._replace(patches=count, grid=None, places=self.kept) if missing else arriving
        return Flow(seen, seen, seen, here, leaves)


Step = Drop
"""Any kind of step, told apart by `kind`."""


def lost(step: Step | None, arriving: Tokens, patches: int) -> str | None:
    """What is wrong with a block that runs on `step` where `arriving` comes, in words; None if nothing is."""
    if step is not None:
        return step.wrong(arriving, patches)
    return None if arriving.places is None else "patches that were dropped before must stay away, but all are kept here"


def flow_of(step: Step | None, arriving: Tokens, patches: int, only_prefix: bool = False) -> Flow:
    """Tokens at each part of a block without a window.

    Args:
        step: the block's; None if it has none.
        arriving: what the block before leaves.
        patches: those of the dense grid.
        only_prefix: whether prefix tokens alone ask and go on.
    """
    count = arriving.total
    flow = Flow(count, count, count, count, arriving) if step is None else step.flow(arriving, patches)
    if not only_prefix:
        return flow
    leaves = flow.leaves._replace(patches=0, grid=None, places=())
    return flow._replace(queries=arriving.prefix, rows=arriving.prefix, leaves=leaves)
