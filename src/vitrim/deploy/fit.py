"""Fit a weights file to a model: choose its state dict, its classifier, its settings and the tensors to leave out.

D is the width of the features that the classifier reads, K the number of classes.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vitrim.deploy.choose import Chosen, choose, listed
from vitrim.deploy.infer import infer, near_name
from vitrim.deploy.timm_names import named_for, shown
from vitrim.families._parts import pretrained
from vitrim.words.errors import WeightsError

__all__ = ["Fit", "fill_", "fit", "load_weights_"]

_TRAINING = re.compile(
    r"(mask_token|mask_embed|decoder\w*|projector|projection_head|predictor|prototypes|criterion|\w*loss|queue\w*"
    r"|n_averaged|logit_scale|logit_bias)(\..*)?|(.*\.)?(total_ops|total_params)"
)
"""Names of parts that only training needs: masked autoencoders' decoders, self-supervised heads, counters."""

_HEADS = ("head", "fc", "classifier", "cls", "linear", "heads", "logits", "cls_head", "head_cls")
"""Last parts of classifier names, in order of preference if several layers could be the classifier."""

_NO_HEAD = re.compile(r"proj|loss|criterion|center|queue|prototype|decoder|predict|text|aux")


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """How a weights file fits a model.

    Attributes:
        name: of the model.
        source: the file, for messages.
        chosen: its state dict.
        shapes: the same under timm's names, not resampled, without data.
        arguments: keyword arguments of ``timm.create_model``, given and inferred.
        head: name in the file, weight `(K, D)` and bias `(K,)` of a classifier under another name than the model's.
        remarks: lines for the log.
    """

    name: str
    source: str
    chosen: Chosen
    shapes: Mapping[str, Tensor]
    arguments: dict[str, Any]
    head: tuple[str, Tensor, Tensor | None] | None = None
    remarks: list[str] = field(default_factory=list)


def fit(
    held: Mapping[str, Tensor], name: str, model: Any, given: Mapping[str, Any], *, source: str, key: str | None = None
) -> Fit:
    """Determine how to open a timm model with the weights of a file.

    Args:
        held: all tensors of the file.
        name: of the model.
        model: the timm model of that name with the given arguments; it may be without data.
        given: these arguments.
        source: the file, for messages.
        key: see `vitrim.deploy.choose.choose`.

    Raises:
        WeightsError: if no state dict fits, several do, it is quantized, or its shapes do not fit such a model.
    """
    state = model.state_dict()
    wanted = {name: tuple(value.shape) for name, value in state.items()}
    chosen = choose(held, wanted, source=source, key=key, shown=lambda state: shown(state, model))
    shapes = shown(chosen.state, model)
    _check_types(shapes, state, source)
    found = infer(shapes, model, given, source)
    target, *_ = _classifiers(model)
    own = shapes.get(f"{target}.weight")
    head = find_head(chosen.parts() | _unknown(chosen, shapes, wanted), model) if own is None else None
    weight = own if head is None else head[1]
    # Of a few models timm does not say where the classifier is; theirs is left as it was named.
    if not model.num_classes or f"{target}.weight" in state:
        _check_classes(weight, target, shapes, given, source)
        classes = 0 if weight is None else len(weight)
        if "num_classes" not in given and classes != model.num_classes:
            found.take(*([] if classes else ["no classifier, so the model gives features"]), num_classes=classes)
    remarks = [chosen.remark] if chosen.remark else []
    remarks += ["the shapes show " + ", ".join(found.remarks)] if found.remarks else []
    used = None if head is None or given.get("num_classes") == 0 else head
    if used is not None:
        remarks.append(f"took {used[0]} for the model's {target}")
    ours = set() if used is None else {f"{used[0]}.weight", f"{used[0]}.bias"}
    left = [
        part
        for part, tensors in chosen.parts().items()
        if not ours & set(tensors) and not any(root.startswith(f"{part}.") for root in chosen.copies)
    ]
    left += _ignored(chosen.state, shapes, model)
    remarks += [f"left out {listed(left)}"] if left else []
    return Fit(
        name=name,
        source=source,
        chosen=chosen,
        shapes=shapes,
        arguments={**given, **found.arguments},
        head=used,
        remarks=remarks,
    )


