"""Losses of single cuts on the probe images: a block is replaced, and only what follows it is run.

These passes take more than half of a calibration. On CPUs whose matrix units multiply bf16 they run with inputs of
products in bf16. The Kullback-Leibler divergence is quadratic in the error of the outputs, so the rounding adds little
to it, and what it adds is measured with the block that was not cut and subtracted. For 180 cuts of an ImageNet ViT-Ti
on 12 images, losses differed from those in float32 by 1 % (median; 6 % at the 90th percentile), for 0.57 of the time.
The statistics of single cuts, and the losses of schedules of merging, are computed in the same type. All losses by
which candidates are compared stay in the model's type, and so does the compensation of what is chosen.
"""

import functools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from vitrim.cut.compensate import resumed
from vitrim.cut.outputs import divergence, logits_of
from vitrim.methods._init import first
from vitrim.nn import Block
from vitrim.nn.device import why_not_type
from vitrim.nn.feed import fed
from vitrim.nn.stream import Residual
from vitrim.train.machine import autocast, multiplies_bf16
from vitrim.words.errors import MethodError

__all__ = ["Precision", "Probe", "precision_for"]

_WHOLE = 40
"""Number of images on which schedules of merging are measured. A schedule is chosen among candidates that are measured
on all. On an ImageNet ViT-Ti at 0.4 of the MACs the search ended with the same divergence as with 80 (draws 0 and 1);
with 40 for single cuts, too, it ended at 0.208 in place of 0.186 nats (means over draws 0, 1 and 2)."""

Precision = Literal["auto", "fp32", "bf16"]


def precision_for(wanted: Precision, model: nn.Module) -> Literal["fp32", "bf16"]:
    """Return the precision of the passes: bf16 where a CPU multiplies it in tiles and the model is in float32.

    Raises:
        MethodError: if bf16 is wanted, but the device of the model has none.
    """
    like = next(model.parameters())
    if wanted == "auto":
        return "bf16" if like.dtype == torch.float32 and multiplies_bf16(like.device) else "fp32"
    missing = why_not_type(torch.bfloat16, like.device) if wanted == "bf16" else None
    if missing is not None:
        raise MethodError(f"precision must be one that the device has, but {missing}; use fp32, or auto")
    return wanted


class Probe:
    """The images on which single cuts are measured, with the output of the dense model.

    Args:
        model: an adopted model, in evaluation mode.
        blocks: its blocks in order.
        images: batches ``(B, C, h, w)``.
        precision: of the passes; float64 and shorter types of a model stay as they are.

    Attributes:
        dense: output of the model, ``(P, K)``, computed in its own type.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        images: Sequence[Tensor],
        precision: Literal["fp32", "bf16"],
    ) -> None:
        self.model, self.blocks, self.images, self.precision = model, blocks, images, precision
        self.dense = logits_of(model, images)
        divergence(self.dense, self.dense)
        self.alone = False

    def skip_stem(self, entering: Sequence[Residual]) -> None:
        """Run the stem on one image of each batch from now on if nothing after the blocks reads what it gives.

        The outputs of the stem are not read where a block's output is given. It was a tenth of the passes of a model of
        three blocks. A host that joins them with something of the stem is found by trying.

        Args:
            entering: a residual stream for each batch, as between two blocks.
        """
        batch, x = fed(self.images[0], self.model), entering[0]
        with torch.no_grad(), resumed(self.blocks, len(self.blocks), x):
            whole = self.model(batch)
            try:
                self.alone = torch.equal(whole, self.model(batch[:1]))
            except (RuntimeError, ValueError, AssertionError):  # sizes that do not fit
                self.alone = False

    def floor(self, block: Block, entering: Sequence[Residual]) -> float:
        """Return what rounding alone adds to the losses of cuts of `block`; 0 in the model's own type."""
        return 0.0 if self.precision == "fp32" else self._divergence(block, entering, block)

    def loss(self, old: Block, entering: Sequence[Residual], new: Block, floor: float) -> float:
        """Return the divergence from the dense output with one block replaced, nats, at least 0 up to rounding.

        Args:
            old: the block of the model.
            entering: its input for each batch.
            new: the block in its place.
            floor: see `floor`.
        """
        found = self._divergence(old, entering, new)
        return max(found - floor, 0.0) if floor else found

    def whole(self, child: nn.Module) -> float:
        """Return the divergence of another model of the first images, nats, in the precision of the passes."""
        if self.precision == "fp32":
            return self._apart(child)
        with autocast(next(self.model.parameters()).device, self.precision):
            return max(self._apart(child) - self._rounding, 0.0)

    @functools.cached_property
    def _rounding(self) -> float:
        """What rounding adds to the divergence of a whole model."""
        return self._apart(self.model)

    def _apart(self, model: nn.Module) -> float:
        return divergence(self.dense[:_WHOLE], logits_of(model, first(self.images, _WHOLE)))

    @torch.no_grad()
    def _divergence(self, old: Block, entering: Sequence[Residual], new: Block) -> float:
        after = [id(block) for block in self.blocks].index(id(old)) + 1
        device, found = next(self.model.parameters()).device, []
        with autocast(device, self.precision):
            for x, images in zip(entering, self.images, strict=True):
                with resumed(self.blocks, after, new(x)):
                    batch = images[:1] if self.alone else images
                    found.append(self.model(fed(batch, self.model)).float().cpu())
        return divergence(self.dense, torch.cat(found))
