"""Budgets of time: the table that they are planned with, and the measurement that they are held to."""

import functools
import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitrim import __version__
from vitrim.cut.fill import fill
from vitrim.cut.observe import axes
from vitrim.deploy.runtimes import ready
from vitrim.families import describe
from vitrim.measure import Latency, latency
from vitrim.measure.model import image_of
from vitrim.measure.parts import machine_of, make_table
from vitrim.measure.turns import name_of, turns
from vitrim.methods import Found
from vitrim.run.recipe import Measure
from vitrim.words.budget import Budget
from vitrim.words.errors import BudgetError, ExportError, VitrimError
from vitrim.words.plain import load, read_json, write_text
from vitrim.words.table import FORMAT, Table

__all__ = ["CLOSE", "Met", "clocked", "meet", "table_for"]

CLOSE = 0.05
"""How far from its budget a child may be measured, as a share of it."""

_TRIES = 5
"""Children that are measured before the best of them is taken or all are refused."""

_READINGS = 6
"""Budgets of macs that are tried for one of latency."""


def table_for(model: nn.Module, settings: Measure, *, say: Callable[[str], None] = lambda _: None) -> Table:
    """The table of `model` on this machine: made once, then read from the cache.

    For ``onnxruntime`` and ``openvino`` it is that of eager PyTorch, whose blocks need no export: it is off by more
    there, and what is measured in the runtime itself corrects it (`meet`).

    The cache is ``$VITRIM_CACHE``, else ``~/.cache/vitrim``; a file of it is named by the structure of the model, the
    device, batch, threads, type, runtime, the versions of PyTorch and vitrim and the format of the table, so that none
    of them is taken for another.

    Args:
        model: an adopted dense model.
        settings: how it is measured.
        say: told before something takes long.
    """
    given: dict[str, Any] = {
        "batch": settings.batch,
        "threads": settings.threads,
        "dtype": None if settings.dtype is None else getattr(torch, settings.dtype),
        "compiled": settings.runtime == "compile",
        "as_stored": settings.as_stored,
    }
    machine = machine_of(model, **given)
    about = [f"vitrim {__version__}, format {FORMAT}", describe(model).model_dump_json(), machine.model_dump_json()]
    key = hashlib.sha256("\n".join(about).encode()).hexdigest()[:20]
    folder = Path(os.environ.get("VITRIM_CACHE") or Path.home() / ".cache" / "vitrim")
    path = folder / "latency" / f"{key}.json"
    if path.is_file():
        say(f"reading the table of times {path}")
        return load(Table, read_json(path, BudgetError), BudgetError, at=str(path))
    say(f"making a table of times on {machine}")
    table = make_table(model, seconds=settings.seconds, **given)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, table.model_dump_json())
    return table


def clocked(child: nn.Module, parent: nn.Module, settings: Measure) -> Latency:
    """Time `child` in turns with its parent, as `settings` say.

    Raises:
        ExportError: if the runtime is not installed or cannot take a model.
    """
    if settings.runtime in ("onnxruntime", "openvino"):
        return _exported(child, parent, settings)
    return latency(
        child,
        parent,
        batch=settings.batch,
        threads=settings.threads,
        dtype=None if settings.dtype is None else getattr(torch, settings.dtype),
        seconds=settings.seconds,
        compiled=settings.runtime == "compile",
        as_stored=settings.as_stored,
    )


def _exported(child: nn.Module, parent: nn.Module, settings: Measure) -> Latency:
    """The same in a runtime that reads ONNX, on the CPU in float32."""
    if settings.dtype not in (None, "float32"):
        raise ExportError(
            f"{settings.runtime} must run in float32, but measure.dtype is {settings.dtype}; leave it out"
        )
    image = image_of(parent)
    images = torch.randn(settings.batch, *image, generator=torch.Generator().manual_seed(0))
    nets = [
        ready(net, images, settings.runtime, threads=settings.threads, as_stored=settings.as_stored)
        for net in (child, parent)
    ]
    taken = turns([functools.partial(net.run, images) for net in nets], seconds=settings.seconds)
    return Latency.of(
        taken.samples,
        repeats=taken.repeats,
        batch=settings.batch,
        image=image,
        threads=settings.threads or torch.get_num_threads(),
        dtype="float32",
        device=name_of(images.device),
        as_stored=settings.as_stored,
    )


@dataclass(frozen=True, kw_only=True)
class Met:
    """A child that meets a budget of time.

    Attributes:
        found: what the method found.
        child: the cut model.
        ratio: its measured time over its parent's.
        predicted: the same by the table.
        measured: how many children were timed.
    """

    found: Found
    child: nn.Module
    ratio: float
    predicted: float
    measured: int


