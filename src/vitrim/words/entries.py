"""What other installed distributions add: entry points of a group, each name given by one distribution alone."""

import functools
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from vitrim import __version__
from vitrim.words.errors import VitrimError
from vitrim.words.plain import raised

__all__ = ["Entry", "entries"]


@dataclass(frozen=True)
class Entry:
    """One entry point.

    Attributes:
        point: as `importlib.metadata` gives it.
        distribution: name and version of the distribution that declares it.
    """

    point: EntryPoint
    distribution: str

    def load(self, error: type[VitrimError]) -> Any:
        """Import what the entry point names.

        Raises:
            error: if it cannot be imported, for whatever reason; the cause is attached.
        """
        try:
            return self.point.load()
        # The code is another author's, and an import may raise anything.
        except (Exception, SystemExit) as problem:
            raise error(
                f"{self.point.name}: {self.point.value} of {self.distribution} must be importable, but raises "
                f"{raised(problem)}; fix or uninstall it"
            ) from problem


def entries(group: str, own: Iterable[str], error: type[VitrimError]) -> Mapping[str, Entry]:
    """Return the entry points of `group` by name; nothing of them is imported.

    Args:
        group: name of the group, such as ``vitrim.methods``.
        own: names that vitrim itself gives.
        error: the class of error to raise.

    Raises:
        error: naming both distributions, if two give the same name.
    """
    found: dict[str, Entry] = {}
    givers = dict.fromkeys(own, f"vitrim {__version__}")
    for entry in _installed(group, tuple(sys.path)):
        name = entry.point.name
        if name in givers:
            raise error(
                f"{name}: each name in {group} must be given by one distribution, but this one is given by "
                f"{givers[name]} and {entry.distribution}; uninstall one of them"
            )
        givers[name], found[name] = entry.distribution, entry
    return found


@functools.lru_cache(maxsize=16)
def _installed(group: str, _path: tuple[str, ...]) -> tuple[Entry, ...]:
    """Read once for each state of ``sys.path``: a look at all installed distributions takes 20 to 40 ms."""
    found = (Entry(point, _named(point)) for point in entry_points(group=group))
    return tuple(sorted(found, key=lambda entry: (entry.point.name, entry.distribution)))


def _named(point: EntryPoint) -> str:
    return "an unnamed distribution" if point.dist is None else f"{point.dist.name} {point.dist.version}"
