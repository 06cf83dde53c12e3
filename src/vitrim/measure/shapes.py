"""The parts that a table of times measures: attention and MLPs of several widths, and what is not on that grid.

N tokens, H heads, K channels of a head, M hidden neurons.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from vitrim.cut.optimized import WIDEST
from vitrim.words.block import why_not_read
from vitrim.words.plain import FrozenDict
from vitrim.words.spec import Attention, Block, Conv, Stage, why_not_mixed, why_not_placed
from vitrim.words.steps import Step, Tokens, flow_of, kinds
from vitrim.words.table import StageTimes

__all__ = [
    "Part",
    "arriving_of",
    "attention_parts",
    "between_multiples",
    "factors_of",
    "other_parts",
    "step_of",
    "widths_of",
]

Part = tuple[Any, tuple[Block, Tokens]]
"""Name of a part, the block that is measured and the tokens at its input."""

_SAME = 0.03
"""Times that differ by less than this share are taken as equal."""


def widths_of(most: int, step: int) -> tuple[int, ...]:
    """Return about eight widths: multiples of `step`, and `most` itself."""
    stride = max(step, math.ceil(most / 8 / step) * step)
    return tuple(sorted({*range(stride, most, stride), most, min(step, most)}))


def between_multiples(most: int) -> tuple[int, ...]:
    """Return numbers of neurons that tell which multiples a device likes, between the two largest multiples of 64.

    They are a multiple of 64 plus 1, 2, 4 and so on up to 64; empty if there are fewer than 128 neurons.
    """
    low = most // WIDEST * WIDEST - WIDEST
    return tuple(low + 2**power for power in range(WIDEST.bit_length())) if low > 0 else ()


def step_of(times: Mapping[int, float]) -> int:
    """Return the smallest step at which fewer neurons take less time, see `StageTimes.step`.

    Args:
        times: seconds by numbers of neurons, those of `between_multiples`.
    """
    if not times:
        return 1
    whole = times[max(times)]
    low = max(times) - WIDEST
    # A smaller width that is slower than the next multiple, or as fast, is none to plan.
    slow = [count - low for count, seconds in times.items() if seconds > whole * (1 + _SAME) and count < max(times)]
    return 2 * max(slow) if slow else 1


def arriving_of(stage: Stage, share: float) -> Tokens:
    """Return the tokens of a stage with a share of the patches, which do not fill a grid unless the share is 1."""
    patches = max(1, round(share * stage.patches))
    whole = patches == stage.patches
    # Attention that must know the places of its tokens is given the first ones.
    places = None if stage.form.positions is None else tuple(range(patches))
    return stage.enters if whole else stage.enters._replace(patches=patches, grid=None, places=places)


def attention_parts(
    stage: Stage, mixer: Attention, levels: Sequence[Tokens], heads: Sequence[int], channels: Sequence[int]
) -> Iterator[Part]:
    """Yield attention with heads of one width, for each number of tokens, heads and channels."""
    for tokens in levels:
        for count in heads:
            for width in channels:
                even = (width,) * count
                # With a norm over each head's channels there is only one width.
                block = Block(mixer=Attention(qk=even, v=even, scale=mixer.scale), hidden=None, shifted=_shifted(stage))
                yield ("attention", tokens.total, count, width), (block, tokens)


def _shifted(stage: Stage) -> bool:
    return any(block.shifted for block in stage.blocks)


def other_parts(stage: Stage, mixer: Attention) -> Iterator[Part]:
    """Yield the parts outside the grid of widths: unequal and uneven heads, convolutions, token steps, sizes."""
    here, width, count = stage.enters, max(mixer.v), len(mixer.v)
    tied = stage.form.ties_qk or stage.form.mixed_norm is not None

    def attends(qk: Sequence[int], v: Sequence[int], step: Step | None = None) -> Block:
        mixed = Attention(qk=tuple(qk), v=tuple(v), scale=mixer.scale)
        return Block(mixer=mixed, hidden=None, tokens=step, shifted=_shifted(stage))

    half = max(8, width // 2)
    if not tied and half < width:
        yield "unequal", (attends([half] * count, [width] * count), here)
        if count > 1:
            mixed = [half, *[width] * (count - 1)]
            yield "uneven", (attends(mixed, mixed), here)
    whole = all(block.tokens is None for block in stage.blocks)
    if stage.form.mixed_norm is None:
        for kernel in (1, 3):
            for inner in {width, stage.width}:
                yield f"conv{kernel}.{inner}", (Block(mixer=Conv(kernel=kernel, width=inner), hidden=None), here)
        if why_not_read(stage.form, stage.prefix) is None:
            reader = Attention(qk=(width,) * count, v=(width,) * count, scale=mixer.scale)
            beside = Conv(kernel=1, width=width, prefix="attention", heads=reader)
            yield "reads", (Block(mixer=beside, hidden=None), here)
    if stage.window is not None or not whole or here.patches < 4:
        return
    dense = ([width] * count, [width] * count)
    for name, step in _steps(stage).items():
        yield f"step.{name}", (attends(*dense, step), here)
    if why_not_mixed(stage) is None:
        yield "with_sizes", (attends(*dense), here._replace(grid=None, stands_for=here.patches))


def _steps(stage: Stage) -> dict[str, Step]:
    """Return one token step of each kind that this stage can have, by its `kind`."""
    examples = (kind.example(stage.enters) for kind in kinds().values())
    return {step.kind: step for step in examples if step is not None and why_not_placed(step, stage) is None}


def factors_of(times: StageTimes, stage: Stage, mixer: Attention, found: Mapping[Any, float]) -> dict[str, Any]:
    """Return the single factors and times of a stage, each relative to the grid of widths for the same part."""
    count, width = len(mixer.v), max(mixer.v)
    half = max(8, width // 2)

    def expected(rows: int, total: float) -> float:
        return times.attends_evenly(rows, count, total / count)

    dense = expected(stage.tokens, count * width)
    told: dict[str, Any] = {}
    inner = tuple(sorted({width, stage.width}))
    if f"conv1.{inner[0]}" in found:
        told["conv_widths"] = inner
        told["conv"] = FrozenDict({str(k): tuple(found[f"conv{k}.{n}"] for n in inner) for k in (1, 3)})
    if "reads" in found:
        told["reads"] = max(0.0, found["reads"] - found[f"conv1.{width}"]) / count
    if "unequal" in found:
        told["unequal"] = max(1.0, found["unequal"] / expected(stage.tokens, count * (half + width) / 2))
    if "uneven" in found:
        told["run"] = max(0.0, found["uneven"] - expected(stage.tokens, half + (count - 1) * width))
    if "with_sizes" in found:
        told["with_sizes"] = max(1.0, found["with_sizes"] / dense)
    steps = {name: step for name, step in _steps(stage).items() if f"step.{name}" in found}
    attended = {name: flow_of(step, stage.enters, stage.patches).projected for name, step in steps.items()}
    told["steps"] = FrozenDict(
        {name: max(0.0, found[f"step.{name}"] - expected(n, count * width)) for name, n in attended.items()}
    )
    return told
