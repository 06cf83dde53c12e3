"""Families of models: one file each in this package, or modules that installed packages declare.

A family describes a model as a spec, replaces the blocks of a model by vitrim's, and builds an empty model from a spec.
Other packages use only these functions and name no family. Families of other authors are
entry points of the group ``vitrim.families``. They are imported with this package, because they may register models
with timm.
"""

import contextlib
import functools
import importlib
import math
import pkgutil
import re
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import vitrim.families._plain as plain
from vitrim.families._channels import channels_of, narrow_
from vitrim.families._given import called, check_methods, check_tensors, check_types, unwrapped, with_own_head
from vitrim.nn import Block, computed, keep_settings, make_block
from vitrim.nn.modes import random_state_kept, without_data
from vitrim.nn.parity import find_difference
from vitrim.nn.weights import check_weights
from vitrim.words.entries import entries
from vitrim.words.errors import AdoptError, SpecError
from vitrim.words.parsing import shown
from vitrim.words.plain import Node, did_you_mean, load
from vitrim.words.spec import Spec

__all__ = [
    "AROUND",
    "Family",
    "adopt",
    "blocks_of",
    "build",
    "check_host",
    "convert",
    "describe",
    "family_of",
    "get",
    "host",
    "is_adopted",
    "name_of",
    "names",
    "plain",
    "why_not_a_family",
]


AROUND = {"segmentor": "_segmentor"}
"""Families built around a backbone of another family, with their files; specs may name them, timm models have none."""


GROUP = "vitrim.families"
"""Group of entry points."""


class Family(Protocol):
    """What the module of a family must define."""

    TEST_PRESETS: dict[str, dict[str, object]]
    """Small models for tests: the keyword arguments of `example`, by name."""

    HOSTS: tuple[type[nn.Module], ...]
    """Model classes of the family. A subclass belongs to the family that lists its nearest base class."""

    ARGUMENTS: type[Node]
    """The arguments of `vitrim.words.spec.Host` that `describe` writes, each with its type and bounds. A stored file
    with any other is refused before `build` sees it, because a constructor may take a path or a function."""

    def example(self, **arguments: object) -> nn.Module:
        """A small model with random weights."""
        ...

    def describe(self, model: nn.Module) -> Spec:
        """The spec of a timm model or of an adopted one."""
        ...

    def blocks_by_stage(self, model: nn.Module) -> list[list[nn.Module]]:
        """The blocks of each stage in order, timm's or vitrim's; stages as in the spec."""
        ...

    def host(self, model: nn.Module, blocks: Sequence[Block]) -> nn.Module:
        """A copy of `model` with other blocks; the two share no parameter."""
        ...

    def build(self, spec: Spec) -> nn.Module:
        """An empty host for `spec`, without blocks' weights."""
        ...


OFFERS = ("TEST_PRESETS", "HOSTS", "ARGUMENTS", "example", "describe", "blocks_by_stage", "host", "build")
"""The names that the module of a family must define."""


def names() -> list[str]:
    """Names of all families.

    Raises:
        SpecError: if two distributions give the same name.
    """
    return sorted([*_own(), *entries(GROUP, [*_own(), *AROUND], SpecError)])


def get(name: str) -> Family:
    """The family called `name`.

    Raises:
        SpecError: if there is none, or if that of another distribution cannot be imported or lacks something.
    """
    others = entries(GROUP, [*_own(), *AROUND], SpecError)
    if name in others:
        value: Any = others[name].load(SpecError)
        why = why_not_a_family(value)
        if why is not None:
            raise SpecError(f"{others[name].point.value} of {others[name].distribution}: {why}")
        return value  # type: ignore[no-any-return]
    known = [*names(), *AROUND]
    if name not in known:
        raise SpecError(f"a family must be one of {', '.join(known)}, but got '{name}'{did_you_mean(name, known)}")
    family: Family = importlib.import_module(f"{__name__}.{AROUND.get(name, name)}")
    return family


def why_not_a_family(value: Any) -> str | None:
    """Return why `value` is not a family, as a sentence; None if it is one."""
    if not isinstance(value, ModuleType):
        return f"a family must be a module, but is {type(value).__name__}; name the module alone"
    lacking = [name for name in OFFERS if not hasattr(value, name)]
    if lacking:
        return f"a family must offer {', '.join(OFFERS)}, but has no {' and no '.join(lacking)}; add it"
    if not (isinstance(value.ARGUMENTS, type) and issubclass(value.ARGUMENTS, Node)):
        return f"ARGUMENTS must be a subclass of vitrim.words.plain.Node, but is {shown(value.ARGUMENTS)}"
    return None


