"""Choose, from a calibration and for a budget, which patches to merge and the width of every part.

H heads, K channels of a head, M hidden neurons.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from vitrim.cut.compensate import BlockChoice
from vitrim.methods.post_training.calibration import Calibration
from vitrim.methods.post_training.knapsack import choose_options, power_law
from vitrim.methods.post_training.schedule import merging
from vitrim.words.budget import SLACK, Budget, Price
from vitrim.words.costs import block_cost
from vitrim.words.errors import BudgetError
from vitrim.words.spec import Attention, Block, Spec, Stage
from vitrim.words.steps import Tokens

__all__ = ["Reading", "least", "read_off"]

_TRIES = 8
"""Largest number of schedules tried, the best first, until one uses up the budget."""

_STEP, _STEP_HIDDEN, _WIDE = 8, 32, 512
"""Channels of a head are cut in steps of 8, neurons in steps of 32 if there are 512 or more, else of 8."""


@dataclass(frozen=True)
class Reading:
    """The choice for a budget.

    Attributes:
        merges: the schedule of merging, see `vitrim.methods.post_training.schedule.merging`.
        choices: widths of each block.
        loss: the sum of the table's losses, nats.
        exact: whether the last block computes only prefix tokens if it can.
    """

    merges: tuple[int, ...]
    choices: tuple[BlockChoice, ...]
    loss: float
    exact: bool


@dataclass(frozen=True)
class _Group:
    """The options for one part of a block.

    Attributes:
        choices: choices of widths of this part.
        losses: their losses from the table.
        counts: for each choice, the number of heads, of channels of queries and values together, or of neurons.
    """

    choices: list[BlockChoice]
    losses: list[float]
    counts: list[tuple[int, ...]]


def least(spec: Spec, merges: Sequence[Sequence[int]], exact: bool, budget: Budget) -> Price:
    """Return the cost of the smallest model that can be chosen."""
    found = []
    for counts in merges:
        small = merging(spec, counts, exact).child(spec)
        bare = [
            (block.model_copy(update={"mixer": _without(block.mixer), "hidden": 0 if block.hidden else block.hidden}))
            for _, _, block in small.blocks()
        ]
        found.append(budget.cost(_with(small, bare)))
    return Price(*map(min, zip(*found, strict=True)))


_NO_HEADS: dict[str, tuple[int, ...]] = {"qk": (), "v": ()}


def _without(mixer: object) -> object:
    return mixer.model_copy(update=_NO_HEADS) if isinstance(mixer, Attention) else mixer


def _with(spec: Spec, blocks: Sequence[Block]) -> Spec:
    rest = iter(blocks)
    stages = [stage.model_copy(update={"blocks": tuple(next(rest) for _ in stage.blocks)}) for stage in spec.stages]
    return spec.model_copy(update={"stages": tuple(stages)})


def read_off(calibration: Calibration, budget: Budget, *, merge: bool, widths: bool, exact: bool) -> Reading:
    """Return the schedule and widths with the least sum of losses within `budget`.

    For each measured schedule of merging, widths are allocated to the rest of the budget, at the costs that blocks have
    with that number of tokens. The choice with the least sum of both losses is returned.

    Args:
        calibration: calibration of the model.
        budget: limit on the child's cost.
        merge: whether patches may be merged.
        widths: whether widths may be cut.
        exact: whether the last block computes only prefix tokens if it can.

    Raises:
        BudgetError: naming the least possible cost, if nothing fits.
    """
    spec = calibration.spec
    parent = budget.cost(spec)
    rows = list(zip(calibration.merges, calibration.merged, strict=True))
    rows = rows if merge else rows[:1]
    check_reach(spec, [counts for counts, _ in rows], exact, budget, widths)
    # If the exact last block alone saves more than is needed, it is left out so that the budget is used up.
    ways = (True, False) if exact else (False,)
    found: list[Reading] = []
    for way in ways:
        found += [_spent(spec, one, budget) for one in _all(calibration, rows, way, budget, widths)[:_TRIES]]
        for one in found:
            if budget.spent(_priced(spec, one, budget), parent) >= 1 - SLACK:
                return one
    return found[0]


def _all(
    calibration: Calibration,
    rows: Sequence[tuple[tuple[int, ...], float]],
    exact: bool,
    budget: Budget,
    widths: bool,
) -> list[Reading]:
    """Return the best choice for each schedule, sorted by loss."""
    found = [_allocated(calibration, counts, loss, exact, budget, widths) for counts, loss in rows]
    return sorted((one for one in found if one is not None), key=lambda one: one.loss)


def check_reach(spec: Spec, merges: Sequence[Sequence[int]], exact: bool, budget: Budget, widths: bool) -> None:
    """Raise an error, before anything is measured, if no choice meets the budget.

    Raises:
        BudgetError: naming the least possible cost.
    """
    if widths:
        floor = least(spec, merges, exact, budget)
    else:
        costs = [budget.cost(merging(spec, counts, exact).child(spec)) for counts in merges]
        floor = Price(*map(min, zip(*costs, strict=True)))
    for name, limit in budget.limits(budget.cost(spec)).items():
        if getattr(floor, name) > limit:
            raise BudgetError(
                f"budget of {name} must be at least {getattr(floor, name):,} for this model, but got {limit:,}; "
                "allow more, or other kinds of cuts"
            )


def _allocated(
    calibration: Calibration,
    counts: tuple[int, ...],
    loss: float,
    exact: bool,
    budget: Budget,
    widths: bool,
) -> Reading | None:
    """Return widths for the budget that one schedule leaves; None if they cannot meet it."""
    small = merging(calibration.spec, counts, exact).child(calibration.spec)
    whole, limits = budget.cost(small), budget.limits(budget.cost(calibration.spec))
    room = [limit - getattr(whole, name) for name, limit in limits.items()]
    still = tuple(BlockChoice() for _ in counts)
    if not widths:
        return Reading(counts, still, loss, exact) if min(room) >= 0 else None
    places, groups, costs = [], [], []
    names = tuple(limits)
    for index, ((path, stage, block), arriving) in enumerate(zip(small.blocks(), small.arrivals(), strict=True)):
        for group, priced in ((_attention, _heads_priced), (_neurons, _neurons_priced)):
            options = group(calibration, path, block)
            if len(options.choices) > 1:
                places.append(index)
                groups.append(options)
                costs.append(
                    _costs(priced(options, block, stage, arriving, budget), block, stage, arriving, budget, names)
                )
    try:
        chosen = choose_options([options.losses for options in groups], costs, room)
    except BudgetError:
        return None
    choices = list(still)
    for index, options, number in zip(places, groups, chosen, strict=True):
        decided = {name: value for name, value in vars(options.choices[number]).items() if value is not None}
        choices[index] = BlockChoice(**{**vars(choices[index]), **decided})
        loss += options.losses[number]
    return Reading(counts, tuple(choices), loss, exact)


def _costs(
    priced: Sequence[Price], block: Block, stage: Stage, arriving: Tokens, budget: Budget, names: Sequence[str]
) -> list[list[int]]:
    """Return the cost of each option relative to the uncut block."""
    whole = budget.block(block, stage, arriving)
    return [[getattr(cost, name) - getattr(whole, name) for name in names] for cost in priced]


def _heads_priced(group: _Group, block: Block, stage: Stage, arriving: Tokens, budget: Budget) -> list[Price]:
    """Return the price of each choice; costs are linear in heads and channels if there is a head, times are not."""
    mixer = block.mixer
    assert isinstance(mixer, Attention)

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
        return [line(*counts) for counts in group.counts]
    return [line(*counts)._replace(latency=nanoseconds_of(*counts)) for counts in group.counts]


def _neurons_priced(group: _Group, block: Block, stage: Stage, arriving: Tokens, budget: Budget) -> list[Price]:
    def cost(hidden: int) -> Price:
        return Price(*block_cost(block.model_copy(update={"hidden": hidden}), stage, arriving))

    none, one, two = cost(0), cost(1), cost(2)
    lines = [(a, b - a) for a, b in zip(one, two, strict=True)]
    found = [Price(*(a + (m - 1) * slope for a, slope in lines)) if m else none for (m,) in group.counts]
    if budget.table is None:
        return found
    bare = [block.model_copy(update={"hidden": m}) for (m,) in group.counts]
    times = [budget.block(node, stage, arriving).latency for node in bare]
    return [price._replace(latency=time) for price, time in zip(found, times, strict=True)]


def _attention(calibration: Calibration, path: str, block: Block) -> _Group:
    """Return the options for attention: numbers of whole heads, and equal widths of the remaining heads."""
    mixer, group = block.mixer, _Group([], [], [])
    if not isinstance(mixer, Attention) or f"{path}.heads" not in calibration.losses:
        return group
    *alone, together = calibration.losses[f"{path}.heads"]
    order = sorted(range(len(alone)), key=alone.__getitem__)
    levels = {name: list(_levels(calibration, f"{path}.{name}", size[0])) for name, size in _sizes(mixer).items()}
    for gone in range(len(alone)) if alone else [0]:
        kept = tuple(sorted(set(range(len(mixer.v))) - set(order[:gone])))
        lost, share = _heads_loss([alone[head] for head in order], together, gone), len(kept) / len(mixer.v)
        for (qk, qk_loss), (v, v_loss) in itertools.product(levels["qk"], levels["v"]):
            group.choices.append(BlockChoice(heads=kept if gone else None, qk=qk, v=v))
            group.losses.append(lost + share * (qk_loss + v_loss))
            channels = (
                qk * len(kept) if qk else sum(mixer.qk[head] for head in kept),
                v * len(kept) if v else sum(mixer.v[head] for head in kept),
            )
            group.counts.append((len(kept), *channels))
    group.choices.append(BlockChoice(heads=()))
    group.losses.append(together)
    group.counts.append((0, 0, 0))
    return group


def _sizes(mixer: Attention) -> dict[str, tuple[int, ...]]:
    return {"qk": mixer.qk, "v": mixer.v}


def _heads_loss(alone: Sequence[float], together: float, gone: int) -> float:
    """Return the loss by a power law between one head and all, at least the sum of the heads' own losses."""
    if not gone:
        return 0.0
    shares = [1 / (len(alone) + (len(alone) == 1)), 1.0]
    return max(power_law(shares, [alone[0], together], gone / len(alone)), sum(alone[:gone]))


