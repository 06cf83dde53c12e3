"""The transformer block, built from a spec node.

B images, N tokens, P prefix tokens, D width.
"""

from collections.abc import Callable
from typing import Literal

import torch
from timm.layers import DropPath, LayerScale
from torch import Tensor, nn

from vitrim.nn.attention import Attention, Heard
from vitrim.nn.axis import Axis, Member, Tap, rows
from vitrim.nn.conv import Conv, Same
from vitrim.nn.layers import make_norm, norm_over
from vitrim.nn.mlp import Mlp
from vitrim.nn.steps import StepModule, make_step
from vitrim.nn.stream import Residual, Stream
from vitrim.words.errors import DataError
from vitrim.words.spec import Attention as AttentionSpec
from vitrim.words.spec import Block as BlockSpec
from vitrim.words.spec import Conv as ConvSpec
from vitrim.words.spec import Form, Rates, Skip, Stage
from vitrim.words.steps import Tokens, flow_of

__all__ = ["Block", "Constant"]


class Constant(nn.Module):
    """A branch without channels, which adds a constant: its output bias after layer scale.

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

    With `Form.post_norm`, the norms follow their branches: ``x + norm1(attn(x))``, then ``x + norm2(mlp(x))``.

    It accepts the arguments that timm passes to its own blocks. A branch that a plan removed is None. A branch that
    lost all its channels is a `Constant`, without norm and layer scale. Attention may be replaced by a `Conv`.

    Args:
        stage: width, grid, prefix tokens and form.
        spec: mixer, hidden neurons, token step, dropout.
        arriving: the tokens at its input; those of the whole grid if None.
        attention: function that builds the attention from D, the mixer, the form and the rates.
    """

    gamma_1: nn.Parameter | None
    gamma_2: nn.Parameter | None

    def __init__(
        self,
        stage: Stage,
        spec: BlockSpec,
        arriving: Tokens | None = None,
        attention: Callable[[int, AttentionSpec, Form, Rates], Attention] = Attention,
    ) -> None:
        super().__init__()
        here = stage.enters if arriving is None else arriving
        width, form, mixer, hidden = stage.width, stage.form, spec.mixer, spec.hidden
        self.spec, self.form, self.width, self.prefix = spec, form, width, stage.prefix
        self.step: StepModule | None = None if stage.window is not None else make_step(spec.tokens, stage, here)
        self.n_queries = stage.prefix if spec.only_prefix else None
        """Number of first tokens for which queries, MLP and output are computed; None for all tokens."""
        self.is_last = False
        """Whether the model's head reads the output of this block. Set by the model family."""
        self.source: Callable[[], Tensor | None] | None = None
        """What the host gives to the block besides tokens, for a block that is run without its host. Set by the family.
        """

        attends = isinstance(mixer, AttentionSpec) and len(mixer.v) > 0
        constant = isinstance(mixer, AttentionSpec) and not attends and form.out_bias
        same = isinstance(mixer, Skip) and mixer.leaves == "norm"
        reads = attends or same or isinstance(mixer, ConvSpec)
        for name in ("gamma_1", "gamma_2"):
            scaled = form.layer_scale and form.gamma and (reads if name == "gamma_1" else bool(hidden))
            self.register_parameter(name, nn.Parameter(torch.ones(width)) if scaled else None)
        norm1 = make_norm(form.norm, width) if reads else nn.Identity()
        if not form.post_norm:
            self.norm1 = norm1
        self.attn: Attention | Conv | Constant | Same | None = None
        if attends and isinstance(mixer, AttentionSpec):
            self.attn = attention(width, mixer, form, spec.rates)
        elif isinstance(mixer, ConvSpec):
            grid = flow_of(spec.tokens, here, stage.patches).mixed.grid or stage.grid
            self.attn = Conv(width, mixer, form, spec.rates, grid=grid, prefix=stage.prefix)
        elif constant or same:
            self.attn = Same() if same else Constant(width)
        self.norm1 = norm1
        self.before1 = Tap() if form.post_norm else None
        self.before2 = Tap() if form.post_norm else None
        self.ls1 = LayerScale(width) if reads and form.layer_scale and not form.gamma else nn.Identity()
        self.drop_path1 = DropPath(spec.rates.attention_path)

        norm2 = make_norm(form.norm, width) if hidden else nn.Identity()
        if not form.post_norm:
            self.norm2 = norm2
        self.mlp: Mlp | Constant | None = None
        if hidden:
            self.mlp = Mlp(width, hidden, form, spec.rates)
        elif hidden == 0 and form.mlp_out_bias:
            self.mlp = Constant(width)
        self.norm2 = norm2
        self.ls2 = LayerScale(width) if hidden and form.layer_scale and not form.gamma else nn.Identity()
        self.drop_path2 = DropPath(spec.rates.mlp_path)

    @property
    def enter1(self) -> nn.Module:
        """The module whose output the attention branch reads."""
        return self.norm1 if self.before1 is None else self.before1

    @property
    def enter2(self) -> nn.Module:
        """The module whose output the MLP reads."""
        return self.norm2 if self.before2 is None else self.before2

    def leaving1(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """Return what the attention branch adds, of the output of its last layer.

        Args:
            x: that output, ``(..., D)``.
            kept: channels of the residual stream that are left, as indices ``(K,)``; the result then has only these,
                with a later norm over them, ``(..., K)``. None for all.
        """
        scaled: Tensor = self.ls1(x)
        scaled = scaled if self.gamma_1 is None else self.gamma_1 * scaled
        normed = self.before1 is not None and isinstance(self.attn, Attention | Conv | Same)
        return _after(scaled, self.norm1 if normed else None, kept)

    def leaving2(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """Return what the MLP adds, of the output of its last layer; see `leaving1`."""
        scaled: Tensor = self.ls2(x)
        scaled = scaled if self.gamma_2 is None else self.gamma_2 * scaled
        normed = self.before2 is not None and isinstance(self.mlp, Mlp)
        return _after(scaled, self.norm2 if normed else None, kept)

    def scale(self, branch: Literal[1, 2]) -> Tensor | None:
        """Return the layer scale of attention (1) or MLP (2), ``(D,)``; None if there is none."""
        own = self.gamma_1 if branch == 1 else self.gamma_2
        module = getattr(self.ls1 if branch == 1 else self.ls2, "gamma", None)
        return module if isinstance(module, Tensor) else own

    def forward(
        self,
        x: Residual,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        rope: Tensor | None = None,
        shared_rel_pos_bias: Tensor | None = None,
        shared_rel_pos: Tensor | None = None,
    ) -> Residual:
        """Map tokens ``(B, N, D)`` to ``(B, n, D)``, where n is N unless the block changes the number of tokens.

        If tokens represent several patches, input and output are a `Stream`, which contains the number of patches of
        each token. The last block repeats each token as many times as it has patches.

        Args:
            x: tokens.
            attn_mask: see `Attention.forward`.
            is_causal: see `Attention.forward`.
            rope: sines and cosines of places, where attention is rotary; without them `source` is asked.
            shared_rel_pos_bias: biases that the host shares between blocks; without them `source` is asked.
            shared_rel_pos: the same, by the name that another of timm's hosts uses.

        Raises:
            DataError: if the block changes the number of tokens, and a mask is given or the number of arriving tokens
                is not the one that the block was built for.
        """
        changes = self.step is not None or self.n_queries is not None or isinstance(x, Stream)
        if changes and (attn_mask is not None or is_causal):
            raise DataError(
                "a model whose tokens are dropped or merged must be run without attention masks; leave them out"
            )
        if isinstance(x, Stream):
            tokens, sizes, key_bias = x.x, x, x.key_bias()
        else:
            tokens, sizes, key_bias = x, None, None
        positions = next((each for each in (rope, shared_rel_pos_bias, shared_rel_pos) if each is not None), None)
        if positions is None and self.source is not None and self.form.positions is not None:
            positions = self.source()
        if self.step is not None:
            tokens = self.step.enter(tokens)
        heard: list[Heard] = []
        if self.attn is not None:
            mixed = self._mix(self.enter1(tokens), attn_mask, is_causal, key_bias, heard, positions)
            tokens = tokens[:, : self.n_queries] + self.drop_path1(self.leaving1(mixed))
        elif self.n_queries is not None:
            tokens = tokens[:, : self.n_queries]
        if self.n_queries is not None:
            sizes = None
        stream = tokens if sizes is None else sizes._replace(x=tokens)
        if self.step is not None:
            stream = self.step.after_attention(stream, heard[0] if heard else None)
        tokens, sizes = (stream.x, stream) if isinstance(stream, Stream) else (stream, None)
        if self.mlp is not None:
            tokens = tokens + self.drop_path2(self.leaving2(self.mlp(self.enter2(tokens))))
        if sizes is None:
            return tokens
        sizes = sizes._replace(x=tokens)
        return sizes.repeated(self.prefix) if self.is_last else sizes

    def _mix(
        self,
        x: Tensor,
        attn_mask: Tensor | None,
        is_causal: bool,
        key_bias: Tensor | None,
        heard: list[Heard],
        positions: Tensor | None,
    ) -> Tensor:
        """Return the output of the attention, or of its replacement, for the tokens whose output is computed."""
        assert self.attn is not None
        if isinstance(self.attn, Conv):
            raised = None if self.step is None else self.step.keys(x)[1]
            key_bias = key_bias if raised is None else raised
            placed: Tensor = self.attn(x, attn_mask, is_causal, key_bias)
            return placed
        if not isinstance(self.attn, Attention):
            alone: Tensor = self.attn(x[:, : self.n_queries], attn_mask=attn_mask, is_causal=is_causal)
            return alone
        if self.step is None:
            mixed: Tensor = self.attn(
                x, attn_mask, is_causal, n_queries=self.n_queries, key_bias=key_bias, positions=positions
            )
            return mixed
        given, raised = self.step.keys(x)
        key_bias = key_bias if raised is None else raised
        wanted = heard if self.step.needs_attention else None
        mixed = self.attn(given, n_queries=self.n_queries, heard=wanted, key_bias=key_bias, positions=positions)
        return mixed[:, : x.shape[1]]

    def place(self, arriving: Tokens, grid: tuple[int, int]) -> None:
        """Adapt to another image size.

        Args:
            arriving: the tokens at the block's input.
            grid: rows and columns of the dense grid.
        """
        if self.step is not None:
            self.step.place(arriving, grid)
        if isinstance(self.attn, Attention):
            self.attn.place(grid)
        if isinstance(self.attn, Conv):
            self.attn.grid = flow_of(self.spec.tokens, arriving, grid[0] * grid[1]).mixed.grid or grid

    def axes(self) -> tuple[Axis, ...]:
        """Return every axis of this block."""
        parts = [part for part in (self.attn, self.mlp) if isinstance(part, Attention | Mlp)]
        return tuple(axis for part in parts for axis in part.axes())

    def stream(self) -> tuple[Member, ...]:
        """Return the slices of parameters that the channels of the residual stream index, relative to the block."""
        found = [member for name in ("norm1", "norm2", "ls1", "ls2") for member in rows(name, getattr(self, name))]
        scales = [name for name in ("gamma_1", "gamma_2") if getattr(self, name) is not None]
        found += [Member(parameter=name, dim=0, offset=0) for name in scales]
        for name, part in (("attn", self.attn), ("mlp", self.mlp)):
            if isinstance(part, Attention | Conv | Mlp):
                found += part.stream()
            elif part is not None:
                found += rows(name, part)
        return (*found, *(self.step.stream() if self.step is not None else ()))

    def norms(self) -> dict[str, nn.Module]:
        """Return the norms over the channels of the residual stream, by name relative to the block."""
        inner = {"mlp.norm": self.mlp.norm} if isinstance(self.mlp, Mlp) and self.mlp.kind == "geglu" else {}
        found = {"norm1": self.norm1, "norm2": self.norm2, **inner}
        return {name: norm for name, norm in found.items() if not isinstance(norm, nn.Identity)}

    def reading(self) -> dict[str, tuple[Member, ...] | None]:
        """Return what reads the stream as it is, where norms follow the branches.

        Returns:
            By name of the tap through which a branch reads, the slices of its parameters that the channels index; None
            in place of the slices if the branch also passes channels on without a weight. Empty where norms come before
            the branches.
        """
        found: dict[str, tuple[Member, ...] | None] = {}
        for tap, part in (("before1", self.attn), ("before2", self.mlp)) if self.form.post_norm else ():
            if isinstance(part, Same) or (isinstance(part, Conv) and self.prefix and part.spec.prefix == "norm"):
                found[tap] = None
            elif isinstance(part, Attention | Conv | Mlp):
                found[tap] = tuple(m for m in part.stream() if m.dim == 1 and m.parameter != "attn.mean")
        return found


def _after(x: Tensor, norm: nn.Module | None, kept: Tensor | None) -> Tensor:
    """Return `x` after a norm, if there is one, both over `kept` channels alone if they are given."""
    if kept is not None:
        x, norm = x[..., kept.to(x.device)], None if norm is None else norm_over(norm, kept)
    return x if norm is None else norm(x)
