"""Spend a budget exactly: from a score for every channel to the widths of every block.

H heads, K channels of a head, M hidden neurons.

Everything that may go is laid out as *ladders*, one for each thing whose width is chosen by itself. A rung takes a few
channels away, the worst of what is left, and is worth what it saves. All rungs of all ladders stand in one row, the
least valuable first; as many are taken from the front as the budget needs, then what was taken too much is given back
from the best down. Savings are plain multiples of channels, so a row of 46,000 rungs (DeiT-B) is walked in a second.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from vitrim.budget import SLACK, Budget
from vitrim.costs import Cost, block_cost, cost_of
from vitrim.errors import BudgetError, MethodError
from vitrim.plan import BlockPlan, Kept, Plan
from vitrim.spec import Attention, Block, Spec, Stage, Tokens

__all__ = ["ALIGN", "Choice", "fill", "quantiles"]

Choice = Literal["free", "even", "heads"]
"""``free``: every head its own width. ``even``: one width for all heads of a block. ``heads``: whole heads.

The last two take neurons in steps of 8.
"""

ALIGN = 8
"""Widths that kernels like are multiples of this."""

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@dataclass(slots=True)
class _Ladder:
    """One width to be chosen: `values[i]` and `saves[i]` are the score and the (macs, params) of rung `i`."""

    block: int
    field: Literal["attention", "hidden"]
    heads: tuple[int, ...]
    widths: list[tuple[int, int]]
    values: list[float]
    saves: list[tuple[int, int]]
    level: int = 0


def fill(
    spec: Spec,
    scores: Mapping[str, Tensor],
    budget: Budget,
    *,
    choice: Choice = "even",
    by: Literal["score", "density"] = "density",
) -> Plan:
    """Choose what to keep so that the child is within `budget`, never over and at most 2 % under.

    Args:
        spec: the parent.
        scores: by path of an axis (``stages.0.blocks.3.hidden``, ``….qk``, ``….v``), one number for each channel, all
            heads in a row; larger is more valuable. An axis without scores is left alone.
        budget: what the child may cost.
        choice: which widths are allowed.
        by: order of rungs. ``density``: by score lost for each share of the budget saved, right for scores that add
            up (an estimate of loss). ``score``: by the mean score alone, right for ranks.

    Returns:
        A plan whose child is admitted by `budget`. Of each head and MLP the best channels are kept.

    Raises:
        BudgetError: naming the least possible, if the budget is out of reach.
        MethodError: if a score is not finite or scores do not fit the axes.
    """
    parent = cost_of(spec)
    limits = budget.limits(parent)
    ladders = list(_ladders(spec, _checked(spec, scores), choice))
    need = np.array(
        [parent.macs - limits.get("macs", parent.macs), parent.params - limits.get("params", parent.params)]
    )
    row = _row(ladders, need, by)
    left = _take(ladders, row, need, parent, limits)
    _give_back(ladders, row, left)
    ranked = {path: values.double().cpu().numpy() for path, values in scores.items()}
    plan = _plan(spec, ladders, ranked)
    if choice != "free":
        plan = _top_up(spec, plan, ranked, budget)
    return plan


def quantiles(scores: Mapping[str, Tensor], kinds: Mapping[str, str]) -> dict[str, Tensor]:
    """Replace scores by their place in the ranking of their kind, from 0 to 1.

    Filling by quantiles keeps the same share of every kind, which is how the ViT-Slim paper sets its budgets (sec. 2.3
    of its text: one list for each kind, over all blocks). Ties keep the order of the axes.

    Args:
        scores: by path of an axis.
        kinds: by path of an axis, the name of the list that it is ranked in.
    """
    ranked: dict[str, Tensor] = {}
    for kind in sorted(set(kinds.values())):
        paths = [path for path in scores if kinds[path] == kind]
        flat = np.concatenate([scores[path].double().cpu().numpy() for path in paths])
        places = np.empty(len(flat))
        places[np.argsort(flat, kind="stable")] = (np.arange(len(flat)) + 0.5) / len(flat)
        start = 0
        for path in paths:
            size = scores[path].numel()
            ranked[path] = scores[path].new_tensor(places[start : start + size]).double()
            start += size
    return ranked


def _checked(spec: Spec, scores: Mapping[str, Tensor]) -> dict[str, list[Array]]:
    """Scores of each axis, one array a head."""
    groups: dict[str, tuple[int, ...]] = {}
    for path, _, block in spec.blocks():
        if isinstance(block.mixer, Attention):
            groups |= {f"{path}.qk": block.mixer.qk, f"{path}.v": block.mixer.v}
        if block.hidden:
            groups[f"{path}.hidden"] = (block.hidden,)
    split: dict[str, list[Array]] = {}
    for path, values in scores.items():
        array: Array = values.detach().double().cpu().numpy().reshape(-1)
        if path not in groups or len(array) != sum(groups[path]):
            raise MethodError(f"{path}: scores must fit an axis of the model, but got {len(array)} values")
        if not np.isfinite(array).all():
            raise MethodError(f"{path}: scores must be finite, but some are NaN or infinite; check weights and data")
        split[path] = np.split(array, np.cumsum(groups[path])[:-1])
    return split


def _ladders(spec: Spec, scores: Mapping[str, list[Array]], choice: Choice) -> Iterator[_Ladder]:
    for index, ((path, stage, block), arriving) in enumerate(zip(spec.blocks(), spec.arrivals(), strict=True)):
        if isinstance(block.mixer, Attention) and block.mixer.v and f"{path}.v" in scores:
            rates = _attention_rate(stage, block, arriving)
            yield from _attention_ladders(index, stage, block, scores, path, choice, rates)
        if block.hidden and f"{path}.hidden" in scores and stage.form.hidden_norm is None:
            levels = _levels(block.hidden, 1 if choice == "free" else ALIGN)
            rate = _hidden_rate(stage, block, arriving)
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
    rate: Callable[[int, int, int], tuple[int, int]],
) -> Iterator[_Ladder]:
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
        widths = _joint_levels(top_qk, top_v, step, form.head_norm is not None, form.mixed_norm is not None)
        yield _ladder(index, "attention", team, widths, qk, v, rate)


def _levels(size: int, step: int) -> list[int]:
    """`size`, then every smaller multiple of `step` down to 0."""
    return [size, *range((math.ceil(size / step) - 1) * step, -1, -step)]


def _joint_levels(qk: int, v: int, step: int, tied_qk: bool, tied_v: bool) -> list[tuple[int, int]]:
    """Widths of queries/keys and values that go down together; a norm over one of them leaves it alone."""
    if tied_v:
        return [] if tied_qk else [(n, v) for n in _levels(qk, step) if n]
    levels = _levels(max(qk, v), step)
    if tied_qk:
        return [(qk if n else 0, min(n, v)) for n in _levels(v, step)]
    return [(min(n, qk), min(n, v)) for n in levels]


def _rate(stage: Stage, arriving: Tokens, build: Callable[[int], Block]) -> tuple[int, int]:
    """Cost of one channel: macs and parameters are straight lines in every width."""
    one, two = (block_cost(build(n), stage, arriving) for n in (1, 2))
    return two[0] - one[0], two[1] - one[1]


def _hidden_rate(stage: Stage, block: Block, arriving: Tokens) -> tuple[int, int]:
    return _rate(stage, arriving, lambda hidden: block.model_copy(update={"hidden": hidden}))


def _attention_rate(stage: Stage, block: Block, arriving: Tokens) -> Callable[[int, int, int], tuple[int, int]]:
    """What cutting (qk channels, v channels, heads) saves; a head's own share is its column of position biases."""
    scale = block.mixer.scale if isinstance(block.mixer, Attention) else 1.0

    def one_head(qk: int, v: int) -> Block:
        return block.model_copy(update={"mixer": Attention(qk=(qk,), v=(v,), scale=scale)})

    qk = _rate(stage, arriving, lambda n: one_head(n, 1))
    v = _rate(stage, arriving, lambda n: one_head(1, n))
    head = stage.window.offsets if stage.window is not None else 0
    return lambda a, b, dead: (a * qk[0] + b * v[0], a * qk[1] + b * v[1] + dead * head)