def _levels(calibration: Calibration, path: str, size: int) -> Iterator[tuple[int | None, float]]:
    """Yield widths of a head and their losses; None leaves the width unchanged."""
    yield None, 0.0
    if path in calibration.losses:
        for width in range((size - 1) // _STEP * _STEP, 0, -_STEP):
            yield width, power_law(calibration.shares[path], calibration.losses[path], 1 - width / size)


def _neurons(calibration: Calibration, path: str, block: Block) -> _Group:
    name, size, group = f"{path}.hidden", block.hidden, _Group([], [], [])
    if not size or name not in calibration.losses:
        return group
    shares, losses = calibration.shares[name], calibration.losses[name]
    step = _STEP_HIDDEN if size >= _WIDE else _STEP
    for width in (size, *(range((size - 1) // step * step, 0, -step) if len(shares) > 1 else ()), 0):
        group.choices.append(BlockChoice(hidden=None if width == size else width))
        group.losses.append(power_law(shares, losses, 1 - width / size))
        group.counts.append((width,))
    return group


# -- using up the rest of the budget


def _spent(spec: Spec, found: Reading, budget: Budget) -> Reading:
    """Add back single neurons, then single patches, as long as they fit; the budget is used up to `SLACK`."""
    parent = budget.cost(spec)
    for more in (_more_neurons, _fewer_merges):
        if budget.spent(_priced(spec, found, budget), parent) < 1 - SLACK:
            found = more(spec, found, budget)
    return found


def _priced(spec: Spec, found: Reading, budget: Budget) -> Price:
    small = merging(spec, found.merges, found.exact).child(spec)
    blocks = [_chosen(block, choice) for (_, _, block), choice in zip(small.blocks(), found.choices, strict=True)]
    return budget.cost(_with(small, blocks))


def _chosen(block: Block, choice: BlockChoice) -> Block:
    """Return the block with the chosen widths."""
    mixer, hidden = block.mixer, block.hidden
    if isinstance(mixer, Attention):
        kept = range(len(mixer.v)) if choice.heads is None else choice.heads
        qk = tuple(choice.qk if isinstance(choice.qk, int) else mixer.qk[head] for head in kept)
        v = tuple(choice.v if isinstance(choice.v, int) else mixer.v[head] for head in kept)
        mixer = mixer.model_copy(update={"qk": qk, "v": v})
    if isinstance(choice.hidden, int):
        hidden = choice.hidden
    return block.model_copy(update={"mixer": mixer, "hidden": hidden})


def _more_neurons(spec: Spec, found: Reading, budget: Budget) -> Reading:
    parent = budget.cost(spec)
    for index, (_, _, block) in enumerate(spec.blocks()):
        have, size = found.choices[index].hidden, block.hidden
        if not isinstance(have, int) or not have or not size:
            continue
        low, high = have, size
        while low < high:
            middle = (low + high + 1) // 2
            if budget.admits(_priced(spec, _replaced(found, index, middle), budget), parent):
                low = middle
            else:
                high = middle - 1
        found = _replaced(found, index, low)
    return found


def _replaced(found: Reading, index: int, hidden: int) -> Reading:
    choices = list(found.choices)
    choices[index] = BlockChoice(**{**vars(choices[index]), "hidden": hidden})
    return replace(found, choices=tuple(choices))


def _fewer_merges(spec: Spec, found: Reading, budget: Budget) -> Reading:
    """Merge one patch less in one block after another, as long as the budget allows."""
    parent, moved = budget.cost(spec), True
    while moved:
        moved = False
        for index, count in enumerate(found.merges):
            counts = (*found.merges[:index], count - 1, *found.merges[index + 1 :])
            fewer = replace(found, merges=counts)
            if count > 0 and budget.admits(_priced(spec, fewer, budget), parent):
                found, moved = fewer, True
    return found
