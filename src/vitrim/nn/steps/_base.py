"""The base class of the modules of token steps.

B images, N arriving tokens, n tokens that stay, D width.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from vitrim.nn.attention import Heard
from vitrim.nn.axis import Member
from vitrim.nn.stream import Stream
from vitrim.words.spec import Stage
from vitrim.words.steps import Tokens

__all__ = ["Maker", "StepModule"]


class StepModule(nn.Module):
    """A token step of a block; by default it changes nothing."""

    needs_attention = False
    """Whether `after_attention` uses the queries and keys of the block's attention, if it has one."""

    def initial(self, name: str, like: Tensor) -> Tensor:
        """Return the initial value of the parameter `name`, with the type and device of `like`."""
        raise NotImplementedError

    def stream(self) -> tuple[Member, ...]:
        """Return the slices of its parameters that the channels of the residual stream index, relative to the block."""
        return ()

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
        """Reduce the step to as few operations as possible for inference, in place."""

    def fix_(self, dtype: torch.dtype, device: torch.device) -> None:
        """Compute once, in place, what `keys` gives for every image; the step then runs in that type and place.

        Logits get no mask where all keys would be raised alike, because a softmax does not change by that.
        """

    def why_slow(self, dtype: torch.dtype, device: torch.device) -> str | None:
        """Return why the step runs in many operators where a fused kernel exists; None if it does not or cannot."""
        return None

    def enter(self, x: Tensor) -> Tensor:
        """Map the tokens at the block's input, ``(B, N, D)``, to those that attention runs on."""
        return x

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Change the input of attention.

        Args:
            x: normed tokens, ``(B, N, D)``.

        Returns:
            The tokens for which queries, keys and values are computed; only the outputs of the first N are used. And a
            bias for the logits that broadcasts to ``(B, H, N, keys)``, or None.
        """
        return x, None

    def after_attention(self, x: Tensor | Stream, heard: Heard | None) -> Tensor | Stream:
        """Map the tokens after attention, ``(B, N, D)``, to those that go through the MLP.

        Args:
            x: the residual stream.
            heard: queries and keys of the attention; None if the block has none or the step does not need them.
        """
        return x


class Maker(Protocol):
    """The function `make` of a step's file."""

    def __call__(self, step: object, stage: Stage, arriving: Tokens) -> StepModule:
        """Build the module of `step` for a block of `stage` with the tokens `arriving` at its input."""
        ...
