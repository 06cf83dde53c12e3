"""Build blocks from spec nodes, compute their buffers, and copy settings from other blocks."""

import functools
from collections.abc import Callable

import torch
from timm.layers import use_fused_attn
from timm.models.swin_transformer import WindowAttention as TimmWindowAttention
from torch import Tensor, nn

from vitrim.nn.attention import Attention
from vitrim.nn.block import Block
from vitrim.nn.continuous import ContinuousWindowAttention
from vitrim.nn.relative import RelativeAttention
from vitrim.nn.rotary import RotaryAttention
from vitrim.nn.steps import StepModule
from vitrim.nn.window import WindowBlock
from vitrim.words.spec import Attention as AttentionSpec
from vitrim.words.spec import Block as BlockSpec
from vitrim.words.spec import Relative, Rotary, Stage
from vitrim.words.steps import Tokens, flow_of

__all__ = ["computed", "fold_steps_", "keep_settings", "make_block", "still"]


def make_block(stage: Stage, spec: BlockSpec, arriving: Tokens | None = None) -> Block:
    """Build one block of `stage`, on the current device.

    Args:
        stage: width, grid, prefix tokens, window and form.
        spec: the block.
        arriving: the tokens at its input; those of the whole grid if None.
    """
    if stage.window is not None:
        window, attention = stage.window, None
        if window.network is not None:
            attention = functools.partial(ContinuousWindowAttention, window=window)
        return WindowBlock(stage, spec, attention)
    places = flow_of(spec.tokens, stage.enters if arriving is None else arriving, stage.patches).mixed.places
    positions = stage.form.positions
    build: Callable[..., Attention] = Attention
    if isinstance(positions, Rotary):
        build = functools.partial(RotaryAttention, prefix=stage.prefix, places=places)
    elif isinstance(positions, Relative):
        build = functools.partial(RelativeAttention, grid=stage.grid, prefix=stage.prefix, places=places)
    return Block(stage, spec, arriving, build)


def still(stage: Stage, spec: BlockSpec, device: torch.device, dtype: torch.dtype) -> Callable[[], Tensor] | None:
    """Return a `Block.source` for a block without a host, to measure its time: angles or biases of zero.

    None if the blocks of `stage` get nothing from their host.
    """
    positions, mixer = stage.form.positions, spec.mixer
    if positions is None or not isinstance(mixer, AttentionSpec) or not mixer.v:
        return None
    shape: tuple[int, ...] = (stage.patches, 2 * mixer.qk[0])
    if isinstance(positions, Relative):
        shape = (stage.tokens, stage.tokens)
        if not positions.shared:
            return None
    zeros = torch.zeros((len(mixer.v), *shape) if positions.by_head else shape, device=device, dtype=dtype)
    return lambda: zeros


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
