"""Store models: one ``.safetensors`` file with the weights, the spec and the provenance, without pickle.

The spec is stored as JSON in the file's metadata, so loading needs nothing but the file.
``hf-hub:owner/name[@revision]`` names the file ``model.safetensors`` of a repository on the Hugging Face Hub.
"""

import contextlib
import json
import math
import tempfile
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vitrim import __version__
from vitrim.deploy.remote import fetch, header, on_hub, repository_of, upload
from vitrim.families import blocks_of, build, describe
from vitrim.nn.modes import without_data
from vitrim.nn.parity import find_difference
from vitrim.nn.weights import check_weights, home_of, why_not_held, why_not_like
from vitrim.words.errors import AdoptError, StoreError, WeightsError
from vitrim.words.formats import FORMAT, check_format, parse_spec
from vitrim.words.parsing import parse_json
from vitrim.words.plain import dump, is_file, reason, writing
from vitrim.words.spec import Spec

__all__ = ["FILE", "given", "hub_file", "is_stored", "load", "provenance", "read_spec", "save"]

FILE = "model.safetensors"

MOST_COMPUTED = 2**30
"""Bytes of the buffers that a file does not hold. A Swin-B of 384 pixels computes 2 MB of indices and masks."""


def save(model: nn.Module, path: str | Path, *, provenance: Mapping[str, Any] | None = None) -> Path:
    """Store an adopted model, and check that the file gives the same model back.

    A temporary file is written next to `path`, read back, built from its spec, compared with `model` on a random input,
    and only then renamed. So a file that exists can be loaded, and a part that a spec cannot represent (a custom head,
    a hook that changes logits or features) raises an error now. Every parameter keeps its type; which parameters were
    frozen is not stored.

    Args:
        model: an adopted model, dense or cut, on any device.
        path: a file, or ``hf-hub:owner/name[@branch]`` to push to the Hub.
        provenance: plain values on the origin of the model, stored with versions and date.

    Returns:
        `path`, which `load` accepts.

    Raises:
        StoreError: if the model was not adopted, has parts that its spec does not describe, or cannot be written; an
            existing file is not changed then.
        WeightsError: naming the tensor, if weights are not finite or of a type that models do not compute in.
    """
    if on_hub(path):
        repository, revision = repository_of(str(path))
        with tempfile.TemporaryDirectory() as folder:
            save(model, Path(folder) / FILE, provenance=provenance)
            upload(Path(folder), repository, revision=revision)
        return Path(path)
    target = Path(path)
    spec, state = _contents(model)
    metadata = {"format": "pt", "vitrim": _written(spec, provenance)}
    try:
        with writing(target) as part:
            save_file(state, part, metadata=metadata)
            _prove(model, _read(part), spec.image)
    except StoreError:
        raise
    except (OSError, SafetensorError) as problem:
        raise StoreError(
            f"{target}: the model must be written here, but {reason(problem)}; make room or choose another place"
        ) from None
    return target


def load(path_or_name: str | Path, *, device: str | torch.device = "cpu") -> nn.Module:
    """Load a stored model, in evaluation mode, with the types it was stored in.

    Args:
        path_or_name: a file that `save` wrote, a folder with a ``model.safetensors``, or
            ``hf-hub:owner/name[@revision]``.
        device: where to put it.

    Raises:
        StoreError: if the file is missing, damaged, not a vitrim file, or of a newer format.
        WeightsError: naming the keys, if the weights do not fit the spec, are not finite, or of a type that models do
            not compute in.
        SpecError: if the installed timm cannot build the host.
    """
    return _read(_find(path_or_name)).to(device)


def read_spec(path_or_name: str | Path) -> Spec:
    """Read the spec of a stored model without its weights; from the Hub only the header of the file is downloaded.

    Raises:
        StoreError: as `load`.
    """
    return _spec(path_or_name)


def provenance(path_or_name: str | Path) -> dict[str, Any]:
    """Read the provenance of a stored model (``vitrim``, ``torch``, ``timm``, ``date``, ``given``), not its weights.

    Raises:
        StoreError: as `load`.
    """
    known = _sheet(path_or_name).get("provenance", {})
    if not isinstance(known, dict):
        raise StoreError(f"{path_or_name}: provenance must be a table, but is {known!r}; the file was changed by hand")
    return known


