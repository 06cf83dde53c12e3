"""Attention within windows by cosines, with position biases that a small network gives (Swin V2).

R x C rows and columns of the grid, A tokens of one window, H heads, K channels of a head.

Source: Liu et al., "Swin Transformer V2", CVPR 2022, arXiv 2111.09883. Queries and keys of a head are divided by their
lengths, so that cutting one channel would change all others: they are cut with their head or not at all.

Parameters have timm's names, so a dense block loads timm's weights without conversion.
"""

import dataclasses
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitrim.nn.axis import Axis, Member
from vitrim.nn.window import WindowAttention
from vitrim.words.spec import NO_RATES, Form, Rates, Window
from vitrim.words.spec import Attention as AttentionSpec

__all__ = ["SPAN", "ContinuousWindowAttention", "distances"]

MOST = math.log(100.0)
"""Largest logarithm of a head's scale, and `SPAN` the largest bias; both as published."""

SPAN = 16.0


class ContinuousWindowAttention(WindowAttention):
    """Cosine attention within windows; a network of the offset between two tokens gives each head's bias.

    Args:
        width: D.
        spec: head widths; at least one head, all with queries and keys as wide as in the dense model.
        form: biases and norms.
        rates: dropout.
        window: its size, and the network.
    """

    def __init__(self, width: int, spec: AttentionSpec, form: Form, rates: Rates = NO_RATES, *, window: Window) -> None:
        assert window.network is not None
        super().__init__(width, spec, form, rates, size=window.size)
        self.trained = window.trained
        heads, hidden = len(spec.v), window.network
        del self.relative_position_bias_table
        self.logit_scale = nn.Parameter(torch.full((heads, 1, 1), math.log(10.0)))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, heads, bias=False))
        self.register_buffer("relative_coords_table", torch.empty(0), persistent=False)
        # In timm's order, because names of parameters are listed in it.
        for name in ("q_bias", "v_bias"):
            if name in self._parameters:
                self._parameters[name] = self._parameters.pop(name)
        for name in [name for name in self._modules if name != "cpb_mlp"]:
            self._modules[name] = self._modules.pop(name)
        self.init_non_persistent_buffers()

    def _placed(self, q: Tensor, k: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return queries and keys of length one, the former multiplied by the scale of their head."""
        scale = self.logit_scale.clamp(max=MOST).exp()[:, 0]  # (H, 1)
        query = F.normalize(self._heads(q), dim=-1) * scale
        return query.flatten(-2), F.normalize(self._heads(k), dim=-1).flatten(-2)

    def _table(self) -> Tensor:
        """Return the bias of each offset and head, ``(offsets, H)``."""
        found: Tensor = self.cpb_mlp(self.relative_coords_table).flatten(0, -2)
        return SPAN * found.sigmoid()

    def axes(self) -> tuple[Axis, ...]:
        """Return the axes as in `Attention`; a head's scale and its output of the network are cut with the head."""
        qk, v = super().axes()
        each = (
            Member(parameter="attn.logit_scale", dim=0, offset=0),
            Member(parameter="attn.cpb_mlp.2.weight", dim=0, offset=0),
        )
        return qk, dataclasses.replace(v, group_members=each)

    @torch.no_grad()
    def set_window_size(self, size: tuple[int, int]) -> None:
        """Change the window size; the network gives the biases of any."""
        self.window_size = size
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Compute the buffers that are not stored, on the device of the weights."""
        super().init_non_persistent_buffers()
        if not hasattr(self, "trained"):  # called by the base class
            return
        like = self.proj.weight
        device = torch.device("cpu") if like.device.type == "meta" else like.device
        self.relative_coords_table = distances(self.window_size, self.trained)[None].to(device, like.dtype)


def distances(size: tuple[int, int], trained: tuple[int, int] | None, measured: bool = True) -> Tensor:
    """Return logarithms of the offsets between two tokens, ``(2 rows - 1, 2 columns - 1, 2)``.

    Args:
        size: rows and columns of a window.
        trained: those of the window in pre-training, in whose units offsets are measured; None for the same.
        measured: whether offsets are measured in units of a window at all; if not, they are numbers of tokens.
    """
    if not measured:
        steps = [torch.arange(-(n - 1), n, device="cpu", dtype=torch.float32) for n in size]
        apart = torch.stack(torch.meshgrid(*steps, indexing="ij"), dim=-1)
        return apart.sign() * (apart.abs() + 1.0).log()
    units = size if trained is None else trained
    axes = [
        torch.arange(-(n - 1), n, device="cpu", dtype=torch.float32) / max(unit - 1, 1)
        for n, unit in zip(size, units, strict=True)
    ]
    apart = 8 * torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)
    return apart.sign() * (apart.abs() + 1.0).log2() / math.log2(8)
