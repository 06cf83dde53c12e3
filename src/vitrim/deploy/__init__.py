"""Store, open, export, quantize, time and publish models."""

from vitrim.cut.optimized import optimized

__all__ = ["optimized"]
