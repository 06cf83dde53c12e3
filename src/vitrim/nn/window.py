"""Attention within windows of the grid, and the block that shifts them (Swin).

B images, R x C rows and columns of the grid (with padding: whole windows), W windows, A tokens of one window, D width,
H heads, K channels of a head.

Parameters have timm's names, so a dense block loads timm's weights without conversion.
"""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable

import torch
from timm.layers import resize_rel_pos_bias_table
from torch import Tensor, nn
from torch.nn import functional as F

from vitrim.nn.attention import Attention
from vitrim.nn.axis import Axis, Member
from vitrim.nn.block import Block
from vitrim.words.errors import DataError, SpecError
from vitrim.words.spec import NO_RATES, Form, Rates, Stage, Window
from vitrim.words.spec import Attention as AttentionSpec
from vitrim.words.spec import Block as BlockSpec

__all__ = ["WindowAttention", "WindowBlock"]

BLOCKED = -100.0
"""Added to the logit of a masked pair of tokens; the value of timm, with which the published weights were trained."""

_SMALL, _SMALL_GRID = 2**10, 2**14
"""Tokens of a window, and of a grid, up to which indices are computed on the CPU wherever the weights are."""

# Older versions of timm assume that the old window is square.
_TAKES_OLD_SIZE = "old_window_size" in inspect.signature(resize_rel_pos_bias_table).parameters


