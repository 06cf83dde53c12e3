"""Spend a budget: the one place that decides how much to cut where.

- `options`: what a method may cut (`Options`), and `spend`, which reads them at a budget. Nested cuts are `Ladders`.
- `scaled`: all parts cut in the proportions of one policy (`Scaled`).
- `knapsack`: one choice for each part with the least sum of losses.
"""

from vitrim.cut.spend.knapsack import choose_options, power_law
from vitrim.cut.spend.options import Array, Ladder, Ladders, Options, spend, spend_ladders
from vitrim.cut.spend.scaled import Policies, Scaled, Space, project, scaled, within

__all__ = [
    "Array",
    "Ladder",
    "Ladders",
    "Options",
    "Policies",
    "Scaled",
    "Space",
    "choose_options",
    "power_law",
    "project",
    "scaled",
    "spend",
    "spend_ladders",
    "within",
]
