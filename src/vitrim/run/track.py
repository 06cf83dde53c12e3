"""Send a run to experiment trackers, through Accelerate: its recipe, losses, trials and final table."""

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from vitrim.report import as_markdown, result
from vitrim.run.presets import leaves
from vitrim.run.recipe import Recipe
from vitrim.words.errors import RecipeError
from vitrim.words.plain import did_you_mean, dump

__all__ = ["PROJECT", "TRACKERS", "Tracked", "check_trackers", "names_of", "tracking"]

TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}
"""The module that each tracker needs, by its name; each is an extra of the package."""

PROJECT = "vitrim"
"""Name of the project in the trackers, and of the folder of TensorBoard's files in a run folder."""

Log = Callable[[Mapping[str, Any]], None]

_NOT_SHOWN = ("stage", "event", "epoch", "step", "trial", "best")


def names_of(text: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return the names in a text such as ``tensorboard,wandb``, or in several texts."""
    texts = [] if text is None else [text] if isinstance(text, str) else text
    return tuple(dict.fromkeys(name.strip() for part in texts for name in part.split(",") if name.strip()))


def check_trackers(names: Sequence[str], folder: Path | None) -> None:
    """Refuse trackers that are unknown or not installed, before a long run.

    Raises:
        RecipeError: naming the tracker and how to install it.
    """
    for name in names:
        if name not in TRACKERS:
            known = ", ".join(TRACKERS)
            near = did_you_mean(name, TRACKERS) if "did you mean" in did_you_mean(name, TRACKERS) else ""
            raise RecipeError(f"a tracker must be one of {known}, but got '{name}'{near}")
        if importlib.util.find_spec(TRACKERS[name]) is None:
            raise RecipeError(
                f"{name} must be installed to track a run with it, but is not; pip install 'vitrim[{name}]', or leave "
                "it out"
            )
        if name == "tensorboard" and folder is None:
            raise RecipeError("tensorboard must have a run folder to write to, but there is none; give out")


class Tracked:
    """Sends records to the trackers of an accelerator; without trackers it does nothing.

    Steps of all stages are counted on, because trackers expect steps that do not go back.
    """

    def __init__(self, accelerator: Accelerator | None) -> None:
        self.accelerator = accelerator
        self.step = self.before = 0
        self.stage: Any = None

    def record(self, record: Mapping[str, Any]) -> None:
        """Send a record of ``log.jsonl``: every number in it, under its stage."""
        if record.get("event") == "progress":
            return
        stage, own = record.get("stage"), record.get("step")
        if stage != self.stage:
            self.stage, self.before = stage, self.step
        if isinstance(own, int):
            self.step = max(self.step, self.before + own)
        inner = f"{stage}/epoch" if record.get("event") == "epoch" else str(stage)
        self._send({f"{inner}/{name}": value for name, value in record.items() if _number(name, value)})

    def trials(self, trials: Sequence[Mapping[str, Any]]) -> None:
        """Send what a search tried, one step for each."""
        for trial in trials:
            self.step += 1
            self._send({f"trials/{name}": value for name, value in trial.items() if _number(name, value)})

    def measured(self, measured: Mapping[str, Any]) -> None:
        """Send all measured numbers, and the table of parent and child as Markdown."""
        table = result(dict(measured))
        self._send({f"result/{name}": value for name, value in measured.items() if _number(name, value)})
        self._send({"result/table": as_markdown(table)})

    def logging(self, log: Log | None) -> Log | None:
        """Return a function that calls `log` and sends the record, too."""
        if self.accelerator is None:
            return log

        def both(record: Mapping[str, Any]) -> None:
            if log is not None:
                log(record)
            self.record(record)

        return both

    def _send(self, values: dict[str, Any]) -> None:
        if self.accelerator is not None and values:
            self.accelerator.log(values, step=self.step)


def _number(name: str, value: Any) -> bool:
    return name not in _NOT_SHOWN and isinstance(value, int | float) and not isinstance(value, bool)


@contextlib.contextmanager
def tracking(names: Sequence[str], recipe: Recipe, folder: Path | None) -> Iterator[Tracked]:
    """Open trackers inside the context, with the recipe as configuration.

    Args:
        names: see `TRACKERS`; empty for none.
        recipe: the resolved recipe.
        folder: the run folder, whose name is that of the run.
    """
    if not names:
        yield Tracked(None)
        return
    accelerator = Accelerator(log_with=list(names), project_dir=None if folder is None else str(folder))
    config = {".".join(path): _plain(value) for path, value in leaves(dump(recipe))}
    title = recipe.method["name"] if folder is None else folder.name
    named = {"wandb": {"name": title}, "trackio": {"name": title}}
    accelerator.init_trackers(
        PROJECT, config=config, init_kwargs={name: named[name] for name in names if name in named}
    )
    try:
        yield Tracked(accelerator)
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


def _plain(value: Any) -> str | int | float | bool:
    """Return a value that every tracker takes as a setting."""
    if value is None:
        return "none"
    return value if isinstance(value, str | int | float | bool) else str(value)
