"""Methods of timm's ``VisionTransformer`` that must know of cut tokens: features, image sizes, heads, pruned layers.

B images, N tokens, D width, (h, w) rows and columns of the patches that leave a block.

timm's class is not changed: a model with such blocks has these as attributes of its own, in place of the methods of its
class, and a `feature_info` of its own.
"""

import copy
import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.models._features import feature_take_indices
from torch import Tensor

from vitrim.nn import Conv, unmerge
from vitrim.words.errors import DataError
from vitrim.words.plan.tokens import why_not_pooled
from vitrim.words.spec import Block
from vitrim.words.steps import Tokens, flow_of, why_not_tokens

__all__ = ["Intermediates", "Restore", "give_methods_"]

Restore = Literal["nearest", "bilinear"]
"""How merged patches are laid out on the grid of the dense model, see `vitrim.nn.unmerge`."""


def give_methods_(model: Any) -> None:
    """Mark the last block of a model of ours, and give the model the methods that its blocks ask for."""
    for name in ("forward_intermediates", "set_input_size", "reset_classifier", "prune_intermediate_layers"):
        vars(model).pop(name, None)
    blocks = list(model.blocks)
    for block in blocks:
        block.is_last = block is blocks[-1]
    cut = any(block.spec.tokens is not None or block.spec.only_prefix for block in blocks)
    if cut:
        model.forward_intermediates, model.prune_intermediate_layers = Intermediates(model), Prune(model)
        tell_reduction_(model)
    if cut or any(isinstance(block.attn, Conv) for block in blocks):
        model.set_input_size = InputSize(model)
    if cut and not _leaving(model)[-1].patches:
        model.reset_classifier = Classifier(model)


@dataclass(eq=False)
class Classifier:
    """In place of timm's `reset_classifier` on a model whose last block leaves no patches."""

    model: Any

    def __call__(self, num_classes: int, global_pool: str | None = None) -> None:
        """As timm's, for a head that reads the prefix tokens.

        Raises:
            DataError: if the new head would pool patches, of which none is left.
        """
        pool = self.model.global_pool if global_pool is None else global_pool
        wrong = why_not_pooled(pool, self.model.blocks[-1].spec.only_prefix)
        if wrong is not None:
            raise DataError(f"global_pool: {wrong}; or set the head of the dense model, and cut tokens afterwards")
        type(self.model).reset_classifier(self.model, num_classes, global_pool)


@dataclass(eq=False)
class Prune:
    """In place of timm's `prune_intermediate_layers` on a model whose tokens are cut."""

    model: Any

    def __call__(self, indices: Any = 1, *arguments: Any, **options: Any) -> Any:
        """As timm's.

        Raises:
            DataError: if the head that is left could not read what the last block leaves; nothing changes then.
        """
        model, before = self.model, self.model.blocks
        _, last = feature_take_indices(len(before), indices)
        model.blocks = before[: last + 1]
        give_methods_(model)
        try:
            return type(model).prune_intermediate_layers(model, indices, *arguments, **options)
        except DataError:
            model.blocks = before
            give_methods_(model)
            raise


@dataclass(eq=False)
class Intermediates:
    """In place of timm's `forward_intermediates` on a model whose tokens are cut.

    timm lays what comes out of a block on the dense grid, and where the numbers of the tokens that are left happen to
    divide (147 of 196 at width 384) it would do so silently with other tokens' features side by side.

    Attributes:
        model: the host.
        restore: what `restore` is where a caller does not say, as timm's feature extractors do not.
    """

    model: Any
    restore: Restore | None = None

    def __call__(self, x: Tensor, *arguments: Any, restore: Restore | None = None, **options: Any) -> Any:
        """As timm's; a map has the grid of the patches that leave its block, ``(B, D, h, w)``.

        Args:
            x: images, ``(B, 3, height, width)``.
            arguments: as timm's.
            restore: lay every map out on the grid of the dense model.
            options: as timm's. With ``output_fmt="NLC"`` entries hold the patches that leave their block.

        Raises:
            DataError: if maps are asked for where patches were dropped or no longer fill a grid, or if tokens were
                merged by likeness.
        """
        if any(tokens.stands_for is not None for tokens in _leaving(self.model)[:-1]):
            raise DataError(
                "features of single blocks must be tokens alone, but in a model that merges tokens they come with the "
                "number of patches that each stands for; take them from the dense model, or use forward_features"
            )
        kind = type(self.model)
        bound = inspect.signature(kind.forward_intermediates).bind(self.model, x, *arguments, **options)
        bound.apply_defaults()
        if bound.arguments.get("output_fmt") != "NCHW":
            return kind.forward_intermediates(*bound.args, **bound.kwargs)
        how, leaving = restore or self.restore, _leaving(self.model)
        taken = _taken(len(leaving), bound.arguments["indices"])
        if any(leaving[index].grid is None for index in taken):
            raise DataError(
                "maps of features must have every patch, but this model drops some; ask for output_fmt='NLC', whose "
                "tokens are the prefix tokens and the patches of spec.stages[0].blocks[i].tokens.kept"
            )
        bound.arguments["output_fmt"] = "NLC"
        given = kind.forward_intermediates(*bound.args, **bound.kwargs)
        dense = _dense(self.model)

        def lay(index: int, entry: Any) -> Any:
            if isinstance(entry, tuple):
                return lay(index, entry[0]), entry[1]
            grid = leaving[index].grid
            assert grid is not None
            maps = torch.unflatten(entry.transpose(1, 2), 2, grid).contiguous()
            return maps if how is None else unmerge(maps, dense, leaving[index].halved, how)

        if isinstance(given, dict):
            entries = given["image_intermediates"]
            return given | {"image_intermediates": [lay(i, e) for i, e in zip(taken, entries, strict=True)]}
        if isinstance(given, tuple):
            return given[0], [lay(i, e) for i, e in zip(taken, given[1], strict=True)]
        return [lay(i, e) for i, e in zip(taken, given, strict=True)]


