"""Replacements for methods of timm's ``VisionTransformer`` that depend on cut tokens (features, image size, head).

B images, N tokens, D width, (h, w) rows and columns of the patches that leave a block.

timm's class is not changed. A model whose blocks cut tokens has these as instance attributes, which replace the methods
of its class, and its own `feature_info`.
"""

import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vitrim.nn import Attention, Conv, unmerge
from vitrim.nn.copying import copied
from vitrim.words.errors import DataError
from vitrim.words.plan.tokens import why_not_pooled
from vitrim.words.spec import Block, Relative
from vitrim.words.steps import Tokens, flow_of, why_not_tokens

__all__ = ["Intermediates", "Restore", "give_methods_"]

Restore = Literal["nearest", "bilinear"]
"""Interpolation of merged patches to the grid of the dense model, see `vitrim.nn.unmerge`."""


def give_methods_(model: Any) -> None:
    """Set `is_last` of the blocks of an adopted model, and set the methods that its blocks require."""
    for name in ("forward_intermediates", "set_input_size", "reset_classifier", "prune_intermediate_layers"):
        vars(model).pop(name, None)
    blocks = list(model.blocks)
    for block in blocks:
        block.is_last = block is blocks[-1]
    cut = any(block.spec.tokens is not None or block.spec.only_prefix for block in blocks)
    if cut:
        model.forward_intermediates, model.prune_intermediate_layers = Intermediates(model), Prune(model)
        tell_reduction_(model)
    placed = any(isinstance(block.attn, Conv) or isinstance(block.form.positions, Relative) for block in blocks)
    if cut or placed or any(_without_table(model, block) for block in blocks):
        model.set_input_size = InputSize(model)
    pool = getattr(model, "attn_pool", None)
    if (cut and not _leaving(model)[-1].patches) or getattr(pool, "out_features", model.embed_dim) != model.embed_dim:
        model.reset_classifier = Classifier(model)


_ASKING = "timm.models.beit"
"""Module of a `set_input_size` that asks the attention of every block for its table of relative positions."""


def _without_table(model: Any, block: Any) -> bool:
    """Return whether timm's `set_input_size` would ask a block for a table of relative positions that it has not."""
    if type(model).set_input_size.__module__ == _ASKING:
        return not hasattr(block.attn, "set_window_size")
    return isinstance(block.form.positions, Relative) and not isinstance(block.attn, Attention)


@dataclass(eq=False)
class Classifier:
    """Replaces timm's `reset_classifier` for a model whose last block returns no patches, or whose pooling is wider."""

    model: Any

    def __call__(self, num_classes: int, global_pool: str | None = None) -> None:
        """Reset the classifier as timm does, for a head that uses what the model has.

        Raises:
            DataError: the new head would pool patches, but there are none; or the pooling would go, but not its norm.
        """
        model, pool = self.model, self.model.global_pool if global_pool is None else global_pool
        wrong = None if _leaving(model)[-1].patches else why_not_pooled(pool, model.blocks[-1].spec.only_prefix)
        if wrong is not None:
            raise DataError(f"global_pool: {wrong}; or set the head of the dense model, and cut tokens afterwards")
        wide = getattr(getattr(model, "attn_pool", None), "out_features", model.embed_dim)
        if wide != model.embed_dim and pool != "map" and not isinstance(model.fc_norm, nn.Identity):
            raise DataError(
                f"global_pool: must stay 'map' where a norm of {wide} channels follows the pooling, but got '{pool}' "
                f"for tokens of {model.embed_dim}; set the head of the dense model, and cut the width afterwards"
            )
        type(model).reset_classifier(model, num_classes, global_pool)
        if wide == model.embed_dim:
            return
        if model.attn_pool is None:
            model.head_hidden_size = model.embed_dim
        elif num_classes:
            like = model.head.weight
            model.head = nn.Linear(wide, num_classes, device=like.device, dtype=like.dtype).train(model.training)


