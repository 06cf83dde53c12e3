"""The block that a spec node asks for."""

import functools

from vitrim.nn.block import Block
from vitrim.nn.conv import Conv
from vitrim.nn.tokens import step_of
from vitrim.nn.window import WindowBlock
from vitrim.spec import Block as BlockSpec
from vitrim.spec import Drop, Stage

__all__ = ["make_block", "settled"]


def make_block(stage: Stage, spec: BlockSpec, arriving: Drop | None = None) -> Block:
    """Build one block of `stage`, on the current device.

    Args:
        stage: width, grid, prefix tokens, window and form.
        spec: the block.
        arriving: the patches that the block before runs on; None for all.
    """
    if stage.window is not None:
        return WindowBlock(stage, spec)
    conv = functools.partial(Conv, grid=stage.grid, prefix=stage.prefix)
    return Block(stage.width, spec, stage.form, step=step_of(stage, spec.tokens, arriving), conv=conv)


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
