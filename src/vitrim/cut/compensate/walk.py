"""Cut the blocks of a model in order, each with the outputs of the cut blocks before it, and re-fit what stays.

B images, N tokens, D width, K channels of a head, M hidden neurons.

Nothing is trained by gradient descent: every step is a closed form of moments of activations
(`vitrim.cut.compensate.closed_form`). Only layers that were cut are re-fitted. Re-fitting others, too, overfits to a
few hundred images (divergence 0.12 -> 0.15 to 0.22 after merging).

Memory: the images, their residual stream at one block (twice with alpha), the moments of one layer (M x M in float64)
and the token weights (two numbers for each token and block); 0.35 GiB in addition to the model for 256 images at 224
pixels and width 192.
"""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from vitrim.cut.compensate.attention import AttentionCut
from vitrim.cut.compensate.convs import RIDGE, ConvCut
from vitrim.cut.compensate.hear import arriving, passed
from vitrim.cut.compensate.importance import Importance, importances
from vitrim.cut.compensate.neurons import NeuronCut
from vitrim.cut.compensate.place import BlockChoice, Place, Widths
from vitrim.cut.surgery import apply
from vitrim.families import blocks_of, describe
from vitrim.nn import Attention, Block
from vitrim.nn.modes import evaluating
from vitrim.nn.stream import Residual
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Attention as AttentionSpec
from vitrim.words.spec import Block as BlockSpec

__all__ = ["Walk", "compensated", "cut_block", "recovered"]


def compensated(
    model: nn.Module,
    choices: Sequence[BlockChoice],
    images: Sequence[Tensor],
    worth: Mapping[str, Importance],
    *,
    strength: float = 1e-2,
    alpha: float = 0.0,
    ridge: float = RIDGE,
    advance: Callable[[float], None] = lambda _: None,
) -> tuple[Plan, dict[str, Tensor]]:
    """Cut and compensate.

    Args:
        model: an adopted model, dense in its widths; it may have token steps. It is not changed.
        choices: one for each block.
        images: batches ``(B, C, h, w)``.
        worth: the result of `importances` for this model and these images.
        strength: strength of the ridge, as a share of the mean diagonal of a layer's Gram matrix.
        alpha: share in the target of a re-fit of the output that restores the dense model's stream; the rest is the
            layer's own output before the cut. Must be 0 with merging because the streams have different tokens. In
            stages with windows it is used for MLPs and convolutions only.
        ridge: the same strength as `strength`, for convolutions in place of attention.
        advance: called with 1 after each block.

    Returns:
        A plan, and the child's parameters that are not slices of the parent's, by name.

    Raises:
        MethodError: if activations are constant or not finite; the message names the path.
    """
    names = {id(module): name for name, module in model.named_modules()}
    plans: list[BlockPlan] = []
    grafts: dict[str, Tensor] = {}
    with evaluating(model, frozen=True):
        walk = Walk(model, images, worth, strength, alpha)
        place = walk.first()
        for choice in choices:
            new, plan, state = cut_block(place, choice, ridge)
            plans.append(plan)
            grafts |= {f"{names[id(place.block)]}.{name}": value for name, value in state.items()}
            advance(1)
            if len(plans) < len(choices):
                place = walk.send(passed(new, place.streams))
    return Plan.of(describe(model), plans), grafts


