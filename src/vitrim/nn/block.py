"""The transformer block, built from a spec node.

B images, N tokens, D width.
"""

from collections.abc import Callable

import torch
from timm.layers import DropPath, LayerScale
from torch import Tensor, nn

from vitrim.nn.attention import Attention
from vitrim.nn.axis import Axis
from vitrim.nn.conv import Conv, Same
from vitrim.nn.layers import make_norm
from vitrim.nn.mlp import Mlp
from vitrim.nn.tokens import Merged, Seen, Step, spread
from vitrim.words.errors import DataError
from vitrim.words.spec import Attention as AttentionSpec
from vitrim.words.spec import Block as BlockSpec
from vitrim.words.spec import Conv as ConvSpec
from vitrim.words.spec import Form, Skip

__all__ = ["Block", "Constant"]


class Constant(nn.Module):
    """What remains of a branch that lost all its channels: its output bias, after layer scale.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Return the bias for every token of `x`, ``(B, N, D)``."""
        return self.bias.expand_as(x)


class Block(nn.Module):
    """A pre-norm block: ``x + attn(norm1(x))``, then ``x + mlp(norm2(x))``.

    It answers to whatever timm passes to its own block. A branch that a plan took away is None; a branch that lost all
    its channels is a `Constant`, without norm and layer scale. In place of attention may stand a `Conv`.

    Args:
        width: D.
        spec: mixer, hidden neurons, drop path.
        form: what the blocks of the stage have in common.
        attention: what builds the attention from D, the mixer and the form.
        step: what becomes of its tokens; None keeps all that arrive.
        asking: how many tokens, the first, ask, go through the MLP and leave; None for all.
        conv: what builds the convolution from D, the mixer and the form.
        sized: whether tokens arrive that stand for several patches: then the last channel of the stream, D + 1, says
            how many.
        patches: of the dense grid.
        prefix: tokens before them.
    """

    def __init__(
        self,
        width: int,
        spec: BlockSpec,
        form: Form,
        attention: Callable[[int, AttentionSpec, Form], Attention] = Attention,
        step: Step | None = None,
        asking: int | None = None,
        conv: Callable[[int, ConvSpec, Form], Conv] = Conv,
        sized: bool = False,
        patches: int = 0,
        prefix: int = 0,
    ) -> None:
        super().__init__()
        self.step, self.asking, self.sized = step, asking, sized
        self.patches, self.prefix = patches, prefix
        self.ends = False
        """Whether the host's head reads what leaves: sizes stay behind then. Set by the family that hosts the block."""
        self.spec, self.form, self.width = spec, form, width
        mixer, hidden = spec.mixer, spec.hidden

        attends = isinstance(mixer, AttentionSpec) and len(mixer.v) > 0
        constant = isinstance(mixer, AttentionSpec) and not attends and form.out_bias
        same = isinstance(mixer, Skip) and mixer.leaves == "norm"
        reads = attends or same or isinstance(mixer, ConvSpec)
        self.norm1 = make_norm(form.norm, width) if reads else nn.Identity()
        self.attn: Attention | Conv | Constant | Same | None = None
        if attends and isinstance(mixer, AttentionSpec):
            self.attn = attention(width, mixer, form)
        elif isinstance(mixer, ConvSpec):
            self.attn = conv(width, mixer, form)
        elif constant or same:
            self.attn = Same() if same else Constant(width)
        self.ls1 = LayerScale(width) if reads and form.layer_scale else nn.Identity()
        self.drop_path1 = DropPath(spec.drop_path)

        self.norm2 = make_norm(form.norm, width) if hidden else nn.Identity()
        self.mlp: Mlp | Constant | None = None
        if hidden:
            self.mlp = Mlp(width, hidden, form)
        elif hidden == 0 and form.mlp_out_bias:
            self.mlp = Constant(width)
        self.ls2 = LayerScale(width) if hidden and form.layer_scale else nn.Identity()
        self.drop_path2 = DropPath(spec.drop_path)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Map tokens ``(B, N, D)`` to ``(B, n, D)``, where n is N unless the block has a token step or `asking`.

        Masks are those of `Attention.forward`.

        Raises:
            DataError: if the number of tokens changes, and others arrive than it was made for, or a mask is given.
        """
        few = self.step is not None or self.asking is not None or self.sized
        if few and (attn_mask is not None or is_causal):
            raise DataError(
                "a model whose tokens are dropped or merged must be run without attention masks; leave them out"
            )
        seen, sizes = None, None
        if self.sized:
            x, sizes = x[..., :-1], x[..., -1:]
            attn_mask = sizes.log().mT[:, None]
        if self.step is not None:
            x = self.step.enter(x)
        if self.attn is not None:
            mixed, seen = self._mix(self.norm1(x), attn_mask, is_causal)
            x = x[:, : self.asking] + self.drop_path1(self.ls1(mixed))
        elif self.asking is not None:
            x = x[:, : self.asking]
        if isinstance(self.step, Merged):
            x, sizes = self.step.merge(x, sizes, seen)
        elif self.step is not None:
            x = self.step.settle(x, seen)
        if self.mlp is not None:
            x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        if sizes is None or self.asking is not None:
            return x
        return spread(x, sizes, self.prefix, self.patches) if self.ends else torch.cat([x, sizes], dim=-1)

    def _mix(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> tuple[Tensor, Seen | None]:
        assert self.attn is not None
        if not isinstance(self.attn, Attention):
            alone: Tensor = self.attn(x[:, : self.asking], attn_mask=attn_mask, is_causal=is_causal)
            return alone, None
        if self.step is None:
            mixed: Tensor = self.attn(x, attn_mask=attn_mask, is_causal=is_causal, asking=self.asking)
            return mixed, None
        given, raised = self.step.keys(x)
        raised = attn_mask if raised is None else raised
        seen: list[Seen] = []
        mixed = self.attn(given, attn_mask=raised, asking=self.asking, seen=seen if self.step.looks else None)
        return mixed[:, : x.shape[1]], seen[0] if seen else None

    def axes(self) -> tuple[Axis, ...]:
        """Every axis of this block."""
        parts = [part for part in (self.attn, self.mlp) if isinstance(part, Attention | Mlp)]
        return tuple(axis for part in parts for axis in part.axes())
