"""Record activations inside a block while it runs: queries, keys, heads' outputs, neurons and outputs of layers.

B images, N tokens, D width, H heads, C channels of all heads together.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vitrim.nn import Attention, Block, Mlp
from vitrim.nn.feed import fed
from vitrim.nn.stream import Residual

__all__ = ["Attended", "Mixed", "arriving", "attended", "hidden", "middle", "mixed", "passed", "resumed"]


class _Enough(Exception):
    """Raised in a hook to stop the forward pass once everything is recorded."""


@dataclass(frozen=True, eq=False)
class Attended:
    """Activations of one forward pass through an attention.

    Attributes:
        queries: ``(B, n, C)``, of the n tokens that have queries.
        keys: ``(B, N, C)``, of all tokens.
        mixed: input of the projection, ``(B, n, C)``.
        out: output of the projection, ``(B, n, D)``.
        received: attention that each key receives, summed over queries with their weights, ``(B, N, H)``; None if no
            weights were given.
    """

    queries: Tensor
    keys: Tensor
    mixed: Tensor
    out: Tensor
    received: Tensor | None


class Mixed(NamedTuple):
    """Input and output of the first branch of a block, in the order of the residual stream.

    Each is ``(B, N, D)``, or ``(B, R, C, D)`` with windows, where nothing is shifted or padded.
    """

    enters: Tensor
    """The residual stream before the norm, after a token step at the block's input."""
    normed: Tensor
    out: Tensor
    """Output of the branch, before layer scale."""


@contextlib.contextmanager
def _hooked(*handles: Any) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def attended(block: Block, x: Residual, weights: Tensor | None = None) -> Attended:
    """Run `block` on `x` up to the projection of its attention.

    Args:
        block: a block with attention.
        x: input of the block, ``(B, N, D)`` or ``(B, R, C, D)``.
        weights: weights of the queries, ``(B, n)``, for `Attended.received`. This is computed as a gradient: the
            derivative of ``sum_i w_i o_i`` with respect to one channel of the values is ``sum_i w_i a_ij``. It is valid
            for attention a with windows, biases and merged tokens.
    """
    attention = block.attn
    assert isinstance(attention, Attention)
    heard: dict[str, Tensor] = {}

    def values(_module: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
        heard["v"] = out.detach().requires_grad_(weights is not None)
        return heard["v"]

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, out: Tensor) -> None:
            heard.setdefault(name, out.detach())

        return hook

    def mixed(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        heard["raw"] = inputs[0]

    def last(_module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        heard["mixed"], heard["out"] = inputs[0].detach(), out.detach()
        raise _Enough

    handles = (
        attention.q_tap.register_forward_hook(keep("q")),
        attention.k_tap.register_forward_hook(keep("k")),
        attention.v_tap.register_forward_hook(values),
        attention.norm.register_forward_pre_hook(mixed),
        attention.proj.register_forward_hook(last),
    )
    with _hooked(*handles), torch.set_grad_enabled(weights is not None), contextlib.suppress(_Enough):
        block(x)
    received = None
    if weights is not None:
        firsts = [sum(attention.v[:head]) for head in range(len(attention.v))]
        with torch.enable_grad():
            asked = (heard["raw"][..., firsts] * weights[..., None].to(heard["raw"].dtype)).sum()
        received = torch.autograd.grad(asked, heard["v"])[0][..., firsts]
    return Attended(heard["q"], heard["k"], heard["mixed"], heard["out"], received)


@torch.no_grad()
def mixed(block: Block, x: Residual) -> Mixed:
    """Run `block` on `x` up to the output of its first branch, which must read a norm."""
    heard: dict[str, Tensor] = {}

    def normed(_module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        heard["enters"], heard["normed"] = inputs[0], out

    def last(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        heard["out"] = inputs[0]
        raise _Enough

    handles = (block.enter1.register_forward_hook(normed), block.ls1.register_forward_pre_hook(last))
    with _hooked(*handles), contextlib.suppress(_Enough):
        block(x)
    return Mixed(**heard)


@torch.no_grad()
def middle(block: Block, x: Residual) -> Tensor:
    """Run `block` on `x` up to its MLP, which it must have, and return the residual stream there, ``(B, N, D)``."""
    heard: list[Tensor] = []

    def enters(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        heard.append(inputs[0])
        raise _Enough

    with _hooked(block.enter2.register_forward_pre_hook(enters)), contextlib.suppress(_Enough):
        block(x)
    return heard[0]


@torch.no_grad()
def hidden(block: Block, x: Residual) -> tuple[Tensor, Tensor, Tensor]:
    """Run `block` on `x` up to the end of its MLP.

    Returns:
        The input ``(B, N, M)`` and the output ``(B, N, D)`` of the last layer, and the residual stream before the norm
        of the MLP.
    """
    mlp = block.mlp
    assert isinstance(mlp, Mlp)
    heard: dict[str, Tensor] = {}

    def enters(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        heard["middle"] = inputs[0]

    def last(_module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        heard["hidden"], heard["out"] = inputs[0], out
        raise _Enough

    handles = (
        block.enter2.register_forward_pre_hook(enters),
        mlp.get_submodule(mlp.last).register_forward_hook(last),
    )
    with _hooked(*handles), contextlib.suppress(_Enough):
        block(x)
    return heard["hidden"], heard["out"], heard["middle"]


@torch.no_grad()
def passed(block: Block, streams: Sequence[Residual]) -> list[Residual]:
    """Return the output of `block` for each batch."""
    return [block(x) for x in streams]


@torch.no_grad()
def arriving(
    model: nn.Module, blocks: Sequence[Block], index: int, images: Sequence[Tensor], before: Sequence[Residual] | None
) -> list[Residual]:
    """Return the input of block `index` for each batch, computed by the part of the model before it.

    Args:
        model: an adopted model.
        blocks: its blocks, which are passed because finding them takes milliseconds.
        index: index of the block.
        images: batches of images.
        before: outputs of the block before, from which to continue with the modules between the two blocks (such as
            patch merging); None to run the model from the images.
    """
    found: list[Residual] = []

    def hook(_module: nn.Module, inputs: tuple[Residual, ...]) -> None:
        found.append(inputs[0])
        raise _Enough

    with _hooked(blocks[index].register_forward_pre_hook(hook)):
        for number, x in enumerate(images):
            with contextlib.suppress(_Enough), resumed(blocks, index, None if before is None else before[number]):
                model(fed(x, model))
    return found


@contextlib.contextmanager
def resumed(blocks: Sequence[Block], index: int, before: Residual | None) -> Iterator[None]:
    """Within the context, skip the blocks before `index`; the last of them returns `before`. None changes nothing."""
    skipped = blocks[:index] if before is not None else []

    def same(x: Residual, *_arguments: Any, **_options: Any) -> Residual:
        return x

    def given(_x: Residual, *_arguments: Any, **_options: Any) -> Residual:
        assert before is not None
        return before

    try:
        for block in skipped:
            block.forward = same  # type: ignore[method-assign]
        if skipped:
            skipped[-1].forward = given  # type: ignore[assignment, method-assign]
        yield
    finally:
        for block in skipped:
            del block.forward
