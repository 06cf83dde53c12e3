"""Open the model that a recipe names: a timm name with weights, a Hub name, a stored file or one of transformers."""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from vitrim import families
from vitrim.deploy import store
from vitrim.deploy.checkpoint import read_checkpoint
from vitrim.deploy.choose import read_weights
from vitrim.deploy.fit import fill_, fit, load_weights_
from vitrim.deploy.hub import ARCHITECTURE
from vitrim.deploy.transformers import open_transformers, transformers_config
from vitrim.families import adopt
from vitrim.families._parts import pretrained
from vitrim.families._refused import Refused, is_listed, near_name, refusal_of
from vitrim.nn.modes import without_data
from vitrim.words.costs import cost_of
from vitrim.words.errors import AdoptError, RecipeError, WeightsError
from vitrim.words.parsing import shown
from vitrim.words.plain import did_you_mean, is_file, reason
from vitrim.words.progress import progress

__all__ = [
    "has_weights",
    "known_models",
    "load_weights_",
    "open_parent",
    "open_teacher",
    "read_weights",
    "refusal_by_file",
    "unfilled",
    "why_not_cut",
]

Say = Callable[[str], None]

_LONGEST_NAME = 4096
"""Characters of a path on Linux."""


def open_parent(
    name: str,
    *,
    weights: str | None = None,
    weights_key: str | None = None,
    random_weights: bool = False,
    arguments: dict[str, Any] | None = None,
    seed: int = 0,
    say: Say = lambda _: None,
) -> nn.Module:
    """Open and adopt a model, in evaluation mode on the CPU.

    Args:
        name: a timm name, an ``hf-hub:`` name, the path of a file that vitrim stored, or a folder of Hugging Face
            transformers.
        weights: a weights file for a timm name (safetensors, or a PyTorch file read without running code).
        weights_key: the state dict to use if a file contains several, as a part of the names in it: ``model_ema``.
        random_weights: whether to use random weights for a timm model.
        arguments: further keyword arguments of ``timm.create_model``; those not given are inferred from the shapes of
            the weights where possible.
        seed: seed of random weights, so that a resumed run gets the same ones.
        say: called with a line on each thing that was chosen, inferred, resampled or left out of a weights file.

    Raises:
        RecipeError: if the name is unknown, or weights are given twice.
        WeightsError: if the weights are unreadable, not finite, or do not fit.
        AdoptError: if the model has a part that a spec cannot represent.
    """
    if timm.is_model(name) and not store.is_stored(name) and not random_weights:
        _check_family(name, dict(arguments or {}))
    opened = open_teacher(
        name,
        weights=weights,
        weights_key=weights_key,
        random_weights=random_weights,
        arguments=arguments,
        seed=seed,
        say=say,
    )
    if families.is_adopted(opened):
        return opened
    with torch.random.fork_rng(devices=[]):
        return adopt(opened).eval()


def open_teacher(
    name: str,
    *,
    weights: str | None = None,
    weights_key: str | None = None,
    random_weights: bool = False,
    arguments: dict[str, Any] | None = None,
    seed: int = 0,
    say: Say = lambda _: None,
) -> nn.Module:
    """Open any model, in evaluation mode on the CPU, whether or not it could be adopted; see `open_parent`.

    Raises:
        RecipeError: if the name is unknown, or weights are given twice.
        WeightsError: if the weights are unreadable, not finite, or do not fit.
    """
    if weights and random_weights:
        raise RecipeError("weights must come from one place, but both a file and random weights are asked for")
    if weights_key and not weights:
        raise RecipeError(f"a weights key must be of a weights file, but '{weights_key}' is given without one")
    if len(name) > _LONGEST_NAME:
        raise RecipeError(f"a model's name must have at most {_LONGEST_NAME:,} characters, but has {len(name):,}")
    _check_not_weights(name)
    config = transformers_config(name)
    if config is not None:
        if weights or random_weights:
            what = "a weights file" if weights else "random weights"
            raise RecipeError(
                f"{name}: a model of transformers must be taken with its own weights, but {what} is asked for too; "
                "leave that out"
            )
        with torch.random.fork_rng(devices=[]):
            return open_transformers(name, config, arguments=arguments or {}, say=say)
    if store.is_stored(name):
        if weights or random_weights or arguments:
            raise RecipeError(f"{name}: a stored model must be taken as it is, but weights or arguments are given too")
        return store.load(name).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if weights is None:
            _check_name(name)
            model = _create(name, pretrained=not random_weights, **(arguments or {})).eval()
            if not random_weights:
                _tell_changes(model, name, arguments or {}, say)
            return model
        return _filled(name, Path(weights), weights_key, dict(arguments or {}), say).eval()


