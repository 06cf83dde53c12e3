"""Open what transformers saves of a timm model in its wrapper (``TimmWrapperForImageClassification``).

So a model that was pushed and trained on with ``Trainer`` comes back.
"""

from collections.abc import Mapping
from typing import Any

import timm
from torch import Tensor, nn

from vitrim import families
from vitrim.deploy.fit import load_weights_
from vitrim.deploy.hub import ARCHITECTURE
from vitrim.words.errors import RecipeError
from vitrim.words.formats import parse_spec
from vitrim.words.plain import reason

__all__ = ["WRAPPER", "open_wrapped"]

WRAPPER = "timm_wrapper"
"""The value of ``model_type``."""


def open_wrapped(config: Mapping[str, Any], state: Mapping[str, Tensor], source: str) -> nn.Module:
    """Return the timm model inside a wrapper, in evaluation mode; one of vitrim's structure is adopted already.

    Args:
        config: ``config.json``.
        state: the weights, with or without the wrapper's prefix.
        source: the folder or name, for messages.

    Raises:
        RecipeError: if timm knows no such architecture.
        StoreError: if a structure of vitrim's is damaged.
        WeightsError: if the weights are not those of the structure.
    """
    name, given = str(config.get("architecture")), config.get("model_args")
    arguments = dict(given) if isinstance(given, Mapping) else {}
    classes = config.get("num_classes")
    if name == ARCHITECTURE:
        spec = parse_spec(arguments.get("spec"), RecipeError, f"{source}/config.json: model_args.spec")
        model: Any = families.build(spec)
        if isinstance(classes, int) and classes != spec.classes:
            model.reset_classifier(classes)
    else:
        if not timm.is_model(name):
            raise RecipeError(f"{source}/config.json: architecture must be a name that timm knows, but is '{name}'")
        if isinstance(classes, int):
            arguments["num_classes"] = classes
        try:
            model = timm.create_model(name, **_plain(arguments))
        except Exception as problem:  # timm's asserts, and what its constructors raise
            raise RecipeError(f"{source}/config.json: timm must build {name}, but {reason(problem)}") from None
    load_weights_(model, {key.removeprefix("timm_model."): value for key, value in state.items()}, source)
    _tell_(model, config)
    return model.eval()  # type: ignore[no-any-return]


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments without those that would make timm read or download something."""
    return {key: value for key, value in arguments.items() if key not in ("pretrained", "checkpoint_path", "cache_dir")}


def _tell_(model: Any, config: Mapping[str, Any]) -> None:
    """Give a model the preparation of images and the class names of its wrapper's configuration."""
    told = config.get("pretrained_cfg")
    known = dict(model.pretrained_cfg) if isinstance(model.pretrained_cfg, Mapping) else model.pretrained_cfg.to_dict()
    for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode", "input_size"):
        if isinstance(told, Mapping) and told.get(key) is not None:
            known[key] = tuple(told[key]) if isinstance(told[key], list) else told[key]
    known.pop("label_names", None)
    names = config.get("label_names")
    if isinstance(names, list) and len(names) == model.num_classes:
        known["label_names"] = tuple(map(str, names))
    known["num_classes"] = model.num_classes
    model.pretrained_cfg = model.default_cfg = known
