"""An axis: a set of channels with its members and its taps.

The *members* are the parameters that the channels index; surgery slices them. The *taps* are identities through which
the activations pass; masks and gates hang there, observers listen there. The *scales* are the members on which a
multiplication by a gate equals the same multiplication at the taps, so that a gate can cost no activation memory.
"""

from dataclasses import dataclass

from torch import Tensor, nn

__all__ = ["Axis", "Member", "Tap"]


class Tap(nn.Module):
    """An identity on channels-last activations, ``(B, N, channels)``."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """As many entries of one parameter as the axis has channels, from `offset` on along `dim`."""

    parameter: str
    dim: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A set of channels that can be cut.

    Attributes:
        name: ``qk``, ``v`` or ``hidden``.
        groups: channels of each head; one group for hidden neurons.
        members: runs of parameters indexed by the channels, names relative to the block.
        taps: names of the `Tap` modules, relative to the block.
        scales: members that carry a gate in place of the taps; empty where a norm stands between.
        tied: whether a norm ties the channels of a group, so that they go together or not at all.
        group_members: runs of parameters with one entry for each group, which goes with the last of its channels.
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
        """All channels of all groups."""
        return sum(self.groups)
