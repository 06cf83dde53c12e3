"""Closed forms for SPViT: convolutions fitted to each attention, what each choice loses, and gates that start apart.

D width, M hidden neurons.

Every convolution is fitted on the dense model, by itself. What it loses is the divergence of the model's output from
the dense one on other images, if nothing else is changed. Losses of several choices do not add up exactly: convolutions
in all late blocks, where the class token reads nothing any more, lose more than the sum of each.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from vitrim.cut.compensate import (
    BlockChoice,
    ConvCut,
    NeuronCut,
    Place,
    Walk,
    arriving,
    compensated,
    importances,
    passed,
    resumed,
)
from vitrim.cut.outputs import divergence, logits_of
from vitrim.cut.surgery import apply
from vitrim.families import describe
from vitrim.methods.spvit import gates
from vitrim.methods.spvit.paths import FittedPaths
from vitrim.methods.spvit.planning import planned
from vitrim.methods.spvit.prices import Prices
from vitrim.methods.spvit.search import Layout, SinglePath
from vitrim.nn import Block
from vitrim.nn.feed import fed
from vitrim.nn.modes import evaluating
from vitrim.nn.stream import Residual
from vitrim.words.plan import Plan
from vitrim.words.spec import Attention as AttentionSpec
from vitrim.words.spec import Conv, Spec

__all__ = ["Fits", "fits", "refitted", "start_"]

_STRENGTH = 1e-2
"""Ridge of the neurons, as in `vitrim.cut.compensate.compensated`."""


@dataclass(frozen=True, eq=False)
class Fits:
    """What was fitted and measured on a dense model.

    Attributes:
        convs: by path of a block, the parameters and buffers of its 1 x 1 and its 3 x 3 convolution.
        losses: by path of a block, the loss with a 3 x 3 convolution, with a 1 x 1, and with nothing; not falling.
        neurons: by path of an axis, the loss of each neuron, ``(M,)``: what its removal adds after all cheaper ones.
    """

    convs: dict[str, tuple[Mapping[str, Tensor], Mapping[str, Tensor]]] = field(default_factory=dict)
    losses: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    neurons: dict[str, Tensor] = field(default_factory=dict)


def fits(
    model: nn.Module,
    how: Layout,
    images: Sequence[Tensor],
    probe: Sequence[Tensor],
    *,
    seed: int,
    advance: Callable[[float], None] = lambda _: None,
) -> Fits:
    """Fit both convolutions of each block, and measure what they lose.

    Args:
        model: an adopted dense model; it is not changed.
        how: see `Layout`; `fitted` must be true.
        images: batches to fit on.
        probe: batches of other images, to measure on.
        seed: seed of drawn labels.
        advance: called with 1 after each block.

    Raises:
        MethodError: if there are too few images, or activations are not finite.
    """
    worth, found = importances(model, images, seed=seed), Fits()
    with evaluating(model, frozen=True), torch.no_grad():
        dense = logits_of(model, probe)
        walk = Walk(model, images, worth, _STRENGTH, 0.0)
        place, entering = walk.first(), arriving(model, walk.blocks, 0, probe, None)
        for index in range(len(walk.rows)):
            loss = _Loss(model, walk.blocks, index, entering, probe, dense)
            if place.path in how.mixtures:
                _fit_convs(found, place, how, loss)
            if place.block.spec.hidden and place.block.form.hidden_norm is None:
                _rank_neurons(found, place, loss)
            advance(1)
            if index + 1 < len(walk.rows):
                stage, left = place.stage, passed(place.block, entering)
                place = walk.send(passed(place.block, place.streams))
                entering = left if place.stage is stage else arriving(model, walk.blocks, index + 1, probe, left)
    return found


@dataclass(frozen=True, eq=False)
class _Loss:
    """The divergence of a model's output if one block is another."""

    model: nn.Module
    blocks: Sequence[Block]
    index: int
    entering: Sequence[Residual]
    probe: Sequence[Tensor]
    dense: Tensor

    def __call__(self, block: Block) -> float:
        found = []
        for x, images in zip(self.entering, self.probe, strict=True):
            with resumed(self.blocks, self.index + 1, block(x)):
                found.append(self.model(fed(images, self.model)).float().cpu())
        return divergence(self.dense, torch.cat(found))


