"""Gates of ViT-Slim: on channels through the weights, on tokens at the norms; their penalty and their scores.

P patches, N tokens including prefix tokens.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.cut.fill import quantiles
from vitrim.cut.observe import Gated, axes, masked
from vitrim.cut.width import check_narrowable, widths
from vitrim.families import describe
from vitrim.words.errors import MethodError
from vitrim.words.spec import NO_WINDOWS

__all__ = ["START", "TokenGated", "gate_model", "gate_scores", "l1_penalty", "set_apart", "token_scores"]

APART = 0.1
"""Range of the initial gates of channels that start apart."""

START = 3.0
"""Initial raw value of a token's gate: tanh(3) = 0.995 (the authors' code)."""


class TokenGated(Gated):
    """A gated model that also has gates on tokens, at the outputs of both norms of each block.

    Args:
        model: an adopted model; trained in place together with the gates.
        gates: gates of channels, see `Gated`.
        share: see `Gated`.
        tokens: raw values ``(P,)`` or ``(N,)`` by path (``stages.0.blocks.3.tokens``), squashed by tanh; prefix tokens
            without a value are not gated.
    """

    def __init__(
        self, model: nn.Module, gates: Mapping[str, Tensor], share: Mapping[str, str], tokens: Mapping[str, Tensor]
    ) -> None:
        super().__init__(model, gates, share)
        self.paths = tuple(tokens)
        self.count = describe(model).stages[0].tokens
        self.tokens = nn.ParameterDict({path.replace(".", "/"): nn.Parameter(raw) for path, raw in tokens.items()})

    def forward(self, x: Tensor) -> Any:
        """Return the logits of the gated model."""
        with masked(self.model, {path: self._mask(gate) for path, gate in self.squashed().items()}):
            return super().forward(x)

    def squashed(self) -> dict[str, Tensor]:
        """Return the factors of the tokens, by path."""
        return dict(zip(self.paths, map(torch.tanh, self.tokens.values()), strict=True))

    def _mask(self, gate: Tensor) -> Tensor:
        return torch.cat([gate.new_ones(self.count - gate.numel()), gate])


def gate_model(
    model: nn.Module,
    *,
    attention: bool = True,
    mlp: bool = True,
    tokens: bool = False,
    prefix: bool = False,
    width: bool = False,
) -> TokenGated:
    """Put gates on `model`: one for each head channel (queries, keys and values share it), each neuron and each patch.

    Gates of channels start at 1, those of tokens at tanh(3). If there is a norm between the queries and the logits, the
    gate and the cut act only on the values.

    Args:
        model: an adopted model; trained in place together with the gates.
        attention: whether head channels have gates.
        mlp: whether neurons have gates.
        tokens: whether patches have gates.
        prefix: whether prefix tokens have gates too.
        width: whether the channels of the residual stream have gates, wherever it is read.

    Raises:
        MethodError: if no part of the model can be gated, or tokens are requested but cannot be cut.
    """
    raw = _token_gates(model, prefix) if tokens else {}
    gates: dict[str, Tensor] = {}
    share: dict[str, str] = {}
    like = next(model.parameters())
    for path, axis in axes(model).items():
        block = path.rpartition(".")[0]
        if not axis.scales or axis.tied:
            continue
        if axis.name == "hidden" and mlp:
            gates[path] = torch.ones(axis.size, device=like.device)
        elif axis.name == "v" and attention:
            gates[path] = torch.ones(axis.size, device=like.device)
        elif axis.name == "qk" and attention and axis.groups == axes(model)[f"{block}.v"].groups:
            share[path] = f"{block}.v"
    share = {path: gate for path, gate in share.items() if gate in gates}
    if width:
        check_narrowable(model)
        gates |= {path: torch.ones(size, device=like.device) for path, size in widths(model).items()}
    if not gates and not raw:
        raise MethodError("a model must have channels that can be gated, but norms tie them all or all penalties are 0")
    return TokenGated(model, gates, share, raw)


def set_apart(gated: TokenGated, losses: Mapping[str, Tensor]) -> None:
    """Start the gates of channels apart, in the order of what the channels lose; the function of the model is the same.

    Within the list of attention and of MLP channels, gates start evenly between 0.9 and 1. The weights that a gate
    multiplies are divided by it. A step of AdamW moves a gate by about its learning rate, so 0.1 is 200 steps at the
    published one: a short search follows the losses, a long one what it learns.

    Args:
        gated: a model whose gates are all 1.
        losses: loss of each channel, by the path of its gate; larger is more valuable.
    """
    starts = {path: 1 - APART * (1 - share) for path, share in _places(gated, losses).items()}
    share = {path: gate for path, gate in _uses(gated).items() if path != gate and gate in starts}
    Gated(gated.model, {path: 1 / start.double() for path, start in starts.items()}, share).fold_()
    with torch.no_grad():
        for path, start in starts.items():
            gated.gate(path).copy_(start)


def _places(gated: TokenGated, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the place of each channel in the ranking of its list, in (0, 1), as the gates' type."""
    known = {path: values for path, values in losses.items() if gated.has_gate(path)}
    places = quantiles(known, {path: str(path.endswith(".hidden")) for path in known})
    return {path: share.to(gated.gate(path)) for path, share in places.items()}


