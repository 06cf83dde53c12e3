"""Divide images into training, calibration, validation and test images."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from vitrim.data.folders import Ask, Reading
from vitrim.data.images import Images
from vitrim.data.source import Source, find_source, test_images
from vitrim.words.errors import DataError

__all__ = ["Splits", "TooFewError", "split"]


@dataclasses.dataclass(frozen=True, eq=False)
class Splits:
    """The four parts of the data. A search never uses `test`.

    Attributes:
        train: training images.
        calibration: some of the training images, used without labels or for scores; a subset of `train`.
        validation: images held out from training, disjoint from `train` and `calibration`; None if none were requested.
        test: images of a separate source or split; None if there is none.
    """

    train: Images
    calibration: Images | None
    validation: Images | None
    test: Images | None


CALIBRATION = 256
"""Number of calibration images where nobody asks for another."""


class TooFewError(DataError):
    """There are not more images than are to be held out."""


def split(
    source_train: str | Images,
    source_test: str | Images | None = None,
    *,
    calibration: int = CALIBRATION,
    validation: float = 0.1,
    seed: int,
    class_map: str | Mapping[str, int] = "",
    classes: int | None = None,
    class_order: str = "auto",
    ask: Ask | None = None,
    depth: int | None = None,
    skip_damaged: bool = False,
) -> Splits:
    """Divide the training images and find the test images.

    Calibration and validation images are drawn only from the training images. If there are labels, they are drawn from
    each class in turn, so the class counts differ by at most one until a class has no images left. Each source is
    listed once.

    Args:
        source_train: source (see `vitrim.data.source.find_source`) or opened images for training; of a divided source,
            the `train` split is used.
        source_test: source or opened images for testing; of a divided source, `test` or `validation` is used. None
            uses the test split of `source_train`, if it has one.
        calibration: number of calibration images, `>= 0`; if there are fewer training images, all are used.
        validation: fraction of the training images in `[0, 1)`, or a number of images `>= 1`. A fraction never takes
            the last image of a class, so a source with one image per class gets no validation images. A number may.
        seed: seed of the draw.
        class_map: text file with one class name per line, or a mapping from names to numbers.
        classes: number of outputs of the model. If it is 1,000, folders named by ImageNet ids get their ImageNet label.
        class_order: `plain`, `natural` or `auto`, see `vitrim.data.folders.Reading`.
        ask: function that chooses the order for `auto`.
        depth: level of the class folders, from 1.
        skip_damaged: whether to leave out images that do not decode.

    Raises:
        DataError: a source cannot be read, or `validation` leaves no images for training.
    """
    if calibration < 0 or validation < 0:
        raise DataError(f"calibration and validation must be at least 0, but are {calibration} and {validation}")
    reading = Reading(class_map, classes, class_order, ask, depth, skip_damaged)
    if isinstance(source_train, Images):
        images, found = source_train, None
    else:
        found = find_source(source_train)
        images = found.images("train", reading)
    test = _test(found, source_test, images, reading)
    order = _balanced(images.labels, seed)
    held = _held_out(images, seed, validation)
    train = np.sort(np.setdiff1d(np.arange(len(images)), held))
    seen = order[np.isin(order, train)][:calibration]
    return Splits(
        train=images.pick(train),
        calibration=images.pick(np.sort(seen)) if len(seen) else None,
        validation=images.pick(np.sort(held)) if len(held) else None,
        test=test,
    )


def _test(found: Source | None, source_test: str | Images | None, images: Images, reading: Reading) -> Images | None:
    if isinstance(source_test, Images):
        return source_test
    if source_test is not None:
        found = found if found is not None and source_test == found.source else find_source(source_test)
    elif found is None or not {"test", "validation"} & set(found.splits):
        return None
    # A test folder with fewer classes must not shift the class numbers, so the numbers of the training names are used.
    names = images.names
    if names and not reading.class_map and found.by_names:
        if reading.classes is None or images.classes == reading.classes:
            reading = dataclasses.replace(reading, class_map={name: n for n, name in enumerate(names) if name})
    test = test_images(found, reading)
    _check_numbers(images, test)
    return test


def _check_numbers(train: Images, test: Images) -> None:
    """Raise if a class has the same name but another number in the test images than in the training images."""
    mine = {name: number for number, name in enumerate(train.names or ()) if name}
    for number, name in enumerate(test.names or ()):
        if mine.get(name, number) != number:
            raise DataError(
                f"{test.source}: a class must have one number, but '{name}' has {number} here and {mine[name]} in "
                f"{train.source}; give a class map"
            )


def _balanced(labels: NDArray[np.int64], seed: int, last: bool = False) -> NDArray[np.int64]:
    """Return all indices, `(P,)`: one random image of each class, then a second of each, and so on.

    With `last`, the images of each class are in the opposite order, so that two such draws overlap as late as possible.
    """
    generator = np.random.Generator(np.random.PCG64([seed, 0x5917]))
    shuffled = generator.permutation(len(labels))
    # The indices grouped by class, each group in shuffled order.
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, starts, counts = np.unique(labels[by_class], return_index=True, return_counts=True)
    within = np.arange(len(labels)) - np.repeat(starts, counts)
    turn = np.empty(len(labels), dtype=np.int64)
    turn[by_class] = np.repeat(counts, counts) - 1 - within if last else within
    # A stable sort by turn keeps the classes of one turn in random order.
    return shuffled[np.argsort(turn[shuffled], kind="stable")]


def _held_out(images: Images, seed: int, validation: float) -> NDArray[np.int64]:
    wanted = round(validation * len(images)) if validation < 1 else int(validation)
    if wanted >= len(images):
        raise TooFewError(
            f"{images.source}: validation must leave images to train on, but takes {wanted} of {len(images)}"
        )
    left = np.bincount(images.labels + 1)
    held: list[int] = []
    for place in _balanced(images.labels, seed, last=True):
        if len(held) == wanted:
            break
        label = images.labels[place] + 1
        if left[label] > 1 or validation >= 1:
            left[label] -= 1
            held.append(int(place))
    return np.asarray(held, dtype=np.int64)
