"""Compensation on a model: listen to what every layer needs, cut block after block, and re-fit what stays."""

from vitrim.compensate.attention import AttentionCut
from vitrim.compensate.hear import arriving, passed, resumed
from vitrim.compensate.importance import Importance, frozen, importances
from vitrim.compensate.neurons import NeuronCut
from vitrim.compensate.place import Choice, Place
from vitrim.compensate.walk import Walk, compensated, recovered

__all__ = [
    "AttentionCut",
    "Choice",
    "Importance",
    "NeuronCut",
    "Place",
    "Walk",
    "arriving",
    "compensated",
    "frozen",
    "importances",
    "passed",
    "recovered",
    "resumed",
]
