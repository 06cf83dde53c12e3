"""Whatever can be called, timed in turns: A B C C B A, so that a drift of the machine meets all alike."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from vitrim.errors import RecipeError
from vitrim.measure.clock import TICK, _at_least, _name, _place, _repeats, _rounds, _spread, _threads

__all__ = ["TICK", "at_least", "name_of", "place_of", "spread", "threading", "turns"]

at_least, name_of, place_of, spread, threading = _at_least, _name, _place, _spread, _threads


def turns(
    calls: Sequence[Callable[[], Any]], *, wait: Callable[[], None] = lambda: None, seconds: float = 5.0, runs: int = 6
) -> list[list[float]]:
    """Samples of each call, seconds a call, taken in turns.

    Args:
        calls: what to time, each called twice to warm up.
        wait: returns when all that was called is done; for devices that go on by themselves.
        seconds: time to spend, above 0; `runs` samples of each are taken even if they take longer.
        runs: least samples of each, at least 2; an odd number is raised by one, to end a round.

    Returns:
        a list for each call; samples at one place of all lists are of one half round.

    Raises:
        RecipeError: if a setting is out of its range.
    """
    _at_least("runs", runs, 2)
    if not 0 < seconds < math.inf:
        raise RecipeError(f"seconds must be above 0 and finite, but got {seconds}")
    passes = [_timer(call, wait) for call in calls]
    return _rounds(passes, _repeats(passes, 2), seconds, runs)


def _timer(call: Callable[[], Any], wait: Callable[[], None]) -> Callable[[int], float]:
    """A function that makes `call` some times and returns seconds a call."""

    def run(repeats: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        wait()
        return (time.perf_counter() - start) / repeats

    return run