def _check_classes(
    weight: Tensor | None, target: str, shapes: Mapping[str, Tensor], given: Mapping[str, Any], source: str
) -> None:
    """Refuse a file without the classifier that is asked for, and one whose classifier is more than a linear layer.

    Raises:
        WeightsError: saying how the model opens as features.
    """
    if weight is not None or given.get("num_classes") == 0:
        return
    top = target.split(".")[0]
    if any(name.startswith(f"{top}.") for name in shapes):
        raise WeightsError(
            f"{source}: a classifier must be one linear layer, but {top} has other layers in this file; --classes 0 "
            "leaves it out and opens features"
        )
    if given.get("num_classes"):
        raise WeightsError(
            f"{source}: {given['num_classes']} classes must have a classifier in the file, but there is none; "
            "leave --classes out to open features"
        )


def fill_(model: nn.Module, fit: Fit) -> list[str]:
    """Load the weights, strictly, into a model that was built with the arguments of `fit`.

    Returns:
        A line for the log on each thing that was resampled, dropped or filled.

    Raises:
        WeightsError: if the weights do not fit, see `load_weights_`.
    """
    state, remarks = named_for(fit.chosen.state, model, fit.source)
    mine = model.state_dict()
    target, *more = _classifiers(model)
    if fit.head is not None:
        at, weight, bias = fit.head
        for leaf, value in (("weight", weight), ("bias", bias)):
            state.pop(f"{at.removeprefix(fit.chosen.prefix)}.{leaf}", None)
            if value is not None:
                state[f"{target}.{leaf}"] = value
    if f"{target}.weight" in state and f"{target}.bias" in mine and f"{target}.bias" not in state:
        state[f"{target}.bias"] = torch.zeros_like(mine[f"{target}.bias"])
        remarks.append("the classifier has no bias, and gets zeros")
    heads = [name for name in state if name.startswith(tuple(f"{head}." for head in (target, *more)))]
    if fit.arguments.get("num_classes") == 0 and heads:
        state = {name: value for name, value in state.items() if name not in heads}
        remarks.append(f"left out {target}, because no classes are asked for")
    training = [name for name in state if name not in mine and _TRAINING.fullmatch(name)]
    if training:
        state = {name: value for name, value in state.items() if name not in training}
        parts = [name if name.endswith(("total_ops", "total_params")) else name.split(".")[0] for name in training]
        remarks.append(f"left out {listed(parts)}, which only training needs")
    load_weights_(model, state, fit.source, hint=_way_out(fit, model, state))
    return remarks


