"""Transform pictures into the tensors that a model expects, and load batches for evaluation.

B images, C channels, (h, w) height and width of the input.
"""

import multiprocessing
import os
from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from vitrim.data.images import Images
from vitrim.data.noise import reading
from vitrim.data.pictures import as_picture, pair_of
from vitrim.nn.layers import input_channels
from vitrim.words.errors import DataError
from vitrim.words.launched import on_this_machine
from vitrim.words.plain import Node, load

__all__ = ["Input", "Loader", "Workers", "eval_loader", "to_bytes", "to_tensor", "workers_for"]

Batch = tuple[Tensor, Tensor]
Workers = int | Literal["auto"]
_OWN = 6

_MOST_WORKERS = 16


def workers_for(device: torch.device) -> int:
    """Return the number of worker processes that fit the machine while a model runs on `device`.

    One for each core that this process may use but one, at most 16, if the device is not the CPU; of several processes
    on this machine, each has its share of the cores. Readers of images reach a worker by a fork, so there are none
    where processes start otherwise.
    """
    start = multiprocessing.get_start_method(allow_none=True) or multiprocessing.get_all_start_methods()[0]
    if device.type == "cpu" or start != "fork":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(cores // on_this_machine() - 1, _MOST_WORKERS))


class Input(Node):
    """Input of a model: size in pixels, channels, normalization, and the crop of evaluation pictures.

    Attributes:
        size: height and width, pixels.
        channels: 1 (grayscale) or 3 (RGB).
        mean: subtracted from values in `[0, 1]`, one value per channel.
        std: divisor after that, one value per channel, > 0.
        interpolation: `nearest bilinear bicubic lanczos box hamming`.
        crop_pct: fraction of the shorter side that the center crop keeps, in `(0, 2]`.
        crop_mode: `center`, `squash` or `border`, as in timm.
    """

    size: tuple[int, int]
    channels: Literal[1, 3] = 3
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"] = "bicubic"
    crop_pct: float = Field(default=0.875, gt=0, le=2)
    crop_mode: Literal["center", "squash", "border"] = "center"

    @model_validator(mode="after")
    def _check(self) -> "Input":
        if min(self.size) < 1:
            raise ValueError(f"size must be at least 1 pixel, but is {self.size}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise ValueError(f"{name} must have one value for each of {self.channels} channels, but is {values}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0, but is {self.std}")
        return self

    @classmethod
    def of(cls, model: nn.Module, **overrides: Any) -> "Input":
        """Return the input of a timm model, from its config and the image size that it is currently built for.

        Args:
            model: a timm model, before or after a cut.
            overrides: fields of `Input` that replace the model's values.

        Raises:
            DataError: an override is malformed, or the model does not take 1 or 3 channels.
        """
        config = resolve_model_data_config(model)
        channels, *size = config["input_size"]
        stem: Any = getattr(model, "patch_embed", None)
        if getattr(stem, "img_size", None) is not None:
            size = list(stem.img_size)
        if stem is not None:
            channels = input_channels(model)
        values: dict[str, Any] = {
            "size": tuple(size),
            "channels": channels,
            "mean": _fit(config["mean"], channels),
            "std": _fit(config["std"], channels),
            "interpolation": config["interpolation"],
            "crop_pct": config["crop_pct"],
            "crop_mode": config["crop_mode"],
        }
        return load(cls, values | overrides, DataError, "input")


def _fit(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """Return one value per channel. The config of a grayscale model often still lists three colors: use their mean."""
    if len(values) == channels:
        return tuple(values)
    return (sum(values) / len(values),) * channels


class _Eval:
    """Transform a picture to a tensor, without randomness; a floating-point tensor is returned unchanged."""

    def __init__(self, input: Input, normalize: bool) -> None:
        self.mode = "L" if input.channels == 1 else "RGB"
        self.size = (input.channels, *input.size)
        self.transform = create_transform(
            input_size=self.size,
            interpolation=input.interpolation,
            mean=input.mean,
            std=input.std,
            crop_pct=input.crop_pct,
            crop_mode=input.crop_mode,
            normalize=normalize,
        )

    def __call__(self, given: Any) -> Tensor:
        picture = as_picture(given)
        if isinstance(picture, Tensor):
            if tuple(picture.shape) != self.size:
                raise DataError(f"a picture must be {self.size} for this input, but is {tuple(picture.shape)}")
            return picture
        tensor: Tensor = self.transform(picture if picture.mode == self.mode else picture.convert(self.mode))
        return tensor


def to_tensor(input: Input) -> _Eval:
    """Return the evaluation transform: RGB picture to float32 `(C, h, w)`, normalized."""
    return _Eval(input, normalize=True)


def to_bytes(input: Input) -> _Eval:
    """Return the evaluation transform without normalization: RGB picture to uint8 `(C, h, w)`."""
    return _Eval(input, normalize=False)


class Fetch(Dataset[tuple[Tensor, int] | DataError]):
    """A dataset with its transform, for worker processes.

    An error is returned as a value, because torch would wrap it in the traceback of the worker. The random numbers that
    a dataset draws from the global generators depend only on the index of the picture. Every pass, worker and process
    gets the same ones, and the state of the global generators does not change.
    """

    def __init__(self, dataset: Dataset[Any], transform: Any) -> None:
        self.dataset = dataset
        self.transform = transform

    def __getitem__(self, index: int) -> tuple[Tensor, int] | DataError:
        try:
            with reading(self.dataset, _OWN, index):
                picture, label = pair_of(self.dataset[index])
                return self.transform(picture), label
        except DataError as problem:
            return problem

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]


def collate(items: list[tuple[Tensor, int | Tensor] | DataError]) -> Batch | DataError:
    """Stack items, or return the first error among them; labels are numbers, or masks of one size."""
    good = []
    for item in items:
        if isinstance(item, DataError):
            return item
        good.append(item)
    labels = torch.stack([torch.as_tensor(label, dtype=torch.int64) for _, label in good])
    return torch.stack([picture for picture, _ in good]), labels


def unwrap(batches: Any) -> Iterator[Batch]:
    """Yield the batches; raise an error that `Fetch` returned as a value."""
    for batch in batches:
        if isinstance(batch, DataError):
            raise batch
        yield batch


class Loader:
    """Batches in a fixed order, the same on every pass.

    Iterating yields float32 `(B, C, h, w)` and int64 labels `(B,)`, -1 for no label; the last batch may be short.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        input: Input,
        batch: int,
        workers: int,
        device: torch.device | None = None,
        places: range | None = None,
    ) -> None:
        self.dataset = dataset
        self.input = input
        self.classes = dataset.classes if isinstance(dataset, Images) else 0
        # The loader has its own generator, because drawing from torch's global one would break resuming.
        self._loader: DataLoader[Any] = DataLoader(
            Fetch(dataset, to_tensor(input)),
            batch_size=batch,
            sampler=places,
            num_workers=workers,
            persistent_workers=workers > 0,
            collate_fn=collate,
            generator=torch.Generator(),
            pin_memory=device is not None and device.type == "cuda",
        )

    def __iter__(self) -> Iterator[Batch]:
        return unwrap(self._loader)

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._loader)


def eval_loader(
    dataset: Dataset[Any],
    input: Input,
    *,
    batch: int = 64,
    workers: Workers = 0,
    device: torch.device | None = None,
    places: range | None = None,
) -> Loader:
    """Return a loader for evaluation: fixed order, no randomness; batches are on the CPU.

    Args:
        dataset: map-style dataset of `(picture, label)`, see `vitrim.data.pictures.as_picture`.
        input: what the model takes.
        batch: number of images per batch, `>= 1`.
        workers: number of worker processes that decode, which live as long as the loader; 0 decodes in this process;
            `auto`: see `workers_for`.
        device: where the model runs; batches for a CUDA device are in pinned memory, so that copying them there does
            not make the host wait.
        places: which images to read; None for all.

    Raises:
        DataError: `batch` is below 1, or (while iterating) a picture is damaged.
    """
    if batch < 1:
        raise DataError(f"batch must be at least 1, but is {batch}")
    count = workers_for(device or torch.device("cpu")) if workers == "auto" else workers
    return Loader(dataset, input, batch, count, device, places)
