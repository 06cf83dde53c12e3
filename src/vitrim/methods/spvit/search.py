"""SPViT's model during the search, and the cost of its structure.

T tokens of an image, H heads, d channels of a head, M hidden neurons.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vitrim.cut.observe import Gated, axes, key_of
from vitrim.families import blocks_of, describe
from vitrim.methods.spvit import gates
from vitrim.methods.spvit.paths import Paths
from vitrim.nn import Attention, Block, WindowBlock
from vitrim.nn.feed import summing
from vitrim.words.budget import Budget
from vitrim.words.costs import block_cost, conv_macs, cost_of, mlp_macs
from vitrim.words.errors import MethodError
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Attention as AttentionSpec
from vitrim.words.spec import Conv, Mixture, Skip, Spec

__all__ = ["Counting", "Layout", "Prices", "SinglePath", "layout", "prices"]

Counting = Literal["published", "counted"]
"""``published``: the authors' rule, with one product a channel for each norm, and neurons only on patches; or ours."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How attentions of a model become convolutions.

    Attributes:
        mixtures: by path of a block, what its convolutions are mixed from; no other block's attention can be changed.
        prefix: see `vitrim.words.spec.Conv`.
        leaves: see `vitrim.words.spec.Skip`.
    """

    mixtures: Mapping[str, Mixture]
    prefix: Literal["norm", "zero"]
    leaves: Literal["zero", "norm"]

    def mixer(self, path: str, mixer: AttentionSpec, level: int) -> Conv | Skip | None:
        """Return the replacement of an attention with the first `level` of three gates open; None if it is kept."""
        if level == 3:
            return None
        if level == 0:
            return Skip(leaves=self.leaves)
        kernel: Literal[1, 3] = 1 if level == 1 else 3
        return Conv(kernel=kernel, width=mixer.v[0], prefix=self.prefix, mixture=self.mixtures[path], norm=True)


def layout(
    spec: Spec,
    *,
    temperature: float | None = None,
    prefix: Literal["norm", "zero"] = "norm",
    leaves: Literal["zero", "norm"] = "zero",
) -> Layout:
    """Return how the attentions of `spec` become convolutions; includes every attention that has a head.

    Args:
        spec: the parent.
        temperature: of the mixture; None for the published one, 0.01, or 100 for windows.
        prefix: see `Layout`.
        leaves: see `Layout`.

    Raises:
        PlanError: naming the path and the reason, if one cannot become a convolution.
        MethodError: if there is no attention.
    """
    mixtures = {
        path: Mixture(
            heads=len(block.mixer.v),
            temperature=temperature or (0.01 if stage.window is None else 100.0),
            slots="columns" if stage.window is None else "centre",
        )
        for path, stage, block in spec.blocks()
        if isinstance(block.mixer, AttentionSpec) and block.mixer.v
    }
    if not mixtures:
        raise MethodError("a model must have attention that can become convolution, but it has none left")
    found = Layout(mixtures=mixtures, prefix=prefix, leaves=leaves)
    # Plan the most demanding choice everywhere, because the plan raises an error with the reason if it is impossible.
    choices = [
        BlockPlan(mixer=found.mixer(path, block.mixer, 2))
        if path in mixtures and isinstance(block.mixer, AttentionSpec)
        else BlockPlan()
        for path, _, block in spec.blocks()
    ]
    Plan.of(spec, choices).child(spec)
    return found


class SinglePath(Gated):
    """A model with gates on all attentions and neurons, whose weights are shared by all choices.

    In training, gates are drawn at each forward pass, once for all its images: those of one part of a step on one
    process. In evaluation, gates are open if their logits are above 0. Gates multiply the output projections of
    attentions and MLPs, which is the same as multiplying the outputs.

    Args:
        model: an adopted model; trained in place together with the gates.
        how: see `Layout`.
        windowed: whether 3 x 3 convolutions of a Swin read single windows, shifted like the attention's, as published;
            if not, they read the whole map, as in the final network.
    """

    def __init__(self, model: nn.Module, how: Layout, windowed: bool = False) -> None:
        like = next(model.parameters())
        neurons = {
            path: torch.full((axis.size,), gates.START, dtype=like.dtype, device=like.device)
            for path, axis in axes(model).items()
            if axis.name == "hidden" and axis.scales
        }
        super().__init__(model, neurons)
        self.windowed = windowed
        self.grids = {path: stage.grid for path, stage, _ in describe(model).blocks()}
        names = {id(module): name for name, module in model.named_modules()}
        blocks = dict(blocks_of(model))
        self.names = {path: names[id(blocks[path])] for path in how.mixtures}
        self.steps = nn.ParameterDict(
            {key_of(path): torch.full((3,), gates.START, dtype=like.dtype, device=like.device) for path in how.mixtures}
        )
        self.paths = nn.ModuleDict(
            {
                key_of(path): Paths(_attention(blocks[path]).v[0], mixture, how.prefix).to(like)
                for path, mixture in how.mixtures.items()
            }
        )
        self._drawn: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Any:
        """Return the logits under the gates of this pass."""
        self._drawn = self._draw()
        try:
            open_ = {path: gates.weights(gates.opened(self._drawn[key_of(path)])) for path in self.names}
            scaled = self.scaled()
            for path, (_, _, attention) in open_.items():
                out = _attention(self.model.get_submodule(self.names[path])).proj
                for leaf, value in out.named_parameters():
                    scaled[f"{self.names[path]}.attn.proj.{leaf}"] = value * attention
            with contextlib.ExitStack() as stack:
                for path, (one, three, _) in open_.items():
                    self._beside(stack, path, one, three)
                return functional_call(self.model, scaled, (x,))
        finally:
            self._drawn = {}

    def _draw(self) -> dict[str, Tensor]:
        """Return all gates of one pass by key, from one draw."""
        every = {**self.gates, **self.steps}
        flat = torch.cat([logits.flatten() for logits in every.values()])
        drawn = gates.sampled(flat, gates.noise(flat)) if self.training else gates.hard(flat)
        return dict(zip(every, torch.split(drawn, [logits.numel() for logits in every.values()]), strict=True))

    def _piece(self, gate: str | None, size: int, like: Tensor) -> Tensor:
        return super()._piece(None, size, like) if gate is None else self._drawn[gate].to(like.dtype)

    def _beside(self, stack: contextlib.ExitStack, path: str, one: Tensor, three: Tensor) -> None:
        """Add the outputs of a block's convolutions to its attention's output, until the stack is closed.

        This takes three hooks: for the attention's input, for its values, and to add the outputs before layer scale.
        """
        block, beside = self.model.get_submodule(self.names[path]), self.paths[key_of(path)]
        assert isinstance(block, Block)
        assert isinstance(beside, Paths)
        attention = _attention(block)
        bias: Tensor | None = attention.qkv.bias
        bias = None if bias is None else bias[-attention.sizes[2] :]
        out = (attention.proj.weight, attention.proj.bias)
        heard: dict[str, Tensor] = {}

        def add(_: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
            x, values = heard["x"], heard["values"] if bias is None else heard["values"] - bias
            inner = self._in_windows(block, beside, x, values) if x.dim() == 4 else self._on_grid(path, beside, values)
            added = beside(inner, bias, out, one, three)
            if x.dim() == 3:
                first = x[:, : x.shape[1] - inner[0].shape[1] * inner[0].shape[2]]
                share = one + three if beside.prefix == "norm" else torch.zeros_like(one)
                added = torch.cat([first * share, added.flatten(1, 2)], dim=1)
            return (given[0] + added,)

        for module, name in ((block.norm1, "x"), (attention.v_tap, "values")):
            handle = module.register_forward_hook(lambda _m, _i, out, name=name: heard.update({name: out}))
            stack.callback(handle.remove)
        stack.callback(block.ls1.register_forward_pre_hook(add).remove)

    def _on_grid(self, path: str, beside: Paths, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return both bottlenecks of a ViT's block, whose patches come after prefix tokens."""
        grid = self.grids[path]
        return beside.inner(torch.unflatten(values[:, values.shape[1] - grid[0] * grid[1] :], 1, grid))

    def _in_windows(self, block: nn.Module, beside: Paths, x: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return both bottlenecks of a Swin's block, whose values are rolled and padded like its windows."""
        assert isinstance(block, WindowBlock)
        grid = (x.shape[1], x.shape[2])
        values = torch.unflatten(values, 1, block.window.padded(grid))
        if not self.windowed:
            return beside.inner(block.unrolled(values, grid))
        high, wide = block.window.size
        rows, columns = values.shape[1] // high, values.shape[2] // wide
        windows = values.view(len(x), rows, high, columns, wide, -1).transpose(2, 3).flatten(0, 2)

        def joined(part: Tensor) -> Tensor:
            placed = part.view(len(x), rows, columns, high, wide, -1).transpose(2, 3).flatten(3, 4).flatten(1, 2)
            return block.unrolled(placed, grid)

        one, three = beside.inner(windows)
        return joined(one), joined(three)

    def step(self, path: str) -> nn.Parameter:
        """Return the three gate logits of the attention at `path`."""
        found: nn.Parameter = self.steps[key_of(path)]
        return found

    def beside(self, path: str) -> Paths:
        """Return the convolutions parallel to the attention at `path`."""
        found = self.paths[key_of(path)]
        assert isinstance(found, Paths)
        return found

    def gate_parameters(self) -> list[nn.Parameter]:
        """Return the logits of all gates, and no other parameters."""
        return [*self.gates.values(), *self.steps.values()]


def _attention(block: nn.Module) -> Attention:
    assert isinstance(block, Block)
    assert isinstance(block.attn, Attention)
    return block.attn


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Cost of a structure as a sum over gates: multiply-accumulates, or nanoseconds if time is bounded.

    Attributes:
        constant: cost of all parts without gates.
        steps: by path of a block, the cost that each of its ordered gates adds: 1 x 1, 3 x 3 over 1 x 1, attention over
            3 x 3.
        neurons: by path of an axis, the cost of each neuron.
    """

    constant: int
    steps: Mapping[str, tuple[int, int, int]]
    neurons: Mapping[str, int]

    def total(self, single: SinglePath) -> Tensor:
        """Return the cost under deterministic gates, float64, differentiable with respect to their logits."""
        device = next(single.parameters()).device
        kind = summing(device)
        total = torch.tensor(float(self.constant), dtype=kind, device=device)
        for path, adds in self.steps.items():
            open_ = gates.opened(gates.budgeted(single.step(path)).to(kind))
            total = total + (open_ * open_.new_tensor(adds)).sum()
        for path, adds_one in self.neurons.items():
            total = total + adds_one * gates.budgeted(single.gate(path)).to(kind).sum()
        return total


def prices(spec: Spec, how: Layout, counting: Counting) -> Prices:
    """Return the cost that each gate of a parent adds.

    Args:
        spec: the parent.
        how: which attentions have gates.
        counting: the counting rule.
    """
    host = cost_of(spec).macs - sum(block_cost(block, stage)[0] for _, stage, block in spec.blocks())
    constant = host + (_norms(spec) if counting == "published" else 0)
    steps: dict[str, tuple[int, int, int]] = {}
    neurons: dict[str, int] = {}
    for path, stage, block in spec.blocks():
        mixer, ours = block_cost(block.model_copy(update={"hidden": None}), stage)[0], path in how.mixtures
        if ours and isinstance(block.mixer, AttentionSpec):
            one, three = (conv_macs(stage.patches, stage.width, block.mixer.v[0], kernel) for kernel in (1, 3))
            steps[path] = (one, three - one, mixer - three)
        else:
            constant += mixer
        if block.hidden and stage.form.hidden_norm is None:
            tokens = stage.patches if counting == "published" else stage.tokens
            neurons[f"{path}.hidden"] = mlp_macs(tokens, stage.width, 1, stage.form.factors)
        elif block.hidden:
            constant += mlp_macs(stage.tokens, stage.width, block.hidden, stage.form.factors)
    return Prices(constant=constant, steps=steps, neurons=neurons)


def times(spec: Spec, how: Layout, budget: Budget) -> Prices:
    """Return the time that each gate of a parent adds according to the table of `budget`, in nanoseconds.

    A neuron adds its share of its branch. A gate adds a negative time if its choice is faster than the one before it.
    """
    blocks = [budget.block(block, stage).latency for _, stage, block in spec.blocks()]
    constant = budget.cost(spec).latency - sum(blocks)
    steps: dict[str, tuple[int, int, int]] = {}
    neurons: dict[str, int] = {}
    for (path, stage, block), whole in zip(spec.blocks(), blocks, strict=True):
        mixer = budget.block(block.model_copy(update={"hidden": None}), stage).latency
        if path in how.mixtures and isinstance(block.mixer, AttentionSpec):
            convs = [Conv(kernel=kernel, width=block.mixer.v[0]) for kernel in (1, 3)]
            bare = [block.model_copy(update={"mixer": conv, "hidden": None}) for conv in convs]
            one, three = (budget.block(node, stage).latency for node in bare)
            steps[path] = (one, three - one, mixer - three)
        else:
            constant += mixer
        if block.hidden and stage.form.hidden_norm is None:
            neurons[f"{path}.hidden"] = (whole - mixer) // block.hidden
        else:
            constant += whole - mixer
    return Prices(constant=constant, steps=steps, neurons=neurons)


def _norms(spec: Spec) -> int:
    """Return the authors' count for norms: two per block and token; for a Swin also those of stem, mergings and end."""
    first, last = spec.stages[0], spec.stages[-1]
    norms: int = sum(2 * stage.width * stage.tokens * len(stage.blocks) for stage in spec.stages)
    if first.window is None:
        return norms
    merging = sum(stage.width * stage.patches for stage in spec.stages[:-1])
    # The count at the end is four times too large for four stages, as in the original Swin's counter that they reuse.
    return norms + first.width * first.patches + merging + (last.width * first.patches >> len(spec.stages))
