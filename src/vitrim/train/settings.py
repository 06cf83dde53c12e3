"""Settings of training and distillation."""

from typing import Any, Literal

from pydantic import Field, NonNegativeInt, model_validator

from vitrim.data import Augment
from vitrim.words.plain import Node

__all__ = ["DISTILLED", "RATES", "Distill", "Train"]


class Distill(Node):
    """Settings of distillation from a teacher.

    Attributes:
        kind: `none`; `hard`: cross-entropy with the teacher's predicted class; `soft`: Kullback-Leibler divergence from
            the teacher's distribution; `token`: DeiT's distillation, where the distillation head learns the teacher's
            predicted class; `distance`: mean squared difference of the outputs, for models whose outputs are not
            classes. `soft` is replaced by `distance` for a model that is known to have no classes.
        alpha: weight of the teacher in `[0, 1]`; the labels have weight 1 - alpha. Data without labels uses 1.
        temperature: divisor of the logits of student and teacher for `soft`, > 0; the term is multiplied by its square.
    """

    kind: Literal["none", "hard", "soft", "token", "distance"] = "soft"
    alpha: float = Field(default=0.5, ge=0, le=1)
    temperature: float = Field(default=1.0, gt=0)


class Train(Node):
    """Settings of the training loop.

    Attributes:
        epochs: passes over the data, `>= 0`; a fraction stops within an epoch.
        minutes: time limit for the steps in minutes, > 0; the learning rate decreases over this time. `epochs` is still
            an upper limit. None for no time limit; with one, the result depends on the machine.
        batch: images of one optimizer step, over all processes and accumulated parts, `>= 1`.
        accumulate: number of parts into which a process splits its share of a step, `>= 1`; saves memory. The loss is
            still the mean over the whole batch. But each part of each process draws its own dropout and drop path, and
            a batch norm computes its statistics over one part. So for a model with batch norms, the part size
            ``batch / (accumulate * processes)`` also affects the result. The search of `spvit` draws its gates `draws`
            times a step, or once for each part if there are more parts; each draw and its batch norms see
            ``batch / draws`` images, or one part. So there a smaller `batch` changes what batch norms see, too, and
            more parts than draws change both.
        lr: learning rate after warm-up, > 0; see `lr_batch`.
        lr_batch: batch size to which `lr` refers, `>= 1`: the rate after warm-up is ``lr * batch / lr_batch``. None
            uses `lr` unchanged for any batch size.
        weight_decay: AdamW's decoupled decay, `>= 0`; none on one-dimensional parameters.
        betas: AdamW's averages, each in `[0, 1)`.
        warmup_epochs: epochs of linear warm-up, `>= 0`, part of `epochs`.
        warmup_lr: learning rate at step 0 of a warm-up, `>= 0`.
        min_lr: learning rate at the end of the cosine or polynomial schedule, `>= 0`.
        schedule: after warm-up, `cosine`, `constant` or `poly` (the fraction of remaining steps to the power `power`).
        power: exponent of `poly`, > 0.
        clip: largest total norm of all gradients, > 0; None for no clipping.
        mixup: alpha of mixup, `>= 0`; 0 for none.
        cutmix: alpha of cutmix, `>= 0`; 0 for none. With both, each step uses one of them at random.
        smoothing: label smoothing in `[0, 1)`.
        ema: decay of the averaged weights in `[0, 1)`, reached after a warm-up; None for no averaging.
        precision: `fp32`, or autocast to `bf16` or `fp16` (with loss scaling); the weights keep their type. `auto` is
            bf16 on a CUDA device that has it, and with `minutes` on a CPU that multiplies bf16 (AMX); else fp32.
        tf32: whether products that stay in float32 may use TF32 on CUDA, which rounds their inputs to 10 bits.
        compile: whether the model's training steps run through `torch.compile`; needs a C++ compiler, and a minute to
            start.
        channels_last: whether convolutions run with channels last; `auto` is yes on CUDA.
        checkpointing: whether activations inside a block are computed again in the backward pass, and not stored; a
            step takes about a third longer and much less memory.
        drop_path: stochastic depth of the last block in `[0, 1)`, rising linearly from 0; None keeps the model's own.
        augment: augmentation of training pictures.
        distill: settings of distillation; no effect without a teacher.
        workers: number of worker processes that decode and augment, `>= 0`; they live until the end. `auto` is one for
            each core but one, at most 16, on a GPU; 0 on a CPU, whose cores compute.
        checkpoint_every: steps between checkpoints, `>= 0`; 0 writes them only at the end of each epoch.
        keep: number of checkpoints to keep, `>= 1`.
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
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    tf32: bool = True
    compile: bool = False
    channels_last: bool | Literal["auto"] = "auto"
    checkpointing: bool = False
    drop_path: float | None = Field(default=None, ge=0, lt=1)
    augment: Augment = Augment()
    distill: Distill = Distill()
    workers: NonNegativeInt | Literal["auto"] = "auto"
    checkpoint_every: int = Field(default=0, ge=0)
    keep: int = Field(default=1, ge=1)
    log_every: int = Field(default=10, ge=1)

    @model_validator(mode="after")
    def _check(self) -> "Train":
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), but are {self.betas}")
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
"""Settings, other than the length of the cycle, that determine the learning rate of a step after warm-up."""

DISTILLED: dict[str, Any] = {
    "epochs": 1000,
    "batch": 16,
    "lr": 2e-5,
    "augment": {"kind": "full", "scale": 0.5, "auto": "", "jitter": 0, "erase": 0},
    "distill": {"kind": "soft", "alpha": 1},
}
"""Label-free distillation for some minutes (add ``minutes``): Kullback-Leibler divergence from the teacher's output on
crops and their mirror images. The learning rate is small because a compressed model is already close to its teacher,
and larger steps increase the distance. The crops are needed because without them the model overfits a thousand images
after two epochs (see docs/methods/post_training.md)."""
