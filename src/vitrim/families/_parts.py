"""Functions that families use to read a timm model: MLPs, norms, drop paths, cost outside the blocks, timm's config."""

import enum
import functools
import types
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from timm.layers import DropPath
from timm.layers import Mlp as TimmMlp
from timm.layers.mlp import GluMlp, SwiGLU
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn

from vitrim.nn.copying import copied
from vitrim.nn.counter import operations
from vitrim.nn.layers import activation_name, make_norm, norm_of
from vitrim.nn.mlp import LAYERS
from vitrim.words.errors import AdoptError
from vitrim.words.plain import reason
from vitrim.words.private import public
from vitrim.words.spec import Norm, Rates, Stage

__all__ = [
    "Hole",
    "bare",
    "check_linear",
    "checked_stage",
    "count",
    "give_pretrained_",
    "norm_maker",
    "optional_norm",
    "params_outside",
    "pretrained",
    "read_mlp",
    "read_rates",
    "remembered",
    "same_norm",
]


class Hole(nn.Identity):
    """Placeholder for a block: accepts the arguments that timm passes to a block, and has no parameters."""


def norm_maker(norm: Norm) -> Any:
    """Return a function that builds the norm, for the argument ``norm_layer`` of timm's constructors."""

    def layer(width: int, device: Any = None, dtype: Any = None, **_: Any) -> nn.Module:
        return make_norm(norm, width).to(device=device, dtype=dtype)

    return layer


def read_mlp(mlp: Any, at: str) -> dict[str, Any]:
    """Return the fields of a `Form` that describe an MLP.

    Raises:
        AdoptError: vitrim's blocks do not support this MLP.
    """
    kinds = {TimmMlp: "plain", GluMlp: "glu", SwiGLU: "swiglu", GeGluMlp: "geglu"}
    kind = kinds.get(type(mlp))
    if kind is None:
        raise AdoptError(f"{at}: an MLP must be timm's Mlp, GluMlp, SwiGLU or GeGluMlp, but got {type(mlp).__name__}")
    check_linear(mlp, LAYERS[kind], at)
    first, last = getattr(mlp, LAYERS[kind][0]), getattr(mlp, LAYERS[kind][-1])
    return {
        "mlp": kind,
        "gate_first": kind == "glu" and not mlp.gate_last,
        "activation": activation_name(mlp.act, f"{at}.act"),
        "hidden_bias": first.bias is not None,
        "mlp_out_bias": last.bias is not None,
        "inner_norm" if kind == "geglu" else "hidden_norm": optional_norm(mlp.norm, f"{at}.norm"),
    }


def check_linear(module: nn.Module, names: Sequence[str], at: str) -> None:
    """Check that layers are linear.

    Raises:
        AdoptError: a layer is not linear; the message has its path.
    """
    for name in names:
        layer = getattr(module, name)
        if not isinstance(layer, nn.Linear):
            raise AdoptError(f"{at}.{name}: must be a linear layer, but got {type(layer).__name__}")


def same_norm(norms: Sequence[tuple[str, nn.Module]]) -> Norm:
    """Return the common kind of several norms, each given with its path.

    Raises:
        AdoptError: the norms are of different kinds, or of a kind that is not supported.
    """
    (at, module), *rest = norms
    norm = norm_of(module, at)
    for path, other in rest:
        if norm_of(other, path) != norm:
            raise AdoptError(f"{path}: must be the same norm as {at}, but got {norm_of(other, path)} and {norm}")
    return norm


def optional_norm(module: nn.Module, at: str) -> Norm | None:
    """Return the norm, or None for an identity."""
    return None if isinstance(module, nn.Identity) else norm_of(module, at)


def checked_stage(at: str, **fields: Any) -> Stage:
    """Return the stage of a model that has these fields.

    Raises:
        AdoptError: the blocks of the stage are inconsistent; the message has the path.
    """
    try:
        return Stage(**fields)
    except ValidationError as problem:
        text = problem.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise AdoptError(f"{at}: the blocks of a model must fit one another, but {text}") from None


