"""Cut the MLP of one block: choose the neurons to keep, and re-fit the last layer to its output before the cut.

B images, N tokens, D width, M hidden neurons.
"""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from vitrim.cut.compensate.closed_form import Moments, refit
from vitrim.cut.compensate.hear import hidden
from vitrim.cut.compensate.place import Kept, Place, part
from vitrim.cut.compensate.removal import removals
from vitrim.nn import Block, Mlp
from vitrim.nn.feed import exact

__all__ = ["NeuronCut"]


class NeuronCut:
    """Cuts of one MLP to one or more widths; activations are recorded only once.

    Args:
        place: the block, which must have neurons.
        half: the block after its attention was cut, with the MLP of the parent.
    """

    def __init__(self, place: Place, half: Block) -> None:
        mlp = half.mlp
        assert isinstance(mlp, Mlp)
        last = mlp.get_submodule(mlp.last)
        assert isinstance(last, nn.Linear)
        self.place, self.half, self.last = place, half, last
        self.name, self.at = f"mlp.{mlp.last}", f"{place.path}.hidden"
        self.worth = place.worth[f"{place.path}.mlp"]
        self.weight = exact(last.weight.detach())
        self._gone: list[Tensor] = []

    def cut(self, width: int | Kept) -> tuple[Kept, dict[str, Tensor]]:
        """Return the kept neurons, and new parameters by name, relative to the block.

        The layer is fitted twice. The first fit gives the weights of Optimal Brain Surgeon, and the second is
        regularized towards them.
        """
        biased = self.last.bias is not None
        if width == 0 or width == ():
            state = {"mlp.bias": self.place.added(self.target, 2)} if biased else {}
            return (), state
        kept = self._left(width) if isinstance(width, int) else width
        index = torch.tensor(kept, dtype=torch.long)
        moments = self.moments.of(index)
        weight = self.weight[:, index]
        weight = refit(moments.gram, moments.cross, weight, self.place.strength, self.at, passes=2)
        state = {f"{self.name}.weight": weight}
        if biased:
            state[f"{self.name}.bias"] = moments.target - weight @ moments.mean
        return kept, state | self._rows(kept)

    @functools.cached_property
    def order(self) -> Tensor:
        """All neurons, in order of removal."""
        self._gone.extend(self._removals)
        return torch.cat(self._gone).cpu()

    def _left(self, width: int) -> Kept:
        """Return the neurons that stay if all but `width` are removed."""
        count = self.last.in_features - width
        while sum(map(len, self._gone)) < count:
            self._gone.append(next(self._removals))
        first = torch.cat(self._gone)[:count].tolist() if count > 0 else []
        return tuple(sorted({*range(self.last.in_features)} - {*first}))

    @functools.cached_property
    def _removals(self) -> Iterator[Tensor]:
        known, strength, half = self.moments, self.place.strength, self.worth.half
        return removals(known.gram, self.weight, strength, self.at, half=half, noise=known.noise)

    @functools.cached_property
    def moments(self) -> Moments:
        """Moments of the neurons and of the target output of the last layer."""
        return self._moments(self.last.in_features)

    @functools.cached_property
    def target(self) -> Tensor:
        """Mean of the target output, ``(D,)``, for which no products of neurons are needed."""
        known = self.moments if "moments" in self.__dict__ else self._moments(0)
        return known.target

    def _moments(self, count: int) -> Moments:
        """Return the moments of the first `count` neurons and of the target."""
        place = self.place
        moments = Moments(self.at, centred=self.last.bias is not None)
        for number, batch in enumerate(place.streams):
            features, out, middle = hidden(self.half, batch)
            if place.dense is not None:
                _, theirs, there = hidden(place.block, place.dense[number])
                out = place.toward(out, theirs, (there - middle).reshape(out.shape), 2)
            moments.add(part(self.worth, place.streams, number), features[..., :count], out)
        return moments

    def _rows(self, kept: Kept) -> dict[str, Tensor]:
        """Return the parameters that are slices of the parent's."""
        index = torch.tensor(kept, dtype=torch.long)
        axis = next(axis for axis in self.place.block.axes() if axis.name == "hidden")
        parameters = dict(self.place.block.named_parameters())
        runs: dict[str, list[Tensor]] = {}
        for member in axis.members:
            if member.dim == 0:
                value = parameters[member.parameter].detach()
                runs.setdefault(member.parameter, []).append(value[member.offset + index.to(value.device)])
        return {name: torch.cat(parts) for name, parts in runs.items()}
