"""The one tolerance table is `vitrim.testing.tolerance`."""

from vitrim.testing.tolerance import EXACT, SINGLE

__all__ = ["EXACT", "SINGLE"]
