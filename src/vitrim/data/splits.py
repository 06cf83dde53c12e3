"""Who sees which pictures: training, calibration, validation and test."""

import dataclasses
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from vitrim.data.images import Images
from vitrim.data.source import open_source, splits_of
from vitrim.words.errors import DataError

__all__ = ["Splits", "split"]


@dataclasses.dataclass(frozen=True, eq=False)
class Splits:
    """Four parts of the data; a search is never given `test`.

    Attributes:
        train: pictures to learn from.
        calibration: some of the training pictures, used without labels or to score; part of `train` and never of
            `validation`.
        validation: held out from the training pictures, disjoint from `train` and `calibration`; None if none asked.
        test: pictures of their own source or split; None if there is none.
    """

    train: Images
    calibration: Images | None
    validation: Images | None
    test: Images | None


def split(
    source_train: str | Images,
    source_test: str | Images | None = None,
    *,
    calibration: int = 256,
    validation: float = 0.1,
    seed: int,
    class_map: str | Mapping[str, int] = "",
    classes: int | None = None,
) -> Splits:
    """Divide the training pictures and find the test pictures.

    Calibration and validation are drawn from the training pictures alone, class by class in turn where labels are
    known, so that their class counts differ by at most one as far as the classes reach.

    Args:
        source_train: source (see `open_source`) or opened pictures to train on; of a divided source, its `train`.
        source_test: source or opened pictures to test on; of a divided source, its `test` or `validation`. None
            takes the test split of `source_train`, where it has one.
        calibration: number of calibration pictures, `>= 0`; a smaller source gives all it may.
        validation: share of the training pictures in `[0, 1)`, or a number of them `>= 1`. A share never takes the last
            picture of a class (one picture a class then gives no validation part); a number does if it must.
        seed: decides the draw.
        class_map: as in `open_source`.
        classes: as in `open_source`.

    Raises:
        DataError: a source is unfit, or `validation` leaves nothing to train on.
    """
    if calibration < 0 or validation < 0:
        raise DataError(f"calibration and validation must be at least 0, but are {calibration} and {validation}")
    images = source_train
    if isinstance(images, str):
        images = open_source(images, "train", class_map=class_map, classes=classes)
    test = _test(source_train, source_test, images, class_map, classes)
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


def _test(
    source_train: str | Images,
    source_test: str | Images | None,
    images: Images,
    class_map: str | Mapping[str, int],
    classes: int | None,
) -> Images | None:
    if isinstance(source_test, Images):
        return source_test
    source = source_test
    if source is None:
        source = source_train if isinstance(source_train, str) else None
        if source is None or not {"test", "validation"} & set(splits_of(source)):
            return None
    # A test folder with fewer classes must not shift their numbers, so it counts by the training names.
    mapping = class_map
    if not mapping and images.names and (classes is None or images.classes == classes):
        mapping = {name: number for number, name in enumerate(images.names) if name}
    kind = source.partition("/")[0].lower()
    if source == "digits" or kind in ("torch", "hfds", "wds"):
        return open_source(source, "test", class_map=class_map)
    wanted = "test" if splits_of(source) else None
    return open_source(source, wanted, class_map=mapping, classes=classes)


def _balanced(labels: NDArray[np.int64], seed: int, last: bool = False) -> NDArray[np.int64]:
    """Return all places, `(P,)`: one random picture of each class, then a second of each, and so on.

    With `last`, each class gives its pictures in the opposite order, so that two such draws meet as late as possible.
    """
    generator = np.random.Generator(np.random.PCG64([seed, 0x5917]))
    shuffled = generator.permutation(len(labels))
    turn = np.empty(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        mine = shuffled[labels[shuffled] == label]
        turn[mine] = np.arange(len(mine))[::-1] if last else np.arange(len(mine))
    # A stable sort by turn keeps the classes of one turn in random order.
    return shuffled[np.argsort(turn[shuffled], kind="stable")]


def _held_out(images: Images, seed: int, validation: float) -> NDArray[np.int64]:
    wanted = round(validation * len(images)) if validation < 1 else int(validation)
    if wanted >= len(images):
        raise DataError(
            f"{images.source}: validation must leave images to train on, but asks for {wanted} of {len(images)}"
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