def _ladder(
    index: int,
    field: Literal["attention", "hidden"],
    team: tuple[int, ...],
    widths: list[tuple[int, int]],
    qk: list[Array],
    v: list[Array],
    rate: Callable[[int, int, int], tuple[int, int]] | tuple[int, int],
) -> _Ladder:
    """A ladder whose rung `i` leads from `widths[i]` to `widths[i + 1]`, for every head of `team` at once."""
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
        saves.append(rate(a, b, dead) if callable(rate) else (rate[0] * b, rate[1] * b))
    steps = range(len(widths) - 1)
    return _Ladder(
        block=index,
        field=field,
        heads=team,
        widths=widths,
        values=[(totals[i + 1] - totals[i]) / max(counts[i + 1] - counts[i], 1) for i in steps],
        saves=[(saves[i + 1][0] - saves[i][0], saves[i + 1][1] - saves[i][1]) for i in steps],
    )


def _row(ladders: list[_Ladder], need: Array, by: str) -> list[tuple[int, int]]:
    """All rungs as (ladder, rung), the least valuable first; a rung never stands before the one above it."""
    weights = np.maximum(need, 0) / max(float(np.maximum(need, 0).max()), 1.0)
    keys: list[tuple[float, int, int]] = []
    for number, ladder in enumerate(ladders):
        highest = -math.inf
        for rung, (value, saves) in enumerate(zip(ladder.values, ladder.saves, strict=True)):
            if by == "density":
                channels = _channels(ladder, rung)
                value = value * channels / max(float(np.dot(weights, saves)), 1e-30)
            highest = max(highest, value)
            keys.append((highest, number, rung))
    return [(number, rung) for _, number, rung in sorted(keys)]


