"""Make the table of times for latency budgets: times of the branches of every stage for several widths and tokens.

B images, N tokens, D width, H heads, K channels of a head, M hidden neurons.
"""

import datetime
import functools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.cut.optimized import optimize_block_
from vitrim.cut.surgery import apply
from vitrim.cut.width import check_narrowable
from vitrim.families import blocks_of, describe
from vitrim.measure.model import home_of, image_of, running
from vitrim.measure.shapes import (
    arriving_of,
    attention_parts,
    between_multiples,
    factors_of,
    other_parts,
    step_of,
    widths_of,
)
from vitrim.measure.turns import (
    TICK,
    Timer,
    keeping_memory,
    name_of,
    percentiles,
    place_of,
    threading,
    timer,
    turns,
    waiting,
)
from vitrim.nn import Stream, computed, make_block, still
from vitrim.nn.copying import copied
from vitrim.nn.modes import evaluating, random_state_kept
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.progress import progress
from vitrim.words.spec import Attention, Block, Skip, Spec, Stage
from vitrim.words.steps import Tokens
from vitrim.words.table import TICKS, Machine, StageTimes, TimeTable

__all__ = ["fitted", "fitted_narrow", "half_widths", "machine_of", "make_table", "narrowed"]

SHARES = (0.25, 0.5, 0.75, 1.0)
"""Shares of heads and of tokens for which times are measured."""

_MOST = 0.95
"""Largest share of the dense time outside the blocks; more is measured only if noise is as large as a forward pass."""

ROUNDS = 7
"""Samples of each part, alternating with all others; the median of 7 is robust against slow periods of the machine."""


def machine_of(
    model: nn.Module,
    *,
    batch: int = 8,
    threads: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    compiled: bool = False,
    as_stored: bool = False,
) -> Machine:
    """Return the machine on which `make_table` with the same arguments measures."""
    home, kind = home_of(model)
    place = place_of(device) if device is not None else home
    return Machine(
        device=name_of(place),
        runtime="compile" if compiled else "eager",
        batch=batch,
        threads=threads or torch.get_num_threads(),
        dtype=str(dtype or kind).removeprefix("torch."),
        torch=torch.__version__,
        as_stored=as_stored,
    )


def make_table(
    model: nn.Module,
    *,
    batch: int = 8,
    threads: int | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    compiled: bool = False,
    as_stored: bool = False,
    seconds: float = 8.0,
    rounds: int = ROUNDS,
    width: bool = False,
) -> TimeTable:
    """Measure the times of the branches of `model` for several widths and numbers of tokens.

    DeiT-S takes about half a minute on two CPU cores (``benchmarks/latency_budget.py``). Blocks are built with random
    weights, because times do not depend on the weights. `model` is not changed. Everything runs in the
    form of `vitrim.deploy.optimized`.

    Args:
        model: an adopted dense model.
        batch: images in a forward pass.
        threads: CPU threads; the setting of the process if None.
        dtype: floating-point type; that of the model if None.
        device: device to run on; that of the model if None.
        compiled: whether every part runs with `torch.compile`.
        as_stored: whether models and parts run as they are stored instead.
        seconds: time to spend on the whole dense model.
        rounds: samples of each part, at least 1.
        width: whether everything is measured at half of the residual width, too, so that plans that cut it can be
            priced; it takes twice as long.

    Raises:
        MethodError: if `width` is asked for, but that of the model cannot be cut.
    """
    start = time.perf_counter()
    spec = describe(model)
    if width:
        check_narrowable(model)
    narrow = [apply(model, narrowed(spec))] if width else []
    home, kind = home_of(model)
    place = place_of(device) if device is not None else home
    bench = _Bench(batch, place, dtype or kind, compiled, as_stored)
    inputs = torch.randn(batch, *image_of(model), generator=torch.Generator().manual_seed(0)).to(place, bench.dtype)
    with random_state_kept(place):
        wholes = [*_wholes(model, spec), *(net for one in narrow for net in (one, _hollow(one)))]
        nets = [running(net, place, bench.dtype, as_stored=as_stored) for net in wholes]
    with evaluating(*nets), torch.inference_mode(), threading(threads), random_state_kept(place):
        calls = [functools.partial(bench.ready(net), inputs) for net in nets]
        full, bare, less, *others = turns(calls, wait=waiting(place), seconds=seconds).samples
        low, middle, high = percentiles(full)
        host = middle * min(_share(bare, full), _MOST)
        slim = [describe(one).stages for one in narrow]
        table = TimeTable(
            machine=machine_of(
                model,
                batch=batch,
                threads=threads,
                dtype=bench.dtype,
                device=place,
                compiled=compiled,
                as_stored=as_stored,
            ),
            stages=tuple(
                _stage(stage, bench, rounds).model_copy(
                    update={"narrower": tuple(_stage(stages[index], bench, rounds) for stages in slim)}
                )
                for index, stage in enumerate(spec.stages)
                if stage.blocks
            ),
            host=host,
            hosts=tuple(min(middle * _share(other, full), host) for other in others[1::2]),
            dense=middle,
            spread=(high - low) / middle,
        )
    table = fitted(table, spec, middle * _share(less, full))
    if narrow:
        table = fitted_narrow(table, describe(narrow[0]), middle * _share(others[0], full))
    return table.model_copy(
        update={
            "seconds": time.perf_counter() - start,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        }
    )


