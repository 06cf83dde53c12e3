"""A recipe: everything that decides a run, as one strict TOML file.

A resolved recipe (`recipe.toml` of a run folder) names every setting, so that later changes of defaults do not change
what it means.
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
from vitrim.words.parsing import DEEPEST, shown, why_not_plain
from vitrim.words.plain import NONE, Node, did_you_mean, dump, load, read_toml, types_of, write_text
from vitrim.words.private import hide_passwords

__all__ = ["DataRecipe", "Measure", "ModelRecipe", "Recipe", "merged", "overrides", "read_recipe", "write_recipe"]


class ModelRecipe(Node):
    """Which model.

    Attributes:
        name: a timm name, an ``hf-hub:`` name, a file that vitrim stored, or a folder of Hugging Face transformers.
        weights: a weights file for a timm name; its pretrained weights are fetched otherwise.
        weights_key: which state dict to take from a file that holds several, such as ``model_ema``.
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
    """Which images to use, and for what.

    Attributes:
        train: source of the training images, from which calibration and validation images are taken too.
        test: source of the test images; None for the test split of `train`, where it has one. Searches never use it.
        class_map: file that lists the class names in the order of their numbers.
        class_order: how class folders are numbered without a class map: ``plain``, as torchvision, Keras and Hugging
            Face do; ``natural``, as timm does; ``auto``: where the two differ, the one under which the model fits the
            training images better.
        depth: which level of folders below the source (or its split) holds the classes, from 1; None where only one
            level is possible.
        skip_damaged: decode every image once and leave out damaged ones, instead of stopping at the first.
        calibration: number of calibration images, for scores. None for as many as the method asks for, which is 256 for
            most.
        validation: number of training images to hold out, or their share if below 1. Searches compare candidates on
            them, and accuracy on them is logged and drawn after each epoch. None for as many as the method asks for,
            which is 0 for most.
        cache: share of the device's free memory that prepared training images may take, in [0, 1]; 0 reads them again
            in each epoch. Images that differ from call to call are never kept, nor are crops (``augment.kind=full``).
        mean, std: normalisation, where the model's own config is wrong.
    """

    train: str | None = None
    test: str | None = None
    class_map: str = ""
    class_order: Literal["auto", "plain", "natural"] = "auto"
    depth: PositiveInt | None = None
    skip_damaged: bool = False
    calibration: PositiveInt | None = None
    validation: float | None = Field(default=None, ge=0)
    cache: float = Field(default=0.25, ge=0, le=1)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


