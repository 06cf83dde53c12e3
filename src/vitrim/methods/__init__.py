"""Methods: one file or folder each, whose name is the method's name in a recipe.

Methods of other authors come from entry points of the group ``vitrim.methods``, from a file given by its path, or as an
instance. Modules whose names begin with an underscore are shared.
"""

from collections.abc import Mapping
from typing import Any

from vitrim.methods._contract import Data, Found, Method
from vitrim.methods._origin import Origin, make, names, origin, origin_of, why_not_a_method
from vitrim.methods._scored import ScoreMethod
from vitrim.words.plain import Node

__all__ = [
    "Data",
    "Found",
    "Method",
    "Origin",
    "ScoreMethod",
    "get",
    "make",
    "names",
    "origin",
    "origin_of",
    "settings_of",
    "why_not_a_method",
]


def settings_of(name: str) -> type[Node]:
    """Return the class of a method, given its name or the path of its file; the fields are its settings.

    Raises:
        MethodError: if there is no such method.
    """
    return origin(name).kind


def get(name: str, settings: Mapping[str, Any] | None = None) -> Method:
    """Return a method, given its name or the path of its file, and settings that replace its defaults.

    Raises:
        MethodError: if there is no such method or setting.
    """
    return make(origin(name), dict(settings or {}))
