"""SIGTERM as an exception, so that a run that is told to end leaves a checkpoint as ctrl-C does."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["STOPS", "Terminated", "raising_terminated", "stopped", "terminated"]


class Terminated(BaseException):
    """SIGTERM came. Like `KeyboardInterrupt`, this is no `Exception`, so that nobody swallows it."""


STOPS: dict[int, type[BaseException]] = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
"""Signals that end a run, and what they raise."""


_came: list[int] = []
"""Signals that `raising_terminated` has raised in this process."""


def terminated() -> bool:
    """Return whether SIGTERM came inside `raising_terminated`, also where a library has lost the exception.

    A signal may come while compiled code calls Python; some of it raises an error of its own then, without a cause.
    """
    return bool(_came)


def stopped(number: int) -> BaseException:
    """Return what to raise for a signal of `STOPS`."""
    return STOPS[number]()


@contextlib.contextmanager
def raising_terminated() -> Iterator[None]:
    """Raise `Terminated` where SIGTERM comes inside the block; does nothing outside the main thread.

    A process that is forked inside the block and did not set its own handler ends as it would without this.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        _came.append(number)
        raise Terminated

    _came.clear()
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