def _channels(ladder: _Ladder, rung: int) -> int:
    (a, b), (c, d) = ladder.widths[rung], ladder.widths[rung + 1]
    return (a - c + b - d) * len(ladder.heads)


def _take(
    ladders: list[_Ladder], row: list[tuple[int, int]], need: Array, parent: Cost, limits: Mapping[str, int]
) -> Array:
    """Go down rung by rung until `need` is met; return what was saved too much."""
    left = need.astype(float)
    for number, rung in row:
        if (left <= 0).all():
            return -left
        ladders[number].level = rung + 1
        left -= ladders[number].saves[rung]
    if (left <= 0).all():
        return -left
    least = {name: getattr(parent, name) - int(n - m) for name, n, m in zip(Cost._fields, need, left, strict=True)}
    name = next(name for name, short in zip(Cost._fields, left, strict=True) if short > 0)
    raise BudgetError(
        f"budget of {name} must be at least {least[name]:,} for this model, but got {limits[name]:,}; "
        "allow more, or another method or choice of widths"
    )


def _give_back(ladders: list[_Ladder], row: list[tuple[int, int]], spare: Array) -> None:
    """Climb back, the most valuable rung first, wherever the budget allows it."""
    for number, rung in reversed(row):
        ladder = ladders[number]
        if ladder.level == rung + 1 and (np.asarray(ladder.saves[rung]) <= spare).all():
            ladder.level = rung
            spare = spare - ladder.saves[rung]


def _plan(spec: Spec, ladders: list[_Ladder], ranked: Mapping[str, Array]) -> Plan:
    attention: dict[int, dict[int, tuple[int, int]]] = {}
    hidden: dict[int, int] = {}
    for ladder in ladders:
        if not ladder.level:
            continue
        width = ladder.widths[ladder.level]
        if ladder.field == "hidden":
            hidden[ladder.block] = width[1]
        else:
            attention.setdefault(ladder.block, {}).update(dict.fromkeys(ladder.heads, width))
    blocks = []
    for index, (path, _, block) in enumerate(spec.blocks()):
        fields: dict[str, object] = {}
        if index in attention and isinstance(block.mixer, Attention):
            fields = _heads(block.mixer, attention[index], ranked, path)
        if index in hidden:
            fields["hidden"] = _best(ranked[f"{path}.hidden"], hidden[index])
        blocks.append(BlockPlan.model_validate(fields))
    return Plan.of(spec, blocks)


def _heads(
    mixer: Attention, widths: Mapping[int, tuple[int, int]], ranked: Mapping[str, Array], path: str
) -> dict[str, object]:
    kept: dict[str, object] = {}
    for place, (name, sizes) in enumerate((("qk", mixer.qk), ("v", mixer.v))):
        flat = ranked.get(f"{path}.{name}", np.zeros(sum(sizes)))
        parts = np.split(flat, np.cumsum(sizes)[:-1])
        kept[name] = tuple(
            _best(part, widths[head][place]) if head in widths else tuple(range(len(part)))
            for head, part in enumerate(parts)
        )
    return kept


def _best(values: Array, count: int) -> Kept:
    """Indices of the `count` largest, rising; ties keep the first."""
    order = np.argsort(-values, kind="stable")[:count]
    return tuple(int(i) for i in np.sort(order))


def _top_up(spec: Spec, plan: Plan, ranked: Mapping[str, Array], budget: Budget) -> Plan:
    """Where steps of 8 leave more than the slack unspent (tiny models), give single neurons back."""
    parent = cost_of(spec)
    limits = budget.limits(parent)
    blocks = plan.blocks()
    for index, ((path, stage, block), arriving) in enumerate(zip(spec.blocks(), spec.arrivals(), strict=True)):
        cost = cost_of(Plan.of(spec, blocks).child(spec))
        if budget.spent(cost, parent) >= 1 - SLACK:
            break
        kept = blocks[index].hidden
        if kept is None or not block.hidden:
            continue
        rate = _hidden_rate(stage, block, arriving)
        room = [
            (limits[name] - getattr(cost, name)) // step
            for name, step in zip(Cost._fields, rate, strict=True)
            if name in limits
        ]
        more = min(block.hidden - len(kept), ALIGN - 1, *room)
        if more > 0 and kept:
            better = _best(ranked[f"{path}.hidden"], len(kept) + more)
            blocks[index] = blocks[index].model_copy(update={"hidden": better})
    return Plan.of(spec, blocks)
