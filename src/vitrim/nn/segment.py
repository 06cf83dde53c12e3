"""A backbone of any family with a head for semantic segmentation.

B images, K classes, D width of a map, (h, w) rows and columns of a map, (H, W) those of the dense grid, (R, C) height
and width of the images in pixels.

Decoder: Semantic FPN (Kirillov et al. 2019, "Panoptic Feature Pyramid Networks"), as implemented in
segmentation_models_pytorch. All maps of a plain ViT have the same stride, so four of them are resized to the strides of
a pyramid, as is usual for ViTs. Maps of merged tokens are resized directly from their own grids.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from pydantic import Field, NonNegativeInt, PositiveInt
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

from vitrim.nn.maps import unmerge
from vitrim.words.errors import AdoptError, RecipeError
from vitrim.words.plain import Node

__all__ = ["HEADS", "LEVELS", "Head", "Places", "Segmentor", "check_covered", "lay_on", "rounded"]

LEVELS = 4
_GROUPS = 32
"""Number of groups of the decoder's group norms."""


class Head(Node):
    """Settings of a segmentation head.

    Attributes:
        kind: ``fpn`` is Semantic FPN on four maps; ``linear`` is a linear layer on the last map, on the dense grid.
        width: channels of the pyramid.
        channels: channels of its branches, whose sum is classified; a multiple of 32.
        dropout: share of these channels that is dropped in training, in ``[0, 1)``.
        neck: ``native`` resizes each map once, from its own grid; ``restore`` first resizes maps of merged tokens to
            the dense grid. Both are equal for a backbone that merges no tokens.
        taps: indices of the blocks of a plain ViT whose outputs are used, including the last block; if empty, four
            blocks at equal distances.
    """

    kind: Literal["fpn", "linear"] = "fpn"
    width: PositiveInt = 256
    channels: int = Field(default=128, ge=_GROUPS, multiple_of=_GROUPS)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    neck: Literal["native", "restore"] = "native"
    taps: tuple[NonNegativeInt, ...] = ()


class Places(NamedTuple):
    """Sources of the feature maps of a backbone.

    Attributes:
        taps: index of each map in ``forward_intermediates``; an index may occur twice.
        widths: D of each map.
        halved: how often rows and columns of the grid of each map were halved, counted from the patch embedding.
        finer: rows of the finest level of the pyramid for each row of the grid of the patch embedding: 4 for plain
            ViTs, whose patches have the stride of the third level, 1 for families with four stages.
    """

    taps: tuple[int, ...]
    widths: tuple[int, ...]
    halved: tuple[tuple[int, int], ...]
    finer: int


