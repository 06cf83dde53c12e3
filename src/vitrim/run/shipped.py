"""Recipes and presets that come with the package, by name; this module does not import torch."""

from importlib import resources
from pathlib import Path
from typing import Literal

from vitrim.words.errors import RecipeError
from vitrim.words.plain import did_you_mean, is_file

__all__ = ["Kind", "about", "names", "path_of", "recipe_file", "text_of"]

Kind = Literal["recipes", "presets"]

_KINDS: tuple[Kind, Kind] = ("recipes", "presets")


def names(kind: Kind) -> list[str]:
    """Return the names of all recipes or presets that come with the package."""
    return sorted(path.stem for path in _folder(kind).glob("*.toml"))


def path_of(kind: Kind, name: str) -> Path:
    """Return the path of the TOML file of a recipe or preset.

    Raises:
        RecipeError: if there is none of that name.
    """
    if name not in names(kind):
        raise _unknown(kind.removesuffix("s"), name, kind)
    return _folder(kind) / f"{name}.toml"


def text_of(name: str) -> str:
    """Return the TOML text of a recipe or preset.

    Raises:
        RecipeError: if there is none of that name.
    """
    for kind in _KINDS:
        if name in names(kind):
            return path_of(kind, name).read_text(encoding="utf-8")
    raise _unknown("recipe or preset", name, *_KINDS)


def about(kind: Kind, name: str) -> str:
    """Return the first line of a recipe or preset, which describes it."""
    return path_of(kind, name).read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip()


def recipe_file(asked: Path) -> Path:
    """Return the path of a recipe that is given by its path, or by the name of one that comes with the package.

    Raises:
        RecipeError: if there is neither.
    """
    name = asked.name.removesuffix(".toml")
    if is_file(asked):
        return asked
    if str(asked) == asked.name and name in names("recipes"):
        return path_of("recipes", name)
    near = f"; vitrim comes with one, `vitrim run {name}`" if name in names("recipes") else _near(name, "recipes")
    raise RecipeError(f"{asked}: the file must exist, or be a recipe that `vitrim recipes` lists, but does not{near}")


def _unknown(what: str, name: str, *kinds: Kind) -> RecipeError:
    return RecipeError(f"a {what} must be one that `vitrim recipes` lists, but got '{name}'{_near(name, *kinds)}")


def _near(name: str, *kinds: Kind) -> str:
    near = did_you_mean(name, [each for kind in kinds for each in names(kind)])
    return near if "did you mean" in near else ""


def _folder(kind: Kind) -> Path:
    return Path(str(resources.files("vitrim"))) / kind
