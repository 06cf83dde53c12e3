"""Norms, layer scale and constants, folded into the linear layers next to them.

D width, C output channels of a layer.

All of it is computed in float64 (`precise_`). A fold is left out where its result could not be rounded to the type that
runs as well as the stored weights are: layer scale of 1e-5 times a weight of 1e-2 lies below what float16 resolves.
"""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import AttentionPoolLatent, LayerScale
from timm.models.swin_transformer import PatchMerging
from torch import Tensor, nn

from vitrim.families._t2t import TokenLayer
from vitrim.nn import Attention, Block, Constant, Conv, Mlp, WindowBlock
from vitrim.nn.layers import norm_of
from vitrim.nn.projections import Projections
from vitrim.words.errors import AdoptError

__all__ = ["Layer", "fold_block_", "fold_host_", "give_", "precise_"]

Layer = nn.Linear | nn.Conv2d


def precise_(module: nn.Module) -> nn.Module:
    """Bring a module, in place, into float64, and to the CPU if it is on a device of Apple's, which has none."""
    first = next(module.parameters(), None)
    if first is not None and first.device.type == "mps":
        module.to("cpu")
    return module.double()


def give_(layer: Any, weight: Tensor, bias: Tensor | None) -> None:
    """Give a linear layer or a convolution other tensors, of whatever sizes.

    Args:
        layer: `Layer`.
        weight: ``(C, D)``, or ``(C, D, k, k)``.
        bias: ``(C)`` or None.
    """
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    if isinstance(layer, nn.Conv2d):
        layer.out_channels, layer.in_channels = weight.shape[:2]
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = weight.shape


def fold_block_(block: Block, dtype: torch.dtype, *, norms: bool = True) -> None:
    """Fold what can be folded in one block.

    Layer scale goes into the layer before it, a branch that is a constant into the bias of the other branch, and the
    scale and shift of a norm into the layers after it, if they are all that reads the norm:

    - not where tokens or pixels of zeros join what the norm gives (the shift would be missing in them): the windows of
      a grid that is padded, a key that stands for missing patches, the border of a 3 x 3 convolution;
    - not where prefix tokens pass a convolution as their normed selves (``prefix="norm"``), nor in `Same`;
    - not where norms follow their branches.

    Queries, keys and values are brought into one layer first, and layer scale into modules.

    Args:
        block: in float64.
        dtype: the type that it will run in.
        norms: whether norms are folded.
    """
    mixer, mlp = block.attn, block.mlp
    _plain_(block)
    passes = isinstance(mixer, Conv) and mixer.prefix > 0 and mixer.spec.prefix == "norm"
    outs = _outs(mixer) if isinstance(mixer, Attention | Conv) and not passes else []
    if outs and _fold_scale_(block.ls1, outs, dtype):
        if isinstance(mixer, Conv) and mixer.prefix > 0 and mixer.spec.prefix == "mean":
            mixer.mean = nn.Parameter(mixer.mean * block.ls1.get_parameter("gamma"), requires_grad=False)
        block.ls1 = nn.Identity()
    if isinstance(mlp, Mlp) and _fold_scale_(block.ls2, [mlp.get_submodule(mlp.last)], dtype):
        block.ls2 = nn.Identity()
    _fold_constants_(block)
    if not norms:
        return

    if isinstance(mixer, Attention):
        _fold_norm_(mixer.norm, [mixer.proj], dtype)
    if isinstance(mixer, Attention) and not block.form.post_norm:
        _fold_norm_(block.norm1, [mixer.qkv], dtype, shift=not _zeros_join(block))
    elif isinstance(mixer, Conv) and not passes and not block.form.post_norm:
        readers = [mixer.read.qkv] if hasattr(mixer, "read") else []
        _fold_norm_(block.norm1, [mixer.conv, *readers], dtype, shift=mixer.spec.kernel == 1)
    if isinstance(mlp, Mlp):
        firsts = [mlp.get_submodule(name) for name in mlp.firsts]
        inner = mlp.kind == "geglu" and not isinstance(mlp.norm, nn.Identity)
        _fold_norm_(mlp.norm, firsts if inner else [mlp.get_submodule(mlp.last)], dtype)
        if not inner and not block.form.post_norm:
            _fold_norm_(block.norm2, firsts, dtype)


def _plain_(block: Block) -> None:
    """Bring a block's layers into the modules of a ViT's, in place."""
    for part in (block.attn, getattr(block.attn, "read", None)):
        if isinstance(part, Projections):
            part.join_()
    for name, place in (("gamma_1", "ls1"), ("gamma_2", "ls2")):
        gamma = getattr(block, name)
        if gamma is not None:
            scale = LayerScale(len(gamma)).to(gamma)
            scale.gamma = gamma
            setattr(block, place, scale)
            setattr(block, name, None)


