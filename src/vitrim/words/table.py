"""Latency of a spec, computed from a table of measured times.

N tokens, H heads, K channels of a head, M hidden neurons.

A table contains the measured times of the branches of each stage for a few widths and numbers of tokens, and the time
of everything outside the blocks. Times are interpolated linearly between the measured points, so sizes that the
hardware prefers (whole heads, multiples of 8 or 16) are taken into account only if they were measured. If a table also
has times at a smaller residual width, those of any other width are on the line through both. The table is an estimate;
measure the model itself for its exact latency.
"""

import bisect
from collections.abc import Callable, Sequence
from typing import Any, Literal

from vitrim.words.costs import attention_macs
from vitrim.words.errors import BudgetError
from vitrim.words.plain import Frozen, FrozenDict, Node
from vitrim.words.spec import Attention, Block, Conv, Skip, Spec, Stage
from vitrim.words.steps import Flow, Tokens, flow_of

__all__ = ["FORMAT", "Machine", "StageTimes", "TimeTable"]

FORMAT = 3
"""Version of a stored table; increased when the meaning of its numbers changes."""

TICKS = 10**9
"""Ticks in a second: computed latencies are whole nanoseconds, so that sums are exact."""


class Machine(Node):
    """The hardware and software on which times were measured; times are valid only for an equal machine.

    Attributes:
        device: name of the processor or accelerator.
        runtime: how the model was run.
        batch: images in a forward pass.
        threads: CPU threads.
        dtype: floating-point type.
        torch: version of PyTorch.
        as_stored: whether models ran as they are stored, not in the form of `vitrim.deploy.optimized`; true for tables
            that do not say.
    """

    device: str
    runtime: Literal["eager", "compile"] = "eager"
    batch: int
    threads: int
    dtype: str
    torch: str
    as_stored: bool = True

    def __str__(self) -> str:
        """Return a text for messages, such as ``cpu, AMD EPYC; eager, batch 8, 2 threads, float32``."""
        form = ", as stored" if self.as_stored else ""
        return f"{self.device}; {self.runtime}, batch {self.batch}, {self.threads} threads, {self.dtype}{form}"


class StageTimes(Node):
    """Seconds of the branches of one stage, each with its norm and its residual addition.

    Attributes:
        width: D.
        grid: rows and columns of patches.
        tokens: measured values of N, increasing.
        heads, channels: measured values of H and K, increasing; queries, keys and values have the same width.
        attention: seconds by tokens, heads and channels.
        hidden: measured values of M, increasing.
        mlp: seconds by tokens and neurons.
        conv_widths: measured widths of the bottleneck of a convolution, increasing.
        conv: seconds of a convolution by its kernel, on the whole grid: one number for each of `conv_widths`, or one
            number if there are none. On a merged grid they are in proportion to its patches.
        reads: seconds that each head adds with which prefix tokens read beside a convolution, on the whole grid.
        unequal: factor on the time of attention if values have another width than queries.
        bare: seconds of a branch that computes nothing, by tokens: its norm and its residual addition, which no width
            touches. Empty for tables that do not say.
        step: rungs of neurons that are worth planning are multiples of this: a width between two multiples was measured
            to be no faster than the next multiple.
        run: additional seconds for each further width among the heads of a block.
        with_sizes: factor on the time of attention if tokens represent several patches.
        steps: seconds of a token step by its kind, on the whole grid, without its effect on the time of attention and
            MLP.
        narrower: the same times at smaller residual widths, the largest first. Empty for a table of one width.
    """

    width: int
    grid: tuple[int, int]
    tokens: tuple[int, ...]
    heads: tuple[int, ...]
    channels: tuple[int, ...]
    attention: tuple[tuple[tuple[float, ...], ...], ...]
    hidden: tuple[int, ...]
    mlp: tuple[tuple[float, ...], ...]
    bare: tuple[float, ...] = ()
    step: int = 1
    conv_widths: tuple[int, ...] = ()
    conv: Frozen = FrozenDict()
    reads: float = 0.0
    unequal: float = 1.0
    run: float = 0.0
    with_sizes: float = 1.0
    steps: Frozen = FrozenDict()
    narrower: tuple["StageTimes", ...] = ()

    def attends(self, mixer: Attention, flow: Flow, with_sizes: bool) -> float:
        """Return the seconds of an attention branch."""
        heads, qk, v = len(mixer.v), sum(mixer.qk), sum(mixer.v)
        if not heads:
            return 0.0
        rows = flow.projected
        seconds = self.attends_evenly(rows, heads, (qk + v) / (2 * heads))
        if (flow.queries, flow.keys) != (rows, rows):
            asked = attention_macs(rows, self.width, qk, v, flow.keys, flow.queries)
            seconds *= asked / attention_macs(rows, self.width, qk, v)
        if mixer.qk != mixer.v:
            seconds *= self.unequal
        seconds += self.run * (len(set(zip(mixer.qk, mixer.v, strict=True))) - 1)
        return seconds * (self.with_sizes if with_sizes else 1.0)

    def attends_evenly(self, rows: int, heads: int, channels: float) -> float:
        """Return the seconds of attention among `rows` tokens, with heads of one width; at least those of `rests`."""
        found = _between((self.tokens, self.heads, self.channels), self.attention, (rows, heads, channels))
        return max(found, self.rests(rows))

    def convolves(self, conv: Conv) -> float:
        """Return the seconds of a convolution on the whole grid, with the attention of its prefix tokens."""
        measured = self.conv.get(str(conv.kernel), 0.0)
        alone = _between((self.conv_widths,) if self.conv_widths else (), measured, (conv.width,))
        return alone + (0.0 if conv.heads is None else self.reads * len(conv.heads.v))

    def feeds(self, rows: int, hidden: int) -> float:
        """Return the seconds of an MLP branch."""
        return max(_between((self.tokens, self.hidden), self.mlp, (rows, hidden)), self.rests(rows)) if hidden else 0.0

    def rests(self, rows: int) -> float:
        """Return the seconds of a branch that no width of its own touches."""
        return _between((self.tokens,), self.bare, (rows,)) if self.bare else 0.0

    def at_width(self, width: int, seconds: Callable[["StageTimes"], float]) -> float:
        """Return what `seconds` gives at a residual width, on the line through the measured ones.

        Args:
            width: D, at most that of this stage.
            seconds: function of the times at a measured width.
        """
        if width == self.width:
            return seconds(self)
        known = (*reversed(self.narrower), self)
        return _between((tuple(one.width for one in known),), [seconds(one) for one in known], (width,))


