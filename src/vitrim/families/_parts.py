"""How families read a living timm model: its MLPs, norms and drop paths, what its host costs, what timm knows of it."""

import copy
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from pydantic import ValidationError
from timm.layers import DropPath
from timm.layers import Mlp as TimmMlp
from timm.layers.mlp import GluMlp, SwiGLU
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitrim.nn.layers import activation_name, make_norm, norm_of
from vitrim.nn.mlp import LAYERS
from vitrim.words.errors import AdoptError
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
    "pretrained",
    "read_mlp",
    "read_rates",
    "same_norm",
]


class Hole(nn.Identity):
    """Stands where a block will be; takes whatever timm gives a block, at no cost."""


def norm_maker(norm: Norm) -> Any:
    """What timm's constructors take as ``norm_layer``."""

    def layer(width: int, device: Any = None, dtype: Any = None, **_: Any) -> nn.Module:
        return make_norm(norm, width).to(device=device, dtype=dtype)

    return layer


def read_mlp(mlp: Any, at: str) -> dict[str, Any]:
    """The fields of a form that an MLP decides.

    Raises:
        AdoptError: if it is none that our blocks can be.
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
    """Refuse a layer that is not linear.

    Raises:
        AdoptError: naming it.
    """
    for name in names:
        layer = getattr(module, name)
        if not isinstance(layer, nn.Linear):
            raise AdoptError(f"{at}.{name}: must be a linear layer, but got {type(layer).__name__}")


def same_norm(norms: Sequence[tuple[str, nn.Module]]) -> Norm:
    """The one kind of several norms, each given with its path.

    Raises:
        AdoptError: if they are of several kinds, or of none that is known.
    """
    (at, module), *rest = norms
    norm = norm_of(module, at)
    for path, other in rest:
        if norm_of(other, path) != norm:
            raise AdoptError(f"{path}: must be the same norm as {at}, but got {norm_of(other, path)} beside {norm}")
    return norm


def optional_norm(module: nn.Module, at: str) -> Norm | None:
    """A norm, or None for an identity."""
    return None if isinstance(module, nn.Identity) else norm_of(module, at)


def checked_stage(at: str, **fields: Any) -> Stage:
    """A stage of a living model.

    Raises:
        AdoptError: naming the path, if its blocks contradict one another.
    """
    try:
        return Stage(**fields)
    except ValidationError as problem:
        text = problem.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise AdoptError(f"{at}: the blocks of a model must fit one another, but {text}") from None


def read_rates(block: Any) -> Rates:
    """What training drops in a block, timm's or ours, as its modules say now."""
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
    """How often a branch is dropped in training."""
    return float(module.drop_prob or 0.0) if isinstance(module, DropPath) else 0.0


def pretrained(model: Any) -> dict[str, Any]:
    """What timm knows of the weights and their input, as plain values; empty for a model built by hand."""
    known = getattr(model, "pretrained_cfg", None)
    known = known if isinstance(known, dict) else known.to_dict() if known is not None else {}
    plain = (str, int, float, bool)
    return {
        key: list(value) if isinstance(value, tuple | list) else value
        for key, value in known.items()
        if isinstance(value, plain) or (isinstance(value, tuple | list) and all(isinstance(v, plain) for v in value))
    }


def give_pretrained_(model: Any, known: dict[str, Any]) -> None:
    """Give a built host what `pretrained` read; timm keeps tuples where plain values have lists."""
    if known:
        restored = {key: tuple(value) if isinstance(value, list) else value for key, value in known.items()}
        model.pretrained_cfg = model.default_cfg = restored


def bare(model: nn.Module, without: Iterable[nn.Module]) -> nn.Module:
    """A copy of `model` in which nothing has data and runs of blocks are empty; for `count`."""
    runs = list(without)
    inside = {id(p) for run in runs for p in run.parameters()}
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("meta", torch.float32), requires_grad=False)
        for p in model.parameters()
        if id(p) not in inside
    }
    memo |= {id(b): b.to("meta") for b in model.buffers()} | {id(run): nn.Sequential() for run in runs}
    return copy.deepcopy(model, memo).eval()


def count(call: Any, x: Tensor) -> int:
    """Multiply-accumulates of ``call(x)``, as PyTorch counts them."""
    with (
        torch.no_grad(),
        warnings.catch_warnings(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        warnings.simplefilter("ignore")
        try:
            call(x)
        except RuntimeError as problem:
            raise AdoptError(
                f"stem and head must run without data to be counted, but do not: {problem}; "
                "remove methods and hooks of your own from the model"
            ) from None
    return int(counter.get_total_flops()) // 2
