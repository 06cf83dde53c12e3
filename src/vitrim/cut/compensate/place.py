"""One block of a model, with what it meets: what the parts of a cut share.

B images, N tokens, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitrim.cut.compensate.importance import Importance
from vitrim.nn import Block, computed, make_block
from vitrim.nn.stream import Residual, tokens_of
from vitrim.words.spec import Stage
from vitrim.words.steps import Tokens

__all__ = ["Choice", "Kept", "Place", "Widths", "part", "unscaled"]

Kept = tuple[int, ...]
Widths = int | tuple[Kept, ...] | None


@dataclass(frozen=True)
class Choice:
    """What becomes of one block.

    Attributes:
        heads: those that stay; None for all.
        qk: channels of each living head, in a basis made for it; or those that each head keeps as they are, one entry a
            head of the parent; None leaves them alone.
        v: the same for values.
        hidden: neurons, to be chosen; or those that stay; None leaves them alone.
    """

    heads: Kept | None = None
    qk: Widths = None
    v: Widths = None
    hidden: int | Kept | None = None


@dataclass(frozen=True, eq=False)
class Place:
    """A block of the parent, what arrives there, and how its layers are re-fitted.

    Attributes:
        path: of the block.
        block: the parent's.
        stage: where it stands.
        arrives: the tokens at its input.
        worth: by path of a branch, see `importances`.
        streams: what enters the block, batch by batch, from the cut blocks before it.
        dense: what enters it in the parent, where `alpha` is above 0.
        strength: of the ridge.
        alpha: see `compensated`.
    """

    path: str
    block: Block
    stage: Stage
    arrives: Tokens
    worth: Mapping[str, Importance]
    streams: Sequence[Residual]
    dense: Sequence[Residual] | None
    strength: float
    alpha: float

    def rebuilt(self, mixer: object, hidden: int | None, state: Mapping[str, Tensor]) -> Block:
        """The block with another mixer or MLP: parameters of `state`, and for the rest the parent's own."""
        node = self.block.spec.model_copy(update={"mixer": mixer, "hidden": hidden})
        with torch.device("meta"):
            block = make_block(self.stage, node, self.arrives)
        block.is_last = self.block.is_last
        own = dict(self.block.named_parameters())
        like = next(iter(own.values()))
        for name, _ in list(block.named_parameters()):
            value = state[name].to(like.device, like.dtype) if name in state else own[name].detach()
            owner, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
        return computed(block).eval()

    def scale(self, name: str) -> Tensor | None:
        """Layer scale after a branch (``ls1`` or ``ls2``), ``(D,)``."""
        gamma = getattr(getattr(self.block, name), "gamma", None)
        return gamma.detach() if isinstance(gamma, Tensor) else None

    def after_scale(self, mean: Tensor, name: str) -> Tensor:
        """What a constant output of a branch adds to the stream."""
        gamma = self.scale(name)
        return mean if gamma is None else mean * gamma.cpu().double()


def part(worth: Importance, batches: Sequence[Residual], number: int) -> Tensor:
    """Token weights of batch `number`, ``(B, N)``."""
    start = sum(len(tokens_of(batch)) for batch in batches[:number])
    batch = tokens_of(batches[number])
    return worth.weights[start : start + len(batch)].to(batch.device)


def unscaled(stream: Tensor, scale: Tensor | None) -> Tensor:
    """A difference of streams before layer scale; directions that it all but closes ask for nothing."""
    if scale is None:
        return stream
    open_ = scale.abs() > 1e-3 * scale.abs().max()
    return torch.where(open_, stream / torch.where(open_, scale, torch.ones_like(scale)), torch.zeros_like(stream))
