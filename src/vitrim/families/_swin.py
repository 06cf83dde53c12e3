"""Common functions of the families of Swin Transformers: read the spec of a model, and build a model.

D width, R x C rows and columns of the grid of patches.

Only the blocks are replaced. Patch embedding, patch merging, final norm and head remain timm's own modules. The cost of
patch merging is counted with stem and head, because no cut changes the grid or D.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import timm
import torch
from pydantic import Field
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

from vitrim.families._channels import Channels, Counted, channel_costs, narrow_
from vitrim.families._parts import (
    Hole,
    bare,
    checked_stage,
    count,
    give_pretrained_,
    norm_maker,
    params_outside,
    pretrained,
    read_rates,
    remembered,
    same_norm,
)
from vitrim.nn import Block, WindowBlock
from vitrim.nn.copying import copied
from vitrim.nn.layers import input_channels
from vitrim.words.block import Rate
from vitrim.words.errors import AdoptError, SpecError
from vitrim.words.plain import Node
from vitrim.words.sizes import MOST_STAGES, Size
from vitrim.words.spec import Block as BlockSpec
from vitrim.words.spec import ChannelCost, Form, Host, Norm, Spec, Stage, Window

__all__ = ["Parts", "SwinArguments", "blocks_by_stage", "build", "channels", "convert", "describe", "host", "shift_of"]

_COMPUTED = ("relative_position_index", "relative_coords_table", "attn_mask")


class _Reference(Node):
    """The windows of each stage, and the grid, that timm scales in `set_input_size`."""

    windows: tuple[tuple[Size, Size], ...] = Field(max_length=MOST_STAGES)
    grid: tuple[Size, Size]


class SwinArguments(Node):
    """The arguments that `_arguments` returns, as `vitrim.families.Family.ARGUMENTS`."""

    patch_size: tuple[Size, Size]
    in_chans: Size = Field(le=1024)
    global_pool: Literal["", "avg", "avgmax", "catavgmax", "max", "fast", "fastavg", "fastmax", "fastavgmax"]
    strict_img_size: bool
    drop_rate: Rate
    norm_layer: Norm
    final_norm: bool
    reference: _Reference | None


_HEAD_SIZES = ("head.in_features", "head.num_features")


class Parts(NamedTuple):
    """What is read of one block; all but the first is the same for all blocks of a stage."""

    block: BlockSpec
    form: Form
    window: Window
    width: int


Read = Callable[[Any, str, tuple[int, int]], Parts]
"""Reads one of timm's blocks that runs on a grid; the path is for messages. Raises `AdoptError`."""


def blocks_by_stage(model: Any) -> list[list[nn.Module]]:
    """Return the blocks of each stage in order, timm's or vitrim's."""
    return [list(layer.blocks) for layer in model.layers]


def describe(model: Any, family: str, read: Read, outside: Sequence[Channels] = ()) -> Spec:
    """Return the spec of a model.

    Args:
        model: a Swin Transformer of timm's, of any version.
        family: name of its family.
        read: reads a block of timm's.
        outside: the result of the family's ``channels(model)``, if it has that; without it, no width can be cut.

    Raises:
        AdoptError: a part cannot be represented; the message has the path and the reason.
    """
    size = model.patch_embed.img_size
    image = (int(size[0]), int(size[1]))
    macs, slopes = _host_macs(model, image, outside)
    known = Host(
        name=str(pretrained(model).get("architecture", "")),
        arguments=_arguments(model),
        macs=macs,
        params=params_outside(model, [layer.blocks for layer in model.layers]),
        pretrained=pretrained(model),
        channels=slopes,
    )
    return Spec(family=family, host=known, image=image, classes=model.num_classes, stages=_stages(model, read))


def channels(model: Any) -> tuple[Channels, ...]:
    """Return where the channels of each stage's residual stream lie outside the blocks.

    Patch merging reads four runs of one stage's channels and writes those of the next, so every stage has a width of
    its own. Its norm is over what it reads in the first version, and over what it writes in the second.
    """
    late = isinstance(model, SwinTransformerV2)
    found, last = [], len(model.layers) - 1
    for index, layer in enumerate(model.layers):
        here = f"layers.{index}.downsample"
        following = f"layers.{index + 1}.downsample"
        width = model.patch_embed.proj.out_channels if index == 0 else layer.downsample.reduction.out_features
        one = Channels(
            width=width,
            writers=(f"{here}.reduction",) if index else ("patch_embed.proj",),
            readers=(f"{following}.reduction",) if index < last else ("head.fc",),
            norms=(("norm",) if index == last else () if late else (f"{following}.norm",)),
            stem_norms=("patch_embed.norm",) if not index else (f"{here}.norm",) if late else (),
            direct=_unnormed(model, index == last, late, following),
            sizes=(f"{here}.out_dim",) if index else ("embed_dim", "layers.0.dim"),
        )
        # A stage of timm's is made for the channels that come to it.
        more = (
            (f"{following}.dim", f"layers.{index + 1}.dim")
            if index < last
            else ("num_features", "head_hidden_size", *_HEAD_SIZES)
        )
        found.append(dataclasses.replace(one, sizes=(*one.sizes, *more)))
    return tuple(found)


