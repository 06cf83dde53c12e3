"""What a model costs by arithmetic, what PyTorch counts, and how long it takes on this machine."""

from vitrim.measure.clock import Latency, latency
from vitrim.measure.count import cost, counted
from vitrim.words.costs import Cost

__all__ = ["Cost", "Latency", "cost", "counted", "latency"]
