"""Swin Transformers, first version: shifted windows, relative position bias, patch merging (Swin, S3).

D width, R x C rows and columns of the grid of patches.

Only the blocks are replaced. Patch embedding, patch merging, final norm and head remain timm's own modules, and a
compressed model *is* a ``timm.models.SwinTransformer``. The cost of patch merging is counted with stem and head,
because no cut changes the grid or D.
"""

import copy
import dataclasses
import re
from collections.abc import Sequence
from typing import Any, Literal

import timm
import torch
from pydantic import Field
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, WindowAttention
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr
from torch import Tensor, nn

from vitrim.families._channels import Channels, Counted, channel_costs, narrow_
from vitrim.families._parts import (
    Hole,
    bare,
    check_linear,
    checked_stage,
    count,
    give_pretrained_,
    norm_maker,
    params_outside,
    pretrained,
    read_mlp,
    read_rates,
    remembered,
    same_norm,
)
from vitrim.nn import Block, WindowBlock
from vitrim.nn.layers import input_channels
from vitrim.words.block import Rate
from vitrim.words.errors import AdoptError, SpecError
from vitrim.words.plain import Node
from vitrim.words.sizes import MOST_STAGES, Size
from vitrim.words.spec import Attention, ChannelCost, Form, Host, Norm, Spec, Stage, Window
from vitrim.words.spec import Block as BlockSpec

__all__ = [
    "ARGUMENTS",
    "HOSTS",
    "TEST_PRESETS",
    "blocks_by_stage",
    "build",
    "channels",
    "convert",
    "describe",
    "example",
    "host",
]

_SMALL = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 24,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "window_size": 4,
    "num_classes": 10,
}

TEST_PRESETS: dict[str, dict[str, object]] = {
    "windows": {},
    "padded": {"img_size": (24, 40)},
    "always": {"img_size": 24, "always_partition": True, "qkv_bias": False, "drop_path_rate": 0.0},
    "dynamic": {"strict_img_size": False, "head_dim": 8, "mlp_ratio": (2.0, 3.0), "num_heads": (3, 2)},
    "sizes": {
        "patch_size": 2,
        "depths": (1, 2, 1),
        "num_heads": (2, 3, 6),
        "window_size": ((4, 2), (2, 4), (2, 2)),
        "global_pool": "",
    },
}

HOSTS = (SwinTransformer, SwinTransformerV2, SwinTransformerV2Cr)
"""Includes the second version, so that `describe` can raise an error with the reason."""


class _Reference(Node):
    """The windows of each stage, and the grid, that timm scales in `set_input_size`."""

    windows: tuple[tuple[Size, Size], ...] = Field(max_length=MOST_STAGES)
    grid: tuple[Size, Size]


class ARGUMENTS(Node):
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

_COMPUTED = ("relative_position_index", "attn_mask")


def example(**arguments: Any) -> nn.Module:
    """Return a small random Swin (two stages of two blocks, width 24, on 8 x 8 patches) for tests."""
    return SwinTransformer(**{**_SMALL, **arguments})  # type: ignore[no-any-return]


def blocks_by_stage(model: Any) -> list[list[nn.Module]]:
    """Return the blocks of each stage in order, timm's or vitrim's."""
    return [list(layer.blocks) for layer in model.layers]


def describe(model: Any) -> Spec:
    """Return the spec of a Swin.

    Raises:
        AdoptError: a part cannot be represented; the message has the path and the reason.
    """
    if not isinstance(model, SwinTransformer):
        raise AdoptError(
            f"$: {type(model).__name__} is not supported: its cosine attention divides queries and keys by their "
            "lengths, so that cutting a channel changes all others; use a Swin of the first version (swin_*)"
        )
    size = model.patch_embed.img_size
    image = (int(size[0]), int(size[1]))
    macs, slopes = _host_macs(model, image)
    known = Host(
        name=str(pretrained(model).get("architecture", "")),
        arguments=_arguments(model),
        macs=macs,
        params=params_outside(model, [layer.blocks for layer in model.layers]),
        pretrained=pretrained(model),
        channels=slopes,
    )
    return Spec(family="swin", host=known, image=image, classes=model.num_classes, stages=_stages(model))


def channels(model: Any) -> tuple[Channels, ...]:
    """Return where the channels of each stage's residual stream lie outside the blocks.

    Patch merging reads four runs of one stage's channels and writes those of the next, so every stage has a width of
    its own.
    """
    found, last = [], len(model.layers) - 1
    for index, layer in enumerate(model.layers):
        here = f"layers.{index}.downsample"
        following = f"layers.{index + 1}.downsample"
        width = model.patch_embed.proj.out_channels if index == 0 else layer.downsample.reduction.out_features
        one = Channels(
            width=width,
            writers=(f"{here}.reduction",) if index else ("patch_embed.proj",),
            readers=(f"{following}.reduction",) if index < last else ("head.fc",),
            norms=(f"{following}.norm",) if index < last else ("norm",),
            stem_norms=() if index else ("patch_embed.norm",),
            sizes=(f"{here}.out_dim", f"layers.{index}.dim") if index else ("embed_dim", "layers.0.dim"),
        )
        more = (f"{following}.dim",) if index < last else ("num_features", "head_hidden_size", *_HEAD_SIZES)
        found.append(dataclasses.replace(one, sizes=(*one.sizes, *more)))
    return tuple(found)


