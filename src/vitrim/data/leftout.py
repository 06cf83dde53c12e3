"""What a source holds that is not read, counted by reason, so that nothing is dropped without a word."""

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
    """Files and folders that are not read, by reason."""

    def __init__(self) -> None:
        self._groups: dict[str, _Group] = {}

    def add(self, reason: str, name: str, kind: str = "", count: int = 1) -> None:
        """Count what is left out.

        Args:
            reason: why, as in "3 files <reason>"; what is counted comes first: "files that ...".
            name: path of it, relative to the source; the first of each reason is told.
            kind: what it is, such as an ending; the most frequent ones are told with their counts.
            count: number of files or folders.
        """
        group = self._groups.setdefault(reason, _Group(first=name))
        group.count += count
        if kind:
            group.kinds[kind] += count

    def sentences(self) -> tuple[str, ...]:
        """One phrase for each reason: "24 files that this Pillow cannot read (.heic 24; first: a/1.heic)"."""
        return tuple(_phrase(reason, group) for reason, group in sorted(self._groups.items()))


def _phrase(reason: str, group: _Group) -> str:
    kinds = [f"{kind} {count:,}" for kind, count in group.kinds.most_common(_SHOWN)]
    if len(group.kinds) > _SHOWN:
        kinds.append("...")
    told = "; ".join([*([", ".join(kinds)] if kinds else []), f"first: {_printable(group.first)}"])
    return f"{group.count:,} {reason} ({told})"


def _printable(text: str) -> str:
    """`text` without what a terminal or a UTF-8 file cannot hold, at most 80 characters."""
    clean = text.encode("utf-8", "replace").decode()
    clean = "".join(c if c.isprintable() else "?" for c in clean)
    return clean if len(clean) <= 80 else f"{clean[:77]}..."
