"""Check what a search found against the budget, and record it."""

import math
from collections.abc import Mapping
from typing import Any

from vitrim.families import describe
from vitrim.methods import Found
from vitrim.run.job import Job
from vitrim.words.budget import SLACK
from vitrim.words.costs import Cost, cost_of
from vitrim.words.errors import BudgetError, MethodError
from vitrim.words.spec import Spec, folded

__all__ = ["check_budget", "only_trial"]


def check_budget(job: Job, child: Spec) -> None:
    """Check that a child meets the budget of a run, and uses it up to 2 %.

    Raises:
        BudgetError: if it costs more.
        MethodError: if it costs less.
    """
    # Convolutions are trained together with the weights they are mixed from, and folded before they are stored.
    parent, cost = cost_of(job.spec), cost_of(folded(child))
    if job.budget.latency is not None:
        # The time was measured, so the other bounds need not be used up.
        others = job.budget.model_copy(update={"latency": None})
        if others.bounds() and not others.admits(cost, parent):
            raise BudgetError(f"what {job.recipe.method['name']} finds must cost at most {others}, but costs {cost}")
        return
    if not job.budget.admits(cost, parent):
        raise BudgetError(f"what {job.recipe.method['name']} finds must cost at most {job.budget}, but costs {cost}")
    if job.budget.spent(cost, parent) < 1 - SLACK:
        raise MethodError(
            f"what {job.recipe.method['name']} finds must spend at least {1 - SLACK:.0%} of {job.budget}, but spends "
            f"{job.budget.spent(cost, parent):.1%}; {_way_out(job, cost, parent)}"
        )


def _way_out(job: Job, cost: Cost, parent: Cost) -> str:
    """Return the way out if a budget is not used up: finer widths if the method has a choice, else a lower budget."""
    if job.recipe.method.get("choice", "free") != "free":
        return "choose finer widths with method.choice=free"
    shares = {
        name: math.ceil(1000 * getattr(cost, name) / getattr(parent, name)) / 1000 for name in job.budget.bounds()
    }
    return f"ask for what it reaches, --budget {','.join(f'{name}={share:g}' for name, share in shares.items())}"


def only_trial(found: Found) -> Mapping[str, Any]:
    """Return the record of a method that tries one plan alone."""
    cost = cost_of(folded(found.plan.child(describe(found.parent))))
    return {"trial": 0, "macs": cost.macs, "params": cost.params, "best": True}
