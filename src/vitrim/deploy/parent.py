"""Open the model that a recipe names: a timm name with weights, a Hub name, or a file that vitrim stored."""

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from vitrim import families
from vitrim.deploy import store
from vitrim.families import adopt
from vitrim.nn.weights import why_not_weight
from vitrim.words.costs import cost_of
from vitrim.words.errors import AdoptError, RecipeError, WeightsError
from vitrim.words.plain import did_you_mean, reason
from vitrim.words.progress import progress

__all__ = ["guests", "load_weights_", "open_parent", "open_teacher", "read_weights"]


def open_parent(
    name: str,
    *,
    weights: str | None = None,
    random_weights: bool = False,
    arguments: dict[str, Any] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Open and adopt a model, in evaluation mode on the CPU.

    Args:
        name: a timm name, an ``hf-hub:`` name, or the path of a file that vitrim stored.
        weights: a weights file for a timm name (safetensors, or a PyTorch file read without running code).
        random_weights: whether to leave a timm model's weights random.
        arguments: further keyword arguments of ``timm.create_model``.
        seed: of random weights, so that a run that goes on finds the same ones.

    Raises:
        RecipeError: if the name is unknown, or weights are given twice.
        WeightsError: if the weights are unreadable, not finite, or do not fit.
        AdoptError: if the model has a part that cannot be represented.
    """
    opened = open_teacher(name, weights=weights, random_weights=random_weights, arguments=arguments, seed=seed)
    if store.is_stored(name):
        return opened
    with torch.random.fork_rng(devices=[]):
        return adopt(opened).eval()


def open_teacher(
    name: str,
    *,
    weights: str | None = None,
    random_weights: bool = False,
    arguments: dict[str, Any] | None = None,
    seed: int = 0,
) -> nn.Module:
    """Open any model, in evaluation mode on the CPU, whether or not it could be adopted; see `open_parent`.

    Raises:
        RecipeError: if the name is unknown, or weights are given twice.
        WeightsError: if the weights are unreadable, not finite, or do not fit.
    """
    if weights and random_weights:
        raise RecipeError("weights must come from one place, but both a file and random weights are asked for")
    if store.is_stored(name):
        if weights or random_weights or arguments:
            raise RecipeError(f"{name}: a stored model must be taken as it is, but weights or arguments are given too")
        return store.load(name).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _guest(name, weights, random_weights, dict(arguments or {})).eval()


def _guest(name: str, weights: str | None, random_weights: bool, arguments: dict[str, Any]) -> nn.Module:
    on_hub = name.startswith(("hf-hub:", "hf_hub:"))
    if name.startswith("("):
        raise RecipeError(
            f"a model must be named, but {name} is gone with the program that held it; call compress there"
        )
    if not on_hub and not timm.is_model(name):
        if name.endswith(".safetensors") or "/" in name:
            raise RecipeError(f"{name}: a model must be a timm name or a file that vitrim stored, but this is neither")
        raise RecipeError(f"a model must be a name that timm knows, but got '{name}'{_near(name)}")
    if weights is None:
        return _create(name, pretrained=not random_weights, **arguments)
    state = read_weights(Path(weights))
    head = state.get("head.weight", state.get("head.fc.weight"))
    if "num_classes" not in arguments and head is not None:
        arguments["num_classes"] = len(head)
    model = _create(name, pretrained=False, **arguments)
    known = families.name_of(model) is not None
    load_weights_(model, families.convert(model, state) if known else state, weights)
    return model


def _create(name: str, **arguments: Any) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(name, **arguments)
    except TypeError as problem:
        raise RecipeError(f"model.arguments: {name} must take each of them, but {problem}") from None
    except Exception as problem:  # from timm's asserts to whatever the Hub's client raises
        said = reason(problem)
        if arguments.get("pretrained"):
            raise WeightsError(
                f"{name}: pretrained weights must be found, but {said}; give --weights FILE or --random-weights"
            ) from None
        raise RecipeError(f"{name}: timm must build this model, but {said}") from None
    return model


def _near(name: str) -> str:
    near = did_you_mean(name, timm.list_models())
    return near if near.startswith("; did you mean") else "; `vitrim models` lists those that vitrim can cut"


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict; a ``.safetensors`` file, or a PyTorch file (never running code from it).

    Raises:
        WeightsError: if the file is missing, damaged, or no state dict.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: the weights file must exist, but it does not")
    try:
        if path.suffix == ".safetensors":
            return _plain_names(load_file(path))
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as problem:  # torch raises pickle's own classes for what weights_only refuses, and many more
        raise _damaged(path, problem) from None
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
            break
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise WeightsError(f"{path}: the file must hold a state dict of tensors, but it holds something else")
    return _plain_names(loaded)


def _plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefix that data parallelism puts before them."""
    return {name.removeprefix("module."): value for name, value in state.items()}


def _damaged(path: Path, problem: Exception) -> WeightsError:
    return WeightsError(f"{path}: the weights file must be whole and readable, but {reason(problem)}")


def load_weights_(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Fill `model` with `state`, strictly.

    Raises:
        WeightsError: naming the keys that are missing, unexpected or of another shape; the model is left as it was.
    """
    mine = model.state_dict()
    missing = sorted(set(mine) - set(state))
    extra = sorted(set(state) - set(mine))
    shapes = [
        f"{name} {tuple(state[name].shape)} for {tuple(mine[name].shape)}"
        for name in mine
        if name in state and state[name].shape != mine[name].shape
    ]
    parts = [
        f"{word} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for word, names in (("misses", missing), ("has unknown", extra), ("has another shape for", shapes))
        if names
    ]
    if parts:
        raise WeightsError(f"{source}: weights must fit {type(model).__name__}, but the file {'; '.join(parts)}")
    for name, value in state.items():
        wrong = why_not_weight(name, value) if mine[name].is_floating_point() else None
        if wrong is not None:
            raise WeightsError(f"{source}: {wrong}")
    model.load_state_dict(state)


def guests(pattern: str = "*") -> Iterator[dict[str, Any]]:
    """Every timm name like `pattern` whose class a family takes in, built without weights.

    Yields:
        ``name``, ``family``, ``macs``, ``params`` and ``reason``: None where the model can be cut, else why not.

    Raises:
        RecipeError: if no name fits.
    """
    hosts = tuple(host for name in families.names() for host in families.get(name).HOSTS)
    names = [name for name in timm.list_models(pattern) if _knows(name, hosts)]
    if not names:
        raise RecipeError(f"a pattern must fit a name of a known family, but got '{pattern}'{_near(pattern)}")
    with progress("models", len(names)) as advance:
        for name in names:
            model = _unfilled(name)
            advance(1)
            family = families.name_of(model)
            if family is not None:
                yield {"name": name, "family": family, **_verdict(model)}


def _verdict(model: nn.Module) -> dict[str, Any]:
    try:
        cost = cost_of(families.describe(model))
    except AdoptError as problem:
        return {"macs": 0, "params": 0, "reason": str(problem)}
    return {"macs": cost.macs, "params": cost.params, "reason": None}


def _unfilled(name: str) -> nn.Module:
    """A timm model without data; with data where this version of timm cannot build it without."""
    try:
        with torch.device("meta"):
            model: nn.Module = timm.create_model(name)
    except (NotImplementedError, RuntimeError):
        model = timm.create_model(name)
    return model


def _knows(name: str, hosts: tuple[type[nn.Module], ...]) -> bool:
    """Whether the module of a timm name knows one of `hosts`; it spares building a thousand other models."""
    module = sys.modules[timm.model_entrypoint(name).__module__]
    return any(inspect.isclass(value) and issubclass(value, hosts) for value in vars(module).values())
