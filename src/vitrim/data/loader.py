"""Batches to train on, each a pure function of (seed, epoch, step): a resumed run needs no replay.

B images of a step over all processes, b of one share of it, C channels, (h, w) height and width, P pictures.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitrim.data.augment import Augment, Full, move, normalize
from vitrim.data.images import Images
from vitrim.data.inputs import Batch, Fetch, Input, collate, to_bytes, unwrap
from vitrim.data.noise import numbers
from vitrim.words.errors import DataError

__all__ = ["TrainLoader", "train_loader"]

# Prepared pictures stay in memory up to here, as bytes: CIFAR-10 takes 0.14 GiB, ImageNet at 224 would take 180.
_CACHE_BYTES = 2**30
_ORDER, _MOVE = 1, 2


def share(batch: NDArray[np.int64], part: int, parts: int) -> NDArray[np.int64]:
    """Return one of `parts` shares of a batch, `(b,)`.

    A share holds places `a .. b` of the first half and their mirror images of the second. timm's mixup pairs place i
    with place B-1-i; so each pair lies in one share, and mixing share by share equals mixing the whole batch.
    """
    half = len(batch) // 2
    edges = np.linspace(0, half, parts + 1).round().astype(np.int64)
    start, stop = int(edges[part]), int(edges[part + 1])
    middle = batch[half : len(batch) - half] if part == parts - 1 else batch[:0]
    return np.concatenate([batch[start:stop], middle, batch[len(batch) - stop : len(batch) - start]])


class _Keyed(Dataset[tuple[Tensor, int] | DataError]):
    """Pictures by `(epoch, number)`, so that workers need not be told the epoch.

    The numbers of a picture's copies lie `count` apart.
    """

    def __init__(self, dataset: Dataset[Any], transform: Full, count: int) -> None:
        self.dataset = dataset
        self.transform = transform
        self.count = count

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int] | DataError:
        epoch, number = key
        try:
            picture, label = self.dataset[number % self.count]
            return self.transform(picture, epoch, number), int(label)
        except DataError as problem:
            return problem


class TrainLoader:
    """Shuffled, augmented batches; see `train_loader`.

    Attributes:
        size: images of a step over all processes.
        classes: classes of the dataset, 0 where unknown.
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
        bytes_needed = self.count * input.channels * input.size[0] * input.size[1]
        self._caching = self._keyed is None and bytes_needed <= _CACHE_BYTES

    def _by_key(self) -> Dataset[Any] | None:
        """Items by `(epoch, number)`, where they are augmented one by one; None where batches are moved as a whole."""
        if self.augment.kind != "full":
            return None
        return _Keyed(self.dataset, Full(self.augment, self.input, self.seed), self.count)

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
        """Number of steps an epoch; a last short batch is dropped."""
        return self.count // self.size if self.size > 1 else self.count

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Iterate over an epoch.

        Args:
            epoch: number of the epoch, from 0.
            start_step: first step to give, as if the earlier ones had been taken.

        Returns:
            For each step `accumulate` shares in order: pictures, float32 `(b, C, h, w)`, and labels, int64 `(b,)`.
            The union over processes and shares is the batch that one process would get.

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
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=keys,
            num_workers=self.workers,
            collate_fn=collate,
            generator=torch.Generator(),
            pin_memory=self.device.type == "cuda",
        )
        for pictures, labels in unwrap(loader):
            yield pictures.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)

    def _moved(self, epoch: int, shares: list[NDArray[np.int64]]) -> Iterator[Batch]:
        draws = numbers(self.seed, epoch, _MOVE).random((self.count * self.augment.repeats, 4))
        for each, (pictures, labels) in zip(shares, self._plain([s % self.count for s in shares]), strict=True):
            if self.augment.kind == "light":
                pictures = move(pictures, self.augment, draws[each])
            yield normalize(pictures, self.input), labels

    def _plain(self, shares: list[NDArray[np.int64]]) -> Iterator[Batch]:
        if not self._caching:
            fetch = Fetch(self.dataset, to_bytes(self.input))
            yield from self._fetched(fetch, [each.tolist() for each in shares])
            return
        pictures, labels = self._filled()
        for each in shares:
            places = torch.from_numpy(each).to(self.device)
            yield pictures[places], labels[places]

    def _filled(self) -> tuple[Tensor, Tensor]:
        if self._cache is None:
            fetch = Fetch(self.dataset, to_bytes(self.input))
            every = np.array_split(np.arange(self.count), max(1, self.count // 256))
            batches = list(self._fetched(fetch, [each.tolist() for each in every]))
            self._cache = torch.cat([each for each, _ in batches]), torch.cat([each for _, each in batches])
        return self._cache

    @property
    def labelled(self) -> bool:
        """Whether the pictures have labels; of a dataset that is no `Images`, the first one tells."""
        if isinstance(self.dataset, Images):
            return bool((self.dataset.labels >= 0).all())
        return int(self.dataset[0][1]) >= 0


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

    Order and augmentation of a picture depend on `(seed, epoch, picture)` alone: not on the number of workers or
    processes, nor on what was drawn before.

    Args:
        dataset: map-style, of `(picture, label)`; a picture is a `PIL.Image`, or a ready tensor `(C, h, w)`.
        input: what the model takes.
        augment: what is done to a picture.
        batch: images of a step, over all processes and accumulated parts.
        seed: decides order and augmentation, `>= 0`.
        workers: processes that decode and augment, 0 for none.
        rank: number of this process, in `[0, world)`.
        world: number of processes.
        accumulate: shares that a process takes one after another for a step.
        even: make the batch even, as mixup needs.
        device: where the batches are to lie; None is the CPU.

    Raises:
        DataError: the batch is too small for its shares, or timm refuses the policy.
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
