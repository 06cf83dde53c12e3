"""What can be said about a training run."""

from typing import Any, Literal

from pydantic import Field, model_validator

from vitrim.data import Augment
from vitrim.words.plain import Node

__all__ = ["DISTILLED", "RATES", "Distill", "Train"]


class Distill(Node):
    """How a teacher teaches.

    Attributes:
        kind: `none`; `hard`: cross-entropy with the teacher's first choice; `soft`: Kullback-Leibler divergence from
            the teacher's distribution; `token`: DeiT's, the distillation head learns the teacher's first choice;
            `distance`: mean squared difference of the outputs, for models whose outputs are no classes, and what `soft`
            comes to where that is known.
        alpha: share of the teacher in `[0, 1]`, the labels have the rest; 1 is used on data without labels.
        temperature: divides both sides' logits for `soft`, > 0; the term is multiplied by its square.
    """

    kind: Literal["none", "hard", "soft", "token", "distance"] = "soft"
    alpha: float = Field(default=0.5, ge=0, le=1)
    temperature: float = Field(default=1.0, gt=0)


class Train(Node):
    """Settings of the training loop.

    Attributes:
        epochs: passes over the data, `>= 0`; a fraction stops inside one.
        minutes: stop after so many minutes of steps, > 0, and let the learning rate fall over them; `epochs` still is
            the most. None for no such bound; with one, what is trained depends on the machine.
        batch: images of one optimiser step, over all processes and accumulated parts, `>= 1`.
        accumulate: parts a process splits its share of a step into, `>= 1`; saves memory. The loss stays the mean over
            the whole batch, but each part of each process draws dropout and drop path anew, and a batch norm sees one
            part at a time: for a model with batch norms or drawn gates (`spvit`) the ``batch / (accumulate *
            processes)`` images of a part are a setting of their own.
        lr: learning rate after warm-up, > 0; see `lr_batch`.
        lr_batch: number of images that `lr` is meant for, `>= 1`: the rate after warm-up is ``lr * batch / lr_batch``.
            None for `lr` as it is, whatever the batch.
        weight_decay: AdamW's decoupled decay, `>= 0`; none on one-dimensional parameters.
        betas: AdamW's averages, each in `[0, 1)`.
        warmup_epochs: epochs of linear warm-up, `>= 0`, part of `epochs`.
        warmup_lr: learning rate at step 0 of a warm-up, `>= 0`.
        min_lr: learning rate that the cosine or polynomial ends on, `>= 0`.
        schedule: `cosine`, `constant` or `poly` (the share of steps that is left, to the power `power`) after warm-up.
        power: exponent of `poly`, > 0.
        clip: largest norm of all gradients together, > 0; None for no clipping.
        mixup: alpha of mixup, `>= 0`; 0 for none.
        cutmix: alpha of cutmix, `>= 0`; 0 for none. With both, each step takes one by chance.
        smoothing: label smoothing in `[0, 1)`.
        ema: decay of the averaged weights in `[0, 1)`, reached by a warm-up; None for none.
        precision: `fp32`, or autocast to `bf16` or `fp16` (with loss scaling); weights stay as they are.
        drop_path: stochastic depth of the last block in `[0, 1)`, rising linearly from 0; None leaves the model's own.
        augment: what is done to training pictures.
        distill: how a teacher teaches; has no effect without a teacher.
        workers: processes that decode and augment, `>= 0`.
        checkpoint_every: steps between checkpoints, `>= 0`; 0 for one at each end of an epoch only.
        keep: number of checkpoints that stay, `>= 1`.
        log_every: steps between log records, `>= 1`.
    """

    epochs: float = Field(default=10, ge=0)
    minutes: float | None = Field(default=None, gt=0)
    batch: int = Field(default=64, ge=1)
    accumulate: int = Field(default=1, ge=1)
    lr: float = Field(default=5e-4, gt=0)
    lr_batch: int | None = Field(default=None, ge=1)
    weight_decay: float = Field(default=0.05, ge=0)
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_epochs: float = Field(default=0, ge=0)
    warmup_lr: float = Field(default=1e-6, ge=0)
    min_lr: float = Field(default=1e-6, ge=0)
    schedule: Literal["cosine", "constant", "poly"] = "cosine"
    power: float = Field(default=0.9, gt=0)
    clip: float | None = Field(default=1.0, gt=0)
    mixup: float = Field(default=0, ge=0)
    cutmix: float = Field(default=0, ge=0)
    smoothing: float = Field(default=0, ge=0, lt=1)
    ema: float | None = Field(default=None, ge=0, lt=1)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    drop_path: float | None = Field(default=None, ge=0, lt=1)
    augment: Augment = Augment()
    distill: Distill = Distill()
    workers: int = Field(default=0, ge=0)
    checkpoint_every: int = Field(default=0, ge=0)
    keep: int = Field(default=1, ge=1)
    log_every: int = Field(default=10, ge=1)

    @model_validator(mode="after")
    def _check(self) -> "Train":
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must lie in [0, 1), but are {self.betas}")
        if self.warmup_epochs > self.epochs > 0:
            raise ValueError(f"warmup_epochs must be at most epochs {self.epochs:g}, but is {self.warmup_epochs:g}")
        if self.schedule != "constant" and self.min_lr > self.rate:
            raise ValueError(f"min_lr must be at most lr {self.rate:g}, but is {self.min_lr:g}")
        if self.mixes and self.batch % 2:
            raise ValueError(f"batch must be even for mixup and cutmix, but is {self.batch}")
        return self

    @property
    def rate(self) -> float:
        """The learning rate after warm-up."""
        return self.lr if self.lr_batch is None else self.lr * self.batch / self.lr_batch

    @property
    def mixes(self) -> bool:
        """Whether mixup or cutmix is on."""
        return self.mixup > 0 or self.cutmix > 0


RATES = ("lr", "lr_batch", "batch", "warmup_epochs", "min_lr", "schedule", "power")
"""Settings that the learning rate of a step after warm-up depends on, besides the length of the cycle."""

DISTILLED: dict[str, Any] = {
    "epochs": 1000,
    "batch": 16,
    "lr": 2e-5,
    "augment": {"kind": "full", "scale": 0.5, "auto": "", "jitter": 0, "erase": 0},
    "distill": {"kind": "soft", "alpha": 1},
}
"""Label-free distillation for some minutes (``minutes`` is to be added): divergence from the teacher's output on crops
and their mirror images. A compressed model is near its teacher already, and larger steps lead away from it; a thousand
images without crops are known by heart after two epochs (see docs/methods/post_training.md)."""
