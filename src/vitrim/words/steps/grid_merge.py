"""Merge neighboring patches along one axis of the grid (CAIT)."""

from typing import Literal, Self

from vitrim.words.steps._base import Flow, StepBase, Tokens

__all__ = ["GridMerge"]


class GridMerge(StepBase):
    """Neighboring patches are merged in pairs along one axis of the grid, at the block's input; the result is a grid.

    A last column (row) without a neighbor is paired with itself, so that n columns become ``ceil(n / 2)``. Prefix
    tokens are unchanged. A merge after block p is stored in block p + 1.

    Attributes:
        axis: ``w`` halves the columns, ``h`` the rows.
        form: ``linear`` maps both tokens with one matrix each and starts as their mean. ``channel`` multiplies each
            channel of both tokens by a weight and starts as their mean. ``mean`` is their mean.
        size_bias: whether, from this block on, attention weights each token by the number of its patches, by adding
            the logarithm of that number to its logits.
    """

    kind: Literal["grid"] = "grid"
    axis: Literal["w", "h"]
    form: Literal["linear", "mean", "channel"] = "linear"
    size_bias: bool = False

    @classmethod
    def example(cls, arriving: Tokens) -> Self | None:
        """See `StepBase.example`."""
        if arriving.grid is None or arriving.patches < 2:
            return None
        return cls(axis="w" if arriving.grid[1] > 1 else "h")

    def why_not(self, arriving: Tokens, patches: int) -> str | None:
        """See `StepBase.why_not`."""
        if arriving.grid is None:
            return "neighbors can be merged while patches fill a grid, but some were dropped or merged before"
        if arriving.grid["hw".index(self.axis)] == 1:
            rows, columns = arriving.grid
            return f"a grid can be halved along an axis of 2 or more, but along '{self.axis}' {rows} x {columns} has 1"
        return None

    def why_not_any_size(self) -> str | None:
        """See `StepBase.why_not_any_size`: two grids with equally many tokens cannot be distinguished."""
        return (
            "the grid must stay where neighbors are merged, but dynamic_img_size is on; build the model without it, "
            "and change the size with set_input_size"
        )

    def flow(self, arriving: Tokens, patches: int) -> Flow:
        """See `StepBase.flow`."""
        return Flow.same(self._merged(arriving))

    def own_cost(self, arriving: Tokens, width: int, qk: int) -> tuple[int, int]:
        """See `StepBase.own_cost`: both matrices and a bias, or two weights and a bias for each channel."""
        if self.form == "linear":
            return self._merged(arriving).patches * 2 * width**2, 2 * width**2 + width
        return 0, 3 * width if self.form == "channel" else 0

    def _merged(self, arriving: Tokens) -> Tokens:
        assert arriving.grid is not None
        (rows, columns), (high, wide) = arriving.grid, arriving.halved
        grid, halved = ((-(-rows // 2), columns), (high + 1, wide))
        if self.axis == "w":
            grid, halved = ((rows, -(-columns // 2)), (high, wide + 1))
        constant = arriving.constant_sizes or self.size_bias
        return arriving._replace(patches=grid[0] * grid[1], grid=grid, halved=halved, constant_sizes=constant)
