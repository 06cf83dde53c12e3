"""Run the calibration: make one cut at a time and measure the divergence of the output from the dense model's.

B images, L blocks, H heads, K channels of a head, M hidden neurons, N tokens.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrim.cut.compensate import (
    AttentionCut,
    BlockChoice,
    NeuronCut,
    Place,
    Walk,
    arriving,
    importances,
    passed,
    resumed,
)
from vitrim.cut.surgery import apply
from vitrim.data import Input
from vitrim.families import describe
from vitrim.methods.post_training.calibration import Calibration
from vitrim.nn import Attention, Block
from vitrim.nn.feed import fed
from vitrim.nn.modes import evaluating
from vitrim.nn.stream import Residual
from vitrim.nn.weights import fingerprint
from vitrim.words.costs import cost_of
from vitrim.words.errors import MethodError
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Attention as AttentionSpec
from vitrim.words.spec import Spec
from vitrim.words.steps.grid_merge import GridMerge
from vitrim.words.steps.merge import Merge

__all__ = ["Kind", "calibrate", "divergence", "last_exact", "logits_of", "merging", "needed", "schedules"]

_CUTS = (0.25, 0.5, 0.75)
"""Removed shares that are measured; losses between them are interpolated by power laws."""

_SHAPES = ((0.3, 1.7), (0.65, 1.35), (1.0, 1.0), (1.5, 0.6), (1.8, 0.2))
"""Patches merged in the first and in the last block that merges, relative to the mean; linear in between."""

_SHARES = {
    0.85: (0, 1),
    0.78: (0, 1, 2),
    0.72: (0, 1, 2),
    0.66: (0, 1, 2),
    0.62: (0, 1, 2),
    0.58: (1, 2, 3),
    0.54: (1, 2, 3),
    0.5: (1, 2, 3),
    0.46: (2, 3, 4),
    0.42: (2, 3, 4),
    0.38: (3, 4),
}
"""MACs that the schedules of merging are made for, as shares of the dense model's, and their shapes. All five shapes of
all shares were measured on a ViT-Ti: the best was within these bands, at least one shape from an edge if possible."""

_LIGHT = 0.7
"""Share of the MACs above which only every second block merges, twice as many patches. The loss there is the same, and
it saves 1 to 2 % of the dense time, because each matching takes time that MACs do not count. At lower shares the loss
is higher (0.046 nats against 0.036 at a share of 0.66)."""

COLUMNS, ROWS = -1, -2
"""Values in a schedule: neighbors along a row (along a column) of the grid are merged at the input of a block."""

_APART = (1, 2, 4)
"""Numbers of blocks between the two halvings of a grid."""

_STARTS = 12
"""Largest number of blocks at which the first halving of a grid is tried."""

Kind = Literal["bipartite", "grid", "none"]


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


def last_exact(spec: Spec, wanted: bool = True) -> Plan:
    """Return the plan by which the last block computes only the prefix tokens, if the head reads nothing else."""
    reads = spec.host.arguments.get("global_pool") == "token" and spec.stages[-1].prefix > 0
    last = len(spec.blocks()) - 1
    return Plan.of(spec, [BlockPlan(only_prefix=wanted and reads and i == last) for i in range(last + 1)])


def merging(spec: Spec, counts: Sequence[int], exact: bool) -> Plan:
    """Return the plan of a schedule: patches to merge in each block, `COLUMNS` or `ROWS`; `exact`: see `last_exact`."""
    decisions = last_exact(spec, exact).blocks()
    steps = [_step(count) for count in counts]
    return Plan.of(spec, [one.model_copy(update={"tokens": step}) for one, step in zip(decisions, steps, strict=True)])


def _step(count: int) -> Merge | GridMerge | None:
    if count < 0:
        return GridMerge(axis="w" if count == COLUMNS else "h", form="mean", size_bias=True)
    return Merge(count=count) if count else None


@torch.no_grad()
def logits_of(model: nn.Module, images: Sequence[Tensor]) -> Tensor:
    """Compute logits, ``(P, K)`` on the CPU."""
    return torch.cat([model(fed(x, model)).float().cpu() for x in images])


def divergence(dense: Tensor, logits: Tensor) -> float:
    """Return the mean Kullback-Leibler divergence from the dense output, in nats.

    Raises:
        MethodError: if it is not finite.
    """
    ours, theirs = logits.double().log_softmax(-1), dense.double().log_softmax(-1)
    found = float(F.kl_div(ours, theirs, reduction="batchmean", log_target=True))
    if not found < float("inf"):
        raise MethodError("logits must be finite on the calibration images, but some are NaN; check weights and images")
    return found


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
        advance: called with 1 after each block, and with 1 in all for the schedules.
    """
    start, spec = time.perf_counter(), describe(model)
    few = sum(map(len, images))
    if few < needed(spec):
        raise MethodError(
            f"calibration must have at least {needed(spec)} images for this model, but got {few}; give more with "
            "data.calibration"
        )
    leaving = last_exact(spec, exact)
    base = apply(model, leaving) if leaving != Plan.keep(spec) else model
    dense = logits_of(base, probe)
    divergence(dense, dense)
    worth = importances(base, images, seed=seed)
    shares: dict[str, tuple[float, ...]] = {}
    losses: dict[str, tuple[float, ...]] = {}
    with evaluating(base, frozen=True), torch.no_grad():
        walk = Walk(base, images, worth, strength, 0.0)
        place, entering = walk.first(), arriving(base, walk.blocks, 0, probe, None)
        for index in range(len(walk.rows)):
            table = _Row(base, walk.blocks, place, entering, probe, dense)
            for name, removed, found in table.cells():
                shares[f"{place.path}.{name}"], losses[f"{place.path}.{name}"] = removed, found
            advance(1)
            if index + 1 < len(walk.rows):
                left = passed(place.block, entering)
                place = walk.send(passed(place.block, place.streams))
                entering = left
                if place.stage is not walk.rows[index][1][1]:
                    entering = arriving(base, walk.blocks, index + 1, probe, left)
    counts = schedules(spec, merge, exact)
    merged = []
    for row in counts:
        child = apply(model, merging(spec, row, exact)) if any(row) else base
        merged.append(divergence(dense, logits_of(child.eval(), probe)) if any(row) else 0.0)
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

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        place: Place,
        entering: Sequence[Residual],
        probe: Sequence[Tensor],
        dense: Tensor,
    ) -> None:
        self.model, self.blocks, self.place = model, blocks, place
        self.after = [id(block) for block in blocks].index(id(place.block)) + 1
        self.entering, self.probe, self.dense = entering, probe, dense

    def cells(self) -> Iterator[tuple[str, tuple[float, ...], tuple[float, ...]]]:
        """Yield name, removed shares and losses of each kind of cut that the block allows."""
        block, form = self.place.block, self.place.block.form
        if isinstance(block.attn, Attention):
            cut = AttentionCut(self.place)
            widths = block.attn.qk
            if not form.head_norm and len(set(widths)) == 1:
                yield "qk", _CUTS, tuple(self._attention(cut, BlockChoice(qk=_left(widths[0], s))) for s in _CUTS)
            if not form.mixed_norm and len(set(block.attn.v)) == 1:
                size = block.attn.v[0]
                yield "v", _CUTS, tuple(self._attention(cut, BlockChoice(v=_left(size, s))) for s in _CUTS)
            heads = range(len(widths))
            alone = [tuple(h for h in heads if h != gone) for gone in heads] if not form.mixed_norm else []
            sets = [*(kept for kept in alone if kept), ()]
            yield (
                "heads",
                tuple(1.0 for _ in sets),
                tuple(self._attention(cut, BlockChoice(heads=kept)) for kept in sets),
            )
        hidden = block.spec.hidden
        if hidden:
            neurons = NeuronCut(self.place, block)
            sizes = [_left(hidden, share) for share in _CUTS] if form.hidden_norm is None else []
            found = tuple(self._neurons(neurons, width) for width in [*sizes, 0])
            yield "hidden", (*_CUTS, 1.0)[-len(found) :], found

    def _attention(self, cut: AttentionCut, choice: BlockChoice) -> float:
        mixer, _, state = cut.cut(choice)
        return self._loss(self.place.rebuilt(mixer, self.place.block.spec.hidden, state))

    def _neurons(self, cut: NeuronCut, width: int) -> float:
        kept, state = cut.cut(width)
        return self._loss(self.place.rebuilt(self.place.block.spec.mixer, len(kept), state))

    def _loss(self, block: Block) -> float:
        found = []
        for x, images in zip(self.entering, self.probe, strict=True):
            with resumed(self.blocks, self.after, block(x)):
                found.append(self.model(fed(images, self.model)).float().cpu())
        return divergence(self.dense, torch.cat(found))


