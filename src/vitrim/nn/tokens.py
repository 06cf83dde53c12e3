"""Token steps: what happens to the tokens of a block, at its input and between its attention and its MLP.

B images, N tokens that arrive, n tokens that stay, D width, Q and V channels of all heads (queries or keys; values).

One class for each kind of step in `vitrim.words.steps`; `step_of` chooses it.
"""

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrim.words.errors import DataError
from vitrim.words.spec import Drop, Merge, Stage, Tokens, TopK
from vitrim.words.spec import Step as StepSpec

if TYPE_CHECKING:
    from vitrim.nn.attention import Attention

__all__ = ["Chosen", "Dropped", "Merged", "Seen", "Step", "spread", "step_of"]


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
        missing: patches of the dense grid that one key stands for in attention, see `vitrim.words.spec.Drop`; 0 for
            none.
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


class Merged(Step):
    """Merges patches that are alike, see `vitrim.words.spec.Merge`.

    Source: Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023. There keys are averaged over heads; here
        those of
    all heads are compared together, for after a cut each head has a basis of its own. Tokens that are left keep their
    order, so that neighbours stay in different sets.

    Args:
        prefix: tokens before the patches.
        count: patches that are merged into others.
    """

    looks = True

    def __init__(self, prefix: int, count: int) -> None:
        super().__init__()
        self.prefix, self.count = prefix, count

    def merge(self, x: Tensor, sizes: Tensor | None, seen: Seen | None) -> tuple[Tensor, Tensor]:
        """Map tokens ``(B, N, D)`` and how many patches each stands for ``(B, N, 1)`` to those that are left.

        Args:
            x: the residual stream.
            sizes: 1 for every token if None.
            seen: whose keys are compared; the stream itself if None.
        """
        if sizes is None:
            sizes = torch.ones_like(x[..., :1])
        alike = F.normalize((x if seen is None else seen.k)[:, self.prefix :], dim=-1)
        best, partner = (alike[:, ::2] @ alike[:, 1::2].mT).max(dim=-1)
        order = best.sort(dim=-1, descending=True).indices  # a stable sort has no ONNX form
        gone, stay = order[:, : self.count], order[:, self.count :].sort(dim=-1).values
        # Whole rows of one table, sums and sizes side by side: half the time of gathering along the middle axis.
        heavy = torch.cat([x * sizes, sizes], dim=-1).flatten(0, 1)
        start = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
        first = start + self.prefix
        into = (first + 2 * partner.gather(1, gone) + 1).flatten()[:, None].expand(-1, heavy.shape[1])
        heavy = heavy.scatter_add(0, into, heavy.index_select(0, (first + 2 * gone).flatten()))
        prefix = torch.arange(self.prefix, device=x.device)
        second = torch.arange(1, x.shape[1] - self.prefix, 2, device=x.device)
        kept = torch.cat([start + prefix, first + 2 * stay, first + second], dim=1)
        left = torch.unflatten(heavy.index_select(0, kept.flatten()), 0, (x.shape[0], -1))
        sizes = left[..., -1:]
        return left[..., :-1] / sizes, sizes


def spread(x: Tensor, sizes: Tensor, prefix: int, patches: int) -> Tensor:
    """Put each token as often as it has patches: what a head that pools patches reads then is their mean or attention.

    Args:
        x: ``(B, N, D)``.
        sizes: ``(B, N, 1)``; those of the patches' tokens sum to `patches`.
        prefix: tokens that come first and stay as they are.
        patches: of the dense grid.

    Returns:
        ``(B, prefix + patches, D)``.
    """
    ends = sizes[:, prefix:, 0].float().round().cumsum(dim=1)
    places = torch.arange(patches, device=x.device, dtype=ends.dtype)
    index = (ends[:, None, :] <= places[None, :, None]).sum(dim=-1) + prefix
    return torch.cat([x[:, :prefix], x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))], dim=1)


class Chosen(Step):
    """Keeps the tokens that the attention of the block looks at most, image by image, and the mean of the others.

    Args:
        step: how many, and by what.
        prefix: prefix tokens, which come first and always stay.
    """

    looks = True
    weights: Tensor

    def __init__(self, step: TopK, prefix: int) -> None:
        super().__init__()
        self.spec, self.prefix = step, prefix
        self.register_buffer("weights", torch.tensor(step.weights), persistent=False)

    def settle(self, x: Tensor, seen: Seen | None) -> Tensor:
        """Map ``(B, N, D)`` to ``(B, kept + 1, D)``; kept tokens stay in order, the fused one comes last."""
        count, kept = x.shape[1], self.spec.kept
        if count <= kept or seen is None:
            return x
        scores = self.scores(seen)
        # Sorted, so that prefix tokens stay where heads read them; the order of the score itself would move them.
        chosen = scores.topk(kept, dim=1).indices.sort(dim=1).values
        stays = torch.gather(x, 1, chosen[..., None].expand(-1, -1, x.shape[2]))
        if not self.spec.fused:
            return stays
        left_out = torch.ones_like(scores).scatter(1, chosen, 0.0).to(x.dtype)
        fused = (x * left_out[..., None]).sum(dim=1, keepdim=True) / (count - kept)
        return torch.cat([stays, fused], dim=1)

    def scores(self, seen: Seen) -> Tensor:
        """What each token is worth, ``(B, N)``; prefix tokens above all others."""
        attention = seen.attention
        queries = seen.q[:, :1] if self.prefix else seen.q
        parts = [torch.split(t, list(attention.qk), dim=-1) for t in (queries, seen.k)]
        precise = torch.promote_types(seen.q.dtype, torch.float32)
        heads = [_received(q.to(precise), k.to(precise), attention.scale) for q, k in zip(*parts, strict=True)]
        found = torch.stack(heads).mean(dim=0)
        prefix, patches = found[:, : self.prefix], found[:, self.prefix :]
        if self.spec.weights:
            patches = patches * self.weights.to(patches)
        return torch.cat([torch.full_like(prefix, torch.inf), patches], dim=1)

    def init_non_persistent_buffers(self) -> None:
        """Compute what is not stored."""
        self.weights = torch.tensor(self.spec.weights, device="cpu")


def _received(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """What each key gets of the queries' attention, on average, ``(B, N)``."""
    if q.shape[1] == 1:
        return ((q * k).sum(dim=-1) * scale).softmax(dim=-1)
    return ((q @ k.transpose(-2, -1)) * scale).softmax(dim=-1).mean(dim=1)


def step_of(stage: Stage, tokens: StepSpec | None, arriving: Tokens) -> Step | None:
    """The module of a block's step where `arriving` comes; None if the block runs on all that do."""
    if isinstance(tokens, Merge):
        return Merged(stage.prefix, tokens.count)
    if isinstance(tokens, TopK):
        return Chosen(tokens, stage.prefix)
    return _dropped(stage, tokens, arriving) if isinstance(tokens, Drop) else None


def _dropped(stage: Stage, tokens: Drop, arriving: Tokens) -> Dropped:
    before = range(stage.patches) if arriving.places is None else arriving.places
    rank = {place: stage.prefix + number for number, place in enumerate(before)}
    places = (*range(stage.prefix), *(rank[place] for place in tokens.kept))
    same = len(tokens.kept) == len(before)
    missing = stage.patches - len(tokens.kept) if tokens.exact else 0
    return Dropped(stage.prefix + len(before), None if same else places, missing)
