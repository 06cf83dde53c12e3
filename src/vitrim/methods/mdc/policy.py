"""Sampling of MDC's policies: one ratio for each part that can be cut.

P ratios of a policy, S policies side by side.

Source: Hou and Kung, "Multi-Dimensional Vision Transformer Compression via Dependency Guided Gaussian Process Search",
CVPR Workshops 2022: policies in [0, 0.5]^P drawn by rejection. A rejection sampler accepts very few draws far from half
the range (0.02 % of draws at 0.8 of DeiT-S's cost). So the remaining policies are scaled into the budget
(`vitrim.cut.spend.scaled`).
"""

import numpy as np

from vitrim.cut.spend import Policies, Space, project

__all__ = ["mutate", "sample"]

_DRAWS = 20
"""Uniform draws per requested policy, before the rest is scaled."""
_ROUNDS = 8
_MOVED = 0.2
_STEP = 0.1


def sample(space: Space, count: int, rng: np.random.Generator) -> Policies:
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


def mutate(space: Space, policy: Policies, count: int, rng: np.random.Generator) -> Policies:
    """Return feasible neighbors of a policy ``(P,)``: each ratio changes with probability 0.2 by N(0, 0.1).

    Returns:
        ``(S, P)`` with S at most `count`.
    """
    size = (count, len(space.names))
    moved = policy + (rng.random(size) < _MOVED) * rng.normal(0, _STEP, size)
    moved = np.clip(moved, 0, space.upper)
    inside = space.feasible(moved)
    return np.concatenate([moved[inside], project(space, moved[~inside])])