def read_rates(block: Any) -> Rates:
    """Return the dropout and drop path rates of a block, timm's or vitrim's, read from its modules."""
    attention, mlp = block.attn, block.mlp
    return Rates(
        attention=_dropout(attention, "attn_drop"),
        projection=_dropout(attention, "proj_drop"),
        hidden=_dropout(mlp, "drop1"),
        output=_dropout(mlp, "drop2"),
        attention_path=_drop_path(block.drop_path1),
        mlp_path=_drop_path(block.drop_path2),
    )


def _dropout(part: Any, name: str) -> float:
    layer = getattr(part, name, None)
    return float(layer.p) if isinstance(layer, nn.Dropout) else 0.0


def _drop_path(module: nn.Module) -> float:
    """Return the probability that a branch is dropped in training."""
    return float(module.drop_prob or 0.0) if isinstance(module, DropPath) else 0.0


def pretrained(model: Any) -> dict[str, Any]:
    """Return timm's config of the weights and their input, as plain values; empty for a model without one.

    Names of local files are left out: a spec may be published.
    """
    known = getattr(model, "pretrained_cfg", None)
    known = known if isinstance(known, dict) else known.to_dict() if known is not None else {}
    plain = (str, int, float, bool)
    return {
        key: list(value) if isinstance(value, tuple | list) else value
        for key, value in public({key: value for key, value in known.items() if key not in _LOCAL}).items()
        if isinstance(value, plain) or (isinstance(value, tuple | list) and all(isinstance(v, plain) for v in value))
    }


_LOCAL = ("file", "state_dict")


def give_pretrained_(model: Any, known: dict[str, Any]) -> None:
    """Set the config that `pretrained` returned on a model, with lists converted to timm's tuples."""
    if known:
        restored = {key: tuple(value) if isinstance(value, list) else value for key, value in known.items()}
        model.pretrained_cfg = model.default_cfg = restored


def bare(model: nn.Module, without: Iterable[nn.Module]) -> nn.Module:
    """Return a copy of `model` on the meta device with empty sequences of blocks, for `count`."""
    runs = list(without)
    inside = {id(p) for run in runs for p in run.parameters()}
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta", torch.float32), requires_grad=False)
        for p in model.parameters()
        if id(p) not in inside
    }
    memo |= {id(b): b.to("meta") for b in model.buffers()} | {id(run): nn.Sequential() for run in runs}
    return copied(model, memo).eval()


def params_outside(model: nn.Module, without: Iterable[nn.Module]) -> int:
    """Return the number of parameters of `model` outside the sequences of blocks `without`."""
    runs = list(without)
    inside, outside = _parameters(runs, []), _parameters([model], runs)
    return sum(p.numel() for key, p in outside.items() if key not in inside)


def _parameters(modules: Iterable[nn.Module], without: Iterable[nn.Module]) -> dict[int, nn.Parameter]:
    """Return all parameters by `id`; `named_parameters` takes ten times as long because it builds the names."""
    found: dict[int, nn.Parameter] = {}
    todo, seen = list(modules), {id(run) for run in without}
    while todo:
        one = todo.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        for parameter in one._parameters.values():
            if parameter is not None:
                found[id(parameter)] = parameter
        todo += [inner for inner in one._modules.values() if inner is not None]
    return found


def count(call: Any, x: Tensor) -> int:
    """Return the multiply-accumulates of ``call(x)``, counted by PyTorch."""
    try:
        return operations(lambda: call(x)) // 2
    except AssertionError as problem:
        raise AdoptError(
            f"the model must take images of its own size, but says: {reason(problem)}; choose another img_size or "
            "patch_size"
        ) from None
    except RuntimeError as problem:
        raise AdoptError(
            f"stem and head must run on the meta device to be counted, but do not: {reason(problem)}; "
            "remove your own methods and hooks from the model"
        ) from None


