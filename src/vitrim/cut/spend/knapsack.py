"""Choose one option of every group so that the sum of losses is least within a budget.

G groups, O options of a group. A group is one part whose width is chosen independently (the attention or the MLP of a
block). This module handles only numbers.

The problem is the multiple-choice knapsack. It is solved by dynamic programming over the cost. The unit of cost is one
that divides every cost if there is one, and otherwise 1 / 4000 of the cost that can be saved, with costs rounded up. So
the choice is exact if costs share a unit, otherwise within 0.03 % of the budget of it, and never over budget.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vitrim.words.errors import BudgetError

__all__ = ["choose_options", "power_law"]

_UNITS = 4000
Array = NDArray[np.float64]


def choose_options(
    losses: Sequence[Sequence[float]], costs: Sequence[Sequence[Sequence[int]]], limits: Sequence[int]
) -> list[int]:
    """Choose options.

    Args:
        losses: for each group, the losses of its options.
        costs: for each group and option, one integer for each of the budget's bounds.
        limits: the largest sum of each.

    Returns:
        For each group the number of the chosen option. With one bound the least sum of losses (see above); with
        several, the best over a list of weightings of the bounds.

    Raises:
        BudgetError: naming the least possible cost, if nothing fits.
    """
    table = [np.asarray(group, dtype=np.int64).reshape(len(group), -1) for group in costs]
    bound = np.asarray(limits, dtype=np.int64)
    least = sum((group.min(axis=0) for group in table), np.zeros(len(bound), dtype=np.int64))
    if (least > bound).any():
        raise _out_of_reach(least, bound)
    # Subtract the least cost of each group, which every choice has, so that the remaining costs are at least 0.
    table, bound = [group - group.min(axis=0) for group in table], bound - least
    free = [np.asarray(group, dtype=np.float64) for group in losses]
    best = [int(group.argmin()) for group in free]
    if (_spent(table, best) <= bound).all():
        return best
    tries = [_weighted(free, table, bound, weights) for weights in _weightings(len(bound))]
    good = [found for found in tries if found is not None]
    if not good:
        raise BudgetError(f"bounds must be met together, but no choice found keeps {limits}; loosen one of them")
    return min(good, key=lambda chosen: sum(float(group[i]) for group, i in zip(free, chosen, strict=True)))


def _out_of_reach(least: NDArray[np.int64], bound: NDArray[np.int64]) -> BudgetError:
    at = int((least > bound).argmax())
    return BudgetError(
        f"a budget must be at least {int(least[at]):,} for these options, but got {int(bound[at]):,}; allow more"
    )


def _spent(table: list[NDArray[np.int64]], chosen: Sequence[int]) -> NDArray[np.int64]:
    total: NDArray[np.int64] = np.sum([group[i] for group, i in zip(table, chosen, strict=True)], axis=0)
    return total


def _weightings(bounds: int) -> list[tuple[float, ...]]:
    if bounds == 1:
        return [(1.0,)]
    grid = [w for w in itertools.product(range(9), repeat=bounds) if sum(w) == 8]
    return [tuple(part / 8 for part in w) for w in grid]


def _weighted(
    losses: list[Array], table: list[NDArray[np.int64]], bound: NDArray[np.int64], weights: tuple[float, ...]
) -> list[int] | None:
    """Return the best choice under one weighted bound, which is lowered until every bound holds."""
    if len(bound) == 1:
        return _knapsack(losses, [group[:, 0] for group in table], int(bound[0]))
    scale = np.asarray(weights) / np.maximum(bound, 1) * 1e9
    mixed = [np.ceil(group @ scale).astype(np.int64) for group in table]
    limit = 1e9
    for _ in range(12):
        chosen = _knapsack(losses, mixed, int(limit))
        if chosen is None:
            return None
        over = float((_spent(table, chosen) / np.maximum(bound, 1)).max())
        if over <= 1:
            return chosen
        limit *= min(1 / over, 0.995)
    return None


def _knapsack(losses: list[Array], costs: list[NDArray[np.int64]], limit: int) -> list[int] | None:
    """Solve the knapsack exactly in units: the least loss for every amount saved, up to the amount needed."""
    fair = [_fair(loss, cost) for loss, cost in zip(losses, costs, strict=True)]
    losses = [loss[keep] for loss, keep in zip(losses, fair, strict=True)]
    costs = [cost[keep] for cost, keep in zip(costs, fair, strict=True)]
    tops = [int(group.max()) for group in costs]
    saved = [top - group for top, group in zip(tops, costs, strict=True)]
    need = sum(tops) - limit
    if need <= 0:
        return [int(keep[group.argmin()]) for group, keep in zip(losses, fair, strict=True)]
    unit = math.gcd(need, *(int(value) for group in saved for value in group))
    if need > _UNITS * unit:
        unit = math.ceil(need / _UNITS)
    goal = -(-need // unit)
    gains = [gain // unit for gain in saved]
    best = np.full(goal + 1, np.inf)
    best[0] = 0.0
    tables, marks = [], []
    for loss, gain in zip(losses, gains, strict=True):
        fresh, mark = np.full(goal + 1, np.inf), np.zeros(goal + 1, dtype=np.int64)
        for option, (value, steps) in enumerate(zip(loss, gain, strict=True)):
            moved = _moved(best, min(int(steps), goal)) + value
            better = moved < fresh
            fresh[better], mark[better] = moved[better], option
        tables.append(best)
        marks.append(mark)
        best = fresh
    if not math.isfinite(best[goal]):
        return None
    chosen, at = [], goal
    for before, mark, gain in zip(reversed(tables), reversed(marks), reversed(gains), strict=True):
        chosen.append(int(mark[at]))
        steps = min(int(gain[chosen[-1]]), goal)
        at = int(goal - steps + before[goal - steps :].argmin()) if at == goal else at - steps
    return [int(keep[option]) for keep, option in zip(fair, chosen[::-1], strict=True)]


def _fair(loss: Array, cost: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the Pareto-optimal options in loss and cost, the cheapest first."""
    order = np.lexsort((loss, cost))
    best = np.concatenate([[np.inf], np.minimum.accumulate(loss[order])[:-1]])
    return order[loss[order] < best]


