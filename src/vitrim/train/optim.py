"""Parameter groups and learning rates.

s is the step, S the number of steps, W the number of warm-up steps.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.train.settings import Train
from vitrim.words.errors import MethodError

__all__ = ["Groups", "learning_rate", "optimizer", "parameter_groups", "set_learning_rate"]

Groups = Callable[[nn.Module], list[dict[str, Any]]]


def learning_rate(step: int, steps: int, warmup: int, settings: Train) -> float:
    """Return the learning rate of a step; a pure function, so that resuming needs no scheduler state.

    Args:
        step: s in `[0, S)`.
        steps: S.
        warmup: W in `[0, S]`.
        settings: `rate warmup_lr min_lr schedule power`.

    Returns:
        A rate that rises linearly from `warmup_lr` at 0 to `rate` at W. Then it is constant, or
        `min_lr + (rate - min_lr) (1 + cos(pi (s - W) / (S - W))) / 2`, as timm's scheduler with `warmup_prefix`; or
        `min_lr + (rate - min_lr) (1 - (s - W) / (S - W))^power`.
    """
    if step < warmup:
        return settings.warmup_lr + (settings.rate - settings.warmup_lr) * step / warmup
    if settings.schedule == "constant":
        return settings.rate
    left = max(1, steps - warmup)
    if settings.schedule == "poly":
        # A run that is limited by minutes may take one step more than estimated.
        wave = math.pow(max(0.0, 1 - (step - warmup) / left), settings.power)
    else:
        wave = 0.5 * (1 + math.cos(math.pi * (step - warmup) / left))
    return settings.min_lr + (settings.rate - settings.min_lr) * wave


def parameter_groups(model: nn.Module, settings: Train, groups: Groups | None = None) -> list[dict[str, Any]]:
    """Return AdamW's groups: those of `groups`, then the rest of the model with and without weight decay.

    One-dimensional parameters (biases, norms, scales) and the names in `no_weight_decay()` do not decay.

    Args:
        model: the model; parameters that do not require a gradient are left out.
        settings: gives `rate` and `weight_decay`.
        groups: function from the model to extra groups: dicts with `params`, and with `lr` or `weight_decay` if they
            differ from the settings (the default decay is 0). Their learning rates are scaled by the same schedule.

    Raises:
        MethodError: an extra group has a parameter that is not the model's, or a parameter is in two groups.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    made: list[dict[str, Any]] = []
    taken: set[int] = set()
    for extra in groups(model) if groups is not None else []:
        group = {"lr": settings.rate, "weight_decay": 0.0, **extra, "params": _listed(extra["params"])}
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise MethodError(
                    "an extra parameter group must contain only parameters of the model, but contains another"
                )
            if id(parameter) in taken:
                raise MethodError(f"{names[id(parameter)]}: a parameter must be in one group, but is in two")
            taken.add(id(parameter))
        made.append(group)
    spared = _spared(model)
    rest = [(name, p) for name, p in model.named_parameters() if p.requires_grad and id(p) not in taken]
    decayed = [p for name, p in rest if p.ndim > 1 and name not in spared]
    plain = [p for name, p in rest if p.ndim <= 1 or name in spared]
    made.append({"params": decayed, "lr": settings.rate, "weight_decay": settings.weight_decay})
    made.append({"params": plain, "lr": settings.rate, "weight_decay": 0.0})
    return [group for group in made if group["params"]]


def _listed(parameters: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)


def _spared(model: nn.Module) -> set[str]:
    """Return the names that `no_weight_decay()` of the model, or of a module inside it, exempts from weight decay."""
    spared: set[str] = set()
    for path, module in model.named_modules():
        ask = getattr(module, "no_weight_decay", None)
        if callable(ask):
            spared |= {f"{path}.{name}" if path else name for name in ask()}
    return spared


def optimizer(model: nn.Module, settings: Train, groups: Groups | None = None) -> torch.optim.AdamW:
    """Return AdamW over `parameter_groups`; each group stores its factor on the learning rate as `share`.

    Raises:
        MethodError: see `parameter_groups`, or no parameter of the model requires a gradient.
    """
    made = parameter_groups(model, settings, groups)
    if not made:
        raise MethodError("training must have a parameter that requires a gradient, but the model has none")
    for group in made:
        group["share"] = group["lr"] / settings.rate
    # The fused version is one kernel for a whole step: 0.4 ms instead of 1.7 ms for 0.68 M parameters in 80 tensors
    # (CPU, 2 threads).
    return torch.optim.AdamW(made, betas=settings.betas, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group to `rate` times its `share`."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["share"]
