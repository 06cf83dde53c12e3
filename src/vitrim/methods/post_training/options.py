"""What may be cut of one block, with losses from the calibration and costs from the budget.

H heads, K channels of a head, D width, M hidden neurons.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vitrim.cut.compensate import BlockChoice
from vitrim.cut.spend import power_law
from vitrim.methods.post_training.calibration import Calibration
from vitrim.methods.post_training.operators import convolutions, kernels_at, share_of
from vitrim.words.budget import Budget, Price
from vitrim.words.costs import block_cost
from vitrim.words.spec import Attention, Block, Conv, Stage
from vitrim.words.steps import Tokens

__all__ = ["ALL", "Group", "Kinds", "block_options", "chosen", "ways"]

_STEP, _STEP_HIDDEN, _WIDE = 8, 32, 512
"""Channels of a head are cut in steps of 8, neurons in steps of 32 if there are 512 or more, else of 8."""

_GONE = BlockChoice(heads=(), hidden=0)
"""Both branches of a block are constants."""

_NO_HEADS: dict[str, tuple[int, ...]] = {"qk": (), "v": ()}


@dataclass(frozen=True)
class Kinds:
    """Which kinds of cuts may be chosen.

    Attributes:
        operators: kernels of the convolutions that may stand in place of an attention.
        heads: whole heads, as long as one is left.
        widths: channels of heads, and neurons.
        depth: attention or MLP of a block becomes a constant, or both.
        images: number of images to which convolutions are fitted when a candidate is made.
    """

    operators: tuple[int, ...] = (3, 1)
    heads: bool = True
    widths: bool = True
    depth: bool = True
    images: int = 1 << 30

    @property
    def any(self) -> bool:
        """Return whether there is any choice besides tokens."""
        return bool(self.operators) or self.heads or self.widths or self.depth


ALL = Kinds()


@dataclass(frozen=True)
class Group:
    """The options for one block, or for its attention or its MLP alone.

    Attributes:
        choices: what each option keeps.
        losses: their losses from the table, nats.
        costs: their costs less that of the uncut block; one number for each bound of the budget, ``(O, C)``.
    """

    choices: list[BlockChoice] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    costs: list[tuple[int, ...]] = field(default_factory=list)

    def of(self, numbers: Sequence[int]) -> "Group":
        """Return only the options with these numbers."""
        return Group(
            [self.choices[number] for number in numbers],
            [self.losses[number] for number in numbers],
            [self.costs[number] for number in numbers],
        )


Prices = NDArray[np.int64]


def fair(losses: NDArray[np.float64], costs: Prices) -> NDArray[np.intp]:
    """Return the options of which no other is as good in loss and in every cost; of equal ones the first.

    Args:
        losses: ``(O,)``.
        costs: ``(O, C)``.
    """
    order = np.lexsort((*costs.T[::-1], losses))
    ranked = costs[order]
    if costs.shape[1] == 1:
        least = np.concatenate([[np.iinfo(np.int64).max], np.minimum.accumulate(ranked[:, 0])[:-1]])
        return order[ranked[:, 0] < least]
    below = (ranked[:, None, :] >= ranked[None, :, :]).all(axis=2)
    return order[~np.tril(below, -1).any(axis=1)]


def block_options(
    calibration: Calibration, path: str, block: Block, stage: Stage, arriving: Tokens, budget: Budget, kinds: Kinds
) -> Group:
    """Return all options for a block: those of attention with those of the MLP, and both gone at once.

    Args:
        calibration: losses of single cuts.
        path: path of the block.
        block: the block, with its token step.
        stage: the stage that contains it.
        arriving: the tokens at its input.
        budget: computes costs.
        kinds: which cuts may be chosen.
    """
    names = tuple(budget.bounds())
    whole = budget.block(block, stage, arriving)

    def relative(price: Price) -> tuple[int, ...]:
        return tuple(getattr(price, name) - getattr(whole, name) for name in names)

    first, counts = _attention(calibration, path, block, kinds)
    first.costs.extend(map(relative, _heads_priced(counts, block, stage, arriving, budget)))
    kernels = kernels_at(block, stage, arriving, kinds.operators, kinds.images)
    if kernels and isinstance(block.mixer, Attention):
        for conv, loss in _convolutions(calibration, path, stage, block.mixer, kernels):
            choice = BlockChoice(conv=conv)
            first.choices.append(choice)
            first.losses.append(loss)
            first.costs.append(relative(budget.block(chosen(block, choice), stage, arriving)))
    second, widths = _neurons(calibration, path, block, kinds)
    second.costs.extend(map(relative, _neurons_priced(widths, block, stage, arriving, budget)))
    gone = calibration.losses.get(f"{path}.block") if kinds.depth else None
    return _product(first, second, gone, relative(budget.block(chosen(block, _GONE), stage, arriving)))


def _product(first: Group, second: Group, gone: Sequence[float] | None, cost: tuple[int, ...]) -> Group:
    """Return every option of attention with every one of the MLP, and the block that is gone if its loss is known."""
    parts = []
    for group in (first, second):
        losses, costs = np.asarray(group.losses), np.asarray(group.costs, dtype=np.int64).reshape(len(group.losses), -1)
        kept = fair(losses, costs)
        parts.append((kept, losses[kept], costs[kept]))
    (one, a, x), (two, b, y) = parts
    losses, costs = (a[:, None] + b[None, :]).ravel(), (x[:, None, :] + y[None, :, :]).reshape(len(a) * len(b), -1)
    if gone is not None:
        losses, costs = np.append(losses, gone[0]), np.concatenate([costs, [cost]])
    found = Group()
    for option in fair(losses, costs).tolist():
        row, column = divmod(option, len(two))
        whole = option == len(one) * len(two)
        choice = _GONE if whole else _joined(first.choices[one[row]], second.choices[two[column]])
        found.choices.append(choice)
        found.losses.append(float(losses[option]))
        found.costs.append(tuple(costs[option].tolist()))
    return found


def _joined(attention: BlockChoice, mlp: BlockChoice) -> BlockChoice:
    return BlockChoice(**{**vars(attention), "hidden": mlp.hidden})


def ways(choice: BlockChoice) -> tuple[str, str]:
    """Return in words how attention and MLP are cut: ``whole``, ``narrow``, ``constant``, ``3 x 3`` or others."""
    mixer = "whole" if (choice.heads, choice.qk, choice.v) == (None, None, None) else "narrow"
    if choice.heads is not None:
        mixer = "fewer heads" if choice.heads else "constant"
    if choice.conv is not None:
        mixer = f"{choice.conv.kernel} x {choice.conv.kernel}"
    mlp = "whole" if choice.hidden is None else "narrow" if choice.hidden else "constant"
    return mixer, mlp


def chosen(block: Block, choice: BlockChoice) -> Block:
    """Return the block with the chosen widths."""
    mixer, hidden = block.mixer, block.hidden
    if choice.conv is not None:
        mixer = choice.conv
    elif isinstance(mixer, Attention):
        kept = range(len(mixer.v)) if choice.heads is None else choice.heads
        qk = tuple(choice.qk if isinstance(choice.qk, int) else mixer.qk[head] for head in kept)
        v = tuple(choice.v if isinstance(choice.v, int) else mixer.v[head] for head in kept)
        mixer = mixer.model_copy(update={"qk": qk, "v": v})
    if isinstance(choice.hidden, int):
        hidden = choice.hidden
    return block.model_copy(update={"mixer": mixer, "hidden": hidden})


# -- attention

Counts = list[tuple[int, int, int]]
"""For each option, the number of heads, and of all their channels of queries and of values."""


def _attention(calibration: Calibration, path: str, block: Block, kinds: Kinds) -> tuple[Group, Counts]:
    """Return the options for attention: numbers of whole heads, and equal widths of the remaining heads."""
    mixer, group, counts = block.mixer, Group(), Counts()
    if not isinstance(mixer, Attention):
        return Group([BlockChoice()], [0.0]), [(0, 0, 0)]
    *alone, together = calibration.losses.get(f"{path}.heads", (float("inf"),))
    order = sorted(range(len(alone)), key=alone.__getitem__)
    levels = {
        name: list(_levels(calibration, f"{path}.{name}", size[0], kinds.widths))
        for name, size in (("qk", mixer.qk), ("v", mixer.v))
    }
    for gone in range(len(alone)) if alone and kinds.heads else [0]:
        kept = tuple(sorted(set(range(len(mixer.v))) - set(order[:gone])))
        lost, share = _heads_loss([alone[head] for head in order], together, gone), len(kept) / len(mixer.v)
        for (qk, qk_loss), (v, v_loss) in itertools.product(levels["qk"], levels["v"]):
            group.choices.append(BlockChoice(heads=kept if gone else None, qk=qk, v=v))
            group.losses.append(lost + share * (qk_loss + v_loss))
            channels = (
                qk * len(kept) if qk else sum(mixer.qk[head] for head in kept),
                v * len(kept) if v else sum(mixer.v[head] for head in kept),
            )
            counts.append((len(kept), *channels))
    if kinds.depth and together < float("inf"):
        group.choices.append(BlockChoice(heads=()))
        group.losses.append(together)
        counts.append((0, 0, 0))
    return group, counts


def _convolutions(
    calibration: Calibration, path: str, stage: Stage, mixer: Attention, kernels: Sequence[int]
) -> Iterator[tuple[Conv, float]]:
    """Yield the convolutions that were measured in place of an attention, and their losses."""
    for kernel in kernels:
        name = f"{path}.conv{kernel}"
        losses = dict(zip(calibration.shares.get(name, ()), calibration.losses.get(name, ()), strict=True))
        for conv in convolutions(stage, mixer, kernel):
            if share_of(conv, stage.width) in losses:
                yield conv, losses[share_of(conv, stage.width)]


def _heads_loss(alone: Sequence[float], together: float, gone: int) -> float:
    """Return the loss by a power law between one head and all, at least the sum of the heads' own losses."""
    if not gone:
        return 0.0
    shares = [1 / (len(alone) + (len(alone) == 1)), 1.0]
    return max(power_law(shares, [alone[0], together], gone / len(alone)), sum(alone[:gone]))


