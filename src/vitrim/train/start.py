"""State of a training run from which another run continues."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vitrim.words.errors import RunError
from vitrim.words.plain import writing

__all__ = ["Start", "averages_of"]

_DONE = "vitrim.done"


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The state from which a training continues an earlier one; both are parts of one learning rate cycle.

    Attributes:
        done: fraction of the cycle that has passed, in ``[0, 1)``.
        averages: the optimizer's state of each parameter, by name; a parameter without one starts with a new state.
        ema: averaged weights and buffers by name, or None.
    """

    done: float
    averages: Mapping[str, Mapping[str, Tensor]]
    ema: Mapping[str, Tensor] | None = None

    def save(self, path: Path) -> None:
        """Write one safetensors file atomically."""
        tensors = {
            f"optim.{name}.{key}": value for name, state in self.averages.items() for key, value in state.items()
        }
        tensors |= {f"ema.{name}": value for name, value in (self.ema or {}).items()}
        copies = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
        with writing(path) as temporary:
            save_file(copies, temporary, metadata={_DONE: repr(self.done)})

    @classmethod
    def load(cls, path: Path) -> "Start":
        """Read a file written by `save`.

        Raises:
            RunError: the file is damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                done = float((file.metadata() or {})[_DONE])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (SafetensorError, KeyError, ValueError) as problem:
            raise RunError(f"{path}: the state must be whole, but {problem}; choose another --out") from None
        averages: dict[str, dict[str, Tensor]] = {}
        ema = {}
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            if kind == "ema":
                ema[rest] = value
            else:
                parameter, _, key = rest.rpartition(".")
                averages.setdefault(parameter, {})[key] = value
        return cls(done=done, averages=averages, ema=ema or None)

    def give_(self, model: nn.Module, optimizer: torch.optim.Optimizer, ema: nn.Module | None) -> None:
        """Load the state into optimizer and averaged weights.

        Raises:
            RunError: the state belongs to another model; nothing is changed then.
        """
        parameters = dict(model.named_parameters())
        for name, state in self.averages.items():
            shapes = {tuple(value.shape) for value in state.values() if value.dim()}
            if name not in parameters or shapes - {tuple(parameters[name].shape)}:
                raise RunError(
                    f"{name}: the state to continue from must be of this model, but has {sorted(shapes)} for it"
                )
        for name, state in self.averages.items():
            parameter = parameters[name]
            optimizer.state[parameter] = {key: value.to(parameter.device, copy=True) for key, value in state.items()}
        if ema is not None and self.ema is not None:
            ema.load_state_dict(dict(self.ema))


def averages_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> dict[str, dict[str, Tensor]]:
    """Return the optimizer's state of each parameter of `model`, by name, on `device`."""
    return {
        name: {key: value.to(device) for key, value in optimizer.state[parameter].items()}
        for name, parameter in model.named_parameters()
        if optimizer.state.get(parameter)
    }
