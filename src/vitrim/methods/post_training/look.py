"""Cut, compensate and measure the best candidates, then swap options of single blocks while it helps.

Predictions are sums of single losses. They choose which candidates are tried; what is measured chooses the result.
"""

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.cut.compensate import Importance, Place, Walk, cut_block, importances, passed
from vitrim.cut.surgery import apply
from vitrim.families import describe
from vitrim.measure import latency
from vitrim.methods.post_training.budgets import Reading, Tabled, plan_of
from vitrim.methods.post_training.notes import Notes
from vitrim.methods.post_training.options import ways
from vitrim.methods.post_training.probe import Precision, precision_for
from vitrim.methods.post_training.schedule import merging
from vitrim.methods.post_training.sensitivity import divergence, logits_of
from vitrim.nn import Block
from vitrim.nn.modes import evaluating
from vitrim.train.machine import autocast
from vitrim.words.budget import Budget
from vitrim.words.costs import cost_of
from vitrim.words.plain import dump
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.table import Machine

__all__ = ["Bench", "Cut", "Trial", "clock_of", "look", "record_of", "won"]

LATE = 0.05
"""Share by which a measured time may exceed the bound, as in a run's own measurement of its child."""

_SECONDS = 2.0
"""Time for the timing of one candidate."""

_FAR = 2.0
"""Candidates whose predicted loss is this many times the least are not tried."""


@dataclass(frozen=True)
class Cut:
    """A model that was cut and compensated.

    Attributes:
        plan: the plan, without token steps.
        grafts: the child's parameters that are not slices of the parent's, by name.
    """

    plan: Plan
    grafts: Mapping[str, Tensor]


@dataclass(frozen=True)
class Trial:
    """One measured candidate.

    Attributes:
        reading: the choice.
        what: ``candidate``, or the block and the part that was swapped.
        loss: divergence from the dense output on the probe images, nats.
        ratio: measured time over that of the dense model; None if it was not measured.
    """

    reading: Reading
    what: str
    loss: float
    ratio: float | None


@dataclass(frozen=True)
class _Row:
    """A block of a cut model: where the walk stands, its input, and what came of it."""

    walk: Walk
    place: Place
    block: Block
    plan: BlockPlan
    state: Mapping[str, Tensor]


