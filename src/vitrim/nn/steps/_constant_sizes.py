"""Bias of the attention logits that weights each token of a merged grid by its number of patches.

N tokens.
"""

import itertools

import torch
from torch import Tensor

from vitrim.nn.masks import aligned
from vitrim.nn.steps._base import StepModule
from vitrim.words.steps import Tokens

__all__ = ["ConstantSizes"]


class ConstantSizes(StepModule):
    """Adds the logarithm of the number of patches of each token to its logits.

    Without it, the share of the prefix tokens in each softmax is too large, by about the number of patches of a token.

    Args:
        arriving: the tokens at the block's input.
        grid: rows and columns of the dense grid.
    """

    counts: Tensor
    rows: Tensor | None

    def __init__(self, arriving: Tokens, grid: tuple[int, int]) -> None:
        super().__init__()
        self.fixed = False
        self.place(arriving, grid)

    def mixed(self, arriving: Tokens) -> Tokens:
        """Return the tokens that attention runs on."""
        return arriving

    def place(self, arriving: Tokens, grid: tuple[int, int]) -> None:
        """See `StepModule.place`."""
        self.arriving, self.grid, self.attended = arriving, grid, self.mixed(arriving)
        device = getattr(self, "counts", torch.empty(0, device="cpu")).device
        self.init_non_persistent_buffers()
        self.counts = self.counts.to(device)

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return all tokens, and the logarithms of their numbers of patches, ``(1, 1, 1, N)``."""
        if self.fixed:
            return x, None if self.rows is None else self.rows[..., : x.shape[1]]
        return x, self.counts.to(x.device, x.dtype).log()

    def fix_(self, dtype: torch.dtype, device: torch.device) -> None:
        """See `StepModule.fix_`."""
        counts = self.counts.double() if self.attended.constant_sizes else torch.ones(1, dtype=torch.float64)
        same = bool((counts == counts.flatten()[0]).all())
        rows = None if same else aligned(counts.cpu().log()).to(device, dtype)
        self.fixed = True
        self.register_buffer("rows", rows, persistent=False)

    def init_non_persistent_buffers(self) -> None:
        """Compute the buffers that are not stored."""
        rows, columns = (_patches(n, often) for n, often in zip(self.grid, self.attended.halved, strict=True))
        counts = [1] * self.attended.prefix + [a * b for a, b in itertools.product(rows, columns)]
        # The buffer has the integers because casting the model to another type and back would round their logarithms.
        self.register_buffer("counts", torch.tensor(counts, device="cpu")[None, None, None], persistent=False)


def _patches(size: int, halved: int) -> list[int]:
    """Return how many of `size` rows each merged row represents after halving, such as ``[2, 2, 2, 1]``."""
    step = 2**halved
    return [min(step, size - start) for start in range(0, size, step)]
