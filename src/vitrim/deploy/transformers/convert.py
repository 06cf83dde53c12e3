"""Turn the configuration, weights and processor of an image model of Hugging Face transformers into a timm model.

D width, K classes, P patches, p prefix tokens.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.layers import resample_abs_pos_embed, resize_rel_pos_bias_table
from timm.models import adapt_input_conv
from torch import Tensor, nn
from torch.nn import functional as F

from vitrim.deploy.choose import listed
from vitrim.deploy.fit import load_weights_
from vitrim.deploy.transformers.names import TOKENS, left_out, renamed
from vitrim.deploy.transformers.processor import assumed, image_of, read_input
from vitrim.deploy.transformers.structure import Structure, build, read_structure, why_not_windows
from vitrim.words.errors import RecipeError, WeightsError
from vitrim.words.plain import reason

__all__ = ["Given", "convert", "labels_of", "unknown_input"]

_ARGUMENTS = ("img_size", "num_classes", "in_chans")


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What there is of a model of transformers.

    Attributes:
        source: its folder or name, for messages.
        config: ``config.json``.
        state: its weights.
        processor: ``preprocessor_config.json``; None if there is none.
        arguments: ``img_size``, ``num_classes`` or ``in_chans`` where a user asked for others than its own.
        notes: further entries of timm's ``pretrained_cfg``.
        keep_type: whether the model gets the type and device of the weights; it is float32 on the CPU otherwise.
    """

    source: str
    config: Mapping[str, Any]
    state: Mapping[str, Tensor]
    processor: Mapping[str, Any] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    keep_type: bool = False


def convert(given: Given, say: Callable[[str], None] = lambda _: None) -> nn.Module:
    """Build the timm model with the same logits, or features if there is no classifier; in evaluation mode.

    Class names are in its ``pretrained_cfg`` as ``label_names``, beside how images are prepared.

    Args:
        given: the model of transformers.
        say: called with a line on each thing that was assumed, resampled or left out.

    Raises:
        RecipeError: if it is of another architecture, or configuration, processor and arguments contradict each other.
        WeightsError: if the weights are not those of the configuration.
    """
    source = given.source
    odd = sorted(set(given.arguments) - set(_ARGUMENTS))
    if odd:
        raise RecipeError(
            f"{source}: a model of transformers must be taken as its config.json says, but got {', '.join(odd)}; only "
            f"{', '.join(_ARGUMENTS)} may be given"
        )
    found = read_structure(given.config, f"{source}/config.json")
    image, told = _image(found, given)
    wrong = why_not_windows(found, image) if found.family == "swin" else None
    if wrong is not None:
        raise RecipeError(f"{source}: {wrong}")
    named = renamed(given.state)
    left = left_out(given.state)
    _check_tokens(found, named, source)
    _check_sizes(found, named, source)
    classes, head = _head(found, named, given)
    labels = labels_of(given.config, classes, f"{source}/config.json") if head == "classifier" else None
    model: Any = build(
        found, named, image=image, classes=classes, channels=_channels(found, given), source=f"{source}/config.json"
    )
    if given.keep_type:
        like = next(value for value in named.values() if value.is_floating_point())
        model = model.to(like.device, like.dtype)
    state = _fitted(found, named, model, image, say=lambda text: say(f"{source}: {text}"))
    for part, words in _UNREAD.items():
        unread = [
            name for name in state if name.startswith(part) and isinstance(getattr(model, part[:-1], None), _Nothing)
        ]
        state = {name: value for name, value in state.items() if name not in unread}
        left += [words] if unread else []
    if left:
        say(f"{source}: left out {listed(left)}")
    load_weights_(model, state, source)
    preparing, assumes = _input(found, given, image)
    for text in (told, assumes):
        if text:
            say(f"{source}: {text}")
    model.pretrained_cfg = model.default_cfg = {
        "architecture": "",
        "input_size": (_channels(found, given), *image),
        "num_classes": classes,
        "first_conv": "patch_embed.proj",
        "classifier": _classifier(model),
        **({} if labels is None else {"label_names": tuple(labels)}),
        **{key: tuple(value) if isinstance(value, list) else value for key, value in preparing.items()},
        **given.notes,
    }
    return model.eval()  # type: ignore[no-any-return]


