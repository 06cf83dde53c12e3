"""Importance of each token at the output of each branch, and the cost of an error in each direction.

B images, N tokens, D width.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitrim.cut.compensate.closed_form import root
from vitrim.cut.outputs import gives_values, own_loss
from vitrim.families import blocks_of, describe
from vitrim.nn import Attention, Block, Mlp
from vitrim.nn.feed import exact, fed, uncast, wide
from vitrim.nn.modes import evaluating

__all__ = ["Importance", "importances", "last_layers"]

_FLOOR = 0.1
"""Added to each weight, in units of the mean, because a few hundred images cannot show that a token has no effect."""


_VANISHED = torch.finfo(torch.float32).tiny
"""Mean squared gradients up to this have lost their digits."""


@dataclass(frozen=True, eq=False)
class Importance:
    """Importance of the output of a layer.

    Attributes:
        weights: weights of the tokens of all P images, ``(P, N)``, with mean 1.1.
        metric: mean of g g' over gradients g of the loss with respect to the output, ``(D, D)``, float64.
    """

    weights: Tensor
    metric: Tensor

    @functools.cached_property
    def half(self) -> Tensor:
        """Square root of the metric, ``(D, D)``, which all cuts of the layer use."""
        return root(self.metric)


def last_layers(block: Block) -> dict[str, nn.Linear]:
    """Return the last layer of each branch of `block`, by ``mixer`` and ``mlp``."""
    found = {}
    for name, branch in (("mixer", block.attn), ("mlp", block.mlp)):
        if isinstance(branch, Attention | Mlp):
            found[name] = branch.get_submodule(branch.last)
    return found  # type: ignore[return-value]


def importances(model: nn.Module, batches: Iterable[Tensor], *, seed: int) -> dict[str, Importance]:
    """Compute the importance of tokens with one backward pass, without labels.

    The loss is `vitrim.cut.outputs.own_loss`, for classes the cross-entropy with labels drawn from the model's own
    softmax. The mean square of its gradients is the second-order term of the distance from the model's own output. The
    weight of a token is the norm of its gradient, divided by the mean over tokens, plus 0.1. The norm is used and not
    its square because it varies less, and a few hundred images give few samples of it.

    Args:
        model: an adopted model; it is not changed.
        batches: images ``(B, C, h, w)``, on any device.
        seed: seed of the labels.

    Returns:
        The importance by path of a branch (``stages.0.blocks.3.mlp``), for the output of its last layer.

    Raises:
        MethodError: if the model does not return logits, or they are not finite.
    """
    # Without labels, one output may be a logit or a value; the squared distance is valid for both.
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
    """Detach the input of the first block and require its gradient, so that the stem computes none."""
    return (inputs[0].detach().requires_grad_(), *inputs[1:])


def _hook(
    path: str, squares: dict[str, list[Tensor]], metrics: dict[str, Tensor]
) -> Callable[[nn.Module, object, Tensor], None]:
    def heard(gradient: Tensor) -> None:
        gradient = wide(gradient)
        squares.setdefault(path, []).append(gradient.square().sum(-1).float())
        flat = gradient.reshape(-1, gradient.shape[-1])
        with uncast(flat.device):
            more = exact(flat.mT @ flat)
        metrics[path] = metrics[path] + more if path in metrics else more

    def hook(_module: nn.Module, _inputs: object, out: Tensor) -> None:
        out.register_hook(heard)  # type: ignore[no-untyped-call]

    return hook


def _importance(parts: list[Tensor], metric: Tensor) -> Importance:
    squares = exact(torch.cat([part.flatten(1) for part in parts]))
    weights = squares.clamp_min(0).sqrt()
    mean = float(weights.mean())
    scale = float(metric.diagonal().mean())
    # No gradient reaches this branch, or the model is so sure of its own images that float32 holds nothing of it: then
    # all tokens and all directions count alike.
    if not (mean > 0 and scale > _VANISHED):
        weights, mean = torch.ones_like(weights), 1.0
        metric = torch.eye(len(metric), dtype=metric.dtype, device=metric.device)
    weights = weights / mean
    return Importance((weights + _FLOOR).float(), metric)
