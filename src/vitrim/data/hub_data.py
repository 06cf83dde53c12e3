"""Images of Hugging Face datasets, opened through timm."""

import dataclasses
import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from timm.data import create_dataset

from vitrim.data.class_map import read_map
from vitrim.data.decode import decode
from vitrim.data.folders import SPLITS, Reading, split_of
from vitrim.data.images import Images
from vitrim.data.labels import labels_array
from vitrim.words.errors import DataError
from vitrim.words.plain import reason

__all__ = ["HubData", "create", "why_not_opened"]


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Decodes the images of a Hugging Face dataset by index."""

    dataset: Any
    column: str
    name: str

    def __call__(self, index: int) -> Image.Image:
        at = f"{self.name}: image {index}"
        given = self.dataset[index][self.column]
        if not isinstance(given, Mapping) or not (given.get("bytes") or given.get("path")):
            raise DataError(f"{at}: every image must decode, but there is none; set data.skip_damaged")
        try:
            data = given["bytes"] or Path(given["path"]).read_bytes()
        except OSError as problem:
            raise DataError(f"{at}: every image must be readable, but {reason(problem)}") from None
        return decode(data, at)


class HubData:
    """A dataset of the Hugging Face Hub, or a local folder with the same layout."""

    by_names = False

    def __init__(self, source: str) -> None:
        self.source = source
        self._names = _hub_splits(source)
        kinds = {split_of(name) for name in self._names}
        self.splits = tuple(split for split in SPLITS if split in kinds)

    def images(self, split: str | None, reading: Reading) -> Images:
        """Return the images of a split; any split expression of the library is accepted; see `open_source`."""
        chosen = self._name(split)
        reader = create(self.source, split=chosen).reader
        columns = reader.dataset.column_names
        given = reader.dataset[reader.label_key] if reader.label_key in columns else [-1] * len(reader)
        labels = labels_array(list(given), self.source)
        names = tuple(sorted(reader.class_to_idx, key=reader.class_to_idx.__getitem__)) or None
        order = ""
        if reading.class_map:
            names, labels, order = self._mapped(names, labels, reading.class_map)
        count = len(names) if names and (labels >= 0).any() else int(labels.max()) + 1
        images = Images(
            _Rows(reader.dataset, reader.image_key, self.source),
            labels,
            classes=count,
            names=names if count else None,
            source=self.source,
            split=split_of(chosen) or chosen,
            order=order,
            fixed=True,
        )
        return images.without_damaged() if reading.skip_damaged else images

    def _name(self, split: str | None) -> str:
        """Return the dataset's own name of a split; a split expression is returned unchanged."""
        kinds = {split_of(name): name for name in self._names}
        wanted = split or ("train" if "train" in kinds or not self._names else self._names[0])
        if wanted == "test" and "test" not in kinds and "validation" in kinds:
            wanted = "validation"
        if wanted in SPLITS and wanted in kinds:
            return kinds[wanted]
        plain = wanted.replace("_", "").isalnum()
        if plain and self._names and wanted not in self._names:
            raise DataError(f"{self.source}: must have a split '{wanted}', but has {', '.join(self._names)}")
        return wanted

    def _mapped(
        self, names: tuple[str, ...] | None, labels: NDArray[np.int64], class_map: str | Mapping[str, int]
    ) -> tuple[tuple[str, ...], NDArray[np.int64], str]:
        mapping = read_map(self.source, class_map)
        if names is None:
            raise DataError(f"{self.source}: a class map must go with labels that have names, but these have none")
        used = {int(label) for label in np.unique(labels) if label >= 0}
        unknown = [names[label] for label in sorted(used) if names[label] not in mapping]
        if unknown:
            raise DataError(f"{self.source}: every class must be in the class map, but '{unknown[0]}' is not")
        numbers = np.asarray([mapping.get(name, -1) for name in names], dtype=np.int64)
        many = [""] * (max(mapping.values()) + 1)
        for name, number in mapping.items():
            many[number] = name
        return tuple(many), np.where(labels < 0, -1, numbers[labels]), "map"


def _hub_splits(source: str) -> tuple[str, ...]:
    """Return the names of the splits of a Hugging Face dataset.

    Raises:
        DataError: the library is missing, or the dataset cannot be found.
    """
    try:
        # The library is optional, so it is imported here.
        library: Any = importlib.import_module("datasets")
        return tuple(str(name) for name in library.get_dataset_split_names(source.partition("/")[2]))
    except Exception as problem:
        raise why_not_opened(source, problem) from problem


def create(source: str, **arguments: Any) -> Any:
    """Call timm's `create_dataset`; raise any error of its back ends as a `DataError` of one sentence."""
    try:
        return create_dataset(source, **{name: value for name, value in arguments.items() if value is not None})
    except Exception as problem:
        raise why_not_opened(source, problem) from problem


def why_not_opened(source: str, problem: Exception) -> DataError:
    """Return the error to raise if a library fails to open a source."""
    text = " ".join(str(problem).split()) or type(problem).__name__
    if isinstance(problem, ImportError):
        return DataError(f"{source}: its library must be installed, but {text}")
    return DataError(f"{source}: timm must be able to open this source, but {text}")
