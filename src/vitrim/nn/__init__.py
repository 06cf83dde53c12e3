"""Modules built from spec nodes. Each module declares the axes along which it can be cut."""

from vitrim.nn.attention import Attention
from vitrim.nn.axis import Axis, Member, Tap
from vitrim.nn.block import Block, Constant
from vitrim.nn.conv import Conv
from vitrim.nn.make import computed, fold_steps_, keep_settings, make_block, still
from vitrim.nn.maps import unmerge
from vitrim.nn.mlp import Mlp
from vitrim.nn.stream import Stream
from vitrim.nn.window import WindowBlock

__all__ = [
    "Attention",
    "Axis",
    "Block",
    "Constant",
    "Conv",
    "Member",
    "Mlp",
    "Stream",
    "Tap",
    "WindowBlock",
    "computed",
    "fold_steps_",
    "keep_settings",
    "make_block",
    "still",
    "unmerge",
]
