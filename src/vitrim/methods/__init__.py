"""Methods: every file or package in this folder is a method, and its name is the method's name in a recipe.

Files whose names begin with an underscore are helpers of one or several methods.
"""

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from vitrim.methods._contract import Method
from vitrim.words.errors import MethodError
from vitrim.words.plain import Node, did_you_mean, load

__all__ = ["get", "names", "settings_of"]


def names() -> list[str]:
    """Return the names of all methods."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def settings_of(name: str) -> type[Node]:
    """Return the class of the method called `name`; its fields are the settings.

    Raises:
        MethodError: if there is no such method.
    """
    if name not in names():
        raise MethodError(
            f"a method must be one of {', '.join(names())}, but got '{name}'{did_you_mean(name, names())}"
        )
    found: type[Node] = importlib.import_module(f"{__name__}.{name}").Method
    return found


def get(name: str, settings: Mapping[str, Any] | None = None) -> Method:
    """Build the method called `name` with `settings`; settings that are not given keep their defaults.

    Raises:
        MethodError: if there is no such method or setting.
    """
    method: Any = load(settings_of(name), dict(settings or {}), MethodError, at=f"method.{name}")
    return method  # type: ignore[no-any-return]
