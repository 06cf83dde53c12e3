"""Latency budgets: the table of times used to plan a cut, and the measurement used to check it."""

import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from vitrim import __version__
from vitrim.cut.fill import fill
from vitrim.cut.observe import axes
from vitrim.deploy.runtimes import READS_ONNX, ready
from vitrim.families import describe
from vitrim.measure import Latency, latency
from vitrim.measure.model import image_of
from vitrim.measure.parts import machine_of, make_table
from vitrim.measure.turns import name_of, turns
from vitrim.methods import Found
from vitrim.run.recipe import Measure
from vitrim.words.budget import Budget
from vitrim.words.cache import cache_folder
from vitrim.words.errors import BudgetError, ExportError, VitrimError
from vitrim.words.plain import load, read_json, write_text
from vitrim.words.table import FORMAT, TimeTable

__all__ = ["CLOSE", "Met", "meet", "table_for", "time_child"]

CLOSE = 0.05
"""Allowed distance of a child's measured time from the budget, as a share of the budget."""

_TRIES = 5
"""Largest number of children measured before the best is taken or an error is raised."""

_READINGS = 6
"""Largest number of macs budgets tried for one latency budget."""


def table_for(
    model: nn.Module, settings: Measure, *, width: bool = False, say: Callable[[str], None] = lambda _: None
) -> TimeTable:
    """Return the table of times of `model` on this machine: measured once, then read from the cache.

    For ``onnxruntime`` and ``openvino`` it is the table of eager PyTorch, whose blocks need no export. It is less
    accurate for them, and measurements in the runtime itself correct it (`meet`).

    The cache is ``$VITRIM_CACHE``, or if that is not set the user's cache folder of this platform, on Linux
    ``~/.cache/vitrim``. The name of a cached file depends on the structure of the model, the device, batch, threads,
    type, runtime, the versions of PyTorch and vitrim and the format of the table, so that tables are not confused.

    Args:
        model: an adopted dense model.
        settings: measurement settings.
        width: whether plans may cut the residual width, so that the table must know how times change with it.
        say: called with a line of text before slow steps.
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
    about += ["and at half of the residual width"] if width else []
    key = hashlib.sha256("\n".join(about).encode()).hexdigest()[:20]
    path = cache_folder("VITRIM_CACHE") / "latency" / f"{key}.json"
    if path.is_file():
        say(f"reading the table of times {path}")
        known = load(TimeTable, read_json(path, BudgetError), BudgetError, at=str(path))
        if known.machine != machine:
            raise BudgetError(
                f"{path}: the table of times must be of {machine}, but was made on {known.machine}; remove the file"
            )
        return known
    say(f"making a table of times on {machine}")
    table = make_table(model, seconds=settings.seconds, width=width, **given)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, table.model_dump_json())
    return table


def time_child(child: nn.Module, parent: nn.Module, settings: Measure) -> Latency:
    """Time `child` in turns with its parent, with the given settings.

    Raises:
        ExportError: if the runtime is not installed or cannot take a model.
    """
    if settings.runtime in READS_ONNX:
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
    """Time both in a runtime that reads ONNX, on the CPU in float32."""
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
    """A child that meets a latency budget.

    Attributes:
        found: the result of the method.
        child: the cut model.
        ratio: its measured time over its parent's.
        predicted: the same ratio predicted by the table.
        measured: number of children that were timed.
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
    plans_by_time: bool,
    say: Callable[[str], None] = lambda _: None,
) -> Met:
    """Plan by the table, measure, and plan again if the table was inaccurate.

    Args:
        parent: the dense model.
        budget: a budget with a latency bound and a table.
        search: a function that finds a plan for a budget.
        cut: a function that cuts the child.
        clock: a function that times the child in turns with its parent.
        plans_by_time: whether `search` plans by the table itself; if not, it is given macs budgets.
        say: called with a line about each measurement.

    Raises:
        BudgetError: if no child is within 5 % of the budget or below it; names the fastest.
    """
    assert budget.latency is not None
    planner = _Planner(parent=parent, budget=budget, search=search, plans_by_time=plans_by_time)
    aim, tried = budget.latency, list[Met]()
    while len(tried) < _TRIES:
        found = planner.at(aim)
        child = cut(found)
        predicted = planner.predicted(found)
        ratio = _steady(clock(child), budget)
        tried.append(Met(found=found, child=child, ratio=ratio, predicted=predicted, measured=len(tried) + 1))
        say(f"planned for {aim:.3f} of the time, the table predicts {predicted:.3f}, measured {ratio:.3f}")
        if abs(ratio - budget.latency) <= CLOSE * budget.latency:
            break
        # The table may be wrong by a constant factor, so the share to plan for is corrected by that factor.
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
        say(f"no plan is nearer to {budget.latency:g} of the time than {best_met.ratio:.3f}, which is faster")
    return replace(best_met, measured=len(tried))


def _steady(taken: Latency, budget: Budget) -> float:
    """Return the measured ratio, if its spread is small enough.

    Raises:
        BudgetError: with the spread, if twice the median's standard error exceeds the allowed distance from a budget.
    """
    assert taken.ratio is not None
    assert taken.ratio_low is not None
    assert taken.ratio_high is not None
    # The 10th and 90th percentiles are 2.56 standard deviations apart. A median has 1.25 times the error of a mean.
    error = 1.25 * (taken.ratio_high - taken.ratio_low) / 2.56 / math.sqrt(taken.runs)
    if 2 * error > CLOSE * taken.ratio:
        raise BudgetError(
            f"times must repeat within {CLOSE:.0%} for a budget of latency={budget.latency:g}, but on this machine "
            f"{taken.runs} samples of the ratio range from {taken.ratio_low:.3f} to {taken.ratio_high:.3f}; stop other "
            "work, raise measure.seconds, or bound macs"
        )
    return taken.ratio


class _Planner:
    """Find plans whose child takes a given share of the parent's time, according to the table."""

    def __init__(
        self, *, parent: nn.Module, budget: Budget, search: Callable[[Budget], Found], plans_by_time: bool
    ) -> None:
        self.parent, self.budget, self.search, self.plans_by_time = parent, budget, search, plans_by_time
        self.spec = describe(parent)
        self.dense = budget.cost(self.spec)
        self.asked: list[float] = []
        self.last: Found | None = None

    def predicted(self, found: Found) -> float:
        """Return the child's time over the parent's, predicted by the table."""
        return self.budget.cost(found.plan.child(self.spec)).latency / self.dense.latency

    def at(self, share: float) -> Found:
        """Return a plan for `share` of the parent's time."""
        self.asked.append(share)
        if self.plans_by_time:
            return self._found(self.budget.model_copy(update={"latency": share}))
        return self._by_macs(share)

    def _found(self, budget: Budget) -> Found:
        again = None if self.last is None else self.last.again
        self.last = self.search(budget) if again is None else again(budget)
        return self.last

    def _by_macs(self, share: float) -> Found:
        """Try macs budgets until the table predicts `share`.

        Time is nearly linear in macs for cuts of one kind. The next budget is read from the line through the dense
        model and the child that was tried last.
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
        """Return the share of macs that remains if even cuts leave `share` of the time."""
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
