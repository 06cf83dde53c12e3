"""The segmentor family: a segmentation head on a backbone of any other family. The blocks are those of the backbone.

It is not in `families.names()`, because no timm model is a segmentor, and its outputs are not those of a classifier.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitrim import families
from vitrim.families._channels import Channels, channels_of
from vitrim.families._parts import count, pretrained
from vitrim.nn import Block
from vitrim.nn.copying import copied
from vitrim.nn.modes import without_data
from vitrim.nn.segment import HEADS, LEVELS, Head, Places, Segmentor, check_covered
from vitrim.words.errors import AdoptError, DataError, RecipeError, SpecError
from vitrim.words.plain import Frozen, FrozenDict, Node, dump, reason
from vitrim.words.spec import Host, Spec

__all__ = ["ARGUMENTS", "HOSTS", "blocks_by_stage", "build", "channels", "describe", "host", "segmentor"]

HOSTS = (Segmentor,)


class _Built(Node):
    """What a backbone's host is built from; its costs are part of the segmentor's."""

    name: str
    arguments: Frozen
    pretrained: Frozen = FrozenDict()


class ARGUMENTS(Node):
    """The backbone's family and host, and the settings of the head, as `vitrim.families.Family.ARGUMENTS`."""

    family: str
    host: _Built
    head: Head


def segmentor(
    model: nn.Module, classes: int, head: Head | None = None, *, size: tuple[int, int] | None = None
) -> Segmentor:
    """Return a copy of a model with a segmentation head that has random weights.

    Args:
        model: a model of a supported family, dense or compressed; it is not changed.
        classes: K.
        head: settings of the head; None uses the defaults. Its weights get the backbone's
            floating-point type.
        size: height and width of the images in pixels; None uses the model's own.

    Raises:
        AdoptError: the model cannot be adopted, or drops or moves patches; or a package is missing.
        RecipeError: the model cannot take images of that size, or the taps are not blocks of the model.
    """
    form = head or Head()
    if isinstance(model, Segmentor):
        raise AdoptError("a backbone must be a classifier, but is a segmentor already; give the model it was made from")
    backbone: Any = families.adopt(model)
    spec = families.describe(backbone)
    if any(block.only_prefix for _, _, block in spec.blocks()):
        raise AdoptError(
            "a backbone must keep its patches to the end, but in this model the last block keeps only the prefix "
            "tokens; compress without only_prefix"
        )
    if size is not None and size != spec.image:
        _resize_(backbone, size)
    check_covered(backbone, size or spec.image)
    backbone.reset_classifier(0, "")
    # Each map has its own norm in the head. These norms would get no gradients and would be stored for nothing.
    for name in ("norm", "fc_norm"):
        if hasattr(backbone, name):
            setattr(backbone, name, nn.Identity())
    made = Segmentor(backbone, classes, form, _places(families.describe(backbone), form))
    made.head.to(next(backbone.parameters()))
    return made


def _resize_(backbone: Any, size: tuple[int, int]) -> None:
    try:
        backbone.set_input_size(img_size=size)
        families.describe(backbone)
    except (AssertionError, RuntimeError, TypeError, ValueError, AttributeError) as problem:
        if isinstance(problem, DataError):
            raise
        raise RecipeError(
            f"size: {type(backbone).__name__} must take images of {size}, but {reason(problem)}"
        ) from None


