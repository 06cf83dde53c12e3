"""Checks, device, type and hash of the weights of a model."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vitrim.words.errors import WeightsError

__all__ = ["FLOATS", "check_weights", "fingerprint", "home_of", "why_not_held", "why_not_like", "why_not_weight"]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types that weights may have, because every layer supports them."""


def home_of(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return the device and type of the first floating-point parameter of `model`."""
    for tensor in model.parameters():
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.get_default_dtype()


def check_weights(model: nn.Module) -> None:
    """Raise if weights are on the meta device, have a type that is not in `FLOATS`, or are not finite.

    Raises:
        WeightsError: if so; the message names the first such parameter or stored buffer.
    """
    missing = why_not_held(model)
    if missing is not None:
        raise WeightsError(missing)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, value in model.state_dict().items():
        if name in parameters or value.is_floating_point():
            wrong = why_not_weight(name, value)
            if wrong is not None:
                raise WeightsError(wrong)


def why_not_held(model: nn.Module) -> str | None:
    """Return one sentence that names a tensor of `model` without data; None if there is none."""
    for tensors in (model.named_parameters(), model.named_buffers()):
        for name, value in tensors:
            if value.is_meta:
                return f"{name}: weights must hold data, but these are on the meta device; load them first"
    return None


def why_not_weight(name: str, value: Tensor) -> str | None:
    """Return one sentence on why a layer could not compute with `value`; None if it can."""
    if value.dtype not in FLOATS:
        kinds = ", ".join(map(_short, FLOATS[:-1]))
        return (
            f"{name}: weights must be {kinds} or {_short(FLOATS[-1])}, but are {_short(value.dtype)}; "
            "convert them first"
        )
    # A sum is finite only if all terms are; it takes a tenth of the time of asking each, but may itself be too large.
    if not bool(torch.isfinite(value.sum())) and not bool(torch.isfinite(value).all()):
        return f"{name}: weights must be finite, but some are NaN or infinite; load a sound checkpoint"
    return None


def why_not_like(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str | None:
    """Return one sentence on why `state` cannot be the weights of a model; None if it can.

    Args:
        state: tensors by name, with the names and shapes of `wanted`.
        wanted: state dict of the model; its values may be on the meta device.
    """
    for name, value in state.items():
        if wanted[name].is_floating_point():
            wrong = why_not_weight(name, value)
            if wrong is not None:
                return wrong
        elif value.dtype != wanted[name].dtype:
            return f"{name}: must be {_short(wanted[name].dtype)}, but is {_short(value.dtype)}; convert it first"
    return None


def fingerprint(model: nn.Module, about: bytes = b"") -> str:
    """Return a hash of all weights and stored buffers, in their order, as 64 hexadecimal digits.

    Equal bits give equal hashes. Names and shapes are not hashed.

    Args:
        model: any model.
        about: additional bytes to hash.
    """
    digest = hashlib.sha256(about)
    for value in model.state_dict().values():
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _short(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")
