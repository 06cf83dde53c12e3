"""Description of a model: a tree of frozen values, from the whole model down to the width of every head.

D width of the residual stream, N tokens, P patches, H heads, K channels of a head, M hidden neurons.

A part of a model has the same path in a spec, a plan, a report and an error: ``stages.0.blocks.3.hidden``.
"""

from collections.abc import Sequence
from typing import Any, Self

from pydantic import Field, model_validator

from vitrim.words.block import (
    NO_RATES,
    Attention,
    Block,
    Conv,
    Form,
    Mixer,
    Mixture,
    Norm,
    Rates,
    Relative,
    Rotary,
    Skip,
    why_not_conv,
)
from vitrim.words.plain import Frozen, FrozenDict, Node
from vitrim.words.sizes import MOST_BLOCKS, MOST_STAGES, Count, Size, Total
from vitrim.words.steps import Flow, Step, Tokens, flow_of, why_not_tokens

__all__ = [
    "NO_RATES",
    "NO_WINDOWS",
    "Attention",
    "Block",
    "ChannelCost",
    "Conv",
    "Form",
    "Host",
    "Mixer",
    "Mixture",
    "Norm",
    "Rates",
    "Relative",
    "Rotary",
    "Skip",
    "Spec",
    "Stage",
    "Window",
    "between",
    "folded",
    "why_not_any_size",
    "why_not_blocks",
    "why_not_mixed",
    "why_not_only_prefix",
    "why_not_placed",
]


