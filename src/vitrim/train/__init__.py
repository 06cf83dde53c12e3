"""The training loop with its settings, and evaluation."""

from vitrim.train.distill import Objective
from vitrim.train.evaluate import Evaluated, evaluate, reference_logits
from vitrim.train.fit import Fitted, Task, fit, steps_of
from vitrim.train.loop import Stop
from vitrim.train.optim import learning_rate, parameter_groups
from vitrim.train.settings import DISTILLED, RATES, Distill, Train
from vitrim.train.start import Start

__all__ = [
    "DISTILLED",
    "RATES",
    "Distill",
    "Evaluated",
    "Fitted",
    "Objective",
    "Start",
    "Stop",
    "Task",
    "Train",
    "evaluate",
    "fit",
    "learning_rate",
    "parameter_groups",
    "reference_logits",
    "steps_of",
]
