"""Which of several processes this is, as a launcher (torchrun, accelerate launch) tells it in the environment.

No torch is imported, so that a command which needs none answers at once.
"""

import os

__all__ = ["count", "first", "number", "on_this_machine"]


def count() -> int:
    """Return the number of processes that were started together; 1 without a launcher."""
    return max(1, _whole("WORLD_SIZE", 1))


def number() -> int:
    """Return the number of this process among all, from 0."""
    return _whole("RANK", 0)


def on_this_machine() -> int:
    """Return how many of the processes are on this machine."""
    return _whole("LOCAL_WORLD_SIZE", 1)


def first() -> bool:
    """Return whether this process is the one that prints and writes."""
    return number() == 0


def _whole(name: str, otherwise: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else otherwise
