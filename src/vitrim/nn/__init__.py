"""Modules built from spec nodes. Each declares the axes along which it can be cut."""

from vitrim.nn.attention import Attention
from vitrim.nn.axis import Axis, Member, Tap
from vitrim.nn.block import Block, Constant
from vitrim.nn.mlp import Mlp

__all__ = ["Attention", "Axis", "Block", "Constant", "Member", "Mlp", "Tap"]
