"""Upper bounds on a model's cost: ``macs=0.5``, ``macs=2.3G``, ``params=12M``, ``latency=0.6``, or several of them."""

import math
import re
from collections.abc import Mapping
from numbers import Real
from typing import Any, NamedTuple, Self

from pydantic import Field, ValidationError, field_serializer

from vitrim.words.costs import Cost, block_cost, cost_of
from vitrim.words.errors import BudgetError
from vitrim.words.plain import NONE, Node, did_you_mean, why_not_valid
from vitrim.words.spec import Block, Spec, Stage
from vitrim.words.steps import Tokens
from vitrim.words.table import TimeTable

__all__ = ["BOUNDS", "SLACK", "Budget", "Price"]

SLACK = 0.02
"""A method must use its budget: the cost of the model it returns is at most this share below the budget."""

BOUNDS = ("macs", "params", "latency")

_LEAST = 1000
"""The smallest absolute number that needs no unit."""

_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}
_NUMBER = re.compile(r"((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*([kmg]?)", re.IGNORECASE)


class Price(NamedTuple):
    """Cost of a model or of a part of it.

    `macs` is for one image, `latency` is in nanoseconds for a batch.
    """

    macs: int
    params: int
    latency: int = 0
    """0 if the budget has no table."""


class Budget(Node):
    """Upper bounds; each is a share of the parent in (0, 1], or an absolute number of at least 1000.

    A budget also computes costs: `cost` returns the cost of a spec and `block` the cost of a block, in each quantity
    that can be bounded. A budget without bounds can compute costs, but `spent` raises.

    Attributes:
        macs: multiply-accumulates for one image.
        params: parameters.
        latency: time of a forward pass, as a share of the parent's in (0, 1].
        table: measured times from which latency is computed. A budget without a table can bound latency, but cannot
            compute it.

    Raises:
        BudgetError: if a bound is not valid. ``50`` could be meant as a percentage, so numbers between 1 and 1000 must
            be given as text with a unit (``"0.05k"``), as for `parse`.
    """

    macs: float | None = None
    params: float | None = None
    latency: float | None = None
    table: TimeTable | None = Field(default=None, repr=False)

    def __init__(self, **fields: Any) -> None:
        given = {name: _bound(name, value) if name in BOUNDS else value for name, value in fields.items()}
        try:
            super().__init__(**given)
        except ValidationError as problem:
            raise BudgetError(why_not_valid(type(self), problem, "budget")) from None

    @field_serializer("macs", "params", when_used="json-unless-none")
    def _written(self, value: float) -> float | str:
        """Return the value, or text with a unit if the value needs one to be read as an absolute number."""
        return _text(value) if 1 < value < _LEAST else value

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``name=value[, name=value]``.

        A value in (0, 1] is a share of the parent. A value with a unit (k, M, G) or a number of at least 1000 is
        absolute.

        Raises:
            BudgetError: if `text` is malformed.
        """
        bounds: dict[str, float] = {}
        for part in text.split(","):
            name, equals, value = (piece.strip() for piece in part.partition("="))
            if not equals:
                raise BudgetError(f"a budget must look like macs=0.5 or params=12M, but got '{text}'")
            if name not in BOUNDS:
                raise BudgetError(
                    f"a budget must bound macs, params or latency, but got '{name}'{did_you_mean(name, BOUNDS)}"
                )
            if name in bounds:
                raise BudgetError(f"a budget must bound {name} once, but got '{text}'")
            bounds[name] = _value(name, value)
        return cls().bounded(bounds)

    def __str__(self) -> str:
        """Return the text that `parse` reads."""
        return ",".join(f"{name}={_text(value)}" for name, value in self.bounds().items())

    def bounds(self) -> dict[str, float]:
        """Return the given bounds by name."""
        return {name: value for name in BOUNDS if (value := getattr(self, name)) is not None}

    def bounded(self, bounds: Mapping[str, float]) -> Self:
        """Return the same budget with these bounds and no others. They are not checked again.

        Args:
            bounds: the result of `bounds` or `limits`. Limits are integers; a limit of latency is in nanoseconds.
        """
        return self.model_copy(update={name: bounds.get(name) for name in BOUNDS})

    def cost(self, spec: Spec) -> Price:
        """Return the cost of `spec`; latency is 0 if the budget has no table."""
        return Price(*cost_of(spec), 0 if self.table is None else self.table.latency(spec))

    def block(self, block: Block, stage: Stage, arriving: Tokens | None = None) -> Price:
        """Return the cost of one block, see `vitrim.words.costs.block_cost`."""
        macs, params = block_cost(block, stage, arriving)
        return Price(macs, params, 0 if self.table is None else self.table.block(block, stage, arriving))

    def step(self, stage: Stage) -> int:
        """Return the step in which neurons of `stage` are worth planning; 1 if time is not bounded."""
        return 1 if self.table is None or self.latency is None else self.table.step(stage)

    def limits(self, parent: Cost | Price) -> dict[str, int]:
        """Return the largest allowed integer of each bounded quantity, for a model made from `parent`.

        Raises:
            BudgetError: if an absolute bound exceeds the parent's cost, or if latency is bounded without a table.
        """
        limits = {}
        for name, value in self.bounds().items():
            whole: int = getattr(parent, name, 0)
            if not whole and name == "latency":
                raise BudgetError("latency must be planned by a table of times, but there is none; measure one first")
            if value > whole:
                raise BudgetError(f"budget of {name} must be at most {whole:,}, the model's own, but got {value:,.0f}")
            limits[name] = math.floor(value * whole) if value <= 1 else math.floor(value)
        return limits

    def admits(self, cost: Cost | Price, parent: Cost | Price) -> bool:
        """Return whether `cost` is within every bound."""
        return all(getattr(cost, name) <= limit for name, limit in self.limits(parent).items())

    def spent(self, cost: Cost | Price, parent: Cost | Price) -> float:
        """Return the largest share of a bound that `cost` uses; a method must reach ``1 - SLACK`` to 1.

        Raises:
            BudgetError: if the budget has no bounds.
        """
        shares: list[float] = [getattr(cost, name) / max(limit, 1) for name, limit in self.limits(parent).items()]
        if not shares:
            raise BudgetError(
                "a budget must bound macs, params or latency to be spent, but bounds nothing; give macs=0.5"
            )
        return max(shares)


def _bound(name: str, given: Any) -> float | None:
    """Return a bound from a Python value: None, text as in `Budget.parse`, or a number."""
    if given is None or given == NONE:
        return None
    if isinstance(given, str):
        return _value(name, given.strip())
    if isinstance(given, bool) or not isinstance(given, Real):
        raise BudgetError(f"budget of {name} must be a number such as 0.5 or 2.3e9, but got {given!r}")
    value = float(given)
    _check(name, value, f"{given}")
    if 1 < value < _LEAST:
        raise BudgetError(
            f"budget of {name} must be a share in (0, 1] or a number of at least {_LEAST}, but got {given}; if that "
            f"many are meant, give the text '{_text(value)}'"
        )
    return value


def _value(name: str, text: str) -> float:
    match = _NUMBER.fullmatch(text)
    if match is None:
        raise BudgetError(f"budget of {name} must be a number such as 0.5, 2.3G or 12M, but got '{text}'")
    value = float(match[1]) * _UNITS[match[2].lower()]
    if match[2] == "" and 1 < value < _LEAST:
        raise BudgetError(
            f"budget of {name} must be a share in (0, 1] or a number with a unit such as 2.3G, but got '{text}'"
        )
    _check(name, value, f"'{text}'")
    if match[2] and value <= 1:
        raise BudgetError(f"budget of {name} must be above 1 where it has a unit, but got '{text}'; a share has none")
    return value


def _check(name: str, value: float, given: str) -> None:
    """Raise `BudgetError` if `value` cannot be a bound of `name`."""
    if name == "latency" and value > 1:
        raise BudgetError(f"budget of latency must be a share of the parent's in (0, 1], but got {given}")
    if not 0 < value < math.inf:
        raise BudgetError(f"budget of {name} must be above 0 and finite, but got {given}")


def _text(value: float) -> str:
    """Return text that `_value` reads back to the same bits.

    Absolute numbers below 1000 get a unit because otherwise they would not be valid.
    """
    if not 1 < value < _LEAST:
        return repr(value).removesuffix(".0")
    thousands = value / 1000
    return f"{thousands!r}k" if thousands * 1000 == value else f"{value / 1e6!r}m"