def _fit_convs(found: Fits, place: Place, how: Layout, loss: _Loss) -> None:
    mixer, hidden = place.block.spec.mixer, place.block.spec.hidden
    assert isinstance(mixer, AttentionSpec)
    cut = ConvCut(place)
    states: list[Mapping[str, Tensor]] = []
    losses: list[float] = []
    for level in (2, 1, 0):
        chosen = how.mixer(place.path, mixer, level)
        state: dict[str, Tensor] = {}
        if isinstance(chosen, Conv):
            chosen, _, state = cut.cut(chosen)
            own = {name.removeprefix("attn."): value for name, value in state.items()}
            states.append({name: value for name, value in own.items() if not name.startswith("read.")})
        # A cheaper choice with a smaller loss is chance: what follows in the order contains it.
        losses.append(max(loss(place.rebuilt(chosen, hidden, state)), losses[-1] if losses else 0.0))
    found.convs[place.path] = (states[1], states[0])
    found.losses[place.path] = (losses[0], losses[1], losses[2])


def _rank_neurons(found: Fits, place: Place, loss: _Loss) -> None:
    """Distribute the loss of half of the neurons over all, in the order of their removal, as a square law."""
    hidden = place.block.spec.hidden
    assert hidden
    cut = NeuronCut(place, place.block)
    kept, state = cut.cut(max(1, hidden // 2))
    half = loss(place.rebuilt(place.block.spec.mixer, len(kept), state))
    ranks = torch.empty(hidden, dtype=torch.float64)
    ranks[cut.order] = (torch.arange(hidden, dtype=torch.float64) + 0.5) / hidden
    found.neurons[f"{place.path}.hidden"] = 8 * half * ranks / hidden


@torch.no_grad()
def start_(single: SinglePath, fits: Fits, prices: Prices, start: float) -> None:
    """Give the convolutions of a search model their fits, and its gates logits in the order of their losses."""
    for path, (one, three) in fits.convs.items():
        beside = single.beside(path)
        assert isinstance(beside, FittedPaths)
        for conv, state in ((beside.one, one), (beside.three, three)):
            mine = conv.state_dict()
            conv.load_state_dict({name: value.to(mine[name]) for name, value in state.items()})
    logits: list[Tensor] = []
    density: list[Tensor] = []
    saves: list[Tensor] = []
    for path, (three_loss, one_loss, none_loss) in fits.losses.items():
        closing = prices.steps[path][::-1]
        more = (three_loss, one_loss - three_loss, none_loss - one_loss)
        # The gate of the attention closes first; among equal densities the order of this list decides.
        logits.append(single.step(path))
        density.append(torch.tensor(gates.densities(more, closing), dtype=torch.float64))
        saves.append(torch.tensor(closing, dtype=torch.float64))
    for path, losses in fits.neurons.items():
        logits.append(single.gate(path))
        density.append(losses / prices.neurons[path])
        saves.append(torch.full_like(losses, prices.neurons[path]))
    spread = gates.spread(start, torch.cat(density), torch.cat(saves))
    for gate, values in zip(logits, torch.split(spread, [len(gate) for gate in logits]), strict=True):
        steps = len(gate) == 3 and any(gate is step for step in single.steps.values())
        gate.copy_(values.flip(0) if steps else values)


def refitted(
    model: nn.Module,
    spec: Spec,
    how: Layout,
    levels: Mapping[str, int],
    neurons: Mapping[str, Tensor],
    images: Sequence[Tensor],
    *,
    seed: int,
) -> dict[str, Tensor]:
    """Return the child's parameters that are no slices of the dense model's, fitted block after block.

    Args:
        model: the dense model.
        spec: its spec.
        how: how attentions become convolutions.
        levels: by path of a block, how many of its ordered gates are open.
        neurons: by path of an axis, which neurons are kept.
        images: batches to fit on.
        seed: seed of drawn labels.
    """
    skipped = planned(spec, how, {path: 3 if level else 0 for path, level in levels.items()}, {})
    base = apply(model, skipped) if skipped != Plan.keep(spec) else model
    choices = []
    for path, _, block in describe(base).blocks():
        conv = how.mixer(path, block.mixer, levels.get(path, 3)) if isinstance(block.mixer, AttentionSpec) else None
        keep = neurons.get(f"{path}.hidden")
        hidden = None if keep is None or bool(keep.all()) else tuple(keep.nonzero().flatten().tolist())
        choices.append(BlockChoice(conv=conv if isinstance(conv, Conv) else None, hidden=hidden))
    return compensated(base, choices, images, importances(base, images, seed=seed))[1]
