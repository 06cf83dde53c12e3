"""Cut heads, queries, keys and values of one attention, and re-fit the projection to its output before the cut.

B images, N tokens, D width, H heads, K channels of a head.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vitrim.cut.compensate.balance import balanced, ratio_of
from vitrim.cut.compensate.closed_form import (
    Moments,
    directions,
    least_squares_queries,
    query_key_maps,
    refit,
    value_map,
)
from vitrim.cut.compensate.heads import Heads
from vitrim.cut.compensate.hear import attended
from vitrim.cut.compensate.place import BlockChoice, Kept, Place, Widths, part
from vitrim.nn import Attention
from vitrim.nn.feed import exact, uncast, wide
from vitrim.nn.stream import tokens_of
from vitrim.words.errors import MethodError
from vitrim.words.spec import Attention as AttentionSpec

__all__ = ["AttentionCut"]

State = dict[str, Tensor]
Fields = dict[str, object]


@dataclass(frozen=True, eq=False)
class _Heard:
    """What one pass of all batches through the attention of the parent gives.

    Attributes:
        targets: targets of the projection for each batch: its own output, moved towards the dense stream by alpha.
        moments: moments of the outputs of all heads.
        squares: moments of queries, and of keys around the mean key of their image, ``(K, K)`` for each head; None if
            they were not asked for, because the attention that a key receives costs a backward pass.
    """

    targets: list[Tensor]
    moments: Moments
    squares: tuple[list[Tensor], list[Tensor]] | None


class AttentionCut:
    """Cuts of one attention to one or more choices of widths; activations of the parent are recorded only once.

    Args:
        place: the block, which must have attention.
    """

    def __init__(self, place: Place) -> None:
        module, node = place.block.attn, place.block.spec.mixer
        assert isinstance(module, Attention)
        assert isinstance(node, AttentionSpec)
        self.place, self.module, self.node = place, module, node
        self._at = f"{place.path}.mixer"
        self.worth = place.worth[self._at]
        self._known: _Heard | None = None

    def cut(self, choice: BlockChoice) -> tuple[AttentionSpec, Fields, State]:
        """Return the new mixer, its part of the plan, and its new parameters by name, relative to the block.

        Queries and keys are cut first, then values with the new attention weights, then the projection is re-fitted.
        """
        alive = self._living(choice)
        if not alive:
            empty = self.node.of((), (), ())
            nothing = ((),) * len(self.node.v)
            return empty, {"qk": nothing, "v": nothing}, self._constant()
        heads = self.heads.picked(alive)
        qk = None if self.place.block.form.ties_qk else choice.qk
        if qk is None:
            moments = self._of(self.moments, alive)
        else:
            heads = self._queries_and_keys(heads, qk, alive)
            moments = self._moments(heads, alive)
        widths = tuple(len(rows) for rows in heads.q)
        heads, kept = self._values(heads, choice.v, alive, moments, moved=qk is not None)
        mixer = self.node.of(alive, widths, [len(rows) for rows in heads.v])
        fields: Fields = {"qk": self._with_dead_heads(alive, qk, widths), "v": kept}
        return mixer, fields, heads.state() | self._biases(alive)

    def turned(self) -> State:
        """Return parameters of the same function whose channels are ordered in each head, the most valuable first.

        Queries and keys are rotated into the directions that matter for their products, and values into those that
        matter for the output, see `directions` and `value_map`. What a norm or a rotation by position ties stays.
        """
        heads, form = self.heads, self.place.block.form
        if not form.ties_qk:
            bases = [torch.linalg.qr(best)[0] for best in self.directions]
            turned = [[basis.mT @ old for basis, old in zip(bases, part, strict=True)] for part in (heads.q, heads.k)]
            heads = replace(heads, q=turned[0], k=turned[1])
        if form.mixed_norm is None:
            values = [new.mT @ old for (new, _), old in zip(self.value_maps, heads.v, strict=True)]
            values, columns = self._balanced(heads, values, [columns for _, columns in self.value_maps])
            heads = replace(heads, v=values, proj=columns)
        return heads.state()

    @functools.cached_property
    def heads(self) -> Heads:
        """The parent's layers, split by heads."""
        return Heads.of(self.module)

    @property
    def targets(self) -> list[Tensor]:
        """Targets of the projection for each batch, ``(B, N, D)``."""
        return self._heard(False).targets

    @property
    def moments(self) -> Moments:
        """Moments of the outputs of all heads, with the parent's queries and keys."""
        return self._heard(False).moments

    @property
    def squares(self) -> tuple[list[Tensor], list[Tensor]]:
        """Moments of queries, and of keys around the mean key of their image, ``(K, K)`` for each head."""
        found = self._heard(True).squares
        assert found is not None
        return found

    def _heard(self, asked: bool) -> _Heard:
        """Return the records of the parent; `asked`: with those of queries and keys, then in the same pass."""
        if self._known is None or (asked and self._known.squares is None):
            self._known = self._hear(asked)
        return self._known

    def _hear(self, asked: bool) -> _Heard:
        place, widths = self.place, list(self.module.qk)
        targets, moments = [], Moments(self._at, centred=self.heads.bias is not None)
        home = self.worth.metric
        queries = [home.new_zeros(k, k) for k in widths]
        keys = [home.new_zeros(k, k) for k in widths]
        for number, batch in enumerate(place.streams):
            weights = part(self.worth, place.streams, number)
            heard = attended(place.block, batch, weights if asked else None)
            targets.append(self._toward(heard.out, number))
            moments.add(weights, heard.mixed, targets[-1])
            if heard.received is None:
                continue
            split = [torch.split(wide(x), widths, dim=-1) for x in (heard.queries, heard.keys)]
            for head, (q, k) in enumerate(zip(*split, strict=True)):
                received = wide(heard.received[..., head])
                total = received.sum(1, keepdim=True).clamp_min(1e-30)
                mean = (received[..., None] * k).sum(1, keepdim=True) / total[..., None]
                queries[head] += _square(q, weights)
                keys[head] += _square(k - mean, received)
        if asked:
            _check(place.path, [*queries, *keys])
        return _Heard(targets, moments, (queries, keys) if asked else None)

    def _toward(self, own: Tensor, number: int) -> Tensor:
        """Return the target of batch `number` for the projection's own output."""
        place = self.place
        if place.dense is None or place.stage.window is not None:
            return own
        here, there = place.streams[number], place.dense[number]
        other = attended(place.block, there).out
        return place.toward(own, other, (tokens_of(there) - tokens_of(here))[:, : own.shape[1]], 1)

    def _moments(self, heads: Heads, alive: Kept) -> Moments:
        mixer = self.node.of(alive, [len(rows) for rows in heads.q], [len(rows) for rows in heads.v])
        hidden = self.place.block.spec.hidden
        block = self.place.rebuilt(mixer, hidden, heads.state() | self._biases(alive))
        moments = Moments(self._at, centred=heads.bias is not None)
        for number, batch in enumerate(self.place.streams):
            moments.add(
                part(self.worth, self.place.streams, number), attended(block, batch).mixed, self.targets[number]
            )
        return moments

    def _of(self, moments: Moments, alive: Kept) -> Moments:
        """Return the moments of the heads `alive` only."""
        starts = _starts(self.node.v)
        index = torch.cat([torch.arange(starts[head], starts[head] + self.node.v[head]) for head in alive])
        index = index.to(moments.squares.device)
        return moments.of(index)

    def _living(self, choice: BlockChoice) -> Kept:
        alive = choice.heads if choice.heads is not None else tuple(range(len(self.node.v)))
        for widths in (choice.qk, choice.v):
            if isinstance(widths, tuple):
                alive = tuple(head for head in alive if widths[head])
            elif widths == 0:
                alive = ()
        return alive

    def _biases(self, alive: Kept) -> State:
        """Return the parameters with one entry for each head (position biases), for the heads `alive`."""
        runs = {member.parameter: member for axis in self.module.axes() for member in axis.group_members}
        own = {f"attn.{name}": parameter for name, parameter in self.module.named_parameters()}
        index = torch.tensor(alive, dtype=torch.long)
        return {n: own[n].detach().index_select(m.dim, index.to(own[n].device)) for n, m in runs.items()}

    def _constant(self) -> State:
        """Return the constant of a branch without heads: the mean of the target, after layer scale."""
        if not self.place.block.form.out_bias:
            return {}
        return {"attn.bias": self.place.added(self.moments.target, 1)}

    def _queries_and_keys(self, heads: Heads, widths: int | tuple[Kept, ...], alive: Kept) -> Heads:
        keys = [self.squares[1][head] for head in alive]
        a: Sequence[Tensor] | Tensor
        b: Sequence[Tensor] | Tensor
        sizes, at = {self.node.qk[head] for head in alive}, f"{self.place.path}.qk"
        if isinstance(widths, int) and len(sizes) == 1:
            best = torch.stack([self.directions[head] for head in alive])
            a, b = query_key_maps(best, torch.stack(keys), min(widths, *sizes), at)
        elif isinstance(widths, int):
            each = zip(alive, keys, strict=True)
            maps = [
                query_key_maps(self.directions[head], own, min(widths, self.node.qk[head]), at) for head, own in each
            ]
            a, b = [one for one, _ in maps], [other for _, other in maps]
        else:
            b = [_identity(own)[:, list(widths[head])] for own, head in zip(keys, alive, strict=True)]
            a = [least_squares_queries(own, basis, at) for own, basis in zip(keys, b, strict=True)]
        new_q = [new.mT @ old for new, old in zip(a, heads.q, strict=True)]
        return replace(heads, q=new_q, k=[new.mT @ old for new, old in zip(b, heads.k, strict=True)])

    @functools.cached_property
    def directions(self) -> list[Tensor]:
        """Directions of queries and keys of each head, the same for all widths."""
        queries, keys = self.squares
        if len(set(self.module.qk)) == 1:
            return list(directions(torch.stack(queries), torch.stack(keys)))
        return [directions(q, k) for q, k in zip(queries, keys, strict=True)]

    @functools.cached_property
    def value_maps(self) -> list[tuple[Tensor, Tensor]]:
        """Maps of the values of each head with the parent's queries and keys, for all widths."""
        return self._maps(self.heads, self.moments)

    def _maps(self, heads: Heads, moments: Moments) -> list[tuple[Tensor, Tensor]]:
        sizes, gram = [len(rows) for rows in heads.v], moments.positive_gram
        own = [gram[i : i + size, i : i + size] for i, size in zip(_starts(sizes), sizes, strict=True)]
        half, at = self.worth.half, f"{self.place.path}.v"
        if len(set(sizes)) == 1:
            a, b = value_map(torch.stack(own), torch.stack(heads.proj), half, at, moments.noise)
            return list(zip(a, b, strict=True))
        return [value_map(one, columns, half, at, moments.noise) for one, columns in zip(own, heads.proj, strict=True)]

    def _values(
        self, heads: Heads, widths: Widths, alive: Kept, moments: Moments, moved: bool
    ) -> tuple[Heads, tuple[Kept, ...]]:
        """Reduce the value channels and fit the projection to the targets; `moved`: whether queries were cut before."""
        sizes = [len(rows) for rows in heads.v]
        gram, tied = moments.positive_gram, self.place.block.form.mixed_norm is not None
        maps, columns = [], []
        bases: list[tuple[Tensor, Tensor]] = []
        if isinstance(widths, int) and not tied:
            bases = self._maps(heads, moments) if moved else [self.value_maps[head] for head in alive]
        for number, (begin, size) in enumerate(zip(_starts(sizes), sizes, strict=True)):
            whole = _identity(gram[begin : begin + size, begin : begin + size])
            if widths is None or tied:
                maps.append(whole)
                columns.append(heads.proj[number])
            elif isinstance(widths, int):
                width = min(widths, size)
                maps.append(bases[number][0][:, :width])
                columns.append(bases[number][1][:, :width])
            else:
                maps.append(whole[:, list(widths[alive[number]])])
                columns.append(heads.proj[number][:, list(widths[alive[number]])])
        both, at = torch.block_diag(*maps), f"{self.place.path}.v"  # type: ignore[no-untyped-call]
        small, cross = both.mT @ gram @ both, moments.cross @ both
        weight = refit(small, cross, torch.cat(columns, 1), self.place.strength, at)
        bias = None if heads.bias is None else moments.target - weight @ (both.mT @ moments.mean)
        values = [new.mT @ old for new, old in zip(maps, heads.v, strict=True)]
        new_sizes = tuple(new.shape[1] for new in maps)
        columns = list(torch.split(weight, list(new_sizes), dim=1))
        if bases:
            values, columns = self._balanced(heads, values, columns)
        made = replace(heads, v=values, proj=columns, bias=bias)
        return made, self._with_dead_heads(alive, widths, new_sizes)

    def _balanced(self, heads: Heads, values: list[Tensor], columns: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return values and columns whose channels have norms in the parent's ratio."""
        pairs = [
            balanced(new, after, ratio_of(old[:, : old.shape[1] - heads.biased], old_after), heads.biased)
            for new, after, old, old_after in zip(values, columns, heads.v, heads.proj, strict=True)
        ]
        return [value for value, _ in pairs], [column for _, column in pairs]

    def _with_dead_heads(self, alive: Kept, widths: Widths, sizes: tuple[int, ...]) -> tuple[Kept, ...]:
        """Return the kept channels of each head of the parent; channels of a new basis are given as the first ones."""
        if isinstance(widths, tuple):
            return tuple(widths[head] if head in alive else () for head in range(len(self.node.v)))
        size = dict(zip(alive, sizes, strict=True))
        return tuple(tuple(range(size.get(head, 0))) for head in range(len(self.node.v)))


def _starts(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


def _identity(like: Tensor) -> Tensor:
    return torch.eye(len(like), dtype=like.dtype, device=like.device)


def _square(x: Tensor, weights: Tensor) -> Tensor:
    flat = wide(x.flatten(0, 1))
    with uncast(flat.device):
        return exact(flat.mT @ (weights.reshape(-1, 1).to(flat.dtype) * flat))


def _check(at: str, squares: Sequence[Tensor]) -> None:
    """Raise an error if a matrix is not finite; all are read at once, because each reading waits for the device."""
    if not bool(torch.stack([square.sum() for square in squares]).isfinite().all()):
        raise MethodError(
            f"{at}.qk: activations must be finite on the calibration images, but some are NaN or infinite; "
            "check weights and normalization"
        )