def _levels(calibration: Calibration, path: str, size: int, cut: bool) -> Iterator[tuple[int | None, float]]:
    """Yield widths of a head and their losses; None leaves the width unchanged."""
    yield None, 0.0
    if cut and path in calibration.losses:
        for width in range((size - 1) // _STEP * _STEP, 0, -_STEP):
            yield width, power_law(calibration.shares[path], calibration.losses[path], 1 - width / size)


def _heads_priced(counts: Counts, block: Block, stage: Stage, arriving: Tokens, budget: Budget) -> list[Price]:
    """Return the price of each option; costs are linear in heads and channels if there is a head, times are not."""
    mixer = block.mixer
    if not isinstance(mixer, Attention):
        return [budget.block(block, stage, arriving) for _ in counts]

    def cost(qk: tuple[int, ...], v: tuple[int, ...]) -> Price:
        node = block.model_copy(update={"mixer": mixer.model_copy(update={"qk": qk, "v": v})})
        return Price(*block_cost(node, stage, arriving))

    none, one, more_qk, more_v = cost((), ()), cost((1,), (1,)), cost((2,), (1,)), cost((1,), (2,))
    two = cost((1, 1), (1, 1))

    def line(heads: int, qk: int, v: int) -> Price:
        if not heads:
            return none
        numbers = []
        for a, b, c, d in zip(one, more_qk, more_v, two, strict=True):
            head = d - b - c + a
            numbers.append(a + (qk - 1) * (b - a) + (v - 1) * (c - a) + (heads - 1) * head)
        return Price(*numbers)

    def nanoseconds_of(heads: int, qk: int, v: int) -> int:
        even = mixer.model_copy(
            update={"qk": (qk // heads,) * heads, "v": (v // heads,) * heads} if heads else _NO_HEADS
        )
        return budget.block(block.model_copy(update={"mixer": even}), stage, arriving).latency

    if budget.table is None:
        return [line(*each) for each in counts]
    return [line(*each)._replace(latency=nanoseconds_of(*each)) for each in counts]


# -- MLP


def _neurons(calibration: Calibration, path: str, block: Block, kinds: Kinds) -> tuple[Group, list[int | None]]:
    name, size, group = f"{path}.hidden", block.hidden, Group()
    widths: list[int | None] = []
    losses = calibration.losses.get(name) if size else None
    if not size or losses is None:
        return Group([BlockChoice()], [0.0]), [size]
    shares = calibration.shares[name]
    step = _STEP_HIDDEN if size >= _WIDE else _STEP
    between = range((size - 1) // step * step, 0, -step) if len(shares) > 1 and kinds.widths else ()
    for width in (size, *between, *((0,) if kinds.depth else ())):
        group.choices.append(BlockChoice(hidden=None if width == size else width))
        group.losses.append(power_law(shares, losses, 1 - width / size))
        widths.append(width)
    return group, widths


def _neurons_priced(
    widths: Sequence[int | None], block: Block, stage: Stage, arriving: Tokens, budget: Budget
) -> list[Price]:
    def cost(hidden: int | None) -> Price:
        return Price(*block_cost(block.model_copy(update={"hidden": hidden}), stage, arriving))

    none, one, two = cost(0), cost(1), cost(2)
    lines = [(a, b - a) for a, b in zip(one, two, strict=True)]
    found = [
        cost(None) if m is None else Price(*(a + (m - 1) * slope for a, slope in lines)) if m else none for m in widths
    ]
    if budget.table is None:
        return found
    times = [budget.block(block.model_copy(update={"hidden": m}), stage, arriving).latency for m in widths]
    return [price._replace(latency=time) for price, time in zip(found, times, strict=True)]