T = TypeVar("T")

_KNOWN: dict[Hashable, Any] = {}
_MOST = 256
"""Largest number of cached results; if there are more, the cache is cleared."""


def remembered(model: nn.Module, without: Sequence[nn.Module], question: Hashable, answer: Callable[[], T]) -> T:
    """Return ``answer()``, cached by the structure of `model` outside the sequences of blocks `without`.

    Args:
        model: the model; the result may depend only on what `_structure` returns for it.
        without: modules that the result does not depend on.
        question: key of the computation, with everything else that the result depends on, such as the image size.
        answer: function that computes the result; never None.
    """
    known = _structure(model, without)
    if known is None:
        return answer()
    # One look-up, for another thread may forget everything in between.
    kept: T | None = _KNOWN.get((question, known))
    if kept is not None:
        return kept
    found = answer()
    if len(_KNOWN) >= _MOST:
        _KNOWN.clear()
    _KNOWN[question, known] = found
    return found


class _Unclear(Exception):
    """A part of a model cannot be compared with that of another model."""


_EMPTY = frozenset(vars(nn.Module()))
"""Attributes that every module has."""

_ASIDE = frozenset(
    "_model_args _traits default_cfg feature_info forward_intermediates pretrained_cfg pretrained_model_args "
    "prune_intermediate_layers reset_classifier set_input_size weight_init_mode".split()
)
"""Attributes that no forward pass reads."""


def _structure(model: nn.Module, without: Sequence[nn.Module]) -> Hashable | None:
    """Return everything that a forward pass depends on except the values of weights: types, shapes, plain attributes.

    The result is None if the forward pass could also depend on hooks, on methods set on a single module, or on
    attributes of other types.
    """
    seen: dict[int, int] = {id(run): -1 for run in without}
    found: list[Any] = []
    todo: list[tuple[str, nn.Module | None]] = [("", model)]
    try:
        while todo:
            name, module = todo.pop()
            if module is None or id(module) in seen:
                found.append((name, None if module is None else seen[id(module)]))
                continue
            seen[id(module)] = len(seen)
            found.append((name, type(module), *_attributes(module)))
            todo += [(f"{name}.{child}", inner) for child, inner in module._modules.items()]
    except _Unclear:
        return None
    return tuple(found)


def _attributes(module: nn.Module) -> list[Hashable]:
    if module._forward_hooks or module._forward_pre_hooks:
        raise _Unclear
    tensors = [*module._parameters.items(), *module._buffers.items()]
    found: list[Hashable] = [(name, None if t is None else (t.shape, t.dtype)) for name, t in tensors]
    for name, value in vars(module).items():
        if name in _EMPTY or name in _ASIDE:
            continue
        if callable(getattr(type(module), name, None)):
            raise _Unclear
        found.append((name, _plainly(value)))
    return found


def _plainly(value: Any) -> Hashable:
    """Return a key that is equal for equal values of the same type; for functions and classes the object itself.

    Raises:
        _Unclear: the value may contain parts that cannot be compared.
    """
    kind = type(value)
    if value is None or kind in (bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device):
        return kind, value
    if isinstance(value, enum.Enum | type):
        return value
    if isinstance(value, types.FunctionType) and value.__closure__ is None:
        # A default value may contain a module.
        return value, _plainly(value.__defaults__), _plainly(value.__kwdefaults__)
    if isinstance(value, types.BuiltinFunctionType) and isinstance(value.__self__, types.ModuleType | None):
        return value
    if kind in (list, tuple, set, frozenset):
        parts = [_plainly(part) for part in value]
        return kind, tuple(parts) if kind in (list, tuple) else frozenset(parts)
    if isinstance(value, dict):
        return kind, tuple((_plainly(key), _plainly(part)) for key, part in value.items())
    if kind is functools.partial:
        return kind, _plainly(value.func), _plainly(value.args), _plainly(value.keywords)
    raise _Unclear
