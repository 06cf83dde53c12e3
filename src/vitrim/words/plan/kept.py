"""Kept indices of a plan, and the channels of the residual stream that it keeps."""

from vitrim.words.errors import PlanError
from vitrim.words.spec import Host

__all__ = ["Kept", "check_kept", "composed", "narrowed"]

Kept = tuple[int, ...]
"""Indices into the parent, from 0, increasing."""


def check_kept(indices: Kept, size: int, at: str) -> None:
    """Raise if `indices` are not strictly increasing within ``[0, size)``.

    Raises:
        PlanError: if so; the message names the path and the indices.
    """
    previous = -1
    for index in indices:
        if not previous < index < size:
            shown = indices if len(indices) <= 8 else (*indices[:8], "...")
            raise PlanError(f"{at}: kept indices must rise within [0, {size}), but got {shown}")
        previous = index


def narrowed(kept: Kept | None, width: int, host: Host, at: str) -> int:
    """Return the width of a child's stage that keeps channels of a parent's stage of `width` channels.

    Raises:
        PlanError: if the kept channels are not valid, or the width of the model cannot be cut.
    """
    if kept is None:
        return width
    if not host.channels:
        raise PlanError(
            f"{at}: the residual width can be cut only where everything outside the blocks can follow, but in this "
            "model something cannot (attention pooling without weights, a stem of another kind, a family that does not "
            "say how); cut heads and neurons, or describe the model again"
        )
    check_kept(kept, width, at)
    if not kept:
        raise PlanError(f"{at}: at least one channel of the residual stream must be kept, but none is")
    return len(kept)


def composed(first: Kept | None, later: Kept | None, at: str) -> Kept | None:
    """Return the kept channels of one plan followed by another; None keeps all."""
    if first is None or later is None:
        return later if first is None else first
    check_kept(later, len(first), at)
    return tuple(first[i] for i in later)
