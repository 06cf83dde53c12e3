"""Find and read the files of a model of Hugging Face transformers, in a folder or on the Hub."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vitrim.deploy.checkpoint import read_checkpoint
from vitrim.deploy.remote import fetch, on_hub
from vitrim.words.errors import RecipeError, StoreError, WeightsError
from vitrim.words.plain import read_json

__all__ = ["config_of", "find", "licence_of", "processor_in", "processor_of", "weights_of"]

_CONFIG = "config.json"
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def find(name: str, file: str) -> Path | None:
    """Return the path of a file of a folder, or of a repository ``hf-hub:owner/name``; None if there is no such file.

    Raises:
        StoreError: if there is no such repository, or the Hub cannot be reached.
    """
    if on_hub(name):
        return fetch(name, file)
    path = Path(name) / file
    return path if path.is_file() else None


def config_of(name: str) -> dict[str, Any] | None:
    """Return the ``config.json`` of a model of transformers; None if `name` is not one.

    A model of transformers names its ``model_type``; timm's and vitrim's own repositories name an ``architecture``.

    Raises:
        RecipeError: if the file is not JSON.
        StoreError: as `find`.
    """
    try:
        path = find(name, _CONFIG) if on_hub(name) or Path(name).is_dir() else None
    except OSError as problem:
        if isinstance(problem, StoreError):
            raise
        return None  # a name that no file can have
    if path is None:
        return None
    config = read_json(path, RecipeError)
    return config if isinstance(config, dict) and isinstance(config.get("model_type"), str) else None


def processor_of(name: str) -> dict[str, Any] | None:
    """Return the image processor's configuration, from either file that transformers writes; None if there is none.

    Raises:
        RecipeError: if the file is not JSON.
        StoreError: as `find`.
    """
    for file in ("preprocessor_config.json", "processor_config.json"):
        path = find(name, file)
        found = None if path is None else processor_in(read_json(path, RecipeError))
        if found is not None:
            return found
    return None


def processor_in(held: Any) -> dict[str, Any] | None:
    """Return the part of a processor's configuration that is about images."""
    if not isinstance(held, Mapping):
        return None
    inner = held.get("image_processor", held)
    about = ("size", "crop_size", "image_mean", "image_std", "do_normalize", "do_resize")
    return dict(inner) if isinstance(inner, Mapping) and any(key in inner for key in about) else None


def weights_of(name: str) -> dict[str, Tensor]:
    """Read all weights: one file, or the parts that an index names.

    Raises:
        WeightsError: if there are none, or one is missing, damaged or of another kind.
        StoreError: as `find`.
    """
    for file in _WEIGHTS:
        path = find(name, file)
        if path is not None:
            return read_checkpoint(path)
        index = find(name, f"{file}.index.json")
        if index is not None:
            return _joined(name, index)
    what = "it holds an adapter alone; merge it into its model first" if find(name, "adapter_config.json") else (
        "there are none; save the model there again with save_pretrained"
    )  # fmt: skip
    raise WeightsError(f"{name}: a model of transformers must have its weights in {_WEIGHTS[0]}, but {what}")


def _joined(name: str, index: Path) -> dict[str, Tensor]:
    held = read_json(index, WeightsError)
    places = held.get("weight_map") if isinstance(held, Mapping) else None
    parts = sorted({str(part) for part in places.values()}) if isinstance(places, Mapping) else []
    odd = [part for part in parts if Path(part).name != part]
    if not parts or odd:
        what = f"names {odd[0]!r}" if odd else "names none"
        raise WeightsError(f"{index}: an index must name the files beside it that hold the weights, but {what}")
    state: dict[str, Tensor] = {}
    for part in parts:
        path = find(name, part)
        if path is None:
            raise WeightsError(
                f"{name}: all {len(parts)} files of {index.name} must be there, but {part} is not; copy or download it "
                "again"
            )
        state |= read_checkpoint(path)
    return state


def licence_of(name: str) -> str | None:
    """Return the license that the model's own card states in its front matter; None if it does not.

    Raises:
        StoreError: as `find`.
    """
    path = find(name, "README.md")
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8")[:20_000]
    except (OSError, UnicodeDecodeError):
        return None
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    line = re.search(r"^license:\s*[\"']?([\w.\-]+)[\"']?\s*$", front[1], re.MULTILINE) if front else None
    return line[1] if line and line[1] != "other" else None