_UNREAD = {"attn_pool.": "the pooling head", "norm.": "the final norm"}
"""Layers that the classifiers of CLIP and SigLIP do not read, though they are in the file."""

_Nothing = nn.Identity | None


def _classifier(model: Any) -> Any:
    if hasattr(model, "head_dist"):
        return ("head", "head_dist")
    return "head" if isinstance(model.head, nn.Linear | nn.Identity) else "head.fc"


# -- sizes


def _image(found: Structure, given: Given) -> tuple[tuple[int, int], str]:
    """Return the image size to build the model for, and a line on why it is not that of the configuration.

    Raises:
        RecipeError: if processor and model differ, and transformers would refuse such images too.
    """
    asked = given.arguments.get("img_size")
    if asked is not None:
        sides = (asked, asked) if isinstance(asked, int) else tuple(asked)
        return (int(sides[0]), int(sides[1])), ""
    made = None
    try:
        made = None if given.processor is None else image_of(given.processor)
    except (TypeError, ValueError) as problem:
        raise RecipeError(
            f"{given.source}/preprocessor_config.json: size must be in pixels, but {reason(problem)}"
        ) from None
    if made is None or made == found.image:
        return found.image, ""
    size = f"{made[0]} x {made[1]}"
    # transformers resamples DINOv2's positions for any image; a processor that makes far larger ones is another's.
    if found.family.startswith("dinov2") and max(made) <= 8 * max(found.image):
        return made, f"images of {size} pixels, as its processor makes them, with resampled positions"
    raise RecipeError(
        f"{given.source}: the processor must make images of the model's {found.image[0]} x {found.image[1]} pixels, "
        f"but makes {size}; give --image-size {_size(found.image)} for the model's, or --image-size {_size(made)}, "
        "which resamples positions"
    )


def _size(image: tuple[int, int]) -> str:
    return str(image[0]) if image[0] == image[1] else f"{image[0]}x{image[1]}"


def _channels(found: Structure, given: Given) -> int:
    return int(given.arguments.get("in_chans") or found.values["num_channels"])


def _input(found: Structure, given: Given, image: tuple[int, int]) -> tuple[dict[str, Any], str]:
    """Return how images are prepared, and a line on what is assumed without a processor."""
    if given.processor is None:
        return assumed(found.model_type), unknown_input(found.model_type)
    try:
        return read_input(given.processor, image, f"{given.source}/preprocessor_config.json"), ""
    except (TypeError, ValueError) as problem:
        if isinstance(problem, RecipeError):
            raise
        raise RecipeError(
            f"{given.source}/preprocessor_config.json: must be that of an image processor, but {reason(problem)}"
        ) from None


def unknown_input(model_type: str) -> str:
    """Return what is assumed of images for a model without a processor, to end a sentence."""
    mean, std = (", ".join(f"{value:g}" for value in assumed(model_type)[key]) for key in ("mean", "std"))
    return (
        f"there is no preprocessor_config.json, so images are normalised with mean {mean} and std {std}; set data.mean "
        "and data.std for others"
    )


# -- head and labels


def _head(found: Structure, named: dict[str, Tensor], given: Given) -> tuple[int, str]:
    """Return K and what the head is: ``classifier``, ``projection`` or empty; remove one that is not asked for.

    Raises:
        RecipeError: if other classes are asked for than those of the weights.
    """
    weight = named.get("head.weight")
    classes = 0 if weight is None else len(weight)
    asked = given.arguments.get("num_classes")
    if asked is not None and asked not in (0, classes):
        have = f"{classes} of the classifier" if classes else "none"
        raise RecipeError(
            f"{given.source}: classes must be those of the weights, but there are {have} and --classes is {asked}; "
            "leave it out, or give --classes 0 for features"
        )
    kind = (
        "" if weight is None else "projection" if found.family == "clip" and "head.bias" not in named else "classifier"
    )
    return (classes if asked is None else int(asked)), kind


