"""Importing this module registers the architecture ``vitrim`` with timm, so that timm can load models vitrim pushed.

``timm.create_model("hf-hub:owner/name", pretrained=True)`` and ``"local-dir:FOLDER"`` then build the structure stored
in the repository's ``config.json``, and load its weights.
"""

from typing import Any

from timm.models import register_model
from timm.models._builder import load_pretrained
from torch import nn

from vitrim.families import build
from vitrim.words.errors import StoreError
from vitrim.words.formats import parse_spec
from vitrim.words.plain import dump
from vitrim.words.spec import Spec

__all__ = ["ARCHITECTURE", "config"]

ARCHITECTURE = "vitrim"


def config(spec: Spec, channels: int, licence: str) -> dict[str, Any]:
    """Return the ``config.json`` from which timm builds a model of structure `spec`.

    Args:
        spec: structure of the model.
        channels: channels of an image.
        licence: the license's identifier on the Hub.
    """
    published = dict(spec.host.pretrained)
    sources = {"url", "file", "hf_hub_id", "hf_hub_filename", "source", "tag", "custom_load", "license"}
    kept = {key: value for key, value in published.items() if key not in sources}
    return {
        "architecture": ARCHITECTURE,
        "num_classes": spec.classes,
        "model_args": {"spec": dump(spec)},
        "pretrained_cfg": {
            **kept,
            "input_size": [channels, *spec.image],
            "num_classes": spec.classes,
            "license": licence,
        },
    }


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
