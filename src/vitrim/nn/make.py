"""The block that a spec node asks for."""

from vitrim.nn.block import Block
from vitrim.nn.window import WindowBlock
from vitrim.spec import Block as BlockSpec
from vitrim.spec import Stage

__all__ = ["make_block", "settled"]


def make_block(stage: Stage, spec: BlockSpec) -> Block:
    """Build one block of `stage`, on the current device."""
    return Block(stage.width, spec, stage.form) if stage.window is None else WindowBlock(stage, spec)


def settled(block: Block) -> Block:
    """Compute the buffers that are not stored; needed once a block that was built without data has its weights."""
    for module in block.modules():
        compute = getattr(module, "init_non_persistent_buffers", None)
        if compute is not None:
            compute()
    return block