@functools.cache
def _own() -> tuple[str, ...]:
    return tuple(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def family_of(model: nn.Module) -> Family:
    """Return the family of `model`.

    Raises:
        AdoptError: if none does.
    """
    name = name_of(model)
    if name is None:
        raise AdoptError(
            f"a model must be of a family that vitrim knows ({', '.join(names())}), but got "
            f"{called(model, lambda inner: name_of(inner) is not None)}"
        )
    return get(name)


def name_of(model: nn.Module) -> str | None:
    """Return the name of the family of `model`, None if it has none: the one that lists its nearest base class.

    Raises:
        SpecError: if two families host the same class.
    """
    owners = _owners(tuple((name, get(name).HOSTS) for name in (*names(), *AROUND)))
    return next((owners[kind] for kind in type(model).__mro__ if kind in owners), None)


@functools.cache
def _owners(hosts: tuple[tuple[str, tuple[type[nn.Module], ...]], ...]) -> dict[type[nn.Module], str]:
    owners: dict[type[nn.Module], str] = {}
    for name, kinds in hosts:
        for kind in kinds:
            if owners.setdefault(kind, name) != name:
                raise SpecError(
                    f"{kind.__name__}: a class must be hosted by one family, but {owners[kind]} and {name} both host "
                    "it; uninstall one of them, or host a subclass"
                )
    return owners


def convert(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights as `model` names them, if its family defines ``convert(weights, model)``."""
    change = getattr(family_of(model), "convert", None)
    return dict(weights) if change is None else dict(change(dict(weights), model))


def describe(model: nn.Module) -> Spec:
    """Return the spec of a model, timm's or adopted; it is read from the modules on each call.

    Raises:
        AdoptError: naming the path and the reason, if a part cannot be represented.
    """
    _check_not_optimized(model)
    return family_of(model).describe(model)


def _check_not_optimized(model: nn.Module) -> None:
    if getattr(model, "is_optimized", False):
        raise AdoptError(
            "a model must be as it is stored to be described, cut or saved, but this is the form that it runs in "
            "(vitrim.deploy.optimized); use the model that it was made from"
        )


def is_adopted(model: nn.Module) -> bool:
    """Whether `model` is of a known family and all its blocks are vitrim's."""
    return name_of(model) is not None and all(
        isinstance(block, Block) for stage in family_of(model).blocks_by_stage(model) for block in stage
    )


def blocks_of(model: nn.Module) -> list[tuple[str, Block]]:
    """Return the blocks of an adopted model with their paths.

    Raises:
        AdoptError: if the model was not adopted.
    """
    _check_not_optimized(model)
    ours = []
    for stage, blocks in enumerate(family_of(model).blocks_by_stage(model)):
        for place, block in enumerate(blocks):
            if not isinstance(block, Block):
                raise AdoptError(
                    "a model must be adopted before it is cut, but its blocks are not vitrim's; call vitrim.adopt"
                )
            ours.append((f"stages.{stage}.blocks.{place}", block))
    return ours


def adopt(model: nn.Module) -> nn.Module:
    """Return a copy of a timm model with vitrim's blocks and the same weights, after checking that the outputs agree.

    The argument is left as it was and shares no parameter with the result. An adopted model may be adopted again.

    Args:
        model: a timm model of a known family, on any device and of any floating type; also inside `DataParallel`,
            `torch.compile` or `AveragedModel`, and with another linear classifier in place of its own.

    Returns:
        A model of the same class, with the same parameter names, the same logits and the same features.

    Raises:
        AdoptError: naming the path and the reason, if a part cannot be represented, or if logits or features differ.
        WeightsError: naming the tensor, if it is without data, of a type that is not computed in, or not finite.
    """
    model = unwrapped(model)
    check_types(model)
    model = with_own_head(model)
    check_weights(model)
    spec, family = describe(model), family_of(model)
    old_blocks = [block for stage in family.blocks_by_stage(model) for block in stage]
    check_methods(model, old_blocks)
    blocks = []
    for (path, stage, node), arriving, old in zip(spec.blocks(), spec.arrivals(), old_blocks, strict=True):
        with without_data():
            block = make_block(stage, node, arriving)
        state = {name: value.detach().clone() for name, value in old.state_dict().items()}
        mine = set(block.state_dict())
        if mine != set(state):
            odd = sorted(mine ^ set(state))
            raise AdoptError(f"{path}: parameters must be those of a plain block, but {', '.join(odd)} differ")
        block.load_state_dict(state, assign=True)
        frozen = {name for name, parameter in old.named_parameters() if not parameter.requires_grad}
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(name not in frozen)
        blocks.append(keep_settings(computed(block), old))
    adopted = family.host(model, blocks)
    check_tensors(adopted, lambda: build(spec))
    found = find_difference(adopted, model, spec.image, "adopt")
    if found is not None and math.isnan(found.apart):
        raise AdoptError(
            f"$: {found.what} must be finite to be compared, but are not for random images; its weights are too large "
            "or damaged, load a sound checkpoint"
        )
    if found is not None:
        raise AdoptError(
            f"$: {found.what} must stay within {found.allowed:.1e} of {type(model).__name__}'s, relative to the "
            f"largest, but differ by {found.apart:.1e}; remove your own hooks and methods, or please report this model"
        )
    return adopted


def host(model: nn.Module, blocks: Sequence[Block], kept: Sequence[Sequence[int] | None] | None = None) -> nn.Module:
    """Return a copy of `model` with other blocks; the two share no parameter.

    Args:
        model: an adopted model.
        blocks: of the width that is kept.
        kept: channels of the residual stream of each stage that are kept outside the blocks; None keeps all.
    """
    family = family_of(model)
    shell = family.host(model, blocks)
    if kept is None or all(one is None for one in kept):
        return shell
    narrow_(shell, channels_of(family, shell), kept)
    # A second time, for what a family reads off the widths.
    return family.host(shell, blocks)


def check_host(spec: Spec) -> None:
    """Refuse a host that its family does not write, because a spec may come from a stranger's file.

    Raises:
        SpecError: if the family is unknown, the name is not a plain timm name, or an argument is unknown, missing, or
            of another type than the family's ``ARGUMENTS`` have.
    """
    name, arguments = spec.host.name, dict(spec.host.arguments)
    if not _PLAIN_NAME.fullmatch(name):
        raise SpecError(f"host.name: must be a plain timm name, such as deit_small_patch16_224, but got {shown(name)}")
    known = load(get(spec.family).ARGUMENTS, arguments, SpecError, at="host.arguments")
    read = known.model_dump(exclude_unset=True)
    for key, value in arguments.items():
        if read[key] != value:  # pydantic reads "3" as 3; the constructor would get the text
            raise SpecError(f"host.arguments.{key}: must be written as {shown(read[key])}, but got {shown(value)}")


_PLAIN_NAME = re.compile(r"[\w.+-]{0,200}", re.ASCII)


def build(spec: Spec) -> nn.Module:
    """Return a model of structure `spec` with unset weights, to be filled by ``load_state_dict``.

    Raises:
        SpecError: if the host is not such as its family writes, or the installed timm cannot build it.
    """
    check_host(spec)
    family = get(spec.family)
    place = torch.get_default_device()
    with random_state_kept(place):
        # On the meta device no memory is taken, whatever sizes a file asks for. Elsewhere the host is built on the CPU,
        # so that buffers that it computes have the same bits everywhere.
        with without_data() if place.type == "meta" else torch.device("cpu"):
            shell = family.build(spec)
        with without_data() if place.type == "meta" else contextlib.nullcontext():
            blocks = [
                make_block(stage, block, arriving)
                for (_, stage, block), arriving in zip(spec.blocks(), spec.arrivals(), strict=True)
            ]
    # transformers 4 builds without data by a patch of PyTorch's modules, and not on the meta device
    empty = any(parameter.is_meta for parameter in shell.parameters())
    return family.host(shell if empty else shell.to(place), blocks)


for _name in _own():
    get(_name)
# A broken family, or two of one name, are refused when one is asked for: importing vitrim must not fail.
with contextlib.suppress(SpecError):
    for _name in names():
        with contextlib.suppress(SpecError):
            get(_name)
