"""Count the files and folders of a source that are not read, by reason, so that none is dropped silently."""

import dataclasses
from collections import Counter

__all__ = ["LeftOut"]

_SHOWN = 3


@dataclasses.dataclass
class _Group:
    count: int = 0
    first: str = ""
    kinds: Counter[str] = dataclasses.field(default_factory=Counter)


class LeftOut:
    """Counts of files and folders that are not read, by reason."""

    def __init__(self) -> None:
        self._groups: dict[str, _Group] = {}

    def add(self, reason: str, name: str, kind: str = "", count: int = 1) -> None:
        """Count a file or folder that is left out.

        Args:
            reason: plural noun phrase that follows the count: "files that ...".
            name: its path relative to the source; the first path of each reason is reported.
            kind: what it is, such as a file extension; the most frequent kinds are reported with their counts.
            count: number of files or folders.
        """
        group = self._groups.setdefault(reason, _Group(first=name))
        group.count += count
        if kind:
            group.kinds[kind] += count

    def sentences(self) -> tuple[str, ...]:
        """Return one phrase for each reason: "24 files that this Pillow cannot read (.heic 24; first: a/1.heic)"."""
        return tuple(_phrase(reason, group) for reason, group in sorted(self._groups.items()))


def _phrase(reason: str, group: _Group) -> str:
    kinds = [f"{kind} {count:,}" for kind, count in group.kinds.most_common(_SHOWN)]
    if len(group.kinds) > _SHOWN:
        kinds.append("...")
    details = "; ".join([*([", ".join(kinds)] if kinds else []), f"first: {_printable(group.first)}"])
    return f"{group.count:,} {reason} ({details})"


def _printable(text: str) -> str:
    """Return `text` without characters that cannot be printed or encoded in UTF-8, at most 80 characters."""
    clean = text.encode("utf-8", "replace").decode()
    clean = "".join(c if c.isprintable() else "?" for c in clean)
    return clean if len(clean) <= 80 else f"{clean[:77]}..."
