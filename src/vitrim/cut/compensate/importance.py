"""How much each token matters at the output of each branch, and in which directions an error hurts.

B images, N tokens, D width.
"""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitrim.cut.outputs import gives_values, own_loss
from vitrim.families import blocks_of, describe
from vitrim.nn import Attention, Block, Mlp
from vitrim.nn.feed import fed, wide
from vitrim.nn.modes import evaluating

__all__ = ["Importance", "importances", "last_layers"]

_FLOOR = 0.1
"""Least weight of a token, in units of the mean: gradients of some hundred images say no token matters nothing."""


@dataclass(frozen=True, eq=False)
class Importance:
    """What a layer's output is worth.

    Attributes:
        weights: of the tokens, ``(P, N)``, with mean 1.1; over all P images.
        metric: mean of g g' over gradients g of the loss by the output, ``(D, D)``, float64.
    """

    weights: Tensor
    metric: Tensor


def last_layers(block: Block) -> dict[str, nn.Linear]:
    """The layer that each branch of `block` ends with, by ``mixer`` and ``mlp``."""
    found = {}
    for name, branch in (("mixer", block.attn), ("mlp", block.mlp)):
        if isinstance(branch, Attention | Mlp):
            found[name] = branch.get_submodule(branch.last)
    return found  # type: ignore[return-value]


def importances(model: nn.Module, batches: Iterable[Tensor], *, seed: int) -> dict[str, Importance]:
    """Weigh tokens by one backward pass, without labels.

    The loss is `vitrim.cut.outputs.own_loss`, for classes the cross-entropy with labels drawn from the model's own
    softmax: the mean of squares of its gradients is the second-order term of the distance from the model's own output.
    A token's weight is the square root of its squared gradient over the mean, which is milder than the gradient itself
    (a few hundred images give few samples of it), brought to mean 1, plus 0.1.

    Args:
        model: an adopted model; left as it was.
        batches: images ``(B, C, h, w)``, on any device.
        seed: of the labels.

    Returns:
        By path of a branch (``stages.0.blocks.3.mlp``), in the coordinates in which its last layer gives its output.

    Raises:
        MethodError: if the model gives no logits, or they are not finite.
    """
    # Without labels, one output may be a logit or a value; the distance fits both.
    values = gives_values(describe(model).classes, labeled=False)
    draw = torch.Generator().manual_seed(seed)
    squares: dict[str, list[Tensor]] = {}
    metrics: dict[str, Tensor] = {}
    seen = 0
    with evaluating(model, frozen=True), contextlib.ExitStack() as stack, torch.enable_grad():
        blocks = blocks_of(model)
        stack.callback(blocks[0][1].register_forward_pre_hook(_leaf).remove)
        for path, block in blocks:
            for name, layer in last_layers(block).items():
                hook = _hook(f"{path}.{name}", squares, metrics)
                stack.callback(layer.register_forward_hook(hook).remove)
        for x in batches:
            seen += len(x)
            torch.autograd.backward(own_loss(wide(model(fed(x, model))), values=values, draw=draw))
    return {path: _importance(squares[path], metrics[path] / seen) for path in squares}


def _leaf(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients are wanted from here on; the stem needs none."""
    return (inputs[0].detach().requires_grad_(), *inputs[1:])


def _hook(
    path: str, squares: dict[str, list[Tensor]], metrics: dict[str, Tensor]
) -> Callable[[nn.Module, object, Tensor], None]:
    def heard(gradient: Tensor) -> None:
        gradient = wide(gradient)
        squares.setdefault(path, []).append(gradient.square().sum(-1).float().cpu())
        flat = gradient.reshape(-1, gradient.shape[-1])
        more = (flat.mT @ flat).cpu().double()
        metrics[path] = metrics[path] + more if path in metrics else more

    def hook(_module: nn.Module, _inputs: object, out: Tensor) -> None:
        out.register_hook(heard)  # type: ignore[no-untyped-call]

    return hook


def _importance(parts: list[Tensor], metric: Tensor) -> Importance:
    squares = torch.cat([part.flatten(1) for part in parts]).double()
    weights = squares.clamp_min(0).sqrt()
    mean = float(weights.mean())
    weights = weights / mean if mean > 0 else torch.ones_like(weights)
    scale = float(metric.diagonal().mean())
    if not scale > 0:  # a branch that no gradient reaches: every direction alike
        metric = torch.eye(len(metric), dtype=metric.dtype)
    return Importance((weights + _FLOOR).float(), metric)