def _share(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the median ratio of neighboring samples."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def _wholes(model: nn.Module, spec: Spec) -> list[nn.Module]:
    """Copies of a dense model: itself, without branches, and with half of all widths."""
    return [copied(model), _hollow(model), _rebuilt(model, half_widths(spec))]


def _hollow(model: nn.Module) -> nn.Module:
    """Return a copy whose blocks return their input."""
    bare = copied(model)
    for _, block in blocks_of(bare):
        block.attn = block.mlp = None
    return bare


def half_widths(spec: Spec) -> Spec:
    """Return the same spec with half of all neurons and half of each head's channels (or of the heads, if tied)."""
    stages = []
    for stage in spec.stages:
        tied = stage.form.ties_qk or stage.form.mixed_norm is not None
        blocks = []
        for block in stage.blocks:
            mixer = block.mixer
            if isinstance(mixer, Attention):
                few = slice((len(mixer.v) + 1) // 2) if tied else slice(None)
                cut = 1 if tied else 2
                heads = range(len(mixer.v))[few]
                mixer = mixer.of(heads, *([-(-widths[h] // cut) for h in heads] for widths in (mixer.qk, mixer.v)))
            hidden = block.hidden and max(1, block.hidden // 2)
            blocks.append(block.model_copy(update={"mixer": mixer, "hidden": hidden}))
        stages.append(stage.model_copy(update={"blocks": tuple(blocks)}))
    return spec.model_copy(update={"stages": tuple(stages)})


def narrowed(spec: Spec) -> Plan:
    """Return the plan that keeps half of the residual width of every stage, in multiples of 8 channels if it can."""
    halves = [
        max(stage.width // 2 // 8 * 8, 8) if stage.width > 8 else max(stage.width // 2, 1) for stage in spec.stages
    ]
    return Plan.of(spec, [BlockPlan()] * len(spec.blocks()), [tuple(range(half)) for half in halves])


def _rebuilt(model: nn.Module, spec: Spec) -> nn.Module:
    """Return a copy with the branches of `spec`, with random weights."""
    other = copied(model)
    like = next(model.parameters())
    for (_, block), (_, stage, node), arriving in zip(blocks_of(other), spec.blocks(), spec.arrivals(), strict=True):
        with torch.device(like.device):
            fresh = computed(make_block(stage, node, arriving)).to(like.dtype).eval()
        block.attn, block.mlp = fresh.attn, fresh.mlp
    return other


def fitted(table: TimeTable, spec: Spec, seconds: float) -> TimeTable:
    """Return the table, scaled so that the dense model `spec` takes its measured time, and the halved one `seconds`.

    In a model, a branch is slower than alone because less of its data is in the cache, and each call has an overhead.
    Therefore all times are multiplied by one factor, and a constant time is added for every branch. If noise would make
    one of the two negative, only the factor is fitted.
    """
    whole, part = (table.latency(one) / TICKS - table.host for one in (spec, half_widths(spec)))
    rest = table.dense - table.host
    branches = sum(bool(getattr(block.mixer, "v", True)) + bool(block.hidden) for _, _, block in spec.blocks())
    if not whole > 0:
        return table
    factor = (table.dense - seconds) / (whole - part) if whole > part else 0.0
    each = (rest - factor * whole) / branches
    if factor <= 0 or each < 0:
        factor, each = rest / whole, 0.0
    return table.scaled(factor).model_copy(update={"branch": each})


def fitted_narrow(table: TimeTable, spec: Spec, seconds: float) -> TimeTable:
    """Return a fitted table whose times at the smaller residual width are scaled so that `spec` takes `seconds`.

    Args:
        table: the result of `fitted`, with one smaller width.
        spec: the dense model at that width.
        seconds: its measured time. If noise makes it less than what is outside the blocks, nothing is scaled.
    """
    alone = table.model_copy(update={"branch": 0.0})
    blocks = (alone.latency(spec) / TICKS) - table.hosts[0]
    branches = (table.latency(spec) - alone.latency(spec)) / TICKS
    left = seconds - table.hosts[0] - branches
    if not (left > 0 and blocks > 0):
        return table
    stages = [
        times.model_copy(
            update={"narrower": table.model_copy(update={"stages": times.narrower}).scaled(left / blocks).stages}
        )
        for times in table.stages
    ]
    return table.model_copy(update={"stages": tuple(stages)})


@dataclass(frozen=True)
class _Bench:
    """Conditions under which parts are measured."""

    batch: int
    device: torch.device
    dtype: torch.dtype
    compiled: bool
    as_stored: bool

    def ready(self, net: nn.Module) -> nn.Module:
        if self.compiled:
            net.compile()
        return net

    def part(self, stage: Stage, block: Block, arriving: Tokens) -> Timer:
        """Return a timer of one block with random weights."""
        with torch.device(self.device):
            net = computed(make_block(stage, block, arriving)).to(self.device, self.dtype).eval()
            net.source = still(stage, block, self.device, self.dtype)
        if not self.as_stored:
            optimize_block_(net, self.device, self.dtype)
        shape = (*stage.grid, stage.width) if stage.window is not None else (arriving.total, stage.width)
        x = torch.randn(self.batch, *shape, generator=torch.Generator().manual_seed(0)).to(self.device, self.dtype)
        given: Tensor | Stream = x
        if arriving.stands_for is not None:
            given = Stream(x, torch.ones(*x.shape[:-1], 1, device=self.device), arriving.stands_for)
        return timer(functools.partial(self.ready(net), given), waiting(self.device))


def _stage(stage: Stage, bench: _Bench, rounds: int) -> StageTimes:
    """Measure the times of the branches of one stage."""
    mixers = [block.mixer for block in stage.blocks if isinstance(block.mixer, Attention)]
    hidden = max((block.hidden or 0 for block in stage.blocks), default=0)
    levels = [arriving_of(stage, share) for share in SHARES] if stage.window is None else [stage.enters]
    levels = list({tokens.total: tokens for tokens in levels}.values())
    parts: dict[Any, tuple[Block, Tokens]] = {}
    heads: tuple[int, ...] = ()
    channels: tuple[int, ...] = ()
    neurons = widths_of(hidden, 8) if hidden else ()
    if mixers:
        mixer = max(mixers, key=lambda one: len(one.v))
        heads = tuple(sorted({max(1, round(share * len(mixer.v))) for share in SHARES} | {1}))
        tied = stage.form.ties_qk or stage.form.mixed_norm is not None
        channels = (max(mixer.v),) if tied else widths_of(max(mixer.v), 8)
        parts |= dict(attention_parts(stage, mixer, levels, heads, channels))
        parts |= dict(other_parts(stage, mixer))
    for tokens in levels:
        parts["bare", tokens.total] = (Block(mixer=Skip(leaves="norm"), hidden=None), tokens)
        for count in neurons:
            parts["mlp", tokens.total, count] = (Block(mixer=Skip(), hidden=count), tokens)
    between = between_multiples(hidden)
    for count in between:
        parts["step", count] = (Block(mixer=Skip(), hidden=count), stage.enters)
    found = _timed(stage, parts, bench, rounds)
    attention = [[[found["attention", tokens.total, h, k] for k in channels] for h in heads] for tokens in levels]
    mlp = [[found["mlp", tokens.total, count] for count in neurons] for tokens in levels]
    times = StageTimes.model_validate(
        {
            "width": stage.width,
            "grid": stage.grid,
            "tokens": [tokens.total for tokens in levels],
            "heads": heads,
            "channels": channels,
            "attention": attention if mixers else (),
            "hidden": neurons,
            "mlp": mlp if hidden else (),
            "bare": [found["bare", tokens.total] for tokens in levels],
            "step": step_of({count: found["step", count] for count in between}),
        }
    )
    return times.model_copy(update=factors_of(times, stage, mixer, found)) if mixers else times


def _timed(stage: Stage, parts: dict[Any, tuple[Block, Tokens]], bench: _Bench, rounds: int) -> dict[Any, float]:
    """Return the seconds of every part, measured alternately.

    Times are divided by that of the dense block measured shortly before, so that slow periods of the machine cancel.
    """
    names = list(parts)
    reference = bench.part(stage, _dense(stage), stage.enters)
    timers = [bench.part(stage, *parts[name]) for name in names]
    repeats = [max(1, math.ceil(TICK / 2 / max(_warm(one), 1e-9))) for one in timers]
    own: list[float] = []
    shares: list[list[float]] = [[] for _ in names]
    with keeping_memory(), progress("table", rounds) as advance:
        for _ in range(rounds):
            for index, one in enumerate(timers):
                if index % 8 == 0:
                    unit = reference(1)
                    own.append(unit)
                shares[index].append(one(repeats[index]) / unit)
            advance(1)
    unit = statistics.median(own)
    return {name: unit * statistics.median(found) for name, found in zip(names, shares, strict=True)}


def _warm(one: Timer) -> float:
    return min(one(1) for _ in range(2))


def _dense(stage: Stage) -> Block:
    first = stage.blocks[0]
    return first.model_copy(update={"tokens": None, "only_prefix": False})
