"""Description of one block: attention, a convolution or nothing, then an MLP, with the width of each part.

D is the width of the residual stream, H the number of heads, K the channels of a head, M the hidden neurons.
"""

from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from vitrim.words.plain import Node
from vitrim.words.sizes import MOST_HEADS, Count, Size
from vitrim.words.steps import Step

__all__ = [
    "NO_RATES",
    "Attention",
    "Block",
    "Conv",
    "Form",
    "Mixer",
    "Mixture",
    "Norm",
    "Positions",
    "Rates",
    "Relative",
    "Rotary",
    "Skip",
    "why_not_conv",
    "why_not_read",
]


class Norm(Node):
    """A normalization layer, by the name of its class in ``timm.layers`` or ``torch.nn``."""

    name: str
    eps: float
    weight: bool = True
    bias: bool = True

    def params(self, width: int) -> int:
        """Return the number of parameters of this norm over `width` channels."""
        return width * (self.weight + self.bias)


class Rotary(Node):
    """Queries and keys of patches are turned by angles that depend on their places (RoPE).

    Source: Su et al., "RoFormer", arXiv 2104.09864; for images, Heo et al., "Rotary Position Embedding for Vision
    Transformer", ECCV 2024.

    Channels are turned in pairs, and each pair has its own angle, so the channels of a head are cut together.

    Attributes:
        halves: whether the pairs are channels i and i + K / 2 of a head; if not, channels 2 i and 2 i + 1.
        by_head: whether each head has its own angles, which the host keeps for all heads of the dense model.
    """

    kind: Literal["rotary"] = "rotary"
    halves: bool = False
    by_head: bool = False


class Relative(Node):
    """A learned bias for each head and each offset between two patches of the grid is added to the logits.

    Of a class token, a table has three more biases: of its logits, of the logits for it, and of its logit for itself.
    A network gives it none. Sources: Bao et al., "BEiT", arXiv 2106.08254; Liu et al., "Swin Transformer V2", arXiv
    2111.09883.

    Attributes:
        own: whether the block has biases of its own.
        shared: whether the host gives biases to all blocks, for all heads of the dense model.
        network: hidden neurons of the network that gives the block's own biases; None if they are a table.
        bounded: whether that network measures offsets in units of the grid, and its biases are bounded.
    """

    kind: Literal["relative"] = "relative"
    own: bool = True
    shared: bool = False
    network: Size | None = None
    bounded: bool = False

    @property
    def by_head(self) -> bool:
        """Whether the host keeps something for each head of the dense model."""
        return self.shared


Positions = Annotated[Rotary | Relative, Field(discriminator="kind")]
"""What attention must know about the places of its tokens."""


class Form(Node):
    """Everything that the blocks of one stage share, except their widths.

    `head_norm` is the norm over the channels of each query and key head. `mixed_norm` is the norm over the outputs of
    all heads together. `hidden_norm` is the norm over the hidden neurons. A norm ties the channels it runs over:
    cutting one of them would change the statistics of the others, so those channels can only be cut together with the
    whole branch. `inner_norm` runs over the width, before the first layer of the MLP. It ties no channels.

    `positions` is what attention must know about places, None if only the stem adds positions to tokens. `k_bias` is
    whether keys have a bias where queries and values have one. `qkv` and `gamma` are how timm keeps parameters:
    queries, keys and values in one layer (``fused``) or three (``split``), layer scale in modules or as parameters of
    the block (`gamma`). With `post_norm` the norms follow their branches: ``x + norm1(attn(x))``. With
    `cosine`, queries and keys of a head are divided by their lengths, and each head has a learned scale.
    """

    norm: Norm
    qkv_bias: bool
    out_bias: bool
    mlp: Literal["plain", "glu", "swiglu", "geglu"]
    gate_first: bool = False
    activation: str
    hidden_bias: bool
    mlp_out_bias: bool
    layer_scale: bool = False
    inner_norm: Norm | None = None
    head_norm: Norm | None = None
    head_norm_width: Count = 0
    mixed_norm: Norm | None = None
    hidden_norm: Norm | None = None
    positions: Positions | None = None
    k_bias: bool = True
    qkv: Literal["fused", "split"] = "fused"
    gamma: bool = False
    post_norm: bool = False
    cosine: bool = False

    @model_validator(mode="after")
    def _constants(self) -> Self:
        if self.post_norm and not (self.out_bias and self.mlp_out_bias):
            raise ValueError("branches before a norm must have an output bias, but one has none")
        return self

    @property
    def ties_qk(self) -> bool:
        """Whether the query and key channels of a head can only be cut all together."""
        return self.head_norm is not None or self.cosine or isinstance(self.positions, Rotary)

    @property
    def one_key_for_zeros(self) -> bool:
        """Whether a token of zeros has the same logits wherever it stands, as a key."""
        if self.positions is None:
            return True
        return isinstance(self.positions, Rotary) and self.head_norm is None and not (self.qkv_bias and self.k_bias)

    @property
    def factors(self) -> int:
        """Number of linear layers from the width to the hidden neurons: 2 if the MLP is gated, else 1."""
        return 1 if self.mlp == "plain" else 2


