"""The residual width as an axis: what reads the stream, and a model in which only some of its channels are there.

B images, N tokens, D width of a stage.

Its path is ``stages.0.width``. A channel of the residual stream is read through norms alone in a pre-norm model, so its
taps are the outputs of these norms: those of all branches, of patch merging, and the one before the head.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from vitrim.families import blocks_of, family_of
from vitrim.families._channels import channels_of, named
from vitrim.nn import Block
from vitrim.nn.axis import Member
from vitrim.nn.stream import Stream
from vitrim.words.errors import MethodError
from vitrim.words.plain import did_you_mean

__all__ = ["by_channel", "check_narrowable", "hearing", "keeping", "readers", "scaled_by", "widths"]


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
            "width must not be cut in this model, for something outside its blocks cannot follow (attention pooling, a "
            "stem of another kind, a family that does not say how); cut heads and neurons"
        )


def readers(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Return the norms through which the channels of each stage are read, by path.

    Raises:
        MethodError: if a head reads the stream without a norm.
    """
    found: dict[str, list[nn.Module]] = {}
    for index, one in enumerate(channels_of(family_of(model), model)):
        norms = [named(model, name) for name in one.norms]
        outside = [norm for norm in norms if norm is not None]
        if not outside:
            raise MethodError(
                f"stages.{index}.width: the channels must be read through a norm to be scored or gated, but the head "
                "of this model reads them without one; cut heads and neurons"
            )
        inside = [
            norm for block in _stage(model, index) for name, norm in block.norms().items() if name in ("norm1", "norm2")
        ]
        found[f"stages.{index}.width"] = inside + outside
    return found


def by_channel(x: Tensor, norm: nn.Module, width: int) -> Tensor:
    """Return the sums over all tokens of what a norm gives, ``(B, D)``.

    Args:
        x: of the shape of the norm's output, ``(B, ..., D)``, or several runs of D one after the other. For norms of
            maps ``(B, D, h, w)``.
        norm: the norm.
        width: D.
    """
    return x.flatten(2).sum(2) if isinstance(norm, LayerNorm2d) else x.reshape(len(x), -1, width).sum(1)


def scaled_by(model: nn.Module, path: str) -> Iterator[tuple[Member, int]]:
    """Yield the slices of parameters on which a gate of a stream's channels acts as it does at `readers`, and D.

    Raises:
        MethodError: if a norm has no scale, so that a gate cannot act through the weights.
    """
    names = {id(module): name for name, module in model.named_modules()}
    size = widths(model).get(path)
    if size is None:
        raise MethodError(f"an axis must be one of the model's, but got '{path}'{did_you_mean(path, widths(model))}")
    for norm in readers(model)[path]:
        if getattr(norm, "weight", None) is None:
            raise MethodError(
                f"{names[id(norm)]}: a gated stream must be read through norms with a scale, but this one has none"
            )
        for own, value in norm.named_parameters(recurse=False):
            for offset in range(0, len(value), size):
                yield Member(parameter=f"{names[id(norm)]}.{own}", dim=0, offset=offset), size


@contextlib.contextmanager
def hearing(model: nn.Module, hear: Callable[[str, nn.Module, Tensor], Any]) -> Iterator[None]:
    """Call a function with what each norm gives that reads a residual stream, within the context.

    Args:
        model: an adopted model.
        hear: function of the path of the stream, the norm and its output.
    """
    with contextlib.ExitStack() as stack:
        for path, norms in readers(model).items():
            for norm in norms:

                def hook(norm: nn.Module, _: Any, out: Tensor, path: str = path) -> None:
                    hear(path, norm, out)

                stack.callback(norm.register_forward_hook(hook).remove)
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
        small = copy.copy(norm)
        small.normalized_shape = (len(places),)
        small._parameters = {
            name: None if value is None else nn.Parameter(value.detach()[places])
            for name, value in norm._parameters.items()
        }
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
