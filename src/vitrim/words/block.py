"""What a block is: attention, convolution or nothing, then an MLP, with widths for each part.

D width of the residual stream, H heads, K channels of a head, M hidden neurons.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from vitrim.words.plain import Node
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
    "Rates",
    "Skip",
]


class Norm(Node):
    """A normalisation layer, by the name of its class in ``timm.layers`` or ``torch.nn``."""

    name: str
    eps: float
    weight: bool = True
    bias: bool = True

    def params(self, width: int) -> int:
        """Parameters of this norm over `width` channels."""
        return width * (self.weight + self.bias)


class Form(Node):
    """What the blocks of one stage have in common besides their widths.

    `head_norm` is the norm over the channels of each query and key head, `mixed_norm` the one over all heads' outputs
    together, `hidden_norm` the one over the hidden neurons. A norm ties the channels it runs over: cutting one of them
    would change the statistics of the others, so those channels can only be cut together with the whole branch.
    `inner_norm` runs over the width, before the first layer of the MLP, and ties nothing.
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
    head_norm_width: NonNegativeInt = 0
    mixed_norm: Norm | None = None
    hidden_norm: Norm | None = None

    @property
    def factors(self) -> int:
        """Linear layers from the width to the hidden neurons: 2 where a gate multiplies them, else 1."""
        return 1 if self.mlp == "plain" else 2


Rate = Annotated[float, Field(ge=0, le=1)]


class Rates(Node):
    """How often training drops something in a block, each in [0, 1].

    Attributes:
        attention: attention weights.
        projection: outputs of the projection after attention.
        hidden: neurons of the MLP.
        output: outputs of the MLP.
        attention_path: the whole branch of the attention, for an image (stochastic depth).
        mlp_path: the whole branch of the MLP, for an image.

    They belong to the training of a model, not to its structure, so all rates compare equal.
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
"""Nothing is dropped."""


class Attention(Node):
    """Self-attention with one query/key width and one value width for each living head.

    A head without channels does not exist. Without heads the branch is a constant, its output bias. `scale` multiplies
    the logits; after a cut it stays that of the dense parent, whatever the widths are.
    """

    kind: Literal["attention"] = "attention"
    qk: tuple[PositiveInt, ...]
    v: tuple[PositiveInt, ...]
    scale: PositiveFloat

    @model_validator(mode="after")
    def _heads(self) -> Self:
        if len(self.qk) != len(self.v):
            raise ValueError(f"qk and v must name the same heads, but got {len(self.qk)} and {len(self.v)}")
        return self


class Mixture(Node):
    """Kernels that are mixed from the value and output projections of an attention, as they are trained (SPViT).

    `heads` are those that are mixed, `temperature` divides the logits of the mixture. `slots` says where the nine
    columns of logits lie around a pixel: ``columns`` goes down one column of the 3 x 3 window after another (DeiT's
    order), ``centre`` takes its centre first and then the other eight so (Swin's).
    """

    heads: PositiveInt
    temperature: PositiveFloat
    slots: Literal["columns", "centre"] = "columns"

    @property
    def centre(self) -> int:
        """The slot that reads the pixel itself."""
        return 4 if self.slots == "columns" else 0

    @property
    def offsets(self) -> tuple[tuple[int, int], ...]:
        """Rows down and columns right from a pixel to the one that each slot reads."""
        columns = [(slot % 3 - 1, slot // 3 - 1) for slot in range(9)]
        if self.slots == "centre":
            columns = [(0, 0), *(offset for offset in columns if offset != (0, 0))]
        return tuple(columns)


class Conv(Node):
    """A bottleneck convolution on the grid of patches, from the width to `width` channels, ReLU, and back.

    It comes in three states, each in evaluation the function of the one before: with a `mixture` its kernels are mixed
    from an attention's projections; without, they are plain tensors, and `norm` says whether a batch norm stands before
    the ReLU; without both it is two linear layers (`kernel` 1) or two convolutions (3).

    `prefix`: what the branch gives prefix tokens, which have no place on the grid: their own normed input (``norm``),
    or nothing (``zero``).
    """

    kind: Literal["conv"] = "conv"
    kernel: Literal[1, 3]
    width: PositiveInt
    prefix: Literal["norm", "zero"] = "norm"
    mixture: Mixture | None = None
    norm: bool = False

    @model_validator(mode="after")
    def _normed(self) -> Self:
        if self.mixture is not None and not self.norm:
            raise ValueError("norm must be true where kernels are mixed, but is false; fold the mixture first")
        return self


class Skip(Node):
    """No branch: the residual stream passes by; ``leaves="norm"`` adds its normed self (released SPViT Swins)."""

    kind: Literal["skip"] = "skip"
    leaves: Literal["zero", "norm"] = "zero"


Mixer = Annotated[Attention | Conv | Skip, Field(discriminator="kind")]


class Block(Node):
    """One transformer block; `hidden` counts MLP neurons: 0 leaves the output bias, None leaves no branch.

    `rates`: what training drops in it. `shifted`: whether it attends in windows that lie across those of the block
    before. `tokens`: the patches that it runs on, or what becomes of its tokens, None for all that arrive; from block
    to block they can only become fewer. `only_prefix`: whether queries, MLP and output are computed for the prefix
    tokens alone, which the last block of a model whose head reads nothing else may do without changing any logit.
    """

    mixer: Mixer
    hidden: NonNegativeInt | None
    rates: Rates = NO_RATES
    shifted: bool = False
    tokens: Step | None = None
    only_prefix: bool = False
