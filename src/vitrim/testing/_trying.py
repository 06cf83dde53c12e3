"""Try laws on a case, and collect what does not hold."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

__all__ = ["Broken", "broken", "report"]

T = TypeVar("T")

Broken = list[tuple[str, Exception | None]]


def broken(laws: Iterable[Callable[[T], Iterator[str]]], case: T, at: str) -> Broken:
    """Return a sentence for whatever does not hold for `case`, with the exception where a law could not be tried.

    Args:
        laws: each gives sentences for a case.
        case: what they are tried on.
        at: what the case is called.
    """
    found: Broken = []
    for law in laws:
        try:
            found += [(f"{law.__name__}, {at}: {sentence}", None) for sentence in law(case)]
        # The code that is tried is another author's, and may raise anything.
        except Exception as problem:
            found.append((f"{law.__name__}, {at}: raises {type(problem).__name__}: {problem}", problem))
    return found


def report(found: Broken) -> None:
    """Raise an `AssertionError` with every sentence, from the first exception, if there is any."""
    if found:
        cause = next((problem for _, problem in found if problem is not None), None)
        raise AssertionError("\n".join(sentence for sentence, _ in found)) from cause