def labels_of(config: Mapping[str, Any], classes: int, source: str) -> list[str] | None:
    """Return the names of the classes in the order of the logits.

    Args:
        config: ``config.json``.
        classes: K.
        source: the file, for messages.

    Returns:
        None if there are no names, or only those that transformers makes up (``LABEL_0``).

    Raises:
        RecipeError: if the names do not count the classes, or ``id2label`` and ``label2id`` contradict each other.
    """
    given, back = config.get("id2label"), config.get("label2id")
    if not classes:
        return None
    if not isinstance(given, Mapping):
        given = {number: name for name, number in back.items()} if isinstance(back, Mapping) else None
    if given is None:
        count = config.get("num_labels")
        if isinstance(count, int) and count != classes:
            raise RecipeError(
                f"{source}: num_labels must be the {classes} classes of the weights, but is {count}; correct it"
            )
        return None
    try:
        names = {int(number): str(name) for number, name in given.items()}
    except (TypeError, ValueError):
        raise RecipeError(f"{source}: id2label must name numbers of classes, but has {list(given)[:3]}") from None
    if sorted(names) != list(range(classes)):
        missing = next((number for number in range(classes) if number not in names), None)
        what = f"class {missing} has none" if missing is not None else f"there is one for {max(names)}"
        raise RecipeError(
            f"{source}: id2label must name each of the {classes} classes of the weights, but has {len(names)} names "
            f"and {what}; correct it, or take it out"
        )
    for name, number in back.items() if isinstance(back, Mapping) else ():
        if str(number).isdecimal() and names.get(int(number)) != name:
            raise RecipeError(
                f"{source}: label2id must say the same as id2label, but has {number} for {name!r}, which is "
                f"{names.get(int(number))!r} there; correct one of them"
            )
    ordered = [names[number] for number in range(classes)]
    return None if ordered == [f"LABEL_{number}" for number in range(classes)] else ordered


# -- weights


def _check_tokens(found: Structure, named: Mapping[str, Tensor], source: str) -> None:
    """Refuse learned tokens that a model of this kind does not have, and text weights without their model.

    Raises:
        WeightsError: naming the tensor.
    """
    more = {"deit": {"dist_token"}, "dinov2_with_registers": {"reg_token"}}
    mine = set() if found.family in ("swin", "siglip") else {"cls_token"} | more.get(found.family, set())
    for name in named:
        what = TOKENS.get(name, "a token embedding" if "token_embedding" in name else None)
        if what is not None and name not in mine:
            raise WeightsError(
                f"{source}: weights must be those of a {found.model_type} model, which has no {name}, but hold {what}; "
                "give the config.json that was saved with them"
            )


def _check_sizes(found: Structure, named: Mapping[str, Tensor], source: str) -> None:
    """Refuse a configuration whose sizes are not those of the weights, before a model of these sizes is built.

    Raises:
        WeightsError: naming the first size that differs.
    """
    values, swin = found.values, found.family == "swin"
    width = values["embed_dim"] if swin else values["hidden_size"]
    depth = sum(values["depths"]) if swin else values["num_hidden_layers"]
    blocks = {match[0] for name in named if (match := re.match(r"(layers\.\d+\.)?blocks\.\d+\.", name))}
    kernel = tuple(named["patch_embed.proj.weight"].shape) if "patch_embed.proj.weight" in named else None
    shape = (width, values["num_channels"], *found.patch)
    checks = [
        (len(blocks) == depth, f"{depth} blocks", f"{len(blocks)}"),
        (kernel == shape, f"a patch embedding of shape {shape}", f"{kernel or 'none'}"),
    ]
    neurons = named.get("blocks.0.mlp.fc1.bias")
    if neurons is not None and "mlp_ratio" not in values:
        wanted = values["intermediate_size"]
        checks.append((len(neurons) == wanted, f"{wanted} neurons", f"{len(neurons)}"))
    positions = named.get("pos_embed")
    if positions is not None:
        patches, count = found.grid[0] * found.grid[1], positions.shape[1]
        checks.append((0 <= count - patches <= 2, f"{patches} patches", f"{count} positions"))
    for agrees, says, have in checks:
        if not agrees:
            raise WeightsError(
                f"{source}: weights must be those of the config.json, which says {says}, but have {have}; give the "
                "config.json that was saved with them"
            )