def between(grid: tuple[int, int]) -> int:
    """Return the number of offsets between two places of a grid."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1)


class Window(Node):
    """Attention within windows of the grid, with one learned bias for each head and each offset inside a window.

    Attributes:
        size: rows and columns of a window.
        always: whether windows keep their size, and are shifted, even if the grid is smaller than a window.
        dynamic: whether the grid may change from image to image.
        network: hidden neurons of the network that gives the biases (Swin V2); None if they are a table.
        trained: rows and columns of the window in whose units the network measures offsets; None for `size`.
    """

    size: tuple[Size, Size]
    always: bool = False
    dynamic: bool = False
    network: Size | None = None
    trained: tuple[Size, Size] | None = None

    @property
    def area(self) -> int:
        """Number of tokens of one window, which are the keys of each query."""
        return self.size[0] * self.size[1]

    @property
    def offsets(self) -> int:
        """Number of offsets between two tokens of one window, which is the number of biases of one head."""
        return between(self.size)

    def padded(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Return the grid, rounded up to whole windows."""
        (rows, columns), (high, wide) = grid, self.size
        return -(-rows // high) * high, -(-columns // wide) * wide

    def shift(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Return by how many rows and columns the windows of a shifted block are shifted."""
        (rows, columns), (high, wide) = grid, self.size
        return high // 2 if self.always or rows > high else 0, wide // 2 if self.always or columns > wide else 0


class Stage(Node):
    """Consecutive blocks with one width and one grid of patches; prefix tokens come before the patches.

    A stage with a `window` has no prefix tokens. Its tokens cannot be cut because windows, shifts and patch merging
    need the whole grid.
    """

    width: Size
    grid: tuple[Size, Size]
    prefix: Count
    form: Form
    blocks: tuple[Block, ...] = Field(max_length=MOST_BLOCKS)
    window: Window | None = None

    @model_validator(mode="after")
    def _windows(self) -> Self:
        if self.window is not None and self.prefix:
            raise ValueError(f"prefix must be 0 where attention is windowed, but got {self.prefix}")
        if self.window is None and any(block.shifted for block in self.blocks):
            raise ValueError("a shifted block must be in a stage with a window, but this one has none")
        return self

    @model_validator(mode="after")
    def _positions(self) -> Self:
        if isinstance(self.form.positions, Relative) and (self.window is not None or self.prefix > 1):
            raise ValueError(
                f"relative positions must be of patches without windows and at most one class token, but there are "
                f"{self.prefix} prefix tokens"
            )
        return self

    @model_validator(mode="after")
    def _tokens(self) -> Self:
        wrong = why_not_blocks(self)
        if wrong is not None:
            raise ValueError(f"blocks.{wrong[0]}: {wrong[1]}")
        return self

    @property
    def patches(self) -> int:
        """Number of patches of the grid."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens(self) -> int:
        """Number of tokens before the first block."""
        return self.patches + self.prefix

    @property
    def of_a_head(self) -> tuple[int, int]:
        """Multiply-accumulates and parameters of a head besides those of its channels: its biases and its scale."""
        scale, (offsets, network, more) = int(self.form.cosine), self._biases
        return (0, scale + offsets + more) if network is None else (offsets * network, scale + network + more)

    @property
    def of_an_attention(self) -> tuple[int, int]:
        """Multiply-accumulates and parameters that all heads of an attention share: the network of biases."""
        offsets, network, _ = self._biases
        return (0, 0) if network is None else (2 * offsets * network, 3 * network)

    @property
    def _biases(self) -> tuple[int, int | None, int]:
        """Offsets with a bias for each head, neurons of the network that gives them, and other parameters of a head."""
        positions = self.form.positions
        if self.window is not None:
            return self.window.offsets, self.window.network, 0
        if not isinstance(positions, Relative) or not positions.own:
            return 0, None, 0
        if positions.network is None:
            return between(self.grid), None, 3 * self.prefix
        return between(self.grid), positions.network, int(not positions.bounded)

    @property
    def enters(self) -> Tokens:
        """The tokens before the first block."""
        return Tokens(self.prefix, self.patches, self.grid)

    def flows(self) -> list[Flow]:
        """Return the tokens at each part of every block."""
        flows, here = [], self.enters
        for block in self.blocks:
            flows.append(flow_of(block.tokens, here, self.patches, block.only_prefix))
            here = flows[-1].leaves
        return flows

    def arrivals(self) -> list[Tokens]:
        """Return the tokens at the input of each block."""
        return [self.enters, *(flow.leaves for flow in self.flows())][: len(self.blocks)]

    @property
    def leaves(self) -> Tokens:
        """The tokens after the last block."""
        return self.flows()[-1].leaves if self.blocks else self.enters


NO_WINDOWS = (
    "token cuts are not possible on windowed attention: windows, shifts and the merging of patches need the whole "
    "grid; cut heads, channels and neurons"
)


def why_not_mixed(stage: Stage) -> str | None:
    """Return why tokens of a stage cannot be merged, or chosen image by image, as a sentence; None if they can."""
    if stage.window is not None:
        return NO_WINDOWS
    if stage.form.positions is None:
        return None
    return (
        f"tokens must keep their places, because this model's attention has {stage.form.positions.kind} positions, and "
        "merged tokens, or those that each image chooses, have no place that is known; drop patches at fixed places, "
        "or cut heads and neurons"
    )


def why_not_placed(step: Step | None, stage: Stage) -> str | None:
    """Return why `step` does not fit the positions that the attention of `stage` needs; None if it does."""
    if step is None or stage.form.positions is None:
        return None
    if not step.keeps_stream:
        return why_not_mixed(stage)
    if step.adds_zeros and not stage.form.one_key_for_zeros:
        return (
            "exact must be false where missing patches have different logits, but this model's attention has "
            f"{stage.form.positions.kind} positions that tell them apart; leave exact out"
        )
    return None


def why_not_blocks(stage: Stage) -> tuple[str, str] | None:
    """Return the path (``3.tokens``) and a sentence on the first block whose tokens are not valid; None if all are."""
    here = stage.enters
    for index, block in enumerate(stage.blocks):
        if stage.window is not None:
            if block.tokens is not None or block.only_prefix:
                return f"{index}.tokens", NO_WINDOWS
            wrong = why_not_conv(block, stage.form, stage.prefix, stage.patches, stage.grid)
            if wrong is not None:
                return f"{index}.mixer", wrong
            continue
        wrong = why_not_tokens(block.tokens, here, stage.patches) or _why_not_step(block)
        wrong = wrong or why_not_placed(block.tokens, stage)
        if wrong is not None:
            return f"{index}.tokens", wrong
        wrong = why_not_only_prefix(block, index, stage)
        if wrong is not None:
            return f"{index}.only_prefix", wrong
        flow = flow_of(block.tokens, here, stage.patches, block.only_prefix)
        wrong = why_not_conv(block, stage.form, stage.prefix, flow.mixed.patches, flow.mixed.grid)
        if wrong is not None:
            return f"{index}.mixer", wrong
        here = flow.leaves
    return None


def why_not_only_prefix(block: Block, index: int, stage: Stage) -> str | None:
    """Return why block `index` of `stage` cannot compute only prefix tokens, if `block` does; None if it can."""
    if not block.only_prefix or (index == len(stage.blocks) - 1 and stage.prefix):
        return None
    return (
        "only_prefix is possible only in the last block of a model with prefix tokens, but this is block "
        f"{index} of {len(stage.blocks)} with {stage.prefix} prefix tokens"
    )


def _why_not_step(block: Block) -> str | None:
    """Return why the token step of a block does not fit the other parts of that block; None if it does."""
    if block.tokens is None:
        return None
    if block.only_prefix and block.tokens.after_attention:
        return (
            f"a block that computes only prefix tokens has no patches after its attention, but a '{block.tokens.kind}' "
            "step acts there; leave one of the two out"
        )
    if block.tokens.needs_attention and not (isinstance(block.mixer, Attention) and block.mixer.v):
        return "tokens are chosen by the attention of their block, which must keep a head, but it keeps none"
    return None


def why_not_any_size(stage: Stage) -> tuple[str, str] | None:
    """Return the path and a sentence on the first block that needs a fixed image size; None if there is none."""
    for index, block in enumerate(stage.blocks):
        wrong = None if block.tokens is None else block.tokens.why_not_any_size()
        if wrong is not None:
            return f"{index}.tokens", wrong
        if isinstance(block.mixer, Conv) and block.mixer.kernel > 1:
            return f"{index}.mixer", (
                "a 3 x 3 convolution must know the grid, but dynamic_img_size is on; build the model without it"
            )
    return None


class ChannelCost(Node):
    """What one channel of the residual stream of a stage costs outside the blocks.

    `macs`, `macs_per_token` and `params` are per channel of the stage. `next_macs` and `next_params` are per channel of
    the stage and channel of the next stage (patch merging).
    """

    macs: Total
    macs_per_token: Total = 0
    params: Total
    next_macs: Total = 0
    next_params: Total = 0


class Host(Node):
    """Everything outside the blocks: the name of the model, the arguments to build it, and its cost.

    `macs` and `params` were counted on the model without its blocks. `macs_per_token` is the cost of the head for each
    token after the last block (attention pooling). `channels` says, for each stage, how these depend on the width of
    the residual stream; if it is empty, that width cannot be cut. Two hosts are equal if they differ only in dropout
    rates, in the metadata of their pretrained weights, or in `channels` and the argument ``pool_width``, which follow
    from the rest.
    """

    name: str
    arguments: Frozen
    macs: Total
    macs_per_token: Total = 0
    params: Total
    pretrained: Frozen = FrozenDict()
    channels: tuple[ChannelCost, ...] = ()

    def narrowed(self, before: Sequence[int], after: Sequence[int]) -> Self:
        """Return the host of the same model with other widths of the residual stream.

        Args:
            before: D of each stage.
            after: the new D of each stage.
        """
        costs = {name: getattr(self, name) for name in ("macs", "macs_per_token", "params")}
        for index, one in enumerate(self.channels):
            for name in costs:
                costs[name] += getattr(one, name) * (after[index] - before[index])
            if index + 1 < len(self.channels):
                pairs = after[index] * after[index + 1] - before[index] * before[index + 1]
                costs["macs"] += one.next_macs * pairs
                costs["params"] += one.next_params * pairs
        return self.model_copy(update=costs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Host) and self._structure() == other._structure()

    def __hash__(self) -> int:
        return hash(self._structure())

    def _structure(self) -> tuple[Any, ...]:
        """Return all fields except dropout rates, timm's metadata of the pretrained weights, and what follows."""
        aside = ("drop_rate", "pool_width")
        arguments = FrozenDict({key: value for key, value in self.arguments.items() if not key.endswith(aside)})
        return self.name, arguments, self.macs, self.macs_per_token, self.params


class Spec(Node):
    """A whole model. Models with equal specs have the same structure."""

    family: str
    host: Host
    image: tuple[Size, Size]
    classes: Count
    stages: tuple[Stage, ...] = Field(min_length=1, max_length=MOST_STAGES)

    def blocks(self) -> list[tuple[str, Stage, Block]]:
        """Return every block with its path and its stage, in order."""
        return [
            (f"stages.{i}.blocks.{j}", stage, block)
            for i, stage in enumerate(self.stages)
            for j, block in enumerate(stage.blocks)
        ]

    def flows(self) -> list[Flow]:
        """Return the tokens at each part of every block, in the order of `blocks`."""
        return [flow for stage in self.stages for flow in stage.flows()]

    def arrivals(self) -> list[Tokens]:
        """Return the tokens at the input of each block, in the order of `blocks`."""
        return [arriving for stage in self.stages for arriving in stage.arrivals()]


def folded(spec: Spec) -> Spec:
    """Return the spec of the same model with every convolution folded to its last state, two plain layers."""
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
