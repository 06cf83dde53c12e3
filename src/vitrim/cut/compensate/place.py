"""One block of a model with its input, shared by the cuts of its attention and its MLP.

B images, N tokens, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vitrim.cut.compensate.importance import Importance
from vitrim.nn import Block, computed, make_block
from vitrim.nn.feed import exact
from vitrim.nn.modes import without_data
from vitrim.nn.stream import Residual, tokens_of
from vitrim.words.spec import Conv, Stage
from vitrim.words.steps import Tokens

__all__ = ["BlockChoice", "Kept", "Place", "Widths", "part", "unscaled"]

Kept = tuple[int, ...]
Widths = int | tuple[Kept, ...] | None


@dataclass(frozen=True)
class BlockChoice:
    """What to keep of one block.

    Attributes:
        heads: heads to keep; None for all.
        qk: number of query/key channels of each kept head, in a new basis; or the channels that each head keeps, with
            one entry for each head of the parent; None for no change.
        v: the same for values.
        conv: a convolution in place of attention, fitted to its output; then nothing else may be said of attention.
        hidden: number of neurons to keep, which are then chosen; or the neurons to keep; None for no change.
    """

    heads: Kept | None = None
    qk: Widths = None
    v: Widths = None
    conv: Conv | None = None
    hidden: int | Kept | None = None


@dataclass(frozen=True, eq=False)
class Place:
    """A block of the parent, its input, and the settings of the re-fit.

    Attributes:
        path: path of the block.
        block: the parent's block.
        stage: the stage that contains it.
        arrives: the tokens at its input.
        worth: by path of a branch, see `importances`.
        streams: input of the block after the cut blocks before it, one entry for each batch.
        dense: input of the block in the parent, if `alpha` is above 0.
        strength: strength of the ridge.
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
        """Return the block with another mixer or MLP, with the parameters of `state` and else those of the parent.

        Args:
            mixer: spec of the mixer.
            hidden: number of neurons; None for no MLP.
            state: parameters and stored buffers by name.
        """
        node = self.block.spec.model_copy(update={"mixer": mixer, "hidden": hidden})
        with without_data():
            block = make_block(self.stage, node, self.arrives)
        block.is_last, block.source = self.block.is_last, self.block.source
        own = self.block.state_dict()
        like = next(self.block.parameters())
        for name, empty in block.state_dict(keep_vars=True).items():
            kind = like.dtype if empty.is_floating_point() else empty.dtype
            value = state[name].to(like.device, kind) if name in state else own[name]
            if isinstance(empty, nn.Parameter):
                value = nn.Parameter(value, requires_grad=False)
            owner, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(owner), leaf, value)
        return computed(block).eval()

    def toward(self, own: Tensor, other: Tensor, gap: Tensor, branch: Literal[1, 2]) -> Tensor:
        """Return the target of a re-fit: the layer's own output, moved by `alpha` to what restores the dense stream.

        Args:
            own: output of the layer on the stream as it is.
            other: its output on the dense stream.
            gap: the dense stream less the stream as it is, before the branch.
            branch: attention (1) or MLP (2).
        """
        if self.block.form.post_norm:  # a norm undoes what the branch would have to restore
            return own
        return own + self.alpha * (unscaled(gap, self.scale(branch)) + other - own)

    def scale(self, branch: Literal[1, 2]) -> Tensor | None:
        """Return the layer scale of attention (1) or MLP (2), ``(D,)``; None if there is none."""
        gamma = self.block.scale(branch)
        return None if gamma is None else gamma.detach()

    def added(self, mean: Tensor, branch: Literal[1, 2]) -> Tensor:
        """Return the constant that attention (1) or MLP (2) with constant output `mean` adds to the stream."""
        gamma = self.scale(branch)
        scaled = mean if gamma is None else mean * exact(gamma)
        if not self.block.form.post_norm:
            return scaled
        norm = self.block.norm1 if branch == 1 else self.block.norm2
        like = next(norm.parameters(), scaled)
        with torch.no_grad():
            return exact(norm(scaled.to(like)))


def part(worth: Importance, batches: Sequence[Residual], number: int) -> Tensor:
    """Return the token weights of batch `number`, ``(B, N)``."""
    start = sum(len(tokens_of(batch)) for batch in batches[:number])
    batch = tokens_of(batches[number])
    return worth.weights[start : start + len(batch)].to(batch.device)


def unscaled(stream: Tensor, scale: Tensor | None) -> Tensor:
    """Divide a difference of streams by the layer scale; it is zero for channels with a scale close to zero."""
    if scale is None:
        return stream
    open_ = scale.abs() > 1e-3 * scale.abs().max()
    return torch.where(open_, stream / torch.where(open_, scale, torch.ones_like(scale)), torch.zeros_like(stream))