class WindowAttention(Attention):
    """Self-attention within windows, with a learned bias for each head and offset.

    Queries, keys and values are computed for the whole grid, so that the taps get ``(B, R C, channels)`` as in the
    other attention. They are sorted by windows just before the attention.

    Args:
        width: D.
        spec: head widths and scale; at least one head.
        form: biases and norms.
        rates: dropout.
        size: rows and columns of a window.
    """

    def __init__(
        self, width: int, spec: AttentionSpec, form: Form, rates: Rates = NO_RATES, *, size: tuple[int, int]
    ) -> None:
        super().__init__(width, spec, form, rates)
        self.window_size = size
        offsets = Window(size=size).offsets
        self.relative_position_bias_table = nn.Parameter(torch.zeros(offsets, len(spec.v)))
        index = _offsets(size).to(self.relative_position_bias_table.device)
        self.register_buffer("relative_position_index", index, persistent=False)

    def forward(self, x: Tensor, blocked: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Mix the tokens of each window.

        Args:
            x: normed tokens on a grid of whole windows, ``(B, R, C, D)``.
            blocked: boolean mask of the pairs that do not attend to each other, ``(W, A, A)``; None if all do.

        Returns:
            ``(B, R, C, D)``.
        """
        attend = functools.partial(self._in_windows, grid=(x.shape[1], x.shape[2]))
        return self._run(x.flatten(1, 2), self._bias(blocked), attend).view_as(x)

    def _table(self) -> Tensor:
        """Return the bias of each offset and head, ``(offsets, H)``."""
        return self.relative_position_bias_table

    def _bias(self, blocked: Tensor | None) -> Tensor:
        """Return the bias of the logits, ``(1, H, A, A)``, or ``(W, H, A, A)`` if windows differ."""
        bias = self._table()[self.relative_position_index].permute(2, 0, 1)
        return bias[None] if blocked is None else torch.where(blocked[:, None], bias + BLOCKED, bias)

    def _in_windows(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, grid: tuple[int, int]) -> Tensor:
        """Attend with heads of one width, ``(B, H, R C, K)``.

        If all windows have the same bias, they are part of the batch dimension, else of the head dimension. The mask is
        copied in neither case.
        """
        assert mask is not None
        (high, wide), heads = self.window_size, q.shape[1]
        rows, columns = grid[0] // high, grid[1] // wide
        split, area = (rows, high, columns, wide), high * wide
        lead = (-1, heads) if len(mask) == 1 else (q.shape[0], rows * columns * heads)
        mask = mask if len(mask) == 1 else mask.flatten(0, 1)[None]
        q, k, v = (
            torch.unflatten(t, 2, split).permute(0, 2, 4, 1, 3, 5, 6).reshape(*lead, area, t.shape[-1])
            for t in (q, k, v)
        )
        mixed = self._attend(q, k, v, mask.to(q.dtype))
        if torch.compiler.is_exporting():
            # Exporters decompose attention after tracing, and the result has other strides than that of the fused
            # kernel: if one window covers the whole grid, a view of the traced result is not valid for it.
            mixed = mixed.contiguous()
        mixed = mixed.reshape(-1, rows, columns, heads, high, wide, v.shape[-1]).permute(0, 1, 4, 2, 5, 3, 6)
        return mixed.reshape(mixed.shape[0], grid[0] * grid[1], heads, -1).transpose(1, 2)

    def axes(self) -> tuple[Axis, ...]:
        """Return the axes as in `Attention`; the column of biases of a head is cut together with the head."""
        qk, v = super().axes()
        column = Member(parameter="attn.relative_position_bias_table", dim=1, offset=0)
        return qk, dataclasses.replace(v, group_members=(column,))

    @torch.no_grad()
    def set_window_size(self, size: tuple[int, int]) -> None:
        """Change the window size; biases are interpolated as in timm."""
        if size == self.window_size:
            return
        shape = (Window(size=size).offsets, len(self.v))
        old = {"old_window_size": self.window_size} if _TAKES_OLD_SIZE else {}
        table = resize_rel_pos_bias_table(
            self.relative_position_bias_table, new_window_size=size, new_bias_shape=shape, **old
        )
        trained = self.relative_position_bias_table.requires_grad
        self.relative_position_bias_table = nn.Parameter(table, requires_grad=trained)
        self.window_size = size
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Compute the buffers that are not stored, on the device of the weights."""
        self.relative_position_index = _offsets(self.window_size).to(self.qkv.weight.device)


class WindowBlock(Block):
    """A block on a grid, ``(B, R, C, D)``, whose windows may be shifted against those of the block before.

    Args:
        stage: width, grid, window and form.
        spec: mixer, hidden neurons, drop path, and whether it is shifted.
        attention: function that builds the attention from D, the mixer, the form and the rates; a `WindowAttention`
            of the stage's windows if None.
    """

    blocked: Tensor | None

    def __init__(self, stage: Stage, spec: BlockSpec, attention: Callable[..., Attention] | None = None) -> None:
        if stage.window is None:
            raise SpecError("window: the stage of a block with windows must have one, but has none")
        super().__init__(stage, spec, attention=attention or functools.partial(WindowAttention, size=stage.window.size))
        self.register_buffer("blocked", None, persistent=False)
        self.window, self.grid = stage.window, stage.grid
        self.init_non_persistent_buffers()

    @property
    def shift(self) -> tuple[int, int]:
        """Rows and columns by which the windows are shifted."""
        return self.window.shift(self.grid) if self.spec.shifted else (0, 0)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Map ``(B, R, C, D)`` to ``(B, R, C, D)``."""
        if self.attn is not None:
            x = x + self.drop_path1(self.leaving1(self._mixed(self.enter1(x))))
        if self.mlp is not None:
            x = x + self.drop_path2(self.leaving2(self.mlp(self.enter2(x).flatten(1, 2)))).view_as(x)
        return x

    def unrolled(self, values: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return values in the order of the grid, ``(B, R, C, K)``.

        Args:
            values: shifted and padded as the windows are, ``(B, R, C, K)``.
            grid: rows and columns without padding.
        """
        return torch.roll(values[:, : grid[0], : grid[1]], self.shift, (1, 2))

    def _mixed(self, x: Tensor) -> Tensor:
        if not isinstance(self.attn, WindowAttention):
            assert self.attn is not None
            whole: Tensor = self.attn(x)  # a constant, or a convolution on the whole map, without windows
            return whole
        grid, (down, right) = (x.shape[1], x.shape[2]), self.shift
        if grid != self.grid and not self.window.dynamic:
            raise DataError(
                f"the grid of patches must be {self.grid}, but is {grid}; resize the images, call set_input_size, or "
                "build the model with strict_img_size=False"
            )
        shifted = down > 0 or right > 0
        if shifted:
            x = torch.roll(x, (-down, -right), (1, 2))
        rows, columns = self.window.padded(grid)
        if (rows, columns) != grid:
            # Padding is zero after the norm, so the keys and values of padded tokens are the biases, as in training.
            x = F.pad(x, (0, 0, 0, columns - grid[1], 0, rows - grid[0]))
        blocked = self._blocked(grid, x.device) if self.window.dynamic else self.blocked
        mixed: Tensor = self.attn(x, blocked)
        return self.unrolled(mixed, grid) if shifted else mixed[:, : grid[0], : grid[1]]

    def _blocked(self, grid: tuple[int, int], device: torch.device) -> Tensor | None:
        if not any(self.shift):
            return None
        return _blocked_pairs(self.window.padded(grid), self.window.size, self.shift, device)

    def set_input_size(
        self, feat_size: tuple[int, int], window_size: tuple[int, int], always_partition: bool | None = None
    ) -> None:
        """Change grid and window; called by the `set_input_size` of timm's model.

        Args:
            feat_size: R and C.
            window_size: rows and columns of a window, if the grid has as many.
            always_partition: whether windows keep their size even if the grid is smaller; None leaves it unchanged.
        """
        always = self.window.always if always_partition is None else always_partition
        high, wide = window_size if isinstance(window_size, tuple | list) else (window_size, window_size)
        size = (high, wide) if always else (min(high, feat_size[0]), min(wide, feat_size[1]))
        self.window = Window(size=size, always=always, dynamic=self.window.dynamic)
        self.grid = (feat_size[0], feat_size[1])
        if isinstance(self.attn, WindowAttention):
            self.attn.set_window_size(size)
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Compute the buffers that are not stored, on the device of the weights."""
        if isinstance(self.attn, WindowAttention):
            device = self.attn.qkv.weight.device
            place = torch.device("cpu") if math.prod(self.grid) <= _SMALL_GRID else device
            blocked = None if self.window.dynamic else self._blocked(self.grid, place)
            self.blocked = None if blocked is None else blocked.to(device)


def _offsets(size: tuple[int, int]) -> Tensor:
    """Return the row of the table of biases for each pair of tokens of a window, ``(A, A)``, by the pair's offset.

    It is computed on the CPU: each operation on the meta device, where blocks are made, takes 30 times as long. Windows
    that a file says are large take no memory there.
    """
    device = torch.device("cpu") if math.prod(size) <= _SMALL else None
    high, wide = (torch.arange(n, device=device) for n in size)
    rows, columns = high[:, None] - high[None, :] + size[0] - 1, wide[:, None] - wide[None, :] + size[1] - 1
    pairs = rows[:, None, :, None] * (2 * size[1] - 1) + columns[None, :, None, :]
    return pairs.reshape(size[0] * size[1], -1)


def _blocked_pairs(
    grid: tuple[int, int], size: tuple[int, int], shift: tuple[int, int], device: torch.device
) -> Tensor:
    """Return a mask of the pairs of a window that were not neighbors before the grid was rolled, ``(W, A, A)``."""
    labels = []
    for length, window, off in zip(grid, size, shift, strict=True):
        place = torch.arange(length, device=device)
        parts = (place >= length - window).long() + (place >= length - off).long()
        labels.append(parts if off else torch.zeros_like(parts))
    regions = labels[0][:, None] * 3 + labels[1][None, :]
    windows = regions.reshape(grid[0] // size[0], size[0], grid[1] // size[1], size[1]).transpose(1, 2)
    windows = windows.reshape(-1, size[0] * size[1])
    return windows[:, :, None] != windows[:, None, :]
