"""Cost of a model: computed from its spec, counted by PyTorch, and measured as latency on this machine."""

from vitrim.measure.clock import Latency, latency
from vitrim.measure.count import cost, counted
from vitrim.words.costs import Cost

__all__ = ["Cost", "Latency", "cost", "counted", "latency"]
