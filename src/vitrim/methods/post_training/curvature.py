"""Estimates of the losses of single cuts from the curvature of the divergence: one branch is run, and not what follows.

B images, S draws, P images in all, K outputs.

An error e in the residual stream moves the logits z by J e to the first order, and the Kullback-Leibler divergence from
the dense output p is ``1/2 (J e)' (diag p - p p') (J e)`` to the second. With v drawn so that the mean of v v' is
``diag p - p p'``, this is the mean of ``1/2 (g . e)^2`` over draws of v, where ``g = J' v`` is one gradient for each
branch, with respect to the stream behind it. Each draw costs one backward pass over all blocks; an estimate then costs
one branch.

Larger errors leave the range of the second order: by a factor of 1.0 to 1.8 up to 0.1 nats, and up to 5 for a block
that is gone. So the largest cut of each kind is measured by running the rest of the model, and the others are estimates
times a factor between 1 and its factor (`corrected`). On an ImageNet ViT-Ti and 80 images, 154 estimates differ from
the measured losses by 10 to 34 % (standard deviation by kind of cut, `benchmarks/estimates.py`); a loss that is
measured on 80 images has a standard error of about 20 %.

Source: the Fisher matrix as the second derivative of the divergence, as in Optimal Brain Surgeon (Hassibi and Stork,
1992); drawn normal vectors in place of drawn labels, whose products are far from normal where a model is sure.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from vitrim.cut.compensate import hear
from vitrim.nn import Block
from vitrim.nn.feed import fed, wide
from vitrim.nn.stream import Residual, tokens_of
from vitrim.train.machine import autocast

__all__ = ["Branch", "Curvature", "corrected"]

Branch = Literal["mixer", "mlp"]

_DRAWS = 4
_MEMORY = 2 << 30
"""Bytes that the gradients may take; larger models get fewer draws, but at least one."""

_LEAST, _MOST = 0.2, 10.0
"""Factors beyond which estimates are not used."""


class Curvature:
    """Gradients of the residual stream behind all branches on the probe images.

    Args:
        model: an adopted model in evaluation mode, with frozen parameters.
        blocks: its blocks in order.
        images: batches ``(B, C, h, w)``.
        precision: of the passes, ``fp32`` or ``bf16``.
        seed: seed of the draws.
    """

    def __init__(
        self, model: nn.Module, blocks: Sequence[Block], images: Sequence[Tensor], precision: str, seed: int
    ) -> None:
        self.precision = precision
        self.gradients: dict[tuple[int, Branch], list[Tensor]] = {}
        """For each branch and batch, ``(B, S, values of one image)``, of bf16 if the passes are; else of the model's
        type. A mixer without an MLP behind it has none of its own: its stream is that of the block's output."""
        self._dense: tuple[int, list[tuple[Tensor, Tensor]]] | None = None
        draw, count = torch.Generator().manual_seed(seed), 0
        for batch in images:
            x = fed(batch, model)
            with torch.enable_grad(), autocast(x.device, precision):
                logits, streams = _heard(model, blocks, x)
                if not count:
                    size = 2 if precision == "bf16" else logits.element_size()
                    each = sum(stream.numel() * size for stream in streams.values())
                    count = max(1, min(_DRAWS, _MEMORY * len(batch) // (each * sum(map(len, images)))))
                found = [
                    torch.autograd.grad(_product(logits, draw), list(streams.values()), retain_graph=number + 1 < count)
                    for number in range(count)
                ]
            for key, parts in zip(streams, zip(*found, strict=True), strict=True):
                stacked = torch.stack(parts, 1).flatten(2)
                self.gradients.setdefault(key, []).append(stacked.bfloat16() if precision == "bf16" else stacked)

    @torch.no_grad()
    def losses(
        self, index: int, old: Block, entering: Sequence[Residual], new: Sequence[Block], branch: Branch
    ) -> list[float]:
        """Return the estimated divergence for each block in place of another, nats, the mean over images.

        Args:
            index: index of the block.
            old: the block of the model.
            entering: its input for each batch.
            new: the blocks in its place, which differ from it in one branch.
            branch: the branch.
        """
        if (index, branch) not in self.gradients:
            branch = "mlp"
        parts: list[list[Tensor]] = [[] for _ in new]
        with autocast(tokens_of(entering[0]).device, self.precision):
            dense = self._dense_streams(index, old, entering)
            for gradient, x, (middle, out) in zip(self.gradients[index, branch], entering, dense, strict=True):
                for part, block in zip(parts, new, strict=True):
                    if branch == "mixer":
                        error = hear.middle(block, x) - middle
                    elif old.mlp is None:
                        error = tokens_of(block(x)) - out
                    else:
                        error = _fed(block, middle) - out
                    part.append((gradient @ error.flatten(1).to(gradient.dtype)[..., None]).double().square())
        return [float(torch.cat(part).mean() / 2) for part in parts]

    def _dense_streams(self, index: int, block: Block, entering: Sequence[Residual]) -> list[tuple[Tensor, Tensor]]:
        """Return, for each batch, the stream before the MLP and what the MLP adds; without one, the output twice."""
        if self._dense is None or self._dense[0] != index:
            found = []
            for x in entering:
                if block.mlp is None:
                    found.append((tokens_of(block(x)),) * 2)
                else:
                    middle = hear.middle(block, x)
                    found.append((middle, _fed(block, middle)))
            self._dense = (index, found)
        return self._dense[1]


def _fed(block: Block, middle: Tensor) -> Tensor:
    """Return what the MLP of a block adds to the stream."""
    return middle.new_zeros(()) if block.mlp is None else block.leaving2(block.mlp(block.enter2(middle)))


def _heard(model: nn.Module, blocks: Sequence[Block], x: Tensor) -> tuple[Tensor, dict[tuple[int, Branch], Tensor]]:
    """Return the logits and the residual stream behind each branch, with their graph."""
    streams: dict[tuple[int, Branch], Tensor] = {}

    def behind(index: int) -> Callable[[nn.Module, object, Residual], None]:
        def hook(_module: nn.Module, _inputs: object, out: Residual) -> None:
            streams[index, "mlp"] = tokens_of(out)

        return hook

    def before(index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            streams[index, "mixer"] = inputs[0]

        return hook

    with contextlib.ExitStack() as stack:
        stack.callback(blocks[0].register_forward_pre_hook(_leaf).remove)
        for index, block in enumerate(blocks):
            stack.callback(block.register_forward_hook(behind(index)).remove)
            if block.mlp is not None:
                stack.callback(block.enter2.register_forward_pre_hook(before(index)).remove)
        return model(x), streams


def _leaf(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Detach the input of the first block and require its gradient, so that the stem computes none."""
    return (inputs[0].detach().requires_grad_(), *inputs[1:])


def _product(logits: Tensor, draw: torch.Generator) -> Tensor:
    """Return the sum over images of z . v, with v drawn so that the mean of v v' is ``diag p - p p'``."""
    chances = wide(logits.detach()).softmax(-1)
    normal = torch.randn(chances.shape, generator=draw, dtype=torch.float32).to(chances)
    part = chances.sqrt() * normal
    return (wide(logits) * (part - chances * part.sum(-1, keepdim=True))).sum()


def corrected(estimates: Sequence[float], measured: Sequence[float | None]) -> list[float] | None:
    """Return losses from estimates of one kind of cut, of which some were measured, too.

    The factors of cuts that were not measured lie between 1 and that of the next larger measured one, as powers of the
    estimates. Without a measured cut all are 1.

    Args:
        estimates: nats.
        measured: None where a cut was not measured.

    Returns:
        A loss for each cut; None if a factor is too far from 1 for an estimate to mean anything, as where a model is so
        sure of its outputs that no gradient is left.
    """
    if not all(math.isfinite(one) and one > 0 for one in estimates):
        return None
    factors = sorted((one, loss / one) for one, loss in zip(estimates, measured, strict=True) if loss is not None)
    if any(not _LEAST <= factor <= _MOST for _, factor in factors):
        return None
    return [_loss(one, factors) if loss is None else loss for one, loss in zip(estimates, measured, strict=True)]


def _loss(estimate: float, factors: Sequence[tuple[float, float]]) -> float:
    """Return a loss that was not measured, from the factors of others, ``(estimate, factor)``, rising."""
    if not factors:
        return estimate
    at, factor = next((one for one in factors if one[0] >= estimate), factors[-1])
    return estimate * math.pow(factor, min(1.0, estimate / at))