@dataclass(eq=False)
class Prune:
    """Replaces timm's `prune_intermediate_layers` for a model whose tokens are cut."""

    model: Any

    def __call__(self, indices: Any = 1, *arguments: Any, **options: Any) -> Any:
        """Prune layers as timm does.

        Raises:
            DataError: the remaining head cannot use the tokens that the last block returns; nothing changes then.
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
    """Replaces timm's `forward_intermediates` for a model whose tokens are cut.

    timm reshapes the output of a block to the dense grid. If the number of remaining tokens happens to divide (147 of
    196 at width 384), timm silently mixes the features of different tokens.

    Attributes:
        model: the model.
        restore: default of `restore` for callers that do not pass it, such as timm's feature extractors.
    """

    model: Any
    restore: Restore | None = None

    def __call__(self, x: Tensor, *arguments: Any, restore: Restore | None = None, **options: Any) -> Any:
        """Return features as timm does; a map has the grid of the patches that leave its block, ``(B, D, h, w)``.

        Args:
            x: images, ``(B, 3, height, width)``.
            arguments: as for timm's method.
            restore: interpolate every map to the grid of the dense model; None does not.
            options: as for timm's method. With ``output_fmt="NLC"`` entries contain the patches that leave their block.

        Raises:
            DataError: maps are requested but patches were dropped or do not fill a grid, or tokens were merged by
                similarity.
        """
        if any(tokens.stands_for is not None for tokens in _leaving(self.model)[:-1]):
            raise DataError(
                "features of single blocks must be tokens alone, but in a model that merges tokens they come with the "
                "number of patches that each represents; take them from the dense model, or use forward_features"
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
                "maps of features must have every patch, but this model drops some; use output_fmt='NLC', whose "
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
    """Return the indices of the blocks whose outputs timm returns, in timm's order."""
    if indices is None:
        return list(range(blocks))
    if isinstance(indices, int):
        return list(range(blocks - indices, blocks))
    return sorted({index % blocks for index in indices})


def _dense(model: Any) -> tuple[int, int]:
    rows, columns = model.patch_embed.grid_size
    return int(rows), int(columns)


def _leaving(model: Any, dense: tuple[int, int] | None = None) -> list[Tokens]:
    """Return the tokens after each block, computed from the blocks' specs.

    Args:
        model: the model.
        dense: rows and columns of the dense grid; None uses the model's.

    Raises:
        DataError: a step is not possible on that grid.
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
    """Set `feature_info` to the reduction of each block's maps relative to the image, if neighbors are merged.

    timm's field `reduction` is one number that may not decrease. It is set to the larger of rows and columns;
    ``reduction_hw`` contains both.
    """
    dense, leaving = _dense(model), _leaving(model)
    if not leaving or leaving[-1].halved == (0, 0):
        return
    patch = [side // places for side, places in zip(model.patch_embed.img_size, dense, strict=True)]
    infos = []
    for index, tokens in enumerate(leaving):
        both = tuple(step << often for step, often in zip(patch, tokens.halved, strict=True))
        infos.append(
            {
                "module": f"blocks.{index}",
                "num_chs": model.embed_dim,
                "reduction": max(both),
                "reduction_hw": both,
            }
        )
    model.feature_info = infos


@dataclass(eq=False)
class InputSize:
    """Replaces timm's `set_input_size` for a model whose blocks depend on their grid."""

    model: Any

    def __call__(self, *arguments: Any, **options: Any) -> None:
        """Set the input size as timm does, and update the grid of each block.

        Raises:
            DataError: a step is bound to the present grid, or the new grid is too small for the steps; nothing changes
                then.
        """
        model: Any = self.model
        for index, block in enumerate(model.blocks):
            wrong = None if block.spec.tokens is None else block.spec.tokens.why_not_resized()
            if wrong is not None:
                raise DataError(f"stages.0.blocks.{index}.tokens: the input size must not change, because {wrong}")
        trial = copied(model.patch_embed)
        trial.set_input_size(*arguments, **options)
        dense = (int(trial.grid_size[0]), int(trial.grid_size[1]))
        leaving = _leaving(model, dense)
        blocks = model.blocks
        try:
            # Where positions are relative, timm asks the attention of each block for its table.
            model.blocks = nn.ModuleList(block for block in blocks if not _without_table(model, block))
            type(model).set_input_size(model, *arguments, **options)
        finally:
            model.blocks = blocks
        enters = Tokens(model.num_prefix_tokens, dense[0] * dense[1], dense)
        for block, here in zip(model.blocks, [enters, *leaving], strict=False):
            block.place(here, dense)
        tell_reduction_(model)
