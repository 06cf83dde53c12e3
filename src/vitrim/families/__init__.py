"""Families of models: one file each, found because the file exists, or a module that an installed package declares.

A family describes a model as a spec, hosts our blocks in it, and builds an empty one from a spec. Everything else asks
here and does not know how many families there are. Families of other authors are entry points of the group
``vitrim.families``; they are imported with this package, so that what they register with timm is known.
"""

import contextlib
import functools
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import vitrim.families._plain as plain
from vitrim.nn import Block, make_block, settled
from vitrim.nn.layers import input_channels
from vitrim.words.entries import entries
from vitrim.words.errors import AdoptError, SpecError, WeightsError
from vitrim.words.plain import did_you_mean
from vitrim.words.spec import Spec

__all__ = [
    "AROUND",
    "Family",
    "adopt",
    "blocks_of",
    "build",
    "convert",
    "describe",
    "family_of",
    "get",
    "host",
    "name_of",
    "names",
    "plain",
    "why_not_a_family",
]


AROUND = {"segmentor": "_segmentor"}
"""Families around a backbone of another, and their files: a spec may name them, but no model of timm's is one."""


GROUP = "vitrim.families"
"""Group of entry points."""


class Family(Protocol):
    """What a family file offers, as functions of the module."""

    TEST_PRESETS: dict[str, dict[str, object]]
    """Small models for the laws: a name and the keyword arguments of `example`."""

    HOSTS: tuple[type[nn.Module], ...]
    """Classes that it takes in, with their subclasses, save those that another family names more closely."""

    def example(self, **arguments: object) -> nn.Module:
        """A small model with random weights."""
        ...

    def describe(self, model: nn.Module) -> Spec:
        """The spec of a living model, timm's or ours."""
        ...

    def foreign_blocks(self, model: nn.Module) -> list[nn.Module]:
        """Every block in order, whoever made it."""
        ...

    def host(self, model: nn.Module, blocks: Sequence[Block]) -> nn.Module:
        """A copy of `model` with other blocks; the two share no parameter."""
        ...

    def build(self, spec: Spec) -> nn.Module:
        """An empty host for `spec`, without blocks' weights."""
        ...


OFFERS = ("TEST_PRESETS", "HOSTS", "example", "describe", "foreign_blocks", "host", "build")
"""What a module must have to be a `Family`."""


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
    """Return why `value` is no family, as a sentence; None if it is one."""
    if not isinstance(value, ModuleType):
        return f"a family must be a module, but is {type(value).__name__}; name the module alone"
    lacking = [name for name in OFFERS if not hasattr(value, name)]
    if lacking:
        return f"a family must offer {', '.join(OFFERS)}, but has no {' and no '.join(lacking)}; add it"
    return None


