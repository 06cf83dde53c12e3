"""The block that a spec node asks for."""

import functools

from vitrim.nn.block import Block
from vitrim.nn.conv import Conv
from vitrim.nn.grid import grid_step
from vitrim.nn.tokens import step_of
from vitrim.nn.window import WindowBlock
from vitrim.words.spec import Block as BlockSpec
from vitrim.words.spec import Stage, Tokens

__all__ = ["make_block", "settled"]


def make_block(stage: Stage, spec: BlockSpec, arriving: Tokens | None = None) -> Block:
    """Build one block of `stage`, on the current device.

    Args:
        stage: width, grid, prefix tokens, window and form.
        spec: the block.
        arriving: the tokens at its input; those of the whole grid if None.
    """
    if stage.window is not None:
        return WindowBlock(stage, spec)
    here = stage.enters if arriving is None else arriving
    return Block(
        stage.width,
        spec,
        stage.form,
        step=grid_step(stage, spec, here) or step_of(stage, spec.tokens, here),
        asking=stage.prefix if spec.only_prefix else None,
        conv=functools.partial(Conv, grid=stage.grid, prefix=stage.prefix),
        sized=here.carried,
        patches=stage.patches,
        prefix=stage.prefix,
    )


def settled(block: Block) -> Block:
    """Compute the buffers that are not stored; needed once a block that was built without data has its weights."""
    for module in block.modules():
        compute = getattr(module, "init_non_persistent_buffers", None)
        if compute is not None:
            compute()
    weight = next(block.parameters(), None)
    if block.step is not None and weight is not None:
        block.step.to(weight.device)
    return block
