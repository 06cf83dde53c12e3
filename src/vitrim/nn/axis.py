"""Axes: sets of channels that can be cut, with their members and taps.

The *members* are the slices of parameters that the channels index; `vitrim.cut.surgery` slices them. The *taps* are
identity modules through which the activations pass; masks are applied and activations are observed there. The *scales*
are the members for which multiplying the parameter by a gate equals multiplying the activations at the taps, so that a
gate needs no activation memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["Axis", "Member", "Tap", "columns", "rows"]


class Tap(nn.Module):
    """An identity on channels-last activations, ``(B, N, channels)``."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """Slice of one parameter along `dim`, from `offset`, with one entry for each channel of the axis.

    `second` marks the second of two members whose channels are multiplied with each other (queries and keys).
    """

    parameter: str
    dim: int
    offset: int
    second: bool = False


def rows(name: str, layer: nn.Module) -> Iterator[Member]:
    """Yield the members of an axis that a layer writes, or that a norm or a scale runs over.

    Args:
        name: of the layer, relative to what the members' names are relative to.
        layer: a linear layer, a convolution, a norm or a layer scale; anything without parameters yields nothing.
    """
    for own, _ in layer.named_parameters(recurse=False):
        yield Member(parameter=f"{name}.{own}", dim=0, offset=0)


def columns(name: str, layer: nn.Module) -> Iterator[Member]:
    """Yield the members of an axis that a linear layer or a convolution reads; see `rows`."""
    for own, parameter in layer.named_parameters(recurse=False):
        if parameter.dim() > 1:
            yield Member(parameter=f"{name}.{own}", dim=1, offset=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A set of channels that can be cut.

    Attributes:
        name: ``qk``, ``v`` or ``hidden``.
        groups: channels of each head; one group for hidden neurons.
        members: slices of parameters that the channels index, with names relative to the block.
        taps: names of the `Tap` modules, relative to the block.
        scales: members to which a gate can be applied in place of the taps; empty if there is a norm between them.
        tied: whether a norm ties the channels of a group, so that they can only be cut all together.
        group_members: slices of parameters with one entry for each group, removed with the last channel of the group.
    """

    name: str
    groups: tuple[int, ...]
    members: tuple[Member, ...]
    taps: tuple[str, ...]
    scales: tuple[Member, ...]
    tied: bool = False
    group_members: tuple[Member, ...] = ()

    @property
    def size(self) -> int:
        """Number of channels of all groups."""
        return sum(self.groups)
