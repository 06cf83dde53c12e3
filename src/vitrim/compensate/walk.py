"""Cut a model block after block, each on what the cut ones before it leave, and re-fit what stays.

B images, N tokens, D width, K channels of a head, M hidden neurons.

No weight is trained: every step is a closed form on moments of activations (`vitrim.search.recover`). Only layers that were
cut are re-fitted; re-fitting others too over-fits to a few hundred images (divergence 0.12 -> 0.15 to 0.22 after merging).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vitrim.compensate.heads import Heads
from vitrim.compensate.hear import arriving, attended, hidden, passed
from vitrim.compensate.importance import Importance, frozen, importances
from vitrim.errors import MethodError
from vitrim.families import blocks_of, describe
from vitrim.nn import Attention, Block, make_block, settled
from vitrim.plan import BlockPlan, Plan
from vitrim.search.recover import (
    Moments,
    least_squares_queries,
    query_key_maps,
    refit,
    removal_order,
    value_map,
)
from vitrim.spec import Attention as AttentionSpec
from vitrim.spec import Block as BlockSpec
from vitrim.spec import Skip, Stage, Tokens
from vitrim.surgery import apply

__all__ = ["Choice", "compensated", "fewest", "recovered"]

Kept = tuple[int, ...]
Widths = int | tuple[Kept, ...] | None


@dataclass(frozen=True)
class Choice:
    """What becomes of one block.

    Attributes:
        heads: those that stay; None for all.
        qk: channels of each living head, in a basis made for it; or those that each head keeps as they are, one entry a
            head of the parent; None leaves them alone.
        v: the same for values.
        hidden: neurons, to be chosen; or those that stay; None leaves them alone.
    """

    heads: Kept | None = None
    qk: Widths = None
    v: Widths = None
    hidden: int | Kept | None = None


@dataclass(eq=False)
class _Place:
    """A block of the parent, and where it stands."""

    path: str
    block: Block
    stage: Stage
    arrives: Tokens
    worth: Mapping[str, Importance]
    strength: float
    alpha: float

    def rebuilt(self, mixer: object, hidden: int | None, state: Mapping[str, Tensor]) -> Block:
        """The block with another mixer or MLP: parameters of `state`, and for the rest the parent's own."""
        node = self.block.spec.model_copy(update={"mixer": mixer, "hidden": hidden})
        with torch.device("meta"):
            block = make_block(self.stage, node, self.arrives)
        own = dict(self.block.named_parameters())
        like = next(iter(own.values()))
        for name, _ in list(block.named_parameters()):
            value = state[name].to(like.device, like.dtype) if name in state else own[name].detach()
            owner, _, leaf = name.rpartition(".")
            setattr(block.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
        return settled(block).eval()

    def scale(self, name: str) -> Tensor | None:
        """Layer scale after a branch, ``(D,)``."""
        gamma = getattr(getattr(self.block, name), "gamma", None)
        return None if gamma is None else gamma.detach()


def fewest(widths: int) -> int:
    """Images that moments over so many channels need at least: a few, for every image brings a token for each patch."""
    return 2 if widths < 64 else 8


def compensated(
    model: nn.Module,
    choices: Sequence[Choice],
    images: Sequence[Tensor],
    worth: Mapping[str, Importance],
    *,
    strength: float = 1e-2,
    alpha: float = 0.0,
    advance: Callable[[float], None] = lambda _: None,
) -> tuple[Plan, dict[str, Tensor]]:
    """Cut and compensate.

    Args:
        model: an adopted model, dense in its widths; it may have token steps. Left as it was.
        choices: one for each block.
        images: batches ``(B, C, h, w)``.
        worth: what `importances` found on this model with these images.
        strength: of the ridge, as a share of the mean diagonal of a layer's Gram matrix.
        alpha: share of the target of a re-fit that brings the stream back to the dense one; the rest is what the layer
            itself gave. 0 with merging, whose streams hold other tokens. In windows it counts for MLPs alone.
        advance: called with 1 after each block.

    Returns:
        A plan, and the child's parameters that are no slice of the parent's, by name.

    Raises:
        MethodError: naming the place, if activations are not finite or constant.
    """
    spec = describe(model)
    names = {id(module): name for name, module in model.named_modules()}
    plans: list[BlockPlan] = []
    grafts: dict[str, Tensor] = {}
    current: list[Tensor] | None = None
    dense: list[Tensor] | None = None
    stage_before: Stage | None = None
    with frozen(model):
        rows = zip(blocks_of(model), spec.blocks(), spec.arrivals(), choices, strict=True)
        for index, ((path, block), (_, stage, _), arrives, choice) in enumerate(rows):
            if stage is not stage_before:
                current = arriving(model, index, images, current)
                dense = arriving(model, index, images, dense) if alpha else None
                stage_before = stage
            assert current is not None
            place = _Place(path, block, stage, arrives, worth, strength, alpha)
            new, plan, state = _cut(place, choice, current, dense)
            plans.append(plan)
            grafts |= {f"{names[id(block)]}.{name}": value for name, value in state.items()}
            current = passed(new, current)
            dense = passed(block, dense) if dense is not None else None
            advance(1)
    return Plan.of(spec, plans), grafts


def _cut(
    place: _Place, choice: Choice, x: list[Tensor], dense: list[Tensor] | None
) -> tuple[Block, BlockPlan, dict[str, Tensor]]:
    block, node = place.block, place.block.spec
    state: dict[str, Tensor] = {}
    fields: dict[str, object] = {}
    mixer: object = node.mixer
    if isinstance(block.attn, Attention) and (choice.heads, choice.qk, choice.v) != (None, None, None):
        mixer, kept, state = attention(place, choice, x, dense)
        fields |= kept
    if node.hidden and choice.hidden is not None:
        half = place.rebuilt(mixer, node.hidden, state)
        places, more = neurons(place, half, choice.hidden, x, dense)
        state |= more
        fields["hidden"] = places
        rows = _sliced(block, places)
        new = place.rebuilt(mixer, len(places), rows | state)
    else:
        new = place.rebuilt(mixer, node.hidden, state)
    return new, BlockPlan.model_validate(fields), state


def _sliced(block: Block, places: Kept) -> dict[str, Tensor]:
    """Parameters of the MLP that are slices of the parent's."""
    index = torch.tensor(places, dtype=torch.long)
    axis = next(axis for axis in block.axes() if axis.name == "hidden")
    parameters = dict(block.named_parameters())
    runs: dict[str, list[Tensor]] = {}
    for member in axis.members:
        if member.dim == 0:
            value = parameters[member.parameter].detach()
            runs.setdefault(member.parameter, []).append(value[member.offset + index.to(value.device)])
    return {name: torch.cat(parts) for name, parts in runs.items()}


# -- attention


def attention(
    place: _Place, choice: Choice, x: list[Tensor], dense: list[Tensor] | None
) -> tuple[AttentionSpec, dict[str, object], dict[str, Tensor]]:
    """Cut heads, queries and keys, then values on what the new queries and keys see, then fit the projection."""
    block = place.block
    node, module = block.spec.mixer, block.attn
    assert isinstance(node, AttentionSpec)
    assert isinstance(module, Attention)
    alive = _living(choice, node)
    worth = place.worth[f"{place.path}.mixer"]
    targets = _targets(place, x, dense)
    if not alive:
        empty = node.model_copy(update={"qk": (), "v": ()})
        return empty, {"qk": ((),) * len(node.qk), "v": ((),) * len(node.v)}, _constant(place, worth, targets)
    heads = Heads.of(module)
    whole = heads.picked(alive)
    qk = choice.qk if not place.block.form.head_norm else None
    if qk is not None:
        heads = _queries_and_keys(place, heads, qk, alive, x, worth)
    else:
        heads = whole
    widths = tuple(len(rows) for rows in heads.q)
    kept: dict[str, object] = {"qk": _spread(alive, qk, widths, len(node.qk))}
    bias = _biases(module, alive)
    half = node.model_copy(update={"qk": widths, "v": tuple(len(rows) for rows in heads.v)})
    middle = place.rebuilt(half, block.spec.hidden, heads.state() | bias)
    moments = Moments(f"{place.path}.mixer", centred=heads.bias is not None)
    for number, batch in enumerate(x):
        moments.add(_part(worth, x, number), attended(middle, batch).mixed, targets[number])
    heads, values = _values(place, heads, choice.v, alive, moments, worth.metric)
    kept["v"] = values
    final = node.model_copy(update={"qk": widths, "v": tuple(len(rows) for rows in heads.v)})
    return final, kept, heads.state() | bias


def _living(choice: Choice, node: AttentionSpec) -> Kept:
    alive = choice.heads if choice.heads is not None else tuple(range(len(node.v)))
    for widths in (choice.qk, choice.v):
        if isinstance(widths, tuple):
            alive = tuple(head for head in alive if widths[head])
        elif widths == 0:
            alive = ()
    return alive


def _biases(module: Attention, alive: Kept) -> dict[str, Tensor]:
    """Parameters with one entry a head (position biases), of the living ones."""
    runs = {member.parameter: member for axis in module.axes() for member in axis.group_members}
    own = {f"attn.{name}": parameter for name, parameter in module.named_parameters()}
    index = torch.tensor(alive, dtype=torch.long)
    return {n: own[n].detach().index_select(m.dim, index.to(own[n].device)) for n, m in runs.items()}


def _targets(place: _Place, x: list[Tensor], dense: list[Tensor] | None) -> list[Tensor]:
    """What the projection is to give, batch by batch: its own dense output, drawn towards the dense stream by alpha."""
    own = [attended(place.block, batch).out for batch in x]
    if dense is None or place.stage.window is not None:
        return own
    scale = place.scale("ls1")
    theirs = [attended(place.block, batch).out for batch in dense]
    return [
        mine + place.alpha * (_unscaled(there - here, scale) + other - mine)
        for mine, other, here, there in zip(own, theirs, x, dense, strict=True)
    ]


def _unscaled(stream: Tensor, scale: Tensor | None) -> Tensor:
    """A difference of streams before layer scale; directions that it all but closes ask for nothing."""
    if scale is None:
        return stream
    open_ = scale.abs() > 1e-3 * scale.abs().max()
    return torch.where(open_, stream / torch.where(open_, scale, torch.ones_like(scale)), torch.zeros_like(stream))


def _constant(place: _Place, worth: Importance, targets: list[Tensor]) -> dict[str, Tensor]:
    if not place.block.form.out_bias:
        return {}
    moments = Moments(f"{place.path}.mixer")
    for number, target in enumerate(targets):
        moments.add(_part(worth, targets, number), target[..., :1], target)
    return {"attn.bias": _after(moments.target, place.scale("ls1"))}


def _after(mean: Tensor, scale: Tensor | None) -> Tensor:
    return mean if scale is None else mean * scale.cpu().double()


def _part(worth: Importance, batches: Sequence[Tensor], number: int) -> Tensor:
    """Token weights of batch `number`."""
    start = sum(len(batch) for batch in batches[:number])
    return worth.weights[start : start + len(batches[number])].to(batches[number].device)


def _queries_and_keys(
    place: _Place, heads: Heads, widths: int | tuple[Kept, ...], alive: Kept, x: list[Tensor], worth: Importance
) -> Heads:
    block = place.block
    module = block.attn
    assert isinstance(module, Attention)
    q_squares = [torch.zeros(k, k, dtype=torch.float64) for k in module.qk]
    k_squares = [torch.zeros(k, k, dtype=torch.float64) for k in module.qk]
    for number, batch in enumerate(x):
        weights = _part(worth, x, number)
        heard = attended(block, batch, weights)
        assert heard.received is not None
        for head, (q, k) in enumerate(
            zip(heard.queries.split(module.qk, -1), heard.keys.split(module.qk, -1), strict=True)
        ):
            q_squares[head] += _square(q, weights)
            received = heard.received[..., head]
            total = received.sum(1, keepdim=True).clamp_min(1e-30)
            mean = (received[..., None] * k).sum(1, keepdim=True) / total[..., None]
            k_squares[head] += _square(k - mean, received)
    new_q, new_k = [], []
    for head in alive:
        at = f"{place.path}.heads.{head}.qk"
        if isinstance(widths, int):
            a, b = query_key_maps(q_squares[head], k_squares[head], min(widths, module.qk[head]), at)
        else:
            b = torch.eye(module.qk[head], dtype=torch.float64)[:, list(widths[head])]
            a = least_squares_queries(k_squares[head], b, at)
        new_q.append(a.mT @ heads.q[head])
        new_k.append(b.mT @ heads.k[head])
    kept = heads.picked(alive)
    return Heads(new_q, new_k, kept.v, kept.proj, kept.bias, kept.biased)


def _square(x: Tensor, weights: Tensor) -> Tensor:
    flat = x.flatten(0, 1)
    found = (flat.mT @ (weights.reshape(-1, 1) * flat)).cpu().double()
    if not bool(torch.isfinite(found).all()):
        raise MethodError("activations must be finite on the calibration images, but some are NaN or infinite")
    return found


def _values(
    place: _Place, heads: Heads, widths: Widths, alive: Kept, moments: Moments, metric: Tensor
) -> tuple[Heads, tuple[Kept, ...]]:
    """Narrow the values and fit the projection to the targets."""
    sizes = [len(rows) for rows in heads.v]
    gram, cross = moments.gram, moments.cross
    maps, starts = [], []
    for head, (begin, size) in enumerate(zip(_starts(sizes), sizes, strict=True)):
        own = gram[begin : begin + size, begin : begin + size]
        whole = torch.eye(size, dtype=torch.float64)
        if widths is None or place.block.form.mixed_norm is not None:
            maps.append(whole)
            starts.append(heads.proj[head])
        elif isinstance(widths, int):
            at = f"{place.path}.heads.{alive[head]}.v"
            a, b = value_map(own, heads.proj[head], metric, min(widths, size), at)
            maps.append(a)
            starts.append(b)
        else:
            maps.append(whole[:, list(widths[alive[head]])])
            starts.append(heads.proj[head][:, list(widths[alive[head]])])
    both = torch.block_diag(*maps)
    at = f"{place.path}.v"
    weight = refit(both.mT @ gram @ both, cross @ both, torch.cat(starts, 1), place.strength, at)
    bias = None if heads.bias is None else moments.target - weight @ (both.mT @ moments.mean)
    values = [new.mT @ old for new, old in zip(maps, heads.v, strict=True)]
    columns = list(weight.split([new.shape[1] for new in maps], dim=1))
    count = len(place.block.spec.mixer.v)  # type: ignore[union-attr]
    kept = _spread(alive, widths, tuple(new.shape[1] for new in maps), count)
    return Heads(heads.q, heads.k, values, columns, bias, heads.biased), kept


def _starts(sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


def _spread(alive: Kept, widths: Widths, sizes: tuple[int, ...], count: int) -> tuple[Kept, ...]:
    """Kept channels of each head of the parent, as a plan says it; those of a new basis count as the first ones."""
    if isinstance(widths, tuple):
        return tuple(widths[head] if head in alive else () for head in range(count))
    size = dict(zip(alive, sizes, strict=True))
    return tuple(tuple(range(size.get(head, 0))) for head in range(count))


# -- MLP


def neurons(
    place: _Place, half: Block, width: int | Kept, x: list[Tensor], dense: list[Tensor] | None
) -> tuple[Kept, dict[str, Tensor]]:
    """Choose neurons where they are not given, and fit the layer that reads them."""
    moments, last = hidden_moments(place, half, x, dense)
    weight = last.weight.detach().cpu().double()
    if width == 0 or width == ():
        bias = {"mlp.bias": _after(moments.target, place.scale("ls2"))} if last.bias is not None else {}
        return (), bias
    at = f"{place.path}.hidden"
    if isinstance(width, int):
        order = removal_order(moments.gram, weight, place.worth[f"{place.path}.mlp"].metric, place.strength, at)
        width = tuple(sorted(order[len(order) - width :].tolist()))
    fitted, bias_value = read_neurons(moments, weight, width, place.strength, at)
    name = f"mlp.{half.mlp.last}"  # type: ignore[union-attr]
    state = {f"{name}.weight": fitted}
    if last.bias is not None:
        state[f"{name}.bias"] = bias_value
    return width, state


def hidden_moments(
    place: _Place, half: Block, x: list[Tensor], dense: list[Tensor] | None
) -> tuple[Moments, nn.Linear]:
    """Moments of the neurons and of what their layer is to give, and that layer."""
    last = half.mlp.get_submodule(half.mlp.last)  # type: ignore[union-attr, arg-type]
    assert isinstance(last, nn.Linear)
    worth, scale = place.worth[f"{place.path}.mlp"], place.scale("ls2")
    moments = Moments(f"{place.path}.hidden", centred=last.bias is not None)
    for number, batch in enumerate(x):
        features, out, middle = hidden(half, batch)
        if dense is not None:
            _, theirs, there = hidden(place.block, dense[number])
            gap = (there - middle).reshape(out.shape)
            out = out + place.alpha * (_unscaled(gap, scale) + theirs - out)
        moments.add(_part(worth, x, number), features, out)
    return moments, last


def read_neurons(moments: Moments, weight: Tensor, kept: Kept, strength: float, at: str) -> tuple[Tensor, Tensor]:
    """Weights and bias of the layer that reads the neurons that stay.

    Twice: the first re-fit is what Optimal Brain Surgeon leaves in its weights, the second is shrunk towards that.
    """
    index = torch.tensor(kept, dtype=torch.long)
    gram, cross = moments.gram[index][:, index], moments.cross[:, index]
    fitted = refit(gram, cross, weight[:, index], strength, at)
    fitted = refit(gram, cross, fitted, strength, at)
    return fitted, moments.target - fitted @ moments.mean[index]


# -- after any cut


def recovered(
    parent: nn.Module, plan: Plan, images: Sequence[Tensor], *, strength: float = 1e-2, alpha: float = 0.3, seed: int = 0
) -> dict[str, Tensor]:
    """Compensate what a plan of any method cuts: projections, second MLP layers and queries are re-fitted.

    Args:
        parent: the model that the plan is for, with the weights to cut.
        plan: what to cut; its choice of channels stays.
        images: batches ``(B, C, h, w)``.
        strength: see `compensated`.
        alpha: see `compensated`; taken as 0 where tokens are cut.
        seed: of the labels drawn for `importances`.

    Returns:
        Grafts of the child.
    """
    spec = describe(parent)
    steps = [decision.model_copy(update=dict.fromkeys(_WIDTHS)) for decision in plan.blocks()]
    cut = any(step != BlockPlan() for step in steps)
    base = apply(parent, Plan.of(spec, steps)) if cut else parent
    tokens = any(decision.tokens is not None for decision in plan.blocks()) or any(
        block.tokens is not None for _, _, block in spec.blocks()
    )
    choices = [
        _choice(decision, block) for decision, (_, _, block) in zip(plan.blocks(), describe(base).blocks(), strict=True)
    ]
    worth = importances(base, images, seed=seed)
    return compensated(base, choices, images, worth, strength=strength, alpha=0.0 if tokens else alpha)[1]


_WIDTHS = ("qk", "v", "hidden")


def _choice(decision: BlockPlan, block: BlockSpec) -> Choice:
    """The widths of a plan as a choice; what is skipped in `block` has none."""
    qk: Widths = None
    v: Widths = None
    if isinstance(block.mixer, AttentionSpec) and (decision.qk is not None or decision.v is not None):
        kept_qk, kept_v = decision.heads(block.mixer)
        whole = [tuple(range(k)) for k in block.mixer.qk], [tuple(range(k)) for k in block.mixer.v]
        qk = None if list(kept_qk) == whole[0] else kept_qk
        v = None if list(kept_v) == whole[1] else kept_v
    places = decision.hidden if not isinstance(decision.mlp, Skip) else None
    if places is not None and block.hidden == len(places):
        places = None
    return Choice(qk=qk, v=v, hidden=places)
