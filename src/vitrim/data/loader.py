"""Training batches. Each is a pure function of (seed, epoch, step), so a resumed run does not replay earlier steps.

A dataset may draw random numbers itself, as torchvision's random transforms do, from the global generators of Python,
NumPy or torch. These are reseeded for each picture and epoch, so the result is the same in every process and worker.

B is the number of images of a step over all processes, b the number in one share of it, C channels, (h, w) height and
width, P pictures.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitrim.data.augment import Augment, Full, move, normalize
from vitrim.data.images import Images
from vitrim.data.inputs import Batch, Input, collate, to_bytes, unwrap
from vitrim.data.noise import Drawn, numbers, reading
from vitrim.data.pictures import pair_of
from vitrim.nn.device import free_bytes
from vitrim.words.errors import DataError

__all__ = ["TrainLoader", "train_loader"]

CACHE = 0.25
"""Share of the free memory of a device that prepared pictures may take, for datasets without a `cache` of their own."""

_ORDER, _MOVE, _OWN = 1, 2, 7
# Number of pictures that are read twice before any is cached, and again after all are, because a dataset may have its
# own random generator: one that mirrors every second picture escapes both with a probability of 2^-20.
_TWICE, _AGAIN = 4, 16


def share(batch: NDArray[np.int64], part: int, parts: int) -> NDArray[np.int64]:
    """Return one of `parts` shares of a batch, `(b,)`.

    A share contains positions `a .. b` of the first half and the mirrored positions of the second half. timm's mixup
    pairs position i with position B-1-i. Each pair is therefore in one share, and mixing share by share equals mixing
    the whole batch.
    """
    half = len(batch) // 2
    edges = np.linspace(0, half, parts + 1).round().astype(np.int64)
    start, stop = int(edges[part]), int(edges[part + 1])
    middle = batch[half : len(batch) - half] if part == parts - 1 else batch[:0]
    return np.concatenate([batch[start:stop], middle, batch[len(batch) - stop : len(batch) - start]])


class _Keyed(Dataset[tuple[Tensor, int] | DataError]):
    """Pictures indexed by `(epoch, number)`, so that the epoch reaches the worker processes with the index.

    The numbers of the copies of a picture differ by `count`.
    """

    def __init__(self, dataset: Dataset[Any], transform: Callable[..., Tensor], count: int, seed: int) -> None:
        self.dataset = dataset
        self.transform = transform
        self.count = count
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | DataError:
        epoch, number = key
        try:
            with reading(self.dataset, self.seed, epoch, number, _OWN):
                picture, label = pair_of(self.dataset[number % self.count])
            return self.transform(picture, epoch, number), label
        except DataError as problem:
            return problem


class _Watched(Dataset[tuple[Tensor, int] | DataError]):
    """Pictures by number. The label is 2 x label, plus 1 if reading the picture drew a random number."""

    def __init__(self, dataset: Dataset[Any], transform: Callable[[Any], Tensor]) -> None:
        self.dataset = dataset
        self.transform = transform

    def __getitem__(self, index: int) -> tuple[Tensor, int] | DataError:
        try:
            with reading(self.dataset, _OWN, index):
                drawn = None if getattr(self.dataset, "fixed", False) is True else Drawn()
                picture, label = pair_of(self.dataset[index])
                return self.transform(picture), 2 * label + bool(drawn)
        except DataError as problem:
            return problem


class _Order:
    """The batches of the next epoch, for a loader whose workers live on; set before each pass."""

    keys: list[list[Any]]

    def __iter__(self) -> Iterator[list[Any]]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


class _Plain:
    """The evaluation transform without normalization, with the call signature of `Full`."""

    def __init__(self, input: Input) -> None:
        self.transform = to_bytes(input)

    def __call__(self, picture: Any, epoch: int, number: int) -> Tensor:
        return self.transform(picture)


class TrainLoader:
    """Shuffled, augmented batches; see `train_loader`.

    Attributes:
        size: number of images of a step over all processes.
        classes: number of classes of the dataset, 0 if unknown.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        input: Input,
        augment: Augment,
        *,
        batch: int,
        seed: int,
        workers: int,
        rank: int,
        world: int,
        accumulate: int,
        even: bool,
        device: torch.device | None,
    ) -> None:
        self.dataset = dataset
        self.input = input
        self.augment = augment
        self.seed = seed
        self.workers = workers
        self.rank = rank
        self.world = world
        self.accumulate = accumulate
        self.device = device or torch.device("cpu")
        self.classes = dataset.classes if isinstance(dataset, Images) else 0
        self.count = len(dataset)  # type: ignore[arg-type]
        self.size = min(batch, self.count)
        self.size -= self.size % 2 if even else 0
        self._check(batch)
        self._cache: tuple[Tensor, Tensor] | None = None
        self._keyed = self._by_key()
        self._caching = self._keyed is None
        self._bare: _Keyed | None = None
        self._reader: tuple[Dataset[Any], DataLoader[Any], _Order] | None = None

    def _by_key(self) -> Dataset[Any] | None:
        """Return items by `(epoch, number)` if they are augmented one by one; None if whole batches are augmented."""
        if self.augment.kind != "full":
            return None
        return _Keyed(self.dataset, Full(self.augment, self.input, self.seed), self.count, self.seed)

    def _check(self, batch: int) -> None:
        parts = self.world * self.accumulate
        if batch < 1 or self.size < 1:
            raise DataError(f"batch must be at least 1 (2 with mixup), but is {batch} for {self.count} images")
        if parts > 1 and self.size // 2 < parts:
            raise DataError(
                f"a batch must give 2 images to each of {self.world} processes x {self.accumulate} accumulated parts, "
                f"but has {self.size}"
            )

    def __len__(self) -> int:
        """Return the number of steps per epoch; a last short batch is dropped."""
        return self.count // self.size if self.size > 1 else self.count

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Iterate over an epoch.

        Args:
            epoch: number of the epoch, from 0.
            start_step: first step to return, as if the earlier steps had already been taken.

        Returns:
            For each step, `accumulate` shares in order: pictures, float32 `(b, C, h, w)`, and labels, int64 `(b,)`.
            The union over processes and shares is the batch that a single process would get.

        Raises:
            DataError: a picture is damaged.
        """
        shares = self._shares(epoch, start_step)
        if self._keyed is not None:
            return self._fetched(self._keyed, [[(epoch, int(i)) for i in each] for each in shares])
        return self._moved(epoch, shares)

    def _shares(self, epoch: int, start_step: int) -> list[NDArray[np.int64]]:
        order = numbers(self.seed, epoch, _ORDER).permutation(self.count)
        if self.augment.repeats > 1:
            copies = self.count * np.arange(self.augment.repeats)
            order = (order[:, None] + copies).reshape(-1)[: self.count]
        parts = self.world * self.accumulate
        return [
            share(order[step * self.size : (step + 1) * self.size], micro * self.world + self.rank, parts)
            for step in range(start_step, len(self))
            for micro in range(self.accumulate)
        ]

    def _fetched(self, dataset: Dataset[Any], keys: list[list[Any]]) -> Iterator[Batch]:
        if self._reader is None or self._reader[0] is not dataset:
            order = _Order()
            loader: DataLoader[Any] = DataLoader(
                dataset,
                batch_sampler=order,
                num_workers=self.workers,
                persistent_workers=self.workers > 0,
                collate_fn=collate,
                generator=torch.Generator(),
                pin_memory=self.device.type == "cuda",
            )
            self._reader = dataset, loader, order
        _, loader, order = self._reader
        order.keys = keys
        for pictures, labels in unwrap(loader):
            yield pictures.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def _moved(self, epoch: int, shares: list[NDArray[np.int64]]) -> Iterator[Batch]:
        draws = numbers(self.seed, epoch, _MOVE).random((self.count * self.augment.repeats, 4))
        for each, (pictures, labels) in zip(shares, self._plain(epoch, shares), strict=True):
            if self.augment.kind == "light":
                pictures = move(pictures, self.augment, draws[each])
            yield normalize(pictures, self.input), labels

    def _plain(self, epoch: int, shares: list[NDArray[np.int64]]) -> Iterator[Batch]:
        if self._caching and self._cache is None:
            self._cache = self._filled()
            self._caching = self._cache is not None
            self._reader = None
        if self._cache is None:
            if self._bare is None:
                self._bare = _Keyed(self.dataset, _Plain(self.input), self.count, self.seed)
            yield from self._fetched(self._bare, [[(epoch, int(i)) for i in each] for each in shares])
            return
        pictures, labels = self._cache
        for each in shares:
            places = torch.from_numpy(each % self.count).to(self.device, non_blocking=True)
            yield pictures[places], labels[places]

    def _filled(self) -> tuple[Tensor, Tensor] | None:
        """Return all pictures and labels on the device; None if they do not fit, or differ from call to call."""
        watched = _Watched(self.dataset, to_bytes(self.input))
        first = self._alike(watched)
        if first is None or not self._fits(first):
            return None
        # One allocation: joining batches at the end would hold every picture twice.
        pictures = torch.empty(self.count, *first.shape, dtype=first.dtype, device=self.device)
        labels = torch.empty(self.count, dtype=torch.int64, device=self.device)
        every = np.array_split(np.arange(self.count), max(1, self.count // 256))
        for each, (some, twice) in zip(every, self._fetched(watched, [one.tolist() for one in every]), strict=True):
            if some.dtype != first.dtype or bool((twice % 2).any()):
                return None
            pictures[each[0] : each[-1] + 1], labels[each[0] : each[-1] + 1] = some, twice // 2
        return (pictures, labels) if self._still(watched, pictures) else None

    def _fits(self, first: Tensor) -> bool:
        """Whether all pictures fit into the allowed share of the device's free memory, in the type that they have."""
        share = getattr(self.dataset, "cache", None)
        share = CACHE if share is None else share
        return self.count * first.numel() * first.element_size() <= share * free_bytes(self.device)

    def _alike(self, watched: _Watched) -> Tensor | None:
        """Return the first picture; None if one of the first differs when read again, or is damaged."""
        found = None
        for index in range(min(_TWICE, self.count)):
            one, two = watched[index], watched[index]
            if isinstance(one, DataError) or isinstance(two, DataError) or not torch.equal(one[0], two[0]):
                return None
            found = one[0] if found is None else found
        return found

    def _still(self, watched: _Watched, pictures: Tensor) -> bool:
        """Whether some pictures, over the whole dataset, are still what was cached."""
        if getattr(self.dataset, "fixed", False) is True:
            return True
        for index in np.linspace(0, self.count - 1, min(_AGAIN, self.count)).round().astype(int).tolist():
            one = watched[index]
            if isinstance(one, DataError) or not torch.equal(one[0], pictures[index].cpu()):
                return False
        return True

    @property
    def labelled(self) -> bool:
        """Whether the pictures have labels; for a dataset other than `Images`, only the first picture is checked."""
        if isinstance(self.dataset, Images):
            return bool((self.dataset.labels >= 0).all())
        return pair_of(self.dataset[0])[1] >= 0


