"""Open everything that a run needs, and refuse what cannot work before any file is written."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrim import methods
from vitrim.cut.fill import fill
from vitrim.cut.observe import axes
from vitrim.cut.outputs import gives_values
from vitrim.data import CALIBRATION, Input, Splits, images_of
from vitrim.data.splits import TooFewError
from vitrim.deploy import store
from vitrim.deploy.parent import open_parent, open_teacher
from vitrim.deploy.runtimes import check_runtimes
from vitrim.families import AROUND, describe
from vitrim.families._given import check_class
from vitrim.methods import Method
from vitrim.nn.weights import fingerprint
from vitrim.run.images import FILE, about, check_record, known_order, open_splits
from vitrim.run.latency_budget import table_for
from vitrim.run.lock import FILE as LOCK
from vitrim.run.machine import device_of, on_machine
from vitrim.run.recipe import ModelRecipe, Recipe
from vitrim.run.track import Tracked
from vitrim.train import Train, ranks
from vitrim.train.fit import check_batch
from vitrim.train.leading import check_alike, led, together
from vitrim.words.budget import Budget
from vitrim.words.errors import DataError, RecipeError, RunError, VitrimError
from vitrim.words.plain import dump, load, read_toml, reason
from vitrim.words.private import hide_passwords
from vitrim.words.spec import Spec

__all__ = ["Job", "check_folder", "full_disk", "leaving_nothing", "prepare"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What all stages of a run share."""

    recipe: Recipe
    budget: Budget
    parent: nn.Module
    teacher: nn.Module
    spec: Spec
    splits: Splits | None
    input: Input
    trains: bool
    folder: Path | None
    say: Callable[[str], None]
    tracked: Tracked = field(default_factory=lambda: Tracked(None))

    def file(self, name: str) -> Path | None:
        """The path of a file of the run folder, if there is one."""
        return None if self.folder is None else self.folder / name

    def has(self, name: str) -> bool:
        """Whether the run folder already holds this file."""
        path = self.file(name)
        return path is not None and path.is_file()


@contextlib.contextmanager
def full_disk(folder: Path | None) -> Iterator[None]:
    """Turn the operating system's error for a full or read-only disk into one sentence.

    Raises:
        RunError: in place of the system's error; the run can be resumed in the folder.
    """
    try:
        yield
    except OSError as problem:
        inside = problem.filename is None or (folder is not None and Path(problem.filename).is_relative_to(folder))
        if isinstance(problem, VitrimError) or problem.strerror is None or folder is None or not inside:
            raise
        raise RunError(
            f"{folder}: the output folder must be writable and have free space, but {reason(problem)}; "
            "make room and run the same command again to resume"
        ) from None


