"""What people have made of a timm model before they bring it: wrappers, another classifier, methods and tensors added.

Wrappers come off, and a classifier that a spec can say is put where timm has it. All else is refused here, with the way
out, and not after the search when the child is to be stored.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import timm
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from torch import nn

from vitrim.families._refused import refusal_of
from vitrim.nn.modes import without_data
from vitrim.words.errors import AdoptError, SpecError, WeightsError

__all__ = ["called", "check_class", "check_methods", "check_tensors", "check_types", "unwrapped", "with_own_head"]


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside PyTorch's own wrappers: data parallelism, compilation, weight averaging, in any order."""
    while type(model).__module__.startswith("torch."):
        inner = next((model._modules[name] for name in ("_orig_mod", "module") if name in model._modules), None)
        if inner is None:
            break
        model = inner
    return model


def called(model: nn.Module, known: Callable[[nn.Module], bool]) -> str:
    """What a model is that no family takes, and the way out, to end a sentence.

    Args:
        model: the model.
        known: whether a family takes a model.
    """
    name, home = type(model).__name__, type(model).__module__.split(".")[0]
    inside = next((at for at, child in model.named_children() if known(child)), None)
    if inside is not None:
        return f"{name}, which wraps one; pass its .{inside}"
    if home == "torchvision":
        near = _timm_name(model)
        return f"torchvision's {name}; " + (
            f"take {near} of timm" if near else "take a model of timm, see `vitrim models`"
        )
    if home == "transformers":
        return (
            f"{name} of Hugging Face transformers; vitrim.compress takes it, and as_timm of vitrim.deploy.transformers "
            "makes a timm model of it"
        )
    refused = refusal_of(type(model).__module__)
    if refused is not None:
        near = " or ".join(f"'{start}*'" for start in refused.near)
        return f"{name} ({refused.what}), and {refused.why}; see `vitrim models {near}`"
    return f"{name}; see `vitrim models`"


def _timm_name(model: Any) -> str | None:
    """The timm model of the same structure as one of torchvision's, if there is one."""
    if type(model).__name__ == "VisionTransformer":
        size = {768: "base", 1024: "large", 1280: "huge"}.get(model.hidden_dim)
        name = f"vit_{size}_patch{model.patch_size}_{model.image_size}"
        return next(
            (known for known in (name, f"vit_{size}_patch{model.patch_size}_224") if timm.is_model(known)), None
        )
    if type(model).__name__ == "SwinTransformer":
        version = "v2" if any(type(part).__name__ == "PatchMergingV2" for part in model.modules()) else ""
        width, depth = model.features[0][0].out_channels, len(model.features[5])
        size = {(96, 6): "tiny", (96, 18): "small", (128, 18): "base"}.get((width, depth))
        name = f"swin{version}_{size}_" + ("window8_256" if version else "patch4_window7_224")
        return name if timm.is_model(name) else None
    return None


# -- weights that are no floats


def check_types(model: nn.Module) -> None:
    """Raise if a layer is quantized.

    Raises:
        WeightsError: naming the layer.
    """
    for name, module in model.named_modules():
        if ".quantized" in type(module).__module__:
            raise WeightsError(
                f"{name}: weights must be floating-point numbers, but this layer is quantised "
                f"({type(module).__module__}); give the model from before the quantisation"
            )


# -- the classifier


def with_own_head(model: Any) -> Any:
    """`model` itself, or where its classifier was replaced, the same model with that in timm's place.

    A linear layer with bias, dropout before it, or nothing in place of a classifier can be said in a spec. The result
    shares all else with the argument, which is left as it was.

    Raises:
        AdoptError: if the classifier is anything else.
    """
    if isinstance(model, SwinTransformer | SwinTransformerV2):
        at, holder, last, drop = "head.fc", model.head, "fc", "drop"
        if not hasattr(holder, "global_pool"):
            count = getattr(holder, "out_features", 0)
            raise AdoptError(
                f"head: must be timm's ClassifierHead, which pools before its layer head.fc, but got "
                f"{type(holder).__name__}; call model.reset_classifier({count}) and fill model.head.fc"
            )
    elif isinstance(model, VisionTransformer | Eva | Beit | VisionTransformerRelPos):
        at, holder, last, drop = "head", model, "head", "head_drop"
    else:
        return model
    layer, rate = _linear(getattr(holder, last), at)
    classes = layer.out_features if isinstance(layer, nn.Linear) else 0
    second = getattr(model, "head_dist", None)
    if second is not None and getattr(second, "out_features", 0) != classes:
        raise AdoptError(
            f"head_dist: a distilled model must have two classifiers of as many classes, but has {classes} and "
            f"{getattr(second, 'out_features', 0)}; call model.reset_classifier({classes})"
        )
    if layer is getattr(holder, last) and classes == model.num_classes:
        return model
    given = getattr(holder, drop)
    parts = {last: layer, drop: nn.Dropout(1 - (1 - given.p) * (1 - rate)).train(given.training) if rate else given}
    shell = _shell(holder, parts, classes)
    return shell if holder is model else _shell(model, {"head": shell}, classes)


