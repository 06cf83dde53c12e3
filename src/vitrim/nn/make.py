"""The block that a spec node asks for."""

from vitrim.nn.block import Block
from vitrim.nn.tokens import step_of
from vitrim.nn.window import WindowBlock
from vitrim.spec import Block as BlockSpec
from vitrim.spec import Stage, Tokens

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
    step = step_of(stage, spec.tokens, stage.enters if arriving is None else arriving)
    return Block(stage.width, spec, stage.form, step=step, asking=stage.prefix if spec.only_prefix else None)


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
