"""Token steps: what happens to the tokens of a block, at its input and between its attention and its MLP.

B images, N tokens that arrive, n tokens that stay, D width, Q and V channels of all heads (queries or keys; values).

One class for each kind of step in `vitrim.steps`; `step_of` chooses it.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from vitrim.errors import DataError
from vitrim.spec import Drop, Stage, Tokens
from vitrim.spec import Step as StepSpec

if TYPE_CHECKING:
    from vitrim.nn.attention import Attention

__all__ = ["Dropped", "Seen", "Step", "step_of"]


class Seen(NamedTuple):
    """What an attention met: heads' channels in a row, after norms and taps."""

    attention: "Attention"
    q: Tensor
    """``(B, N, Q)``."""
    k: Tensor
    """``(B, N, Q)``."""
    v: Tensor
    """``(B, N, V)``."""


class Step(nn.Module):
    """What all steps have in common; by default they change nothing."""

    looks = False
    """Whether `settle` needs what the attention saw."""

    def fresh(self, name: str, like: Tensor) -> Tensor:
        """The parameter `name` of the step before any training, in the type and on the device of `like`."""
        raise NotImplementedError

    def enter(self, x: Tensor) -> Tensor:
        """Map the tokens at the block's input, ``(B, N, D)``, to those that it runs on."""
        return x

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Change what attention is given.

        Args:
            x: normed tokens, ``(B, N, D)``.

        Returns:
            tokens of which queries, keys and values are made, the first N of which go on, and what to add to the
            logits, broadcasting to ``(B, H, N, keys)``, or None.
        """
        return x, None

    def settle(self, x: Tensor, seen: Seen | None) -> Tensor:
        """Map the tokens after attention, ``(B, N, D)``, to those that go through the MLP and leave.

        Args:
            x: the residual stream.
            seen: what the attention saw, if the step `looks` and the block attends.
        """
        return x


class Dropped(Step):
    """Keeps the tokens at fixed places, the same for all images; prefix tokens come first and always stay.

    Args:
        arriving: N.
        places: those of the n tokens that stay, among the N, rising; None if all stay.
        missing: patches of the dense grid that one key stands for in attention, see `vitrim.spec.Drop`; 0 for none.
    """

    places: Tensor

    def __init__(self, arriving: int, places: tuple[int, ...] | None, missing: int = 0) -> None:
        super().__init__()
        self.arriving, self.kept, self.missing = arriving, places, missing
        self.register_buffer("places", torch.tensor(places or (), dtype=torch.long), persistent=False)

    def enter(self, x: Tensor) -> Tensor:
        """Map ``(B, N, D)`` to ``(B, n, D)``."""
        if x.shape[1] != self.arriving:
            raise DataError(
                f"a block that drops tokens must be given {self.arriving}, but got {x.shape[1]}; the places are tied "
                "to the grid, so resize the images, or cut tokens after the input size is set"
            )
        return x if self.kept is None else x.index_select(1, self.places.to(x.device))

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Add the token that stands for all missing ones, if any are and the step is exact.

        Its query, key and value are the biases (zero without), as those of a masked token are. Its logit is raised by
        the logarithm of their number, for that many equal keys share one softmax.
        """
        if not self.missing:
            return x, None
        raised = x.new_zeros(1, 1, 1, x.shape[1] + 1)
        raised[..., -1] = math.log(self.missing)
        return torch.cat([x, x.new_zeros(x.shape[0], 1, x.shape[2])], dim=1), raised

    def init_non_persistent_buffers(self) -> None:
        """Compute what is not stored."""
        self.places = torch.tensor(self.kept or (), dtype=torch.long, device="cpu")


def step_of(stage: Stage, tokens: StepSpec | None, arriving: Tokens) -> Step | None:
    """The module of a block's step where `arriving` comes; None if the block runs on all that do."""
    return _dropped(stage, tokens, arriving) if isinstance(tokens, Drop) else None


def _dropped(stage: Stage, tokens: Drop, arriving: Tokens) -> Dropped:
    before = range(stage.patches) if arriving.places is None else arriving.places
    rank = {place: stage.prefix + number for number, place in enumerate(before)}
    places = (*range(stage.prefix), *(rank[place] for place in tokens.kept))
    same = len(tokens.kept) == len(before)
    missing = stage.patches - len(tokens.kept) if tokens.exact else 0
    return Dropped(stage.prefix + len(before), None if same else places, missing)
