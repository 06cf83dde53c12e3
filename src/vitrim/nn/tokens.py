"""Token steps: what happens to the tokens at the input of a block.

B images, N tokens that arrive, n tokens that stay, D width.
"""

import math

import torch
from torch import Tensor, nn

from vitrim.errors import DataError
from vitrim.spec import Drop, Stage

__all__ = ["Step", "step_of"]


class Step(nn.Module):
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

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, N, D)`` to ``(B, n, D)``."""
        if x.shape[1] != self.arriving:
            raise DataError(
                f"a block that drops tokens must be given {self.arriving}, but got {x.shape[1]}; the places are tied "
                "to the grid, so resize the images, or cut tokens after the input size is set"
            )
        return x if self.kept is None else x.index_select(1, self.places.to(x.device))

    def with_missing(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Add the token that stands for all missing ones.

        Its query, key and value are the biases (zero without), as those of a masked token are. Its logit is raised by
        the logarithm of their number, for that many equal keys share one softmax.

        Args:
            x: normed tokens, ``(B, n, D)``.

        Returns:
            ``(B, n + 1, D)``, and what to add to the logits, ``(1, 1, 1, n + 1)``.
        """
        raised = x.new_zeros(1, 1, 1, x.shape[1] + 1)
        raised[..., -1] = math.log(self.missing)
        return torch.cat([x, x.new_zeros(len(x), 1, x.shape[2])], dim=1), raised

    def init_non_persistent_buffers(self) -> None:
        """Compute what is not stored."""
        self.places = torch.tensor(self.kept or (), dtype=torch.long, device="cpu")


def step_of(stage: Stage, tokens: Drop | None, arriving: Drop | None) -> Step | None:
    """The step of a block that runs on `tokens` where `arriving` comes; None if it runs on the whole grid."""
    if tokens is None:
        return None
    before = range(stage.patches) if arriving is None else arriving.kept
    rank = {place: stage.prefix + number for number, place in enumerate(before)}
    places = (*range(stage.prefix), *(rank[place] for place in tokens.kept))
    same = len(tokens.kept) == len(before)
    missing = stage.patches - len(tokens.kept) if tokens.exact else 0
    return Step(stage.prefix + len(before), None if same else places, missing)
