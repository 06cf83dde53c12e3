"""Observe an axis at its taps, mask it there, or gate it through the weights.

B images, N tokens, C channels of an axis.

Axes are named by their paths: ``stages.0.blocks.3.qk``, ``….v``, ``….hidden``. The two branches of a block are
``….mixer`` and ``….mlp``; each is an axis of one channel that a mask can switch off. ``….tokens`` are the outputs of
both norms of a block; a mask of them has one value for each token that the block runs on, prefix tokens first.
``….heads`` are the heads' outputs before any norm and the projection, with the channels of all heads concatenated. They
can be observed but not masked; masking ``….v`` has the same effect.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vitrim.cut.width import scaled_by
from vitrim.families import blocks_of
from vitrim.nn import Attention, Axis, Block
from vitrim.nn.steps import StepModule
from vitrim.words.errors import MethodError
from vitrim.words.plain import did_you_mean

__all__ = ["Gated", "axes", "listening", "masked", "stepping"]

_BRANCHES = {"mixer": "drop_path1", "mlp": "drop_path2"}


def axes(model: nn.Module) -> dict[str, Axis]:
    """Return every axis of an adopted model, by path, in order."""
    return {f"{path}.{axis.name}": axis for path, block in blocks_of(model) for axis in block.axes()}


def _taps(model: nn.Module) -> dict[str, list[nn.Module]]:
    taps: dict[str, list[nn.Module]] = {}
    for path, block in blocks_of(model):
        for axis in block.axes():
            taps[f"{path}.{axis.name}"] = [block.get_submodule(name) for name in axis.taps]
        for name, layer in _BRANCHES.items():
            taps[f"{path}.{name}"] = [block.get_submodule(layer)]
        taps[f"{path}.tokens"] = [block.enter1, block.enter2]
        if isinstance(block.attn, Attention):
            taps[f"{path}.heads"] = [block.attn.norm]
    return taps


def _find(taps: Mapping[str, list[nn.Module]], path: str) -> list[nn.Module]:
    if path not in taps:
        raise MethodError(f"an axis must be one of the model's, but got '{path}'{did_you_mean(path, taps)}")
    return taps[path]


@contextlib.contextmanager
def masked(model: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiply axes at their taps by masks within the context.

    Args:
        model: an adopted model.
        masks: by path, a tensor of C values (channels of all heads), one value for a branch, or N values for tokens.
    """
    taps = _taps(model)
    with contextlib.ExitStack() as stack:
        for path, mask in masks.items():
            mask = mask[:, None] if path.endswith(".tokens") else mask
            for module in _find(taps, path):
                handle = module.register_forward_hook(lambda _m, _i, out, mask=mask: out * mask)
                stack.callback(handle.remove)
        yield


@contextlib.contextmanager
def listening(model: nn.Module, hear: Mapping[str, Callable[[Tensor], Any]]) -> Iterator[None]:
    """Call a function with the activations at the taps of an axis, ``(B, N, C)``, within the context.

    For an axis with two taps (``qk``), the function is called with the queries first and then with the keys. The return
    value is ignored. The tensor is not detached from the autograd graph.

    Args:
        model: an adopted model.
        hear: by path of an axis, the function to call.
    """
    taps = _taps(model)
    with contextlib.ExitStack() as stack:
        for path, function in hear.items():
            for module in _find(taps, path):

                def hook(_m: nn.Module, _i: Any, out: Tensor, call: Callable[[Tensor], Any] = function) -> None:
                    call(out)

                def before(_m: nn.Module, given: Any, call: Callable[[Tensor], Any] = function) -> None:
                    call(given[0])

                if path.endswith(".heads"):
                    stack.callback(module.register_forward_pre_hook(before).remove)
                else:
                    stack.callback(module.register_forward_hook(hook).remove)
        yield


@contextlib.contextmanager
def stepping(model: nn.Module, steps: Mapping[str, StepModule]) -> Iterator[None]:
    """Replace the token steps of blocks within the context; weights and structure are not changed.

    Args:
        model: an adopted model without windows.
        steps: by path of a block (``stages.0.blocks.3``), its step, which may change the number of tokens.
    """
    blocks: dict[str, Block] = dict(blocks_of(model))
    before = {path: blocks[path].step for path in steps}
    try:
        for path, step in steps.items():
            blocks[path].step = step
        yield
    finally:
        for path, old in before.items():
            blocks[path].step = old


