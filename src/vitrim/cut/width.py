"""The residual width as an axis: what reads the stream, and a model in which only some of its channels are there.

B images, N tokens, D width of a stage.

Its path is ``stages.0.width``. A channel of the residual stream is read through norms alone in most pre-norm models, so
its taps are the outputs of these norms: those of all branches, of patch merging, and the one before the head. Where
norms follow the branches, and where no norm stands before a layer outside the blocks, the taps are what comes to the
layers that read.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from vitrim.families import blocks_of, family_of
from vitrim.families._channels import channels_of, named
from vitrim.nn import Block
from vitrim.nn.axis import Member
from vitrim.nn.layers import norm_over
from vitrim.nn.stream import Stream
from vitrim.words.errors import MethodError
from vitrim.words.plain import did_you_mean

__all__ = ["Reader", "by_channel", "check_narrowable", "hearing", "keeping", "readers", "scaled_by", "widths"]


def widths(model: nn.Module) -> dict[str, int]:
    """Return D of each stage whose residual width can be cut, by path."""
    stages = channels_of(family_of(model), model)
    return {f"stages.{index}.width": one.width for index, one in enumerate(stages)}


def check_narrowable(model: nn.Module) -> None:
    """Raise if the residual width of `model` cannot be cut.

    Raises:
        MethodError: if so.
    """
    if not widths(model):
        raise MethodError(
            "width must not be cut in this model, for something outside its blocks cannot follow (attention pooling "
            "without weights, a stem of another kind, a family that does not say how); cut heads and neurons"
        )


class Reader(NamedTuple):
    """Where the channels of a stream are read.

    Attributes:
        module: a norm, or a layer without a norm before it, or the tap through which a branch without one reads.
        enters: whether the channels are what comes to the module, not what it gives.
        members: slices of the model's parameters on which a gate of the channels acts as it does there, each of D
            entries; None if there are none.
    """

    module: nn.Module
    enters: bool
    members: tuple[Member, ...] | None


def readers(model: nn.Module) -> dict[str, list[Reader]]:
    """Return where the channels of each stage are read, by path.

    Raises:
        MethodError: if nothing outside the blocks reads them, as in a model without norm and head.
    """
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, list[Reader]] = {}
    for index, one in enumerate(channels_of(family_of(model), model)):
        outside = [_norm(name, named(model, name), one.width) for name in one.norms if named(model, name) is not None]
        for name in one.direct:
            layer = named(model, name)
            if layer is not None:
                outside.append(Reader(layer, True, _runs(f"{name}.weight", 1, layer.weight, one.width)))
        if not outside:
            raise MethodError(
                f"stages.{index}.width: the channels must be read outside the blocks to be scored or gated, but this "
                "model has neither norm nor head; cut heads and neurons"
            )
        inside: list[Reader] = []
        for block in _stage(model, index):
            at = names[id(block)]
            if not block.form.post_norm:
                norms = [(name, norm) for name, norm in block.norms().items() if name in ("norm1", "norm2")]
                inside += [_norm(f"{at}.{name}", norm, one.width) for name, norm in norms]
            for tap, members in block.reading().items():
                own = None if members is None else tuple(_within(at, member) for member in members)
                inside.append(Reader(block.get_submodule(tap), False, own))
        found[f"stages.{index}.width"] = inside + outside
    return found


def _norm(name: str, norm: Any, width: int) -> Reader:
    scaled = getattr(norm, "weight", None) is not None
    own = [m for leaf, value in norm.named_parameters(recurse=False) for m in _runs(f"{name}.{leaf}", 0, value, width)]
    return Reader(norm, False, tuple(own) if scaled else None)


def _runs(name: str, dim: int, value: Any, width: int) -> tuple[Member, ...]:
    return tuple(Member(parameter=name, dim=dim, offset=offset) for offset in range(0, value.shape[dim], width))


def _within(at: str, member: Member) -> Member:
    return Member(parameter=f"{at}.{member.parameter}", dim=member.dim, offset=member.offset)


def by_channel(x: Tensor, module: nn.Module, width: int) -> Tensor:
    """Return the sums over all tokens of what is read, ``(B, D)``.

    Args:
        x: what comes to a reader or what it gives, ``(B, ..., D)``, or several runs of D one after the other. For maps
            ``(B, D, h, w)``.
        module: that of the reader.
        width: D.
    """
    return x.flatten(2).sum(2) if isinstance(module, _MAPPED) else x.reshape(len(x), -1, width).sum(1)


_MAPPED = (LayerNorm2d, nn.Conv2d)
"""Modules that take maps."""


def scaled_by(model: nn.Module, path: str) -> Iterator[tuple[Member, int]]:
    """Yield the slices of parameters on which a gate of a stream's channels acts as it does at `readers`, and D.

    Raises:
        MethodError: if a norm has no scale, or a branch passes channels on without one, so that a gate cannot act
            through the weights.
    """
    names = {id(module): name for name, module in model.named_modules()}
    size = widths(model).get(path)
    if size is None:
        raise MethodError(f"an axis must be one of the model's, but got '{path}'{did_you_mean(path, widths(model))}")
    for reader in readers(model)[path]:
        if reader.members is None:
            raise MethodError(
                f"{names[id(reader.module)]}: a gated stream must be read through norms with a scale or by weights, "
                "but here it is not; cut the width without gates"
            )
        yield from ((member, size) for member in reader.members)


@contextlib.contextmanager
def hearing(model: nn.Module, hear: Callable[[str, nn.Module, Tensor], Any]) -> Iterator[None]:
    """Call a function with what is read of a residual stream, wherever it is read, within the context.

    Args:
        model: an adopted model.
        hear: function of the path of the stream, the module of the `Reader`, and what is read.
    """

    def hook_of(path: str, module: nn.Module) -> Callable[[Tensor], Tensor]:
        def read(x: Tensor) -> Tensor:
            # A view, so that a gradient by it is by what is read here alone, not by the stream that goes on.
            own = x.view_as(x)
            hear(path, module, own)
            return own

        return read

    with contextlib.ExitStack() as stack:
        for path, found in readers(model).items():
            for reader in found:
                read = hook_of(path, reader.module)
                if reader.enters:
                    handle = reader.module.register_forward_pre_hook(
                        lambda _m, given, read=read: (read(given[0]), *given[1:])
                    )
                else:
                    handle = reader.module.register_forward_hook(lambda _m, _i, out, read=read: read(out))
                stack.callback(handle.remove)
        yield


def _stage(model: nn.Module, index: int) -> list[Block]:
    return [block for path, block in blocks_of(model) if path.startswith(f"stages.{index}.")]


@contextlib.contextmanager
def keeping(model: nn.Module, kept: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Run a model, within the context, as if only some channels of its residual streams were there.

    The other channels are zero, and the mean and variance of every norm are those of the kept ones. A model whose width
    is cut to the same channels computes the same.

    Args:
        model: an adopted model.
        kept: indices of the kept channels by path, at least one of each.
    """
    stages = channels_of(family_of(model), model)
    with contextlib.ExitStack() as stack:
        for path, chosen in kept.items():
            number = int(path.split(".")[1])
            one, blocks = stages[number], _stage(model, number)
            index = torch.tensor(list(chosen), dtype=torch.long)
            outside = [named(model, name) for name in (*one.norms, *one.stem_norms)]
            inside = [norm for block in blocks for norm in block.norms().values()]
            for norm in [norm for norm in (*outside, *inside) if norm is not None]:
                stack.callback(norm.register_forward_hook(_over(index, one.width)).remove)
            mask = _Mask(index, one.width)
            for block in blocks:
                stack.callback(block.register_forward_pre_hook(mask.before).remove)
                for module in (block.drop_path1, block.drop_path2, block):
                    stack.callback(module.register_forward_hook(mask.after).remove)
        yield


def _over(index: Tensor, width: int) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """Return a hook that computes a norm over some channels; the others are zero in its output."""

    def hook(norm: Any, given: Any, _: Tensor) -> Tensor:
        x: Tensor = given[0]
        runs = norm.normalized_shape[0] // width
        places = torch.cat([run * width + index for run in range(runs)]).to(x.device)
        small: Any = norm_over(norm, places)
        dim = 1 if isinstance(norm, LayerNorm2d) else -1
        return torch.zeros_like(x).index_copy(dim, places, small.forward(x.index_select(dim, places)))

    return hook


class _Mask:
    """Hooks that set the channels of the residual stream that are not kept to zero."""

    def __init__(self, index: Tensor, width: int) -> None:
        self.mask = torch.zeros(width).index_fill(0, index, 1.0)

    def before(self, _: nn.Module, given: Any) -> Any:
        return (self._masked(given[0]), *given[1:])

    def after(self, _: nn.Module, given: Any, out: Any) -> Any:
        return self._masked(out)

    def _masked(self, x: Any) -> Any:
        if isinstance(x, Stream):
            return x._replace(x=self._masked(x.x))
        return x * self.mask.to(x)
