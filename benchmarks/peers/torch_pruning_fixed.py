"""Torch-Pruning 1.6.1 on a timm ViT, with what it needs to run on timm 1.0.31, and with what it needs to be right.

Its own example (`examples/transformers/prune_timm_vit.py`) was written for an older timm. What is mended here, so that
it is compared at its best:

1. Tracing: the fused attention kernel hides queries, keys and values from its graph, so attention runs unfused while it
   prunes.
2. After the cut `num_heads`, `head_dim` and `attn_dim` of timm's attention still say the dense sizes; they are set from
   the weights.
3. The temperature: timm's fused path takes the logit scale from the width of the queries, which is smaller now, so
   logits come out too large by the root of the ratio. The factor goes into the query weights, and the fused path is
   right again (and quick).
4. A budget: it takes ratios of channels. The ratio is bisected until the counted MACs are at most the budget.

What is left as it is: its Taylor criterion (`GroupTaylorImportance`), here with gradients of the same calibration
images as all others.
"""

import copy
import math
import warnings

import torch
import torch_pruning
from timm.layers import Attention
from torch import nn
from torch.nn import functional as F

from vitrim.measure import counted

__all__ = ["prune"]

STEPS = 7
"""Halvings of the ratio: within half a percent of it."""


def prune(model, batches, image, share, kind):
    """Cut a copy of timm's `model` to at most `share` of its MACs.

    Args:
        model: timm's own, in evaluation mode.
        batches: images and labels to score with.
        image: channels, height and width.
        share: of the MACs, in (0, 1).
        kind: ``width``: everything that its graph reaches, the residual width too (its default); ``inner``: head
            channels and neurons alone (its example's --bottleneck); ``heads``: whole heads and neurons.
    """
    limit = share * counted(model, image).macs
    slopes = gradients(model, batches)
    low, high, best = 0.0, 1.0, None
    for _ in range(STEPS):
        ratio = (low + high) / 2
        try:
            child = _pruned(model, slopes, image, ratio, kind)
        except (ValueError, RuntimeError, ZeroDivisionError, IndexError):  # nothing is left of a layer
            high = ratio
            continue
        if counted(child, image).macs <= limit:
            best, high = child, ratio
        else:
            low = ratio
    if best is None:
        raise ValueError(f"torch-pruning {kind}: no ratio meets {share}")
    return best


def gradients(model, batches):
    """Summed gradients of the loss over all images, by name; they are the same for every ratio."""
    net = copy.deepcopy(model).requires_grad_(True)
    for images, labels in batches:
        F.cross_entropy(net(images), labels, reduction="sum").backward()
    return {name: parameter.grad for name, parameter in net.named_parameters()}


def _pruned(model, slopes, image, ratio, kind):
    child = copy.deepcopy(model).requires_grad_(True)
    attentions = [module for module in child.modules() if isinstance(module, Attention)]
    for module in attentions:
        module.fused_attn = False
    kept = [child.head]
    if kind != "width":
        kept += [part for block in child.blocks for part in (block.attn.proj, block.mlp.fc2)] + [child.patch_embed.proj]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = torch_pruning.pruner.BasePruner(
            child,
            torch.zeros(1, *image),
            importance=torch_pruning.importance.GroupTaylorImportance(),
            pruning_ratio=ratio,
            head_pruning_ratio=ratio,
            ignored_layers=kept,
            num_heads={module.qkv: module.num_heads for module in attentions},
            prune_num_heads=kind == "heads",
            prune_head_dims=kind != "heads",
        )
    for name, parameter in child.named_parameters():
        parameter.grad = slopes[name].clone()
    dense = [module.head_dim for module in attentions]
    for group in pruner.step(interactive=True):
        group.prune()
    for module, before in zip(attentions, dense, strict=True):
        _mend(module, pruner.num_heads[module.qkv], before)
    child.zero_grad(set_to_none=True)
    return child.eval().requires_grad_(False)


@torch.no_grad()
def _mend(module: nn.Module, heads: int, before: int) -> None:
    width = module.qkv.out_features // 3
    module.num_heads, module.head_dim, module.attn_dim = heads, width // heads, width
    factor = math.sqrt(module.head_dim / before)
    module.qkv.weight[:width] *= factor
    if module.qkv.bias is not None:
        module.qkv.bias[:width] *= factor
    module.scale = module.head_dim**-0.5
    module.fused_attn = True
