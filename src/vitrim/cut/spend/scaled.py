"""Scale ratios into a budget: one factor on how much of every part is cut.

P ratios of a policy, S policies side by side.

A policy is one ratio for each part that can be cut: the share that the part loses. Cutting all parts in proportion
leaves one number to choose, the factor, which is found by bisection. If rounding to whole heads and tokens still misses
the budget, single ratios are lowered.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vitrim.cut.spend.options import Options
from vitrim.words.budget import SLACK, Budget
from vitrim.words.errors import BudgetError
from vitrim.words.plan import Plan
from vitrim.words.spec import Spec

__all__ = ["Policies", "Scaled", "Space", "project", "scaled", "within"]

Policies = NDArray[np.float64]

_HALVINGS = 48
_LEAST = 1e-6
"""Least ratio before scaling, because a ratio of 0 could not be scaled up."""


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
    upper: Policies
    spent: Callable[[Policies], Policies]
    realised: Callable[[Policies], Policies]
    band: float = SLACK

    def feasible(self, policies: Policies) -> NDArray[np.bool_]:
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


class Scaled(Options):
    """Cuts in the proportions of one policy.

    Args:
        space: function from a budget to the policies within it.
        policy: ratios ``(P,)``; None for the largest of every part.
        plan: function from ratios ``(P,)`` to their plan.
    """

    def __init__(
        self,
        space: Callable[[Budget], Space],
        plan: Callable[[Policies], Plan],
        policy: Policies | None = None,
    ) -> None:
        self.space, self.plan, self.policy = space, plan, policy

    def spent(self, spec: Spec, budget: Budget) -> Plan:
        """See `Options.spent`."""
        space = self.space(budget)
        return self.plan(scaled(space, space.upper if self.policy is None else self.policy))


def scaled(space: Space, policy: Policies) -> Policies:
    """Return a policy ``(P,)`` scaled into the budget; single ratios are lowered if rounding overshoots.

    Raises:
        BudgetError: if no factor uses up the budget.
    """
    space.check()
    found = project(space, policy[None])
    if not len(found):
        raise BudgetError("a budget must be met by one share of every ratio, but none does; search with proposal=gp")
    best: Policies = found[0]
    return best


def project(space: Space, policies: Policies) -> Policies:
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


def within(space: Space, policies: Policies) -> Policies:
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


def _scaled(space: Space, policies: Policies) -> Policies:
    # At this factor and above, every ratio is at its bound.
    high = (space.upper / policies).max(axis=1)
    low = np.zeros(len(policies))
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        fits = space.spent(np.clip(middle[:, None] * policies, 0, space.upper)) <= 1
        low, high = np.where(fits, low, middle), np.where(fits, middle, high)
    scaled: Policies = np.clip(high[:, None] * policies, 0, space.upper)
    return scaled


def _lowered(space: Space, policies: Policies) -> Policies:
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
