"""Multiply-accumulates and parameters of a spec, by arithmetic.

N tokens, P tokens with padding to whole windows, A keys of a query, D width, Q and V channels of all heads together
(queries or keys; values), M hidden neurons, G patches of the grid, d channels inside a convolution, k the side of its
kernel. Without windows both P and A are N.

`attention_macs`, `conv_macs` and `mlp_macs` take integers for a report and tensors for the differentiable cost of a
search: the penalty of a search and the table in the README are one formula. Counted are the products of linear layers,
convolutions and attention, as PyTorch's own counter does; norms, activations, softmax and additions are not.
"""

from typing import Any, NamedTuple

from vitrim.spec import Attention, Block, Conv, Form, Skip, Spec, Stage

__all__ = ["Cost", "attention_macs", "block_cost", "conv_macs", "cost_of", "mlp_macs"]


class Cost(NamedTuple):
    """What a model costs for one image."""

    macs: int
    params: int


def attention_macs(tokens: int, width: int, qk: Any, v: Any, keys: int | None = None) -> Any:
    """Multiply-accumulates of an attention branch, ``P D (2Q + V) + P A (Q + V) + P V D``.

    Args:
        tokens: P.
        width: D.
        qk: Q.
        v: V.
        keys: A; all tokens if None.
    """
    return tokens * (width * 2 * (qk + v) + (tokens if keys is None else keys) * (qk + v))


def conv_macs(patches: int, width: int, channels: Any, kernel: int) -> Any:
    """Multiply-accumulates of a bottleneck convolution, ``G D d (k^2 + 1)``.

    Kernels that are still mixed from an attention are priced as the convolution that they become: mixing is done once a
    forward pass, however many images there are, and is gone after folding.
    """
    return patches * width * channels * (kernel**2 + 1)


def mlp_macs(tokens: int, width: int, hidden: Any, factors: int = 1) -> Any:
    """Multiply-accumulates of an MLP branch, ``N D M (factors + 1)``."""
    return tokens * width * (factors + 1) * hidden


class _Place(NamedTuple):
    """What all blocks of a stage are priced with."""

    form: Form
    norm: int
    """Parameters of the norm before each branch."""
    width: int
    tokens: int
    padded: int
    keys: int
    offsets: int
    patches: int


def _place(stage: Stage) -> _Place:
    tokens, width, form, window = stage.tokens, stage.width, stage.form, stage.window
    norm = form.norm.params(width)
    if window is None:
        return _Place(form, norm, width, tokens, tokens, tokens, 0, stage.patches)
    rows, columns = window.padded(stage.grid)
    return _Place(form, norm, width, tokens, rows * columns, window.area, window.offsets, tokens)


def cost_of(spec: Spec) -> Cost:
    """Price a spec; 12 blocks take 17 microseconds (benchmarks/speed.py).

    The head is priced for the tokens that leave the last block.
    """
    macs, params, tokens = spec.host.macs, spec.host.params, 0
    for stage in spec.stages:
        place = _place(stage)
        tokens = place.tokens
        for block in stage.blocks:
            more_macs, more_params = _priced(block, place)
            macs += more_macs
            params += more_params
        if stage.blocks and stage.blocks[-1].tokens is not None:
            tokens = stage.prefix + len(stage.blocks[-1].tokens.kept)
    return Cost(macs + tokens * spec.host.macs_per_token, params)


def block_cost(block: Block, stage: Stage) -> tuple[int, int]:
    """Return (macs, params) of one block of `stage`, for the tokens that it runs on."""
    return _priced(block, _place(stage))


def _priced(block: Block, place: _Place) -> tuple[int, int]:
    form, norm, width, tokens, padded, keys, offsets, patches = place
    macs, params = 0, 0
    mixer, hidden, step = block.mixer, block.hidden, block.tokens
    if step is not None:
        missing = patches - len(step.kept)
        tokens -= missing
        # In the exact form one token more goes through attention, for all that are missing.
        padded = keys = tokens + (1 if step.exact and missing else 0)
    if isinstance(mixer, Attention):
        qk, v = sum(mixer.qk), sum(mixer.v)
        macs = attention_macs(padded, width, qk, v, keys)
        params = _attention_params(form, norm, width, qk, v)
        if offsets:
            params += offsets * len(mixer.v)
    elif isinstance(mixer, Conv):
        macs = conv_macs(patches, width, mixer.width, mixer.kernel)
        params = _conv_params(form, norm, width, mixer)
    elif isinstance(mixer, Skip) and mixer.leaves == "norm":
        params = norm + (width if form.layer_scale else 0)
    if hidden is not None:
        macs += mlp_macs(tokens, width, hidden, form.factors)
        params += _mlp_params(form, norm, width, hidden)
    return macs, params


def _attention_params(form: Form, norm: int, width: int, qk: int, v: int) -> int:
    params = width if form.out_bias else 0
    if not v:
        return params
    params += 2 * (qk + v) * width + norm
    if form.qkv_bias:
        params += 2 * qk + v
    if form.layer_scale:
        params += width
    if form.head_norm is not None:
        params += 2 * form.head_norm.params(form.head_norm_width)
    if form.mixed_norm is not None:
        params += form.mixed_norm.params(v)
    return params


def _conv_params(form: Form, norm: int, width: int, conv: Conv) -> int:
    params = norm + (width if form.out_bias else 0) + (width if form.layer_scale else 0)
    if conv.norm:
        params += 2 * conv.width
    if conv.mixture is not None:
        channels = conv.mixture.heads * conv.width
        return params + 2 * channels * width + (channels if form.qkv_bias else 0) + 9 * conv.mixture.heads
    return params + (conv.kernel**2 + 1) * conv.width * width + conv.width


def _mlp_params(form: Form, norm: int, width: int, hidden: int) -> int:
    params = width if form.mlp_out_bias else 0
    if not hidden:
        return params
    params += (form.factors + 1) * hidden * width + norm
    if form.hidden_bias:
        params += form.factors * hidden
    if form.layer_scale:
        params += width
    if form.hidden_norm is not None:
        params += form.hidden_norm.params(hidden)
    if form.inner_norm is not None:
        params += form.inner_norm.params(width)
    return params