def _left(size: int, share: float) -> int:
    return max(1, round(size * (1 - share)))


def schedules(spec: Spec, kind: Kind, exact: bool) -> list[tuple[int, ...]]:
    """Return the schedules of merging to measure, see `merging`; the first merges nothing.

    ``bipartite``: shapes over depth for each of eleven costs. Shapes that merge more in late blocks have the least loss
    if few patches are merged, and shapes that merge more in early blocks if many are, because then every block saves.
    ``grid``: halved once, at the input of any block but the first, or twice, a few blocks apart.
    """
    blocks = len(spec.blocks())
    stage = spec.stages[0]
    found = [(0,) * blocks]
    if kind == "none" or len(spec.stages) > 1 or stage.window is not None or blocks < 2:
        return found
    if kind == "grid":
        return found + _halvings(blocks, stage.grid)
    whole = cost_of(spec).macs
    for share, shapes in _SHARES.items():
        for shape in shapes:
            counts = _schedule(spec, _SHAPES[shape], share * whole, exact, stride=2 if share >= _LIGHT else 1)
            if counts is not None and counts not in found:
                found.append(counts)
    return found


def _halvings(blocks: int, grid: tuple[int, int]) -> list[tuple[int, ...]]:
    starts = sorted({1 + round(i * (blocks - 2) / max(_STARTS - 1, 1)) for i in range(_STARTS)})
    can = {COLUMNS: grid[1] > 1, ROWS: grid[0] > 1}
    found = []
    for first in starts:
        for second in (None, *(first + apart for apart in _APART)):
            row = [0] * blocks
            row[first] = COLUMNS if can[COLUMNS] else ROWS
            if second is not None and second < blocks:
                row[second] = ROWS
            if second is None or (second < blocks and all(can.values())):
                found.append(tuple(row))
    return found if any(can.values()) else []


def _schedule(spec: Spec, shape: tuple[float, float], macs: float, exact: bool, stride: int) -> tuple[int, ...] | None:
    """Return the schedule of a shape that merges least and costs at most `macs`; every `stride`-th block merges."""
    low, high, best = 0.0, spec.stages[0].patches / 2, None
    for _ in range(24):
        middle = (low + high) / 2
        counts = _counts(spec, shape, middle, stride)
        if cost_of(merging(spec, counts, exact).child(spec)).macs > macs:
            low = middle
        else:
            high, best = middle, counts
    return best


def _counts(spec: Spec, shape: tuple[float, float], mean: float, stride: int) -> tuple[int, ...]:
    steps, left, counts = len(spec.blocks()) - 1, spec.stages[0].patches, []
    for index in range(steps):
        part = index / max(steps - 1, 1)
        mine = mean * stride * (shape[0] + (shape[1] - shape[0]) * part) if index % stride == 0 else 0
        count = min(round(mine), left // 2)
        counts.append(count)
        left -= count
    return (*counts, 0)
