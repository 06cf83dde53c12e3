"""vitrim compresses a trained Vision Transformer into a smaller, faster, dense one.

This module is the public interface. Names are imported on first use, so that ``import vitrim`` does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitrim.cut.surgery import apply
    from vitrim.deploy.store import load, save
    from vitrim.families import adopt, describe
    from vitrim.measure import cost, latency
    from vitrim.run.pipeline import compress
    from vitrim.train import evaluate
    from vitrim.words.budget import Budget
    from vitrim.words.errors import VitrimError
    from vitrim.words.plan import Plan
    from vitrim.words.spec import Spec

__version__ = "0.1.0"

_HOMES = {
    "Budget": "words.budget",
    "Plan": "words.plan",
    "Spec": "words.spec",
    "VitrimError": "words.errors",
    "adopt": "families",
    "apply": "cut.surgery",
    "compress": "run.pipeline",
    "describe": "families",
    "cost": "measure",
    "evaluate": "train",
    "latency": "measure",
    "load": "deploy.store",
    "save": "deploy.store",
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


def __dir__() -> list[str]:
    return sorted(__all__)
