"""Remarks on results: the standard error of a number, and warnings about unreliable or poor results."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["chance_of", "remarks", "standard_error", "why_at_chance"]

COLLAPSED = 50.0
"""Agreement in percent, and share of the parent's top-1 in percent, below which a child has lost too much."""

WIDE = 2.0
"""A ratio of times whose percentiles differ by this factor is unreliable."""

_SURE = 3.0


def standard_error(percent: float | None, count: int) -> float | None:
    """Return the standard error of a share of `count` images, in percentage points: 100 sqrt(p (1 - p) / count).

    Args:
        percent: the share, in `[0, 100]`, or None.
        count: number of images that it was measured on.
    """
    if percent is None or not count:
        return None
    share = percent / 100
    return float(100 * np.sqrt(max(0.0, share * (1 - share)) / count))


def chance_of(labels: NDArray[np.int64]) -> float:
    """Return the top-1, in percent, of a model that always predicts the most frequent class of these images."""
    return 100 * float(np.bincount(labels[labels >= 0]).max()) / len(labels)


def why_at_chance(top1: float | None, chance: float | None, count: int) -> str | None:
    """Return why a top-1 is no better than chance, or None.

    Args:
        top1: percent.
        chance: see `chance_of`.
        count: number of images that both were measured on.
    """
    if top1 is None or chance is None or top1 > chance + _SURE * (standard_error(chance, count) or 0.0):
        return None
    if chance >= 100:
        return None
    return f"its top-1 of {top1:.1f} % on {count:,} images is that of chance ({chance:.1f} %)"


def remarks(measured: Mapping[str, Any], *, tested_on_training: bool = False) -> list[str]:
    """Return sentences on problems of the measurements, worst first; empty if there are none.

    Args:
        measured: the record of ``measured.json``.
        tested_on_training: whether top-1 was measured on images that were also trained on.
    """
    found = []
    if tested_on_training:
        found.append("top-1 was measured on the training images, which overstates it; give others (--test)")
    count = int(measured.get("test_images") or 0)
    top1, parent, chance = (measured.get(name) for name in ("top1", "top1_parent", "chance"))
    parents = why_at_chance(parent, chance, count)
    if parents is not None:
        found.append(
            f"the parent cannot classify these images: {parents}; check its weights, the numbers of the classes "
            "(data.class_order, data.class_map) and the normalization (data.mean, data.std)"
        )
    child = why_at_chance(top1, chance, count)
    if parents is None and child is not None:
        found.append(f"the child has lost its parent's accuracy: {child}; train it (--epochs), or cut less")
    elif parents is None and top1 is not None and parent is not None and top1 < parent * COLLAPSED / 100:
        found.append(f"top-1 drops from {parent:.1f} to {top1:.1f} %, less than half; train it (--epochs), or cut less")
    agreement = measured.get("agreement")
    if agreement is not None and agreement < COLLAPSED:
        found.append(
            f"the child gives its parent's answer on {agreement:.1f} % of "
            f"{int(measured.get('compared_images') or 0):,} images only; train it (--epochs), or cut less"
        )
    low, high = measured.get("latency_ratio_low"), measured.get("latency_ratio_high")
    if low is not None and high is not None and high > WIDE * low:
        found.append(
            f"the ratio of times ranges from {low:.2f} to {high:.2f}; measure again on an idle machine, or "
            "longer (measure.seconds)"
        )
    return found
