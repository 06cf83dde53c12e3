"""Keep the tokens at fixed positions, the same for all images.

B images, N arriving tokens, n tokens that stay, D width.
"""

import math

import torch
from torch import Tensor

from vitrim.nn.masks import aligned
from vitrim.nn.steps._base import StepModule
from vitrim.words.errors import DataError
from vitrim.words.spec import Stage
from vitrim.words.steps import Tokens
from vitrim.words.steps.drop import Drop

__all__ = ["Dropped", "make"]


class Dropped(StepModule):
    """Keeps the tokens at fixed positions; prefix tokens come first and always stay.

    Args:
        arriving: N.
        places: indices of the n tokens that stay, among the N, increasing; None if all stay.
        missing: number of missing patches that one more key represents in attention, see `Drop`; 0 for no such key.
    """

    places: Tensor
    rows: Tensor | None
    zero: Tensor

    def __init__(self, arriving: int, places: tuple[int, ...] | None, missing: int = 0) -> None:
        super().__init__()
        self.arriving, self.kept, self.missing, self.fixed = arriving, places, missing, False
        self.register_buffer("places", torch.tensor(places or (), dtype=torch.long), persistent=False)

    def enter(self, x: Tensor) -> Tensor:
        """Map ``(B, N, D)`` to ``(B, n, D)``.

        Raises:
            DataError: if the number of tokens is not N.
        """
        if x.shape[1] != self.arriving:
            raise DataError(
                f"a block that drops tokens must be given {self.arriving}, but got {x.shape[1]}; the places are tied "
                "to the grid, so resize the images, or cut tokens after the input size is set"
            )
        return x if self.kept is None else x.index_select(1, self.places.to(x.device))

    def keys(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Add the token that represents all missing patches, if there are any and the step is exact.

        Its query, key and value are the biases (or zero), as for a masked token. Its logit is raised by the logarithm
        of the number of missing patches because it replaces that many equal keys in the softmax.
        """
        if not self.missing:
            return x, None
        if self.fixed:
            given = torch.cat([x, self.zero.expand(x.shape[0], 1, x.shape[2])], dim=1)
            return given, None if self.rows is None else self.rows[..., : given.shape[1]]
        raised = x.new_zeros(1, 1, 1, x.shape[1] + 1)
        raised[..., -1] = math.log(self.missing)
        return torch.cat([x, x.new_zeros(x.shape[0], 1, x.shape[2])], dim=1), raised

    @property
    def adds_zeros(self) -> bool:
        """See `StepModule.adds_zeros`."""
        return self.missing > 0

    def fix_(self, dtype: torch.dtype, device: torch.device) -> None:
        """See `StepModule.fix_`."""
        if not self.missing:
            return
        raised = torch.zeros(1, 1, 1, (self.arriving if self.kept is None else len(self.kept)) + 1, dtype=torch.float64)
        raised[..., -1] = math.log(self.missing)
        self.fixed = True
        rows = None if self.missing == 1 else aligned(raised).to(device, dtype)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("zero", torch.zeros(1, 1, 1, dtype=dtype, device=device), persistent=False)

    def init_non_persistent_buffers(self) -> None:
        """Compute the buffers that are not stored."""
        self.places = torch.tensor(self.kept or (), dtype=torch.long, device="cpu")


def make(step: Drop, stage: Stage, arriving: Tokens) -> Dropped:
    """See `vitrim.nn.steps.make_step`."""
    before = range(stage.patches) if arriving.places is None else arriving.places
    rank = {place: stage.prefix + number for number, place in enumerate(before)}
    places = (*range(stage.prefix), *(rank[place] for place in step.kept))
    same = len(step.kept) == len(before)
    missing = stage.patches - len(step.kept) if step.exact else 0
    return Dropped(stage.prefix + len(before), None if same else places, missing)
