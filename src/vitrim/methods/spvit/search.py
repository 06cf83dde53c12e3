"""SPViT's model during the search.

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
from vitrim.methods.spvit.paths import FittedPaths, Paths
from vitrim.nn import Attention, Block, WindowBlock
from vitrim.nn import Conv as ConvModule
from vitrim.words.errors import MethodError
from vitrim.words.plan import BlockPlan, Plan
from vitrim.words.spec import Attention as AttentionSpec
from vitrim.words.spec import Conv, Mixture, Skip, Spec

__all__ = ["Layout", "SinglePath", "layout"]


Prefix = Literal["norm", "zero", "mean", "attention"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How attentions of a model become convolutions.

    Attributes:
        mixtures: by path of a block, what its convolutions are mixed from; no other block's attention can be changed.
        prefix: see `vitrim.words.spec.Conv`.
        leaves: see `vitrim.words.spec.Skip`.
        fitted: whether convolutions have weights of their own, fitted to the attention, in place of the mixtures.
        rank: width of the bottleneck of fitted convolutions; None for that of a head, as published.
    """

    mixtures: Mapping[str, Mixture]
    prefix: Prefix
    leaves: Literal["zero", "norm"]
    fitted: bool = False
    rank: int | None = None

    def mixer(self, path: str, mixer: AttentionSpec, level: int) -> Conv | Skip | None:
        """Return the replacement of an attention with the first `level` of three gates open; None if it is kept."""
        if level == 3:
            return None
        if level == 0:
            return Skip(leaves=self.leaves)
        kernel: Literal[1, 3] = 1 if level == 1 else 3
        mixture, heads = None if self.fitted else self.mixtures[path], mixer if self.reads else None
        width = self.width(mixer)
        return Conv(kernel=kernel, width=width, prefix=self.prefix, heads=heads, mixture=mixture, norm=True)

    @property
    def reads(self) -> bool:
        """Whether prefix tokens keep the attention where patches have a convolution."""
        return self.prefix == "attention"

    def width(self, mixer: AttentionSpec) -> int:
        """Return the width of the bottleneck of the convolutions in place of an attention."""
        return self.rank if self.fitted and self.rank is not None else mixer.v[0]


