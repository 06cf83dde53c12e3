"""A recipe: everything that decides a run, as one strict TOML file.

A resolved recipe (`recipe.toml` of a run folder) names every setting, so that it says the same under later defaults.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

import tomli_w
from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from vitrim import methods
from vitrim.deploy.runtimes import RUNTIMES
from vitrim.methods import Method
from vitrim.train import Train
from vitrim.words.budget import Budget
from vitrim.words.errors import RecipeError, RunError, VitrimError
from vitrim.words.plain import NONE, Node, did_you_mean, dump, load, read_toml, write_text

__all__ = ["DataRecipe", "Measure", "ModelRecipe", "Recipe", "merged", "overrides", "read_recipe", "write_recipe"]


class ModelRecipe(Node):
    """Which model.

    Attributes:
        name: a timm name, an ``hf-hub:`` name, or a file that vitrim stored.
        weights: a weights file for a timm name; its pretrained weights are fetched otherwise.
        weights_key: which state dict of a file that holds several, such as ``model_ema``.
        random_weights: whether to start from random weights instead.
        arguments: further keyword arguments of ``timm.create_model``.
    """

    name: str
    weights: str | None = None
    weights_key: str | None = None
    random_weights: bool = False
    arguments: dict[str, Any] = Field(default_factory=dict)

    @field_validator("arguments")
    @classmethod
    def _given(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        # timm takes None for an argument that is not given.
        return {name: value for name, value in arguments.items() if value is not None}


class DataRecipe(Node):
    """Which images, and who may see them.

    Attributes:
        train: source of the training images, from which calibration and validation images are taken too.
        test: source of the test images; None for the test split of `train`, where it has one. No search sees it.
        class_map: file that gives class names their numbers.
        class_order: how class folders are numbered where no map says it: ``plain``, as torchvision, Keras and Hugging
            Face do; ``natural``, as timm does; ``auto``: where the two differ, the model itself is asked.
        depth: level of the folders that are the classes, from 1, below the source or its split; None where only one
            reading is possible.
        skip_damaged: decode every image once and leave out those that are damaged, instead of stopping at one.
        calibration: number of calibration images, for scores.
        validation: share (below 1) or number of training images that nothing is trained on. Searches that compare
            candidates do it on them, and accuracy on them after each epoch is logged and drawn. None for as many as the
            method asks for, which is 0 for most.
        mean, std: normalisation, where the model's own config is wrong.
    """

    train: str | None = None
    test: str | None = None
    class_map: str = ""
    class_order: Literal["auto", "plain", "natural"] = "auto"
    depth: PositiveInt | None = None
    skip_damaged: bool = False
    calibration: PositiveInt = 256
    validation: float | None = Field(default=None, ge=0)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


class Measure(Node):
    """How the child is measured against its parent.

    Attributes:
        latency: whether to time both.
        batch: images of one timed call.
        threads: CPU threads; None for the machine's.
        seconds: time spent on timing.
        runtime: what runs both, and what a budget of latency is met in.
        dtype: floating-point type; None for the model's own.
        as_stored: whether both run as they are stored, not in the form of `vitrim.deploy.optimized`.
    """

    latency: bool = True
    batch: PositiveInt = 8
    threads: PositiveInt | None = None
    seconds: float = Field(default=8.0, gt=0)
    runtime: str = "eager"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    as_stored: bool = False

    @field_validator("runtime")
    @classmethod
    def _known(cls, runtime: str) -> str:
        known = [name for name in RUNTIMES if name != "cudagraph"]
        if runtime not in known:
            raise ValueError(f"must be one of {', '.join(known)}, but got '{runtime}'{did_you_mean(runtime, known)}")
        return runtime


class Recipe(Node):
    """A whole run.

    Attributes:
        model: the parent.
        data: its images.
        method: ``name`` and the method's own settings. The name is one that ``vitrim methods`` lists, or the path of a
            Python file. Of methods that are not vitrim's a resolved recipe also holds ``source``, a digest of the
            source; a run goes on with that source alone.
        budget: what the child may cost, as text (`vitrim.words.budget.Budget.parse`).
        recover: ``ridge`` compensates what was cut in closed form on the calibration images, before any training,
            whatever the method; ``none`` leaves the weights as they were.
        teacher: who teaches where search and training distill; None for the parent. Any timm model that takes the
            parent's images and tells its classes apart, also one that vitrim cannot cut.
        train: how the child is trained against its teacher; ``epochs = 0``, the default, cuts only. Where a method
            trains its child on in the search's cycle of the learning rate (`cait`), what this table leaves out of
            `vitrim.train.RATES` is the search's.
        measure: how it is measured.
        seed: of everything random.
        device: where to run.
    """

    model: ModelRecipe
    data: DataRecipe = DataRecipe()
    method: dict[str, Any]
    budget: str
    recover: Literal["none", "ridge"] = "none"
    teacher: ModelRecipe | None = None
    train: Train = Train(epochs=0)
    measure: Measure = Measure()
    seed: NonNegativeInt = 0
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"

    @model_validator(mode="before")
    @classmethod
    def _take_shared(cls, asked: Any) -> Any:
        if not isinstance(asked, Mapping) or not isinstance(asked.get("train"), Mapping):
            return asked
        try:
            method = found_method(asked.get("method"))
        except VitrimError:
            return asked  # `resolved` says what is wrong
        shared = {name: getattr(method.train, name) for name in getattr(method, "shared", ())}
        return {**asked, "train": {**shared, **asked["train"]}}

    def resolved(self, method: Method | None = None) -> Self:
        """The same recipe with every setting of its method, and the digest of its source where it is not vitrim's.

        Args:
            method: the method itself, where the caller holds it; it is looked up by its name otherwise.

        Raises:
            MethodError: if the method or one of its settings is unknown.
            BudgetError: if the budget is malformed.
            RecipeError: if the child is to be trained otherwise than its method needs.
            RunError: if the recipe holds the digest of another source.
        """
        found = methods.origin(_name_of(self.method)) if method is None else methods.origin_of(method)
        was = self.method.get("source")
        if found.source is not None and was not in (None, found.source):
            way = "begin another run with --set method.source=null and another --out"
            raise RunError(_changed("a recipe", self.method, {"name": found.name, "source": found.source}, way))
        given: Any = found_method(self.method) if method is None else method
        return self._written(given, found.name, found.source, fill=method is not None)

    def resolved_as(self, now: Self, method: Method, folder: Path) -> Self:
        """The recipe of a run folder, resolved as `now`, which is to go on there.

        Args:
            now: a resolved recipe.
            method: its method.
            folder: for messages.

        Raises:
            RunError: if the folder's method is not vitrim's and its source was another.
        """
        source = self.method.get("source")
        if source is None:
            return self.resolved()
        if source != now.method.get("source"):
            raise RunError(_changed(f"{folder}: a run", self.method, now.method, "choose another --out"))
        # The source is the same, so that its class reads these settings, wherever its file lies now.
        found = replace(methods.origin_of(method), name=now.method["name"])
        return self._written(methods.make(found, _settings(self.method, found)), found.name, source)

    def _written(self, method: Any, name: str, source: str | None, fill: bool = False) -> Self:
        """The same recipe with the settings of `method` written out.

        Args:
            method: the method.
            name: its name.
            source: digest of its source.
            fill: whether `train` takes what it does not name of the learning-rate cycle from the method; where the
                recipe names the method, that is done as it is read.
        """
        given = self.train.model_fields_set if fill else set(Train.model_fields)
        shared = {key: getattr(method.train, key) for key in getattr(method, "shared", ())}
        train = self.train.model_copy(update={key: value for key, value in shared.items() if key not in given})
        for key, theirs in shared.items() if train.epochs else ():
            mine = getattr(train, key)
            if theirs != mine:
                raise RecipeError(
                    f"train.{key} must be {theirs} as in method.train, because {name} continues the learning-rate "
                    f"cycle of its search when it trains the child, but is {mine}; leave train.{key} out, or set both"
                )
        held = self.data.validation if self.data.validation is not None else getattr(method, "held_out", 0)
        table = {"name": name, **dump(method)} | ({} if source is None else {"source": source})
        return self.model_copy(
            update={
                "data": self.data.model_copy(update={"validation": float(held)}),
                "method": table,
                "train": train,
                "budget": str(Budget.parse(self.budget)),
            }
        )

    def found_method(self) -> Any:
        """The method that this recipe names.

        Raises:
            MethodError: if there is none, or one of its settings is unknown.
            RecipeError: if the recipe names none.
        """
        return found_method(self.method)


def found_method(asked: Any) -> Any:
    """The method that a recipe's table `asked` describes by its ``name`` and settings; see `Recipe.found_method`."""
    found = methods.origin(_name_of(asked))
    return methods.make(found, _settings(asked, found))