def _places(spec: Spec, head: Head) -> Places:
    """Return the blocks or stages from which the head takes its maps.

    Raises:
        AdoptError: a map would lack patches, or the family has neither one stage nor four.
        RecipeError: the taps are not blocks of the model.
    """
    if len(spec.stages) == LEVELS:
        if head.taps:
            raise RecipeError(f"head.taps must be empty for a backbone of stages, but is {list(head.taps)}")
        widths = tuple(stage.width for stage in spec.stages)
        return Places(tuple(range(LEVELS)), widths, tuple((level, level) for level in range(LEVELS)), 1)
    if len(spec.stages) != 1:
        raise AdoptError(f"a backbone must have one stage or {LEVELS}, but this one has {len(spec.stages)}")
    stage = spec.stages[0]
    depth = len(stage.blocks)
    taps = head.taps or tuple(-(-depth * place // LEVELS) - 1 for place in range(1, LEVELS + 1))
    if len(taps) != LEVELS or sorted(taps) != list(taps) or taps[-1] != depth - 1:
        raise RecipeError(
            f"head.taps must be {LEVELS} blocks in order, the last of them block {depth - 1}, but is {list(taps)}"
        )
    leaving = [stage.flows()[tap].leaves for tap in taps]
    for tap, tokens in zip(taps, leaving, strict=True):
        if tokens.grid is None:
            raise AdoptError(
                f"stages.0.blocks.{tap}: a segmentation head must have every patch in its position, but tokens were "
                "dropped or merged by likeness before; merge neighbors (method cait), or cut only channels"
            )
    return Places(taps, (stage.width,) * LEVELS, tuple(tokens.halved for tokens in leaving), 4)


def blocks_by_stage(model: Any) -> list[list[nn.Module]]:
    """Return the blocks of each stage of the backbone in order."""
    return families.family_of(model.backbone).blocks_by_stage(model.backbone)


def describe(model: Any) -> Spec:
    """Return the spec of a segmentor: that of the backbone, with the segmentation head in `Spec.host`.

    Raises:
        AdoptError: as for the backbone.
    """
    inner = families.describe(model.backbone)
    grid, built = inner.stages[0].grid, dump(inner.host)
    macs, params = _head_cost(model.form, model.places, model.num_classes, grid)
    slopes = []
    for index, one in enumerate(inner.host.channels):
        places = _grown(model.places, index, len(inner.stages))
        more_macs, more_params = _head_cost(model.form, places, model.num_classes, grid)
        update = {"macs": one.macs + more_macs - macs, "params": one.params + more_params - params}
        slopes.append(one.model_copy(update=update))
    known = Host(
        name=inner.host.name,
        arguments={
            "family": inner.family,
            "host": {name: built[name] for name in ("name", "arguments", "pretrained")},
            "head": dump(model.form),
        },
        macs=inner.host.macs + macs,
        macs_per_token=inner.host.macs_per_token,
        params=inner.host.params + params,
        pretrained=pretrained(model),
        channels=tuple(slopes),
    )
    return inner.model_copy(update={"family": "segmentor", "host": known, "classes": model.num_classes})


def _grown(places: Places, stage: int, stages: int) -> Places:
    """Return the places of a backbone whose stage has one channel more."""
    widths = tuple(
        width + (stages == 1 or level == stage) for level, width in zip(range(LEVELS), places.widths, strict=True)
    )
    return places._replace(widths=widths)


@functools.cache
def _head_cost(form: Head, places: Places, classes: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Return the multiply-accumulates and parameters of a head, counted by PyTorch on the meta device."""
    with without_data():
        head: Any = HEADS[form.kind](form, places, classes).eval()
    maps = []
    for width, halved in zip(places.widths, places.halved, strict=True):
        rows, columns = (-(-n // 2**often) for n, often in zip(grid, halved, strict=True))
        maps.append(torch.zeros(1, width, rows, columns, device="meta"))

    def run(_: Tensor) -> Tensor:
        logits: Tensor = head(maps, grid)
        return logits

    return count(run, maps[0]), sum(p.numel() for p in head.parameters())


_DECODER = ("p2.skip_conv", "p3.skip_conv", "p4.skip_conv", "p5")
"""Layers of the pyramid that read the maps, the finest first."""


def channels(model: Any) -> tuple[Channels, ...]:
    """Return where the channels of the backbone's stages lie outside the blocks: in its own layers and in the head."""
    inner = channels_of(families.family_of(model.backbone), model.backbone)
    found = []
    for stage, one in enumerate(inner):
        levels = [level for level in range(LEVELS) if len(inner) == 1 or level == stage]
        if model.form.kind == "fpn":
            norms = tuple(f"head.norms.{level}" for level in levels)
            readers = tuple(f"head.decoder.{_DECODER[level]}" for level in levels)
        else:
            norms, readers = (("head.norm",), ("head.classifier",)) if levels[-1] == LEVELS - 1 else ((), ())
        own = Channels(width=one.width, norms=norms, readers=readers)
        found.append(one.within("backbone").joined(own))
    return tuple(found)


def host(model: Any, blocks: Sequence[Block]) -> nn.Module:
    """Return a copy of `model` whose backbone has other blocks.

    Raises:
        AdoptError: a map would lack patches.
    """
    backbone = families.host(model.backbone, blocks)
    shell: Segmentor = copied(model, {id(model.backbone): backbone})
    places = _places(_inner(families.describe(backbone)), shell.form)
    shell.places = places
    shell.head.places = places  # type: ignore[assignment]
    return shell


def build(spec: Spec) -> nn.Module:
    """Return a segmentor for `spec` with placeholders for the blocks of the backbone.

    Raises:
        SpecError: the installed timm cannot build the backbone.
        AdoptError: a package is missing.
    """
    inner = _inner(spec)
    if inner.family in families.AROUND:
        raise SpecError(f"host.arguments.family: a backbone must be a classifier, but got '{inner.family}'")
    families.check_host(inner)
    head = Head(**spec.host.arguments["head"])
    return Segmentor(families.get(inner.family).build(inner), spec.classes, head, _places(inner, head))


def _inner(spec: Spec) -> Spec:
    """Return the spec of the backbone; of a segmentor's spec without the costs of its host."""
    if spec.family != "segmentor":
        return spec
    known = spec.host.arguments
    host = Host(**known["host"], macs=0, params=0)
    return spec.model_copy(update={"family": known["family"], "host": host, "classes": 0})
