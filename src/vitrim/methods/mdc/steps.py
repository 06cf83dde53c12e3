"""In which blocks heads are cut at all, by what one step of it costs.

L blocks, H heads, P ratios of a policy.

A ratio of heads moves in steps of 1 / H. With three heads every ratio above 1/6 takes a third of a block's heads, so of
ratios drawn from 0 to 0.5 two thirds do, and a drawn policy of 12 blocks takes a head in eight of them, whatever they
are worth. So each block's first head is measured before the search. Ours, not published.
"""

from collections.abc import Callable

import numpy as np

from vitrim.cut.spend import Policies
from vitrim.methods.mdc.decode import Frame

__all__ = ["too_costly"]

_HALVINGS = 40


def too_costly(frame: Frame, loses: Callable[[Policies], float]) -> list[str]:
    """Return the names of the ratios of heads whose first head costs more than it saves at this budget.

    Without any head, neurons and tokens are cut in the proportions of their bounds until the budget is met. With the
    least valuable head of one block cut as well, they are cut that much less. Where the model then loses more, the
    block's heads are too costly. Where the others alone cannot meet the budget, none is.

    Args:
        frame: the policies, with the ranking, the bounds and the budget of the search.
        loses: function from a policy ``(P,)`` to a loss; called at most L + 1 times.
    """
    heads = {place.heads: 1 / (len(place.v) - 1) for place in frame.places if place.heads is not None}
    others = frame.space.upper.copy()
    others[list(heads)] = 0
    if not heads or frame.space.spent(others[None])[0] > 1:
        return []
    without = loses(_filled(frame, others, np.zeros_like(others)))
    found = []
    for column, step in heads.items():
        one = np.zeros_like(others)
        one[column] = step
        if loses(_filled(frame, others, one)) > without:
            found.append(frame.space.names[column])
    return found


def _filled(frame: Frame, others: Policies, policy: Policies) -> Policies:
    """Return a policy with as little of `others` added as meets the budget."""
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        fits = frame.space.spent((policy + middle * others)[None])[0] <= 1
        low, high = (low, middle) if fits else (middle, high)
    return np.asarray(policy + high * others)
