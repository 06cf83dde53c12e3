"""Build blocks from spec nodes, compute their buffers, and copy settings from other blocks."""

from timm.layers import use_fused_attn
from timm.models.swin_transformer import WindowAttention as TimmWindowAttention
from torch import nn

from vitrim.nn.block import Block
from vitrim.nn.steps import StepModule
from vitrim.nn.window import WindowBlock
from vitrim.words.spec import Block as BlockSpec
from vitrim.words.spec import Stage
from vitrim.words.steps import Tokens

__all__ = ["computed", "fold_steps_", "keep_settings", "make_block"]


def make_block(stage: Stage, spec: BlockSpec, arriving: Tokens | None = None) -> Block:
    """Build one block of `stage`, on the current device.

    Args:
        stage: width, grid, prefix tokens, window and form.
        spec: the block.
        arriving: the tokens at its input; those of the whole grid if None.
    """
    return WindowBlock(stage, spec) if stage.window is not None else Block(stage, spec, arriving)


def computed(block: Block) -> Block:
    """Compute the buffers of `block` that are not stored, and return it.

    This is needed for a block that was built on the meta device, after its weights are set.
    """
    for module in block.modules():
        compute = getattr(module, "init_non_persistent_buffers", None)
        if compute is not None:
            compute()
    weight = next(block.parameters(), None)
    if block.step is not None and weight is not None:
        block.step.to(weight.device)
    return block


def fold_steps_(model: nn.Module) -> nn.Module:
    """Fold the token steps of `model`, in place, for inference and export, and return it.

    The names of its parameters change. A folded model cannot be stored or cut, so fold a copy.
    """
    for module in model.modules():
        if isinstance(module, StepModule):
            module.fold_()
    return model


def keep_settings(block: Block, old: nn.Module) -> Block:
    """Copy all settings that are not weights from `old` to `block`: training modes, dropout rates, fused attention.

    A module of `block` that has no counterpart of the same name in `old` gets the mode of its closest parent that has.
    """
    theirs = dict(old.named_modules())
    for name, module in block.named_modules():
        near = name
        while near not in theirs:
            near = near.rpartition(".")[0]
        module.training = theirs[near].training
        twin = theirs.get(name)
        for setting in ("p", "drop_prob", "fused_attn"):
            if hasattr(module, setting) and hasattr(twin, setting):
                setattr(module, setting, getattr(twin, setting))
        if isinstance(twin, TimmWindowAttention) and twin.fused_attn == use_fused_attn(experimental=True):
            # By default, timm does not use fused attention in windows. The user did not choose this; it is not copied.
            module.fused_attn = use_fused_attn()
    return block