def host(model: Any, blocks: Sequence[Block]) -> nn.Module:
    """Return a copy of `model` with other blocks; hooks on the old blocks are not copied."""
    rest = iter(blocks)
    runs: dict[int, Any] = {}
    for layer in model.layers:
        runs[id(layer.blocks)] = nn.Sequential(*(next(rest) for _ in layer.blocks))
        runs[id(layer.blocks)].training = layer.blocks.training
    shell = copy.deepcopy(model, runs)
    return shell  # type: ignore[no-any-return]


def build(spec: Spec) -> Any:
    """Return a Swin for `spec`, built by timm's own constructor with placeholders for the blocks.

    Raises:
        SpecError: the installed timm cannot build it.
    """
    known = dict(spec.host.arguments)
    final, reference = known.pop("final_norm"), known.pop("reference")
    try:
        model = SwinTransformer(**_keywords(spec, known))
    except (KeyError, TypeError, ValueError, RuntimeError, AssertionError) as problem:
        raise SpecError(
            f"host: the installed timm {timm.__version__} must build {spec.host.name or 'SwinTransformer'}, "
            f"but fails: {type(problem).__name__}: {problem}"
        ) from None
    kept = [
        None if one.width == stage.width else range(stage.width)
        for one, stage in zip(channels(model), spec.stages, strict=True)
    ]
    narrow_(model, channels(model), kept)
    for layer, stage in zip(model.layers, spec.stages, strict=True):
        layer.blocks, layer.depth = nn.Sequential(*(Hole() for _ in stage.blocks)), len(stage.blocks)
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
        "weight_init": "skip",
    }


def _stages(model: Any) -> tuple[Stage, ...]:
    stages = []
    rows, columns = model.patch_embed.grid_size
    for index, layer in enumerate(model.layers):
        if not isinstance(layer.downsample, nn.Identity):
            rows, columns = (rows + 1) // 2, (columns + 1) // 2
        at = f"layers.{index}"
        parts = [_block(block, f"{at}.blocks.{place}", (rows, columns)) for place, block in enumerate(layer.blocks)]
        if not parts:
            raise AdoptError(f"{at}.blocks: a stage must have at least one block, but it has none")
        for place, (_, *common) in enumerate(parts):
            if common != list(parts[0][1:]):
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


def _block(block: Any, at: str, grid: tuple[int, int]) -> tuple[BlockSpec, Form, Window, int]:
    """Return spec, form, window and width of a block that runs on `grid`."""
    ours = isinstance(block, WindowBlock)
    believed = tuple(block.grid if ours else getattr(block, "input_resolution", grid))
    if believed != grid:
        # Older versions of timm round odd grids down, but patch merging pads them, so the masks have another grid.
        raise AdoptError(f"{at}: the block must be made for its grid {grid}, but is for {believed}; use a newer timm")
    if ours:
        return block.spec.model_copy(update={"rates": read_rates(block)}), block.form, block.window, block.width
    if type(block) is not SwinTransformerBlock:
        raise AdoptError(f"{at}: a block must be timm's SwinTransformerBlock, but got {type(block).__name__}")
    attention = block.attn
    if type(attention) is not WindowAttention:
        raise AdoptError(f"{at}.attn: attention must be timm's WindowAttention, but got {type(attention).__name__}")
    check_linear(attention, ("qkv", "proj"), f"{at}.attn")
    window = Window(size=block.window_size, always=block.always_partition, dynamic=bool(block.dynamic_mask))
    shifted = any(block.target_shift_size)
    shift = window.shift(grid) if shifted else (0, 0)
    if tuple(block.shift_size) != shift:
        raise AdoptError(f"{at}: windows must be shifted by half their size, {shift}, but are by {block.shift_size}")
    heads = attention.num_heads
    width = attention.qkv.out_features // (3 * heads)
    form = Form(
        norm=same_norm([(f"{at}.norm1", block.norm1), (f"{at}.norm2", block.norm2)]),
        qkv_bias=attention.qkv.bias is not None,
        out_bias=attention.proj.bias is not None,
        **read_mlp(block.mlp, f"{at}.mlp"),
    )
    mixer = Attention(qk=(width,) * heads, v=(width,) * heads, scale=attention.scale)
    spec = BlockSpec(mixer=mixer, hidden=block.mlp.fc2.in_features, rates=read_rates(block), shifted=shifted)
    return spec, form, window, block.dim


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


def _host_macs(model: Any, image: tuple[int, int]) -> tuple[int, tuple[ChannelCost, ...]]:
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
        return here.macs, channel_costs(shell, channels(model), counted, here)

    return remembered(model, runs, ("swin", image), both)
