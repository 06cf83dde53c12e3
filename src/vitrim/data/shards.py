"""Webdataset shards: uncompressed tars of samples, read by byte range.

A sample is a run of members with one key (the path up to the first dot of the file's name): an image and its label, a
whole number in `.cls`, a class name in `.cls` or `.txt` with a class map, or a field of `.json` that `_info.json`
names. Only headers and labels are read when a source is opened; images are decoded on access. P is the number of
images.
"""

import dataclasses
import itertools
import json
import re
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vitrim.data.class_map import read_map
from vitrim.data.decode import ending, is_image
from vitrim.data.folders import SPLITS, Reading, split_of
from vitrim.data.images import Images
from vitrim.data.leftout import LeftOut
from vitrim.data.listing import is_hidden
from vitrim.data.names import Names, natural_key
from vitrim.data.tars import TarImages, file_ranges, read_range
from vitrim.words.errors import DataError
from vitrim.words.progress import progress

__all__ = ["Shards", "braces"]

_INFO = ("_info.json", "info.json")
_MOST_SHARDS = 100_000
_LABEL_BYTES = 2**20
_BRACE = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})")
_WORD = re.compile(r"[A-Za-z]+")
_MISSING = -2

_Member = tuple[int, int]


def braces(pattern: str) -> list[str]:
    """Expand `a-{000..002}.tar` and `{a,b}.tar`, also several in one name, and names joined by `::`.

    Raises:
        DataError: the pattern expands to more than 100,000 names.
    """
    return [name for part in pattern.split("::") for name in _expand(part)]


def _expand(pattern: str) -> list[str]:
    choices: list[list[str]] = []
    total, end = 1, 0
    for found in _BRACE.finditer(pattern):
        choices.append([pattern[end : found.start()]])
        numbers = _RANGE.fullmatch(found[1])
        if numbers is None:
            choices.append(found[1].split(","))
        else:
            first, last = (int(text) for text in numbers.groups())
            total *= max(1, last - first + 1)
            if total <= _MOST_SHARDS:
                choices.append([str(number).zfill(len(numbers[1])) for number in range(first, last + 1)])
        end = found.end()
    total = max(total, int(np.prod([len(each) for each in choices], dtype=np.float64)) if choices else 1)
    if total > _MOST_SHARDS:
        raise DataError(f"{pattern}: a pattern must expand to at most {_MOST_SHARDS:,} shards, but expands to more")
    return ["".join(parts) for parts in itertools.product(*choices, [pattern[end:]])]


@dataclasses.dataclass(frozen=True)
class _Part:
    """The shards of a split. `field`, if not empty, is the JSON field of the label. `count` is the expected size."""

    shards: tuple[Path, ...]
    field: str = ""
    count: int = 0


@dataclasses.dataclass(frozen=True)
class _Decode:
    """Decodes the images of several shards. If one is damaged, all damaged images of its shard are counted."""

    shards: tuple[TarImages, ...]
    ends: NDArray[np.int64]

    def __call__(self, index: int) -> Image.Image:
        shard = int(np.searchsorted(self.ends, index, side="right"))
        images = self.shards[shard]
        place = index - (int(self.ends[shard - 1]) if shard else 0)
        try:
            return images(place)
        except DataError as problem:
            raise DataError(self._counted(images, place, str(problem))) from None

    @staticmethod
    def _counted(images: TarImages, place: int, problem: str) -> str:
        damaged = sum(_is_damaged(images, other) for other in range(len(images.names)) if other != place) + 1
        name, _, rest = problem.partition(": every image must decode, but ")
        if not rest:
            return problem
        return (
            f"{name}: every image must decode, but {damaged:,} of the shard's {len(images.names):,} do not, here {rest}"
        )


def _is_damaged(images: TarImages, place: int) -> bool:
    try:
        images(place)
    except DataError:
        return True
    return False


