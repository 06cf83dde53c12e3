"""Modules built from spec nodes. Each declares the axes along which it can be cut."""

from vitrim.nn.attention import Attention
from vitrim.nn.axis import Axis, Member, Tap
from vitrim.nn.block import Block, Constant
from vitrim.nn.conv import Conv
from vitrim.nn.grid import fold_merges_, unmerge
from vitrim.nn.make import make_block, settled
from vitrim.nn.mlp import Mlp
from vitrim.nn.window import WindowBlock

__all__ = [
    "Attention",
    "Axis",
    "Block",
    "Constant",
    "Conv",
    "Member",
    "Mlp",
    "Tap",
    "WindowBlock",
    "fold_merges_",
    "make_block",
    "settled",
    "unmerge",
]
