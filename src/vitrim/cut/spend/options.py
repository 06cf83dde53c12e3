"""What a method may cut and what it thinks each cut is worth, and the choice of the cuts that meet a budget.

`Options` are made once, from a model and data, and read at any budget by `spend`. Cuts that are nested, such as
channels removed one after another, are `Ladders`. All rungs of all ladders stand in one list, the least valuable first.
Rungs are taken from its start until every bound is met. Then taken rungs are restored, the most valuable first, where
the bounds allow it. Times are not additive as macs are, so for a bound on time the list is read again for another aim
until the time of the whole child is close to the bound.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import numpy as np

from vitrim.words.budget import SLACK, Budget, Price
from vitrim.words.errors import BudgetError
from vitrim.words.plan import Plan
from vitrim.words.spec import Spec

__all__ = ["Array", "Ladder", "Ladders", "Options", "spend", "spend_ladders"]

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]

_TRIES = 12
"""Aims that are tried until the time of the child is close to its bound; bisection resolves 1 in 4,000."""


class Options(ABC):
    """All that may be cut of one model; a subclass says how they are spent. Methods return them, `spend` reads them."""

    @abstractmethod
    def spent(self, spec: Spec, budget: Budget) -> Plan:
        """Return the plan for `budget`; called by `spend`, which checks it.

        Raises:
            BudgetError: naming the least possible, if the budget cannot be met.
        """


def spend(spec: Spec, options: Options, budget: Budget) -> Plan:
    """Choose what to cut so that the child is within `budget`.

    Args:
        spec: the parent.
        options: what may be cut of it.
        budget: bounds on macs, parameters, time (with a table), or several of them.

    Returns:
        A plan whose child is admitted by `budget`, and that uses up its tightest bound except for 2 % where the widths
        are fine enough.

    Raises:
        BudgetError: if the budget cannot be met; the message names the smallest that can.
    """
    plan = options.spent(spec, budget)
    parent, cost = budget.cost(spec), budget.cost(plan.child(spec))
    for name, limit in budget.limits(parent).items():
        if getattr(cost, name) > limit:
            raise BudgetError(
                f"budget of {name} must be at least {getattr(cost, name):,} for these options, but got {limit:,}; "
                "allow more"
            )
    return plan


@dataclass(slots=True, kw_only=True)
class Ladder:
    """Nested cuts of one part; each rung cuts more.

    Attributes:
        saves: the cost that each rung saves, in the order of `Price`.
        level: number of rungs that are taken.
    """

    saves: list[Array]
    level: int = 0


L = TypeVar("L", bound=Ladder)


class Ladders(Options, Generic[L]):
    """Nested cuts of many parts, taken in one order.

    Attributes:
        restores: whether rungs that were taken are restored where the bounds allow it.
        strict: whether a budget is refused that all rungs together do not meet by the sum of their savings.
        where: what the least possible cost is the cost of, for messages.
        way_out: the way out, for messages.
    """

    restores: ClassVar[bool] = True
    strict: ClassVar[bool] = True
    where: ClassVar[str] = " for this model"
    way_out: ClassVar[str] = "allow more, or another method or choice of widths"

    @abstractmethod
    def ladders(self, spec: Spec, budget: Budget) -> list[L]:
        """Return all ladders, priced by `budget`, with no rung taken."""

    @abstractmethod
    def row(self, ladders: Sequence[L], need: Array) -> list[tuple[int, int]]:
        """Return all rungs as (ladder, rung), the least valuable first; a rung comes after those above it.

        Args:
            ladders: the ladders.
            need: cost to be saved, in the order of `Price`; -inf if a cost has no bound.
        """

    @abstractmethod
    def plan(self, spec: Spec, ladders: Sequence[L]) -> Plan:
        """Return the plan of the rungs that are taken."""

    def finished(self, spec: Spec, ladders: Sequence[L], budget: Budget) -> Plan:
        """Return the plan, with finer parts restored if the rungs leave too much of `budget` unused."""
        return self.plan(spec, ladders)

    def spent(self, spec: Spec, budget: Budget) -> Plan:
        """See `Options.spent`."""
        return spend_ladders(spec, self, budget)[0]


def spend_ladders(spec: Spec, options: Ladders[L], budget: Budget) -> tuple[Plan, list[L]]:
    """Return the plan for `budget` and the ladders at its levels; see `spend`."""
    spending = _Spending(spec, options, options.ladders(spec, budget), budget, budget.cost(spec))
    limits = budget.limits(spending.parent)
    plan = spending.at(limits) if budget.latency is None else spending.within_time(limits)
    return plan, spending.ladders


@dataclass(frozen=True)
class _Spending(Generic[L]):
    spec: Spec
    options: Ladders[L]
    ladders: list[L]
    budget: Budget
    parent: Price

    def at(self, limits: Mapping[str, int]) -> Plan:
        """Return the plan for `limits`, computed from the savings of single rungs."""
        for ladder in self.ladders:
            ladder.level = 0
        whole = self.parent._asdict()
        need = np.array([whole[name] - limits[name] if name in limits else -math.inf for name in Price._fields])
        row = self.options.row(self.ladders, need)
        spare = self._take(row, need, limits)
        if spare is not None and self.options.restores:
            _restore(self.ladders, row, spare)
        return self.options.finished(self.spec, self.ladders, self.budget)

    def within_time(self, limits: Mapping[str, int]) -> Plan:
        """Return the slowest plan whose latency by the table is within the limit.

        The savings of single rungs are estimates of time. The limit for these estimates is bisected until the latency
        of the whole child is close to the requested limit.
        """
        low, high, best = 0.0, float(self.parent.latency), None
        aim = float(limits["latency"])
        refused: BudgetError | None = None
        for _ in range(_TRIES):
            try:
                plan = self.at({**limits, "latency": math.floor(aim)})
            except BudgetError as problem:
                low, refused = aim, problem
            else:
                cost = self.budget.cost(plan.child(self.spec))
                if cost.latency <= limits["latency"]:
                    best, low = (plan, math.floor(aim)), aim
                    if self.budget.spent(cost, self.parent) >= 1 - SLACK / 2:
                        return plan
                else:
                    high = aim
            aim = (low + high) / 2
        if best is None:
            raise self._too_slow(limits) or refused or AssertionError
        return self.at({**limits, "latency": best[1]})

    def _take(self, row: list[tuple[int, int]], need: Array, limits: Mapping[str, int]) -> Array | None:
        """Take rungs in order until `need` is met, and return how much more than `need` was saved."""
        left = need.astype(float)
        for number, rung in row:
            if (left <= 0).all():
                return -left
            self.ladders[number].level = rung + 1
            left -= self.ladders[number].saves[rung]
        if (left <= 0).all():
            return -left
        if not self.options.strict:
            return None
        name = next(name for name, short in zip(Price._fields, left, strict=True) if short > 0)
        at = Price._fields.index(name)
        least = self.parent[at] - int(need[at] - left[at])
        raise BudgetError(
            f"budget of {name} must be at least {least:,}{self.options.where}, but got {limits[name]:,}; "
            f"{self.options.way_out}"
        )

    def _too_slow(self, limits: Mapping[str, int]) -> BudgetError | None:
        """Return the error for a bound on time below the fastest child; its message names that child's time."""
        for ladder in self.ladders:
            ladder.level = len(ladder.saves)
        fastest = self.budget.cost(self.options.plan(self.spec, self.ladders).child(self.spec)).latency
        if fastest <= limits["latency"]:
            return None
        return BudgetError(
            f"budget of latency must be at least {fastest / self.parent.latency:.3f} for this model on "
            f"{self.budget.table and self.budget.table.machine}, but got "
            f"{limits['latency'] / self.parent.latency:.3f}; {self.options.way_out}"
        )


def _restore(ladders: Sequence[Ladder], row: list[tuple[int, int]], spare: Array) -> None:
    """Restore rungs that were taken, the most valuable first, if the bounds allow it."""
    for number, rung in reversed(row):
        ladder = ladders[number]
        if ladder.level == rung + 1 and (ladder.saves[rung] <= spare).all():
            ladder.level = rung
            spare = spare - ladder.saves[rung]