class Bench:
    """Cuts and measures candidates of one model on one set of images.

    Blocks before the first one that differs from the candidate before are not cut again. For this, the residual stream
    at every block is kept: 116 MiB for 64 images at 224 pixels, 12 blocks and width 192.

    Args:
        model: an adopted model; not modified.
        images: batches for statistics.
        probe: batches of other images, on which losses are measured.
        seed: seed of drawn labels.
        strength: strength of the ridge.
        alpha: share of a refit's target that corrects the stream, without merging.
        clock: function that measures the time of a child over that of the model; None not to.
        precision: of the passes that weigh tokens, see `vitrim.methods.post_training.probe`.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Sequence[Tensor],
        probe: Sequence[Tensor],
        *,
        seed: int,
        strength: float,
        alpha: float,
        clock: Callable[[nn.Module], float] | None = None,
        precision: Precision = "fp32",
    ) -> None:
        self.precision = precision_for(precision, model)
        self.model, self.images, self.probe, self.clock = model, images, probe, clock
        self.seed, self.strength, self.alpha = seed, strength, alpha
        self.spec = describe(model)
        self._dense: Tensor | None = None
        self._base: tuple[Any, nn.Module, dict[str, Importance]] | None = None
        self._rows: tuple[Any, Reading, list[_Row]] | None = None

    def cut(self, reading: Reading, advance: Callable[[float], None] = lambda _: None) -> Cut:
        """Cut and compensate a candidate.

        Args:
            reading: the choice.
            advance: called with 1 after each block.
        """
        base, worth = self._merged(reading)
        names = {id(module): name for name, module in base.named_modules()}
        rows = self._alike(reading)
        advance(len(rows))
        with evaluating(base, frozen=True):
            for choice in reading.choices[len(rows) :]:
                if rows:
                    walk = copy.copy(rows[-1].walk)
                    place = walk.send(passed(rows[-1].block, rows[-1].place.streams))
                else:
                    walk = Walk(base, self.images, worth, self.strength, 0.0 if any(reading.merges) else self.alpha)
                    place = walk.first()
                rows.append(_Row(walk, place, *cut_block(place, choice)))
                advance(1)
        self._rows = ((reading.merges, reading.exact), reading, rows)
        grafts = {f"{names[id(row.place.block)]}.{name}": value for row in rows for name, value in row.state.items()}
        return Cut(Plan.of(describe(base), [row.plan for row in rows]), grafts)

    def measured(self, reading: Reading) -> tuple[float, float | None]:
        """Return the loss of a candidate and, with a clock, its time."""
        cut = self.cut(reading)
        child = apply(self._merged(reading)[0], cut.plan, grafts=cut.grafts).eval()
        if self._dense is None:
            self._dense = logits_of(self.model, self.probe)
        loss = divergence(self._dense, logits_of(child, self.probe))
        return loss, None if self.clock is None else self.clock(child)

    def _merged(self, reading: Reading) -> tuple[nn.Module, dict[str, Importance]]:
        """Return the model with its tokens merged, and the importance of its tokens."""
        key = (reading.merges, reading.exact)
        if self._base is None or self._base[0] != key:
            steps = merging(self.spec, *key)
            base = apply(self.model, steps) if steps != Plan.keep(self.spec) else self.model
            with autocast(next(base.parameters()).device, self.precision):
                worth = importances(base, self.images, seed=self.seed)
            self._base = (key, base, worth)
        return self._base[1:]

    def _alike(self, reading: Reading) -> list[_Row]:
        """Return the blocks of the candidate before, up to the first that differs."""
        if self._rows is None or self._rows[0] != (reading.merges, reading.exact):
            return []
        _, last, rows = self._rows
        same = 0
        while same < len(rows) and last.choices[same] == reading.choices[same]:
            same += 1
        return rows[:same]


def look(
    tabled: Tabled,
    budget: Budget,
    bench: Bench,
    *,
    count: int,
    swaps: int,
    notes: Notes,
    advance: Callable[[float], None] = lambda _: None,
) -> list[Trial]:
    """Measure the best candidates and swaps of them.

    Args:
        tabled: the options.
        budget: limit on the child's cost.
        bench: cuts and measures.
        count: largest number of candidates, at most one for each schedule of merging.
        swaps: largest number of swaps that are measured after them.
        notes: measured trials, which are not measured again.
        advance: called with 1 after each trial.

    Returns:
        All trials in order; the one that won is given by `won`.
    """
    candidates = tabled.best(budget, count)
    near = [one for one in candidates if one.loss <= _FAR * candidates[0].loss + 1e-9]
    total, trials = len(near) + swaps, list[Trial]()

    def tried(reading: Reading, what: str) -> Trial:
        loss, ratio = notes.of(_name(reading, bench), lambda: bench.measured(reading))
        trials.append(Trial(reading, what, loss, ratio))
        advance(1)
        return trials[-1]

    for reading in near:
        tried(reading, "candidate")
    best, seen = won(trials, budget), {one.reading for one in trials}
    while len(trials) < total:
        for reading, what in _fresh(tabled.swaps(best.reading, budget), seen):
            seen.add(reading)
            tried(reading, what)
            if won(trials, budget) is trials[-1] or len(trials) == total:
                break
        else:
            break
        best = won(trials, budget)
    return trials


def won(trials: Sequence[Trial], budget: Budget) -> Trial:
    """Return the trial with the least loss of those whose measured time is within the budget, if any is."""
    limit = (1 + LATE) * (budget.latency or 1.0)
    soon = [trial for trial in trials if trial.ratio is None or budget.latency is None or trial.ratio <= limit]
    return min(soon or trials, key=lambda trial: trial.loss)


def _fresh(moves: Sequence[tuple[Reading, str]], seen: set[Reading]) -> Iterator[tuple[Reading, str]]:
    return (move for move in moves if move[0] not in seen)


def _name(reading: Reading, bench: Bench) -> str:
    """Return a name for the measurement of a candidate on a bench's images."""
    text = json.dumps([asdict(reading), sum(map(len, bench.images))], sort_keys=True, default=dump)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def clock_of(model: nn.Module, machine: Machine) -> Callable[[nn.Module], float]:
    """Return a function that measures the time of a child over that of the model, as the table was measured."""

    def ratio(child: nn.Module) -> float:
        found = latency(
            child,
            model,
            batch=machine.batch,
            threads=machine.threads,
            dtype=getattr(torch, machine.dtype),
            seconds=_SECONDS,
            compiled=machine.runtime == "compile",
            as_stored=machine.as_stored,
        ).ratio
        assert found is not None
        return found

    return ratio


def record_of(number: int, trial: Trial, best: bool, tabled: Tabled) -> dict[str, Any]:
    """Return a flat record of a trial."""
    reading = trial.reading
    spec = plan_of(tabled.calibration.spec, reading).child(tabled.calibration.spec)
    return {
        "stage": "post_training",
        "trial": number,
        "what": trial.what,
        "merges": list(reading.merges),
        "ways": [" / ".join(ways(choice)) for choice in reading.choices],
        "predicted": reading.loss,
        "loss": trial.loss,
        "ratio": trial.ratio,
        "macs": cost_of(spec).macs,
        "best": best,
    }
