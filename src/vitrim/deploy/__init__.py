"""Stored models, and the forms they run in, here and elsewhere."""

from vitrim.cut.optimized import optimized

__all__ = ["optimized"]