def _moved(best: Array, steps: int) -> Array:
    """Return `best` shifted by `steps` more units saved; saving more than the goal counts as the goal."""
    moved = np.full(len(best), np.inf)
    moved[steps:] = best[: len(best) - steps]
    moved[-1] = best[len(best) - 1 - steps :].min()
    return moved


def power_law(shares: Sequence[float], losses: Sequence[float], at: float) -> float:
    """Return the loss at a removed share, interpolated linearly between the logarithms of measured points.

    Beyond the first and the last point, the adjacent line is extended, below the first with an exponent of at least 1.
    The loss at share 0 is 0.

    Args:
        shares: removed shares in (0, 1], increasing.
        losses: losses measured there; made non-decreasing where noise makes them fall.
        at: the removed share, in [0, 1].
    """
    if at <= 0:
        return 0.0
    rising = np.maximum.accumulate(np.maximum(np.asarray(losses, dtype=np.float64), 1e-9))
    x, y = np.log(np.asarray(shares, dtype=np.float64)), np.log(rising)
    here = math.log(at)
    if x[0] <= here <= x[-1] or len(x) == 1:
        slope = 1.0 if here < x[0] else 0.0
        return float(np.exp(np.interp(here, x, y) + slope * min(here - x[0], 0.0)))
    slopes = np.diff(y) / np.diff(x)
    if here < x[0]:
        return float(np.exp(y[0] + max(slopes[0], 1.0) * (here - x[0])))
    return float(np.exp(y[-1] + slopes[-1] * (here - x[-1])))