Rate = Annotated[float, Field(ge=0, le=1)]


class Rates(Node):
    """Dropout rates of a block in training, each in [0, 1].

    Attributes:
        attention: rate for the attention weights.
        projection: rate for the outputs of the projection after attention.
        hidden: rate for the neurons of the MLP.
        output: rate for the outputs of the MLP.
        attention_path: rate at which the attention branch is dropped for a whole image (stochastic depth).
        mlp_path: rate at which the MLP branch is dropped for a whole image.

    Rates belong to the training of a model, not to its structure, so any two `Rates` compare equal.
    """

    attention: Rate = 0.0
    projection: Rate = 0.0
    hidden: Rate = 0.0
    output: Rate = 0.0
    attention_path: Rate = 0.0
    mlp_path: Rate = 0.0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rates)

    def __hash__(self) -> int:
        return hash(Rates)


NO_RATES = Rates()
"""Rates that drop nothing."""


class Attention(Node):
    """Self-attention with one query/key width and one value width for each head that is left.

    Heads without channels are not listed. If no head is left, the branch is a constant, its output bias. `scale`
    multiplies the logits. A cut does not change it: it stays the scale of the dense parent, for any widths. `origin`
    says which heads of the dense model these are, where the host keeps something for each of them (`Positions`).
    """

    kind: Literal["attention"] = "attention"
    qk: tuple[Size, ...] = Field(max_length=MOST_HEADS)
    v: tuple[Size, ...] = Field(max_length=MOST_HEADS)
    scale: PositiveFloat
    origin: tuple[Count, ...] | None = Field(default=None, max_length=MOST_HEADS)

    @model_validator(mode="after")
    def _heads(self) -> Self:
        if len(self.qk) != len(self.v):
            raise ValueError(f"qk and v must name the same heads, but got {len(self.qk)} and {len(self.v)}")
        if self.origin is not None and len(self.origin) != len(self.v):
            raise ValueError(f"origin must name the same heads as v, but names {len(self.origin)} of {len(self.v)}")
        return self

    def of(self, heads: Sequence[int], qk: Sequence[int], v: Sequence[int]) -> Self:
        """Return the attention with only some heads.

        Args:
            heads: indices of the heads that stay.
            qk: query and key channels of each of them.
            v: value channels of each of them.
        """
        origin = None if self.origin is None else tuple(self.origin[head] for head in heads)
        return self.model_copy(update={"qk": tuple(qk), "v": tuple(v), "origin": origin})