class Walk:
    """Goes through the blocks of a model in order; the caller passes the input of each next block.

    Args:
        model, images, worth, strength, alpha: see `compensated`.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Sequence[Tensor],
        worth: Mapping[str, Importance],
        strength: float,
        alpha: float,
    ) -> None:
        self.model, self.images, self.worth = model, images, worth
        self.strength, self.alpha = strength, alpha
        spec = describe(model)
        self.rows = list(zip(blocks_of(model), spec.blocks(), spec.arrivals(), strict=True))
        self.blocks = [block for (_, block), _, _ in self.rows]
        self.at = -1
        self.dense: Sequence[Residual] | None = None

    def first(self) -> Place:
        """Return the first block with its input."""
        return self._step(None)

    def send(self, streams: Sequence[Residual]) -> Place:
        """Return the next block with its input, where `streams` are the outputs of the block before."""
        return self._step(streams)

    def _step(self, streams: Sequence[Residual] | None) -> Place:
        before = self.rows[self.at][1][1] if self.at >= 0 else None
        if self.alpha and self.dense is not None:
            self.dense = passed(self.rows[self.at][0][1], self.dense)
        self.at += 1
        (path, block), (_, stage, _), arrives = self.rows[self.at]
        if streams is None or stage is not before:
            # The stem, or patch merging between stages, is part of the host.
            streams = arriving(self.model, self.blocks, self.at, self.images, streams)
            if self.alpha:
                self.dense = arriving(self.model, self.blocks, self.at, self.images, self.dense)
        return Place(path, block, stage, arrives, self.worth, streams, self.dense, self.strength, self.alpha)


def cut_block(place: Place, choice: BlockChoice, ridge: float = RIDGE) -> tuple[Block, BlockPlan, dict[str, Tensor]]:
    """Return the new block, its part of the plan, and its new parameters."""
    block, node = place.block, place.block.spec
    state: dict[str, Tensor] = {}
    fields: dict[str, object] = {}
    mixer: object = node.mixer
    if choice.conv is not None:
        mixer, fields, state = ConvCut(place, ridge).cut(choice.conv)
    elif isinstance(block.attn, Attention) and (choice.heads, choice.qk, choice.v) != (None, None, None):
        mixer, kept, state = AttentionCut(place).cut(choice)
        fields |= kept
    width = node.hidden
    if node.hidden and choice.hidden is not None:
        half = place.rebuilt(mixer, node.hidden, state)
        fields["hidden"], more = NeuronCut(place, half).cut(choice.hidden)
        state |= more
        width = len(fields["hidden"])  # type: ignore[arg-type]
    return place.rebuilt(mixer, width, state), BlockPlan.model_validate(fields), state


def recovered(
    parent: nn.Module,
    plan: Plan,
    images: Sequence[Tensor],
    *,
    strength: float = 1e-2,
    alpha: float = 0.3,
    seed: int = 0,
    advance: Callable[[float], None] = lambda _: None,
) -> dict[str, Tensor]:
    """Compensate for the cuts of a plan of any method: projections, second MLP layers and queries are re-fitted.

    Args:
        parent: the model that the plan is for, with the weights to cut.
        plan: what to cut; its choice of channels is not changed.
        images: batches ``(B, C, h, w)``.
        strength: see `compensated`.
        alpha: see `compensated`; 0 is used if tokens are merged or chosen separately in each image.
        seed: seed of the labels drawn in `importances`.
        advance: called with 1 after each block.

    Returns:
        The re-fitted parameters of the child, for the `grafts` of `vitrim.cut.surgery.apply`.
    """
    spec = describe(parent)
    steps = [decision.model_copy(update={"qk": None, "v": None, "hidden": None}) for decision in plan.blocks()]
    base = apply(parent, Plan.of(spec, steps)) if any(step != BlockPlan() for step in steps) else parent
    nodes = [block for _, _, block in describe(base).blocks()]
    choices = [_choice(decision, node) for decision, node in zip(plan.blocks(), nodes, strict=True)]
    worth = importances(base, images, seed=seed)
    few = any(node.tokens is not None and not node.tokens.keeps_stream for node in nodes)
    alpha = 0.0 if few else alpha
    return compensated(base, choices, images, worth, strength=strength, alpha=alpha, advance=advance)[1]


def _choice(decision: BlockPlan, block: BlockSpec) -> BlockChoice:
    """Return the kept channels of a plan as a choice; a branch that is skipped in `block` has none."""
    qk: Widths = None
    v: Widths = None
    if isinstance(block.mixer, AttentionSpec) and (decision.qk is not None or decision.v is not None):
        kept_qk, kept_v = decision.heads(block.mixer)
        qk = None if kept_qk == tuple(tuple(range(k)) for k in block.mixer.qk) else kept_qk
        v = None if kept_v == tuple(tuple(range(k)) for k in block.mixer.v) else kept_v
    whole = decision.hidden is None or block.hidden is None or len(decision.hidden) == block.hidden
    return BlockChoice(qk=qk, v=v, hidden=None if whole else decision.hidden)
