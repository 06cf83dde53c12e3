"""How long a spec takes, by a table of measured times.

N tokens, H heads, K channels of a head, M hidden neurons.

A table holds what branches of each stage took over a few widths and numbers of tokens, and all that is not a block.
Between the measured points times are straight lines, so steps that the hardware likes (whole heads, multiples of 8 or
16) are in the table as it met them. What a table does not tell is told by a measurement of the model itself.
"""

import bisect
from collections.abc import Sequence
from typing import Any, Literal

from vitrim.words.costs import attention_macs
from vitrim.words.errors import BudgetError
from vitrim.words.plain import Frozen, FrozenDict, Node
from vitrim.words.spec import Attention, Block, Conv, Spec, Stage
from vitrim.words.steps import Flow, Tokens, flow_of

__all__ = ["FORMAT", "Machine", "StageTimes", "Table"]

FORMAT = 1
"""Of a table as it is stored; raised when what its numbers mean changes."""

TICKS = 10**9
"""Times are whole nanoseconds where they are priced, so that sums are exact."""


class Machine(Node):
    """What times were measured on; times of another are no times of this one.

    Attributes:
        device: name of the processor or accelerator.
        runtime: what ran the model.
        batch: images in a pass.
        threads: CPU threads.
        dtype: floating-point type.
        torch: its version.
        as_stored: whether models ran as they are stored, not in the form of `vitrim.deploy.optimized`; true of tables
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
        """For messages: ``cpu, AMD EPYC; eager, batch 8, 2 threads, float32``."""
        form = ", as stored" if self.as_stored else ""
        return f"{self.device}; {self.runtime}, batch {self.batch}, {self.threads} threads, {self.dtype}{form}"


class StageTimes(Node):
    """Seconds of the branches of one stage, each with its norm and its sum.

    Attributes:
        width: D.
        grid: rows and columns of patches.
        tokens: N that was measured, rising.
        heads, channels: H and K that were measured, rising; queries, keys and values of one width.
        attention: seconds by tokens, heads and channels.
        hidden: M that was measured, rising.
        mlp: seconds by tokens and neurons.
        conv: seconds of a convolution by its kernel, at the whole grid; on a merged grid in proportion to its patches.
        unequal: how many times longer attention takes where values have another width than queries.
        run: seconds for each further width among the heads of a block.
        with_sizes: how many times longer attention takes where tokens stand for several patches.
        steps: seconds of a token step by its kind, at the whole grid, beyond what it saves or makes attention take.
    """

    width: int
    grid: tuple[int, int]
    tokens: tuple[int, ...]
    heads: tuple[int, ...]
    channels: tuple[int, ...]
    attention: tuple[tuple[tuple[float, ...], ...], ...]
    hidden: tuple[int, ...]
    mlp: tuple[tuple[float, ...], ...]
    conv: Frozen = FrozenDict()
    unequal: float = 1.0
    run: float = 0.0
    with_sizes: float = 1.0
    steps: Frozen = FrozenDict()

    def attends(self, mixer: Attention, flow: Flow, with_sizes: bool) -> float:
        """Seconds of an attention branch."""
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
        """Seconds of attention among `rows` tokens, with heads of one width."""
        return _between((self.tokens, self.heads, self.channels), self.attention, (rows, heads, channels))

    def feeds(self, rows: int, hidden: int) -> float:
        """Seconds of an MLP branch."""
        return _between((self.tokens, self.hidden), self.mlp, (rows, hidden)) if hidden else 0.0


class Table(Node):
    """Times of one model's parts on one machine.

    Attributes:
        machine: what they were measured on.
        stages: of each stage.
        host: seconds of all that is not a block.
        branch: seconds that each attention and each MLP takes within the model beyond what its stage says.
        dense: seconds of the whole dense model, measured in the same run.
        spread: how far single measurements of the dense model lie apart: the 90th minus the 10th percentile, over the
            median.
        seconds: what making the table took.
        date: when it was made.
    """

    machine: Machine
    stages: tuple[StageTimes, ...]
    host: float
    branch: float = 0.0
    dense: float
    spread: float = 0.0
    seconds: float = 0.0
    date: str = ""

    def latency(self, spec: Spec) -> int:
        """Nanoseconds of a pass of a whole model."""
        blocks = sum(
            self.block(block, stage, arriving)
            for (_, stage, block), arriving in zip(spec.blocks(), spec.arrivals(), strict=True)
        )
        return round(self.host * TICKS) + blocks

    def block(self, block: Block, stage: Stage, arriving: Tokens | None = None) -> int:
        """Nanoseconds of one block.

        Args:
            block: the block.
            stage: where it stands.
            arriving: the tokens at its input; those of the whole grid if None.

        Raises:
            BudgetError: if the table knows no such stage.
        """
        times = next((t for t in self.stages if (t.width, t.grid) == (stage.width, stage.grid)), None)
        if times is None:
            raise BudgetError(
                f"a table of times must be of this model, but knows no stage of width {stage.width} on "
                f"{stage.grid[0]} x {stage.grid[1]} patches; make another"
            )
        here = stage.enters if arriving is None else arriving
        flow = flow_of(block.tokens, here, stage.patches, block.only_prefix)
        mixed = fed = 0.0
        if isinstance(block.mixer, Attention):
            mixed = times.attends(block.mixer, flow, flow.mixed.stands_for is not None or flow.mixed.constant_sizes)
        elif isinstance(block.mixer, Conv):
            mixed = times.conv[str(block.mixer.kernel)] if times.conv else 0.0
            mixed *= flow.mixed.patches / stage.patches
        if block.hidden:
            fed = times.feeds(flow.rows, block.hidden)
        seconds = mixed + fed + self.branch * (bool(mixed) + bool(fed))
        if block.tokens is not None and block.tokens.kind in times.steps:
            seconds += times.steps[block.tokens.kind] * here.total / stage.tokens
        return round(seconds * TICKS)

    def scaled(self, factor: float) -> "Table":
        """The same table with what its stages say `factor` times as long."""
        stages = tuple(
            times.model_copy(
                update={
                    "attention": tuple(tuple(tuple(t * factor for t in a) for a in b) for b in times.attention),
                    "mlp": tuple(tuple(t * factor for t in row) for row in times.mlp),
                    "conv": FrozenDict({kernel: t * factor for kernel, t in times.conv.items()}),
                    "run": times.run * factor,
                    "steps": FrozenDict({kind: t * factor for kind, t in times.steps.items()}),
                }
            )
            for times in self.stages
        )
        return self.model_copy(update={"stages": stages})


def _between(axes: Sequence[Sequence[float]], values: Any, point: Sequence[float]) -> float:
    """Straight lines between measured points, one axis after another; beyond the last, on along its last two.

    Below the first point times go down to zero only as far as the line does, never below zero.
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