class Mixture(Node):
    """Kernels that are mixed from the value and output projections of an attention, as SPViT trains them.

    `heads` is the number of heads that are mixed. `temperature` divides the logits of the mixture. `slots` gives the
    order of the nine columns of logits around a pixel: ``columns`` goes through the 3 x 3 window column by column
    (DeiT's order); ``centre`` has the center first and then the other eight in the same order (Swin's order).
    """

    heads: Size
    temperature: PositiveFloat
    slots: Literal["columns", "centre"] = "columns"

    @property
    def centre(self) -> int:
        """Index of the slot that reads the pixel itself."""
        return 4 if self.slots == "columns" else 0

    @property
    def offsets(self) -> tuple[tuple[int, int], ...]:
        """Offset (rows down, columns right) from a pixel to the pixel that each slot reads."""
        columns = [(slot % 3 - 1, slot // 3 - 1) for slot in range(9)]
        if self.slots == "centre":
            columns = [(0, 0), *(offset for offset in columns if offset != (0, 0))]
        return tuple(columns)


class Conv(Node):
    """A bottleneck convolution on the grid of patches, from the width to `width` channels, an activation, and back.

    It has three states. In evaluation, each computes the same function as the one before. With a `mixture`, its kernels
    are mixed from an attention's projections. Without a mixture, the kernels are plain tensors, and `norm` is true if
    there is a batch norm before the ReLU. Without both, it is two linear layers (`kernel` 1) or two convolutions (3).

    Attributes:
        kernel: rows and columns of the first convolution; the second is 1 x 1.
        width: channels between both; the rank of the map if there is no activation.
        prefix: output of the branch for prefix tokens, which have no position on the grid: their own normed input
            (``norm``), zero (``zero``), a constant for each of them that is a parameter of the model (``mean``), or
            what they read from all tokens with an attention of their own (``attention``).
        heads: that attention; None with any other `prefix`. In a plan it may be left out: it is then the attention that
            the convolution replaces.
        mixture: how kernels are mixed from an attention's projections; None if they are plain tensors.
        norm: whether there is a batch norm before the activation.
        act: ``relu``, as published, or ``none``. Without activation there is no norm and no mixture; the convolution is
            a linear map of its neighborhood.
    """

    kind: Literal["conv"] = "conv"
    kernel: Literal[1, 3]
    width: Size
    prefix: Literal["norm", "zero", "mean", "attention"] = "norm"
    heads: Attention | None = None
    mixture: Mixture | None = None
    norm: bool = False
    act: Literal["relu", "none"] = "relu"

    @model_validator(mode="after")
    def _normed(self) -> Self:
        if self.mixture is not None and not self.norm:
            raise ValueError("norm must be true where kernels are mixed, but is false; fold the mixture first")
        if self.act == "none" and (self.norm or self.mixture is not None):
            raise ValueError("a convolution without activation must have no norm and no mixture, but has one; drop it")
        if self.heads is not None and (self.prefix != "attention" or not self.heads.v):
            raise ValueError(
                f"heads must be those of an attention of prefix tokens, but {len(self.heads.v)} are given with "
                f"prefix={self.prefix}; leave them out, or set prefix=attention"
            )
        return self


def why_not_read(form: Form, prefix: int) -> str | None:
    """Return why prefix tokens cannot read with an attention beside a convolution, as a sentence; None if they can.

    The logits of such an attention are products of its input and of nothing else, so that keys need not be computed.

    Args:
        form: of the stage.
        prefix: number of prefix tokens.
    """
    if not prefix:
        return "only prefix tokens can read with an attention beside a convolution, but the model has none"
    if form.ties_qk or form.positions is not None or form.mixed_norm is not None:
        return (
            "prefix tokens can read beside a convolution only with an attention without norms and positions of its "
            "own, but this one has them; use prefix=mean"
        )
    return None


class Skip(Node):
    """No branch: the residual stream is unchanged.

    With ``leaves="norm"``, the normed residual stream is added to it, as in the released SPViT Swin models.
    """

    kind: Literal["skip"] = "skip"
    leaves: Literal["zero", "norm"] = "zero"


Mixer = Annotated[Attention | Conv | Skip, Field(discriminator="kind")]


class Block(Node):
    """One transformer block.

    Attributes:
        mixer: attention, convolution or skip.
        hidden: number of MLP neurons. With 0, the branch is its output bias; with None, there is no branch.
        rates: dropout rates in training.
        shifted: whether its attention windows are shifted against those of the block before.
        tokens: the token step of the block, which drops or merges tokens; None if it runs on all arriving tokens. The
            number of tokens never grows from block to block.
        only_prefix: whether queries, MLP and output are computed for the prefix tokens only. The last block can do this
            without changing any logit if the head of the model reads only prefix tokens.
    """

    mixer: Mixer
    hidden: Count | None
    rates: Rates = NO_RATES
    shifted: bool = False
    tokens: Step | None = None
    only_prefix: bool = False


def why_not_conv(block: Block, form: Form, prefix: int, patches: int, grid: tuple[int, int] | None) -> str | None:
    """Return why the convolution of a block cannot run, as a sentence; None if it can, or if there is none.

    Args:
        block: the block.
        form: of the stage.
        prefix: number of prefix tokens.
        patches: number of patches that the convolution gets.
        grid: rows and columns that they fill; None if some were dropped or merged.
    """
    conv = block.mixer
    if not isinstance(conv, Conv):
        return None
    if block.only_prefix or not patches:
        return "a convolution must have patches, but the block computes prefix tokens alone; keep attention here"
    if conv.kernel > 1 and grid is None:
        return (
            "a 3 x 3 convolution must have patches that fill a grid, but some were dropped or merged; keep attention "
            "here, or all patches, or take a 1 x 1 convolution"
        )
    if conv.prefix != "attention":
        return None
    if conv.heads is None:
        return "a convolution with prefix=attention must name the heads of that attention, but names none; add heads"
    if block.tokens is not None and block.tokens.adds_zeros:
        return (
            "prefix tokens can read beside a convolution only the tokens that are there, but an exact drop adds one; "
            "set exact=false, or use prefix=mean"
        )
    return why_not_read(form, prefix)
