"""Run the calibration: make one cut at a time and measure the divergence of the output from the dense model's.

B images, L blocks, H heads, K channels of a head, M hidden neurons, N tokens.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vitrim.cut.compensate import (
    AttentionCut,
    BlockChoice,
    ConvCut,
    NeuronCut,
    Place,
    Walk,
    arriving,
    images_for_tokens,
    importances,
    passed,
)
from vitrim.cut.outputs import divergence, logits_of
from vitrim.cut.surgery import apply
from vitrim.data import Input
from vitrim.families import blocks_of, describe
from vitrim.methods._init import first
from vitrim.methods.post_training.calibration import Calibration
from vitrim.methods.post_training.curvature import Branch, Curvature, corrected
from vitrim.methods.post_training.notes import Notes
from vitrim.methods.post_training.operators import convolutions, images_for, kernels_for, share_of, why_not_convolve
from vitrim.methods.post_training.probe import Precision, Probe, precision_for
from vitrim.methods.post_training.schedule import Kind, last_exact, merging, schedules
from vitrim.nn import Attention, Block
from vitrim.nn.modes import evaluating
from vitrim.nn.stream import Residual
from vitrim.nn.weights import fingerprint
from vitrim.train.machine import autocast, statistics
from vitrim.words.errors import MethodError
from vitrim.words.plan import Plan
from vitrim.words.spec import Attention as AttentionSpec
from vitrim.words.spec import Conv, Spec

__all__ = ["calibrate", "divergence", "logits_of", "needed"]

_CUTS = (0.25, 0.5, 0.75)
"""Removed shares that are measured; losses between them are interpolated by power laws."""

_LEAST = 64
"""Number of images, if there are as many, that are used in any case."""

_TOKENS, _PATCHES = 8, 4
"""Tokens for each neuron, and patches for each feature of a convolution, of the images that are used. The losses of
single cuts carry the error of a few probe images, and a better fit does not show; the cut that is chosen is compensated
with all images. A ViT-Ti at 224 pixels uses the least number in any case."""


@dataclass(frozen=True, eq=False)
class Cell:
    """One kind of cut of one block.

    Attributes:
        name: kind, as in a path of `Calibration.losses`.
        shares: removed shares.
        made: for each of them, a function that returns the block that was cut.
        anchors: indices of the cuts that are measured by running the rest of the model; the others are estimated.
        branch: the branch that the cuts change; where they change both, all are measured.
    """

    name: str
    shares: tuple[float, ...]
    made: Sequence[Callable[[], Block]]
    anchors: frozenset[int]
    branch: Branch = "mixer"


def needed(spec: Spec) -> int:
    """Return the number of images the statistics need: one token for every four neurons of each layer.

    With fewer tokens the ridge does not give a usable fit.
    """
    return images_for_tokens(spec, 1 / 4)


def enough(spec: Spec, kernels: Sequence[int]) -> int:
    """Return the number of images with which single cuts are compensated; more are not used.

    Args:
        spec: the model.
        kernels: of the convolutions that are measured.
    """
    return max(_LEAST, images_for_tokens(spec, _TOKENS), _PATCHES * images_for(spec, kernels))


def calibrate(
    model: nn.Module,
    images: Sequence[Tensor],
    probe: Sequence[Tensor],
    input: Input,
    *,
    seed: int,
    strength: float,
    merge: Kind,
    exact: bool,
    operators: bool | None = None,
    precision: Precision = "fp32",
    estimates: bool = True,
    notes: Notes | None = None,
    advance: Callable[[float], None] = lambda _: None,
) -> Calibration:
    """Measure a model.

    Args:
        model: an adopted model; not modified.
        images: batches for statistics; no more are used than `enough`.
        probe: batches of other images, on which losses are measured.
        input: size and normalization of the images.
        seed: seed of drawn labels.
        strength: strength of the ridge.
        merge: kind of merging whose schedules are measured, see `schedules`.
        exact: whether the last block computes only prefix tokens if it can.
        operators: whether convolutions are measured in place of attentions; None if the images suffice for their fits
            and the grid is known.
        precision: type of the passes, see `vitrim.methods.post_training.probe`.
        estimates: whether only the largest cut of each kind is measured and the others are estimated, see
            `vitrim.methods.post_training.curvature`.
        notes: losses that are known already; None if none are.
        advance: called with 1 after each block, and with 1 in all for the schedules.
    """
    start, spec, notes = time.perf_counter(), describe(model), notes or Notes(None)
    few = sum(map(len, images))
    if few < needed(spec):
        raise MethodError(
            f"calibration must have at least {needed(spec)} images for this model, but got {few}; give more with "
            "data.calibration"
        )
    kernels = kernels_for(spec, few, operators)
    images = first(images, enough(spec, kernels))
    leaving = last_exact(spec, exact)
    base = apply(model, leaving) if leaving != Plan.keep(spec) else model
    kind, device = precision_for(precision, base), next(base.parameters()).device
    measure = Probe(base, [block for _, block in blocks_of(base)], probe, kind)
    shares: dict[str, tuple[float, ...]] = {}
    losses: dict[str, tuple[float, ...]] = {}
    with evaluating(base, frozen=True), autocast(device, kind):
        worth = importances(base, images, seed=seed)
        curvature = Curvature(base, measure.blocks, probe, kind, seed) if estimates else None
    with evaluating(base, frozen=True), torch.no_grad(), statistics(device, kind):
        walk = Walk(base, images, worth, strength, 0.0)
        place, entering = walk.first(), arriving(base, walk.blocks, 0, probe, None)
        if len(spec.stages) == 1:
            measure.skip_stem(entering)
        for index in range(len(walk.rows)):
            table = _Row(measure, curvature, index, place, entering, kernels)
            for cell in table.cells():
                name = f"{place.path}.{cell.name}"
                shares[name] = cell.shares
                losses[name] = tuple(notes.of(name, functools.partial(table.losses, cell)))
            advance(1)
            if index + 1 < len(walk.rows):
                left = passed(place.block, entering)
                place = walk.send(passed(place.block, place.streams))
                entering = left
                if place.stage is not walk.rows[index][1][1]:
                    entering = arriving(base, walk.blocks, index + 1, probe, left)
    counts = schedules(spec, merge, exact)
    merged: list[float] = []
    for row in counts:

        def measured(row: tuple[int, ...] = row) -> list[float]:
            return [measure.whole(apply(model, merging(spec, row, exact)).eval())]

        merged += notes.of(f"merging {row}", measured) if any(row) else [0.0]
        advance(1 / len(counts))
    return Calibration(
        spec=spec,
        weights=fingerprint(model),
        input=input,
        count=few,
        shares=shares,
        losses=losses,
        merges=tuple(counts),
        merged=tuple(merged),
        seconds=time.perf_counter() - start,
    )


class _Row:
    """The cuts of one block: each is made and compensated, and its loss is measured or estimated.

    Args:
        measure: measures losses by running the rest of the model.
        curvature: estimates them from the output of the block; None measures all.
        index: index of the block.
        place: the block.
        entering: its input for each batch of the probe images.
        kernels: of the convolutions to measure.
    """

    def __init__(
        self,
        measure: Probe,
        curvature: Curvature | None,
        index: int,
        place: Place,
        entering: Sequence[Residual],
        kernels: Sequence[int],
    ) -> None:
        self.measure, self.curvature, self.index = measure, curvature, index
        self.place, self.entering, self.kernels = place, entering, kernels

    def losses(self, cell: Cell) -> list[float]:
        """Return the losses of a cell."""
        blocks = [make() for make in cell.made]
        known = {i: self._measured(block) for i, block in enumerate(blocks) if i in cell.anchors}
        if self.curvature is not None and len(known) < len(blocks):
            estimates = self.curvature.losses(self.index, self.place.block, self.entering, blocks, cell.branch)
            found = corrected(estimates, [known.get(i) for i in range(len(blocks))])
            if found is not None:
                return found
        return [known[i] if i in known else self._measured(block) for i, block in enumerate(blocks)]

    def _measured(self, block: Block) -> float:
        return self.measure.loss(self.place.block, self.entering, block, self.floor)

    @functools.cached_property
    def floor(self) -> float:
        """What rounding adds to each loss."""
        return self.measure.floor(self.place.block, self.entering)

    def cells(self) -> Iterator[Cell]:
        """Yield each kind of cut."""
        block, form = self.place.block, self.place.block.form
        if isinstance(block.attn, Attention):
            cut, widths = AttentionCut(self.place), block.attn.qk
            if not form.ties_qk and len(set(widths)) == 1:
                yield self._attention("qk", _CUTS, cut, [BlockChoice(qk=_left(widths[0], s)) for s in _CUTS], ())
            if not form.mixed_norm and len(set(block.attn.v)) == 1:
                size = block.attn.v[0]
                yield self._attention("v", _CUTS, cut, [BlockChoice(v=_left(size, s)) for s in _CUTS], (2,))
            heads = range(len(widths))
            alone = [tuple(h for h in heads if h != gone) for gone in heads] if not form.mixed_norm else []
            sets = [BlockChoice(heads=kept) for kept in (*(kept for kept in alone if kept), ())]
            yield self._attention("heads", (1.0,) * len(sets), cut, sets, (len(sets) - 1,))
            yield from self._convolutions()
        hidden = block.spec.hidden
        if hidden:
            neurons = NeuronCut(self.place, block)
            sizes = [*(_left(hidden, share) for share in _CUTS), 0] if form.hidden_norm is None else [0]
            made = [functools.partial(self._neurons, neurons, width) for width in sizes]
            yield Cell("hidden", (*_CUTS, 1.0)[-len(sizes) :], made, frozenset((len(sizes) - 1,)), "mlp")
        if hidden and isinstance(block.attn, Attention):
            yield Cell("block", (1.0,), [functools.partial(self._gone, cut)], frozenset((0,)))

    def _attention(
        self,
        name: str,
        shares: tuple[float, ...],
        cut: AttentionCut,
        choices: Sequence[BlockChoice],
        anchors: Sequence[int],
    ) -> Cell:
        def made(choice: BlockChoice) -> Block:
            mixer, _, state = cut.cut(choice)
            return self.place.rebuilt(mixer, self.place.block.spec.hidden, state)

        return Cell(name, shares, [functools.partial(made, choice) for choice in choices], frozenset(anchors))

    def _convolutions(self) -> Iterator[Cell]:
        stage, mixer = self.place.stage, self.place.block.spec.mixer
        assert isinstance(mixer, AttentionSpec)
        where = self.place.block.spec, stage, self.place.arrives
        kernels = [kernel for kernel in self.kernels if why_not_convolve(*where, kernel) is None]
        cut = ConvCut(self.place) if kernels else None
        for kernel in kernels:
            convs = convolutions(stage, mixer, kernel)
            if convs and cut is not None:
                shares = tuple(share_of(conv, stage.width) for conv in convs)
                made = [functools.partial(self._convolved, cut, conv) for conv in convs]
                yield Cell(f"conv{kernel}", shares, made, frozenset((len(convs) - 1,)))

    def _convolved(self, cut: ConvCut, conv: Conv) -> Block:
        mixer, _, state = cut.cut(conv)
        return self.place.rebuilt(mixer, self.place.block.spec.hidden, state)

    def _neurons(self, cut: NeuronCut, width: int) -> Block:
        kept, state = cut.cut(width)
        return self.place.rebuilt(self.place.block.spec.mixer, len(kept), state)

    def _gone(self, cut: AttentionCut) -> Block:
        """Return the block if both branches are constants."""
        block = self.place.block
        mixer, _, state = cut.cut(BlockChoice(heads=()))
        half = self.place.rebuilt(mixer, block.spec.hidden, state)
        _, more = NeuronCut(self.place, half).cut(0)
        return self.place.rebuilt(mixer, 0, state | more)


def _left(size: int, share: float) -> int:
    return max(1, round(size * (1 - share)))
