"""Run the calibration: make one cut at a time and measure the divergence of the output from the dense model's.

B images, L blocks, H heads, K channels of a head, M hidden neurons, N tokens.
"""

import functools
import time
from collections.abc import Callable, Iterator, Sequence

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
    importances,
    passed,
)
from vitrim.cut.outputs import divergence, logits_of
from vitrim.cut.surgery import apply
from vitrim.data import Input
from vitrim.families import blocks_of, describe
from vitrim.methods.post_training.calibration import Calibration
from vitrim.methods.post_training.notes import Notes
from vitrim.methods.post_training.operators import convolutions, kernels_for, share_of, why_not_convolve
from vitrim.methods.post_training.probe import Precision, Probe, precision_for
from vitrim.methods.post_training.schedule import Kind, last_exact, merging, schedules
from vitrim.nn import Attention, Block
from vitrim.nn.modes import evaluating
from vitrim.nn.stream import Residual
from vitrim.nn.weights import fingerprint
from vitrim.words.errors import MethodError
from vitrim.words.plan import Plan
from vitrim.words.spec import Attention as AttentionSpec
from vitrim.words.spec import Conv, Spec

__all__ = ["calibrate", "divergence", "logits_of", "needed"]

_CUTS = (0.25, 0.5, 0.75)
"""Removed shares that are measured; losses between them are interpolated by power laws."""

Cell = tuple[str, tuple[float, ...], Callable[[], list[float]]]


