"""What every module of a token step has in common.

B images, N tokens that arrive, n tokens that stay, D width.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from vitrim.nn.attention import Heard
from vitrim.nn.stream import Stream
from vitrim.words.spec import Stage
from vitrim.words.steps import Tokens

__all__ = ["Maker", "StepModule"]


class StepModule(nn.Module):
    """A token step of a block; by default it changes nothing."""

    needs_attention = False
    """Whether `after_attention` uses the queries and keys of the block's attention, where it has one."""

    def initial(self, name: str, like: Tensor) -> Tensor:
        """The parameter `name` of the step before any training, in the type and on the device of `like`."""
        raise NotImplementedError

    def place(self, arriving: Tokens, grid: tuple[int, int]) -> None:
        """Adapt to another image size.

        Args:
            arriving: the tokens at the block's input.
            grid: rows and columns of the dense grid.
        """

    @property
    def adds_zeros(self) -> bool:
        """Whether `keys` adds tokens of zeros to the normed ones that attention is given."""
        return False

    def fold_(self) -> None:
        """Put what inference needs into as few operations as possible, in place."""

    def fix_(self, dtype: torch.dtype, device: torch.device) -> None:
        """Compute once, in place, what `keys` gives for every image; the step then runs in that type and place.

        Logits get no mask where all keys would be raised alike, because a softmax does not change by that.
        """

    def enter(self, x: Tensor) -> Tensor:
        """Map the tokens at the block's input, ``(B, N, D)``, to those that it runs on."""
        return x

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Change what attention is given.

        Args:
            x: normed tokens, ``(B, N, D)``.

        Returns:
            Tokens of which queries, keys and values are computed, the first N of which go on, and what to add to the
            logits, broadcasting to ``(B, H, N, keys)``, or None.
        """
        return x, None

    def after_attention(self, x: Tensor | Stream, heard: Heard | None) -> Tensor | Stream:
        """Map the tokens after attention, ``(B, N, D)``, to those that go through the MLP and leave.

        Args:
            x: the residual stream.
            heard: queries and keys of the attention; None where the block has none or the step does not need them.
        """
        return x


class Maker(Protocol):
    """The function `make` of a step's file."""

    def __call__(self, step: object, stage: Stage, arriving: Tokens) -> StepModule:
        """The module of the word `step` in a block of `stage` where `arriving` comes."""
        ...
