"""The form a model runs in: the same function in evaluation, in shapes and layouts that hardware likes.

B images, N tokens, D width, H heads, M hidden neurons.

It stands next to surgery, for it rewrites weights as `vitrim.cut.surgery.fold` does, and before measurements, tables of
times, exports and runtimes, which all run models in it; `vitrim.deploy.optimized` is the same function. What is stored,
described, cut and trained is never this form.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vitrim.cut.optimized.convs import fix_conv_, plain_conv
from vitrim.cut.optimized.folds import fold_block_, fold_host_, precise_
from vitrim.cut.optimized.masks import fix_windows_
from vitrim.cut.optimized.stem import replace_patches_
from vitrim.cut.optimized.widths import pad_block_
from vitrim.families import family_of, is_adopted
from vitrim.nn import Block, Conv, fold_steps_
from vitrim.nn.copying import copied
from vitrim.words.errors import AdoptError, DataError, RecipeError, WeightsError

__all__ = ["WIDEST", "optimize_block_", "optimized"]

WIDEST = 64
"""The largest multiple that widths may be padded to."""

_MULTIPLES = {torch.float64: 1, torch.float32: 1, torch.bfloat16: 8, torch.float16: 8, torch.int8: 16}
"""Of which widths are to be one: 16 bytes of the 8-bit and 16-bit types, which is what matrix units load at once."""


def optimized(
    model: nn.Module,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    multiple: int | None = None,
    pad_heads: bool | None = None,
) -> nn.Module:
    """Copy a model into the form that it runs in fastest; its outputs in evaluation are the same.

    - the patch embedding of patches that do not overlap is one matrix product;
    - convolutions are two plain layers, merges of neighbours one linear layer, and 3 x 3 kernels lie in memory as
      channels-last kernels take them;
    - layer scale, constant branches, and scale and shift of norms are folded into linear layers (`fold_block_`);
    - neurons, head channels and bottlenecks are padded with zeros to the next multiple;
    - masks that are the same for all images are constants with aligned rows, or left out (`.masks`);
    - dropout and drop path are gone.

    Features are kept as logits are, so final norm and head stay as timm has them. All folds are computed in float64
    and rounded once. The copy is for inference at the image size that it was made for: it cannot be trained, described,
    cut or stored.

    Args:
        model: an adopted model, dense or cut, in any mode; left as it was.
        device: where it is to run; its own device where not given.
        dtype: floating-point type that it is to run in; its own where not given. ``torch.int8`` gives float32 tensors
            for a quantizer: norms keep scale and shift, for one scale of 8 bits has to span what a weight is then
            multiplied by.
        multiple: of which padded widths are to be one, from 1 to 64; where not given, 8 for 16-bit types, 16 for
            ``torch.int8``, else 1.
        pad_heads: whether all heads of a block get one width, that of the widest, so that they run as one call of a
            fused kernel; where not given, on CUDA alone. On a CPU one call for each width is faster.

    Returns:
        A model of the same class in evaluation mode that shares no parameter with `model`.

    Raises:
        RecipeError: if the type or the multiple is none that is possible.
        WeightsError: if the model has no weights.
        AdoptError: if the model was not adopted, or is such a copy already.
    """
    if getattr(model, "is_optimized", False) or not is_adopted(model):
        raise AdoptError(
            "a model must be adopted, and as it is stored, to be brought into the form that it runs in, but this one "
            "is not; call vitrim.adopt, or use the model that the copy was made from"
        )
    own = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    if own.device.type == "meta":
        raise WeightsError("a model to run must have weights, but this one is on the meta device; load them first")
    target = _target(torch.device(device or own.device), dtype or own.dtype, multiple, pad_heads)
    twin: Any = copied(model).eval().requires_grad_(False)
    blocks: Any = [block for stage in family_of(twin).blocks_by_stage(twin) for block in stage]
    if target.norms:
        fold_host_(twin, target.dtype)
    for block in blocks:
        _optimize_(block, target)
    twin.to(target.dtype).to(target.device)
    for module in twin.modules():
        _fill_norm_(module, target)
    replace_patches_(getattr(twin, "backbone", twin), target.multiple)
    twin.is_optimized, twin.set_input_size = True, _FixedSize()
    return twin  # type: ignore[no-any-return]


def optimize_block_(
    block: Block,
    device: torch.device,
    dtype: torch.dtype,
    *,
    multiple: int | None = None,
    pad_heads: bool | None = None,
) -> Block:
    """Bring a block, in place, into the form that `optimized` gives the blocks of a model; see there."""
    target = _target(device, dtype, multiple, pad_heads)
    _optimize_(block.eval(), target)
    for module in block.modules():
        _fill_norm_(module, target)
    return block


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """Where and how a model is to run."""

    device: torch.device
    dtype: torch.dtype
    multiple: int
    pad_heads: bool
    norms: bool


def _target(device: torch.device, dtype: torch.dtype, multiple: int | None, pad_heads: bool | None) -> _Target:
    if dtype not in _MULTIPLES:
        known = ", ".join(str(kind).removeprefix("torch.") for kind in _MULTIPLES)
        raise RecipeError(f"dtype must be one of {known}, but got {dtype}; choose one of them")
    if multiple is None:
        multiple = _MULTIPLES[dtype]
    if isinstance(multiple, bool) or not isinstance(multiple, int) or not 1 <= multiple <= WIDEST:
        raise RecipeError(f"multiple must be a whole number from 1 to {WIDEST}, but got {multiple}")
    together = device.type == "cuda" if pad_heads is None else pad_heads
    norms = dtype != torch.int8
    kind = dtype if norms else torch.float32
    return _Target(device=device, dtype=kind, multiple=multiple, pad_heads=together, norms=norms)


@torch.no_grad()
def _optimize_(block: Block, target: _Target) -> None:
    precise_(block)
    fold_steps_(block)
    if isinstance(block.attn, Conv):
        block.attn = plain_conv(block.attn, block)
    fold_block_(block, target.dtype, norms=target.norms)
    pad_block_(block, target.multiple, target.pad_heads)
    _drop_nothing_(block)
    block.to(target.dtype).to(target.device).requires_grad_(False)
    if isinstance(block.attn, Conv):
        fix_conv_(block.attn)
    fix_windows_(block)
    if block.step is not None:
        block.step.fix_(target.dtype, target.device)


def _drop_nothing_(block: Block) -> None:
    """Take away what only training uses: each costs a call of Python."""
    block.drop_path1 = block.drop_path2 = nn.Identity()
    for part in (block.attn, block.mlp):
        for name in ("proj_drop", "drop1", "drop2"):
            if hasattr(part, name):
                setattr(part, name, nn.Identity())


def _fill_norm_(module: nn.Module, target: _Target) -> None:
    """Give a LayerNorm on a CPU a scale of one and a shift of zero where it has none.

    PyTorch's kernel for CPUs takes three times as long without them (float32, 197 tokens of width 384).
    """
    if not isinstance(module, nn.LayerNorm) or target.device.type != "cpu":
        return
    like = next(
        tensor for tensor in (module.weight, module.bias, torch.empty(0, dtype=target.dtype)) if tensor is not None
    )
    for name, make in (("weight", torch.ones), ("bias", torch.zeros)):
        if getattr(module, name) is None:
            tensor = make(module.normalized_shape, device=like.device, dtype=like.dtype)
            setattr(module, name, nn.Parameter(tensor, requires_grad=False))


@dataclass(frozen=True)
class _FixedSize:
    """In place of timm's `set_input_size`."""

    def __call__(self, *_: Any, **__: Any) -> None:
        """Refuse.

        Raises:
            DataError: always.
        """
        raise DataError(
            "the input size of a model in the form that it runs in must stay, but another is asked for; set it on the "
            "model that it was made from, and call vitrim.deploy.optimized again"
        )
