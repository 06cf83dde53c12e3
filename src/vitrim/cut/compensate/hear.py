"""What one block says while it runs: queries, keys, heads' outputs, hidden neurons, and what its layers give.

B images, N tokens, D width, H heads, C channels of all heads together.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.nn import Attention, Block, Mlp
from vitrim.nn.feed import fed
from vitrim.nn.stream import Residual

__all__ = ["Attended", "arriving", "attended", "hidden", "passed", "resumed"]


class _Enough(Exception):
    """What was asked for has been heard; the rest of the forward pass is not needed."""


@dataclass(frozen=True, eq=False)
class Attended:
    """One pass through an attention.

    Attributes:
        queries: ``(B, n, C)``, of the tokens that ask.
        keys: ``(B, N, C)``, of all.
        mixed: the heads' outputs as the projection reads them, ``(B, n, C)``.
        out: what the projection gives, ``(B, n, D)``.
        received: attention that each key receives, weighted by the askers' weights, ``(B, N, H)``; None unless asked
            for.
    """

    queries: Tensor
    keys: Tensor
    mixed: Tensor
    out: Tensor
    received: Tensor | None


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
        block: one with an attention.
        x: what enters it, ``(B, N, D)`` or ``(B, R, C, D)``.
        weights: of the tokens that ask, ``(B, n)``, for `Attended.received`. It is read off as a gradient: the
            derivative of ``sum_i w_i o_i`` by one channel of the values is ``sum_i w_i a_ij``, whatever windows, biases
            or sizes of merged tokens went into the attention a.
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
def hidden(block: Block, x: Residual) -> tuple[Tensor, Tensor, Tensor]:
    """Run `block` on `x` up to the end of its MLP.

    Returns:
        The neurons as the last layer reads them ``(B, N, M)``, what it gives ``(B, N, D)``, and the stream that entered
        the norm before the MLP.
    """
    mlp = block.mlp
    assert isinstance(mlp, Mlp)
    heard: dict[str, Tensor] = {}

    def middle(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        heard["middle"] = inputs[0]

    def last(_module: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        heard["hidden"], heard["out"] = inputs[0], out
        raise _Enough

    handles = (
        block.norm2.register_forward_pre_hook(middle),
        mlp.get_submodule(mlp.last).register_forward_hook(last),
    )
    with _hooked(*handles), contextlib.suppress(_Enough):
        block(x)
    return heard["hidden"], heard["out"], heard["middle"]


@torch.no_grad()
def passed(block: Block, streams: Sequence[Residual]) -> list[Residual]:
    """What `block` makes of each batch."""
    return [block(x) for x in streams]


@torch.no_grad()
def arriving(
    model: nn.Module, blocks: Sequence[Block], index: int, images: Sequence[Tensor], before: Sequence[Residual] | None
) -> list[Residual]:
    """What enters block `index`, batch by batch, where `before` leaves the block before it.

    What stands between the two (stem, merging of patches) is the host's own. `blocks` are those of `model`, which knows
    them too, but takes milliseconds to say them.
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
    """While this lasts, the blocks before `index` do nothing, and the last of them gives `before`."""
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