@torch.no_grad()
def fold_host_(model: nn.Module, dtype: torch.dtype) -> None:
    """Fold the norms of a host that feed one linear layer alone.

    The others stay: those before the blocks, and the final one, whose outputs are features that callers ask for.

    Args:
        model: an adopted model.
        dtype: the type that it will run in.
    """
    module: Any
    for module in model.modules():
        pairs: list[tuple[nn.Module, nn.Module]] = []
        if type(module) is PatchMerging:
            pairs = [(module.norm, module.reduction)]
        elif isinstance(module, TokenLayer):
            pairs = [(module.norm1, module.get_submodule(module.product)), (module.norm2, module.mlp.fc1)]
        elif type(module) is AttentionPoolLatent and module.mlp is not None:
            pairs = [(module.norm, module.mlp.fc1)]
        for norm, layer in pairs:
            _fold_norm_(precise_(norm), [precise_(layer)], dtype)


def _zeros_join(block: Block) -> bool:
    """Whether attention is given tokens of zeros next to the normed ones."""
    if isinstance(block, WindowBlock):
        return block.window.dynamic or block.window.padded(block.grid) != block.grid
    return block.step is not None and block.step.adds_zeros


def _outs(mixer: Attention | Conv) -> list[nn.Module]:
    """Return the layers whose outputs a mixer adds to the stream, up to layer scale."""
    return [mixer.proj, mixer.read.proj] if isinstance(mixer, Conv) and hasattr(mixer, "read") else [mixer.proj]


def _fold_scale_(scale: Any, layers: Sequence[nn.Module], dtype: torch.dtype) -> bool:
    """Multiply the outputs of all `layers` by a layer scale; whether that was possible."""
    if type(scale) is not LayerScale:
        return False
    made: list[tuple[Any, Tensor, Tensor | None]] = []
    for layer in layers:
        if not isinstance(layer, Layer):
            return False
        weight = layer.weight * scale.gamma.view(-1, *[1] * (layer.weight.dim() - 1))
        made.append((layer, weight, None if layer.bias is None else layer.bias * scale.gamma))
    if not _resolved([weight for _, weight, _ in made], [bias for *_, bias in made], dtype):
        return False
    for layer, weight, bias in made:
        give_(layer, weight, bias)
    return True


def _fold_constants_(block: Block) -> None:
    """Make one bias of a constant branch and the branch before it; the residual stream is then added to once.

    Token steps between both branches take weighted means whose weights sum to 1, so that a constant may come before or
    after them.
    """
    mixer: Any = block.attn
    mlp = block.mlp
    if not isinstance(mlp, Constant):
        return
    if isinstance(mixer, Constant) and not (block.step is not None and block.step.needs_attention):
        mlp.bias = nn.Parameter(mlp.bias + mixer.bias, requires_grad=False)
        block.attn = None
    whole = isinstance(mixer, Attention) or (isinstance(mixer, Conv) and mixer.prefix == 0)
    if whole and isinstance(block.ls1, nn.Identity) and not block.form.post_norm:
        layer = mixer.get_submodule("proj")
        assert isinstance(layer, Layer)
        give_(layer, layer.weight, mlp.bias if layer.bias is None else layer.bias + mlp.bias)
        block.mlp = None


def _fold_norm_(norm: nn.Module, layers: Sequence[nn.Module], dtype: torch.dtype, *, shift: bool = True) -> None:
    """Fold scale and shift of a norm into all layers that read it.

    Args:
        norm: of any kind that `vitrim.nn.layers` knows; whatever else comes is left alone.
        layers: `Layer`, all that read it.
        dtype: the type that they will run in.
        shift: whether a shift can be folded; if not, a norm that has one is left alone.
    """
    try:
        known = norm_of(norm, "norm")
    except AdoptError:
        return
    scale, offset = (getattr(norm, name, None) if has else None for name, has in _tensors(known.weight, known.bias))
    if offset is not None and not shift:
        return
    weights, biases = [], []
    for layer in layers:
        if not isinstance(layer, Layer):
            return
        wide = [1, -1, *[1] * (layer.weight.dim() - 2)]
        weights.append(layer.weight if scale is None else layer.weight * scale.view(wide))
        bias = layer.bias
        if offset is not None:
            moved = layer.weight.flatten(1) @ offset
            bias = moved if bias is None else bias + moved
        biases.append(bias)
    if not _resolved(weights, biases, dtype):
        return
    for layer, weight, bias in zip(layers, weights, biases, strict=True):
        give_(layer, weight, bias)
    for name, has in _tensors(known.weight, known.bias):
        if has:
            setattr(norm, name, None)


def _tensors(weight: bool, bias: bool) -> tuple[tuple[str, bool], tuple[str, bool]]:
    return ("weight", weight), ("bias", bias)


def _resolved(weights: Sequence[Tensor], biases: Sequence[Tensor | None], dtype: torch.dtype) -> bool:
    """Whether each output channel keeps its precision in `dtype`: an error of one rounding of its largest weight."""
    eps = torch.finfo(dtype).eps
    for weight in weights:
        rows = weight.flatten(1)
        error = (rows.to(dtype).to(rows.dtype) - rows).abs().amax(dim=1)
        if not bool((error <= eps * rows.abs().amax(dim=1)).all()):
            return False
    return all(bool(torch.isfinite(bias.to(dtype)).all()) for bias in biases if bias is not None)
