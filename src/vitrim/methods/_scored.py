"""Methods that are a score and nothing else: what they share is here, and each file is only its score.

C channels of an axis.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from vitrim.cut.fill import Choice, Scored
from vitrim.cut.spend import Options, spend
from vitrim.families import describe
from vitrim.methods._contract import Data, Found
from vitrim.words.budget import Budget
from vitrim.words.plain import Node
from vitrim.words.spec import Spec

__all__ = ["ScoreMethod"]


class ScoreMethod(Node):
    """Keep the channels with the largest scores: a base class that leaves `scores` to be written.

    Attributes:
        needs: see `vitrim.methods.Method`.
        sentence: see `vitrim.methods.Method`.
        plans_by_time: see `vitrim.methods.Method`.
        by: what is cut first, see `vitrim.cut.fill.fill`: ``score`` where scores are ranks, ``density`` where they add
            up.
        choice: which widths are allowed, see `vitrim.cut.fill.Choice`.
    """

    needs: ClassVar[str] = "nothing"
    sentence: ClassVar[str]
    plans_by_time: ClassVar[bool] = True
    by: ClassVar[Literal["score", "density"]] = "score"

    choice: Choice = "even"

    @property
    def cuts_width(self) -> bool:
        """Return whether plans may cut the residual width: the setting ``width`` of methods that have it."""
        return bool(getattr(self, "width", False))

    def passes(self, spec: Spec, calibration: int, validation: int) -> float:
        """See `vitrim.methods.Method`; a forward and a backward pass of each calibration image, if it needs images."""
        return 0.0 if self.needs == "nothing" else 3.0 * calibration

    @abstractmethod
    def scores(self, model: nn.Module, data: Data | None, *, seed: int) -> Mapping[str, Tensor]:
        """Score every channel of `model`; larger is more valuable.

        Args:
            model: an adopted model; left as it was, bit for bit.
            data: images to look at; None where none were given.
            seed: of everything random.

        Returns:
            ``(C,)`` by path of an axis, as `vitrim.cut.observe.axes` names them; an axis without scores is not cut.

        Raises:
            MethodError: if the scores cannot be had, such as without data.
        """

    def options(self, model: nn.Module, data: Data | None, *, seed: int) -> Options:
        """See `vitrim.methods.Method.options`."""
        return Scored(self.scores(model, data, seed=seed), choice=self.choice, by=self.by)

    def search(
        self,
        model: nn.Module,
        data: Data | None,
        budget: Budget,
        *,
        seed: int,
        teacher: nn.Module | None = None,
        folder: Path | None = None,
        log: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> Found:
        """See `vitrim.methods.Method.search`; further budgets are read off the same options."""
        options, spec = self.options(model, data, seed=seed), describe(model)

        def read(budget: Budget) -> Found:
            return Found(plan=spend(spec, options, budget), parent=model, again=read)

        return read(budget)
