"""Compensation: record the activations of each block, cut the blocks in order, and re-fit the remaining weights."""

from vitrim.cut.compensate.attention import AttentionCut
from vitrim.cut.compensate.convs import ConvCut, images_needed
from vitrim.cut.compensate.enough import images_for_tokens
from vitrim.cut.compensate.hear import arriving, passed, resumed
from vitrim.cut.compensate.importance import Importance, importances
from vitrim.cut.compensate.neurons import NeuronCut
from vitrim.cut.compensate.place import BlockChoice, Place
from vitrim.cut.compensate.turned import turned
from vitrim.cut.compensate.walk import Walk, compensated, cut_block, recovered

__all__ = [
    "AttentionCut",
    "BlockChoice",
    "ConvCut",
    "Importance",
    "NeuronCut",
    "Place",
    "Walk",
    "arriving",
    "compensated",
    "cut_block",
    "images_for_tokens",
    "images_needed",
    "importances",
    "passed",
    "recovered",
    "resumed",
    "turned",
]
