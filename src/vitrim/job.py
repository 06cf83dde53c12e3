"""Open all that a run needs, and refuse what cannot work before the first file is written."""

import contextlib
import errno
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vitrim.budget import Budget
from vitrim.contract import Method
from vitrim.costs import cost_of
from vitrim.data import Images, Input, Splits, check_classes, split
from vitrim.errors import DataError, RecipeError, RunError, VitrimError
from vitrim.families import describe
from vitrim.parent import open_parent
from vitrim.plain import dump
from vitrim.recipe import Recipe, read_recipe
from vitrim.spec import Spec

__all__ = ["Job", "check_folder", "full_disk", "images_of", "prepare"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What all stages of one run share."""

    recipe: Recipe
    budget: Budget
    parent: nn.Module
    spec: Spec
    splits: Splits | None
    input: Input
    folder: Path | None
    say: Callable[[str], None]

    def file(self, name: str) -> Path | None:
        """The path of a file of the run folder, if there is one."""
        return None if self.folder is None else self.folder / name

    def has(self, name: str) -> bool:
        """Whether an earlier run left this file."""
        path = self.file(name)
        return path is not None and path.is_file()


@contextlib.contextmanager
def full_disk(folder: Path | None) -> Iterator[None]:
    """Turn what an operating system says of a full or locked disk into one sentence.

    Raises:
        RunError: in place of the system's own error; the run folder is good to go on.
    """
    try:
        yield
    except OSError as problem:
        if isinstance(problem, VitrimError) or problem.errno not in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EROFS,
            errno.EACCES,
        ):
            raise
        raise RunError(
            f"{folder}: the output folder must be writable and have free space, but {problem.strerror}; "
            "make room and run the same command again, it goes on from here"
        ) from None


def check_folder(folder: Path | None, recipe: Recipe) -> None:
    """Refuse a run folder that is not new, empty, or of the same recipe.

    Raises:
        RunError: naming the settings that differ.
    """
    if folder is None or not folder.exists():
        return
    if not folder.is_dir():
        raise RunError(f"{folder}: the output must be a folder, but it is a file; choose another")
    known = folder / "recipe.toml"
    if known.is_file():
        before = read_recipe(known)
        if before != recipe:
            raise RunError(
                f"{folder}: the folder must be new or hold the same recipe, but its recipe differs in "
                f"{', '.join(_differences(dump(before), dump(recipe)))}; choose another --out"
            )
    elif any(folder.iterdir()):
        raise RunError(f"{folder}: the output folder must be new, empty or a run's, but it holds other files")


def _differences(a: Mapping[str, Any], b: Mapping[str, Any], at: str = "") -> list[str]:
    found: list[str] = []
    for key in sorted(set(a) | set(b)):
        one, two = a.get(key), b.get(key)
        if isinstance(one, Mapping) and isinstance(two, Mapping):
            found += _differences(one, two, f"{at}{key}.")
        elif one != two:
            found.append(f"{at}{key}")
    return found


def prepare(
    recipe: Recipe,
    method: Method,
    folder: Path | None,
    parent: nn.Module | None,
    data: tuple[Any, Any],
    say: Callable[[str], None],
) -> Job:
    """Open all that a run needs and refuse what cannot work, before the first file is written."""
    budget = Budget.parse(recipe.budget)
    if data[0] is None and (method.needs != "nothing" or recipe.train.epochs):
        what = f"{recipe.method['name']} needs {method.needs}" if method.needs != "nothing" else "training needs images"
        raise DataError(f"data must be given, but there is none and {what}; give --data SRC")
    say(f"opening {recipe.model.name}")
    if parent is None:
        parent = open_parent(**dump(recipe.model))
    parent = parent.to(_device(recipe.device)).eval()
    spec = describe(parent)
    budget.limits(cost_of(spec))
    chosen = {key: value for key in ("mean", "std") if (value := getattr(recipe.data, key)) is not None}
    return Job(
        recipe=recipe,
        budget=budget,
        parent=parent,
        spec=spec,
        splits=_splits(recipe, data, spec, say),
        input=Input.of(parent, **chosen),
        folder=folder,
        say=say,
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise RecipeError("device must be one of this machine's, but there is no CUDA device; use device=auto")
    return torch.device(name)


def _splits(recipe: Recipe, data: tuple[Any, Any], spec: Spec, say: Callable[[str], None]) -> Splits | None:
    train, test = (images_of(source) for source in data)
    first = test if train is None else train
    if first is None:
        return None
    say(f"reading {recipe.data.train or 'images'}")
    splits = split(
        first,
        test,
        calibration=recipe.data.calibration,
        validation=recipe.data.validation,
        seed=recipe.seed,
        class_map=recipe.data.class_map,
        classes=spec.classes,
    )
    for part in (splits.train, splits.test):
        if part is not None:
            check_classes(part, spec.classes)
    return splits


def images_of(source: Any) -> str | Images | None:
    """Bring what a caller may give as data into one form.

    Args:
        source: a source string, opened images, a dataset of (PIL image or ready tensor ``(C, h, w)``, label), a loader
            of batches, or None. Of a shuffled or random loader one pass is kept, as it came.

    Raises:
        DataError: if it is none of these.
    """
    if source is None or isinstance(source, str | Images):
        return source
    name = type(source).__name__
    if isinstance(source, DataLoader) or (isinstance(source, Iterable) and not isinstance(source, Dataset)):
        pictures, labels = _unbatch(source)
        held: Any = pictures
        return Images(lambda i: held[i], labels, classes=int(labels.max(initial=-1)) + 1, source=name)
    if isinstance(source, Dataset) and hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        labels = _labels(source)
        items: Any = source
        return Images(lambda i: items[i][0], labels, classes=int(labels.max(initial=-1)) + 1, source=name)
    raise DataError(f"data must be a source, a dataset or a loader of (images, labels), but got {name}")


def _labels(dataset: Any) -> Any:
    known = getattr(dataset, "targets", None)
    if known is None:
        known = [int(dataset[i][1]) for i in range(len(dataset))]
    return np.asarray(known, dtype=np.int64)


def _unbatch(batches: Iterable[Any]) -> tuple[list[Tensor], Any]:
    pictures: list[Tensor] = []
    labels: list[int] = []
    for batch in batches:
        if not isinstance(batch, list | tuple) or len(batch) != 2 or not isinstance(batch[0], Tensor):
            raise DataError("a loader must give (images, labels), but gave something else; give a dataset instead")
        pictures += list(batch[0])
        labels += [int(label) for label in batch[1]]
    return pictures, np.asarray(labels, dtype=np.int64)