def given(path_or_name: str | Path) -> dict[str, Any]:
    """Read what `save` was given as provenance; empty if the file holds no table there.

    Raises:
        StoreError: as `load`.
    """
    known = provenance(path_or_name).get("given")
    return dict(known) if isinstance(known, Mapping) else {}


def is_stored(path_or_name: str | Path) -> bool:
    """Return whether `load` should open this model, rather than timm.

    True for every existing file and every name that looks like a file; `load` then reports what is wrong with it. A Hub
    name is looked up, because timm's own models are on the Hub too.

    Raises:
        StoreError: if the Hub cannot be reached.
    """
    if on_hub(path_or_name):
        return "vitrim" in (header(str(path_or_name), FILE) or {})
    path = Path(path_or_name)
    return path.suffix == ".safetensors" or is_file(path) or is_file(path / FILE)


def hub_file(name: str) -> Path | None:
    """Download the weights of a repository on the Hub, or find them in the cache.

    Args:
        name: ``hf-hub:owner/name[@revision]``.

    Returns:
        The local file, or None if the repository contains no model that vitrim stored.

    Raises:
        StoreError: if there is no such repository, or the Hub cannot be reached.
    """
    return fetch(name, FILE) if "vitrim" in (header(name, FILE) or {}) else None


def _contents(model: nn.Module) -> tuple[Spec, dict[str, Tensor]]:
    """Return spec and weights of `model`; raise an error if it has parts that neither describes."""
    try:
        blocks_of(model)
        spec = describe(model)
    except AdoptError as problem:
        raise StoreError(f"this model cannot be stored: {problem}") from None
    _check_owners(model)
    check_weights(model)
    state = _state(model)
    with without_data():
        empty = build(spec)
    misfit = _misfit(empty, state)
    if misfit is not None:
        raise StoreError(f"a stored model must have the weights of its spec, but {misfit}; put timm's own back")
    differ = _difference(dump(spec), dump(describe(empty)), "spec")
    if differ is not None:
        raise StoreError(f"a stored model must be all in its spec, but {differ} is not; put timm's own part back")
    return spec, state


