"""Importing this module registers the architecture ``vitrim`` with timm, so that timm can load models vitrim pushed.

``timm.create_model("hf-hub:owner/name", pretrained=True)`` and ``"local-dir:FOLDER"`` then build the structure stored
in the repository's ``config.json``, and load its weights.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import timm
from timm.models import register_model
from timm.models._builder import load_pretrained
from torch import nn

from vitrim.families import build, describe
from vitrim.nn.modes import without_data
from vitrim.words.errors import StoreError
from vitrim.words.formats import parse_spec
from vitrim.words.plain import dump
from vitrim.words.spec import Attention, Spec

__all__ = ["ARCHITECTURE", "Plain", "config", "labels_of", "plain_timm"]

ARCHITECTURE = "vitrim"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    """How timm alone builds a model.

    Attributes:
        name: a timm name.
        arguments: keyword arguments of ``timm.create_model`` beside ``num_classes``, values that JSON has.
    """

    name: str
    arguments: Mapping[str, Any]


def config(spec: Spec, channels: int, licence: str, plain: Plain | None = None) -> dict[str, Any]:
    """Return the ``config.json`` from which timm, and the timm wrapper of transformers, build a model.

    Args:
        spec: structure of the model.
        channels: channels of an image.
        licence: the license's identifier on the Hub.
        plain: how timm alone builds this model, where it can (`plain_timm`); the architecture is vitrim's otherwise.
    """
    published = dict(spec.host.pretrained)
    kept = {key: value for key, value in published.items() if key not in _NOT_KEPT}
    names = labels_of(spec)
    return {
        "architecture": ARCHITECTURE if plain is None else plain.name,
        "num_classes": spec.classes,
        **({} if names is None else {"label_names": list(names)}),
        "model_args": {"spec": dump(spec)} if plain is None else dict(plain.arguments),
        "pretrained_cfg": {
            **kept,
            "input_size": [channels, *spec.image],
            "num_classes": spec.classes,
            "license": licence,
        },
    }


_NOT_KEPT = frozenset(
    "url file state_dict hf_hub_id hf_hub_filename source tag custom_load license label_names label_offset".split()
)
"""Entries of timm's ``pretrained_cfg`` on where the parent's weights were, and those that are said elsewhere."""


def labels_of(spec: Spec) -> tuple[str, ...] | None:
    """Return the names of a model's classes in the order of its logits; None if they are not known."""
    names = spec.host.pretrained.get("label_names")
    if not isinstance(names, list | tuple) or not len(names) == spec.classes > 0:
        return None
    return tuple(map(str, names))


def plain_timm(spec: Spec) -> Plain | None:
    """Return how timm without vitrim builds a model of a structure; None if it cannot.

    It can where no block lost more than neurons, and every block as many: then blocks are timm's own. The answer is
    tried: timm's model must have the spec.
    """
    name = spec.host.name or "vit_base_patch16_224"
    if not timm.is_model(name) or not timm.model_entrypoint(name).__module__.startswith("timm."):
        return None
    for arguments in _arguments(spec):
        try:
            with without_data():
                made = describe(timm.create_model(name, num_classes=spec.classes, **arguments))
        except Exception:  # timm's asserts, and arguments that this name does not take
            continue
        wanted = spec.model_copy(update={"host": spec.host.model_copy(update={"name": name})})
        if made == wanted:
            return Plain(name=name, arguments=arguments)
    return None


def _arguments(spec: Spec) -> Iterator[dict[str, Any]]:
    """Yield arguments to try, the fewest first."""
    host = dict(spec.host.arguments)
    rows, columns = spec.image
    size = {"img_size": rows if rows == columns else [rows, columns]}
    if host.get("in_chans", 3) != 3:
        size["in_chans"] = host["in_chans"]
    yield size
    stage = spec.stages[0]
    first = stage.blocks[0]
    if spec.family != "vit" or not isinstance(first.mixer, Attention) or not first.hidden or not first.mixer.v:
        return
    mlp = 2 * first.hidden if stage.form.mlp == "glu" else first.hidden
    ratio = mlp / stage.width
    built = size | {
        "patch_size": host["patch_size"][0] if len(set(host["patch_size"])) == 1 else host["patch_size"],
        "embed_dim": stage.width,
        "depth": len(stage.blocks),
        "num_heads": len(first.mixer.v),
        "mlp_ratio": ratio if int(stage.width * ratio) == mlp else (mlp + 0.5) / stage.width,
        "qkv_bias": stage.form.qkv_bias,
        "init_values": 1e-5 if stage.form.layer_scale else None,
    }
    yield built
    names = "class_token no_embed_class reg_tokens pre_norm global_pool fc_norm final_norm dynamic_img_size".split()
    activations = {"torch.GELU": "gelu", "timm.GELUTanh": "gelu_tanh", "timm.QuickGELU": "quick_gelu"}
    yield built | {name: host[name] for name in names} | {"act_layer": activations.get(stage.form.activation)}


def _create(
    pretrained: bool = False,
    pretrained_cfg: dict[str, Any] | None = None,
    spec: dict[str, Any] | None = None,
    num_classes: int | None = None,
    cache_dir: str | None = None,
    **others: Any,
) -> nn.Module:
    """Build a model for timm.

    Raises:
        StoreError: if timm passes no configuration of vitrim's, or arguments that a stored structure cannot take.
    """
    if spec is None:
        raise StoreError(
            "the architecture 'vitrim' must come from a repository or folder that vitrim pushed, but has no structure; "
            "call timm.create_model with 'hf-hub:owner/name' or 'local-dir:FOLDER'"
        )
    asked = sorted(key for key, value in others.items() if value is not None and key not in _TIMMS_OWN)
    if asked:
        raise StoreError(
            f"a stored model must be opened as it is, but got {', '.join(asked)}; set it on the model then"
        )
    known = parse_spec(spec, StoreError, "config.json: spec")
    model = build(known)
    if pretrained:
        found = dict(pretrained_cfg or {})
        load_pretrained(model, found, known.classes, found.get("input_size", (3,))[0], cache_dir=cache_dir)
    if num_classes is not None and num_classes != known.classes:
        reset: Any = model.reset_classifier
        reset(num_classes)
    return model.eval()


_TIMMS_OWN = {"pretrained_cfg_overlay", "pretrained_model_args"}
_create.__name__ = ARCHITECTURE
# timm adds the name to the module's ``__all__``; this restores it.
_public = list(__all__)
register_model(_create)
__all__[:] = _public
