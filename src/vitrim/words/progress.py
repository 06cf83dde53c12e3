"""Show how far long work is, on the error stream.

On a terminal and in a notebook it is a bar. Elsewhere (a file, a batch system) a line is printed once a minute, with
steps, loss and the time left. rich and IPython are imported only if a bar is shown.
"""

import contextlib
import importlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from html import escape
from typing import Any, Protocol, TypeVar

from vitrim.words.launched import first

__all__ = ["Work", "counted", "progress", "quiet", "tell"]

T = TypeVar("T")

EVERY = 60.0
"""Seconds between two lines where there is no bar."""

_DRAWN = 0.5
"""Least seconds between two states of a bar in a notebook."""


class Work:
    """A piece of work and how far it is; calling it advances it.

    Attributes:
        title: name of the work.
        total: number of steps; 0 if unknown.
        done: number of steps that are done.
        figures: numbers to show with it, such as the loss.
        refresh: whether a thread may run while it is done.
    """

    def __init__(self, title: str, total: float, refresh: bool = True) -> None:
        self.title, self.total, self.refresh = title, total, refresh
        self.done = 0.0
        self.figures: dict[str, float] = {}
        self.begun, self.first = time.perf_counter(), 0.0

    def __call__(self, steps: float, **figures: float) -> None:
        """Advance by a number of steps, and set numbers to show."""
        self.done += steps
        self.figures |= figures
        if _view is not None and self in _open:
            _view.moved(self)

    def resume(self, steps: float) -> None:
        """Set the number of steps that an earlier process has done, so that the time left is not underestimated."""
        self.begun, self.first, self.done = time.perf_counter(), steps, steps

    @property
    def left(self) -> float | None:
        """Estimate of the seconds left, or None if unknown."""
        new = self.done - self.first
        if not self.total or new <= 0:
            return None
        return max(0.0, (time.perf_counter() - self.begun) / new * (self.total - self.done))

    def line(self) -> str:
        """Return the state in words: ``train 120 of 2,400 (5 %), loss 1.234, 14 min left``."""
        share = f" of {self.total:,.0f} ({100 * self.done / self.total:.0f} %)" if self.total else ""
        parts = [f"{self.title} {self.done:,.0f}{share}", *self.told()]
        left = self.left
        return ", ".join(parts if left is None else [*parts, f"{spoken(left)} left"])

    def told(self) -> list[str]:
        """Return the numbers to show, as text."""
        return [f"{name} {value:.4g}" for name, value in self.figures.items()]


def spoken(seconds: float) -> str:
    """Return a duration in words: ``40 s``, ``14 min``, ``3 h 20 min``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


class _View(Protocol):
    """Shows the work that is open."""

    def added(self, work: Work) -> None: ...
    def moved(self, work: Work) -> None: ...
    def removed(self, work: Work) -> None: ...
    def close(self) -> None: ...


_open: list[Work] = []
_view: _View | None = None
_hidden = 0


def counted(items: Iterable[T], advance: Callable[[float], None]) -> Iterator[T]:
    """Yield `items`, and advance a piece of work by one step after each.

    Args:
        items: the items to process.
        advance: what `progress` yields.
    """
    for item in items:
        yield item
        advance(1)


@contextlib.contextmanager
def progress(title: str, total: float, show: bool = True, refresh: bool = True) -> Iterator[Work]:
    """Show a piece of work inside the context; pieces may be nested.

    Args:
        title: name of the work.
        total: number of steps; 0 if unknown.
        show: whether to show it; only one of several processes should. Of processes that a launcher started, only the
            first one does.
        refresh: whether a thread redraws the bar or prints the lines. If false, only the steps do, so that no thread
            runs while something is timed.

    Yields:
        The work; call it to advance it.
    """
    global _view
    work = Work(title, total, refresh)
    if not show or _hidden or threading.current_thread() is not threading.main_thread():
        yield work
        return
    if _view is None:
        _view = _new_view(refresh)
    _open.append(work)
    _view.added(work)
    try:
        yield work
    finally:
        _open.remove(work)
        _view.removed(work)
        if not _open:
            _view.close()
            _view = None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Show and tell nothing inside the context."""
    global _hidden
    _hidden += 1
    try:
        yield
    finally:
        _hidden -= 1