def _uses(gated: TokenGated) -> dict[str, str]:
    """Return the gate that each axis uses."""
    scores, known = gate_scores(gated, "absolute")[0], axes(gated.model)
    scores = {path: values for path, values in scores.items() if known[path].scales}
    return {path: path if path.endswith((".hidden", ".v")) else f"{path.rpartition('.')[0]}.v" for path in scores}


def _token_gates(model: nn.Module, prefix: bool) -> dict[str, Tensor]:
    spec = describe(model)
    if any(stage.window is not None for stage in spec.stages):
        raise MethodError(f"token_l1 must be 0 for this model: {NO_WINDOWS}")
    if any(block.tokens is not None for _, _, block in spec.blocks()):
        raise MethodError("token_l1 must be 0 for a model whose tokens were dropped before; gate the dense model")
    like = next(model.parameters())
    return {
        f"{path}.tokens": torch.full((stage.tokens if prefix else stage.patches,), START, device=like.device)
        for path, stage, _ in spec.blocks()
    }


def l1_penalty(attention: float, mlp: float, token: float = 0.0, width: float = 0.0) -> Callable[[nn.Module], Tensor]:
    """Return the penalty function ``attention * sum |z_attention| + mlp * sum |z_mlp| + token * sum |tanh p|``.

    Gates of the residual width add ``width * sum |z_width|``.
    """
    weights = {"hidden": mlp, "width": width}

    def penalty(gated: nn.Module) -> Tensor:
        assert isinstance(gated, TokenGated)
        sums = [
            gate.abs().sum() * weights.get(path.rpartition("/")[2], attention) for path, gate in gated.gates.items()
        ]
        sums += [gate.abs().sum() * token for gate in gated.squashed().values()]
        return torch.stack(sums).sum()

    return penalty


@torch.no_grad()
def gate_scores(gated: Gated, ranking: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return gates as scores by path of an axis, and the list (attention, mlp or width) that each is ranked in.

    Raises:
        MethodError: if a gate is not finite.
    """
    scores: dict[str, Tensor] = {}
    kinds: dict[str, str] = {}
    known = axes(gated.model)
    for path, axis in known.items():
        block = path.rpartition(".")[0]
        name = path if axis.name == "hidden" else f"{block}.v"
        if not gated.has_gate(name) or (axis.name == "qk" and axis.groups != known[name].groups):
            continue
        gate = _finite(gated.gate(name), path).cpu().double()
        scores[path] = gate.abs() if ranking == "absolute" else gate
        kinds[path] = "mlp" if axis.name == "hidden" else "attention"
    for path in widths(gated.model):
        if gated.has_gate(path):
            gate = _finite(gated.gate(path), path).cpu().double()
            scores[path], kinds[path] = gate.abs() if ranking == "absolute" else gate, "width"
    return scores, kinds


def _finite(gate: Tensor, path: str) -> Tensor:
    """Return a gate.

    Raises:
        MethodError: if it is not finite.
    """
    if not bool(torch.isfinite(gate).all()):
        raise MethodError(f"{path}: gates must be finite, but some are not; lower method.train.lr or gate_lr")
    return gate.detach()


@torch.no_grad()
def token_scores(gated: TokenGated, ranking: str) -> dict[str, Tensor]:
    """Return squashed gates of tokens by path, ``(P,)`` or ``(N,)``.

    Raises:
        MethodError: if a gate is not finite.
    """
    scores = {}
    for path, gate in gated.squashed().items():
        gate = _finite(gate, path)
        scores[path] = (gate.abs() if ranking == "absolute" else gate).cpu().double()
    return scores
