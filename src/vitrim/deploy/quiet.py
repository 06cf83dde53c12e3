"""Silence the warnings and log messages of libraries."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

__all__ = ["quiet"]


@contextlib.contextmanager
def quiet(*loggers: str, prints: bool = True) -> Iterator[None]:
    """Suppress warnings, and these loggers' messages below errors, because a user cannot act on them.

    Levels and handlers of these loggers are as before afterwards: some libraries set up the root logger when they are
    imported.

    Args:
        loggers: names of loggers; the root logger's is empty.
        prints: whether text printed by the library is shown.
    """
    chosen = [logging.getLogger(name) for name in loggers]
    before = [(logger.level, list(logger.handlers)) for logger in chosen]
    out = contextlib.nullcontext() if prints else contextlib.redirect_stdout(io.StringIO())
    try:
        for logger in chosen:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), out:
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, (level, handlers) in zip(chosen, before, strict=True):
            logger.setLevel(level)
            logger.handlers[:] = handlers