def rounded(grid: tuple[int, int], finer: int) -> tuple[int, int]:
    """Return the grid, rounded up so that each level of the pyramid has half the rows and columns of the one before."""
    step = max(1, 2 ** (LEVELS - 1) // finer)
    rows, columns = (-(-n // step) * step for n in grid)
    return rows, columns


def lay_on(maps: Tensor, halved: tuple[int, int], whole: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Resize a map once, from its own grid to a level of the pyramid; each token is at the center of its patches.

    Args:
        maps: ``(B, D, h, w)``.
        halved: how often its rows and columns were halved, counted from the dense grid.
        whole: the dense grid after `rounded`. Additional rows and columns repeat the last one, as merging does.
        size: rows and columns of the level, `whole` multiplied or divided by a power of 2.

    Returns:
        ``(B, D, *size)``.
    """
    rows, columns = (-(-n // 2**often) for n, often in zip(whole, halved, strict=True))
    below, right = max(0, rows - maps.shape[2]), max(0, columns - maps.shape[3])
    if below or right:
        maps = F.pad(maps, (0, right, 0, below), mode="replicate")
    high, wide = (
        (count << often) * level // n
        for count, often, level, n in zip((rows, columns), halved, size, whole, strict=True)
    )
    if (high, wide) != tuple(maps.shape[2:]):
        maps = F.interpolate(maps, size=(high, wide), mode="bilinear", align_corners=False)
    return maps[:, :, : size[0], : size[1]]


def check_covered(backbone: Any, size: tuple[int, int]) -> None:
    """Raise if patches do not cover the whole image.

    Raises:
        RecipeError: if a side of `size` is not a multiple of the patch size.
    """
    patch = getattr(backbone.patch_embed, "patch_size", None) or (1, 1)
    if any(side % int(step) for side, step in zip(size, patch, strict=True)):
        raise RecipeError(f"size: sides must be multiples of the patches' {tuple(patch)}, but are {tuple(size)}")


class Segmentor(nn.Module):
    """Semantic segmentation: maps images ``(B, 3, R, C)`` to logits ``(B, K, R, C)``.

    Segmentors are one of the model families of `vitrim.families`. Their backbone may be dense, cut or merged, and the
    same functions as for classifiers store, load, measure and export them and compute their costs.

    Args:
        backbone: an adopted model without classifier and final norm.
        classes: K.
        head: settings of the head.
        places: sources of the feature maps.
    """

    def __init__(self, backbone: nn.Module, classes: int, head: Head, places: Places) -> None:
        super().__init__()
        self.backbone = backbone
        self.num_classes, self.form, self.places = classes, head, places
        self.head: nn.Module = HEADS[head.kind](head, places, classes)

    @property
    def patch_embed(self) -> Any:
        """The patch embedding of the backbone, which has the size and channels of the images."""
        return self.backbone.patch_embed

    @property
    def pretrained_cfg(self) -> Any:
        """Metadata of timm about the backbone's pretrained weights and their input."""
        return getattr(self.backbone, "pretrained_cfg", {})

    def set_input_size(self, img_size: tuple[int, int]) -> None:
        """Change the image size, as in timm's models; position embeddings are interpolated.

        Raises:
            RecipeError: if a side is not a multiple of the patch size.
        """
        backbone: Any = self.backbone
        check_covered(backbone, img_size)
        backbone.set_input_size(img_size=img_size)

    def forward(self, images: Tensor) -> Tensor:
        """Map images to logits of the same size."""
        size = (images.shape[2], images.shape[3])
        backbone: Any = self.backbone
        rows, columns = backbone.patch_embed.dynamic_feat_size(size)
        wanted = sorted(set(self.places.taps))
        given = backbone.forward_intermediates(images, indices=wanted, intermediates_only=True, norm=False)
        logits = self.head([given[wanted.index(tap)] for tap in self.places.taps], (int(rows), int(columns)))
        cells = [-(-pixels // n) for pixels, n in zip(size, (rows, columns), strict=True)]
        whole = [int(n * cell) for n, cell in zip(rounded((rows, columns), self.places.finer), cells, strict=True)]
        # The grid of the head's decoder may be larger than the image because it is rounded up.
        wide = F.interpolate(logits, size=whole, mode="bilinear", align_corners=False)
        return wide[:, :, : size[0], : size[1]]


class _Fpn(nn.Module):
    """Resizes four maps to the levels of a pyramid, and decodes and classifies them at its finest level."""

    def __init__(self, head: Head, places: Places, classes: int) -> None:
        super().__init__()
        decoder, initialize = _library()
        self.neck, self.places = head.neck, places
        self.norms = nn.ModuleList(LayerNorm2d(width) for width in places.widths)
        self.decoder: nn.Module = decoder(
            list(places.widths),
            encoder_depth=LEVELS,
            pyramid_channels=head.width,
            segmentation_channels=head.channels,
            dropout=head.dropout,
        )
        initialize(self.decoder)
        self.classifier = nn.Conv2d(head.channels, classes, kernel_size=1)

    def forward(self, maps: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        whole, finer = rounded(grid, self.places.finer), self.places.finer
        levels = []
        for level, (norm, each, halved) in enumerate(zip(self.norms, maps, self.places.halved, strict=True)):
            size = (whole[0] * finer >> level, whole[1] * finer >> level)
            each = norm(each)
            if self.neck == "restore" and finer > 1:
                each, halved = unmerge(each, grid, halved), (0, 0)
            levels.append(lay_on(each, halved, whole, size))
        logits: Tensor = self.classifier(self.decoder(levels))
        return logits


class _Linear(nn.Module):
    """Resizes the last map to the dense grid, and classifies it with one linear layer."""

    def __init__(self, head: Head, places: Places, classes: int) -> None:
        super().__init__()
        self.places = places
        self.norm = LayerNorm2d(places.widths[-1])
        self.dropout = nn.Dropout2d(head.dropout)
        self.classifier = nn.Conv2d(places.widths[-1], classes, kernel_size=1)

    def forward(self, maps: Sequence[Tensor], grid: tuple[int, int]) -> Tensor:
        whole = rounded(grid, self.places.finer)
        laid = lay_on(self.norm(maps[-1]), self.places.halved[-1], whole, whole)
        logits: Tensor = self.classifier(self.dropout(laid))
        return logits


HEADS: dict[str, Any] = {"fpn": _Fpn, "linear": _Linear}


def _library() -> tuple[Any, Any]:
    """Return the class of the decoder and its initialization function.

    Raises:
        AdoptError: if segmentation_models_pytorch is not installed.
    """
    try:
        from segmentation_models_pytorch.base.initialization import initialize_decoder
        from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder
    except ImportError:
        raise AdoptError(
            "segmentation_models_pytorch must be installed for a head of kind fpn, but is not; "
            "run pip install 'vitrim[seg]'"
        ) from None
    return FPNDecoder, initialize_decoder