def has_weights(name: str) -> bool:
    """Return whether a name brings its own weights: that of a stored file, or of a model of transformers.

    Raises:
        RecipeError: if a ``config.json`` is not JSON.
        StoreError: if the Hub cannot be reached.
    """
    return transformers_config(name) is not None or store.is_stored(name)


def _check_name(name: str) -> None:
    """Raise an error if no model has this name.

    Raises:
        RecipeError: naming the most similar name.
    """
    if name.startswith("("):
        raise RecipeError(
            f"a model must be named, but {name} was passed as an instance by another program; call compress there"
        )
    if not name.startswith(("hf-hub:", "hf_hub:")) and not timm.is_model(name):
        if name.endswith(".safetensors") or "/" in name:
            raise RecipeError(
                f"{shown(name)}: a model must be a timm name or a file that vitrim stored, or a folder of "
                "transformers, but this is neither; for a model on the Hub give hf-hub:OWNER/NAME"
            )
        raise RecipeError(f"a model must be a name that timm knows, but got {shown(name)}{_near(name)}")


def _check_family(name: str, arguments: dict[str, Any]) -> None:
    """Refuse a name of timm's that cannot be cut, before its weights are downloaded or read.

    Raises:
        AdoptError: naming what it is, why not, and the name of a model that is near.
    """
    wrong = why_not_cut(name, arguments)
    if wrong is not None:
        raise AdoptError(f"{name}: {wrong}")


def why_not_cut(name: str, arguments: dict[str, Any] | None = None) -> str | None:
    """Return why a name of timm's cannot be cut, and the name of one that is near and can be; None if it can.

    Args:
        name: a name that timm knows.
        arguments: further keyword arguments of ``timm.create_model``.
    """
    refused, near = refusal_by_file(name), tuple[str, ...]()
    if refused is not None:
        said = f"a model must be of a family that can be cut, but this is {refused.what}, and {refused.why}"
        near = refused.near
    else:
        try:
            families.describe(unfilled(name, **(arguments or {})))
        except AdoptError as problem:
            said, near = str(problem), (name.split("_")[0],)
        except (TypeError, ValueError, RuntimeError, AssertionError):
            return None  # a problem with the arguments is reported when the model is built with data
        else:
            return None
    other = near_name(name, near, lambda one: refusal_by_file(one) is None, _can)
    return said if other is None else f"{said}; near is {other}"


def refusal_by_file(name: str) -> Refused | None:
    """Return why no family hosts the class of a timm name, as far as its file tells; None if the model has to be built.

    This saves building a thousand models.
    """
    home = timm.model_entrypoint(name).__module__
    hosts = tuple(host for family in families.names() for host in families.get(family).HOSTS)
    known = [kind for kind in vars(sys.modules[home]).values() if inspect.isclass(kind) and issubclass(kind, hosts)]
    # A file may also use a class that it imports, as that of hybrids does.
    if any(kind.__module__ == home for kind in known) or (known and not is_listed(home)):
        return None
    return refusal_of(home)


@functools.cache
def _can(name: str) -> bool:
    """Return whether a name of timm's can be cut."""
    if refusal_by_file(name) is not None:
        return False
    try:
        families.describe(unfilled(name))
    except AdoptError:
        return False
    return True


def _check_not_weights(name: str) -> None:
    """Raise an error if a file of PyTorch weights is given as a model's name.

    Raises:
        RecipeError: naming the option that takes the file.
    """
    if not is_file(name):
        return
    with Path(name).open("rb") as file:
        head = file.read(9)
    # safetensors begin with the length of their header, 8 bytes of any value, and "{".
    if head[8:] != b"{" and head.startswith((b"PK\x03\x04", b"\x80")):
        raise RecipeError(
            f"{name}: a model must be a timm name or a file that vitrim stored, but this is a weights file; name the "
            f"timm model, and give --weights {name}"
        )


