"""Multiply-accumulates and parameters of a spec, computed without building the model.

N tokens, P tokens with padding to whole windows, R queries, A keys of a query, D width, Q query (or key) channels of
all heads together, V value channels of all heads together, M hidden neurons, G patches of the grid, d channels inside a
convolution, k side of its kernel. Without windows P = N. If queries are computed for all tokens, R = A = N.

`attention_macs`, `conv_macs` and `mlp_macs` take integers for a report and tensors for the differentiable cost of a
search. The penalty of a search and the table in the README therefore use the same formula. The products of linear
layers, convolutions and attention are counted, as in PyTorch's own counter. Norms, activations, softmax and additions
are not counted.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from vitrim.words.spec import Attention, Block, Conv, Form, Skip, Spec, Stage
from vitrim.words.steps import Tokens, flow_of

__all__ = ["Cost", "attention_macs", "block_cost", "conv_macs", "cost_of", "mlp_macs", "read_macs"]


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


def read_macs(prefix: int, tokens: int, width: int, heads: Attention) -> int:
    """Return the multiply-accumulates of prefix tokens that read with an attention of their own, ``2 X D (E + H N)``.

    Keys and values are not computed (`vitrim.nn.read`): queries and what they read are mapped instead.

    Args:
        prefix: X, the prefix tokens.
        tokens: N, all tokens.
        width: D.
        heads: H heads with E query and value channels together.
    """
    return 2 * prefix * width * (sum(heads.qk) + sum(heads.v) + len(heads.v) * tokens)


def mlp_macs(tokens: int, width: int, hidden: Any, factors: int = 1) -> Any:
    """Return the multiply-accumulates of an MLP branch, ``N D M (factors + 1)``."""
    return tokens * width * (factors + 1) * hidden


def cost_of(spec: Spec) -> Cost:
    """Return the cost of `spec`, in some tens of microseconds for 12 blocks (benchmarks/speed.py).

    The cost of the head is computed for the tokens after the last block.
    """
    macs, params, leaving = spec.host.macs, spec.host.params, 0
    for stage in spec.stages:
        more_macs, more_params, leaves = _priced(stage.blocks, stage, None)
        macs += more_macs
        params += more_params
        leaving = stage.tokens if leaves is None else leaves.pooled
    return Cost(macs + leaving * spec.host.macs_per_token, params)


def block_cost(block: Block, stage: Stage, arriving: Tokens | None = None) -> tuple[int, int]:
    """Return (macs, params) of one block of `stage`.

    Args:
        block: the block.
        stage: the stage that contains it.
        arriving: the tokens at its input; those of the whole grid if None.
    """
    macs, params, _ = _priced((block,), stage, None if stage.window is not None else arriving)
    return macs, params


def _priced(blocks: Sequence[Block], stage: Stage, arriving: Tokens | None) -> tuple[int, int, Tokens | None]:
    """Return (macs, params) of consecutive blocks of a stage and the tokens after them.

    None stands for the tokens of the whole grid, which all blocks have that no token step precedes. What blocks of a
    stage share is computed once: a loop over blocks is most of the time that pricing takes, and a search prices
    thousands of specs.
    """
    width, form, window, prefix = stage.width, stage.form, stage.window, stage.prefix
    rows, columns = stage.grid
    whole = patches = rows * columns
    tokens = projected = keys = prefix + whole
    if window is not None:
        rows, columns = window.padded((rows, columns))
        projected, keys = rows * columns, window.area
    channel, neuron = attention_macs(projected, width, 1, 0, keys, projected), mlp_macs(tokens, width, 1, form.factors)
    macs = params = attentions = dead_attentions = heads = all_qk = all_v = mlps = dead_mlps = neurons = 0
    for block in blocks:
        mixer, hidden, step = block.mixer, block.hidden, block.tokens
        if step is not None or arriving is not None or block.only_prefix:
            here = stage.enters if arriving is None else arriving
            projected, queries, keys, tokens, mixed, arriving = flow_of(step, here, whole, block.only_prefix)
            channel = attention_macs(projected, width, 1, 0, keys, queries)
            neuron, patches = mlp_macs(tokens, width, 1, form.factors), mixed.patches
            if step is not None:
                own = step.own_cost(here, width, sum(mixer.qk) if isinstance(mixer, Attention) else 0)
                macs, params = macs + own[0], params + own[1]
        if isinstance(mixer, Attention):
            widths = mixer.v
            if widths:
                qk, v = sum(mixer.qk), sum(widths)
                macs += channel * (qk + v)
                attentions += 1
                heads += len(widths)
                all_qk += qk
                all_v += v
            else:
                dead_attentions += 1
        elif isinstance(mixer, Conv):
            macs += conv_macs(patches, width, mixer.width, mixer.kernel)
            params += _conv_params(form, width, mixer, prefix)
            if mixer.heads is not None:
                macs += read_macs(prefix, prefix + patches, width, mixer.heads)
                params += _read_params(form, width, mixer.heads)
        elif isinstance(mixer, Skip) and mixer.leaves == "norm":
            params += form.norm.params(width) + (width if form.layer_scale else 0)
        if hidden:
            macs += neuron * hidden
            mlps += 1
            neurons += hidden
        elif hidden is not None:
            dead_mlps += 1
    of_a_head, of_an_attention, each = stage.of_a_head, stage.of_an_attention, _params(form, width)
    macs += heads * of_a_head[0] + attentions * of_an_attention[0]
    params += dead_attentions * each.dead_attention + attentions * (each.attention + of_an_attention[1])
    params += heads * of_a_head[1] + all_qk * each.qk + all_v * each.v
    params += dead_mlps * each.dead_mlp + mlps * each.mlp + neurons * each.neuron
    return macs, params, arriving


class _Params(NamedTuple):
    """Parameters of the branches of a block, for its counts of heads, channels and neurons."""

    dead_attention: int
    """An attention without heads."""
    attention: int
    """An attention with heads, besides those of the heads."""
    qk: int
    """A channel of all queries and keys."""
    v: int
    dead_mlp: int
    """An MLP without neurons."""
    mlp: int
    """An MLP with neurons, besides those of the neurons."""
    neuron: int


def _params(form: Form, width: int) -> _Params:
    norm = form.norm.params(width) + (width if form.layer_scale else 0)
    dead_attention, dead_mlp = width if form.out_bias else 0, width if form.mlp_out_bias else 0
    attention, mlp = dead_attention + norm, dead_mlp + norm
    factors = form.factors
    qk, v, neuron = 2 * width, 2 * width, (factors + 1) * width
    if form.qkv_bias:
        qk += 2 if form.k_bias else 1
        v += 1
    if form.hidden_bias:
        neuron += factors
    if form.head_norm is not None:
        attention += 2 * form.head_norm.params(form.head_norm_width)
    if form.mixed_norm is not None:
        v += form.mixed_norm.params(1)
    if form.hidden_norm is not None:
        neuron += form.hidden_norm.params(1)
    if form.inner_norm is not None:
        mlp += form.inner_norm.params(width)
    return _Params(dead_attention, attention, qk, v, dead_mlp, mlp, neuron)


def _read_params(form: Form, width: int, heads: Attention) -> int:
    """Return the parameters of an attention with which prefix tokens read, without norm and layer scale."""
    each = _params(form, width)
    return sum(heads.qk) * each.qk + sum(heads.v) * each.v + each.dead_attention


def _conv_params(form: Form, width: int, conv: Conv, prefix: int) -> int:
    params = form.norm.params(width) + (width if form.out_bias else 0) + (width if form.layer_scale else 0)
    if conv.prefix == "mean":
        params += prefix * width
    if conv.norm:
        params += 2 * conv.width
    if conv.mixture is not None:
        channels = conv.mixture.heads * conv.width
        return params + 2 * channels * width + (channels if form.qkv_bias else 0) + 9 * conv.mixture.heads
    return params + (conv.kernel**2 + 1) * conv.width * width + conv.width