def _name_of(asked: Any) -> str:
    name = asked.get("name") if isinstance(asked, Mapping) else None
    if not isinstance(name, str):
        raise RecipeError(f"method.name: a recipe must name its method, but got {name!r}")
    return name


def _settings(asked: Mapping[str, Any], found: methods.Origin) -> dict[str, Any]:
    """The entries of the table of a method besides its name and, if it is not vitrim's, the digest of its source."""
    others = {"name"} if found.source is None else {"name", "source"}
    return {key: value for key, value in asked.items() if key not in others}


def _changed(what: str, was: Mapping[str, Any], now: Mapping[str, Any], way: str) -> str:
    then, today = (f"{table['name']} ({_short(table.get('source'))})" for table in (was, now))
    return (
        f"{what} must go on with the method that it began with, {then}, but got {today}; restore that source, or {way}"
    )


def _short(source: str | None) -> str:
    """A digest as people compare it: twelve of its digits."""
    before, colon, digits = (source or "of vitrim").rpartition(":")
    return f"{before}{colon}{digits[:12]}"


def read_recipe(path: Path) -> Recipe:
    """Read a TOML recipe; paths in it are taken from where the command runs, and ``"none"`` stands for None.

    Raises:
        RecipeError: naming the place and the near key.
    """
    return load(Recipe, read_toml(path), RecipeError, at=str(path))