def _tell_changes(model: nn.Module, name: str, given: dict[str, Any], say: Say) -> None:
    """Log what timm does to published weights for a model of other classes or another image size."""
    known = pretrained(model)
    if given.get("num_classes") and given["num_classes"] != known.get("num_classes"):
        say(
            f"{name}: the classifier of {given['num_classes']} classes is new and random, the published one has "
            f"{known.get('num_classes')}"
        )
    size, published = given.get("img_size"), list(known.get("input_size", ())[1:])
    sides = published if size is None else [size, size] if isinstance(size, int) else list(size)
    if sides != published:
        say(f"{name}: positions are resampled to images of {sides[0]} x {sides[1]} pixels, as timm does")


def _filled(name: str, path: Path, key: str | None, given: dict[str, Any], say: Say) -> nn.Module:
    """Build a model with the weights of a file, from the given settings and those inferred from the weights."""
    _check_name(name)
    held = read_checkpoint(path)
    found = fit(held, name, _frame(name, given), given, source=str(path), key=key)
    model = _create(name, pretrained=False, **found.arguments)
    remarks = fill_(model, found)
    for remark in (*found.remarks, *remarks):
        say(f"{path.name}: {remark}")
    return model


def _frame(name: str, arguments: dict[str, Any]) -> nn.Module:
    """Build the model of these arguments, without data if timm can build it so."""
    try:
        with without_data():
            model: nn.Module = timm.create_model(name, **arguments)
    except Exception:  # a problem with the arguments or the device is reported when the model is built with data
        return _create(name, pretrained=False, **arguments)
    return model


def _create(name: str, /, **arguments: Any) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(name, **arguments)
    except TypeError as problem:
        raise RecipeError(f"model.arguments: {name} must take each of them, but {problem}") from None
    except Exception as problem:  # timm's asserts, and many types from the Hub's client
        said = reason(problem)
        if arguments.get("pretrained"):
            raise WeightsError(
                f"{name}: pretrained weights must be found, but {said}; give --weights FILE or --random-weights"
            ) from None
        raise RecipeError(f"{name}: timm must build this model, but {said}") from None
    return model


def _near(name: str) -> str:
    near = did_you_mean(name, timm.list_models())
    return near if near.startswith("; did you mean") else "; `vitrim models` lists those that vitrim can cut"


def known_models(pattern: str = "*") -> Iterator[dict[str, Any]]:
    """Yield every timm name that matches `pattern`, built without weights; for ``*`` only those of a known family.

    Yields:
        ``name``, ``family`` (empty if no family hosts its class), ``macs``, ``params`` and ``reason``, which is None if
        the model can be cut, else why not, with a name that is near.

    Raises:
        RecipeError: if no name matches.
    """
    known = timm.list_models(pattern, exclude_filters=ARCHITECTURE)
    names = [name for name in known if pattern != "*" or refusal_by_file(name) is None]
    if not names:
        raise RecipeError(f"a pattern must fit a name that timm knows, but got '{pattern}'{_near(pattern)}")
    with progress("models", len(names)) as advance:
        for name in names:
            advance(1)
            yield {"name": name, **_verdict(name)}


def _verdict(name: str) -> dict[str, Any]:
    if refusal_by_file(name) is not None:
        return {"family": "", "macs": 0, "params": 0, "reason": why_not_cut(name)}
    model = unfilled(name)
    family = families.name_of(model) or ""
    try:
        cost = cost_of(families.describe(model))
    except AdoptError:
        return {"family": family, "macs": 0, "params": 0, "reason": why_not_cut(name)}
    return {"family": family, "macs": cost.macs, "params": cost.params, "reason": None}


def unfilled(name: str, **arguments: Any) -> nn.Module:
    """Build a timm model without data, or with data if this version of timm cannot build it without."""
    try:
        with without_data():
            model: nn.Module = timm.create_model(name, **arguments)
    except (NotImplementedError, RuntimeError):
        model = timm.create_model(name, **arguments)
    return model