def _linear(layer: nn.Module, at: str) -> tuple[nn.Module, float]:
    """The linear layer (or nothing) that a classifier is, and how often what comes before it drops a feature."""
    parts = [part for part in layer if not isinstance(part, nn.Identity)] if type(layer) is nn.Sequential else [layer]
    drops = [part for part in parts[:-1] if type(part) is nn.Dropout]
    last = parts[-1] if parts else nn.Identity()
    if len(drops) != len(parts[:-1]) or type(last) not in (nn.Linear, nn.Identity):
        raise AdoptError(_way_out(at, layer))
    if isinstance(last, nn.Linear) and last.bias is None:
        raise AdoptError(
            f"{at}: a classifier must have a bias, but this one has none; give it one of zeros: `model.{at}.bias = "
            f"torch.nn.Parameter(torch.zeros({last.out_features}))`"
        )
    kept = 1.0
    for part in drops:
        kept *= 1 - part.p
    return last, 1 - kept


def _way_out(at: str, layer: nn.Module) -> str:
    linear = [part.out_features for part in layer.modules() if isinstance(part, nn.Linear)]
    count = linear[-1] if linear else 0
    return (
        f"{at}: a classifier must be one linear layer, but got {type(layer).__name__}; call "
        f"model.reset_classifier({count}) and train that, or reset_classifier(0) and keep your own outside"
    )


def _shell(module: Any, parts: dict[str, nn.Module], classes: int) -> Any:
    """A module that shares everything with `module` but some children and its number of classes."""
    shell = copy.copy(module)
    shell._modules = {**module._modules, **parts}
    if hasattr(shell, "num_classes"):
        shell.num_classes = classes
    return shell


# -- what a spec cannot say


def check_methods(model: nn.Module, blocks: Iterable[nn.Module]) -> None:
    """Refuse methods of one's own outside of the blocks, which no stored model would have.

    Raises:
        AdoptError: naming the method.
    """
    inside = {id(part) for block in blocks for part in block.modules()}
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        kind = type(module)
        own = [
            key
            for key, value in vars(module).items()
            if callable(value)
            and callable(getattr(kind, key, None))
            and not type(value).__module__.startswith("vitrim.")
        ]
        if own:
            at = f"{name}.{own[0]}".removeprefix(".")
            raise AdoptError(
                f"{at}: must be the method of {kind.__name__}, but was replaced on this model; undo it with "
                f"`del model.{at}`, and do what it does to images or logits outside of the model"
            )


def check_class(model: nn.Module) -> None:
    """Refuse a class of one's own with methods of its own, which a stored model would not be of.

    Raises:
        AdoptError: naming the method.
    """
    for kind in type(model).__mro__:
        if kind.__module__.startswith(("timm.", "vitrim.", "torch.")):
            break
        own = [key for key, value in vars(kind).items() if callable(value) and not key.startswith("__")]
        known = [key for key in own if any(hasattr(base, key) for base in kind.__bases__)]
        if known:
            raise AdoptError(
                f"{known[0]}: must be timm's, but {kind.__name__} has its own; put the weights into timm's class, and "
                "do what this method does outside of the model"
            )


def check_tensors(model: nn.Module, empty: Callable[[], nn.Module]) -> None:
    """Refuse parameters and buffers that the model as its spec has it would lack, and those that it would have besides.

    Args:
        model: an adopted model.
        empty: builds its like from its spec.

    Raises:
        AdoptError: naming them.
    """
    try:
        with without_data():
            wanted = set(empty().state_dict())
    except SpecError:  # it can be used in memory alone, as what storing it would say
        return
    for name in sorted(set(model.state_dict()) - wanted):
        raise AdoptError(
            f"{name}: parameters and buffers must be those that timm's {type(model).__name__} has, but this one is "
            f"added; take it away with `del model.{name}` and use it outside of the model"
        )
    for name in sorted(wanted - set(model.state_dict())):
        raise AdoptError(
            f"{name}: parameters must be those that timm's {type(model).__name__} has, but this one is taken away; "
            "put it back"
        )
