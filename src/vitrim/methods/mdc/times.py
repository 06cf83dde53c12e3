"""Measured times of many policies, from the table of a budget.

L blocks, H heads, M hidden neurons, N tokens, S policies side by side.
"""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrim.words.budget import Budget
from vitrim.words.spec import Attention, Spec
from vitrim.words.steps import Tokens, flow_of
from vitrim.words.steps.top_k import TopK

__all__ = ["Times"]

Ints = NDArray[np.int64]


class Times:
    """Times of policies; those of each block are looked up once for each number of heads, neurons and tokens.

    Args:
        spec: the model.
        budget: a budget with a table.
        widths: for each block, the widths (queries, values) of its heads, the best head first.
        selecting: blocks that select tokens.
    """

    def __init__(
        self, spec: Spec, budget: Budget, widths: Sequence[Sequence[tuple[int, int]]], selecting: tuple[int, ...]
    ) -> None:
        self.spec, self.budget, self.widths, self.selecting = spec, budget, widths, selecting
        dense = sum(
            budget.block(block, stage, arriving).latency
            for (_, stage, block), arriving in zip(spec.blocks(), spec.arrivals(), strict=True)
        )
        self.host = budget.cost(spec).latency - dense
        self.rows = functools.cache(self._rows)
        self.block = functools.cache(self._block)

    def __call__(self, blocks: Sequence[tuple[Ints, Ints]], steps: Sequence[tuple[Ints, Ints]]) -> Ints:
        """Return the nanoseconds of each policy, ``(S,)``.

        Args:
            blocks: (heads, neurons) that each block keeps, ``(S,)`` each.
            steps: (kept, left) tokens of each selection, ``(S,)`` each.
        """
        heads, hidden = (np.stack([pair[part] for pair in blocks], axis=1).tolist() for part in (0, 1))
        size = len(heads)
        kept = np.stack([kept for kept, _ in steps], axis=1).tolist() if steps else [[]] * size
        found = np.full(size, self.host, dtype=np.int64)
        for row in range(size):
            tokens = tuple(kept[row])
            pairs = zip(heads[row], hidden[row], strict=True)
            found[row] += sum(self.block(index, tokens, k, m) for index, (k, m) in enumerate(pairs))
        return found

    def _rows(self, kept: tuple[int, ...]) -> list[tuple[Any, Tokens]]:
        """Return the token step of each block and the tokens that arrive there, if the selections keep `kept`."""
        if not kept:
            return [
                (block.tokens, here)
                for (_, _, block), here in zip(self.spec.blocks(), self.spec.arrivals(), strict=True)
            ]
        stage, counts = self.spec.stages[0], dict(zip(self.selecting, kept, strict=True))
        here, found = stage.enters, []
        for index in range(len(stage.blocks)):
            count = counts.get(index, here.total)
            step = TopK(kept=count) if count < here.total else None
            found.append((step, here))
            here = flow_of(step, here, stage.patches).leaves
        return found

    def _block(self, index: int, kept: tuple[int, ...], heads: int, hidden: int) -> int:
        _, stage, block = self.spec.blocks()[index]
        step, here = self.rows(kept)[index]
        mixer, chosen = block.mixer, self.widths[index][:heads]
        if isinstance(mixer, Attention):
            widths = {"qk": tuple(qk for qk, _ in chosen), "v": tuple(v for _, v in chosen)}
            mixer = mixer.model_copy(update=widths)
        update = {"mixer": mixer, "hidden": None if block.hidden is None else hidden, "tokens": step}
        return self.budget.block(block.model_copy(update=update), stage, here).latency