@contextlib.contextmanager
def leaving_nothing(folder: Path | None) -> Iterator[None]:
    """Remove a new run folder again if a failure leaves nothing in it but the recipe and the record of images."""
    new = folder is not None and not (folder.is_dir() and any(folder.iterdir()))
    made = [] if folder is None else [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except Exception:
        if folder is not None and new:
            with contextlib.suppress(OSError):
                if {path.name for path in folder.iterdir()} <= {"recipe.toml", FILE, LOCK}:
                    for path in list(folder.iterdir()):
                        path.unlink()
                for path in made:
                    path.rmdir()
        raise


def check_folder(folder: Path | None, recipe: Any, method: Method | None = None) -> None:
    """Refuse a run folder unless it is new, empty, or holds a run of the same recipe.

    Args:
        folder: the run folder.
        recipe: a resolved recipe.
        method: its method, if it has one.

    Raises:
        RunError: naming the settings that differ, or the method, if its source has changed.
    """
    if folder is None or not folder.exists():
        return
    if not folder.is_dir():
        raise RunError(f"{folder}: the output must be a folder, but it is a file; choose another")
    known = folder / "recipe.toml"
    if known.is_file():
        written = read_toml(known)
        if written.get("task") != dump(recipe).get("task"):
            raise RunError(f"{folder}: the folder must be new or hold the same recipe, but holds another kind of run")
        stored = load(type(recipe), written, RecipeError, at=str(known))
        before = on_machine(stored.resolved() if method is None else stored.resolved_as(recipe, method, folder))
        # Passwords are not written, and workers do not change the result.
        differing = [at for at in _differences(*map(hide_passwords, map(dump, (before, recipe)))) if at not in _FREE]
        if differing:
            raise RunError(
                f"{folder}: the folder must be new or hold the same recipe, but its recipe differs in "
                f"{', '.join(differing)}; choose another --out"
            )
    elif any(not path.name.startswith((".recipe.toml.", LOCK)) for path in folder.iterdir()):
        raise RunError(
            f"{folder}: the output folder must be new, empty or a run's, but it holds other files; choose another --out"
        )


_FREE = ("train.workers", "method.train.workers")
"""Settings that may change when a run goes on."""


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
    """Open everything that a run needs, and refuse what cannot work before any file is written.

    Every one of several processes calls this; what the folder holds and times are the first's.
    """
    budget = Budget.parse(recipe.budget)
    check_runtimes([recipe.measure.runtime])
    needs = getattr(method, "asks", method.needs)
    if data[0] is None and (needs != "nothing" or recipe.train.epochs):
        what = f"{recipe.method['name']} needs {needs}" if needs != "nothing" else "training needs images"
        raise DataError(f"data must be given, but there is none and {what}; give --data SRC")
    say(f"opening {recipe.model.name}")
    parent = together(lambda: _opened(recipe, parent, say))
    order = led(lambda: known_order(folder))
    if budget.latency is not None:
        timed, width = parent, bool(getattr(method, "cuts_width", False))
        table = led(lambda: table_for(timed, recipe.measure, width=width, say=say))
        budget = budget.model_copy(update={"table": table})
    job = together(lambda: _ready(recipe, method, budget, folder, parent, order, data, say))
    found = about(job.splits) if ranks.count() > 1 else None
    if found is not None:
        images = {f"{name} images": part["fingerprint"] for name, part in found["parts"].items() if part["fingerprint"]}
        check_alike({"weights": fingerprint(parent), "teacher": fingerprint(job.teacher), **images})
    return job


def _opened(recipe: Recipe, parent: nn.Module | None, say: Callable[[str], None]) -> nn.Module:
    """Return the parent on its device."""
    if parent is None:
        parent = open_parent(**dump(recipe.model), seed=recipe.seed, say=say)
    elif recipe.model != ModelRecipe(name=recipe.model.name):
        raise RecipeError("a model in memory must be taken as it is, but settings of model are given; leave them out")
    return parent.to(device_of(recipe.device)).eval()


def _ready(
    recipe: Recipe,
    method: Method,
    budget: Budget,
    folder: Path | None,
    parent: nn.Module,
    order: str,
    data: tuple[Any, Any],
    say: Callable[[str], None],
) -> Job:
    if folder is not None and recipe.model.name.startswith("("):
        _check_storable(parent, folder)
    spec = describe(parent)
    if spec.family in AROUND and any(source is not None for source in data):
        raise RecipeError(
            f"{recipe.model.name}: with images that have classes a classifier must be compressed, but this is a "
            f"{spec.family}; compress its backbone and transfer that, or cut without data (method magnitude)"
        )
    _check_reach(parent, spec, budget, method)
    _check_parts(recipe, method)
    chosen = {key: value for key in ("mean", "std") if (value := getattr(recipe.data, key)) is not None}
    input = Input.of(parent, **chosen)
    splits = _splits(recipe, method, data, parent, spec, input, order, say)
    check_record(folder, about(splits))
    _check_outputs(recipe, method, spec, splits)
    return Job(
        recipe=recipe,
        budget=budget,
        parent=parent,
        teacher=_teacher(recipe, parent, spec, input, say),
        spec=spec,
        splits=splits,
        input=input,
        trains=data[0] is not None,
        folder=folder,
        say=say,
    )


def _check_storable(parent: nn.Module, folder: Path) -> None:
    """Refuse a model in memory whose child could not be stored, before the search.

    Raises:
        AdoptError: if its class overrides methods.
        StoreError: if anything else in it is not part of its spec.
    """
    check_class(parent)
    with tempfile.TemporaryDirectory(dir=next(place for place in folder.absolute().parents if place.exists())) as place:
        store.save(parent, Path(place) / store.FILE)


def _check_reach(parent: nn.Module, spec: Spec, budget: Budget, method: Method) -> None:
    """Refuse a budget that no plan can reach, before a long search.

    Raises:
        BudgetError: naming the smallest cost that is possible.
    """
    budget.limits(budget.cost(spec))
    choice = getattr(method, "choice", None)
    if choice is not None and (budget.latency is None or getattr(method, "plans_by_time", False)):
        fill(spec, {path: torch.zeros(axis.size) for path, axis in axes(parent).items()}, budget, choice=choice)


def _check_outputs(recipe: Recipe, method: Method, spec: Spec, splits: Splits | None) -> None:
    """Refuse a method that compares predicted classes if the model's outputs are not classes.

    Raises:
        RecipeError: naming the methods that accept such a model.
    """
    labeled = splits is not None and bool((splits.train.labels >= 0).all())
    if gives_values(spec.classes, labeled) and not getattr(method, "values", False):
        what = "has no head" if spec.classes == 0 else "has one output, and its images have no labels"
        known = [name for name in methods.names() if getattr(methods.settings_of(name), "values", False)]
        raise RecipeError(
            f"{recipe.method['name']} must have a model that tells classes apart, but {recipe.model.name} {what}; "
            f"take {', '.join(known)}"
        )


class _Renormalised(nn.Module):
    """A teacher that receives images normalised for another model."""

    def __init__(self, teacher: nn.Module, given: Input, wanted: Input) -> None:
        super().__init__()
        self.teacher = teacher
        (mean, std), (its_mean, its_std) = (torch.tensor((i.mean, i.std)).view(2, -1, 1, 1) for i in (given, wanted))
        like = next(teacher.parameters())
        self.scale = nn.Buffer((std / its_std).to(like))
        self.shift = nn.Buffer(((mean - its_mean) / its_std).to(like))

    def forward(self, x: Tensor) -> Any:
        """The teacher's outputs for images ``(B, C, h, w)`` that are normalised for the other model."""
        return self.teacher(x * self.scale + self.shift)


def _check_parts(recipe: Recipe, method: Method) -> None:
    """Refuse training settings that a method's children cannot be trained with, before a long search.

    Raises:
        RecipeError: if each part of a batch would hold too few images for the child's batch norms, or the processes
            cannot share a batch.
    """
    settings, least = recipe.train, getattr(method, "least_images", 1)
    for at, each in (("train", settings), ("method.train", getattr(method, "train", None))):
        if isinstance(each, Train) and each.epochs:
            check_batch(each, at)
    parts = settings.accumulate * ranks.count()
    if settings.epochs and settings.batch // parts < least:
        raise RecipeError(
            f"train.batch must give the batch norms that {recipe.method['name']} makes at least {least} images at a "
            f"time, but is {settings.batch} in {parts} parts; raise it, or lower train.accumulate"
        )


@torch.no_grad()
def _teacher(recipe: Recipe, parent: nn.Module, spec: Spec, input: Input, say: Callable[[str], None]) -> nn.Module:
    """Return the teacher: the parent, or the model that the recipe names, with its own normalisation.

    Raises:
        RecipeError: if it does not accept the parent's images, or has another number of classes.
    """
    if recipe.teacher is None:
        return parent
    say(f"opening {recipe.teacher.name} to teach")
    teacher = open_teacher(**dump(recipe.teacher), seed=recipe.seed, say=say).to(next(parent.parameters()).device)
    theirs = Input.of(teacher)
    if (theirs.mean, theirs.std) != (input.mean, input.std):
        teacher = _Renormalised(teacher, input, theirs)
    example = torch.zeros(1, input.channels, *input.size, device=next(teacher.parameters()).device)
    try:
        classes = teacher(example).shape[-1]
        wanted = spec.classes or parent(example).shape[-1]
    except (RuntimeError, ValueError, AssertionError) as problem:
        raise RecipeError(
            f"teacher: {recipe.teacher.name} must take images of {input.size[0]} x {input.size[1]}, but says: "
            f"{reason(problem)}; choose another"
        ) from None
    if classes != wanted:
        raise RecipeError(
            f"teacher: {recipe.teacher.name} must tell the model's {wanted} classes apart, but has {classes}; "
            "choose another"
        )
    return teacher


_FIFTH = 0.2
"""Share of the images that is held out where there are fewer than a method asks to hold out."""


def _splits(
    recipe: Recipe,
    method: Method,
    data: tuple[Any, Any],
    parent: nn.Module,
    spec: Spec,
    input: Input,
    order: str,
    say: Callable[[str], None],
) -> Splits | None:
    train, test = (images_of(source, spec.classes) for source in data)
    if train is not None or test is not None:
        say(f"reading {recipe.data.train or 'images'}")

    asks = getattr(method, "calibrates", None)
    wanted = CALIBRATION if asks is None else asks(spec)

    def opened(validation: float | None) -> Splits | None:
        return open_splits(
            recipe.data, train, test, model=parent, input=input, classes=spec.classes, seed=recipe.seed,
            validation=validation, calibration=wanted, order=order, say=say,
        )  # fmt: skip

    try:
        parts = opened(None)
    except TooFewError:
        held = getattr(method, "held_out", 0)
        if held <= 1 or recipe.data.validation != held:
            raise
        name = recipe.method["name"]
        say(f"there are too few images to hold out the {held:g} that {name} asks for; a fifth is held out")
        parts = opened(_FIFTH)
    return parts
