"""What every token step has in common, and the tokens between two blocks.

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
    """Tokens that are not prefix tokens."""
    grid: tuple[int, int] | None = None
    """Rows and columns, while patches fill a grid."""
    places: tuple[int, ...] | None = None
    """Places of the patches on the dense grid, if some were dropped and these places are the same for all images."""
    constant_sizes: bool = False
    """Whether attention counts each token of a merged grid as the patches that it stands for, alike in all images."""
    halved: tuple[int, int] = (0, 0)
    """How often the rows and the columns of the grid were halved by merging neighbors."""
    stands_for: int | None = None
    """How many patches all patch tokens together stand for, if that differs from token to token and from image to
    image; the numbers then travel beside the residual stream. None where every token stands for itself."""

    @property
    def total(self) -> int:
        """N."""
        return self.prefix + self.patches

    @property
    def pooled(self) -> int:
        """Tokens that a head reads: a token that stands for several patches is read as often."""
        return self.total if self.stands_for is None or not self.patches else self.prefix + self.stands_for


class Flow(NamedTuple):
    """How many tokens each part of a block sees."""

    projected: int
    """Tokens of which keys and values are computed."""
    queries: int
    keys: int
    rows: int
    """Tokens of the MLP."""
    mixed: Tokens
    """The tokens that attention (or what stands in its place) runs on."""
    leaves: Tokens
    """The tokens that the next block gets."""

    @classmethod
    def same(cls, arriving: Tokens) -> Self:
        """All tokens go through all parts."""
        count = arriving.total
        return cls(count, count, count, count, arriving, arriving)


class StepBase(Node):
    """A token step of a block. A subclass says what differs from a step that changes nothing.

    Class attributes:
        needs_attention: whether the step reads the attention of its block.
        after_attention: whether it acts between attention and MLP, not at the block's input. A block that computes only
            prefix tokens has no patches there, so it takes no such step.
        keeps_stream: whether the tokens that stay are computed as in the dense model, at the same places, so that both
            residual streams can be compared token by token.
    """

    needs_attention: ClassVar[bool] = False
    after_attention: ClassVar[bool] = False
    keeps_stream: ClassVar[bool] = False

    kind: str

    @classmethod
    def example(cls, arriving: Tokens) -> Self | None:
        """A step that takes about half of what this kind can, on a whole grid; None where the grid is too small.

        Tables of times measure it, and the laws of the project are tried on it.
        """
        raise NotImplementedError

    def why_not(self, arriving: Tokens, patches: int) -> str | None:
        """What is wrong with this step where `arriving` comes, on a dense grid of `patches`; None if nothing is."""
        raise NotImplementedError

    def why_not_any_size(self) -> str | None:
        """What is wrong with this step in a model whose images change their size from call to call; None if nothing."""
        return None

    def why_not_resized(self) -> str | None:
        """Why a model with this step cannot be set to another image size; None if it can."""
        return None

    def flow(self, arriving: Tokens, patches: int) -> Flow:
        """Tokens at each part of the block."""
        return Flow.same(arriving)

    def own_cost(self, arriving: Tokens, width: int, qk: int) -> tuple[int, int]:
        """Multiply-accumulates and parameters of the step itself.

        Args:
            arriving: the tokens at the block's input.
            width: D.
            qk: Q of the block; 0 where it has no attention.
        """
        return 0, 0

    def why_not_joining(self, mine: "StepBase") -> str | None:
        """Why a plan cannot put this step where the parent's block has the step `mine`; None if it can."""
        if mine == self:
            return None
        return (
            f"a block can have one token step, but it already has '{mine.kind}' and '{self.kind}' is asked for; "
            "leave one out"
        )

    def inherited(self, arriving: Tokens) -> Self:
        """What this step of a parent's block becomes where a plan decides nothing and `arriving` comes."""
        return self

    def following(self) -> "StepBase | None":
        """The step of the next block, if that has none of its own; None leaves it without."""
        return None

    def simplified(self, patches: int) -> Self | None:
        """The same step, or None where it changes nothing on a dense grid of `patches`."""
        return self