class Shards:
    """A folder of shards, or some of its shards.

    Attributes:
        source: the source as the user gave it.
        splits: the splits of the shards, given by `_info.json` or by a word in their names (`train-000.tar`),
            in the order `train validation test`; empty if they are not divided.
    """

    def __init__(self, source: str, path: Path) -> None:
        """Find the shards.

        Args:
            source: name for error messages.
            path: a folder, or one followed by a pattern of names, see `braces`.

        Raises:
            DataError: there is no such folder, no shard in it, or its `_info.json` is damaged.
        """
        self.source = source
        pattern = path.name if path.suffix == ".tar" or "{" in path.name or "::" in path.name else ""
        folder = path.parent if pattern else path
        if not folder.is_dir():
            raise DataError(f"{source}: the folder of shards must exist, but it does not")
        self._parts = _named(source, folder, pattern) if pattern else _parts(source, folder)
        kinds = {kind for name in self._parts if (kind := split_of(name)) is not None}
        self.splits = tuple(split for split in SPLITS if split in kinds)

    def images(self, split: str | None, reading: Reading) -> Images:
        """Return the images of a split.

        Args:
            split: `train`, `validation` or `test`, or the name of a split in `_info.json` or in the shard names; None
                selects `train` of divided shards and everything of undivided ones.
            reading: how to read labels that are names, and whether to skip damaged samples.

        Raises:
            DataError: there is no such split, a shard or label is damaged, a sample has no image or label, or there are
                fewer samples than given in `_info.json`.
        """
        name = self._name(split)
        part = self._parts[name]
        mapping = read_map(self.source, reading.class_map) if reading.class_map else None
        left_out = LeftOut()
        shards, labels = [], array("q")
        with progress(f"indexing {self.source}", len(part.shards)) as advance:
            for shard in part.shards:
                shards.append(_index(shard, part.field, mapping, labels, left_out))
                advance(1)
        found = np.frombuffer(labels, dtype=np.int64) if labels else np.zeros(0, dtype=np.int64)
        bare = found == _MISSING
        index = None
        if bare.any() and not bare.all():
            reason, first = "samples without a label among others that have one", f"number {int(bare.argmax())}"
            left_out.add(reason, first, count=int(bare.sum()))
            index = np.flatnonzero(~bare)
        found = np.where(bare, -1, found)
        self._check(len(labels), part, left_out, reading.skip_damaged)
        read = _Decode(tuple(shards), np.cumsum([len(each.names) for each in shards]))
        names = None
        if mapping is not None:
            many = [""] * (max(mapping.values()) + 1)
            for text, number in mapping.items():
                many[number] = text
            names = tuple(many)
        count = len(names) if names else int(found.max()) + 1
        images = Images(
            read, found, classes=count, names=names, source=self.source, split=split_of(name) or name or None,
            left_out=left_out.sentences(), order="map" if names else "", index=index, fixed=True,
        )  # fmt: skip
        return images.without_damaged() if reading.skip_damaged else images

    def _name(self, split: str | None) -> str:
        if split in self._parts and split is not None:
            return split
        kinds = {split_of(name): name for name in self._parts}
        if split is None:
            return kinds.get("train") or next(iter(self._parts))
        for kind in (split, "validation") if split == "test" else (split,):
            if kind in kinds:
                return kinds[kind]
        if not self.splits and len(self._parts) == 1 and split == "train":
            return next(iter(self._parts))
        there = ", ".join(filter(None, self._parts)) or "no split in their names"
        raise DataError(f"{self.source}: must have a split '{split}', but the shards have {there}")

    def _check(self, count: int, part: _Part, left_out: LeftOut, skip: bool) -> None:
        phrases = left_out.sentences()
        if phrases and not skip:
            raise DataError(
                f"{self.source}: every sample must be whole, but there are {'; '.join(phrases)}; write these shards "
                "again, or set data.skip_damaged"
            )
        if not count:
            raise DataError(f"{self.source}: a source must have at least one image, but has none")
        if part.count and count != part.count and not phrases:
            raise DataError(
                f"{self.source}: the shards must contain the {part.count:,} samples given in _info.json, but contain "
                f"{count:,}; fetch them again, or correct the file"
            )


def _named(source: str, folder: Path, pattern: str) -> dict[str, _Part]:
    pattern, _, count = pattern.partition("|")
    shards = tuple(folder / name for name in braces(pattern))
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        raise DataError(f"{source}: every shard must exist, but {missing[0]} does not")
    # Shards that are named explicitly are not divided into splits.
    return {"": _Part(shards, count=int(count) if count.isdecimal() and len(count) < 19 else 0)}


def _parts(source: str, folder: Path) -> dict[str, _Part]:
    info = next((folder / name for name in _INFO if (folder / name).is_file()), None)
    if info is not None:
        return _told(source, folder, info)
    found = sorted((p for p in folder.glob("*.tar") if not is_hidden(p.name)), key=lambda p: (natural_key(p.name), p))
    if not found:
        raise DataError(f"{source}: the folder must contain a shard (.tar), but contains none")
    split_words = {path: next((w for w in _WORD.findall(path.stem) if split_of(w) is not None), "") for path in found}
    unnamed = [path.name for path, word in split_words.items() if not word]
    if 0 < len(unnamed) < len(found):
        raise DataError(
            f"{source}: the names of all shards or of none must contain their split, but '{unnamed[0]}' has none "
            f"and others have one; name those that you mean, as in wds/{folder}/train-{{000..009}}.tar"
        )
    return {
        word: _Part(tuple(path for path in found if split_words[path] == word))
        for word in dict.fromkeys(split_words.values())
    }


