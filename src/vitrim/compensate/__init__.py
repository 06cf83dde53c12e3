"""Compensation on a model: listen to what every layer needs, cut block after block, and re-fit what stays."""

from vitrim.compensate.importance import Importance, importances
from vitrim.compensate.walk import Choice, compensated, recovered

__all__ = ["Choice", "Importance", "compensated", "importances", "recovered"]
