"""Token steps as words: which tokens a block runs on, and how many reach each of its parts.

N tokens, P prefix tokens (they come first and always stay), D width, Q channels of all queries (or keys) together.

A step acts at the input of a block, or between its attention and its MLP. What stands between two blocks is a `Tokens`;
each kind of step says what it makes of them, so that costs, plans, reports and modules agree on every count.
"""

import itertools
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from vitrim.words.plain import Node

__all__ = ["Drop", "Flow", "GridMerge", "Merge", "Step", "Tokens", "TopK", "flow_of", "lost", "spans"]


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
    """Whether tokens of a merged grid count in attention as the patches that they stand for."""
    halved: tuple[int, int] = (0, 0)
    """How often the rows and the columns of the grid were halved by merging neighbours."""
    carried: bool = False
    """Whether a token may stand for several patches, in every image for others, and the stream carries their number."""

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

    attends: ClassVar[bool] = False
    """Whether the step reads the attention of its block."""

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


class GridMerge(Base):
    """Neighbouring patches are merged in pairs along one axis of the grid, at the block's input; a grid stays a grid.

    A last column (row) without a neighbour is paired with itself, so that n columns become ``ceil(n / 2)``. Prefix
    tokens pass. A merge after block p stands at the input of block p + 1.

    `axis`: ``w`` halves the columns, ``h`` the rows. `form`: ``linear`` maps both tokens by one matrix each and starts
    as their mean, ``channel`` weighs each channel of both and starts as their mean, ``mean`` is their mean.
    `size_bias`: whether, from this block on, attention counts each token as the patches that it stands for (their
    number's logarithm is added to its logits).
    """

    kind: Literal["grid"] = "grid"
    axis: Literal["w", "h"]
    form: Literal["linear", "mean", "channel"] = "linear"
    size_bias: bool = False

    def wrong(self, arriving: Tokens, patches: int) -> str | None:
        """See `Base.wrong`."""
        if arriving.grid is None:
            return "neighbours can be merged while patches fill a grid, but some were dropped or merged before"
        if arriving.grid["hw".index(self.axis)] == 1:
            rows, columns = arriving.grid
            return f"a grid can be halved along an axis of 2 or more, but along '{self.axis}' {rows} x {columns} has 1"
        return None

    def flow(self, arriving: Tokens, patches: int) -> Flow:
        """See `Base.flow`."""
        leaves = self._merged(arriving)
        return Flow(leaves.total, leaves.total, leaves.total, leaves.total, leaves)

    def extra(self, arriving: Tokens, width: int, qk: int) -> tuple[int, int]:
        """See `Base.extra`: both matrices and a bias, or two weights and a bias for each channel."""
        if self.form == "linear":
            return self._merged(arriving).patches * 2 * width**2, 2 * width**2 + width
        return 0, 3 * width if self.form == "channel" else 0

    def _merged(self, arriving: Tokens) -> Tokens:
        assert arriving.grid is not None
        (rows, columns), (high, wide) = arriving.grid, arriving.halved
        grid, halved = ((-(-rows // 2), columns), (high + 1, wide))
        if self.axis == "w":
            grid, halved = ((rows, -(-columns // 2)), (high, wide + 1))
        sized = arriving.sized or self.size_bias
        return arriving._replace(patches=grid[0] * grid[1], grid=grid, halved=halved, sized=sized)


class Merge(Base):
    """Between attention and MLP `count` patches are merged into others that are like them, in every image its own.

    Patches are taken in turn into two sets; each of the first looks for the one of the second whose keys are most like
    its own, and the `count` best pairs become one token, their mean by the number of patches in each. From then on
    attention counts a token as so many keys as it has patches. Prefix tokens are never merged.
    """

    kind: Literal["merge"] = "merge"
    count: PositiveInt

    def wrong(self, arriving: Tokens, patches: int) -> str | None:
        """See `Base.wrong`."""
        if arriving.places is not None:
            return "patches must be merged where all are there, but some were dropped before"
        if arriving.sized:
            return (
                "patches must be merged in one way, but neighbours were merged before with size_bias; set it to false"
            )
        if 2 * self.count > arriving.patches:
            return f"at most half of the {arriving.patches} patches can be merged, but {self.count} are asked for"
        return None

    def flow(self, arriving: Tokens, patches: int) -> Flow:
        """See `Base.flow`."""
        here = arriving.total
        leaves = arriving._replace(patches=arriving.patches - self.count, grid=None, carried=True)
        return Flow(here, here, here, leaves.total, leaves)

    def extra(self, arriving: Tokens, width: int, qk: int) -> tuple[int, int]:
        """The products of keys by which patches are matched; of the stream, where the block has no attention."""
        return -(-arriving.patches // 2) * (arriving.patches // 2) * (qk or width), 0


class TopK(Base):
    """A block passes on the tokens that its attention looks at most, image by image, and the mean of the others.

    The choice stands between attention and MLP: all that arrive attend, `kept` of them (prefix tokens among them, which
    always stay) go on in their order, and last comes one token more, the mean of those left out. How many go on is the
    same for all images. Where no more than `kept` arrive nothing is done.

    `by`: ``cls_attn`` ranks tokens by what the first token's attention gives them, the mean over heads; without prefix
    tokens, by what they receive on average. ``hsic_attn`` multiplies that by `weights`, one for each patch that
    arrives.

    Source: Hou and Kung, CVPR Workshops 2022 (MDC); the fused token is a plain mean as in its published code.
    """

    attends: ClassVar[bool] = True

    kind: Literal["top_k"] = "top_k"
    kept: PositiveInt
    fused: bool = True
    by: Literal["cls_attn", "hsic_attn"] = "cls_attn"
    weights: tuple[NonNegativeFloat, ...] = ()

    @model_validator(mode="after")
    def _weighed(self) -> Self:
        if bool(self.weights) != (self.by == "hsic_attn"):
            raise ValueError(f"weights must be given for hsic_attn alone, but by is {self.by} with {len(self.weights)}")
        return self

    def wrong(self, arriving: Tokens, patches: int) -> str | None:
        """See `Base.wrong`."""
        if self.kept <= arriving.prefix:
            return f"a patch must be kept besides {arriving.prefix} prefix tokens, but {self.kept} tokens are kept"
        if self.weights and len(self.weights) != arriving.patches:
            return f"weights must be given for each of {arriving.patches} patches, but are for {len(self.weights)}"
        if arriving.sized or arriving.carried:
            return "tokens must be chosen before others are merged, but here they stand for several patches"
        return None

    def flow(self, arriving: Tokens, patches: int) -> Flow:
        """See `Base.flow`."""
        here = arriving.total
        if here <= self.kept:
            return Flow(here, here, here, here, arriving)
        left = self.kept + self.fused
        leaves = arriving._replace(patches=left - arriving.prefix, grid=None, places=None)
        return Flow(here, here, here, left, leaves)

    def extra(self, arriving: Tokens, width: int, qk: int) -> tuple[int, int]:
        """See `Base.extra`: without prefix tokens, the logits of all pairs once more.

        One row of logits, for the first token, is a product element by element, and not counted: 0.003 % of DeiT-S.
        """
        return (0 if arriving.prefix or arriving.total <= self.kept else arriving.total**2 * qk), 0


Step = Annotated[Drop | GridMerge | Merge | TopK, Field(discriminator="kind")]
"""Any kind of step, told apart by `kind`."""


def spans(size: int, halved: int) -> list[int]:
    """How many of `size` rows (or columns) each one stands for after they were halved so often: ``[2, 2, 2, 1]``."""
    step = 2**halved
    return [min(step, size - start) for start in range(0, size, step)]


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
