"""What a user should not overlook in results: how sure a number is, and what makes it worth little."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["chance_of", "remarks", "standard_error", "why_at_chance"]

COLLAPSED = 50.0
"""Agreement, percent, below which a child is no smaller form of its parent; the same share of its parent's top-1."""

WIDE = 2.0
"""Times of one run that differ by this factor tell little."""

_SURE = 3.0


def standard_error(percent: float | None, count: int) -> float | None:
    """Standard error of a share of `count` images, in points: 100 sqrt(p (1 - p) / count).

    Args:
        percent: the share, in `[0, 100]`; None for none.
        count: images that it was measured on.
    """
    if percent is None or not count:
        return None
    share = percent / 100
    return float(100 * np.sqrt(max(0.0, share * (1 - share)) / count))


def chance_of(labels: NDArray[np.int64]) -> float:
    """Top-1 of a model that always gives the most frequent class of these images, percent."""
    return 100 * float(np.bincount(labels[labels >= 0]).max()) / len(labels)


def why_at_chance(top1: float | None, chance: float | None, count: int) -> str | None:
    """Why a top-1 says that a model knows nothing of the images, or None.

    Args:
        top1: percent.
        chance: see `chance_of`.
        count: images that both were measured on.
    """
    if top1 is None or chance is None or top1 > chance + _SURE * (standard_error(chance, count) or 0.0):
        return None
    if chance >= 100:
        return None
    return f"its top-1 of {top1:.1f} % on {count:,} images is that of chance ({chance:.1f} %)"


def remarks(measured: Mapping[str, Any], *, tested_on_training: bool = False) -> list[str]:
    """Sentences on what is wrong with what was measured, worst first; empty when nothing is.

    Args:
        measured: as in ``measured.json``.
        tested_on_training: whether the images that top-1 was measured on were trained on, too.
    """
    found = []
    if tested_on_training:
        found.append("top-1 was measured on the training images, which flatters; give others (--test)")
    count = int(measured.get("test_images") or 0)
    top1, parent, chance = (measured.get(name) for name in ("top1", "top1_parent", "chance"))
    parents = why_at_chance(parent, chance, count)
    if parents is not None:
        found.append(
            f"the parent does not know these images: {parents}; check its weights, the numbers of the classes "
            "(data.class_order, data.class_map) and the normalization (data.mean, data.std)"
        )
    child = why_at_chance(top1, chance, count)
    if parents is None and child is not None:
        found.append(f"the child has lost what its parent knew: {child}; train it (--epochs), or cut less")
    elif parents is None and top1 is not None and parent is not None and top1 < parent * COLLAPSED / 100:
        found.append(
            f"top-1 collapses from {parent:.1f} to {top1:.1f} %, less than half; train it (--epochs), or cut less"
        )
    agreement = measured.get("agreement")
    if agreement is not None and agreement < COLLAPSED:
        found.append(
            f"the child gives its parent's answer on {agreement:.1f} % of "
            f"{int(measured.get('compared_images') or 0):,} images only; train it (--epochs), or cut less"
        )
    low, high = measured.get("latency_ratio_low"), measured.get("latency_ratio_high")
    if low is not None and high is not None and high > WIDE * low:
        found.append(
            f"the ratio of times lies anywhere from {low:.2f} to {high:.2f}; measure again on an idle machine, or "
            "longer (measure.seconds)"
        )
    return found
