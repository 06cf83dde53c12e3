"""MDC's policies for one model: the ratios, the costs of policies, and the channels and tokens that they keep.

L blocks, H heads, M hidden neurons, N tokens, P ratios of a policy, S policies side by side.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitrim.cut.spend import Policies, Space
from vitrim.methods.mdc.times import Times
from vitrim.words.budget import Budget
from vitrim.words.costs import attention_macs, block_cost, mlp_macs
from vitrim.words.errors import BudgetError, MethodError
from vitrim.words.spec import Attention, Block, Spec, Stage, why_not_mixed

__all__ = [
    "PRESETS",
    "Bounds",
    "Frame",
    "Preset",
    "Ranking",
    "Rounding",
    "natural",
    "released_macs",
    "selection_blocks",
    "token_counts",
]

Rounding = Literal["nearest", "floor"]
Ranking = Mapping[str, Tensor]
"""By path (``stages.0.blocks.3.heads``, ``….hidden``): indices of heads or neurons, the best first."""
Ints = NDArray[np.int64]

TOKENS = "tokens"


class Costs(NamedTuple):
    """Costs of many policies, ``(S,)`` each."""

    macs: Ints
    params: Ints
    latency: Ints
    """Nanoseconds; 0 if the budget has no table."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Largest ratios that a policy may cut; 0 does not cut a dimension."""

    heads: float
    neurons: float
    tokens: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A published policy: heads and neurons that each block keeps, and the ratio that each selection drops."""

    heads: tuple[int, ...]
    neurons: tuple[int, ...]
    tokens: float


PRESETS = {
    "deit_small_60": Preset(
        heads=(5, 5, 5, 4, 5, 5, 5, 5, 4, 5, 5, 5),
        neurons=(1348, 1533, 1517, 782, 1376, 1032, 1505, 1130, 1498, 964, 1016, 1037),
        tokens=0.48807,
    ),
    "deit_base_60": Preset(
        heads=(9, 6, 7, 6, 10, 11, 9, 11, 10, 10, 11, 7),
        neurons=(1560, 1769, 1986, 2249, 2697, 2879, 1646, 2815, 2847, 3061, 2985, 2541),
        tokens=0.40072,
    ),
}
"""Policies of the published code, "60 % fewer FLOPs" for DeiT-S and DeiT-B; 58.0 and 59.3 % of our macs."""


def natural(spec: Spec) -> dict[str, Tensor]:
    """Return a ranking in index order, for costs, which do not depend on the ranking."""
    found = {}
    for path, _, block in spec.blocks():
        if isinstance(block.mixer, Attention) and len(block.mixer.v) > 1:
            found[f"{path}.heads"] = torch.arange(len(block.mixer.v))
        if block.hidden:
            found[f"{path}.hidden"] = torch.arange(block.hidden)
    return found


def selection_blocks(depth: int) -> tuple[int, ...]:
    """Return the blocks that select tokens, counted from 0: at a quarter, half and three quarters of the depth.

    12 blocks give 3, 6, 9, as in the published code, which does not define other depths.
    """
    return tuple(sorted({depth // 4, depth // 2, 3 * depth // 4}))


def token_counts(tokens: int, ratio: Any, times: int, least: int) -> list[tuple[Any, Any]]:
    """Return (kept, left) token counts of successive selections, of which the first gets `tokens` tokens.

    ``K = floor(N (1 - t))`` are kept, at least `least`, and one fused token is added for the others. If one or none
    would be dropped, nothing is dropped and K is N.

    Args:
        tokens: N.
        ratio: t, a number or ``(S,)``.
        times: number of selections.
        least: the number of prefix tokens plus one.
    """
    found, arriving = [], np.broadcast_to(np.asarray(tokens), np.shape(ratio))
    for _ in range(times):
        kept = np.maximum(np.floor(arriving * (1 - np.asarray(ratio)) + 1e-9).astype(np.int64), least)
        whole = kept >= arriving - 1
        kept = np.where(whole, arriving, kept)
        arriving = np.where(whole, arriving, kept + 1)
        found.append((kept, arriving))
    return found


@dataclass(frozen=True, slots=True)
class _Place:
    """One block: the columns of its ratios in a policy, and the costs of its channels.

    `qk` and `v` are the channels of the best k heads, ``(H + 1,)``. `rates` are (macs, params) of one channel of
    queries and keys, one of values, and one neuron.
    """

    path: str
    stage: Stage
    block: Block
    heads: int | None
    hidden: int | None
    qk: Ints
    v: Ints
    rates: tuple[tuple[int, int], ...]


class Frame:
    """The policies of one model under one budget.

    Args:
        spec: the model.
        ranking: heads and neurons, the best first.
        budget: limit on a child's cost.
        bounds: bounds of the ratios.
        rounding: ``nearest`` keeps ``floor(H (1 - r) + 1/2)``, ``floor`` keeps ``floor(H (1 - r))`` as published; at
            least one.
        fixed: names of ratios that are not part of the policies (``stages.0.blocks.3.heads``).

    Raises:
        MethodError: if tokens are to be cut but the model's cannot be, or there is nothing to choose.
        BudgetError: naming the least possible cost, if the budget cannot be met.
    """

    def __init__(
        self,
        spec: Spec,
        ranking: Ranking,
        budget: Budget,
        bounds: Bounds,
        rounding: Rounding = "nearest",
        fixed: Collection[str] = (),
    ) -> None:
        self.spec, self.ranking, self.budget, self.rounding = spec, ranking, budget, rounding
        self.parent = budget.cost(spec)
        self.limits = budget.limits(self.parent)
        names: list[str] = []
        upper: list[float] = []

        def column(name: str, bound: float) -> int | None:
            if bound <= 0 or name in fixed:
                return None
            names.append(name)
            upper.append(bound)
            return len(names) - 1

        self.places = [self._place(path, stage, block, bounds, column) for path, stage, block in spec.blocks()]
        self.selecting = self._selecting(bounds.tokens)
        self.token = column(TOKENS, bounds.tokens) if self.selecting else None
        self.times = None if budget.table is None else Times(spec, budget, self._widths(), self.selecting)
        if not names:
            raise MethodError(
                "mdc must have heads, neurons or tokens to choose, but bounds of 0 or norms leave none; raise a bound"
            )
        self.space = Space(names=tuple(names), upper=np.array(upper), spent=self._spent, realised=self.realised)
        self._reachable()

    def corners(self) -> Policies:
        """Return policies ``(F, P)`` with one of heads, neurons and tokens at its bounds and the others at 0."""
        kinds = [name.rsplit(".", 1)[-1] for name in self.space.names]
        chosen = [np.array([kind == one for kind in kinds]) for one in dict.fromkeys(kinds)]
        return np.array([np.where(mine, self.space.upper, 0.0) for mine in chosen])

    def _place(self, path: str, stage: Stage, block: Block, bounds: Bounds, column: Any) -> _Place:
        form, mixer = stage.form, block.mixer
        heads = len(mixer.v) if isinstance(mixer, Attention) else 0
        order = self.ranking.get(f"{path}.heads")
        chosen = heads > 1 and form.mixed_norm is None and order is not None
        neurons = bool(block.hidden) and form.hidden_norm is None and f"{path}.hidden" in self.ranking
        by_rank = order.tolist() if order is not None else range(heads)
        widths = [np.array([0] + [w[h] for h in by_rank]) for w in widths_of(mixer)]
        return _Place(
            path,
            stage,
            block,
            column(f"{path}.heads", bounds.heads) if chosen else None,
            column(f"{path}.hidden", bounds.neurons) if neurons else None,
            np.cumsum(widths[0]),
            np.cumsum(widths[1]),
            _rates(stage, block),
        )

    def _selecting(self, bound: float) -> tuple[int, ...]:
        if bound <= 0:
            return ()
        wrong = next((why for why in map(why_not_mixed, self.spec.stages) if why), None)
        if wrong is not None:
            raise MethodError(f"tokens must be 0 for this model: {wrong}")
        if any(block.tokens is not None for _, _, block in self.spec.blocks()):
            raise MethodError("tokens must be 0 for a model whose tokens are cut already; select on the dense model")
        return selection_blocks(len(self.places))

    def _reachable(self) -> None:
        cost = self.costs(self.space.upper[None])
        for name, limit in self.limits.items():
            least = int(getattr(cost, name)[0])
            if least > limit:
                raise BudgetError(
                    f"budget of {name} must be at least {least:,} for this model, but got {limit:,}; "
                    "allow more, or raise the bounds (method.heads, method.neurons, method.tokens)"
                )

    def counts(self, policies: Policies) -> tuple[list[tuple[Ints, Ints]], list[tuple[Ints, Ints]]]:
        """Return (heads, neurons) that each block keeps, and (kept, left) tokens of each selection; all ``(S,)``."""
        blocks = []
        for place in self.places:
            h, m = len(place.v) - 1, place.block.hidden or 0
            none = np.zeros(len(policies))
            blocks.append(
                (
                    self._kept(h, policies[:, place.heads] if place.heads is not None else none),
                    self._kept(m, policies[:, place.hidden] if place.hidden is not None else none),
                )
            )
        if self.token is None:
            return blocks, []
        stage = self.spec.stages[0]
        return blocks, token_counts(stage.tokens, policies[:, self.token], len(self.selecting), stage.prefix + 1)

    def _kept(self, size: int, ratio: Policies) -> Ints:
        half = 0.5 if self.rounding == "nearest" else 1e-9
        return np.clip(np.floor(size * (1 - ratio) + half), min(size, 1), size).astype(np.int64)

    def realised(self, policies: Policies) -> Policies:
        """Return the ratios that are cut after rounding, ``(S, P)``; for tokens, the mean over the selections."""
        blocks, steps = self.counts(policies)
        real = np.zeros_like(policies)
        for place, (heads, hidden) in zip(self.places, blocks, strict=True):
            if place.heads is not None:
                real[:, place.heads] = 1 - heads / (len(place.v) - 1)
            if place.hidden is not None:
                real[:, place.hidden] = 1 - hidden / (place.block.hidden or 1)
        if self.token is not None:
            arriving, gone = np.full(len(policies), self.spec.stages[0].tokens), []
            for kept, left in steps:
                gone.append(1 - kept / arriving)
                arriving = left
            real[:, self.token] = np.mean(gone, axis=0)
        return real

    def costs(self, policies: Policies) -> Costs:
        """Return the costs of every policy, ``(S,)`` each; equal to `Budget.cost` of their plans."""
        blocks, steps = self.counts(policies)
        saved = np.zeros((len(policies), 2), dtype=np.int64)
        for place, (heads, hidden) in zip(self.places, blocks, strict=True):
            gone = (place.qk[-1] - place.qk[heads], place.v[-1] - place.v[heads], (place.block.hidden or 0) - hidden)
            for channels, rate in zip(gone, place.rates, strict=True):
                saved += channels[:, None] * np.array(rate)
            saved += np.multiply.outer(len(place.v) - 1 - heads, np.array(place.stage.of_a_head))
        times = np.zeros(len(policies), dtype=np.int64) if self.times is None else self.times(blocks, steps)
        macs = self.parent.macs - saved[:, 0] if self.token is None else self._macs_of_selected(blocks, steps)
        return Costs(macs, self.parent.params - saved[:, 1], times)

    def _macs_of_selected(self, blocks: list[tuple[Ints, Ints]], steps: list[tuple[Ints, Ints]]) -> Ints:
        """Return macs if each selection is between the attention and the MLP of its block."""
        stage = self.spec.stages[0]
        tokens = np.full(len(steps[0][0]), stage.tokens)
        macs = np.full(len(tokens), self.spec.host.macs, dtype=np.int64)
        left = dict(zip(self.selecting, (after for _, after in steps), strict=True))
        for index, (place, (heads, hidden)) in enumerate(zip(self.places, blocks, strict=True)):
            mixing: Any = tokens
            macs += attention_macs(mixing, stage.width, place.qk[heads], place.v[heads], mixing)
            after = left.get(index, tokens)
            if not stage.prefix:
                # Without a class token, all attention logits are computed again to measure what each token receives.
                macs += np.where(after < tokens, tokens**2 * place.qk[heads], 0)
            tokens = after
            rest: Any = tokens
            macs += mlp_macs(rest, stage.width, hidden, stage.form.factors)
        found: Ints = macs + tokens * self.spec.host.macs_per_token
        return found

    def _widths(self) -> list[list[tuple[int, int]]]:
        """Return, for each block, the widths (queries, values) of its heads, the best head first."""
        found = []
        for path, _, block in self.spec.blocks():
            pairs = list(zip(*widths_of(block.mixer), strict=True))
            order = self.ranking.get(f"{path}.heads")
            found.append(pairs if order is None else [pairs[head] for head in order.tolist()])
        return found

    def policy(self, preset: Preset) -> Policies:
        """Return the ratios of a published policy, ``(P,)``.

        Raises:
            MethodError: if it is for another model.
        """
        heads = tuple(len(place.v) - 1 for place in self.places)
        neurons = tuple(place.block.hidden or 0 for place in self.places)
        pairs = [*zip(preset.heads, heads, strict=False), *zip(preset.neurons, neurons, strict=False)]
        if len(heads) != len(preset.heads) or any(kept > all_ for kept, all_ in pairs) or self.token is None:
            raise MethodError(
                f"a preset must be of the model's {len(preset.heads)} blocks, heads and neurons with tokens to choose, "
                f"but the model has {len(heads)} blocks with {heads} heads; search a policy instead"
            )
        found = np.zeros(len(self.space.names))
        for place, k, m in zip(self.places, preset.heads, preset.neurons, strict=True):
            if place.heads is not None:
                found[place.heads] = 1 - k / (len(place.v) - 1)
            if place.hidden is not None:
                found[place.hidden] = 1 - m / (place.block.hidden or 1)
        found[self.token] = preset.tokens
        return found

    def _spent(self, policies: Policies) -> Policies:
        cost = self.costs(policies)
        shares = [getattr(cost, name) / max(limit, 1) for name, limit in self.limits.items()]
        return np.max(np.asarray(shares, dtype=np.float64), axis=0)  # type: ignore[no-any-return]


def widths_of(mixer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (mixer.qk, mixer.v) if isinstance(mixer, Attention) else ((), ())


def _rates(stage: Stage, block: Block) -> tuple[tuple[int, int], ...]:
    """Return the cost per channel or neuron; costs are linear in every width for a fixed number of tokens."""

    def cost(qk: int, v: int, hidden: int) -> tuple[int, int]:
        mixer = Attention(qk=(qk,), v=(v,), scale=1.0)
        return block_cost(block.model_copy(update={"mixer": mixer, "hidden": hidden}), stage)

    base = cost(1, 1, 1)
    return tuple((more[0] - base[0], more[1] - base[1]) for more in (cost(2, 1, 1), cost(1, 2, 1), cost(1, 1, 2)))


def released_macs(
    heads: tuple[int, ...],
    hidden: tuple[int, ...],
    ratio: float,
    *,
    width: int,
    channels: int,
    tokens: int = 197,
    selecting: tuple[int, ...] | None = None,
) -> int:
    """Return macs as the published code counts them: only blocks, no fused tokens, ``floor(N (1 - t)^s)`` tokens.

    Patch embedding and classifier are not counted. Use it only to compare with published figures; budgets use the macs
    of `vitrim.words.costs`.

    Args:
        heads: heads of each block, L numbers.
        hidden: neurons of each block.
        ratio: t.
        width: D.
        channels: of a head.
        tokens: N of the first block.
        selecting: blocks that select; `selection_blocks` if None.
    """
    steps = selection_blocks(len(heads)) if selecting is None else selecting
    total, passed = 0, 0
    for index, (k, m) in enumerate(zip(heads, hidden, strict=True)):
        before = math.floor(tokens * (1 - ratio) ** passed)
        passed += index in steps
        after = math.floor(tokens * (1 - ratio) ** passed)
        total += 2 * after * width * m + k * (4 * width * channels * before + 2 * before**2 * channels)
    return total
