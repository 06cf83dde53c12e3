"""Convolutions in place of attention, as they run.

B images, N tokens, P prefix tokens, R x C rows and columns of the grid, D width, d channels of a bottleneck.
"""

import torch
from torch import Tensor, nn

from vitrim.nn import Block, Conv
from vitrim.nn.conv import state_of

__all__ = ["FixedConv", "fix_conv_", "plain_conv"]


class FixedConv(Conv):
    """A folded convolution without strided products.

    The 1 x 1 convolution runs on all tokens, and what it gives the prefix tokens is left out afterwards: of tokens that
    begin behind others PyTorch makes one product for each image, or copies them. The way back from a 3 x 3 convolution
    is a linear layer on what the convolution leaves in memory, ``(B, R, C, d)``.
    """

    zero: Tensor

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        key_bias: Tensor | None = None,
    ) -> Tensor:
        """See `Conv.forward`."""
        if attn_mask is not None or is_causal:
            return super().forward(x, attn_mask, is_causal)  # which refuses
        prefix = self.prefix if x.dim() == 3 else 0
        if self.spec.kernel == 1:
            out: Tensor = self.proj(self._act(self.conv(x)))
            out = out[:, prefix:] if prefix else out
        else:
            maps = torch.unflatten(x[:, prefix:], 1, self._grid(x.shape[1] - prefix)) if x.dim() == 3 else x
            out = self.proj(self._act(self.conv(maps.permute(0, 3, 1, 2))).permute(0, 2, 3, 1))
            out = out.flatten(1, 2) if x.dim() == 3 else out
        if not prefix:
            return out
        if self.spec.prefix == "zero":
            return torch.cat([self.zero.expand(x.shape[0], prefix, x.shape[2]), out], dim=1)
        return torch.cat([self._first(x, key_bias), out], dim=1)


def plain_conv(conv: Conv, block: Block) -> Conv:
    """The same convolution as two plain layers, its mixture and its batch norm folded."""
    spec = conv.spec.model_copy(update={"mixture": None, "norm": False})
    if spec == conv.spec:
        return conv
    state = state_of(spec, conv.spec, conv.state_dict())
    plain = Conv(block.width, spec, block.form, grid=conv.grid, prefix=conv.prefix).to(state["conv.weight"])
    plain.load_state_dict(state)
    return plain


def fix_conv_(conv: Conv) -> None:
    """Make a plain convolution, which is where and in the type in which it will run, a `FixedConv`."""
    if isinstance(conv.proj, nn.Conv2d):
        back = nn.Linear(conv.proj.in_channels, conv.proj.out_channels, bias=conv.proj.bias is not None)
        back = back.to(conv.proj.weight)
        back.load_state_dict(
            {name: value.flatten(1) if value.dim() == 4 else value for name, value in conv.proj.state_dict().items()}
        )
        conv.proj = back.requires_grad_(False)
        # As kernels for that order of memory take weights; else they are laid out anew in each call.
        conv.conv.to(memory_format=torch.channels_last)
    conv.__class__ = FixedConv
    conv.register_buffer("zero", torch.zeros_like(conv.conv.bias[:1])[None, None], persistent=False)  # type: ignore[index]