def _unnormed(model: Any, is_last: bool, late: bool, following: str) -> tuple[str, ...]:
    """Return the layers that read the channels of a stage without a norm in between."""
    if is_last:
        return ("head.fc",) if isinstance(model.norm, nn.Identity) else ()
    return (f"{following}.reduction",) if late else ()


def host(model: Any, blocks: Sequence[Block]) -> nn.Module:
    """Return a copy of `model` with other blocks; hooks on the old blocks are not copied."""
    rest = iter(blocks)
    runs: dict[int, Any] = {}
    for layer in model.layers:
        mine = [next(rest) for _ in layer.blocks]
        run = nn.Sequential(*mine) if isinstance(layer.blocks, nn.Sequential) else nn.ModuleList(mine)
        run.training = layer.blocks.training
        runs[id(layer.blocks)] = run
    shell = copied(model, runs)
    return shell  # type: ignore[no-any-return]


def build(spec: Spec, kind: type[nn.Module], **more: Any) -> Any:
    """Return a model for `spec`, built by timm's own constructor with placeholders for the blocks.

    Args:
        spec: the spec.
        kind: timm's class.
        more: arguments of its constructor that the spec does not have.

    Raises:
        SpecError: the installed timm cannot build it.
    """
    known = dict(spec.host.arguments)
    final, reference = known.pop("final_norm"), known.pop("reference")
    try:
        model: Any = kind(**_keywords(spec, known), **more)
    except (KeyError, TypeError, ValueError, RuntimeError, AssertionError) as problem:
        raise SpecError(
            f"host: the installed timm {timm.__version__} must build {spec.host.name or kind.__name__}, "
            f"but fails: {type(problem).__name__}: {problem}"
        ) from None
    outside = channels(model)
    kept = [
        None if one.width == stage.width else range(stage.width)
        for one, stage in zip(outside, spec.stages, strict=True)
    ]
    narrow_(model, outside, kept)
    for layer, stage in zip(model.layers, spec.stages, strict=True):
        layer.blocks, layer.depth = type(layer.blocks)(), len(stage.blocks)
        layer.blocks.extend(Hole() for _ in stage.blocks)
    if not final:
        model.norm = nn.Identity()
    if reference is not None:
        model._ref_window_sizes = tuple(tuple(size) for size in reference["windows"])
        model._ref_grid_size = tuple(reference["grid"])
    give_pretrained_(model, spec.host.pretrained)
    return model


def convert(weights: dict[str, Tensor], _: Any) -> dict[str, Tensor]:
    """Return weights of the authors' release under timm's names, without buffers that the model computes itself.

    The authors merge patches after a stage, timm before it. So their stage 0 has a merging layer, and timm's has none.
    """
    weights = {name: value for name, value in weights.items() if not name.endswith(_COMPUTED)}
    if not any(name.startswith("layers.0.downsample.") for name in weights):
        return weights
    return {_renamed(name): value for name, value in weights.items()}


def _renamed(name: str) -> str:
    name = re.sub(r"^layers\.(\d+)\.downsample", lambda found: f"layers.{int(found[1]) + 1}.downsample", name)
    return re.sub(r"^head\.(weight|bias)$", r"head.fc.\1", name)


