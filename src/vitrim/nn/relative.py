"""Attention with a bias for each head and each offset between two patches of the grid: a table or a network gives it.

B images, N tokens, P prefix tokens (at most one, a class token), H heads, (R, C) rows and columns of the dense grid.

Sources: Bao et al., "BEiT", arXiv 2106.08254 (tables); Liu et al., "Swin Transformer V2", arXiv 2111.09883 (networks),
in the two forms that timm has.

Parameters have timm's names, so a dense block loads timm's weights without conversion.
"""

import dataclasses

import torch
from timm.layers import Mlp, resize_rel_pos_bias_table
from torch import Tensor, nn
from torch.nn import functional as F

from vitrim.nn.attention import Attention
from vitrim.nn.axis import Axis, Member
from vitrim.nn.continuous import SPAN, distances
from vitrim.words.errors import DataError
from vitrim.words.spec import NO_RATES, Form, Rates, Relative, between
from vitrim.words.spec import Attention as AttentionSpec

__all__ = ["OffsetNetwork", "RelativeAttention"]


class OffsetNetwork(nn.Module):
    """A network from the offset between two patches to the bias of each head; parameters as in timm's ``RelPosMlp``.

    Args:
        grid: (R, C).
        heads: H.
        hidden: its hidden neurons.
        bounded: whether biases are bounded and offsets measured in units of the grid (Swin V2), or neither.
    """

    def __init__(self, grid: tuple[int, int], heads: int, hidden: int, bounded: bool) -> None:
        super().__init__()
        self.grid, self.bounded = grid, bounded
        biased = (True, False) if bounded else True
        self.mlp = Mlp(2, hidden, heads, act_layer=nn.ReLU, bias=biased, drop=(0.125, 0.0))
        self.register_buffer("rel_coords_log", torch.empty(0), persistent=False)
        self.init_non_persistent_buffers()

    def forward(self) -> Tensor:
        """Return the bias of each offset and head, ``(offsets, H)``."""
        found: Tensor = self.mlp(self.rel_coords_log).flatten(0, 1)
        return SPAN * found.sigmoid() if self.bounded else found

    def set_window_size(self, size: tuple[int, int]) -> None:
        """Change the grid; timm's `set_input_size` calls this."""
        self.grid = (int(size[0]), int(size[1]))
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Compute the buffers that are not stored, on the device of the weights."""
        like = self.mlp.fc1.weight
        device = torch.device("cpu") if like.device.type == "meta" else like.device
        self.rel_coords_log = distances(self.grid, None, self.bounded).to(device, like.dtype)


class RelativeAttention(Attention):
    """Self-attention with relative positions.

    Args:
        width: D.
        spec: head widths and scale; at least one head.
        form: biases, norms, and where the biases of positions are from.
        rates: dropout.
        grid: (R, C).
        prefix: P.
        places: places of the patches that attention runs on, in the dense grid; None for all.
    """

    relative_position_bias_table: nn.Parameter | None
    relative_position_index: Tensor
    kept: Tensor
    heads: Tensor

    def __init__(
        self,
        width: int,
        spec: AttentionSpec,
        form: Form,
        rates: Rates = NO_RATES,
        *,
        grid: tuple[int, int],
        prefix: int,
        places: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__(width, spec, form, rates)
        positions = form.positions
        assert isinstance(positions, Relative)
        self.grid, self.prefix, self.places, self.origin = grid, prefix, places, spec.origin
        tabled = positions.own and positions.network is None
        self.relative_position_bias_table = (
            nn.Parameter(torch.zeros(between(grid) + 3 * prefix, len(spec.v))) if tabled else None
        )
        self.rel_pos: OffsetNetwork | None = None
        if positions.own and positions.network is not None:
            self.rel_pos = OffsetNetwork(grid, len(spec.v), positions.network, positions.bounded)
            for name in ("attn_drop", "norm", "proj", "proj_drop"):  # in timm's order
                self._modules[name] = self._modules.pop(name)
        for name in ("relative_position_index", "kept", "heads"):
            self.register_buffer(name, torch.empty(0, dtype=torch.long), persistent=False)
        self.init_non_persistent_buffers()

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        n_queries: int | None = None,
        heard: object = None,
        key_bias: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Mix tokens.

        Args:
            x: normed tokens, ``(B, N, D)``.
            attn_mask: None, for timm's models take no masks.
            is_causal: False.
            n_queries: number of first tokens for which queries and outputs are computed; None for all tokens.
            heard: None, for no step that needs queries and keys fits relative positions.
            key_bias: None.
            positions: biases of the host, ``(H of the dense model, N, N)`` or with one more dimension before, where it
                has any.

        Returns:
            ``(B, N, D)``, or ``(B, n_queries, D)``.

        Raises:
            DataError: if a mask is given.
        """
        if attn_mask is not None or is_causal or key_bias is not None:
            raise DataError("a model with relative positions must be run without attention masks; leave them out")
        bias = self._bias(positions)
        if n_queries is not None and bias is not None:
            bias = bias[..., :n_queries, :]
        return self._run(x, bias, self._attend, n_queries)

    def _bias(self, positions: Tensor | None) -> Tensor | None:
        """Return what is added to the logits, ``(1, H, N, N)``."""
        bias = self._own()
        if positions is not None:
            shared = positions[0] if positions.dim() == 4 else positions
            if self.origin is not None and self.origin != tuple(range(len(shared))):
                shared = shared.index_select(0, self.heads)
            if self.places is not None:
                shared = shared.index_select(1, self.kept).index_select(2, self.kept)
            bias = shared if bias is None else bias + shared
        return None if bias is None else bias[None]

    def _own(self) -> Tensor | None:
        """Return the biases that the block has, ``(H, N, N)``."""
        index, table = self.relative_position_index, self.relative_position_bias_table
        if table is None and self.rel_pos is None:
            return None
        if self.places is not None:
            kept = self.kept if table is not None else self.kept[self.prefix :] - self.prefix
            index = index[kept[:, None], kept]
        if table is not None:
            return table[index].permute(2, 0, 1)
        assert self.rel_pos is not None
        bias = self.rel_pos()[index].permute(2, 0, 1)
        return F.pad(bias, [self.prefix, 0, self.prefix, 0]) if self.prefix else bias

    def axes(self) -> tuple[Axis, ...]:
        """Return the axes as in `Attention`; biases of a head are cut together with the head."""
        qk, v = super().axes()
        each: tuple[Member, ...] = ()
        if self.relative_position_bias_table is not None:
            each = (Member(parameter="attn.relative_position_bias_table", dim=1, offset=0),)
        elif self.rel_pos is not None:
            last = dict(self.rel_pos.mlp.fc2.named_parameters())
            each = tuple(Member(parameter=f"attn.rel_pos.mlp.fc2.{name}", dim=0, offset=0) for name in last)
        return qk, dataclasses.replace(v, group_members=each)

    def place(self, grid: tuple[int, int]) -> None:
        """See `Attention.place`."""
        self.set_window_size(grid)

    @torch.no_grad()
    def set_window_size(self, size: tuple[int, int]) -> None:
        """Change the grid; tables are interpolated as in timm, whose `set_input_size` calls this."""
        if tuple(size) == self.grid:
            return
        table = self.relative_position_bias_table
        if table is not None:
            resized = resize_rel_pos_bias_table(
                table,
                new_window_size=size,
                new_bias_shape=(between(size) + 3 * self.prefix, len(self.v)),
                old_window_size=self.grid,
            )
            self.relative_position_bias_table = nn.Parameter(resized, requires_grad=table.requires_grad)
        self.grid = (int(size[0]), int(size[1]))
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Compute the buffers that are not stored, on the device of the weights."""
        device = self.proj.weight.device
        place = torch.device("cpu") if device.type == "meta" else device
        classes = self.prefix if self.relative_position_bias_table is not None else 0
        self.relative_position_index = _offsets(self.grid, classes).to(place)
        patches = range(self.grid[0] * self.grid[1]) if self.places is None else self.places
        kept = [*range(self.prefix), *(self.prefix + one for one in patches)]
        self.kept = torch.tensor(kept, dtype=torch.long, device="cpu").to(place)
        self.heads = torch.tensor(self.origin or (), dtype=torch.long, device="cpu").to(place)


def _offsets(grid: tuple[int, int], prefix: int) -> Tensor:
    """Return the row of the table of biases for each pair of tokens, ``(P + R C, P + R C)``.

    With a class token, the last three rows are those of its logits, of the logits for it, and of its logit for itself.
    """
    rows, columns = (
        torch.arange(n, device="cpu")[:, None] - torch.arange(n, device="cpu")[None, :] + n - 1 for n in grid
    )
    pairs = (rows[:, None, :, None] * (2 * grid[1] - 1) + columns[None, :, None, :]).reshape(grid[0] * grid[1], -1)
    if not prefix:
        return pairs
    index = torch.empty(len(pairs) + 1, len(pairs) + 1, dtype=torch.long, device="cpu")
    index[1:, 1:] = pairs
    index[0, :], index[:, 0], index[0, 0] = between(grid), between(grid) + 1, between(grid) + 2
    return index
