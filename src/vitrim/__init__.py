"""vitrim takes a trained Vision Transformer and gives back a smaller, really faster, dense one.

The front door. Names are fetched on first use, so that ``import vitrim`` does not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitrim.budget import Budget
    from vitrim.errors import VitrimError
    from vitrim.families import adopt, describe
    from vitrim.measure import cost, latency
    from vitrim.plan import Plan
    from vitrim.run import compress
    from vitrim.spec import Spec
    from vitrim.store import load, save
    from vitrim.surgery import apply
    from vitrim.train import evaluate

__version__ = "0.1.0"

_HOMES = {
    "Budget": "budget",
    "Plan": "plan",
    "Spec": "spec",
    "VitrimError": "errors",
    "adopt": "families",
    "apply": "surgery",
    "compress": "run",
    "describe": "families",
    "cost": "measure",
    "evaluate": "train",
    "latency": "measure",
    "load": "store",
    "save": "store",
}

__all__ = [
    "Budget",
    "Plan",
    "Spec",
    "VitrimError",
    "adopt",
    "apply",
    "compress",
    "cost",
    "describe",
    "evaluate",
    "latency",
    "load",
    "save",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'vitrim' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"vitrim.{home}"), name)
    globals()[name] = value
    return value
