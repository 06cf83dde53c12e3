"""Progress bars for whatever takes longer than a second; rich is loaded only when one is shown."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

__all__ = ["counted", "progress"]

T = TypeVar("T")


def counted(items: Iterable[T], advance: Callable[[float], None]) -> Iterator[T]:
    """Give `items`, and move a bar on by one step after each.

    Args:
        items: what is worked through.
        advance: what `progress` gives.
    """
    for item in items:
        yield item
        advance(1)


@contextlib.contextmanager
def progress(title: str, total: float, show: bool = True, refresh: bool = True) -> Iterator[Callable[[float], None]]:
    """Show a transient bar on the error stream; nothing unless that is a terminal.

    Args:
        title: what goes on.
        total: steps until the end.
        show: whether to show it at all; only one of several processes should.
        refresh: whether a thread redraws the bar; without one it is redrawn by the steps alone, so that it does not run
            while something is timed.

    Yields:
        A function that moves the bar on by a number of steps.
    """
    if not (show and sys.stderr.isatty()):
        yield lambda _steps: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, auto_refresh=refresh) as bar:
        task = bar.add_task(title, total=total)

        def advance(steps: float) -> None:
            bar.update(task, advance=steps, refresh=not refresh)

        yield advance