def layout(
    spec: Spec,
    *,
    temperature: float | None = None,
    prefix: Prefix = "norm",
    leaves: Literal["zero", "norm"] = "zero",
    fitted: bool = False,
    rank: int | None = None,
) -> Layout:
    """Return how the attentions of `spec` become convolutions; includes every attention that has a head.

    Args:
        spec: the parent.
        temperature: of the mixture; None for the published one, 0.01, or 100 for windows.
        prefix: see `Layout`.
        leaves: see `Layout`.
        fitted: see `Layout`.
        rank: see `Layout`.

    Raises:
        PlanError: naming the path and the reason, if one cannot become a convolution.
        MethodError: if there is no attention.
    """
    if any(stage.form.post_norm for stage in spec.stages):
        raise MethodError(
            "a model must have its norms before its branches for spvit, whose gates scale what a branch adds, but here "
            "norms follow the branches and undo that; use another method"
        )
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
    found = Layout(mixtures=mixtures, prefix=prefix, leaves=leaves, fitted=fitted, rank=rank)
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

    In training, gates are drawn `draws` times at each forward pass, once for each of as many parts of its images. In
    evaluation, gates are open if their logits are above 0. Gates multiply the output projections of attentions and
    MLPs, which is the same as multiplying the outputs.

    Args:
        model: an adopted model; trained in place together with the gates.
        how: see `Layout`.
        windowed: whether 3 x 3 convolutions of a Swin read single windows, shifted like the attention's, as published;
            if not, they read the whole map, as in the final network. Fitted convolutions always read the whole map.
        start: initial logit of every gate.
        draws: draws of each forward pass in training; fewer if a part would have one image alone.
    """

    def __init__(
        self, model: nn.Module, how: Layout, windowed: bool = False, *, start: float = gates.START, draws: int = 1
    ) -> None:
        like = next(model.parameters())
        neurons = {
            path: torch.full((axis.size,), start, dtype=like.dtype, device=like.device)
            for path, axis in axes(model).items()
            if axis.name == "hidden" and axis.scales
        }
        super().__init__(model, neurons)
        self.windowed, self.draws, self.reads = windowed, draws, how.reads
        spec = describe(model)
        self.grids = {
            path: flow.mixed.grid or stage.grid
            for (path, stage, _), flow in zip(spec.blocks(), spec.flows(), strict=True)
        }
        names = {id(module): name for name, module in model.named_modules()}
        blocks = dict(blocks_of(model))
        self.names = {path: names[id(blocks[path])] for path in how.mixtures}
        self.steps = nn.ParameterDict(
            {key_of(path): torch.full((3,), start, dtype=like.dtype, device=like.device) for path in how.mixtures}
        )
        self.paths = nn.ModuleDict(
            {
                key_of(path): self._fitted(spec, how, path)
                if how.fitted
                else Paths(_attention(blocks[path]).v[0], mixture, how.prefix)
                for path, mixture in how.mixtures.items()
            }
        ).to(like)
        self._drawn: dict[str, Tensor] = {}

    def _fitted(self, spec: Spec, how: Layout, path: str) -> FittedPaths:
        """Return the convolutions of a block, not yet fitted."""
        _, stage, block = next(row for row in spec.blocks() if row[0] == path)
        assert isinstance(block.mixer, AttentionSpec)
        specs = [how.mixer(path, block.mixer, level) for level in (1, 2)]
        if how.reads:  # with the attention that runs anyway
            specs = [conv and conv.model_copy(update={"prefix": "zero", "heads": None}) for conv in specs]
        one, three = (
            ConvModule(stage.width, conv, stage.form, block.rates, grid=self.grids[path], prefix=stage.prefix)
            for conv in specs
            if isinstance(conv, Conv)
        )
        return FittedPaths(one, three)

    def forward(self, x: Tensor) -> Any:
        """Return the logits under the gates of this pass."""
        parts = min(self.draws, len(x) // 2) if self.training else 1
        if parts < 2:
            return self._drawn_once(x)
        found = [self._drawn_once(part) for part in x.tensor_split(parts)]
        if isinstance(found[0], tuple):  # the two heads of a distilled model
            return tuple(torch.cat(column) for column in zip(*found, strict=True))
        return torch.cat(found)

    def _drawn_once(self, x: Tensor) -> Any:
        """Return the logits under one draw of the gates."""
        self._drawn = self._draw()
        try:
            open_ = {path: gates.weights(gates.opened(self._drawn[key_of(path)])) for path in self.names}
            scaled = self.scaled()
            for path, (_, _, attention) in () if self.reads else open_.items():
                out = _attention(self.model.get_submodule(self.names[path])).proj
                for leaf, value in out.named_parameters():
                    scaled[f"{self.names[path]}.attn.proj.{leaf}"] = value * attention
            with contextlib.ExitStack() as stack:
                for path, weights in open_.items():
                    self._beside(stack, path, *weights)
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

    def _beside(self, stack: contextlib.ExitStack, path: str, one: Tensor, three: Tensor, whole: Tensor) -> None:
        """Add the outputs of a block's convolutions to its attention's output, until the stack is closed.

        This takes three hooks: for the attention's input, for its values, and to add the outputs before layer scale.
        Where prefix tokens keep the attention, a fourth one multiplies the output by the gates: of the attention for
        patches, of all three choices for prefix tokens.
        """
        block, beside = self.model.get_submodule(self.names[path]), self.beside(path)
        assert isinstance(block, Block)
        if self.reads:
            first = block.prefix

            def gated(_: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
                (x,) = given
                return (torch.cat([x[:, :first] * (one + three + whole), x[:, first:] * whole], dim=1),)

            stack.callback(block.ls1.register_forward_pre_hook(gated).remove)
        if isinstance(beside, FittedPaths):
            self._add_fitted(stack, block, beside, one, three)
            return
        attention = _attention(block)
        bias = attention.rows_of("v")[1]
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

        for module, name in ((block.enter1, "x"), (attention.v_tap, "values")):
            handle = module.register_forward_hook(lambda _m, _i, out, name=name: heard.update({name: out}))
            stack.callback(handle.remove)
        stack.callback(block.ls1.register_forward_pre_hook(add).remove)

    def _add_fitted(
        self, stack: contextlib.ExitStack, block: Block, beside: FittedPaths, one: Tensor, three: Tensor
    ) -> None:
        """Do the same for convolutions that read the attention's input."""
        heard: list[Tensor] = []

        def add(_: nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
            return (given[0] + beside(heard.pop(), one, three),)

        stack.callback(block.enter1.register_forward_hook(lambda _m, _i, out: heard.append(out)).remove)
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

    def beside(self, path: str) -> Paths | FittedPaths:
        """Return the convolutions parallel to the attention at `path`."""
        found = self.paths[key_of(path)]
        assert isinstance(found, Paths | FittedPaths)
        return found

    def gate_parameters(self) -> list[nn.Parameter]:
        """Return the logits of all gates, and no other parameters."""
        return [*self.gates.values(), *self.steps.values()]


def _attention(block: nn.Module) -> Attention:
    assert isinstance(block, Block)
    assert isinstance(block.attn, Attention)
    return block.attn