def _check_owners(model: nn.Module) -> None:
    """Raise an error for tensors without data, and for one parameter under two names: the file would contain two."""
    first: dict[int, str] = {}
    missing = why_not_held(model)
    if missing is not None:
        raise StoreError(missing)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        twin = first.setdefault(id(parameter), name)
        if twin != name:
            raise StoreError(f"{name}: weights must be a parameter's own, but are those of {twin}; clone them first")


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Return weights and buffers on the CPU; views of one storage are copied, because a file stores each separately."""
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    seen: set[int] = set()
    for name, value in state.items():
        storage = value.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != value.nbytes:
            state[name] = value.clone()
        seen.add(storage.data_ptr())
    return state


def _misfit(model: nn.Module, state: Mapping[str, Tensor]) -> str | None:
    """Return a clause on how the names and shapes of `state` differ from those of `model`, or None."""
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in state.items()}
    for text, names in (("lacks", wanted.keys() - found.keys()), ("has besides", found.keys() - wanted.keys())):
        if names:
            return f"it {text} {_some(sorted(names))}"
    wrong = [f"{name} is {found[name]}, not {shape}" for name, shape in wanted.items() if found[name] != shape]
    return _some(wrong) if wrong else None


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _difference(a: Any, b: Any, at: str) -> str | None:
    """Return the first place where two trees of plain values differ, or None."""
    if isinstance(a, dict) and isinstance(b, dict):
        pairs = [(f"{at}.{key}", a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys())]
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        pairs = [(f"{at}.{i}", x, y) for i, (x, y) in enumerate(zip(a, b, strict=True))]
    else:
        return None if a == b else f"{at} = {a!r}"
    return next((found for name, x, y in pairs if (found := _difference(x, y, name)) is not None), None)


def _written(spec: Spec, given: Mapping[str, Any] | None) -> str:
    origin = {
        "vitrim": __version__,
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "given": dict(given or {}),
    }
    try:
        return json.dumps({"format": FORMAT, "spec": dump(spec), "provenance": origin}, allow_nan=False)
    except (TypeError, ValueError) as problem:
        raise StoreError(f"provenance must be plain values, but {reason(problem)}; pass text and numbers") from None


def _prove(model: nn.Module, stored: nn.Module, image: tuple[int, int]) -> None:
    """Raise an error if a stored model does not compute the same outputs as the model in memory."""
    try:
        found = find_difference(stored.to(home_of(model)[0]), model, image, "store")
    except RuntimeError as problem:  # such as layers of different types, which do not take each other's outputs
        raise StoreError(
            f"a model must run to be stored, but says: {reason(problem)}; convert it to one floating-point type"
        ) from None
    if found is not None and math.isnan(found.apart):
        raise StoreError(
            f"a stored model must give finite {found.what}, but gives none for random images; its weights are too large"
        )
    if found is not None:
        raise StoreError(
            f"a stored model must give the {found.what} of the model in memory, but they differ by {found.apart:.1e}; "
            "remove hooks and changed modules that its spec does not know"
        )


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise StoreError(f"{path}: the stored model must exist, but it does not") from None
    except (OSError, SafetensorError) as problem:
        if isinstance(problem, StoreError):
            raise
        raise StoreError(
            f"{path}: the file must be whole safetensors, but {reason(problem)}; copy or download it again"
        ) from None


def _find(path_or_name: str | Path) -> Path:
    if on_hub(path_or_name):
        return hub_file(str(path_or_name)) or _refuse_of_others(path_or_name)
    path = Path(path_or_name)
    return path / FILE if not is_file(path) and is_file(path / FILE) else path


def _refuse_of_others(name: str | Path) -> NoReturn:
    raise StoreError(
        f"{name}: the repository must hold a model that vitrim stored, but it does not; "
        "build a timm model with timm.create_model and adopt it"
    )


def _sheet(path_or_name: str | Path) -> dict[str, Any]:
    text: str | None
    if on_hub(path_or_name):
        text = (header(str(path_or_name), FILE) or {}).get("vitrim") or _refuse_of_others(path_or_name)
    else:
        path_or_name = _find(path_or_name)
        with _opened(path_or_name) as file:
            text = (file.metadata() or {}).get("vitrim")
    if text is None:
        raise StoreError(
            f"{path_or_name}: the file must hold a model that vitrim stored, but holds weights alone; "
            "name the timm model and pass this file as --weights, or open its folder if transformers saved it"
        )
    sheet = parse_json(text, StoreError, str(path_or_name))
    check_format(sheet.get("format") if isinstance(sheet, dict) else None, str(path_or_name), StoreError)
    return dict(sheet)


def _spec(path_or_name: str | Path) -> Spec:
    return parse_spec(_sheet(path_or_name).get("spec"), StoreError, f"{path_or_name}: spec")


def _read(path: Path) -> nn.Module:
    spec = _spec(path)
    with without_data():
        model = build(spec)
    state: dict[str, Tensor] = {}
    with _opened(path) as file:
        for name in file.keys():
            # Cloned, because otherwise the tensors would map the file and start at addresses where a CPU rounds
            # differently.
            state[name] = file.get_tensor(name).clone()
    misfit = _misfit(model, state)
    if misfit is not None:
        raise WeightsError(f"{path}: the weights must fit the spec, but {misfit}; the file was changed by hand")
    wrong = why_not_like(state, model.state_dict())
    if wrong is not None:
        raise WeightsError(f"{path}: {wrong}")
    missing = [buffer for name, buffer in model.named_buffers() if name not in state]
    computed = sum(buffer.nbytes for buffer in missing)
    if computed > MOST_COMPUTED:
        raise StoreError(
            f"{path}: what a model computes from its sizes must take at most {MOST_COMPUTED:,} bytes, but takes "
            f"{computed:,}; the file was changed by hand"
        )
    if missing:
        model = build(spec)  # some buffers are computed, not stored, so the model must be built with data
    model.load_state_dict(state, assign=True)
    kinds = {parameter.dtype for parameter in model.parameters()}
    if len(kinds) == 1:
        model.to(kinds.pop())  # buffers that are computed, such as angles, have the type of the weights
    return model.eval()