class TimeTable(Node):
    """Times of the parts of one model on one machine.

    Attributes:
        machine: the hardware and software on which they were measured.
        stages: the times of each stage.
        host: seconds of everything outside the blocks.
        hosts: the same at the residual widths of `StageTimes.narrower`, the largest first.
        branch: seconds that each attention and each MLP takes in the model in addition to the times in `stages`.
        dense: seconds of the whole dense model, measured in the same run.
        spread: spread of the measurements of the dense model: 90th minus 10th percentile, divided by the median.
        seconds: how long it took to make the table.
        date: when the table was made.
    """

    machine: Machine
    stages: tuple[StageTimes, ...]
    host: float
    hosts: tuple[float, ...] = ()
    branch: float = 0.0
    dense: float
    spread: float = 0.0
    seconds: float = 0.0
    date: str = ""

    def latency(self, spec: Spec) -> int:
        """Return the nanoseconds of a forward pass of a whole model."""
        blocks = sum(
            self.block(block, stage, arriving)
            for (_, stage, block), arriving in zip(spec.blocks(), spec.arrivals(), strict=True)
        )
        return round(self.outside(spec) * TICKS) + blocks

    @property
    def narrows(self) -> bool:
        """Whether the table knows how times change with the residual width."""
        return bool(self.hosts)

    def outside(self, spec: Spec) -> float:
        """Return the seconds of everything outside the blocks; with several stages, the mean over their widths."""
        found = []
        for stage in (stage for stage in spec.stages if self.hosts and stage.blocks):
            times = self._of(stage)
            axis = tuple(one.width for one in (*reversed(times.narrower), times))
            seconds = (*reversed(self.hosts), self.host)
            found.append(self.host if stage.width == times.width else _between((axis,), seconds, (stage.width,)))
        return sum(found) / len(found) if found else self.host

    def block(self, block: Block, stage: Stage, arriving: Tokens | None = None) -> int:
        """Return the nanoseconds of one block.

        Args:
            block: the block.
            stage: the stage that contains it.
            arriving: the tokens at its input; those of the whole grid if None.

        Raises:
            BudgetError: if the table has no stage of this width and grid.
        """
        here = stage.enters if arriving is None else arriving
        flow = flow_of(block.tokens, here, stage.patches, block.only_prefix)
        seconds = self._of(stage).at_width(stage.width, lambda times: self._seconds(times, block, stage, flow, here))
        return round(seconds * TICKS)

    def _seconds(self, times: StageTimes, block: Block, stage: Stage, flow: Flow, here: Tokens) -> float:
        """Return the seconds of one block at the residual width of `times`."""
        mixed = fed = 0.0
        if isinstance(block.mixer, Attention):
            mixed = times.attends(block.mixer, flow, flow.mixed.stands_for is not None or flow.mixed.constant_sizes)
        elif isinstance(block.mixer, Conv):
            mixed = times.convolves(block.mixer) * flow.mixed.patches / stage.patches
        if block.hidden:
            fed = times.feeds(flow.rows, block.hidden)
        seconds = mixed + fed + self.branch * (bool(mixed) + bool(fed))
        if block.tokens is not None and block.tokens.kind in times.steps:
            seconds += times.steps[block.tokens.kind] * here.total / stage.tokens
        return seconds

    def fixed(self, spec: Spec) -> int:
        """Return the nanoseconds of a model that no width touches, unless a branch, a block or tokens go.

        They are those of everything outside the blocks, and of the norm and the residual addition of each branch.
        """
        seconds = self.outside(spec)
        for (_, stage, block), arriving in zip(spec.blocks(), spec.arrivals(), strict=True):
            times, flow = self._of(stage), flow_of(block.tokens, arriving, stage.patches, block.only_prefix)
            for rows, there in ((flow.projected, not isinstance(block.mixer, Skip)), (flow.rows, bool(block.hidden))):
                rest = times.at_width(stage.width, lambda one, rows=rows: one.rests(rows))  # type: ignore[misc]
                seconds += (rest + self.branch) * there
        return round(seconds * TICKS)

    def _of(self, stage: Stage) -> StageTimes:
        """Return the times of a stage, or of the dense one that it is a narrower form of.

        Raises:
            BudgetError: if the table has none.
        """
        wider = [t for t in self.stages if t.grid == stage.grid and t.width > stage.width and t.narrower]
        whole = [t for t in self.stages if (t.width, t.grid) == (stage.width, stage.grid)]
        times = next(iter((*whole, *sorted(wider, key=lambda t: t.width))), None)
        if times is None and any(t.grid == stage.grid and t.width > stage.width for t in self.stages):
            raise BudgetError(
                f"a table of times must have two residual widths to price a third, but has no stage of width "
                f"{stage.width} on {stage.grid[0]} x {stage.grid[1]} patches; make one with width=True"
            )
        if times is None:
            raise BudgetError(
                f"a table of times must be of this model, but has no stage of width {stage.width} on "
                f"{stage.grid[0]} x {stage.grid[1]} patches; make another"
            )
        return times

    def step(self, stage: Stage) -> int:
        """Return the step of `stage` in which neurons are worth planning, see `StageTimes.step`."""
        return self._of(stage).step

    def scaled(self, factor: float) -> "TimeTable":
        """Return the same table with the times of its stages multiplied by `factor`."""
        stages = tuple(
            times.model_copy(
                update={
                    "attention": tuple(tuple(tuple(t * factor for t in a) for a in b) for b in times.attention),
                    "mlp": tuple(tuple(t * factor for t in row) for row in times.mlp),
                    "bare": tuple(t * factor for t in times.bare),
                    "conv": FrozenDict({kernel: _scaled(t, factor) for kernel, t in times.conv.items()}),
                    "reads": times.reads * factor,
                    "run": times.run * factor,
                    "steps": FrozenDict({kind: t * factor for kind, t in times.steps.items()}),
                    "narrower": self.model_copy(update={"stages": times.narrower}).scaled(factor).stages,
                }
            )
            for times in self.stages
        )
        return self.model_copy(update={"stages": stages})


def _scaled(seconds: Any, factor: float) -> Any:
    return tuple(t * factor for t in seconds) if isinstance(seconds, tuple) else seconds * factor


def _between(axes: Sequence[Sequence[float]], values: Any, point: Sequence[float]) -> float:
    """Interpolate linearly between measured points, one axis after another, and extrapolate outside of them.

    The extrapolation continues the line through the two nearest points. The result is never below zero.
    """
    if not axes:
        return float(values)
    axis, at = axes[0], point[0]
    if len(axis) == 1:
        return _between(axes[1:], values[0], point[1:]) * min(at / axis[0], 1.0)
    above = min(max(bisect.bisect_left(axis, at), 1), len(axis) - 1)
    low, high = axis[above - 1], axis[above]
    one, two = (_between(axes[1:], values[index], point[1:]) for index in (above - 1, above))
    return max(one + (two - one) * (at - low) / (high - low), 0.0)
