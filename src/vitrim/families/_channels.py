"""The channels of the residual stream outside the blocks: where they lie, what they cost, and how they are cut.

D width of a stage.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from vitrim.nn.axis import Member
from vitrim.nn.copying import copied
from vitrim.nn.pooling import widen_
from vitrim.words.errors import AdoptError
from vitrim.words.spec import ChannelCost

__all__ = ["Channels", "Counted", "channel_costs", "channels_of", "kept_outside", "named", "narrow_"]


@dataclass(frozen=True, kw_only=True)
class Channels:
    """Where the channels of a stage's residual stream lie outside the blocks.

    All but `width` are dotted names relative to the model. Names that a model lacks, or that are None or an identity,
    are left out. A dimension of several times D holds the channels as many times, one run after the other (patch
    merging).

    Attributes:
        width: D.
        writers: linear layers and convolutions whose outputs are the channels.
        readers: linear layers and convolutions whose inputs are the channels.
        norms: norms through which layers outside the blocks read the channels.
        stem_norms: norms over the channels before the first block.
        direct: those of the readers that read the channels as they are, without a norm in between.
        pools: attention poolings of timm whose inside keeps its width (`vitrim.nn.pooling`).
        tensors: parameters and buffers whose last dimension are the channels (positions, class token).
        sizes: attributes that are D or a multiple of it.
    """

    width: int
    writers: tuple[str, ...] = ()
    readers: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    stem_norms: tuple[str, ...] = ()
    direct: tuple[str, ...] = ()
    pools: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()

    def within(self, name: str) -> "Channels":
        """Return the same for a model that holds this one as its child `name`."""
        names: dict[str, Any] = {
            field.name: tuple(f"{name}.{each}" for each in getattr(self, field.name))
            for field in fields(self)
            if field.name != "width"
        }
        return replace(self, **names)

    def joined(self, other: "Channels") -> "Channels":
        """Return the channels of both, which are those of one stage."""
        names: dict[str, Any] = {
            field.name: (*getattr(self, field.name), *getattr(other, field.name))
            for field in fields(self)
            if field.name != "width"
        }
        return replace(self, **names)


def channels_of(family: Any, model: nn.Module) -> tuple[Channels, ...]:
    """Return where the channels of each stage's residual stream lie outside the blocks of `model`.

    A family whose residual width can be cut offers ``channels(model)``, and tells in the spec's `Host.channels` what
    one channel costs (`channel_costs`). The result is empty for other families.
    """
    known = getattr(family, "channels", None)
    return () if known is None else tuple(known(model))


def _members(model: nn.Module, channels: Channels) -> Iterator[Member]:
    """Yield the slices of parameters and buffers that the channels index, with names relative to `model`."""
    written = (*channels.writers, *channels.norms, *channels.stem_norms)
    for name, dim in [(name, 0) for name in written] + [(name, 1) for name in channels.readers]:
        layer = named(model, name)
        for own in ("weight", "bias") if layer is not None else ():
            tensor = getattr(layer, own, None)
            if tensor is not None and tensor.dim() > dim:
                yield from _repeated(f"{name}.{own}", tensor, dim, channels.width)
    for name in channels.tensors:
        tensor = named(model, name)
        if tensor is not None:
            yield from _repeated(name, tensor, tensor.dim() - 1, channels.width)


def _repeated(name: str, tensor: Any, dim: int, width: int) -> Iterator[Member]:
    for offset in range(0, tensor.shape[dim], width):
        yield Member(parameter=name, dim=dim, offset=offset)


def named(model: Any, name: str) -> Any:
    """Return what has this name; None if there is nothing, or an identity."""
    for part in name.split("."):
        model = getattr(model, part, None)
    return None if isinstance(model, nn.Identity) else model


def kept_outside(
    model: nn.Module, channels: Channels, chosen: Sequence[int]
) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Yield name, dimension and kept entries of each tensor outside the blocks that holds the channels of a stage."""
    index = torch.tensor(list(chosen), dtype=torch.long)
    runs: dict[tuple[str, int], list[torch.Tensor]] = {}
    for member in _members(model, channels):
        runs.setdefault((member.parameter, member.dim), []).append(member.offset + index)
    for (name, dim), pieces in runs.items():
        yield name, dim, torch.cat(pieces)


