"""How a budget falls from the parent's cost to the child's while a search trains."""

__all__ = ["ramped"]


def ramped(share: float, start: float, end: float, warmup: float, ramp_end: float) -> float:
    """Return the budget after a `share` of the run: `start` until `warmup`, then falling along a cubic to `end`.

    Source: Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017.
    """
    part = min(max((share - warmup) / (ramp_end - warmup), 0.0), 1.0)
    return end + (start - end) * (1 - part) ** 3