def _keywords(spec: Spec, known: dict[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments for timm's constructor, for a model without blocks."""
    (rows, columns), stages = known["patch_size"], len(spec.stages)
    return known | {
        "img_size": spec.image,
        "patch_size": rows if rows == columns else (rows, columns),
        "num_classes": spec.classes,
        # timm doubles the width from stage to stage; what a stage has less of is cut afterwards.
        "embed_dim": max(-(-stage.width // 2**index) for index, stage in enumerate(spec.stages)),
        "depths": (0,) * stages,
        "num_heads": (1,) * stages,
        "norm_layer": norm_maker(Norm(**known["norm_layer"])),
    }


def _stages(model: Any, read: Read) -> tuple[Stage, ...]:
    stages = []
    rows, columns = model.patch_embed.grid_size
    for index, layer in enumerate(model.layers):
        if not isinstance(layer.downsample, nn.Identity):
            rows, columns = (rows + 1) // 2, (columns + 1) // 2
        at = f"layers.{index}"
        parts = [
            _parts(block, f"{at}.blocks.{place}", (rows, columns), read) for place, block in enumerate(layer.blocks)
        ]
        if not parts:
            raise AdoptError(f"{at}.blocks: a stage must have at least one block, but it has none")
        for place, found in enumerate(parts):
            if found[1:] != parts[0][1:]:
                raise AdoptError(f"{at}.blocks.{place}: every block must be built like block 0, but this one differs")
        _, form, window, width = parts[0]
        blocks = tuple(part[0] for part in parts)
        stages.append(
            checked_stage(
                f"stages.{index}",
                width=width,
                grid=(rows, columns),
                prefix=0,
                form=form,
                blocks=blocks,
                window=window,
            )
        )
    return tuple(stages)


def _parts(block: Any, at: str, grid: tuple[int, int], read: Read) -> Parts:
    """Return spec, form, window and width of a block that runs on `grid`."""
    ours = isinstance(block, WindowBlock)
    believed = tuple(block.grid if ours else getattr(block, "input_resolution", grid))
    if believed != grid:
        # Older versions of timm round odd grids down, but patch merging pads them, so the masks have another grid.
        raise AdoptError(f"{at}: the block must be made for its grid {grid}, but is for {believed}; use a newer timm")
    if ours:
        spec = block.spec.model_copy(update={"rates": read_rates(block)})
        return Parts(spec, block.form, block.window, block.width)
    return read(block, at, grid)


def shift_of(block: Any, at: str, window: Window, grid: tuple[int, int]) -> bool:
    """Return whether a block of timm's shifts its windows.

    Raises:
        AdoptError: it shifts them by something else than half their size.
    """
    shifted = any(block.target_shift_size)
    shift = window.shift(grid) if shifted else (0, 0)
    if tuple(block.shift_size) != shift:
        raise AdoptError(f"{at}: windows must be shifted by half their size, {shift}, but are by {block.shift_size}")
    return shifted


def _arguments(model: Any) -> dict[str, Any]:
    """Return the keyword arguments with which timm builds this model again, read from its modules, as plain values.

    ``reference`` contains the windows, and their grid, that timm (from 1.0.31) scales in `set_input_size`.
    """
    embed, head = model.patch_embed, model.head
    norms = [("patch_embed.norm", embed.norm)]
    norms += [
        (f"layers.{index}.downsample.norm", layer.downsample.norm)
        for index, layer in enumerate(model.layers)
        if not isinstance(layer.downsample, nn.Identity)
    ]
    final = not isinstance(model.norm, nn.Identity)
    norms += [("norm", model.norm)] if final else []
    reference = None
    if hasattr(model, "_ref_window_sizes"):
        windows = [list(size) for size in model._ref_window_sizes]
        reference = {"windows": windows, "grid": list(model._ref_grid_size)}
    return {
        "patch_size": list(embed.patch_size),
        "in_chans": input_channels(model),
        "global_pool": head.global_pool.pool_type,
        "strict_img_size": bool(embed.strict_img_size),
        "drop_rate": head.drop.p,
        "norm_layer": same_norm(norms).model_dump(mode="json"),
        "final_norm": final,
        "reference": reference,
    }


def _host_macs(model: Any, image: tuple[int, int], outside: Sequence[Channels]) -> tuple[int, tuple[ChannelCost, ...]]:
    """Return macs of patch embedding, patch merging and head on one image, and what a channel of each stage costs.

    They are counted on a copy without blocks.
    """
    runs = [layer.blocks for layer in model.layers]
    x = torch.zeros(1, input_channels(model), *image, device="meta")

    def counted(shell: nn.Module) -> Counted:
        return Counted(count(shell, x), 0, sum(p.numel() for p in shell.parameters()))

    def both() -> tuple[int, tuple[ChannelCost, ...]]:
        shell = bare(model, runs)
        here = counted(shell)
        return here.macs, channel_costs(shell, outside, counted, here)

    return remembered(model, runs, ("swin", image, len(outside)), both)