def _taken(blocks: int, indices: Any) -> list[int]:
    """The blocks whose outputs timm hands out, in its order."""
    if indices is None:
        return list(range(blocks))
    if isinstance(indices, int):
        return list(range(blocks - indices, blocks))
    return sorted({index % blocks for index in indices})


def _dense(model: Any) -> tuple[int, int]:
    rows, columns = model.patch_embed.grid_size
    return int(rows), int(columns)


def _leaving(model: Any, dense: tuple[int, int] | None = None) -> list[Tokens]:
    """The tokens that leave each block, by the blocks' own specs.

    Args:
        model: the host.
        dense: rows and columns of the dense grid; the model's if None.

    Raises:
        DataError: if a step is not possible on that grid.
    """
    rows, columns = dense or _dense(model)
    here = Tokens(model.num_prefix_tokens, rows * columns, (rows, columns))
    leaving = []
    for index, block in enumerate(model.blocks):
        spec: Block = block.spec
        wrong = why_not_tokens(spec.tokens, here, rows * columns)
        if wrong is not None:
            raise DataError(f"stages.0.blocks.{index}.tokens: {wrong}; choose a larger input size")
        here = flow_of(spec.tokens, here, rows * columns, spec.only_prefix).leaves
        leaving.append(here)
    return leaving


def tell_reduction_(model: Any) -> None:
    """Write down how much smaller than the image the maps of each block are, where neighbours are merged.

    timm's field `reduction` is one number and may only rise: it is the larger of both; ``reduction_hw`` has those of
    rows and columns.
    """
    dense, leaving = _dense(model), _leaving(model)
    if not leaving or leaving[-1].halved == (0, 0):
        return
    patch = [side // places for side, places in zip(model.patch_embed.img_size, dense, strict=True)]
    told = []
    for index, tokens in enumerate(leaving):
        both = tuple(step << often for step, often in zip(patch, tokens.halved, strict=True))
        told.append(
            {
                "module": f"blocks.{index}",
                "num_chs": model.embed_dim,
                "reduction": max(both),
                "reduction_hw": both,
            }
        )
    model.feature_info = told


@dataclass(eq=False)
class InputSize:
    """In place of timm's `set_input_size` on a model whose blocks must be told their grid."""

    model: Any

    def __call__(self, *arguments: Any, **options: Any) -> None:
        """As timm's.

        Raises:
            DataError: if a step belongs to the present grid, or the new grid is too small for the steps; nothing
                changes then.
        """
        model: Any = self.model
        for index, block in enumerate(model.blocks):
            wrong = None if block.spec.tokens is None else block.spec.tokens.why_not_resized()
            if wrong is not None:
                raise DataError(f"stages.0.blocks.{index}.tokens: the input size must stay as it is, for {wrong}")
        trial = copy.deepcopy(model.patch_embed)
        trial.set_input_size(*arguments, **options)
        dense = (int(trial.grid_size[0]), int(trial.grid_size[1]))
        leaving = _leaving(model, dense)
        type(model).set_input_size(model, *arguments, **options)
        enters = Tokens(model.num_prefix_tokens, dense[0] * dense[1], dense)
        for block, here in zip(model.blocks, [enters, *leaving], strict=False):
            block.place(here, dense)
        tell_reduction_(model)
