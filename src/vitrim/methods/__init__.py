"""Methods: one file or folder each, found because it exists; its name is the method's name in a recipe.

Methods of other authors are found by entry points of the group ``vitrim.methods``, by the path of a file, or passed as
an instance. Modules whose names begin with an underscore are shared.
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
    """The class of the method called `name`, or of the file at that path; its fields are the settings.

    Raises:
        MethodError: if there is no such method.
    """
    return origin(name).kind


def get(name: str, settings: Mapping[str, Any] | None = None) -> Method:
    """The method called `name`, or of the file at that path, with `settings`; what is not given keeps its default.

    Raises:
        MethodError: if there is no such method or setting.
    """
    return make(origin(name), dict(settings or {}))