class Gated(nn.Module):
    """A model whose axes are multiplied by trainable gates, through its weights.

    Multiplying a linear layer's rows (or columns) by a gate equals multiplying its activations, with the same gradients
    for weights and gates. It needs no activation memory because the products have the size of the weights and not of
    the batch.

    Args:
        model: an adopted model; trained in place together with the gates.
        gates: by path, C values or a tensor that broadcasts to them; several axes may use one gate (`share`). A gate of
            a residual stream (``stages.0.width``) multiplies it wherever it is read, `vitrim.cut.width.readers`.
        share: by path of an axis, the path of the gate that it uses.
        once: whether only the first of two members that are multiplied with each other (queries and keys) is gated, so
            that the product is scaled by the gate and not by its square.

    Raises:
        MethodError: if an axis cannot be gated through the weights because there is a norm in between.
    """

    def __init__(
        self,
        model: nn.Module,
        gates: Mapping[str, Tensor],
        share: Mapping[str, str] | None = None,
        once: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.gates = nn.ParameterDict({key_of(path): nn.Parameter(gate.clone()) for path, gate in gates.items()})
        uses = {path: path for path in gates} | dict(share or {})
        self._scales = _scales(model, uses, once)

    def forward(self, x: Tensor) -> Any:
        """Return the logits of the gated model."""
        return functional_call(self.model, self.scaled(), (x,))

    def scaled(self) -> dict[str, Tensor]:
        """Return the gated parameters by name, which are the model's parameters after folding the gates in."""
        parameters = dict(self.model.named_parameters())
        scaled: dict[str, Tensor] = {}
        for (name, dim), pieces in self._scales.items():
            parameter = parameters[name]
            vector = torch.cat([self._piece(gate, size, parameter) for gate, size in pieces])
            shape = [-1 if other == dim else 1 for other in range(parameter.dim())]
            scaled[name] = scaled.get(name, parameter) * vector.view(shape)
        return scaled

    def _piece(self, gate: str | None, size: int, like: Tensor) -> Tensor:
        if gate is None:
            return torch.ones(size, dtype=like.dtype, device=like.device)
        return self.held(gate).flatten().to(like.dtype)

    def held(self, key: str) -> Tensor:
        """Return the factor on the axes that use a gate, by the gate's name in the module."""
        gate: Tensor = self.gates[key]
        return gate

    def has_gate(self, path: str) -> bool:
        """Return whether the axis at `path` has its own gate."""
        return key_of(path) in self.gates

    def gate(self, path: str) -> nn.Parameter:
        """Return the gate of an axis."""
        found: nn.Parameter = self.gates[key_of(path)]
        return found

    @torch.no_grad()
    def fold_(self) -> nn.Module:
        """Multiply the gates into the model's weights, in place, and return the model."""
        parameters = dict(self.model.named_parameters())
        for name, value in self.scaled().items():
            parameters[name].copy_(value)
        return self.model


def key_of(path: str) -> str:
    """Return the path of a gate without dots, which PyTorch does not allow in names of parameters and buffers."""
    return path.replace(".", "/")


def _scales(
    model: nn.Module, uses: Mapping[str, str], once: bool
) -> dict[tuple[str, int], list[tuple[str | None, int]]]:
    """Return, for each gated parameter and dimension, the gates (None for ones) with their sizes along it."""
    known = axes(model)
    modules = {id(module): name for name, module in model.named_modules()}
    blocks: dict[str, Block] = dict(blocks_of(model))
    runs: dict[tuple[str, int], dict[int, tuple[str, int]]] = {}
    for path, gate in uses.items():
        if path.endswith(".width"):
            for member, size in scaled_by(model, path):
                runs.setdefault((member.parameter, member.dim), {})[member.offset] = (gate, size)
            continue
        if path not in known:
            raise MethodError(f"an axis must be one of the model's, but got '{path}'{did_you_mean(path, known)}")
        axis, prefix = known[path], modules[id(blocks[path.rpartition(".")[0]])]
        if not axis.scales:
            raise MethodError(f"{path}: a gated axis must be free of norms, but its channels are tied by one")
        for member in axis.scales:
            if once and member.second:
                continue
            runs.setdefault((f"{prefix}.{member.parameter}", member.dim), {})[member.offset] = (gate, axis.size)
    return {(name, dim): _fill(model, name, dim, pieces) for (name, dim), pieces in runs.items()}


def _fill(model: nn.Module, name: str, dim: int, pieces: Mapping[int, tuple[str, int]]) -> list[tuple[str | None, int]]:
    size, at = model.get_parameter(name).shape[dim], 0
    filled: list[tuple[str | None, int]] = []
    for offset in sorted(pieces):
        if offset > at:
            filled.append((None, offset - at))
        gate, length = pieces[offset]
        filled.append((key_of(gate), length))
        at = offset + length
    return filled + ([(None, size - at)] if at < size else [])
