"""The error classes of vitrim. Each is also a subclass of a builtin error, so that callers can catch that instead.

A message is one sentence: what must hold, what came, and what to do. The command line prints the message and exits
with status 2. Any other exception is a bug in vitrim; it exits with status 1 and a traceback.
"""

from vitrim.words.shorten import shortened

__all__ = [
    "AdoptError",
    "BudgetError",
    "DataError",
    "ExportError",
    "MethodError",
    "PlanError",
    "RecipeError",
    "RunError",
    "SpecError",
    "StoreError",
    "TrainError",
    "VitrimError",
    "WeightsError",
]


class VitrimError(Exception):
    """Base class of every error that vitrim raises on purpose."""

    def __str__(self) -> str:
        return shortened(super().__str__())


class SpecError(VitrimError, ValueError):
    """A description of a model contradicts itself."""


class PlanError(VitrimError, ValueError):
    """A plan cannot be carried out, or belongs to another model."""


class BudgetError(VitrimError, ValueError):
    """A budget is malformed or out of reach."""


class AdoptError(VitrimError, TypeError):
    """A model has a part that vitrim's blocks cannot represent."""


class WeightsError(VitrimError, ValueError):
    """Weights are unreadable, do not fit the model, or are not finite."""


class StoreError(VitrimError, OSError):
    """A stored model cannot be written or read."""


class DataError(VitrimError, ValueError):
    """A data source is unknown, empty, damaged, or does not fit the model."""


class MethodError(VitrimError, ValueError):
    """A method is unknown, or cannot do what was requested."""


class RecipeError(VitrimError, ValueError):
    """A recipe or a setting is not valid."""


class TrainError(VitrimError, ArithmeticError):
    """Training cannot go on: the loss or a gradient is no longer finite."""


class RunError(VitrimError, OSError):
    """A run folder cannot be used or finished."""


class ExportError(VitrimError, RuntimeError):
    """A model cannot be written for another runtime."""
