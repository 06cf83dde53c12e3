"""Choose, from a calibration and for a budget, which patches to merge and the width of every part.

H heads, K channels of a head, M hidden neurons.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from vitrim.cut.compensate import BlockChoice
from vitrim.cut.spend import Options, choose_options
from vitrim.methods.post_training.calibration import Calibration
from vitrim.methods.post_training.operators import convolutions, kernels_at
from vitrim.methods.post_training.options import ALL, Group, Kinds, block_options, chosen, ways
from vitrim.methods.post_training.schedule import merging
from vitrim.words.budget import SLACK, Budget, Price
from vitrim.words.errors import BudgetError
from vitrim.words.plan import Plan
from vitrim.words.spec import Attention, Block, Spec, Stage
from vitrim.words.steps import Tokens

__all__ = ["Reading", "Tabled", "check_reach", "least", "plan_of", "priced", "read_off", "spent_up"]

_TRIES = 8
"""Largest number of schedules tried, the best first, until one uses up the budget."""


@dataclass(frozen=True)
class Reading:
    """The choice for a budget.

    Attributes:
        merges: the schedule of merging, see `vitrim.methods.post_training.schedule.merging`.
        choices: widths of each block.
        loss: the sum of the table's losses, nats.
        exact: whether the last block computes only prefix tokens if it can.
        schedule: the measured schedule that `merges` was made from.
    """

    merges: tuple[int, ...]
    choices: tuple[BlockChoice, ...]
    loss: float
    exact: bool
    schedule: tuple[int, ...] = ()


def least(spec: Spec, merges: Sequence[Sequence[int]], exact: bool, budget: Budget, kinds: Kinds = ALL) -> Price:
    """Return the cost of the smallest model that can be chosen."""
    found = []
    for counts in merges:
        small = merging(spec, counts, exact).child(spec)
        found.append(budget.cost(_with(small, [_least(block, kinds) for _, _, block in small.blocks()])))
        if kinds.operators:
            here = zip(small.blocks(), small.arrivals(), strict=True)
            nodes = [_convolving(block, stage, arriving, kinds) for (_, stage, block), arriving in here]
            found.append(budget.cost(_with(small, nodes)))
    return Price(*map(min, zip(*found, strict=True)))


def _least(block: Block, kinds: Kinds) -> Block:
    mixer = block.mixer
    heads = len(mixer.v) if isinstance(mixer, Attention) else 0
    if kinds.depth:
        return chosen(block, BlockChoice(heads=(), hidden=0 if block.hidden else None))
    choice = BlockChoice(
        heads=(0,) if kinds.heads and heads else None,
        qk=1 if kinds.widths and heads else None,
        v=1 if kinds.widths and heads else None,
        hidden=1 if kinds.widths and block.hidden else None,
    )
    return chosen(block, choice)


def _convolving(block: Block, stage: Stage, arriving: Tokens, kinds: Kinds) -> Block:
    """Return the smallest block with its smallest convolution, if it can have one."""
    small, kernels = _least(block, kinds), kernels_at(block, stage, arriving, kinds.operators, kinds.images)
    if not kernels or not isinstance(block.mixer, Attention):
        return small
    convs = convolutions(stage, block.mixer, min(kernels))
    return small.model_copy(update={"mixer": convs[-1]}) if convs else small


def _with(spec: Spec, blocks: Sequence[Block]) -> Spec:
    rest = iter(blocks)
    stages = [stage.model_copy(update={"blocks": tuple(next(rest) for _ in stage.blocks)}) for stage in spec.stages]
    return spec.model_copy(update={"stages": tuple(stages)})


class Tabled(Options):
    """Cuts with losses from a calibration: one choice for each block, and one schedule of merging for all.

    Args:
        calibration: calibration of the model.
        merge: whether patches may be merged.
        exact: whether the last block computes only prefix tokens if it can.
        kinds: which other cuts may be chosen.
    """

    def __init__(self, calibration: Calibration, *, merge: bool, exact: bool, kinds: Kinds = ALL) -> None:
        self.calibration, self.kinds = calibration, kinds
        rows = list(zip(calibration.merges, calibration.merged, strict=True))
        self.rows, self.exact = rows if merge else rows[:1], exact
        self._known: dict[object, tuple[Spec, list[Group], list[int]]] = {}

    def spent(self, spec: Spec, budget: Budget) -> Plan:
        """Return the plan of the best choice. New bases of channels and neurons are given as the first ones."""
        return plan_of(spec, self.best(budget, 1)[0])

    def best(self, budget: Budget, count: int) -> list[Reading]:
        """Return the best choices, at most one for each schedule, the least sum of losses first.

        For each measured schedule of merging, choices of the blocks are allocated to the rest of the budget, at the
        costs that blocks have with that number of tokens.

        Raises:
            BudgetError: naming the least possible cost, if nothing fits.
        """
        spec = self.calibration.spec
        parent = budget.cost(spec)
        check_reach(spec, [counts for counts, _ in self.rows], self.exact, budget, self.kinds)
        rest: list[Reading] = []
        # If the exact last block alone saves more than is needed, it is left out so that the budget is used up.
        for exact in (True, False) if self.exact else (False,):
            found = [self._allocated(counts, loss, exact, budget) for counts, loss in self.rows]
            ranked = sorted((one for one in found if one is not None), key=lambda one: one.loss)
            close: list[Reading] = []
            for one in ranked[: max(count, _TRIES)]:
                full = spent_up(spec, one, budget)
                used = budget.spent(priced(spec, full, budget), parent) >= 1 - SLACK
                (close if used else rest).append(full)
                if len(close) == count:
                    break
            if close:
                return close
        if not rest:
            raise BudgetError(f"a budget must be one that these options meet, but none meets {budget}; allow more")
        return rest[:1]

    def swaps(self, reading: Reading, budget: Budget) -> list[tuple[Reading, str]]:
        """Return choices in which one part of one block is cut in another way, the least predicted loss first.

        The rest of the budget is allocated again over all blocks, with the same schedule of merging.

        Returns:
            Each choice, and the block and the way of its cut in words.
        """
        spec = self.calibration.spec
        loss = dict(self.rows)[reading.schedule]
        small, groups, room = self._priced(reading.schedule, reading.exact, budget)
        found: dict[Reading, str] = {}
        for index, ((path, _, _), group) in enumerate(zip(small.blocks(), groups, strict=True)):
            for part, now in enumerate(ways(reading.choices[index])):
                for way in sorted({ways(choice)[part] for choice in group.choices} - {now}):
                    own = [number for number, choice in enumerate(group.choices) if ways(choice)[part] == way]
                    parts = [*groups[:index], group.of(own), *groups[index + 1 :]]
                    one = self._chosen(reading.schedule, loss, reading.exact, parts, room)
                    if one is None:
                        continue
                    full = spent_up(spec, one, budget)
                    if budget.spent(priced(spec, full, budget), budget.cost(spec)) >= 1 - SLACK:
                        found.setdefault(full, f"{path}: {('attention', 'MLP')[part]} {way}")
        return sorted(found.items(), key=lambda pair: pair[0].loss)

    def _priced(self, counts: tuple[int, ...], exact: bool, budget: Budget) -> tuple[Spec, list[Group], list[int]]:
        """Return the model with its tokens merged, the options of its blocks, and what may be added to its costs."""
        key = (counts, exact, tuple(budget.bounds().items()))
        if key not in self._known:
            spec = self.calibration.spec
            small = merging(spec, counts, exact).child(spec)
            whole, limits = budget.cost(small), budget.limits(budget.cost(spec))
            groups = [
                block_options(self.calibration, path, block, stage, arriving, budget, self.kinds)
                for (path, stage, block), arriving in zip(small.blocks(), small.arrivals(), strict=True)
            ]
            self._known[key] = small, groups, [limit - getattr(whole, name) for name, limit in limits.items()]
        return self._known[key]

    def _allocated(self, counts: tuple[int, ...], loss: float, exact: bool, budget: Budget) -> Reading | None:
        """Return choices for the budget that one schedule leaves; None if they cannot meet it."""
        _, groups, room = self._priced(counts, exact, budget)
        return self._chosen(counts, loss, exact, groups, room)

    def _chosen(
        self, counts: tuple[int, ...], loss: float, exact: bool, groups: Sequence[Group], room: Sequence[int]
    ) -> Reading | None:
        try:
            picked = choose_options([group.losses for group in groups], [group.costs for group in groups], room)
        except BudgetError:
            return None
        loss += sum(group.losses[number] for group, number in zip(groups, picked, strict=True))
        choices = tuple(group.choices[number] for group, number in zip(groups, picked, strict=True))
        return Reading(counts, choices, loss, exact, counts)


def read_off(calibration: Calibration, budget: Budget, *, merge: bool, exact: bool, kinds: Kinds = ALL) -> Reading:
    """Return the schedule and choices with the least sum of losses within `budget`; see `Tabled`.

    Raises:
        BudgetError: naming the least possible cost, if nothing fits.
    """
    return Tabled(calibration, merge=merge, exact=exact, kinds=kinds).best(budget, 1)[0]


def plan_of(spec: Spec, reading: Reading) -> Plan:
    """Return the plan of a choice. New bases of channels, and neurons, are given as the first ones."""
    blocks = []
    for step, choice, (_, _, block) in zip(
        merging(spec, reading.merges, reading.exact).blocks(), reading.choices, spec.blocks(), strict=True
    ):
        update: dict[str, object] = {}
        mixer = block.mixer
        if choice.conv is not None:
            update["mixer"] = choice.conv
        elif isinstance(mixer, Attention) and (choice.heads, choice.qk, choice.v) != (None, None, None):
            alive = range(len(mixer.v)) if choice.heads is None else choice.heads
            for name, width in (("qk", choice.qk), ("v", choice.v)):
                sizes = getattr(mixer, name)
                update[name] = tuple(
                    tuple(range(width if isinstance(width, int) else size)) if head in alive else ()
                    for head, size in enumerate(sizes)
                )
        if isinstance(choice.hidden, int) and block.hidden:
            update["hidden"] = tuple(range(choice.hidden))
        blocks.append(step.model_copy(update=update))
    return Plan.of(spec, blocks)


def check_reach(spec: Spec, merges: Sequence[Sequence[int]], exact: bool, budget: Budget, kinds: Kinds = ALL) -> None:
    """Raise an error, before anything is measured, if no choice meets the budget.

    Raises:
        BudgetError: naming the least possible cost.
    """
    floor = least(spec, merges, exact, budget, kinds)
    for name, limit in budget.limits(budget.cost(spec)).items():
        if getattr(floor, name) > limit:
            raise BudgetError(
                f"budget of {name} must be at least {getattr(floor, name):,} for this model, but got {limit:,}; "
                "allow more, or other kinds of cuts"
            )


# -- using up the rest of the budget


def spent_up(spec: Spec, found: Reading, budget: Budget) -> Reading:
    """Add back single neurons, then single patches, as long as they fit; the budget is used up to `SLACK`."""
    parent = budget.cost(spec)
    for more in (_more_neurons, _fewer_merges):
        if budget.spent(priced(spec, found, budget), parent) < 1 - SLACK:
            found = more(spec, found, budget)
    return found


def priced(spec: Spec, found: Reading, budget: Budget) -> Price:
    """Return the cost of the child of a choice."""
    small = merging(spec, found.merges, found.exact).child(spec)
    blocks = [chosen(block, choice) for (_, _, block), choice in zip(small.blocks(), found.choices, strict=True)]
    return budget.cost(_with(small, blocks))


def _more_neurons(spec: Spec, found: Reading, budget: Budget) -> Reading:
    parent = budget.cost(spec)
    for index, (_, _, block) in enumerate(spec.blocks()):
        have, size = found.choices[index].hidden, block.hidden
        if not isinstance(have, int) or not have or not size:
            continue
        low, high = have, size
        while low < high:
            middle = (low + high + 1) // 2
            if budget.admits(priced(spec, _replaced(found, index, middle), budget), parent):
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
            if count > 0 and budget.admits(priced(spec, fewer, budget), parent):
                found, moved = fewer, True
    return found