def _way_out(fit: Fit, model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Return a clause on what to do about weights that do not fit; empty if nothing is known."""
    other = near_name(fit.name, fit.shapes, model)
    if other:
        return other
    head = fit.shapes.get(f"{_classifiers(model)[0]}.weight")
    if head is not None and "num_classes" in fit.arguments and len(head) != fit.arguments["num_classes"]:
        return f"; leave --classes out for the {len(head)} classes of the file, or give --classes 0 for features"
    extra = set(state) - set(model.state_dict())
    if "norm.weight" in extra and "fc_norm.weight" not in state:
        return "; in the file the norm is before pooling: --set model.arguments.global_pool=token, or fc_norm=false"
    if "norm_pre.weight" in extra:
        return "; norm_pre is a layer of CLIP's: name a model of CLIP (`vitrim models '*clip*'` lists them)"
    return ""


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    """Return timm's names of the layers that compute the K logits: ``head``, ``head.fc``, or two if distilled."""
    known = pretrained(model).get("classifier") or "head"
    return (known,) if isinstance(known, str) else tuple(known)


def _check_types(shapes: Mapping[str, Tensor], mine: Mapping[str, Tensor], source: str) -> None:
    for name, value in shapes.items():
        wanted = mine[name].is_floating_point() if name in mine else False
        if wanted and (not value.is_floating_point() or value.dtype.itemsize < 2):
            raise WeightsError(
                f"{source}: weights must be floating-point numbers of 16 bits or more, but {name} is {value.dtype}, so "
                "they are quantized; give those from before the quantization"
            )


# -- tensors that the model does not have


def _unknown(chosen: Chosen, shapes: Mapping[str, Tensor], wanted: Collection[str]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of the state dict that the model does not have, by the first part of their names."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name in shapes:
        if name not in wanted and name in chosen.state and not _TRAINING.fullmatch(name):
            whole = chosen.prefix + name
            parts.setdefault(chosen.prefix + name.split(".")[0], {})[whole] = chosen.state[name]
    return parts


def _ignored(state: Mapping[str, Tensor], shapes: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    """Return the parts of a state dict that timm's conversion ignores, such as CLIP's text tower."""
    parts = dict.fromkeys(name.split(".")[0] for name in state)
    if len(parts) < 2 or {name for name in state if name in shapes} == set(state):
        return []
    ignored = []
    for part in parts:
        rest = {name: value for name, value in state.items() if name.split(".")[0] != part}
        alone = part not in {name.split(".")[0] for name in shapes}
        if (alone and _TRAINING.fullmatch(part)) or set(shown(rest, model)) == set(shapes):
            ignored.append(part)
    return ignored


def find_head(parts: Mapping[str, Mapping[str, Tensor]], model: Any) -> tuple[str, Tensor, Tensor | None] | None:
    """Return the one linear layer that can be the classifier if the file has none under the model's own name.

    It reads D features and is alone in its part of the file: a projector has several layers.

    Args:
        parts: tensors that the model does not have, by parts of the file.
        model: the model, which gives D.

    Returns:
        Its name in the file, its weight `(K, D)` and bias `(K,)` or None; None if there is none, or no plain choice.
    """
    found = []
    for tensors in parts.values():
        weights = [name for name in tensors if name.endswith(".weight")]
        if len(weights) != 1 or _NO_HEAD.search(weights[0]):
            continue
        at, weight = weights[0].removesuffix(".weight"), tensors[weights[0]]
        bias = tensors.get(f"{at}.bias")
        fits = weight.ndim == 2 and weight.shape[1] == model.num_features
        if fits and len(tensors) == 1 + (bias is not None) and (bias is not None or _rank(at) < len(_HEADS)):
            found.append((at, weight, bias))
    best = [head for head in found if _rank(head[0]) == min(_rank(other[0]) for other in found)]
    return best[0] if len(best) == 1 else None


def _rank(at: str) -> int:
    """Return the rank of a layer's name among classifier names, by its last part that is not a number."""
    words = [word for word in at.split(".") if not word.isdecimal()]
    return _HEADS.index(words[-1]) if words and words[-1] in _HEADS else len(_HEADS)


# -- filling


def load_weights_(model: nn.Module, state: Mapping[str, Tensor], source: str, *, hint: str = "") -> None:
    """Load `state` into `model`, strictly.

    Args:
        model: the model to load into.
        state: tensors under the model's names.
        source: the file, for messages.
        hint: a clause with the way out, for the end of the message if the weights do not fit.

    Raises:
        WeightsError: naming the keys that are missing, unexpected or of another shape; the model is not modified then.
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
        raise WeightsError(f"{source}: weights must fit {type(model).__name__}, but the file {'; '.join(parts)}{hint}")
    for name, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise WeightsError(f"{source}: weights must be finite, but {name} holds NaN or infinite values")
    model.load_state_dict(dict(state))
