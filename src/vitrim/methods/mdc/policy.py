"""Policies: one ratio for each part that can be cut, and sampling of policies that use up a budget.

P ratios of a policy, S policies side by side.

Source: Hou and Kung, "Multi-Dimensional Vision Transformer Compression via Dependency Guided Gaussian Process Search",
CVPR Workshops 2022: policies in [0, 0.5]^P drawn by rejection. A rejection sampler accepts very few draws far from half
the range (0.02 % of draws at 0.8 of DeiT-S's cost). So the remaining policies are scaled into the budget by bisection,
and if rounding still misses the budget, single ratios are lowered.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitrim.words.budget import SLACK
from vitrim.words.errors import BudgetError

__all__ = ["Array", "Space", "even", "mutate", "project", "sample", "within"]

Array = NDArray[np.float64]

_DRAWS = 20
"""Uniform draws per requested policy, before the rest is scaled."""
_HALVINGS = 48
_ROUNDS = 8
_LEAST = 1e-6
"""Least ratio before scaling, because a ratio of 0 could not be scaled up."""
_MOVED = 0.2
_STEP = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """All policies, and what they cost.

    Attributes:
        names: names of the P ratios.
        upper: largest allowed ratios, ``(P,)``, in (0, 1].
        spent: function from policies ``(S, P)`` to the share of the budget each uses, ``(S,)``; non-increasing in every
            ratio. A policy is feasible from ``1 - band`` to 1.
        realised: function from policies ``(S, P)`` to the ratios after rounding, ``(S, P)``; equal ones are the same
            architecture.
        band: how far below 1 the used share of the budget may be.
    """

    names: tuple[str, ...]
    upper: Array
    spent: Callable[[Array], Array]
    realised: Callable[[Array], Array]
    band: float = SLACK

    def feasible(self, policies: Array) -> NDArray[np.bool_]:
        """Return which of the policies ``(S, P)`` use up the budget without exceeding it."""
        spent = self.spent(policies)
        return (spent <= 1) & (spent >= 1 - self.band)

    def check(self) -> None:
        """Raise an error if no policy meets the budget.

        Raises:
            BudgetError: naming the least multiple of the budget that can be met.
        """
        least = float(self.spent(self.upper[None])[0]) if len(self.names) else np.inf
        if least > 1:
            raise BudgetError(
                f"a budget must be at least {least:.4g} times what was asked for, which ratios at their bounds leave, "
                "but is less; allow more, or raise the bounds"
            )


def sample(space: Space, count: int, rng: np.random.Generator) -> Array:
    """Draw feasible policies: uniform ones as far as rejection finds them, scaled ones for the rest.

    Args:
        space: the space of policies.
        count: S.
        rng: the random number generator.

    Returns:
        ``(S, P)``; fewer, possibly none, if rounding leaves almost no policy in the band. The number of draws is fixed,
        so the function always returns.

    Raises:
        BudgetError: if the budget cannot be met.
    """
    space.check()
    drawn = rng.random((_DRAWS * count, len(space.names))) * space.upper
    found = drawn[space.feasible(drawn)][:count]
    for _ in range(_ROUNDS):
        short = count - len(found)
        if not short:
            break
        scaled = project(space, rng.random((short, len(space.names))) * space.upper)
        found = np.concatenate([found, scaled])
    return found


def mutate(space: Space, policy: Array, count: int, rng: np.random.Generator) -> Array:
    """Return feasible neighbors of a policy ``(P,)``: each ratio changes with probability 0.2 by N(0, 0.1).

    Returns:
        ``(S, P)`` with S at most `count`.
    """
    size = (count, len(space.names))
    moved = policy + (rng.random(size) < _MOVED) * rng.normal(0, _STEP, size)
    moved = np.clip(moved, 0, space.upper)
    inside = space.feasible(moved)
    return np.concatenate([moved[inside], project(space, moved[~inside])])


def project(space: Space, policies: Array) -> Array:
    """Scale policies into the budget, by the smallest factor that meets it, found by bisection.

    If whole heads, or many blocks at once, then overshoot the band, single ratios are lowered.

    Args:
        space: the space of policies.
        policies: ``(S, P)``, from 0 to their bounds.

    Returns:
        The policies that could be scaled into the budget, ``(s, P)`` with s at most S.
    """
    found = within(space, policies)
    return found[~np.isnan(found).any(axis=1)]


def within(space: Space, policies: Array) -> Array:
    """Return each policy itself if it is feasible, or else scaled as by `project`.

    Each row is computed independently.

    Returns:
        ``(S, P)``; rows of NaN if no factor scales the policy into the budget.
    """
    found = policies.copy()
    outside = ~space.feasible(policies) if len(policies) else np.zeros(0, dtype=bool)
    rows = np.maximum(policies[outside], _LEAST)
    if len(rows):
        found[outside] = _lowered(space, _scaled(space, rows))
    return found


def _scaled(space: Space, policies: Array) -> Array:
    # At this factor and above, every ratio is at its bound.
    high = (space.upper / policies).max(axis=1)
    low = np.zeros(len(policies))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        fits = space.spent(np.clip(middle[:, None] * policies, 0, space.upper)) <= 1
        low, high = np.where(fits, low, middle), np.where(fits, middle, high)
    scaled: Array = np.clip(high[:, None] * policies, 0, space.upper)
    return scaled


def _lowered(space: Space, policies: Array) -> Array:
    """Lower one ratio after another until the band is reached; rows of NaN if it is not.

    The order is pseudo-random for each policy, taken from its low-order digits, so that no block is preferred.
    """
    order = np.argsort(policies * 1e4 % 1, axis=1, kind="stable")
    left = np.flatnonzero(~space.feasible(policies))
    for place in range(len(space.names)):
        if not len(left):
            return policies
        part, column, rows = policies[left], order[left, place], np.arange(len(left))
        high, low = part[rows, column].copy(), np.zeros(len(left))
        for _ in range(_HALVINGS // 2):
            part[rows, column] = (low + high) / 2
            fits = space.spent(part) <= 1
            low, high = np.where(fits, low, part[rows, column]), np.where(fits, part[rows, column], high)
        part[rows, column] = high
        policies[left] = part
        left = left[~space.feasible(part)]
    policies[left] = np.nan
    return policies


def even(space: Space) -> Array:
    """Return the policy with one share of every bound, ``(1, P)``; single ratios are lowered if rounding overshoots.

    Raises:
        BudgetError: if no such policy uses up the budget.
    """
    space.check()
    found = project(space, space.upper[None])
    if not len(found):
        raise BudgetError("a budget must be met by one share of every ratio, but none does; search with proposal=gp")
    return found
