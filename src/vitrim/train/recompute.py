"""Activation checkpointing: compute the inside of a block again in the backward pass instead of storing it.

Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.

Searches change a model while a step runs: gates multiply weights (`vitrim.cut.observe.Gated`), hooks mask activations
or add others. By the backward pass these changes are gone. So the weights that a block had in the forward pass are
inputs of the checkpoint, and a block whose hooks or token step have changed raises an error instead of giving other
gradients.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from vitrim.words.errors import RecipeError

__all__ = ["recomputed"]


@contextlib.contextmanager
def recomputed(model: nn.Module) -> Iterator[None]:
    """Checkpoint every block of `model` inside a `with` block; results and gradients stay the same.

    Args:
        model: a model with `blocks` (also in a model inside it).

    Raises:
        RecipeError: the model has no blocks; or, in the backward pass, a block's hooks or step are no longer those of
            the forward pass.
    """
    lists = [module for path, module in model.named_modules() if path.rpartition(".")[2] == "blocks"]
    blocks = [block for each in lists for block in each.children()]
    if not blocks:
        raise RecipeError(
            "train.checkpointing must have blocks to compute again, but this model has none; leave it out"
        )
    try:
        for block in blocks:
            block.forward = _again(block, block.forward)
        yield
    finally:
        for block in blocks:
            del block.forward


class _Body(nn.Module):
    """The inside of a block, without the hooks on the block itself."""

    def __init__(self, block: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.block, self.inside = block, forward

    def forward(self, *given: Any, **options: Any) -> Any:
        return self.inside(*given, **options)


def _again(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return `forward` with its inside computed again in the backward pass."""
    body = _Body(block, forward)

    def run(*given: Any, **options: Any) -> Any:
        if not block.training:
            return forward(*given, **options)
        before, weights = _state(block), dict(body.named_parameters())

        def inside(weights: dict[str, Any], *given: Any, **options: Any) -> Any:
            if _state(block) != before:
                raise RecipeError(
                    "train.checkpointing must be off where blocks are changed during a step, as this search does; "
                    "leave it out"
                )
            return functional_call(body, weights, given, options)

        return checkpoint(inside, weights, *given, use_reentrant=False, **options)

    return run


def _state(block: nn.Module) -> tuple[int, ...]:
    """Return a value that changes where a hook is added or removed inside a block, or its token step is replaced."""
    found = [id(module) for module in block.modules()]
    for module in block.modules():
        found += [*module._forward_hooks, *module._forward_pre_hooks]
    return tuple(found)
