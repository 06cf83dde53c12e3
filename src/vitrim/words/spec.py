"""What a model is: a tree of frozen values, from the host down to the width of every head.

D width of the residual stream, N tokens, P patches, H heads, K channels of a head, M hidden neurons.

A place has one path everywhere, in a spec, a plan, a report and an error: ``stages.0.blocks.3.hidden``.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from vitrim.words.plain import Node
from vitrim.words.steps import Drop, Flow, GridMerge, Merge, Step, Tokens, TopK, flow_of, lost, spans

__all__ = [
    "Attention",
    "Block",
    "Conv",
    "Drop",
    "Form",
    "GridMerge",
    "Host",
    "Merge",
    "Mixer",
    "Mixture",
    "Norm",
    "Skip",
    "Spec",
    "Stage",
    "Step",
    "Tokens",
    "TopK",
    "Window",
    "folded",
    "spans",
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
    attention_drop: Annotated[float, Field(ge=0, lt=1)] = 0.0
    drop: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @property
    def factors(self) -> int:
        """Linear layers from the width to the hidden neurons: 2 where a gate multiplies them, else 1."""
        return 1 if self.mlp == "plain" else 2


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

    `shifted`: whether it attends in windows that lie across those of the block before. `tokens`: the patches that it
    runs on, or what becomes of its tokens, None for all that arrive; from block to block they can only become fewer.
    `only_prefix`: whether the prefix tokens alone ask, go through the MLP and leave, which the last block of a model
    whose head reads nothing else may do without changing any logit.
    """

    mixer: Mixer
    hidden: NonNegativeInt | None
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    shifted: bool = False
    tokens: Step | None = None
    only_prefix: bool = False

    def unseen(self) -> str | None:
        """What is wrong with a token step that reads an attention which is not there; None if nothing is."""
        living = isinstance(self.mixer, Attention) and len(self.mixer.v) > 0
        if self.tokens is None or not self.tokens.attends or living:
            return None
        return "tokens are chosen by the attention of their block, which must keep a head, but it keeps none"


