"""Ladders: the allowed widths of everything that may be cut, one ladder for each width that is chosen independently.

H heads, K channels of a head, M hidden neurons.

Each rung of a ladder removes a few channels, those with the lowest scores, and saves some cost.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vitrim.cut.spend import Array, Ladder
from vitrim.words.budget import Budget
from vitrim.words.costs import block_cost
from vitrim.words.spec import Attention, Block, Skip, Spec, Stage
from vitrim.words.steps import Tokens

__all__ = ["ALIGN", "Choice", "Rate", "Widths", "hidden_rate", "ladders_of"]

Choice = Literal["free", "even", "heads"]
"""Allowed widths.

``free``: every head has its own width. ``even``: all heads of a block have one width. ``heads``: only whole
heads are cut.

The last two cut neurons in steps of 8.
"""

ALIGN = 8
"""Kernels are fast for widths that are multiples of this."""

Rate = Callable[[int, int, int], Array]
"""Function of the numbers of cut (qk channels, v channels, heads) or (0, neurons, 0); returns the saved cost.

The result has the order of `Price`.
"""


@dataclass(slots=True, kw_only=True)
class Widths(Ladder):
    """The allowed widths of one choice; `values[i]` is the mean score of the channels that rung `i` cuts."""

    block: int
    field: Literal["attention", "hidden"]
    heads: tuple[int, ...]
    widths: list[tuple[int, int]]
    values: list[float]


def ladders_of(spec: Spec, scores: Mapping[str, list[Array]], choice: Choice, budget: Budget) -> Iterator[Widths]:
    """Yield every ladder of `spec`; axes without scores have none.

    `scores` contains, for each axis, one array ``(K,)`` for each head, or one array ``(M,)`` of neurons.
    """
    for index, ((path, stage, block), arriving) in enumerate(zip(spec.blocks(), spec.arrivals(), strict=True)):
        if isinstance(block.mixer, Attention) and block.mixer.v and f"{path}.v" in scores:
            rates = _attention_rate(stage, block, arriving, budget)
            yield from _attention_ladders(index, stage, block, scores, path, choice, rates)
        if block.hidden and f"{path}.hidden" in scores and stage.form.hidden_norm is None:
            levels = _levels(block.hidden, max(1 if choice == "free" else ALIGN, budget.step(stage)))
            rate = hidden_rate(stage, block, arriving, budget)
            yield _ladder(
                index, "hidden", (0,), [(0, n) for n in levels], [np.zeros(0)], scores[f"{path}.hidden"], rate
            )


def _attention_ladders(
    index: int,
    stage: Stage,
    block: Block,
    scores: Mapping[str, list[Array]],
    path: str,
    choice: Choice,
    rate: Rate,
) -> Iterator[Widths]:
    mixer, form = block.mixer, stage.form
    assert isinstance(mixer, Attention)
    qk = scores.get(f"{path}.qk", [np.zeros(n) for n in mixer.qk])
    v = scores[f"{path}.v"]
    if choice == "heads":
        if form.mixed_norm is None:
            order = sorted(range(len(v)), key=lambda h: float(qk[h].sum() + v[h].sum()))
            for head in order:
                yield _ladder(index, "attention", (head,), [(mixer.qk[head], mixer.v[head]), (0, 0)], qk, v, rate)
        return
    step = 1 if choice == "free" else ALIGN
    teams = [(h,) for h in range(len(v))] if choice == "free" else [tuple(range(len(v)))]
    for team in teams:
        top_qk, top_v = max(mixer.qk[h] for h in team), max(mixer.v[h] for h in team)
        widths = _joint_levels(top_qk, top_v, step, form.ties_qk, form.mixed_norm is not None)
        yield _ladder(index, "attention", team, widths, qk, v, rate)


def _levels(size: int, step: int) -> list[int]:
    """Return `size`, then every smaller multiple of `step` down to 0."""
    return [size, *range((math.ceil(size / step) - 1) * step, -1, -step)]


def _joint_levels(qk: int, v: int, step: int, tied_qk: bool, tied_v: bool) -> list[tuple[int, int]]:
    """Return pairs of query/key and value widths that decrease together; a width that a norm ties is not cut."""
    if tied_v:
        return [] if tied_qk else [(n, v) for n in _levels(qk, step) if n]
    levels = _levels(max(qk, v), step)
    if tied_qk:
        return [(qk if n else 0, min(n, v)) for n in _levels(v, step)]
    return [(min(n, qk), min(n, v)) for n in levels]


def _rate(stage: Stage, arriving: Tokens, build: Callable[[int], Block]) -> tuple[int, int]:
    """Return the (macs, params) of one channel; both are linear in every width."""
    one, two = (block_cost(build(n), stage, arriving) for n in (1, 2))
    return two[0] - one[0], two[1] - one[1]


def hidden_rate(stage: Stage, block: Block, arriving: Tokens, budget: Budget) -> Rate:
    """Return a function that computes the cost saved by cutting neurons."""
    macs, params = _rate(stage, arriving, lambda hidden: block.model_copy(update={"hidden": hidden}))

    def time(gone: int) -> int:
        bare = block.model_copy(update={"mixer": Skip(), "hidden": (block.hidden or 0) - gone})
        return budget.block(bare, stage, arriving).latency

    whole = time(0)
    return lambda _, gone, dead: np.array([macs * gone, params * gone, whole - time(gone) if whole else 0])


def _attention_rate(stage: Stage, block: Block, arriving: Tokens, budget: Budget) -> Rate:
    """Return a function that computes the cost saved by cutting (qk channels, v channels, heads).

    A cut head also saves its column of position biases. Latency is that of heads of equal width with the same total
    number of channels.
    """
    mixer = block.mixer
    assert isinstance(mixer, Attention)

    def one_head(qk: int, v: int) -> Block:
        return block.model_copy(update={"mixer": Attention(qk=(qk,), v=(v,), scale=mixer.scale)})

    def time(qk: int, v: int, dead: int) -> int:
        heads = len(mixer.v) - dead
        if not heads or qk >= sum(mixer.qk) or v >= sum(mixer.v):
            return 0
        width = max(1, round((sum(mixer.qk) - qk + sum(mixer.v) - v) / (2 * heads)))
        even = mixer.model_copy(update={"qk": (width,) * heads, "v": (width,) * heads})
        bare = block.model_copy(update={"mixer": even, "hidden": None})
        return budget.block(bare, stage, arriving).latency

    qk = _rate(stage, arriving, lambda n: one_head(n, 1))
    v = _rate(stage, arriving, lambda n: one_head(1, n))
    head = stage.of_a_head
    whole = time(0, 0, 0)

    def saved(a: int, b: int, dead: int) -> Array:
        faster = whole - time(a, b, dead) if whole else 0
        macs, params = (a * qk[i] + b * v[i] + dead * head[i] for i in (0, 1))
        return np.array([macs, params, faster], dtype=np.float64)

    return saved


def _ladder(
    index: int,
    field: Literal["attention", "hidden"],
    team: tuple[int, ...],
    widths: list[tuple[int, int]],
    qk: list[Array],
    v: list[Array],
    rate: Rate,
) -> Widths:
    """Build a ladder whose rung `i` goes from `widths[i]` to `widths[i + 1]`, for all heads of `team` together."""
    falls_qk = [np.cumsum(np.sort(qk[h])) for h in team]
    falls_v = [np.cumsum(np.sort(v[h])) for h in team]
    totals, counts, saves = [], [], []
    for wide_qk, wide_v in widths:
        gone_qk = [max(len(f) - wide_qk, 0) for f in falls_qk]
        gone_v = [max(len(f) - wide_v, 0) for f in falls_v]
        lost = sum(
            float(f[n - 1])
            for falls, gone in ((falls_qk, gone_qk), (falls_v, gone_v))
            for f, n in zip(falls, gone, strict=True)
            if n
        )
        a, b = sum(gone_qk), sum(gone_v)
        totals.append(lost)
        counts.append(a + b)
        dead = 0 if wide_v else len(team)
        saves.append(rate(a, b, dead))
    steps = range(len(widths) - 1)
    return Widths(
        block=index,
        field=field,
        heads=team,
        widths=widths,
        values=[(totals[i + 1] - totals[i]) / max(counts[i + 1] - counts[i], 1) for i in steps],
        saves=[saves[i + 1] - saves[i] for i in steps],
    )
