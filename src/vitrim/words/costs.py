"""Multiply-accumulates and parameters of a spec, computed without building the model.

N tokens, P tokens with padding to whole windows, R queries, A keys of a query, D width, Q query (or key) channels of
all heads together, V value channels of all heads together, M hidden neurons, G patches of the grid, d channels inside a
convolution, k side of its kernel. Without windows P = N. If queries are computed for all tokens, R = A = N.

`attention_macs`, `conv_macs` and `mlp_macs` take integers for a report and tensors for the differentiable cost of a
search. The penalty of a search and the table in the README therefore use the same formula. The products of linear
layers, convolutions and attention are counted, as in PyTorch's own counter. Norms, activations, softmax and additions
are not counted.
"""

from typing import Any, NamedTuple

from vitrim.words.spec import Attention, Block, Conv, Form, Skip, Spec, Stage
from vitrim.words.steps import Tokens, flow_of

__all__ = ["Cost", "attention_macs", "block_cost", "conv_macs", "cost_of", "mlp_macs"]


class Cost(NamedTuple):
    """Cost of a model for one image."""

    macs: int
    params: int


def attention_macs(
    tokens: int, width: int, qk: Any, v: Any, keys: int | None = None, queries: int | None = None
) -> Any:
    """Return the multiply-accumulates of an attention branch, ``(P D + R D + R A) (Q + V)``.

    Args:
        tokens: P, the tokens for which keys and values are computed.
        width: D.
        qk: Q.
        v: V.
        keys: A; all tokens if None.
        queries: R, the tokens for which queries and outputs are computed; all tokens if None.
    """
    asking = tokens if queries is None else queries
    return (tokens * width + asking * (width + (tokens if keys is None else keys))) * (qk + v)


def conv_macs(patches: int, width: int, channels: Any, kernel: int) -> Any:
    """Return the multiply-accumulates of a bottleneck convolution, ``G D d (k^2 + 1)``.

    Kernels that are still mixed from an attention are counted as the folded convolution, without the mixing. Mixing is
    done once for each forward pass, independent of the number of images, and is not needed after folding.
    """
    return patches * width * channels * (kernel**2 + 1)


def mlp_macs(tokens: int, width: int, hidden: Any, factors: int = 1) -> Any:
    """Return the multiply-accumulates of an MLP branch, ``N D M (factors + 1)``."""
    return tokens * width * (factors + 1) * hidden


class _Place(NamedTuple):
    """Values that the costs of all blocks of a stage depend on."""

    form: Form
    norm: int
    """Parameters of the norm before each branch."""
    width: int
    tokens: int
    padded: int
    keys: int
    head: tuple[int, int]
    """Macs and parameters of a head besides its channels."""
    shared: tuple[int, int]
    """Macs and parameters of an attention besides its heads."""
    attention: tuple[int, int, int, int]
    """Parameters of an attention: always, if it has a head, and for each channel of queries and of values."""
    mlp: tuple[int, int, int]
    """Parameters of an MLP: always, if it has a neuron, and for each neuron."""
    factors: int
    enters: Tokens


def _place(stage: Stage) -> _Place:
    tokens, width, form, window = stage.tokens, stage.width, stage.form, stage.window
    norm, padded, keys = form.norm.params(width), tokens, tokens
    if window is not None:
        rows, columns = window.padded(stage.grid)
        padded, keys = rows * columns, window.area
    return _Place(
        form, norm, width, tokens, padded, keys, stage.of_a_head, stage.of_an_attention, _attention_params(form, width),
        _mlp_params(form, width), form.factors, stage.enters,
    )  # fmt: skip


def cost_of(spec: Spec) -> Cost:
    """Return the cost of `spec`, in some tens of microseconds for 12 blocks (benchmarks/speed.py).

    The cost of the head is computed for the tokens after the last block.
    """
    macs, params, leaving = spec.host.macs, spec.host.params, 0
    for stage in spec.stages:
        place, here = _place(stage), None
        for block in stage.blocks:
            more_macs, more_params, here = _priced(block, place, here)
            macs += more_macs
            params += more_params
        leaving = place.tokens if here is None else here.pooled
    return Cost(macs + leaving * spec.host.macs_per_token, params)