def write_recipe(path: Path, recipe: Node) -> None:
    """Write a recipe as TOML, every setting of it: one that is None but not by default must not come back as such."""
    write_text(path, tomli_w.dumps(_spoken(dump(recipe))))


def _spoken(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _spoken(item) for key, item in value.items()}
    return NONE if value is None else value


def overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """Read ``key=value`` pairs into a nested dictionary; values are JSON where they can be, else text.

    ``none`` stays text, which a setting that may be None takes for it and one with a choice called none does not.

    Raises:
        RecipeError: if a pair has no ``=``, or a key is both a value and a table.
    """
    nested: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not all(key.split(".")):
            raise RecipeError(f"a setting must look like train.epochs=1, but got '{pair}'")
        table = nested
        *outer, last = key.strip().split(".")
        for name in outer:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise _both(key)
        if isinstance(table.get(last), dict):
            raise _both(key)
        table[last] = _value(text.strip())
    return nested


def _both(key: str) -> RecipeError:
    return RecipeError(f"{key}: a setting must be a value or a table, but is given as both; leave one out")


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return {"None": None, "True": True, "False": False}.get(text, text)


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the tables and values of `over` laid on top."""
    out = dict(base)
    for key, value in over.items():
        mine = out.get(key)
        out[key] = merged(mine, value) if isinstance(mine, Mapping) and isinstance(value, Mapping) else value
    return out
