"""The block that a spec node asks for, and what it computes for itself."""

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
    """Compute the buffers of `block` that are not stored; needed once one built without data has its weights."""
    for module in block.modules():
        compute = getattr(module, "init_non_persistent_buffers", None)
        if compute is not None:
            compute()
    weight = next(block.parameters(), None)
    if block.step is not None and weight is not None:
        block.step.to(weight.device)
    return block


def fold_steps_(model: nn.Module) -> nn.Module:
    """Fold the token steps of `model`, in place, for inference and export; its parameters' names change.

    A folded model cannot be stored or cut: fold a copy.
    """
    for module in model.modules():
        if isinstance(module, StepModule):
            module.fold_()
    return model


def keep_settings(block: Block, old: nn.Module) -> Block:
    """Give `block` what the owner of `old` set that is no weight: training modes, dropout rates, fused attention.

    Parts that `old` does not have under the same name take the mode of the part around them.
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
            # timm leaves fused attention off in windows unless told; that is its default and not a choice of the owner.
            module.fused_attn = use_fused_attn()
    return block