def block_cost(block: Block, stage: Stage, arriving: Tokens | None = None) -> tuple[int, int]:
    """Return (macs, params) of one block of `stage`.

    Args:
        block: the block.
        stage: the stage that contains it.
        arriving: the tokens at its input; those of the whole grid if None.
    """
    macs, params, _ = _priced(block, _place(stage), None if stage.window is not None else arriving)
    return macs, params


def _priced(block: Block, place: _Place, arriving: Tokens | None) -> tuple[int, int, Tokens | None]:
    """Return (macs, params) of a block and the tokens after it; None means the tokens of the whole grid."""
    form, norm, width, rows, padded, keys, head, shared, attention, mlp, factors, enters = place
    macs, params, leaving, queries, patches = 0, 0, arriving, padded, enters.patches
    mixer, hidden, step = block.mixer, block.hidden, block.tokens
    if step is not None or arriving is not None or block.only_prefix:
        here = enters if arriving is None else arriving
        padded, queries, keys, rows, mixed, leaving = flow_of(step, here, enters.patches, block.only_prefix)
        patches = mixed.patches
        if step is not None:
            macs, params = step.own_cost(here, width, sum(mixer.qk) if isinstance(mixer, Attention) else 0)
    if isinstance(mixer, Attention):
        qk, v = sum(mixer.qk), sum(mixer.v)
        macs += attention_macs(padded, width, qk, v, keys, queries)
        always, alive, each_qk, each_v = attention
        params += always + alive + each_qk * qk + each_v * v if v else always
        if mixer.v:
            macs += shared[0] + head[0] * len(mixer.v)
            params += shared[1] + head[1] * len(mixer.v)
    elif isinstance(mixer, Conv):
        macs += conv_macs(patches, width, mixer.width, mixer.kernel)
        params += _conv_params(form, norm, width, mixer, enters.prefix)
    elif isinstance(mixer, Skip) and mixer.leaves == "norm":
        params += norm + (width if form.layer_scale else 0)
    if hidden is not None:
        macs += mlp_macs(rows, width, hidden, factors)
        always, alive, each = mlp
        params += always + alive + each * hidden if hidden else always
    return macs, params, leaving


def _attention_params(form: Form, width: int) -> tuple[int, int, int, int]:
    """Return the numbers of `_Place.attention`."""
    alive = form.norm.params(width) + (width if form.layer_scale else 0)
    if form.head_norm is not None:
        alive += 2 * form.head_norm.params(form.head_norm_width)
    each_qk, each_v = 2 * width, 2 * width
    if form.qkv_bias:
        each_qk += 2 if form.k_bias else 1
        each_v += 1
    if form.mixed_norm is not None:
        each_v += form.mixed_norm.params(1)
    return width if form.out_bias else 0, alive, each_qk, each_v


def _conv_params(form: Form, norm: int, width: int, conv: Conv, prefix: int) -> int:
    params = norm + (width if form.out_bias else 0) + (width if form.layer_scale else 0)
    if conv.prefix == "mean":
        params += prefix * width
    if conv.norm:
        params += 2 * conv.width
    if conv.mixture is not None:
        channels = conv.mixture.heads * conv.width
        return params + 2 * channels * width + (channels if form.qkv_bias else 0) + 9 * conv.mixture.heads
    return params + (conv.kernel**2 + 1) * conv.width * width + conv.width


def _mlp_params(form: Form, width: int) -> tuple[int, int, int]:
    """Return the numbers of `_Place.mlp`."""
    alive, each = form.norm.params(width) + (width if form.layer_scale else 0), (form.factors + 1) * width
    if form.hidden_bias:
        each += form.factors
    if form.hidden_norm is not None:
        each += form.hidden_norm.params(1)
    if form.inner_norm is not None:
        alive += form.inner_norm.params(width)
    return width if form.mlp_out_bias else 0, alive, each
