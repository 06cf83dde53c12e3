"""Attention that counts each token of a merged grid as the patches that it stands for.

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
    """Adds the logarithm of the number of patches that each token stands for to its logits.

    Without it, prefix tokens get as many times too large a share of each softmax.

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
        """The tokens that attention runs on."""
        return arriving

    def place(self, arriving: Tokens, grid: tuple[int, int]) -> None:
        """See `StepModule.place`."""
        self.arriving, self.grid, self.attended = arriving, grid, self.mixed(arriving)
        device = getattr(self, "counts", torch.empty(0, device="cpu")).device
        self.init_non_persistent_buffers()
        self.counts = self.counts.to(device)

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Give all tokens, and the logarithms of their numbers, ``(1, 1, 1, N)``."""
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
        """Compute what is not stored."""
        rows, columns = (_patches(n, often) for n, often in zip(self.grid, self.attended.halved, strict=True))
        counts = [1] * self.attended.prefix + [a * b for a, b in itertools.product(rows, columns)]
        # Whole numbers: a cast of the model to another type and back would round their logarithms.
        self.register_buffer("counts", torch.tensor(counts, device="cpu")[None, None, None], persistent=False)


def _patches(size: int, halved: int) -> list[int]:
    """How many of `size` rows (or columns) each one stands for after they were halved so often: ``[2, 2, 2, 1]``."""
    step = 2**halved
    return [min(step, size - start) for start in range(0, size, step)]
