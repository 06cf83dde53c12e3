"""Libraries that remark on what they do, silenced while they do it."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

__all__ = ["quiet"]


@contextlib.contextmanager
def quiet(*loggers: str, prints: bool = True) -> Iterator[None]:
    """Without warnings, and without what these loggers say below an error: none of it a user can act on.

    Args:
        loggers: their names; the root logger's is empty.
        prints: whether what is printed is shown.
    """
    chosen = [logging.getLogger(name) for name in loggers]
    levels = [logger.level for logger in chosen]
    out = contextlib.nullcontext() if prints else contextlib.redirect_stdout(io.StringIO())
    try:
        for logger in chosen:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), out:
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(chosen, levels, strict=True):
            logger.setLevel(level)