class Window(Node):
    """Attention within windows of the grid, with one learned bias for each head and each offset inside a window.

    `size` is the window as it lies on the grid. `always`: whether windows keep their size, and shift, where the grid is
    smaller. `dynamic`: whether the grid may change from image to image.
    """

    size: tuple[PositiveInt, PositiveInt]
    always: bool = False
    dynamic: bool = False

    @property
    def area(self) -> int:
        """Tokens of one window: the keys that a query meets."""
        return self.size[0] * self.size[1]

    @property
    def offsets(self) -> int:
        """Offsets between two tokens of one window: the biases of one head."""
        return (2 * self.size[0] - 1) * (2 * self.size[1] - 1)

    def padded(self, grid: tuple[int, int]) -> tuple[int, int]:
        """The grid that whole windows cover."""
        (rows, columns), (high, wide) = grid, self.size
        return -(-rows // high) * high, -(-columns // wide) * wide

    def shift(self, grid: tuple[int, int]) -> tuple[int, int]:
        """How far the windows of a shifted block lie from those of the others, in rows and columns."""
        (rows, columns), (high, wide) = grid, self.size
        return high // 2 if self.always or rows > high else 0, wide // 2 if self.always or columns > wide else 0


class Stage(Node):
    """A run of blocks at one width and one grid of patches; prefix tokens come before the patches.

    With a `window` there are no prefix tokens, and no token can be cut: windows, shifts and the merging of patches need
    the whole grid.
    """

    width: PositiveInt
    grid: tuple[PositiveInt, PositiveInt]
    prefix: NonNegativeInt
    form: Form
    blocks: tuple[Block, ...]
    window: Window | None = None

    @model_validator(mode="after")
    def _windows(self) -> Self:
        if self.window is not None and self.prefix:
            raise ValueError(f"prefix must be 0 where attention is windowed, but got {self.prefix}")
        if self.window is None and any(block.shifted for block in self.blocks):
            raise ValueError("a shifted block must be in a stage with a window, but this one has none")
        return self

    @model_validator(mode="after")
    def _shrink(self) -> Self:
        last = len(self.blocks) - 1
        if self.window is not None:
            if any(block.tokens or block.only_prefix for block in self.blocks):
                raise ValueError(f"tokens: {NO_WINDOWS}")
            return self
        here = self.enters
        for index, block in enumerate(self.blocks):
            wrong = lost(block.tokens, here, self.patches) or torn(block, here, self) or block.unseen()
            if wrong is not None:
                raise ValueError(f"blocks.{index}.tokens: {wrong}")
            if block.only_prefix and (index < last or not self.prefix):
                raise ValueError(
                    f"blocks.{index}.only_prefix: only the last block of a stage with prefix tokens may leave the "
                    f"patches behind, but this is block {index} of {last + 1} with {self.prefix} prefix tokens"
                )
            here = flow_of(block.tokens, here, self.patches, block.only_prefix).leaves
        return self

    @property
    def patches(self) -> int:
        """Places of the grid."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Tokens that enter the first block."""
        return self.patches + self.prefix

    @property
    def enters(self) -> Tokens:
        """The tokens before the first block."""
        return Tokens(self.prefix, self.patches, self.grid)

    def flows(self) -> list[Flow]:
        """The tokens at each part of every block."""
        flows, here = [], self.enters
        for block in self.blocks:
            flows.append(flow_of(block.tokens, here, self.patches, block.only_prefix))
            here = flows[-1].leaves
        return flows

    def arrivals(self) -> list[Tokens]:
        """The tokens at the input of each block."""
        return [self.enters, *(flow.leaves for flow in self.flows())][: len(self.blocks)]

    @property
    def leaves(self) -> Tokens:
        """The tokens after the last block."""
        return self.flows()[-1].leaves if self.blocks else self.enters


NO_WINDOWS = (
    "token cuts are not possible on windowed attention: windows, shifts and the merging of patches need the whole "
    "grid; cut heads, channels and neurons"
)


def torn(block: Block, arriving: Tokens, stage: Stage) -> str | None:
    """What is wrong with a convolution where patches are missing, in words; None if nothing is."""
    if not isinstance(block.mixer, Conv):
        return None
    if block.only_prefix or block.tokens is not None or (stage.window is None and arriving.grid != stage.grid):
        return (
            "a convolution must have the whole grid, but patches were dropped or merged; keep attention here, or all "
            "patches"
        )
    return None


class Host(Node):
    """All that is not a block: whose model it is, how to build it, and what it costs.

    `macs` and `params` were counted on the host itself, `macs_per_token` is what its head spends on each token that
    leaves the last block (attention pooling).
    """

    name: str
    arguments: dict[str, Any]
    macs: NonNegativeInt
    macs_per_token: NonNegativeInt = 0
    params: NonNegativeInt
    pretrained: dict[str, Any] = Field(default_factory=dict)


class Spec(Node):
    """A whole model. Equal specs are models of one structure."""

    family: str
    host: Host
    image: tuple[PositiveInt, PositiveInt]
    classes: NonNegativeInt
    stages: tuple[Stage, ...]

    def blocks(self) -> list[tuple[str, Stage, Block]]:
        """Every block with its path and its stage, in order."""
        return [
            (f"stages.{i}.blocks.{j}", stage, block)
            for i, stage in enumerate(self.stages)
            for j, block in enumerate(stage.blocks)
        ]

    def flows(self) -> list[Flow]:
        """The tokens at each part of every block, in the order of `blocks`."""
        return [flow for stage in self.stages for flow in stage.flows()]

    def arrivals(self) -> list[Tokens]:
        """The tokens at the input of each block, in the order of `blocks`."""
        return [arriving for stage in self.stages for arriving in stage.arrivals()]


def folded(spec: Spec) -> Spec:
    """The spec of the same model with every convolution in its last state, two plain layers."""
    plain = {"mixture": None, "norm": False}
    stages = tuple(
        stage.model_copy(
            update={
                "blocks": tuple(
                    block.model_copy(update={"mixer": block.mixer.model_copy(update=plain)})
                    if isinstance(block.mixer, Conv)
                    else block
                    for block in stage.blocks
                )
            }
        )
        for stage in spec.stages
    )
    return spec.model_copy(update={"stages": stages})
