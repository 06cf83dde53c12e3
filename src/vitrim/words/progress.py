"""Progress bars for work that takes longer than a second; rich is imported only if a bar is shown."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

__all__ = ["counted", "progress"]

T = TypeVar("T")


def counted(items: Iterable[T], advance: Callable[[float], None]) -> Iterator[T]:
    """Yield `items`, and advance a progress bar by one step after each.

    Args:
        items: the items to process.
        advance: the function that `progress` yields.
    """
    for item in items:
        yield item
        advance(1)


@contextlib.contextmanager
def progress(title: str, total: float, show: bool = True, refresh: bool = True) -> Iterator[Callable[[float], None]]:
    """Show a transient bar on the error stream; show nothing if that is not a terminal.

    Args:
        title: name of the work, shown next to the bar.
        total: number of steps.
        show: whether to show the bar; only one of several processes should.
        refresh: whether a thread redraws the bar. If false, only the steps redraw it, so that no thread runs while
            something is timed.

    Yields:
        A function that advances the bar by a number of steps.
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
