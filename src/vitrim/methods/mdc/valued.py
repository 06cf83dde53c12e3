"""The first policies of a search that starts from closed forms.

P ratios of a policy.
"""

from collections.abc import Mapping

import numpy as np

from vitrim.cut.shares import largest
from vitrim.cut.spend import Policies
from vitrim.methods.mdc.decode import Frame

__all__ = ["first", "valued"]

_TOKENS = (0.0, 0.25, 0.5)
"""Shares of the largest ratio of tokens, with each of which one policy is made."""


def first(frame: Frame, losses: Mapping[str, Policies], corners: bool) -> Policies | None:
    """Return the policies to measure before any is drawn, or None if there are none."""
    known = ([valued(frame, losses)] if losses else []) + ([frame.corners()] if corners else [])
    return np.concatenate(known) if known else None


def valued(frame: Frame, losses: Mapping[str, Policies]) -> Policies:
    """Return policies that cut the heads and neurons with the least loss for each multiply-accumulate that they save.

    Each policy has another ratio of tokens, and cuts as many heads and neurons as the budget needs beside it, within
    their bounds.

    Args:
        frame: the policies.
        losses: by path of an axis, the loss of each part alone, see `vitrim.cut.compensate.losses`.

    Returns:
        ``(F, P)``; where the bounds are too narrow, policies that cut all within them.
    """
    columns: list[int] = []
    steps: list[float] = []
    density: list[float] = []
    for place in frame.places:
        qk, v, neuron = (macs for macs, _ in place.rates)
        heads = len(place.v) - 1
        for column, name, count, saved in (
            (place.heads, f"{place.path}.heads", heads, (qk * place.qk[-1] + v * place.v[-1]) / max(1, heads)),
            (place.hidden, f"{place.path}.hidden", place.block.hidden or 1, float(neuron)),
        ):
            if column is not None:
                least = np.sort(losses[name])[: int(frame.space.upper[column] * count + 1e-9)]
                columns += [column] * len(least)
                steps += [1 / count] * len(least)
                density += (least / max(saved, 1e-30)).tolist()
    order = np.argsort(density, kind="stable")
    found = []
    for share in _TOKENS if frame.token is not None else (0.0,):
        start = np.zeros(len(frame.space.names))
        if frame.token is not None:
            start[frame.token] = share * frame.space.upper[frame.token]

        def after(spared: int, start: Policies = start) -> Policies:
            """Return the policy with all cuts but so many of the dearest."""
            policy, chosen = start.copy(), order[: len(order) - spared]
            np.add.at(policy, np.array(columns, dtype=np.int64)[chosen], np.array(steps)[chosen])
            return policy

        found.append(after(largest(len(order), lambda spared: frame.space.spent(after(spared)[None])[0] <= 1)))
    return np.array(found)