def needed(spec: Spec) -> int:
    """Return the number of images the statistics need: one token for every four neurons of each layer.

    With fewer tokens the ridge does not give a usable fit.
    """
    return max(-(-max(_widths(block), default=1) // (4 * stage.tokens)) for _, stage, block in spec.blocks())


def _widths(block: object) -> Iterator[int]:
    mixer, hidden = getattr(block, "mixer", None), getattr(block, "hidden", None)
    if isinstance(mixer, AttentionSpec):
        yield sum(mixer.v)
    if hidden:
        yield hidden


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
    notes: Notes | None = None,
    advance: Callable[[float], None] = lambda _: None,
) -> Calibration:
    """Measure a model.

    Args:
        model: an adopted model; not modified.
        images: batches for statistics.
        probe: batches of other images, on which losses are measured.
        input: size and normalization of the images.
        seed: seed of drawn labels.
        strength: strength of the ridge.
        merge: kind of merging whose schedules are measured, see `schedules`.
        exact: whether the last block computes only prefix tokens if it can.
        operators: whether convolutions are measured in place of attentions; None if the images suffice for their fits
            and the grid is known.
        precision: type of the passes that measure single cuts, see `vitrim.methods.post_training.probe`.
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
    leaving = last_exact(spec, exact)
    base = apply(model, leaving) if leaving != Plan.keep(spec) else model
    measure = Probe(base, [block for _, block in blocks_of(base)], probe, precision_for(precision, base))
    worth = importances(base, images, seed=seed)
    shares: dict[str, tuple[float, ...]] = {}
    losses: dict[str, tuple[float, ...]] = {}
    with evaluating(base, frozen=True), torch.no_grad():
        walk = Walk(base, images, worth, strength, 0.0)
        place, entering = walk.first(), arriving(base, walk.blocks, 0, probe, None)
        if len(spec.stages) == 1:
            measure.skip_stem(entering)
        for index in range(len(walk.rows)):
            table = _Row(measure, place, entering, kernels)
            for cell, removed, measured in table.cells():
                name = f"{place.path}.{cell}"
                shares[name], losses[name] = removed, tuple(notes.of(name, measured))
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
            child = apply(model, merging(spec, row, exact)).eval()
            return [divergence(measure.dense, logits_of(child, probe))]

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
    """The cuts of one block: each is made and compensated, and the rest of the model is run."""

    def __init__(self, measure: Probe, place: Place, entering: Sequence[Residual], kernels: Sequence[int]) -> None:
        self.measure, self.place, self.entering, self.kernels = measure, place, entering, kernels

    @functools.cached_property
    def floor(self) -> float:
        """What rounding adds to each loss."""
        return self.measure.floor(self.place.block, self.entering)

    def cells(self) -> Iterator[Cell]:
        """Yield name, removed shares, and a function that measures the losses, of each kind of cut."""
        block, form = self.place.block, self.place.block.form
        if isinstance(block.attn, Attention):
            cut, widths = AttentionCut(self.place), block.attn.qk
            if not form.ties_qk and len(set(widths)) == 1:
                yield self._cell("qk", _CUTS, cut, [BlockChoice(qk=_left(widths[0], s)) for s in _CUTS])
            if not form.mixed_norm and len(set(block.attn.v)) == 1:
                size = block.attn.v[0]
                yield self._cell("v", _CUTS, cut, [BlockChoice(v=_left(size, s)) for s in _CUTS])
            heads = range(len(widths))
            alone = [tuple(h for h in heads if h != gone) for gone in heads] if not form.mixed_norm else []
            sets = [BlockChoice(heads=kept) for kept in (*(kept for kept in alone if kept), ())]
            yield self._cell("heads", (1.0,) * len(sets), cut, sets)
            yield from self._convolutions()
        hidden = block.spec.hidden
        if hidden:
            neurons = NeuronCut(self.place, block)
            sizes = [*(_left(hidden, share) for share in _CUTS), 0] if form.hidden_norm is None else [0]
            yield "hidden", (*_CUTS, 1.0)[-len(sizes) :], lambda: [self._neurons(neurons, width) for width in sizes]
        if hidden and isinstance(block.attn, Attention):
            yield "block", (1.0,), lambda: [self._gone(cut)]

    def _cell(self, name: str, shares: tuple[float, ...], cut: AttentionCut, choices: Sequence[BlockChoice]) -> Cell:
        return name, shares, lambda: [self._attention(cut, choice) for choice in choices]

    def _convolutions(self) -> Iterator[Cell]:
        width, mixer = self.place.stage.width, self.place.block.spec.mixer
        assert isinstance(mixer, AttentionSpec)
        where = self.place.block.spec, self.place.stage, self.place.arrives
        kernels = [kernel for kernel in self.kernels if why_not_convolve(*where, kernel) is None]
        cut = ConvCut(self.place) if kernels else None
        for kernel in kernels:
            convs = convolutions(self.place.stage, mixer, kernel)
            if convs and cut is not None:
                shares = tuple(share_of(conv, width) for conv in convs)
                yield f"conv{kernel}", shares, functools.partial(self._convolved, cut, convs)

    def _convolved(self, cut: ConvCut, convs: Sequence[Conv]) -> list[float]:
        found = []
        for conv in convs:
            mixer, _, state = cut.cut(conv)
            found.append(self._loss(self.place.rebuilt(mixer, self.place.block.spec.hidden, state)))
        return found

    def _attention(self, cut: AttentionCut, choice: BlockChoice) -> float:
        mixer, _, state = cut.cut(choice)
        return self._loss(self.place.rebuilt(mixer, self.place.block.spec.hidden, state))

    def _neurons(self, cut: NeuronCut, width: int) -> float:
        kept, state = cut.cut(width)
        return self._loss(self.place.rebuilt(self.place.block.spec.mixer, len(kept), state))

    def _gone(self, cut: AttentionCut) -> float:
        """Return the loss if both branches are constants."""
        block = self.place.block
        mixer, _, state = cut.cut(BlockChoice(heads=()))
        half = self.place.rebuilt(mixer, block.spec.hidden, state)
        _, more = NeuronCut(self.place, half).cut(0)
        return self._loss(self.place.rebuilt(mixer, 0, state | more))

    def _loss(self, block: Block) -> float:
        return self.measure.loss(self.place.block, self.entering, block, self.floor)


def _left(size: int, share: float) -> int:
    return max(1, round(size * (1 - share)))
