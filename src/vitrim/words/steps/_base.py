"""The base class of token steps, and the description of the tokens between two blocks.

N tokens, P prefix tokens (they come first and always stay), D width, Q channels of all queries (or keys) together.
"""

from typing import ClassVar, NamedTuple, Self

from vitrim.words.plain import Node

__all__ = ["Flow", "StepBase", "Tokens"]


class Tokens(NamedTuple):
    """The tokens between two blocks."""

    prefix: int
    """P."""
    patches: int
    """Number of tokens that are not prefix tokens."""
    grid: tuple[int, int] | None = None
    """Rows and columns, if the patches fill a grid."""
    places: tuple[int, ...] | None = None
    """Positions of the patches in the dense grid, if some were dropped at the same positions in all images."""
    constant_sizes: bool = False
    """Whether attention weights each token of a merged grid by its number of patches, the same in all images."""
    halved: tuple[int, int] = (0, 0)
    """How often the rows and the columns of the grid were halved by merging neighbors."""
    stands_for: int | None = None
    """Number of patches that all patch tokens together represent, if the number for each token depends on the image.
    The numbers are then passed on together with the residual stream. None if each token represents one patch."""

    @property
    def total(self) -> int:
        """N."""
        return self.prefix + self.patches

    @property
    def pooled(self) -> int:
        """Number of tokens that a head reads; a token that represents several patches is repeated as often."""
        return self.total if self.stands_for is None or not self.patches else self.prefix + self.stands_for


class Flow(NamedTuple):
    """Number of tokens in each part of a block."""

    projected: int
    """Tokens for which keys and values are computed."""
    queries: int
    keys: int
    rows: int
    """Tokens of the MLP."""
    mixed: Tokens
    """The tokens on which attention, or the mixer that replaces it, runs."""
    leaves: Tokens
    """The tokens after the block."""

    @classmethod
    def same(cls, arriving: Tokens) -> Self:
        """Return the flow of a block in which all tokens go through all parts."""
        count = arriving.total
        return cls(count, count, count, count, arriving, arriving)


class StepBase(Node):
    """A token step of a block. The methods describe a step that changes nothing; a subclass overrides what differs.

    Class attributes:
        needs_attention: whether the step reads the attention of its block.
        after_attention: whether it acts between attention and MLP, not at the block's input. A block that computes only
            prefix tokens has no patches there, so it cannot have such a step.
        keeps_stream: whether the tokens that stay are computed as in the dense model, at the same positions, so that
            both residual streams can be compared token by token.
    """

    needs_attention: ClassVar[bool] = False
    after_attention: ClassVar[bool] = False
    keeps_stream: ClassVar[bool] = False

    kind: str

    @classmethod
    def example(cls, arriving: Tokens) -> Self | None:
        """Return a step that removes about half of what this kind can remove from a whole grid.

        Tables of times measure this step, and the tests of all kinds use it. None if the grid is too small.
        """
        raise NotImplementedError

    def why_not(self, arriving: Tokens, patches: int) -> str | None:
        """Return why this step cannot run on the tokens `arriving`, on a dense grid of `patches`; None if it can."""
        raise NotImplementedError

    @property
    def adds_zeros(self) -> bool:
        """Whether attention gets a token of zeros in the place of those that are missing."""
        return False

    def why_not_any_size(self) -> str | None:
        """Return why this step cannot be in a model whose image size changes from call to call; None if it can."""
        return None

    def why_not_resized(self) -> str | None:
        """Return why a model with this step cannot be set to another image size; None if it can."""
        return None

    def flow(self, arriving: Tokens, patches: int) -> Flow:
        """Return the tokens at each part of the block."""
        return Flow.same(arriving)

    def own_cost(self, arriving: Tokens, width: int, qk: int) -> tuple[int, int]:
        """Return the multiply-accumulates and parameters of the step itself.

        Args:
            arriving: the tokens at the block's input.
            width: D.
            qk: Q of the block; 0 if it has no attention.
        """
        return 0, 0

    def why_not_joining(self, mine: "StepBase") -> str | None:
        """Return why a plan cannot replace the step `mine` of the parent's block with this step; None if it can."""
        if mine == self:
            return None
        return (
            f"a block can have one token step, but it already has '{mine.kind}' and '{self.kind}' is requested; "
            "leave one out"
        )

    def inherited(self, arriving: Tokens) -> Self:
        """Return this step of a parent's block for a child whose block gets `arriving` and no step by its plan."""
        return self

    def following(self) -> "StepBase | None":
        """Return the step that the next block gets if it has none of its own; None if it gets none."""
        return None

    def simplified(self, patches: int) -> Self | None:
        """Return the same step, or None if it changes nothing on a dense grid of `patches`."""
        return self
