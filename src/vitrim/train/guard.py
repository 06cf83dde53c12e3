"""Context managers for training: delayed ctrl-C and SIGTERM, and temporary stochastic depth."""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

from timm.layers import DropPath
from torch import nn

from vitrim.words import launched
from vitrim.words.errors import RecipeError
from vitrim.words.stopping import STOPS, stopped

__all__ = ["Interrupts", "drop_path"]


_ECHO = 10.0
"""Seconds within which processes of a launcher take a second signal for the first."""


class Interrupts:
    """Delays ctrl-C and SIGTERM until the current step is complete; a second one raises at once.

    Outside the main thread, where Python does not allow signal handlers, it does nothing.

    Attributes:
        came: the signal that came, or 0.
    """

    def __init__(self) -> None:
        self.came = 0
        self._when = 0.0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._note) for number in STOPS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, old in self._old.items():
            signal.signal(number, old)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # A launcher sends on what a terminal has sent to all its processes: that is one signal.
        if self.came and (launched.count() == 1 or time.monotonic() - self._when > _ECHO):
            raise stopped(number)
        if not self.came:
            self.came, self._when = number, time.monotonic()


@contextlib.contextmanager
def drop_path(model: nn.Module, rate: float | None) -> Iterator[None]:
    """Set the stochastic depth of a timm model inside a `with` block.

    timm uses an `Identity` for a rate of 0, so these modules are replaced, and restored at the end.

    Args:
        model: a model with `blocks` (also in a model inside it) that have children named `drop_path*`.
        rate: drop rate of the last block, in `[0, 1)`; it rises linearly from 0 at the first. None changes nothing.

    Raises:
        RecipeError: the model has no such children.
    """
    if rate is None:
        yield
        return
    places = _places(model)
    if not places:
        raise RecipeError("train.drop_path must have blocks with a drop path, but this model has none; leave it out")
    old = [(block, name, module) for _, block, name, module in places]
    last = max(1, max(depth for depth, *_ in places))
    for depth, block, name, _ in places:
        setattr(block, name, DropPath(rate * depth / last).train(block.training))
    try:
        yield
    finally:
        for block, name, module in old:
            module.train(block.training)
            setattr(block, name, module)


def _places(model: nn.Module) -> list[tuple[int, nn.Module, str, nn.Module]]:
    lists = [module for path, module in model.named_modules() if path.rpartition(".")[2] == "blocks"]
    blocks = [block for each in lists for block in each.children()]
    found = []
    for depth, block in enumerate(blocks):
        for place in block.modules():
            for name, child in place.named_children():
                if name.startswith("drop_path") and isinstance(child, DropPath | nn.Identity):
                    found.append((depth, place, name, child))
    return found
