"""What every method promises.

A method looks at a dense model, some data and a budget, and finds a plan. It is a frozen value, a
`vitrim.words.plain.Node`, whose fields are its settings.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn
from torch.utils.data import Dataset

from vitrim.data import Input
from vitrim.train import Start
from vitrim.words.budget import Budget
from vitrim.words.plan import Plan

__all__ = ["Data", "Found", "Method"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """The images that a search may see; never those of the test split.

    Attributes:
        train: images to train on, with labels where the source has them.
        calibration: a few hundred images for scores.
        validation: images to compare candidates on, disjoint from both.
        input: size and normalisation of the model's input.
    """

    train: Dataset[Any] | None
    calibration: Dataset[Any] | None
    validation: Dataset[Any] | None
    input: Input


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a search found.

    Attributes:
        plan: what to cut from `parent`.
        parent: the model to cut; its weights may have moved while searching, the caller's model has not.
        grafts: parameters of the child that are no slice of the parent's, by name.
        trials: what was tried, flat records for ``trials.jsonl``.
        start: what the training of the child goes on from, by the child's names, where search and training are one.
        again: reads another budget off the same search, in seconds; None where each budget needs a search of its own.
    """

    plan: Plan
    parent: nn.Module
    grafts: Mapping[str, Tensor] = field(default_factory=dict)
    trials: tuple[Mapping[str, Any], ...] = ()
    start: Start | None = None
    again: "Callable[[Budget], Found] | None" = None


class Method(Protocol):
    """A way to find what to cut.

    Attributes:
        needs: ``"nothing"``, ``"images"`` or ``"labels"``; what data `search` cannot do without.
        sentence: what the method does, for ``vitrim methods``.

    Further attributes are read where a method has them:

    - ``plans_by_time = True`` says that the search prices specs by `Budget.cost` alone, and so by measured times too.
      For the others a budget of latency is turned into one of macs, see `vitrim.run.latency_budget`.
    - ``cuts_width`` says whether plans may cut the residual width, for which a table of times must be measured at two.
    - ``asks`` says in place of `needs` what an instance needs, where that depends on its settings.
    - ``passes(spec, calibration, validation)`` says how many forward passes of an image the search takes, beside its
      training, given the model's spec and the numbers of calibration and validation images; for the estimate of time
      at the start of a run.
    - ``choice`` says which widths are allowed, and a budget that these cannot reach is refused before the search.
    - ``least_images`` is the least number of images in one part of a training step that its children can take.
    - ``held_out`` is the number of training images, or their share if below 1, that its search compares candidates on.
      Without it `DataRecipe.validation` is 0 unless the user sets it.
    - ``calibrates(spec)`` is the number of calibration images that it asks for, given the model's spec. Without it,
      there are 256 unless the user sets ``DataRecipe.calibration``.
    - ``shared`` lists settings of `vitrim.train.Train` that the child's training must have in common with the search's
      (``train`` of the method), because both share one learning-rate cycle. What a recipe's ``train`` leaves out is
      then the search's, and another value is refused.
    - ``options(model, data, *, seed)`` returns what may be cut and what each cut is worth (`vitrim.cut.spend.Options`),
      without a budget. `vitrim.cut.spend.spend` reads a plan for any budget off them: by macs, parameters, measured
      time, or several at once. A method that has this half searches by calling both.
    - ``together`` says whether each of several processes calls the search, because all of them train; only the first
      gets a folder and a log. Without it, that is so for methods with a setting ``train``.
    - ``values = True`` says that the method makes sense for models whose outputs are not classes (features, a value);
      the others are refused for such models.
    """

    needs: ClassVar[str]
    sentence: ClassVar[str]

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
        """Find a plan for `model` within `budget`.

        Args:
            model: an adopted model; left as it was, bit for bit.
            data: images to look at; None for methods that need none.
            budget: what the child may cost.
            seed: the same seed on the same machine finds the same plan.
            teacher: a model whose outputs guide a search that trains.
            folder: where a long search keeps its checkpoints, so that it resumes.
            log: receives flat records of progress.

        Returns:
            A plan whose child is within `budget`, at most 2 % under.
        """
        ...
