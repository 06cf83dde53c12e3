"""Shorten messages: names in them come from files and arguments, which may hold a megabyte."""

__all__ = ["LONGEST", "shortened"]

LONGEST = 2000
"""Characters of a message."""


def shortened(text: str) -> str:
    """Return a text of at most `LONGEST` characters, without its middle if it is longer."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 300]} ... {text[-290:]}"
