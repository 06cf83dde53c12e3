"""Who does what where several processes do one run: the first decides and writes, all train, and an error reaches all.

What the first process sends has one form, a value or an error, so the others learn of an error wherever they wait. An
error on one process within a training is different: the others are in the middle of a step. It ends every process.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from vitrim.train import ranks
from vitrim.train.ranks import Elsewhere, LostError
from vitrim.words.errors import MethodError, RunError, VitrimError
from vitrim.words.plain import raised

__all__ = ["check_alike", "check_shared", "follow", "leading", "led", "together", "training"]

T = TypeVar("T")

_SHARED, _APART = "vitrim_shared", "vitrim_apart"
_alone = False


def led(make: Callable[[], T]) -> T:
    """Return on all processes what `make` returns on the first, which alone calls it; its error is raised on all.

    Raises:
        Elsewhere: on the others, if the first raised an error.
    """
    if ranks.count() == 1:
        return make()
    if not ranks.first():
        received: T = _received()
        return received
    with _telling():
        value = make()
    _send(value)
    return value


def together(make: Callable[[], T]) -> T:
    """Return what `make` returns; every process calls it, and if it fails on any, all raise an error.

    `make` must not wait for other processes.

    Raises:
        Elsewhere: where it failed on another process alone; that one raises its own.
    """
    if ranks.count() == 1:
        return make()
    value, mine = None, None
    try:
        value = make()
    except VitrimError as problem:
        mine = problem
    texts = [text for text in ranks.gathered(None if mine is None else str(mine)) if text is not None]
    if texts:
        raise _marked(Elsewhere(texts[0]) if mine is None else mine, _SHARED)
    return value  # type: ignore[return-value]


def check_alike(made_from: dict[str, str]) -> None:
    """Check that all processes have opened the same, by fingerprints.

    Raises:
        RunError: naming what differs from the first process's.
    """
    each = ranks.gathered(made_from) if ranks.count() > 1 else []
    for number, theirs in enumerate(each):
        for name, value in theirs.items():
            if each[0].get(name) != value:
                problem = RunError(
                    f"all processes must have the same {name}, but process {number} has another than the first; give "
                    "every machine the same files"
                )
                raise _marked(problem, _SHARED)


@contextlib.contextmanager
def leading() -> Iterator[Callable[[Any], None]]:
    """Do something on the first process; what is yielded sends an order to the others, which `follow`.

    If the block raises an error, the others raise it.
    """
    global _alone
    if ranks.count() == 1:
        yield lambda _: None
        return
    _alone = True

    def order(value: Any) -> None:
        global _alone
        _send((value,))
        _alone = False

    try:
        with _telling():
            yield order
    finally:
        _alone = False
    _send(None)


def follow(work: Callable[[Any], Any]) -> None:
    """Do what the first process orders, until it is done; raise its error.

    Args:
        work: called with each order.
    """
    mine: VitrimError | None = None
    while True:
        order = _received()
        if mine is not None:
            raise mine
        if order is None:
            return
        try:
            work(order[0])
        except VitrimError as problem:
            # The first process may have met the same error; if so, its word comes next.
            if getattr(problem, _APART, False):
                raise
            mine = problem


@contextlib.contextmanager
def training(what: str) -> Iterator[None]:
    """Hold the processes together while all of them train.

    Args:
        what: what is trained, for the error.

    Raises:
        LostError: another process ended, or did not answer in time.
        MethodError: the first process trains while the others do not.
    """
    if ranks.count() == 1:
        yield
        return
    if _alone:
        raise MethodError(
            f"{what}: a search that trains must be called on every process, but was called on the first alone; give "
            "its method `together = True`"
        )
    try:
        with ranks.losing():
            yield
    except BaseException as problem:
        problem.__dict__[_APART] = True
        raise


def check_shared(problem: BaseException) -> None:
    """Raise `problem` again unless all processes know of it, where one would otherwise go on with something else."""
    if ranks.count() > 1 and not getattr(problem, _SHARED, False):
        raise problem


def _marked(problem: VitrimError, how: str) -> VitrimError:
    problem.__dict__[how] = True
    return problem


def _send(value: Any) -> None:
    ranks.spread((value, None))


@contextlib.contextmanager
def _telling() -> Iterator[None]:
    """Send an error of the block to the others."""
    try:
        yield
    except BaseException as problem:
        if not isinstance(problem, LostError) and not getattr(problem, _APART, False):
            with contextlib.suppress(VitrimError):
                known = isinstance(problem, VitrimError)
                ranks.spread((None, str(problem) if known else f"the first process ended with {raised(problem)}"))
                problem.__dict__[_SHARED] = True
        raise


def _received() -> Any:
    value, text = ranks.spread(None)
    if text is not None:
        raise _marked(Elsewhere(text), _SHARED)
    return value
