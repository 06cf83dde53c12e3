"""Penalty weights of ViT-Slim that are measured on the model, in place of published numbers.

B images.

With the dense model's own output as target, the gradient of a gate z is zero at the start, z = 1, and grows as
F (1 - z), where F is the mean squared gradient of the log-likelihood of the model's own answers (the Fisher
information, which is the curvature of the divergence). A penalty of weight w takes a gate down until F (1 - z) = w. So
w / F decides whether gates come to rest apart: if w is far above most F, they all fall alike and the ranking is noise;
if it is far below, nothing moves but by noise. F differs between models and between kinds of gates by orders of
magnitude (a factor of 75 between the attention and the MLP of a small ViT on digits); the published numbers do not.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from vitrim.cut.outputs import gives_values, own_loss
from vitrim.families import describe
from vitrim.methods.vit_slim.gates import TokenGated
from vitrim.nn.feed import fed
from vitrim.nn.modes import evaluating
from vitrim.words.errors import MethodError

__all__ = ["KINDS", "PRESSURE", "curvatures", "kind_of"]

PRESSURE = 0.5
"""Weight of the penalty over the mean F of a kind: a gate of mean curvature comes to rest at a half."""

KINDS = ("attention", "mlp", "token", "width")


def kind_of(key: str) -> str:
    """Return the kind of a gate of channels, by its name in the gated model."""
    return {"hidden": "mlp", "width": "width"}.get(key.rpartition("/")[2], "attention")


def curvatures(gated: TokenGated, batches: Iterable[tuple[Tensor, Tensor]], *, seed: int) -> dict[str, float]:
    """Return the mean F of each kind of gates: ``attention``, ``mlp``, ``token`` (of the squashed gates), ``width``.

    The gradients of the images of a batch are summed before they are squared. Their labels are drawn from the model's
    own softmax, so they are independent with mean zero, and the square of the sum has the mean of the sum of squares.

    Args:
        gated: a gated model before its search; left as it was.
        batches: images ``(B, C, height, width)`` and labels ``(B,)``; the labels are not used.
        seed: of the drawn labels.

    Raises:
        MethodError: if the gradients of a kind are not finite or all zero.
    """
    draw, seen = torch.Generator().manual_seed(seed), 0
    gates = {**{key: (kind_of(key), gate) for key, gate in gated.gates.items()}}
    gates |= {f"tokens/{key}": ("token", raw) for key, raw in gated.tokens.items()}
    sums = {key: torch.zeros_like(gate, dtype=torch.float64, device="cpu") for key, (_, gate) in gates.items()}
    classes = describe(gated.model).classes
    with evaluating(gated), evaluating(gated.model, frozen=True), torch.enable_grad():
        for x, labels in batches:
            seen += len(x)
            values = gives_values(classes, bool((labels >= 0).all()))
            loss = own_loss(gated(fed(x, gated.model)), values=values, draw=draw)
            found = torch.autograd.grad(loss, [gate for _, gate in gates.values()])
            for key, gradient in zip(gates, found, strict=True):
                sums[key] += gradient.cpu().double().square()
    for key, raw in gated.tokens.items():
        sums[f"tokens/{key}"] /= (1 - torch.tanh(raw.detach().cpu().double()).square()).square()
    return _means({key: (kind, sums[key] / max(seen, 1)) for key, (kind, _) in gates.items()})


def _means(squares: Mapping[str, tuple[str, Tensor]]) -> dict[str, float]:
    found = {}
    for kind in KINDS:
        parts = [square for of, square in squares.values() if of == kind]
        if not parts:
            continue
        found[kind] = float(torch.cat([part.flatten() for part in parts]).mean())
        if not 0 < found[kind] < float("inf"):
            why = "all are zero" if found[kind] == 0 else "some are not finite"
            raise MethodError(
                f"gates of {kind} must have gradients to measure their penalty by, but {why}; check weights and "
                "images, or set penalty=published"
            )
    return found