def train_loader(
    dataset: Dataset[Any],
    input: Input,
    augment: Augment,
    *,
    batch: int,
    seed: int,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    accumulate: int = 1,
    even: bool = False,
    device: torch.device | None = None,
) -> TrainLoader:
    """Return a loader for training.

    The order and augmentation of a picture, and the random numbers that the dataset draws for it, depend only on
    `(seed, epoch, picture)`. They do not depend on the number of workers or processes, nor on earlier draws. Small
    datasets whose pictures are the same in every call are kept on the device, as bytes (or as floats, if the dataset
    gives those), if they fit into a share of its free memory (`Images.cache`, else a quarter).

    Args:
        dataset: map-style dataset of `(picture, label)`, see `vitrim.data.pictures.as_picture`; may draw random
            numbers from the global generators.
        input: what the model takes.
        augment: augmentation of a picture.
        batch: number of images of a step, over all processes and accumulated parts.
        seed: seed of order and augmentation, `>= 0`.
        workers: number of worker processes that decode and augment; 0 decodes in this process.
        rank: number of this process, in `[0, world)`.
        world: number of processes.
        accumulate: number of shares that a process handles one after another in a step.
        even: make the batch size even, as mixup requires.
        device: device of the returned batches; None is the CPU.

    Raises:
        DataError: the batch is too small for its shares, or timm rejects the policy.
    """
    return TrainLoader(
        dataset,
        input,
        augment,
        batch=batch,
        seed=seed,
        workers=workers,
        rank=rank,
        world=world,
        accumulate=accumulate,
        even=even,
        device=device,
    )
