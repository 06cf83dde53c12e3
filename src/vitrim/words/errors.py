"""One error tree. Each leaf is also a builtin, so that callers may catch what they know.

A message says what must hold, then what came, then the way out, in one sentence. The command line prints that
sentence and exits 2; any other exception is a bug of ours and exits 1 with its traceback.
"""

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
    """Root of every error that vitrim raises on purpose."""


class SpecError(VitrimError, ValueError):
    """A description of a model contradicts itself."""


class PlanError(VitrimError, ValueError):
    """A plan cannot be carried out, or belongs to another model."""


class BudgetError(VitrimError, ValueError):
    """A budget is malformed or out of reach."""


class AdoptError(VitrimError, TypeError):
    """A model has a part that our blocks cannot represent."""


class WeightsError(VitrimError, ValueError):
    """Weights are unreadable, do not fit the model, or are not finite."""


class StoreError(VitrimError, OSError):
    """A stored model cannot be written or read."""


class DataError(VitrimError, ValueError):
    """A data source is unknown, empty, damaged, or does not fit the model."""


class MethodError(VitrimError, ValueError):
    """A method is unknown, or asked for something it cannot do."""


class RecipeError(VitrimError, ValueError):
    """A recipe or a setting is malformed."""


class TrainError(VitrimError, ArithmeticError):
    """Training cannot go on: the loss or a gradient is no longer finite."""


class RunError(VitrimError, OSError):
    """A run folder cannot be used or finished."""


class ExportError(VitrimError, RuntimeError):
    """A model cannot be written for another runtime."""
