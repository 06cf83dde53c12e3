"""Open image models of Hugging Face transformers as timm models: from their files, or from a model in memory.

The files are enough, transformers need not be installed. What is taken: ViT, DeiT, DINOv2 with and without registers,
Swin, BEiT and Data2Vec, and the vision towers of CLIP and SigLIP.
"""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitrim.deploy.remote import cached
from vitrim.deploy.transformers.convert import Given, convert, unknown_input
from vitrim.deploy.transformers.files import config_of, licence_of, processor_in, processor_of, weights_of
from vitrim.deploy.transformers.structure import read_structure
from vitrim.deploy.transformers.wrapper import WRAPPER, open_wrapped
from vitrim.nn.modes import evaluating, random_state_kept
from vitrim.nn.parity import TOLERANCES, relative
from vitrim.nn.weights import check_weights, home_of
from vitrim.words.errors import AdoptError, RecipeError
from vitrim.words.plain import read_json, reason

__all__ = ["as_timm", "is_of_transformers", "open_transformers", "transformers_config"]

Say = Callable[[str], None]


def transformers_config(name: str) -> dict[str, Any] | None:
    """Return the ``config.json`` if `name` is a folder or ``hf-hub:`` name of a model of transformers, else None.

    Raises:
        RecipeError: if the file is not JSON.
        StoreError: if a repository cannot be read.
    """
    return config_of(name)


def open_transformers(
    name: str, config: Mapping[str, Any], *, arguments: Mapping[str, Any], say: Say = lambda _: None
) -> nn.Module:
    """Open a folder or repository of transformers as a timm model, in evaluation mode on the CPU.

    Args:
        name: the folder, or ``hf-hub:owner/name``.
        config: what `transformers_config` returned for it.
        arguments: ``img_size``, ``num_classes``, ``in_chans`` where others are wanted than the model's own.
        say: called with a line on each thing that was assumed, resampled or left out.

    Raises:
        RecipeError: if it is of another architecture, or its files and arguments contradict each other.
        WeightsError: if weights are missing, damaged, not finite, or not those of ``config.json``.
        StoreError: if a repository cannot be read.
    """
    if config["model_type"] == WRAPPER:
        if arguments:
            raise RecipeError(
                f"{name}: a timm model that transformers saved must be taken as it is, but got "
                f"{', '.join(sorted(arguments))}; leave it out"
            )
        return open_wrapped(config, weights_of(name), name)
    read_structure(config, f"{name}/config.json")  # before any weights are read or downloaded
    notes = {"description": _description(config)}
    licence = licence_of(name)
    if licence is not None:
        notes["license"] = licence
    given = Given(
        source=name,
        config=config,
        state=weights_of(name),
        processor=processor_of(name),
        arguments=arguments,
        notes=notes,
    )
    return convert(given, say)


def is_of_transformers(model: nn.Module) -> bool:
    """Return whether a model in memory is of a class of transformers."""
    return any(
        kind.__name__ == "PreTrainedModel" and kind.__module__.startswith("transformers.")
        for kind in type(model).__mro__
    )


def as_timm(model: nn.Module, say: Say = lambda _: None) -> nn.Module:
    """Return a model of transformers as a timm model, after checking that both give the same outputs.

    The result has the type and device of `model`, which is left as it was; any other model is returned as it is. How
    images are prepared is read from the processor beside the files that the model was loaded from, if they are on this
    machine; a warning says what is assumed otherwise.

    Args:
        model: any model.
        say: called with a line on each thing that was assumed or left out.

    Raises:
        RecipeError: if it is of another architecture.
        WeightsError: if weights are without data, not finite, or not those of its configuration.
        AdoptError: if the outputs differ, as with adapters or hooks, or if its class has other outputs.
    """
    if not is_of_transformers(model):
        return model
    whole: Any = model
    config = whole.config.to_dict()
    if config.get("model_type") == WRAPPER:
        inner: nn.Module = whole.timm_model
        return inner
    check_weights(model)
    given = Given(
        source=type(model).__name__,
        config=config,
        state={name: value.detach() for name, value in model.state_dict().items()},
        processor=_processor_near(str(getattr(whole, "name_or_path", "") or "")),
        notes={"description": _description(config | {"architectures": [type(model).__name__]})},
        keep_type=True,
    )
    with random_state_kept(home_of(model)[0]):
        made: Any = convert(given, say)
    if given.processor is None:
        warnings.warn(f"{given.source}: {unknown_input(str(config['model_type']))}", stacklevel=2)
    _check_same(made, whole)
    return made  # type: ignore[no-any-return]


def _description(config: Mapping[str, Any]) -> str:
    classes = config.get("architectures")
    name = classes[0] if isinstance(classes, list) and classes else config.get("model_type")
    return f"{name} of Hugging Face transformers"


def _processor_near(place: str) -> dict[str, Any] | None:
    """Return the processor's configuration beside a model's files, in a folder or the Hub's cache; None if unknown."""
    if not place:
        return None
    if Path(place).is_dir():
        return processor_of(place)
    for file in ("preprocessor_config.json", "processor_config.json"):
        path = cached(place, file)
        found = None if path is None else processor_in(read_json(path, RecipeError))
        if found is not None:
            return found
    return None


@torch.no_grad()
def _check_same(made: Any, model: Any) -> None:
    """Compare the outputs of both models on two random images.

    Raises:
        AdoptError: if they differ, or if the outputs of this class cannot be compared.
    """
    device, dtype = home_of(model)
    name, allowed = type(model).__name__, TOLERANCES["adopt"][dtype]
    size = (made.patch_embed.proj.in_channels, *made.patch_embed.img_size)
    x = torch.randn(2, *size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    with evaluating(model, made):
        wanted = _answer(model, x)
        if wanted is None:
            raise AdoptError(
                f"{name}: a model of transformers must give logits or pooled features, but this class gives neither; "
                "pass its encoder"
            )
        apart = relative(made(x), wanted)
    if not apart <= allowed:
        raise AdoptError(
            f"{name}: its outputs must be those of its weights in timm's model to {allowed:.1e} of the largest, but "
            f"differ by {apart:.1e}; remove adapters and hooks, or please report this model"
        )


def _answer(model: Any, x: torch.Tensor) -> torch.Tensor | None:
    """Return what timm's model returns, from a model of transformers: logits, else the pooled features."""
    try:
        if hasattr(model, "text_model") and hasattr(model, "get_image_features"):
            found = model.get_image_features(pixel_values=x)
            return found if isinstance(found, torch.Tensor) else found.pooler_output
        found = model(pixel_values=x, return_dict=True)
    except Exception as problem:  # any class and any patch of it
        raise AdoptError(
            f"{type(model).__name__}: a model of transformers must run on an image, but {reason(problem)}"
        ) from None
    for key in ("logits", "image_embeds"):
        if isinstance(found.get(key), torch.Tensor):
            return found[key]  # type: ignore[no-any-return]
    last, pooled = found.get("last_hidden_state"), found.get("pooler_output")
    if last is None:
        return None
    if model.config.model_type in ("vit", "deit"):  # their pooler is a layer for pretraining, which is left out
        return last[:, 0]  # type: ignore[no-any-return]
    return last.mean(dim=1) if pooled is None else pooled  # type: ignore[no-any-return]