@torch.no_grad()
def narrow_(model: nn.Module, stages: Sequence[Channels], kept: Sequence[Sequence[int] | None]) -> None:
    """Keep some channels of the residual stream of everything outside the blocks, in place.

    Args:
        model: the model; its blocks are left as they are.
        stages: the channels of each stage.
        kept: indices of the kept channels of each stage, in any number and order; None keeps all.
    """
    for number, (channels, chosen) in enumerate(zip(stages, kept, strict=True)):
        if chosen is None:
            continue
        for name, dim, index in kept_outside(model, channels, chosen):
            _slice_(model, name, dim, index)
        for name in (*channels.norms, *channels.stem_norms):
            norm = named(model, name)
            if norm is not None:
                norm.normalized_shape = (norm.normalized_shape[0] // channels.width * len(chosen),)
        for name in channels.pools:
            widen_(named(model, name))
        for name in channels.sizes:
            owner, _, leaf = name.rpartition(".")
            holder = named(model, owner) if owner else model
            if hasattr(holder, leaf):
                setattr(holder, leaf, getattr(holder, leaf) // channels.width * len(chosen))
        _tell_features_(getattr(model, "backbone", model), number, len(stages), len(chosen))


def _slice_(model: nn.Module, name: str, dim: int, index: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    holder: Any = model.get_submodule(owner)
    old = getattr(holder, leaf)
    value = old.detach().index_select(dim, index.to(old.device))
    setattr(holder, leaf, nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value)
    if isinstance(holder, nn.Linear):
        holder.out_features, holder.in_features = holder.weight.shape
    elif isinstance(holder, nn.Conv2d):
        holder.out_channels, holder.in_channels = holder.weight.shape[:2]


def _tell_features_(model: Any, stage: int, stages: int, width: int) -> None:
    infos = getattr(model, "feature_info", None)
    if isinstance(infos, list):
        model.feature_info = [
            {**info, "num_chs": width} if stages == 1 or place == stage else info for place, info in enumerate(infos)
        ]


class Counted(NamedTuple):
    """Costs outside the blocks, as in `vitrim.words.spec.Host`."""

    macs: int
    macs_per_token: int
    params: int


def channel_costs(
    shell: nn.Module, stages: Sequence[Channels], counted: Callable[[nn.Module], Counted], whole: Counted
) -> tuple[ChannelCost, ...]:
    """Return what one channel of each stage costs outside the blocks.

    Layers outside the blocks read or write one stage's channels, or lead from one stage to the next, so their cost is
    linear in the width of each stage. The slopes are differences between models with one channel more.

    Args:
        shell: a model without blocks on the meta device.
        stages: the channels of each stage; if empty, the result is, too.
        counted: function that returns the costs of such a model.
        whole: what it returns for `shell`.

    Returns:
        One for each stage; none if a part that somebody put into the model cannot follow.
    """
    if not stages:
        return ()
    try:
        return _slopes(shell, stages, counted, whole)
    except AdoptError:
        return ()


def _slopes(
    shell: nn.Module, stages: Sequence[Channels], counted: Callable[[nn.Module], Counted], whole: Counted
) -> tuple[ChannelCost, ...]:
    def cost(*grown: int) -> Counted:
        twin = copied(shell)
        narrow_(twin, stages, [(*range(one.width), 0) if i in grown else None for i, one in enumerate(stages)])
        return counted(twin)

    ones = [cost(index) for index in range(len(stages))]
    pairs = []
    for index in range(len(stages) - 1):
        both = cost(index, index + 1)
        pairs.append(tuple(b - x - y + w for b, x, y, w in zip(both, ones[index], ones[index + 1], whole, strict=True)))
    found = []
    for index, one in enumerate(ones):
        slope = [a - b for a, b in zip(one, whole, strict=True)]
        if index + 1 < len(stages):
            slope = [a - b * stages[index + 1].width for a, b in zip(slope, pairs[index], strict=True)]
        if index:
            slope = [a - b * stages[index - 1].width for a, b in zip(slope, pairs[index - 1], strict=True)]
        following = pairs[index] if index + 1 < len(stages) else (0, 0, 0)
        found.append(
            ChannelCost(
                macs=slope[0],
                macs_per_token=slope[1],
                params=slope[2],
                next_macs=following[0],
                next_params=following[2],
            )
        )
    return tuple(found)
