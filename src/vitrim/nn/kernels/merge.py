"""Merge similar patches in two launches: match; choose and merge.

B images, N tokens, P prefix tokens, A patches of the first set and E of the second (they alternate), r patches that are
merged, Q channels by which patches are compared, D width.

The reference is `vitrim.nn.steps.merge.Merged`, in PyTorch's operators: the same pairs, ties included (of equal scores
the lower index comes first), the same sums in float32. Only the order of floating-point additions differs. There is no
backward pass.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["TYPES", "merged"]

TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types of tokens that the kernels take; float64 has no fast product on most cards."""

_ROWS, _COLUMNS, _CHUNK = 32, 32, 64
"""Patches of both sets, and channels, that one step of the matching holds."""

_LEAST = 16
"""The smallest side of a tile of the matrix units."""

_TOKENS, _SHARE = 16, 16
"""Tokens that one program of the merging writes, at least; and the most programs for as many patches of the first set:
each of them chooses the pairs anew, in time that grows with the square of the patches.
"""


@triton.jit
def _match(
    keys,
    sizes,
    best,
    partner,
    first,
    second,
    channels,
    image_stride,
    token_stride,
    size_stride,
    WEIGHTED: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Find, for each patch of the first set, the closest one of the second and their score.

    The score is the cosine or, if `WEIGHTED`, the negative distance of `vitrim.words.steps.merge.Merge`; `sizes` are
    those of the patches.
    """
    image = tl.program_id(0).to(tl.int64)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    keys += image * image_stride
    sizes += image * size_stride
    if WEIGHTED:
        mine = tl.load(sizes + 2 * rows, mask=rows < first, other=1.0)[:, None]
    most = tl.full((ROWS,), float("-inf"), tl.float32)
    chosen = tl.zeros((ROWS,), tl.int32)
    for start in range(0, second, COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        products = tl.zeros((ROWS, COLUMNS), tl.float32)
        lengths = tl.zeros((ROWS,), tl.float32)
        others = tl.zeros((COLUMNS,), tl.float32)
        for offset in range(0, channels, CHUNK):
            inner = offset + tl.arange(0, CHUNK)
            a = tl.load(
                keys + (2 * rows)[:, None] * token_stride + inner[None, :],
                mask=(rows < first)[:, None] & (inner < channels)[None, :],
                other=0.0,
            )
            b = tl.load(
                keys + (2 * columns + 1)[:, None] * token_stride + inner[None, :],
                mask=(columns < second)[:, None] & (inner < channels)[None, :],
                other=0.0,
            )
            wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
            lengths += tl.sum(wide_a * wide_a, axis=1)
            others += tl.sum(wide_b * wide_b, axis=1)
            if WIDE:
                products = tl.dot(wide_a, tl.trans(wide_b), products, input_precision="ieee")
            else:
                products = tl.dot(a, tl.trans(b), products)
        lengths = tl.maximum(tl.sqrt(lengths), 1e-12)
        others = tl.maximum(tl.sqrt(others), 1e-12)
        alike = products / (lengths[:, None] * others[None, :])
        if WEIGHTED:
            theirs = tl.load(sizes + 2 * columns + 1, mask=columns < second, other=1.0)[None, :]
            alike = (alike - 1.0) * tl.sqrt(mine * theirs / (mine + theirs))
        alike = tl.where((columns < second)[None, :], alike, float("-inf"))
        here = tl.max(alike, axis=1)
        at = tl.min(tl.where(alike == here[:, None], columns[None, :], second), axis=1)
        chosen = tl.where(here > most, at, chosen)
        most = tl.maximum(most, here)
    # A score that is not a number would be in no order with the others.
    most = tl.where(most == most, most, float("-inf"))
    tl.store(best + image * first + rows, most, mask=rows < first)
    tl.store(partner + image * first + rows, chosen, mask=rows < first)


@triton.jit
def _merge(
    x,
    sizes,
    best,
    partner,
    out,
    counts,
    tokens,
    prefix,
    first,
    count,
    width,
    left,
    SIZED: tl.constexpr,
    NORMED: tl.constexpr,
    SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """Choose the `count` pairs with the largest scores; write `TOKENS` of the tokens that are left, and their sizes.

    A token is the mean of its patches, weighted by their sizes. If `NORMED`, it is scaled to the weighted mean of their
    norms. All programs of an image choose alike, so that choosing needs no launch of its own.
    """
    image, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x += image * tokens * width
    sizes += image * tokens
    best += image * first
    partner += image * first
    places = tl.arange(0, SIZE)
    known = places < first
    mine = tl.load(best + places, mask=known, other=float("-inf"))
    rank = tl.zeros((SIZE,), tl.int32)
    for start in range(0, first, CHUNK):
        others = start + tl.arange(0, CHUNK)
        theirs = tl.load(best + others, mask=others < first, other=float("-inf"))
        before = (theirs[None, :] > mine[:, None]) | (
            (theirs[None, :] == mine[:, None]) & (others[None, :] < places[:, None])
        )
        rank += tl.sum((before & (others < first)[None, :]).to(tl.int32), axis=1)
    stays = (rank >= count) & known
    # Where a patch that stays comes among those that do, and to which patch of the second set another one goes.
    position = tl.where(stays, tl.cumsum(stays.to(tl.int32), axis=0) - 1, -1)
    pairs = tl.where(stays, -1, tl.load(partner + places, mask=known, other=-1))
    stay = first - count
    channels = tl.arange(0, WIDTH)
    inside = channels < width
    for token in range(block * TOKENS, tl.minimum(block * TOKENS + TOKENS, left)):
        moved = token - prefix
        here = token
        if moved >= 0:
            if moved < stay:
                here = prefix + 2 * tl.sum(tl.where(position == moved, places, 0), axis=0)
            else:
                here = prefix + 2 * (moved - stay) + 1
        total = tl.full((), 1.0, tl.float32)
        if SIZED:
            total = tl.load(sizes + here)
        value = tl.load(x + here * width + channels, mask=inside, other=0.0)
        if moved >= stay:
            waiting = tl.where(pairs == moved - stay, places, SIZE)
            member = tl.min(waiting, axis=0)
            if member < SIZE:
                heavy = value.to(tl.float32) * total
                norms = tl.full((), 0.0, tl.float32)
                if NORMED:
                    norms = tl.sqrt(tl.sum(heavy * heavy, axis=0))
                while member < SIZE:
                    at = prefix + 2 * member
                    weight = tl.full((), 1.0, tl.float32)
                    if SIZED:
                        weight = tl.load(sizes + at)
                    more = tl.load(x + at * width + channels, mask=inside, other=0.0).to(tl.float32) * weight
                    heavy += more
                    if NORMED:
                        norms += tl.sqrt(tl.sum(more * more, axis=0))
                    total += weight
                    waiting = tl.where(waiting == member, SIZE, waiting)
                    member = tl.min(waiting, axis=0)
                mean = heavy / total
                if NORMED:
                    mean *= norms / tl.maximum(tl.sqrt(tl.sum(heavy * heavy, axis=0)), 1e-12)
                value = mean.to(value.dtype)
        tl.store(out + (image * left + token) * width + channels, value, mask=inside)
        tl.store(counts + image * left + token, total)


def merged(
    x: Tensor,
    alike: Tensor,
    sizes: Tensor | None,
    prefix: int,
    count: int,
    weighted: bool = False,
    keeps_norm: bool = False,
) -> tuple[Tensor, Tensor]:
    """Merge `count` patches of each image into similar ones.

    Args:
        x: tokens, ``(B, N, D)``, of one of `TYPES`.
        alike: features by which patches are compared, ``(B, N - P, Q)``, of one of `TYPES`.
        sizes: number of patches of each token, ``(B, N, 1)`` in float32; None if each is one.
        prefix: P.
        count: r, at most half of the patches.
        weighted: whether distances are weighted by sizes, see `vitrim.words.steps.merge.Merge`.
        keeps_norm: whether means are scaled to the mean of the norms.

    Returns:
        The tokens that are left, ``(B, N - r, D)``, and their sizes, ``(B, N - r, 1)`` in float32.
    """
    images, tokens, width = x.shape
    first, second = (tokens - prefix + 1) // 2, (tokens - prefix) // 2
    left = tokens - count
    x = x.contiguous()
    alike = alike if alike.stride(-1) == 1 else alike.contiguous()
    best = x.new_empty((images, first), dtype=torch.float32)
    partner = x.new_empty((images, first), dtype=torch.int32)
    out, counts = x.new_empty((images, left, width)), x.new_empty((images, left, 1), dtype=torch.float32)
    known: Any = x if sizes is None else sizes.contiguous()
    size = max(triton.next_power_of_2(first), _LEAST)
    launch: Any = _match[(images, triton.cdiv(first, _ROWS))]
    launch(
        alike,
        known if sizes is None else known[:, prefix:],
        best,
        partner,
        first,
        second,
        alike.shape[2],
        alike.stride(0),
        alike.stride(1),
        tokens,
        WEIGHTED=weighted and sizes is not None,
        WIDE=alike.dtype == torch.float32 or not alike.is_cuda,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        CHUNK=_CHUNK,
    )
    each = max(_TOKENS, size // _SHARE)
    launch = _merge[(images, triton.cdiv(left, each))]
    launch(
        x,
        known,
        best,
        partner,
        out,
        counts,
        tokens,
        prefix,
        first,
        count,
        width,
        left,
        SIZED=sizes is not None,
        NORMED=keeps_norm,
        SIZE=size,
        CHUNK=_LEAST,
        WIDTH=triton.next_power_of_2(width),
        TOKENS=each,
    )
    return out, counts
