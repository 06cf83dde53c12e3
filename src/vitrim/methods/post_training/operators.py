"""Which convolutions may stand in place of an attention.

D width, r rank.
"""

from collections.abc import Iterator, Sequence

from vitrim.cut.compensate import images_needed
from vitrim.words.block import Conv, why_not_conv, why_not_read
from vitrim.words.errors import MethodError
from vitrim.words.spec import Attention, Block, Spec, Stage
from vitrim.words.steps import Tokens, flow_of

__all__ = ["convolutions", "images_for", "kernels_at", "kernels_for", "share_of", "why_not_convolve"]

_RANKS = {3: (1 / 3, 1 / 6), 1: (2 / 3, 1 / 3)}
"""Ranks by kernel, as shares of D. A 3 x 3 convolution of rank D / 3 has 0.55 of the multiply-accumulates of the
attention of a ViT-Ti at 224 pixels, a 1 x 1 one 0.11."""

_STEP = 8


def convolutions(stage: Stage, mixer: Attention, kernel: int) -> list[Conv]:
    """Return the convolutions of a kernel that are measured, the widest first; none where heads share a norm.

    Prefix tokens keep the attention if they can, which costs a hundredth of it, and else get a constant.
    """
    if stage.form.mixed_norm is not None:
        return []
    width, reads = stage.width, why_not_read(stage.form, stage.prefix) is None
    ranks = sorted({max(_STEP, round(share * width / _STEP) * _STEP) for share in _RANKS[kernel]}, reverse=True)
    first = {"prefix": "attention", "heads": mixer} if reads else {"prefix": "mean"}
    return [
        Conv.model_validate({"kernel": kernel, "width": rank, "act": "none", **first}) for rank in ranks if rank < width
    ]


def share_of(conv: Conv, width: int) -> float:
    """Return the share of the rank that a convolution lacks, by which its loss stands in a calibration."""
    return 1 - conv.width / width


def why_not_convolve(block: Block, stage: Stage, arriving: Tokens, kernel: int) -> str | None:
    """Return why a convolution of a kernel cannot stand in place of a block's attention; None if it can."""
    if not isinstance(block.mixer, Attention) or not block.mixer.v:
        return "a convolution is made of an attention, but the block has none"
    if stage.form.post_norm:
        return "a convolution is fitted where the norm comes before its branch, but here it follows"
    if block.tokens is not None and block.tokens.needs_attention:
        return "tokens are chosen by the attention of their block, which must stay"
    made = convolutions(stage, block.mixer, kernel)
    if not made:
        return "a convolution is of lower rank than the attention, whose heads share no norm"
    here = stage.enters if stage.window is not None else flow_of(block.tokens, arriving, stage.patches).mixed
    node = block.model_copy(update={"mixer": made[0]})
    return why_not_conv(node, stage.form, stage.prefix, here.patches, here.grid)


def kernels_at(block: Block, stage: Stage, arriving: Tokens, kernels: Sequence[int], images: int) -> list[int]:
    """Return which of some kernels can stand in place of a block's attention and be fitted to so many images.

    Merged patches are fewer in each image, so that a fit behind them takes more images.
    """
    patches = stage.patches
    if stage.window is None:
        patches = max(1, flow_of(block.tokens, arriving, stage.patches).mixed.patches)
    return [
        kernel
        for kernel in kernels
        if why_not_convolve(block, stage, arriving, kernel) is None
        and images_needed(stage.width, patches, kernel) <= images
    ]


def kernels_for(spec: Spec, images: int, wanted: bool | None) -> tuple[int, ...]:
    """Return the kernels whose fits the images suffice for, and whose grid is known.

    Args:
        spec: the model.
        images: number of images for statistics.
        wanted: False for no kernel; True raises an error where a kernel of None would be left out.

    Raises:
        MethodError: if convolutions are wanted, but there are too few images, or the grid is not known.
    """
    if wanted is False:
        return ()
    found = []
    for kernel in _RANKS:
        wrong = next(_wrong(spec, images, kernel), None)
        if wrong is None:
            found.append(kernel)
        elif wanted:
            raise MethodError(wrong)
    return tuple(found)


def images_for(spec: Spec, kernels: Sequence[int]) -> int:
    """Return the number of images that the fits of these kernels need; 0 without kernels."""
    return max(
        (images_needed(stage.width, stage.patches, kernel) for stage in spec.stages for kernel in kernels), default=0
    )


def _wrong(spec: Spec, images: int, kernel: int) -> Iterator[str]:
    if spec.host.arguments.get("dynamic_img_size") or any(
        stage.window is not None and stage.window.dynamic for stage in spec.stages
    ):
        yield (
            "operators=true must know the grid of patches, but images of any size are allowed (dynamic_img_size); "
            "build the model without it, or use operators=false"
        )
    needed = images_for(spec, (kernel,))
    if images < needed:
        yield (
            f"the fit of a {kernel} x {kernel} convolution must have at least {needed} images for this model, but got "
            f"{images}; give more with data.calibration, or use operators=false"
        )