def meet(
    parent: nn.Module,
    budget: Budget,
    search: Callable[[Budget], Found],
    cut: Callable[[Found], nn.Module],
    clock: Callable[[nn.Module], Latency],
    *,
    timed: bool,
    say: Callable[[str], None] = lambda _: None,
) -> Met:
    """Plan by the table, measure, and plan again where the table was off.

    Args:
        parent: the dense model.
        budget: with a bound of latency, and a table.
        search: what finds a plan for a budget.
        cut: what makes the child.
        clock: what times the child in turns with its parent.
        timed: whether `search` plans by the table itself; it is given a budget of macs otherwise.
        say: told of each measurement.

    Raises:
        BudgetError: if no child comes within 5 % of the budget or below it; with the fastest there was.
    """
    assert budget.latency is not None
    planner = _Planner(parent=parent, budget=budget, search=search, timed=timed)
    aim, tried = budget.latency, list[Met]()
    while len(tried) < _TRIES:
        found = planner.at(aim)
        child = cut(found)
        predicted = planner.predicted(found)
        ratio = _steady(clock(child), budget)
        tried.append(Met(found=found, child=child, ratio=ratio, predicted=predicted, measured=len(tried) + 1))
        say(f"planned for {aim:.3f} of the time, the table says {predicted:.3f}, measured {ratio:.3f}")
        if abs(ratio - budget.latency) <= CLOSE * budget.latency:
            break
        # The table may be off by a factor; what is asked of it moves by as much.
        aim = min(max(aim * budget.latency / ratio, 0.01), 1.0)
        if any(abs(math.log(aim / asked)) < 0.005 for asked in planner.asked):
            break
    within = [met for met in tried if met.ratio <= (1 + CLOSE) * budget.latency]
    if not within:
        best = min(met.ratio for met in tried)
        raise BudgetError(
            f"budget of latency must be met within {CLOSE:.0%} on {budget.table and budget.table.machine}, but of "
            f"{len(tried)} children the fastest takes {best:.3f} of the dense time, not {budget.latency:g}; allow more"
        )
    best_met = max(within, key=lambda met: met.ratio)
    if best_met.ratio < (1 - CLOSE) * budget.latency:
        say(f"no plan lies nearer to {budget.latency:g} of the time than {best_met.ratio:.3f}, which is faster")
    return replace(best_met, measured=len(tried))


def _steady(taken: Latency, budget: Budget) -> float:
    """The measured ratio, if the machine was quiet enough to tell it.

    Raises:
        BudgetError: with the spread, if twice the median's standard error is more than what a budget is met within.
    """
    assert taken.ratio is not None
    assert taken.ratio_low is not None
    assert taken.ratio_high is not None
    # 2.56 standard deviations lie between the percentiles; a median errs 1.25 times as much as a mean.
    error = 1.25 * (taken.ratio_high - taken.ratio_low) / 2.56 / math.sqrt(taken.runs)
    if 2 * error > CLOSE * taken.ratio:
        raise BudgetError(
            f"times must repeat within {CLOSE:.0%} for a budget of latency={budget.latency:g}, but on this machine "
            f"{taken.runs} samples of the ratio lie from {taken.ratio_low:.3f} to {taken.ratio_high:.3f}; stop other "
            "work, raise measure.seconds, or bound macs"
        )
    return taken.ratio


class _Planner:
    """Finds a plan whose child takes a share of the time by the table."""

    def __init__(self, *, parent: nn.Module, budget: Budget, search: Callable[[Budget], Found], timed: bool) -> None:
        self.parent, self.budget, self.search, self.timed = parent, budget, search, timed
        self.spec = describe(parent)
        self.dense = budget.cost(self.spec)
        self.asked: list[float] = []
        self.last: Found | None = None

    def predicted(self, found: Found) -> float:
        """The child's time over the parent's, by the table."""
        return self.budget.cost(found.plan.child(self.spec)).latency / self.dense.latency

    def at(self, share: float) -> Found:
        """A plan at `share` of the parent's time."""
        self.asked.append(share)
        if self.timed:
            return self._found(self.budget.model_copy(update={"latency": share}))
        return self._by_macs(share)

    def _found(self, budget: Budget) -> Found:
        again = None if self.last is None else self.last.again
        self.last = self.search(budget) if again is None else again(budget)
        return self.last

    def _by_macs(self, share: float) -> Found:
        """Try budgets of macs until the table gives `share`.

        Time is nearly a straight line in macs for cuts of one kind: from the dense model through each child that was
        tried goes the line on which the next budget is read.
        """
        macs, best = self._first(share), None
        low, high = 0.0, 1.0
        for _ in range(_READINGS):
            found = self._found(self._of_macs(macs))
            time = self.predicted(found)
            if time <= share and (best is None or time > best[0]):
                best = (time, found)
            if share * (1 - CLOSE / 2) <= time <= share:
                break
            low, high = (macs, high) if time < share else (low, macs)
            slope = (1 - time) / max(1 - macs, 1e-6)
            macs = 1 - (1 - share * (1 - CLOSE / 8)) / max(slope, 1e-6)
            if not low < macs < high:
                macs = (low + high) / 2
        if best is None:
            raise BudgetError(
                f"budget of latency must be one that a budget of macs reaches, but at macs={macs:.3f} the table says "
                f"{time:.3f} of the time, not {share:.3f}; allow more"
            )
        return best[1]

    def _first(self, share: float) -> float:
        """The share of macs that even cuts leave at `share` of the time."""
        budget = Budget(latency=share, table=self.budget.table)
        scores = {path: torch.zeros(axis.size) for path, axis in axes(self.parent).items()}
        try:
            plan = fill(self.spec, scores, budget, choice="even")
        except VitrimError:
            return share
        return self.budget.cost(plan.child(self.spec)).macs / self.dense.macs

    def _of_macs(self, macs: float) -> Budget:
        limits = self.budget.limits(self.dense)
        most = limits.get("macs", self.dense.macs) / self.dense.macs
        return self.budget.model_copy(update={"macs": min(macs, most), "latency": None, "table": None})