def tell(text: str) -> None:
    """Print a line, such as the beginning of a stage."""
    if not _hidden and first():
        # Error output of a notebook is colored like an error.
        print(text, file=sys.stdout if _notebook() else sys.stderr, flush=True)


def _notebook() -> bool:
    """Return whether this is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and hasattr(shell, "kernel")


def _new_view(refresh: bool) -> _View:
    if not first():
        return _Nothing()
    if _notebook():
        return _Notebook()
    return _Terminal(refresh) if sys.stderr.isatty() else _Lines()


class _Nothing:
    def added(self, work: Work) -> None: ...
    def moved(self, work: Work) -> None: ...
    def removed(self, work: Work) -> None: ...
    def close(self) -> None: ...


class _Terminal:
    """Bars that vanish when the work is done, one below the other."""

    def __init__(self, refresh: bool) -> None:
        from rich import progress as bars
        from rich.console import Console

        self.bar = bars.Progress(
            *(bars.TextColumn("{task.description}"), bars.BarColumn(), bars.TaskProgressColumn()),
            *(bars.TextColumn("{task.fields[told]}"), bars.TimeRemainingColumn()),
            console=Console(stderr=True),
            transient=True,
            auto_refresh=refresh,
        )
        self.bar.start()
        self.tasks: dict[Work, Any] = {}

    def added(self, work: Work) -> None:
        self.tasks[work] = self.bar.add_task(escape_markup(work.title), total=work.total or None, told="")

    def moved(self, work: Work) -> None:
        told = ", ".join(work.told())
        total = work.total or None
        self.bar.update(self.tasks[work], completed=work.done, total=total, told=told, refresh=not work.refresh)

    def removed(self, work: Work) -> None:
        self.bar.remove_task(self.tasks.pop(work))

    def close(self) -> None:
        self.bar.stop()


def escape_markup(text: str) -> str:
    """Return text that rich does not read as markup."""
    return text.replace("[", r"\[")


class _Notebook:
    """Bars as HTML, which need no package but IPython; they vanish when the work is done."""

    def __init__(self) -> None:
        self.module: Any = importlib.import_module("IPython.display")
        self.handles: dict[Work, Any] = {}
        self.drawn: dict[Work, float] = {}

    def added(self, work: Work) -> None:
        self.handles[work] = self.module.display(self.module.HTML(_html(work)), display_id=True)
        self.drawn[work] = time.perf_counter()

    def moved(self, work: Work) -> None:
        now = time.perf_counter()
        if now - self.drawn[work] >= _DRAWN:
            self.drawn[work] = now
            self.handles[work].update(self.module.HTML(_html(work)))

    def removed(self, work: Work) -> None:
        self.handles.pop(work).update(self.module.HTML(""))

    def close(self) -> None: ...


def _html(work: Work) -> str:
    share = f' value="{work.done:g}" max="{work.total:g}"' if work.total else ""
    return f"<progress{share}></progress> {escape(work.line())}"


class _Lines:
    """A line each minute, by a thread that sleeps otherwise; by the steps themselves where no thread may run."""

    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.ended = threading.Event()
        self.thread: threading.Thread | None = None

    def added(self, work: Work) -> None:
        if self.thread is None and work.refresh:
            self.thread = threading.Thread(target=self._beat, name="vitrim-progress", daemon=True)
            self.thread.start()

    def moved(self, work: Work) -> None:
        if self.thread is None and time.perf_counter() - self.last >= EVERY:
            self._print()

    def removed(self, work: Work) -> None: ...

    def close(self) -> None:
        self.ended.set()
        if self.thread is not None:
            self.thread.join()

    def _beat(self) -> None:
        while not self.ended.wait(EVERY):
            self._print()

    def _print(self) -> None:
        self.last = time.perf_counter()
        lines = [work.line() for work in list(_open)]
        if lines:
            print("; ".join(lines), file=sys.stderr, flush=True)