class Measure(Node):
    """How the child is measured against its parent.

    Attributes:
        latency: whether to time both.
        batch: images of one timed call.
        threads: CPU threads; None for the machine's.
        seconds: how long to time both models, in all.
        runtime: which runtime runs both; a budget of latency is met in the same one.
        dtype: floating-point type; None for the model's own.
        as_stored: whether to time both as they are stored instead of in the form that `vitrim.deploy.optimized` gives.
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
            Python file. For methods that are not vitrim's, a resolved recipe also holds ``source``, a digest of the
            source code; a run resumes only with the same source.
        budget: upper bounds on the child's cost, as text (`vitrim.words.budget.Budget.parse`).
        recover: ``ridge`` corrects the remaining weights in closed form (ridge regression on the calibration images)
            after the cut and before any training, with every method; ``none`` leaves the weights as they are; ``auto``
            is ``ridge`` where it applies and helps: the child is not trained, there are images, the method does not set
            the weights of the child itself, and its outputs come nearer to the parent's.
        teacher: the model that search and training distill from; None for the parent. Any timm model with the parent's
            image size and classes, even one that vitrim cannot cut.
        train: how the child is trained; ``epochs = 0``, the default, means no training. Where a method continues the
            learning-rate cycle of its search (`cait`), the settings of `vitrim.train.RATES` that this table leaves out
            are the search's.
        measure: how the child is compared with its parent.
        seed: seed of all random draws.
        device: which device to compute on.
    """

    model: ModelRecipe
    data: DataRecipe = DataRecipe()
    method: dict[str, Any]
    budget: str
    recover: Literal["auto", "none", "ridge"] = "auto"
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
        """Return the recipe with every setting of its method written out, and the digest of a stranger's method.

        Args:
            method: the method, if the caller has an instance; otherwise it is looked up by its name.

        Raises:
            MethodError: if the method or one of its settings is unknown.
            BudgetError: if the budget is malformed.
            RecipeError: if the settings of the child's training contradict those that its method requires.
            RunError: if the recipe holds the digest of another version of the method's source.
        """
        found = methods.origin(_name_of(self.method)) if method is None else methods.origin_of(method)
        was = self.method.get("source")
        if found.source is not None and was not in (None, found.source):
            way = "begin another run with --set method.source=null and another --out"
            raise RunError(_changed("a recipe", self.method, {"name": found.name, "source": found.source}, way))
        given: Any = found_method(self.method) if method is None else method
        return self._written(given, found.name, found.source, fill=method is not None)

    def resolved_as(self, now: Self, method: Method, folder: Path) -> Self:
        """Resolve this recipe, which lies in a run folder, with the method of a run that resumes there.

        Args:
            now: the resolved recipe of the run that resumes.
            method: its method.
            folder: the run folder, for error messages.

        Raises:
            RunError: if the method is not vitrim's and its source has changed.
        """
        source = self.method.get("source")
        if source is None:
            return self.resolved()
        if source != now.method.get("source"):
            raise RunError(_changed(f"{folder}: a run", self.method, now.method, "choose another --out"))
        # The source is the same, so its class accepts these settings, even if the file was moved.
        found = replace(methods.origin_of(method), name=now.method["name"])
        return self._written(methods.make(found, _settings(self.method, found)), found.name, source)

    def _written(self, method: Any, name: str, source: str | None, fill: bool = False) -> Self:
        """Return the recipe with the settings of `method` written out.

        Args:
            method: the method.
            name: its name.
            source: digest of its source.
            fill: whether to take missing settings of the learning-rate cycle from the method; not needed for a recipe
                that names its method, since this happens when the recipe is read.
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
        """Return the method that this recipe names.

        Raises:
            MethodError: if there is none, or one of its settings is unknown.
            RecipeError: if the recipe names none.
        """
        return found_method(self.method)


def found_method(asked: Any) -> Any:
    """Return the method that the table ``[method]`` of a recipe describes; see `Recipe.found_method`."""
    found = methods.origin(_name_of(asked))
    return methods.make(found, _settings(asked, found))


def _name_of(asked: Any) -> str:
    name = asked.get("name") if isinstance(asked, Mapping) else None
    if not isinstance(name, str):
        raise RecipeError(f"method.name: a recipe must name its method, but got {name!r}")
    return name


def _settings(asked: Mapping[str, Any], found: methods.Origin) -> dict[str, Any]:
    """Return the settings in the table ``[method]``: all entries but the name and the digest of the source."""
    others = {"name"} if found.source is None else {"name", "source"}
    return {key: value for key, value in asked.items() if key not in others}


def _changed(what: str, was: Mapping[str, Any], now: Mapping[str, Any], way: str) -> str:
    then, today = (f"{table['name']} ({_short(table.get('source'))})" for table in (was, now))
    return (
        f"{what} must resume with the method that it began with, {then}, but got {today}; restore that source, or {way}"
    )


def _short(source: str | None) -> str:
    """Shorten a digest to its first twelve digits."""
    before, colon, digits = (source or "of vitrim").rpartition(":")
    return f"{before}{colon}{digits[:12]}"


def read_recipe(path: Path) -> Recipe:
    """Read a TOML recipe. Paths in it are relative to the working directory; ``"none"`` stands for None.

    Raises:
        RecipeError: naming the key at fault and the nearest valid one.
    """
    return load(Recipe, read_toml(path), RecipeError, at=str(path))


def write_recipe(path: Path, recipe: Node) -> None:
    """Write all settings of a recipe as TOML, those that are None as ``"none"``: some have another default.

    Passwords are left out (`vitrim.words.private`).
    """
    write_text(path, tomli_w.dumps(_spoken(hide_passwords(dump(recipe)))))


def _spoken(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _spoken(item) for key, item in value.items()}
    return NONE if value is None else value


def overrides(
    pairs: Sequence[str], base: Mapping[str, Any] | None = None, kind: type[Node] | None = None
) -> dict[str, Any]:
    """Read ``key=value`` pairs into a nested dictionary.

    Values are JSON where they can be, else text. A setting that only takes text keeps its text, also where that looks
    like a number, such as ``model.weights=123``. ``none`` stays text: a setting that may be None reads it as None, one
    with a choice called ``none`` as that choice.

    Args:
        pairs: the pairs.
        base: the tables that the pairs override; its ``method.name`` says which settings ``method`` has.
        kind: the class of recipe; None for `Recipe`.

    Raises:
        RecipeError: if a pair has no ``=``, or a key is both a value and a table.
    """
    nested: dict[str, Any] = {}
    texts: list[tuple[list[str], str]] = []
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not all(key.split(".")):
            raise RecipeError(f"a setting must look like train.epochs=1, but got {shown(pair)}")
        table = nested
        *outer, last = path = key.strip().split(".")
        for name in outer:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise _both(key)
        if isinstance(table.get(last), dict):
            raise _both(key)
        table[last] = _value(text.strip(), key)
        if isinstance(table[last], int | float):
            texts.append((path, text.strip()))
    method = _table_of(nested, "method").get("name") or _table_of(base or {}, "method").get("name")
    for path, text in texts:
        if _takes_text(kind or Recipe, path, method):
            table = nested
            for name in path[:-1]:
                table = table[name]
            table[path[-1]] = text
    return nested


def _table_of(tables: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = tables.get(name)
    return table if isinstance(table, Mapping) else {}


def _takes_text(kind: type[Node], path: Sequence[str], method: Any) -> bool:
    """Return whether the field of a recipe at `path` takes text and no number."""
    first, *rest = path
    if kind is Recipe and first == "method":
        if rest == ["name"]:
            return True
        known = isinstance(method, str) and method in methods.names()
        return known and bool(rest) and _takes_text(methods.settings_of(str(method)), rest, None)
    field = kind.model_fields.get(first)
    if field is None:
        return False
    types = [part for part in types_of(field.annotation) if part is not type(None)]
    inner = [part for part in types if isinstance(part, type) and issubclass(part, Node)]
    if rest:
        return any(_takes_text(part, rest, None) for part in inner)
    return types != [] and all(part is str or isinstance(part, str) for part in types)


def _both(key: str) -> RecipeError:
    return RecipeError(f"{key}: a setting must be a value or a table, but is given as both; leave one out")


def _value(text: str, key: str) -> Any:
    try:
        value = json.loads(text)
    except RecursionError:
        raise RecipeError(f"{key}: tables and lists must be nested at most {DEEPEST} deep, but are deeper") from None
    except json.JSONDecodeError:
        return {"None": None, "True": True, "False": False}.get(text, text)
    except ValueError:  # Python's bound on the digits of a number
        raise RecipeError(f"{key}: whole numbers must have at most 63 bits, but one has thousands of digits") from None
    wrong = why_not_plain(value)
    if wrong is not None:
        raise RecipeError(f"{key}: {wrong}")
    return value


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with the values of `over` laid on top, table by table."""
    out = dict(base)
    for key, value in over.items():
        mine = out.get(key)
        out[key] = merged(mine, value) if isinstance(mine, Mapping) and isinstance(value, Mapping) else value
    return out
