"""Attention within windows of the grid, and the block that shifts them (Swin).

B images, R x C rows and columns of the grid (with padding: whole windows), W windows, A tokens of one window, D width,
H heads, K channels of a head.

Parameters carry timm's names, so a dense block loads timm's weights as they are.
"""

import dataclasses
import functools
import inspect

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
"""Added to the logit of a pair that does not meet; timm's, and the published weights', value."""

# Older versions of timm take the old window to be square.
_TAKES_OLD_SIZE = "old_window_size" in inspect.signature(resize_rel_pos_bias_table).parameters


class WindowAttention(Attention):
    """Self-attention whose tokens meet within their window, with a learned bias for each head and offset.

    Queries, keys and values are made of the whole grid, so that taps see ``(B, R C, channels)`` as everywhere; each is
    put in order of windows just before they meet.

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
        self.register_buffer("relative_position_index", _offsets(size), persistent=False)

    def forward(self, x: Tensor, blocked: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Mix the tokens of each window.

        Args:
            x: normed tokens on a grid of whole windows, ``(B, R, C, D)``.
            blocked: pairs that do not meet, ``(W, A, A)``, or None if all do.

        Returns:
            ``(B, R, C, D)``.
        """
        attend = functools.partial(self._in_windows, grid=(x.shape[1], x.shape[2]))
        return self._run(x.flatten(1, 2), self._bias(blocked), attend).view_as(x)

    def _bias(self, blocked: Tensor | None) -> Tensor:
        """Logits to add, ``(1, H, A, A)``, or ``(W, H, A, A)`` where windows differ."""
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        return bias[None] if blocked is None else torch.where(blocked[:, None], bias + BLOCKED, bias)

    def _in_windows(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, grid: tuple[int, int]) -> Tensor:
        """Attend with heads of one width, ``(B, H, R C, K)``.

        Windows join the images where all add one bias, and the heads where each adds its own: neither repeats a mask.
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
            # Exporters take attention apart after it was traced, and its parts lie in memory otherwise than the fused
            # kernel's answer: where one window is all of the grid, what was a view of that is none of theirs.
            mixed = mixed.contiguous()
        mixed = mixed.reshape(-1, rows, columns, heads, high, wide, v.shape[-1]).permute(0, 1, 4, 2, 5, 3, 6)
        return mixed.reshape(mixed.shape[0], grid[0] * grid[1], heads, -1).transpose(1, 2)

    def axes(self) -> tuple[Axis, ...]:
        """As in `Attention`; a head takes its column of biases along."""
        qk, v = super().axes()
        column = Member(parameter="attn.relative_position_bias_table", dim=1, offset=0)
        return qk, dataclasses.replace(v, group_members=(column,))

    @torch.no_grad()
    def set_window_size(self, size: tuple[int, int]) -> None:
        """Change the window; biases are interpolated as timm does."""
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
        """Compute what is not stored, on the device of the weights."""
        self.relative_position_index = _offsets(self.window_size).to(self.qkv.weight.device)


class WindowBlock(Block):
    """A block on a grid, ``(B, R, C, D)``, whose windows may lie across those of the block before.

    Args:
        stage: width, grid, window and form.
        spec: mixer, hidden neurons, drop path, and whether it is shifted.
    """

    blocked: Tensor | None

    def __init__(self, stage: Stage, spec: BlockSpec) -> None:
        if stage.window is None:
            raise SpecError("window: the stage of a block with windows must have one, but has none")
        size = stage.window.size
        super().__init__(stage, spec, attention=functools.partial(WindowAttention, size=size))
        self.register_buffer("blocked", None, persistent=False)
        self.window, self.grid = stage.window, stage.grid
        self.init_non_persistent_buffers()

    @property
    def shift(self) -> tuple[int, int]:
        """Rows and columns that the windows lie off."""
        return self.window.shift(self.grid) if self.spec.shifted else (0, 0)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Map ``(B, R, C, D)`` to ``(B, R, C, D)``."""
        if self.attn is not None:
            x = x + self.drop_path1(self.ls1(self._mixed(self.norm1(x))))
        if self.mlp is not None:
            x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x).flatten(1, 2)))).view_as(x)
        return x

    def _mixed(self, x: Tensor) -> Tensor:
        if not isinstance(self.attn, WindowAttention):
            assert self.attn is not None
            whole: Tensor = self.attn(x)  # a constant, or a convolution on the map as it lies, without windows
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
            # Zeros after the norm: padded tokens answer with the biases of their keys and values, as they were trained.
            x = F.pad(x, (0, 0, 0, columns - grid[1], 0, rows - grid[0]))
        blocked = self._blocked(grid, x.device) if self.window.dynamic else self.blocked
        mixed: Tensor = self.attn(x, blocked)[:, : grid[0], : grid[1]]
        return torch.roll(mixed, (down, right), (1, 2)) if shifted else mixed

    def _blocked(self, grid: tuple[int, int], device: torch.device) -> Tensor | None:
        if not any(self.shift):
            return None
        return _blocked_pairs(self.window.padded(grid), self.window.size, self.shift, device)

    def set_input_size(
        self, feat_size: tuple[int, int], window_size: tuple[int, int], always_partition: bool | None = None
    ) -> None:
        """Change grid and window; called by timm's model when its own `set_input_size` is.

        Args:
            feat_size: R and C.
            window_size: rows and columns of a window, wherever the grid has as many.
            always_partition: whether windows keep their size where it has not; None leaves it alone.
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
        """Compute what is not stored, on the device of the weights."""
        if isinstance(self.attn, WindowAttention):
            device = self.attn.qkv.weight.device
            self.blocked = None if self.window.dynamic else self._blocked(self.grid, device)


def _offsets(size: tuple[int, int]) -> Tensor:
    """Row of the table of biases for each pair of a window, ``(A, A)``: the offset from key to query, numbered."""
    rows, columns = (torch.arange(n)[:, None] - torch.arange(n)[None, :] + n - 1 for n in size)
    pairs = rows[:, None, :, None] * (2 * size[1] - 1) + columns[None, :, None, :]
    return pairs.reshape(size[0] * size[1], -1)


def _blocked_pairs(
    grid: tuple[int, int], size: tuple[int, int], shift: tuple[int, int], device: torch.device
) -> Tensor:
    """Pairs of a window that were not neighbours before the grid was rolled, ``(W, A, A)``."""
    labels = []
    for length, window, off in zip(grid, size, shift, strict=True):
        place = torch.arange(length, device=device)
        parts = (place >= length - window).long() + (place >= length - off).long()
        labels.append(parts if off else torch.zeros_like(parts))
    regions = labels[0][:, None] * 3 + labels[1][None, :]
    windows = regions.reshape(grid[0] // size[0], size[0], grid[1] // size[1], size[1]).transpose(1, 2)
    windows = windows.reshape(-1, size[0] * size[1])
    return windows[:, :, None] != windows[:, None, :]