def _fitted(
    found: Structure,
    named: Mapping[str, Tensor],
    model: Any,
    image: tuple[int, int],
    say: Callable[[str], None],
) -> dict[str, Tensor]:
    """Return the weights in timm's layout and in the sizes of `model`."""
    state, mine = dict(named), model.state_dict()
    if model.num_classes == 0:
        state = {name: value for name, value in state.items() if not name.startswith(("head.", "head_dist."))}
    if found.family == "swin":
        state = _as_swin(state)
    elif "head.bias" in mine and "head.weight" in state and "head.bias" not in state:
        state["head.bias"] = torch.zeros(len(state["head.weight"])).to(state["head.weight"])
    kernel = state.get("patch_embed.proj.weight")
    if kernel is not None and kernel.ndim == 4 and kernel.shape[1] == 3 != model.patch_embed.proj.in_channels:
        state["patch_embed.proj.weight"] = adapt_input_conv(model.patch_embed.proj.in_channels, kernel)
        say(f"adapted the patch embedding from 3 channels to {model.patch_embed.proj.in_channels}, as timm does")
    positions = state.get("pos_embed")
    if positions is not None:
        prefix = positions.shape[1] - found.grid[0] * found.grid[1]
        if image != found.image and prefix >= 0:
            state["pos_embed"] = _resampled(found, positions, model.patch_embed.grid_size, prefix)
            say(f"resampled {positions.shape[1]} positions to {state['pos_embed'].shape[1]} for {_size(image)} pixels")
        if getattr(model, "no_embed_class", False) and "cls_token" in state and prefix == 1:
            state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
            state["pos_embed"] = state["pos_embed"][:, 1:]
    tables = [name for name in state if name.endswith("relative_position_bias_table")] if found.family == "beit" else []
    if tables and image != found.image:
        for name in tables:
            state[name] = resize_rel_pos_bias_table(state[name], model.patch_embed.grid_size, mine[name].shape)
        say(f"resampled {len(tables)} tables of relative positions for {_size(image)} pixels, as timm does")
    if isinstance(getattr(model, "reg_token", None), nn.Parameter) and "dist_token" in state:
        state["reg_token"] = state.pop("dist_token")
    return state


def _resampled(found: Structure, positions: Tensor, grid: tuple[int, int], prefix: int) -> Tensor:
    """Return positions `(1, p + P, D)` for another grid: as transformers does for DINOv2, as timm does for others."""
    if not found.family.startswith("dinov2"):
        done: Tensor = resample_abs_pos_embed(
            positions, new_size=list(grid), old_size=list(found.grid), num_prefix_tokens=prefix
        )
        return done
    first, rest = positions[:, :prefix], positions[:, prefix:]
    maps = rest.reshape(1, *found.grid, -1).permute(0, 3, 1, 2).float()
    smooth = found.family == "dinov2_with_registers"
    maps = F.interpolate(maps, size=tuple(grid), mode="bicubic", align_corners=False, antialias=smooth).to(positions)
    return torch.cat([first, maps.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def _as_swin(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of a Swin in timm's places: patches are merged before a stage, and not after it."""
    moved = {}
    for name, value in state.items():
        words = name.split(".")
        if words[0] == "layers" and words[2:3] == ["downsample"]:
            name = ".".join(["layers", str(int(words[1]) + 1), *words[2:]])
        elif words[0] == "head":
            name = f"head.fc.{words[-1]}"
        moved[name] = value
    return moved
