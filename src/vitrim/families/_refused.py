"""Why models of timm that no family hosts cannot be cut, and which family is near, by the file of timm's."""

import difflib
from collections.abc import Callable
from typing import NamedTuple

import timm

__all__ = ["Refused", "is_listed", "near_name", "refusal_of"]

PATCHES, WINDOWS = ("vit_", "deit"), ("swin_", "swinv2_")
"""Names of the families that are near: of plain ViTs, and of hierarchical ones."""


class Refused(NamedTuple):
    """What models of one of timm's files are."""

    what: str
    why: str
    near: tuple[str, ...]
    """How the names of models begin that are near and can be cut."""


def _convolutions(what: str) -> Refused:
    return Refused(what, "its blocks are convolutions, without attention whose heads could be cut", PATCHES)


def _hybrid(what: str, near: tuple[str, ...] = WINDOWS) -> Refused:
    return Refused(what, "its blocks mix attention with convolutions, whose channels no spec describes", near)


def _pools(what: str) -> Refused:
    return Refused(what, "its attention pools queries, keys or values between places, which no spec describes", WINDOWS)


_LANGUAGE = "it is the encoder of a language model, whose host with a merger of patches no family takes"

_REFUSED: dict[str, Refused] = {
    "byoanet": _hybrid("a network of bottleneck blocks with attention"),
    "cait": Refused("CaiT", "its attention mixes heads with one another before and after the softmax", PATCHES),
    "coat": _hybrid("CoaT"),
    "convit": Refused("ConViT", "its heads blend content with positions by a gate that no spec describes", PATCHES),
    "cpubone": _hybrid("CPUBone"),
    "crossvit": Refused("CrossViT", "its two branches of tokens attend to one another", PATCHES),
    "csatv2": _hybrid("CSATv2"),
    "davit": Refused("DaViT", "every other block attends over channels, so that no channel can go alone", WINDOWS),
    "deepseek_vit": Refused("DeepSeek's encoder", _LANGUAGE, PATCHES),
    "edgenext": _hybrid("EdgeNeXt"),
    "efficientformer": _hybrid("EfficientFormer"),
    "efficientformer_v2": _hybrid("EfficientFormerV2"),
    "efficientvim": Refused("EfficientViM", "its blocks are state spaces and convolutions, without attention", PATCHES),
    "efficientvit_mit": _hybrid("EfficientViT"),
    "efficientvit_msra": _hybrid("EfficientViT"),
    "fastvit": _hybrid("FastViT"),
    "focalnet": Refused("FocalNet", "its blocks modulate by convolutions in the place of attention", WINDOWS),
    "gcvit": _hybrid("GCViT"),
    "gemma4_vit": Refused("Gemma's encoder", "its blocks have four norms and layers that clip", PATCHES),
    "hiera": _pools("Hiera"),
    "hieradet_sam2": _pools("the Hiera encoder of SAM 2"),
    "iformer": _hybrid("iFormer"),
    "levit": Refused("LeViT", "its linear layers end in batch norms, and its attention shrinks the grid", WINDOWS),
    "lowformer": _hybrid("LowFormer"),
    "mambaout": _convolutions("MambaOut"),
    "maxxvit": _hybrid("MaxViT or CoAtNet"),
    "metaformer": Refused(
        "a MetaFormer (PoolFormer, ConvFormer, CAFormer)",
        "its blocks mix tokens by pooling and convolutions, and by attention in late stages alone",
        WINDOWS,
    ),
    "mlp_mixer": Refused("an MLP-Mixer", "it mixes tokens by linear layers, without attention", PATCHES),
    "mobilenetv5": _hybrid("MobileNetV5"),
    "mobilevit": _hybrid("MobileViT"),
    "mvitv2": _pools("MViTv2"),
    "naflexvit": Refused("NaFlexViT", "its images change in size and shape, and a spec has one grid", PATCHES),
    "nest": Refused("NesT", "its tokens attend within blocks of the grid, which convolutions join", WINDOWS),
    "nextvit": _hybrid("Next-ViT"),
    "pit": Refused("PiT", "its stages are joined by convolutions, which change grid and width", PATCHES),
    "pvt_v2": _pools("PVT v2"),
    "qwen3_vit": Refused("Qwen's encoder", _LANGUAGE, PATCHES),
    "repvit": _convolutions("RepViT"),
    "sequencer": Refused("Sequencer", "it mixes tokens by recurrent layers, without attention", PATCHES),
    "shvit": _hybrid("SHViT"),
    "swiftformer": _hybrid("SwiftFormer"),
    "swin_transformer_v2_cr": Refused(
        "Swin V2 in another author's form",
        "its position network is another, and some blocks end in a third norm, which no spec describes",
        ("swinv2_",),
    ),
    "tiny_vit": _hybrid("TinyViT"),
    "tnt": Refused("TNT", "its tokens hold tokens of their own, which attend among themselves", PATCHES),
    "twins": _pools("Twins"),
    "vision_transformer_sam": Refused(
        "SAM's encoder",
        "its positions enter the logits as products of queries with tables, so that no query channel can go alone, and "
        "its windows differ from block to block",
        PATCHES,
    ),
    "visformer": _hybrid("Visformer", PATCHES),
    "volo": Refused("VOLO", "its first blocks weigh neighbors by linear layers instead of queries and keys", PATCHES),
    "xcit": Refused("XCiT", "it attends over channels, so that no channel can go alone", PATCHES),
}
"""By the file of ``timm.models``; a file that is not named has networks of convolutions."""


def refusal_of(home: str) -> Refused | None:
    """Return why models whose class stands in the module `home`, and that no family hosts, cannot be cut.

    Returns:
        None if that is not one of ``timm.models``.
    """
    package, _, file = home.rpartition(".")
    if package != "timm.models":
        return None
    return _REFUSED.get(file) or _convolutions("a network of convolutions")


def is_listed(home: str) -> bool:
    """Return whether the module `home` of timm's is listed as one whose models no family hosts."""
    return home.removeprefix("timm.models.") in _REFUSED


def near_name(
    name: str, near: tuple[str, ...], hosted: Callable[[str], bool], can: Callable[[str], bool]
) -> str | None:
    """Return the name of a model that can be cut and is called most alike, or None.

    Args:
        name: of a model that cannot.
        near: how names begin that come into question.
        hosted: says of a name, quickly, whether a family may host its class.
        can: says of a name whether it can be cut.
    """
    known = [other for other in timm.list_models() if other.startswith(near) and other != name and hosted(other)]
    alike = difflib.get_close_matches(name, known, n=8, cutoff=0.0)
    return next((other for other in alike if can(other)), None)