@functools.cache
def _own() -> tuple[str, ...]:
    return tuple(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def family_of(model: nn.Module) -> Family:
    """The family that handles `model`.

    Raises:
        AdoptError: if none does.
    """
    name = name_of(model)
    if name is None:
        raise AdoptError(
            f"a model must be of a family that vitrim knows ({', '.join(names())}), but got {type(model).__name__}; "
            "see `vitrim models`"
        )
    return get(name)


def name_of(model: nn.Module) -> str | None:
    """The name of the family whose host is nearest to the class of `model`; None if there is none.

    The nearest, for one family may host a subclass of what another hosts.

    Raises:
        SpecError: if two families host the same class.
    """
    owners: dict[type[nn.Module], str] = {}
    for name in (*names(), *AROUND):
        for kind in get(name).HOSTS:
            if owners.setdefault(kind, name) != name:
                raise SpecError(
                    f"{kind.__name__}: a class must be hosted by one family, but {owners[kind]} and {name} both host "
                    "it; uninstall one of them, or host a subclass"
                )
    return next((owners[kind] for kind in type(model).__mro__ if kind in owners), None)


def convert(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names that `model` uses, where its family knows other names for them.

    A family that does offers ``convert(weights, model)``.
    """
    change = getattr(family_of(model), "convert", None)
    return dict(weights) if change is None else dict(change(dict(weights), model))


def describe(model: nn.Module) -> Spec:
    """The spec of a living model, timm's or ours; always read from the model itself, so it stays true.

    Raises:
        AdoptError: naming the path and the reason, if a part cannot be represented.
    """
    return family_of(model).describe(model)


def blocks_of(model: nn.Module) -> list[tuple[str, Block]]:
    """Our blocks of an adopted model with their paths.

    Raises:
        AdoptError: if the model was not adopted.
    """
    blocks = family_of(model).foreign_blocks(model)
    paths = [path for path, _, _ in describe(model).blocks()]
    ours = [(path, block) for path, block in zip(paths, blocks, strict=True) if isinstance(block, Block)]
    if len(ours) != len(blocks):
        raise AdoptError("a model must be adopted before it is cut, but its blocks are not ours; call vitrim.adopt")
    return ours


def adopt(model: nn.Module) -> nn.Module:
    """Take a timm model in: a copy whose blocks are ours, filled with its weights and proved to answer the same.

    The argument is left as it was and shares no parameter with the result. Adopting twice is adopting once.

    Args:
        model: a timm model of a known family, on any device and of any floating type.

    Returns:
        A model of the same class, with the same parameter names and the same logits.

    Raises:
        AdoptError: naming the path and the reason, if a part cannot be represented, or if the logits differ.
        WeightsError: naming the parameter, if a weight is not finite.
    """
    check_finite(model)
    spec, family = describe(model), family_of(model)
    blocks = []
    for (path, stage, node), arriving, old in zip(
        spec.blocks(), spec.arrivals(), family.foreign_blocks(model), strict=True
    ):
        with torch.device("meta"):
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
        blocks.append(settled(block))
    adopted = family.host(model, blocks)
    _prove(model, adopted, spec)
    return adopted


def check_finite(model: nn.Module) -> None:
    """Refuse weights that are not finite.

    Raises:
        WeightsError: naming the parameter.
    """
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise WeightsError(f"{name}: weights must be finite, but some are NaN or infinite; load a sound checkpoint")


@torch.no_grad()
def _prove(model: nn.Module, adopted: nn.Module, spec: Spec) -> None:
    """Compare logits on random input; relative 1e-5 in float32 and finer, eight roundings in shorter types."""
    first = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, input_channels(model), *spec.image, generator=generator).to(first.device, first.dtype)
    modes = [(module, module.training) for net in (model, adopted) for module in net.modules()]
    try:
        before, after = (net.eval()(x).double() for net in (model, adopted))
    finally:
        for module, mode in modes:
            module.training = mode
    scale = float(before.abs().max())
    apart = float((after - before).abs().max())
    allowed = max(1e-5, 8 * torch.finfo(first.dtype).eps if first.dtype.itemsize < 4 else 0.0) * max(scale, 1e-6)
    if not apart <= allowed:
        raise AdoptError(
            f"$: logits must stay within {allowed:.1e} of {type(model).__name__}'s, but differ by {apart:.1e}; "
            "please report this model"
        )


def host(model: nn.Module, blocks: Sequence[Block]) -> nn.Module:
    """A copy of `model` with other blocks; the two share no parameter."""
    return family_of(model).host(model, blocks)


def build(spec: Spec) -> nn.Module:
    """A model of structure `spec` with unset weights, to be filled by ``load_state_dict``."""
    family = get(spec.family)
    # timm before 1.0.21 computes with what it builds, which the meta device cannot
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        shell = family.build(spec)
    shell = shell.to(torch.get_default_device())
    blocks = [
        make_block(stage, block, arriving)
        for (_, stage, block), arriving in zip(spec.blocks(), spec.arrivals(), strict=True)
    ]
    return family.host(shell, blocks)


for _name in _own():
    get(_name)
# One that is missing something, or two of one name, are refused when a family is asked for: an import must not fail.
with contextlib.suppress(SpecError):
    for _name in names():
        with contextlib.suppress(SpecError):
            get(_name)
