"""Schedules of merging: how many patches each block merges, and the plans of token steps that they stand for.

L blocks, N tokens, prefix tokens included, P prefix tokens.
"""

from collections.abc import Sequence
from typing import Literal

from vitrim.words.costs import cost_of
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Spec, Stage, why_not_mixed
from vitrim.words.steps.grid_merge import GridMerge
from vitrim.words.steps.merge import Merge

__all__ = ["Kind", "last_exact", "merging", "schedules"]

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

_FEW = (2, 3, 4)
"""Numbers of blocks at which schedules of few, large merges merge. A matching takes time that MACs do not count: on a
GPU eleven of them took longer than the MACs that they saved (measured, H100, batch 256)."""

_FEW_SHARES = (0.72, 0.62, 0.54, 0.46)
"""MACs that they are made for, as shares of the dense model's."""

_MULTIPLE = 8
"""The numbers of tokens that they leave are multiples of this: 16 bytes of a 16-bit type, the rows of a mask or of
transposed keys that fast kernels load at once."""

COLUMNS, ROWS = -1, -2
"""Values in a schedule: neighbors along a row (along a column) of the grid are merged at the input of a block."""

_APART = (1, 2, 4)
"""Numbers of blocks between the two halvings of a grid."""

_STARTS = 12
"""Largest number of blocks at which the first halving of a grid is tried."""

Kind = Literal["bipartite", "grid", "none"]


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
    return Merge(count=count, by="tokens", keeps_norm=True) if count else None


def schedules(spec: Spec, kind: Kind, exact: bool) -> list[tuple[int, ...]]:
    """Return the schedules of merging to measure, see `merging`; the first merges nothing.

    ``bipartite``: shapes over depth for each of eleven costs. Shapes that merge more in late blocks have the least loss
    if few patches are merged, and shapes that merge more in early blocks if many are, because then every block saves.
    Then schedules that merge at two, three or four blocks only, for each of four costs. A budget of time takes them
    where each matching costs much.
    ``grid``: halved once, at the input of any block but the first, or twice, a few blocks apart.
    """
    blocks = len(spec.blocks())
    stage = spec.stages[0]
    found = [(0,) * blocks]
    if kind == "none" or len(spec.stages) > 1 or why_not_mixed(stage) is not None or blocks < 2:
        return found
    if kind == "grid":
        return found + _halvings(blocks, stage.grid)
    whole = cost_of(spec).macs
    for share, shapes in _SHARES.items():
        for shape in shapes:
            counts = _schedule(spec, _SHAPES[shape], share * whole, exact, stride=2 if share >= _LIGHT else 1)
            if counts is not None and counts not in found:
                found.append(counts)
    for share in _FEW_SHARES:
        for places in _FEW:
            counts = _few(spec, places, share * whole, exact)
            if counts is not None and counts not in found:
                found.append(counts)
    return found


def _few(spec: Spec, places: int, macs: float, exact: bool) -> tuple[int, ...] | None:
    """Return the schedule of few merges that starts as late as `macs` allow, at a quarter of the depth at the latest.

    Merges in the first blocks lose most, and later blocks cannot save enough.
    """
    blocks = len(spec.blocks())
    for start in range(blocks // 4, -1, -1):
        spread = sorted({start + (blocks - 1 - start) * i // places for i in range(places)})
        counts = _at_few(spec, spread, macs, exact)
        if counts is not None:
            return counts
    return None


def _at_few(spec: Spec, places: Sequence[int], macs: float, exact: bool) -> tuple[int, ...] | None:
    """Return the schedule that merges only at `places`, merges least and costs at most `macs`; None if none does.

    Each place keeps about the same share of the tokens, and leaves a multiple of `_MULTIPLE` tokens.
    """
    stage = spec.stages[0]
    for last in range((stage.tokens - 1) // _MULTIPLE * _MULTIPLE, 0, -_MULTIPLE):
        counts = _few_counts(stage, places, last)
        if counts is None:
            return None
        if cost_of(merging(spec, counts, exact).child(spec)).macs <= macs:
            return counts
    return None


def _few_counts(stage: Stage, places: Sequence[int], last: int) -> tuple[int, ...] | None:
    """Return the patches to merge in each block so that about `last` tokens are left; None if half do not suffice."""
    counts, here = [0] * len(stage.blocks), stage.tokens
    for number, place in enumerate(places, 1):
        wanted = stage.tokens * (last / stage.tokens) ** (number / len(places))
        left = min(round(wanted / _MULTIPLE), (here - 1) // _MULTIPLE) * _MULTIPLE
        counts[place] = here - left
        if 2 * counts[place] > here - stage.prefix:
            return None
        here = left
    return tuple(counts)


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