def _told(source: str, folder: Path, info: Path) -> dict[str, _Part]:
    try:
        splits: Mapping[str, Any] = json.loads(info.read_text(encoding="utf-8"))["splits"]
        parts = {
            str(name): _Part(
                shards=tuple(folder / str(file) for file in each["filenames"]),
                field=str(each.get("alt_label") or ""),
                count=int(each.get("num_samples") or 0),
            )
            for name, each in splits.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise DataError(
            f"{source}: {info.name} must name the splits and their files, but cannot be read: {type(problem).__name__} "
            f"{problem}"
        ) from None
    if not parts or not all(part.shards for part in parts.values()):
        raise DataError(f"{source}: {info.name} must name at least one file for each split, but does not")
    outside = [path for part in parts.values() for path in part.shards if ".." in path.parts or path.parent != folder]
    if outside:
        raise DataError(f"{source}: {info.name} must name files of its own folder, but names {outside[0]}")
    missing = [path for part in parts.values() for path in part.shards if not path.is_file()]
    if missing:
        raise DataError(f"{source}: every shard must exist, but {missing[0]} does not")
    return parts


def _index(
    shard: Path, field: str, mapping: Mapping[str, int] | None, labels: "array[int]", left_out: LeftOut
) -> TarImages:
    """Find the samples of a shard and add their labels to `labels`."""
    names, ranges = Names(), array("q")
    for key, members in _samples(shard):
        image = next((name for name in members if is_image(name)), None)
        reason = _why_no_sample(image, members, field)
        if image is None or reason is not None:
            left_out.add(f"samples {reason}", f"{shard.name}:{key}")
            continue
        labels.append(_label(shard, members, field, mapping))
        names.append(image)
        ranges.extend(members[image])
    places = np.frombuffer(ranges, dtype=np.int64).reshape(-1, 2) if ranges else np.zeros((0, 2), dtype=np.int64)
    return TarImages(str(shard), names, places)


def _samples(shard: Path) -> Iterator[tuple[str, dict[str, _Member]]]:
    """Yield runs of members with the same key, in the order of the tar."""
    key, members = None, dict[str, _Member]()
    for name, place in file_ranges(shard).items():
        folder, _, file = name.rpartition("/")
        if is_hidden(file):
            continue
        mine = f"{folder}/{file.partition('.')[0]}" if folder else file.partition(".")[0]
        if mine != key and members:
            yield str(key), members
            members = {}
        key = mine
        members[name] = place
    if members:
        yield str(key), members


def _why_no_sample(image: str | None, members: Mapping[str, _Member], field: str) -> str | None:
    """Return why these members are not a complete sample, or None."""
    if image is None:
        return "without an image"
    if not members[image][1]:
        return "with an empty image"
    if field and not any(ending(name) == ".json" for name in members):
        return "without .json"
    return None


def _label(shard: Path, members: Mapping[str, _Member], field: str, mapping: Mapping[str, int] | None) -> int:
    """Return the label of a sample; -1 if the label file contains -1, `_MISSING` if there is no label file."""
    wanted = (".json",) if field else (".cls", ".txt") if mapping is not None else (".cls",)
    name = next((name for want in wanted for name in members if ending(name) == want), None)
    if name is None:
        return _MISSING
    at = f"{shard}:{name}"
    start, size = members[name]
    if size > _LABEL_BYTES:
        raise DataError(f"{at}: a label must have at most 1 MiB, but has {size:,} bytes")
    try:
        text = read_range(str(shard), start, size).decode("utf-8").strip()
        value = json.loads(text)[field] if field else text
    except (ValueError, KeyError, TypeError, RecursionError) as problem:
        what = f"have a field '{field}'" if field else "be text"
        raise DataError(f"{at}: a label must {what}, but cannot be read: {type(problem).__name__} {problem}") from None
    if mapping is not None and isinstance(value, str):
        if value not in mapping:
            raise DataError(f"{at}: every class must be in the class map, but '{value[:80]}' is not")
        return mapping[value]
    digits = str(value)
    if isinstance(value, bool) or not re.fullmatch(r"-1|\d{1,9}", digits):
        raise DataError(
            f"{at}: a label must be a whole number from 0, or -1 for none, but is '{digits[:80]}'; "
            "for names, give a class map"
        )
    return int(digits)
