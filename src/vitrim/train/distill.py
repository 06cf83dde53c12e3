"""The loss of a step, from labels, a teacher, or both.

B images, K classes, T temperature. If there are labels, the output z of a model with one output is the logit of the
second of two classes, and the logits are (0, z). Outputs that are not classes are compared by their squared distance.
See `vitrim.cut.outputs`.

Sources: Hinton et al. 2015 (soft); Touvron et al. 2021, "Training data-efficient image transformers" (hard, token).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrim.cut.outputs import as_classes, gives_values
from vitrim.nn.feed import fed
from vitrim.train.settings import Distill
from vitrim.words.errors import RecipeError

__all__ = ["Objective", "distance_loss", "hard_loss", "labels_loss", "soft_loss", "token_loss"]


def labels_loss(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the mean cross-entropy, scalar.

    Args:
        logits: `(B, K)`.
        labels: int64 `(B,)`, or distributions `(B, K)`, which are used unchanged.
        smoothing: fraction of each label that is spread over all classes, in `[0, 1)`; for int64 labels only.
    """
    logits = _wide(logits)
    if labels.ndim == 2:
        return F.cross_entropy(logits, labels.to(logits.dtype))
    return F.cross_entropy(logits, labels, label_smoothing=smoothing)


def hard_loss(logits: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean cross-entropy with the teacher's predicted class, scalar.

    Args:
        logits: `(B, K)`.
        teacher: the teacher's logits, `(B, K)`.
    """
    return F.cross_entropy(_wide(logits), teacher.argmax(-1))


def soft_loss(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return T^2 times the mean Kullback-Leibler divergence of the student from the teacher, scalar.

    Args:
        logits: `(B, K)`.
        teacher: the teacher's logits, `(B, K)`.
        temperature: T, > 0; the factor T^2 keeps the size of the gradients.
    """
    ours = F.log_softmax(_wide(logits) / temperature, -1)
    theirs = F.log_softmax(teacher.to(ours.dtype) / temperature, -1)
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2


def distance_loss(outputs: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean squared difference from the teacher's outputs, scalar.

    Args:
        outputs: `(B, ...)`, of any kind.
        teacher: the teacher's outputs, of the same shape.
    """
    return F.mse_loss(_wide(outputs), teacher.to(_wide(outputs).dtype))


def token_loss(
    outputs: tuple[Tensor, Tensor], labels: Tensor | None, teacher: Tensor, alpha: float, smoothing: float
) -> Tensor:
    """Return DeiT's loss: the class head learns the labels, the distillation head the teacher's predicted class.

    Args:
        outputs: logits of the class head and of the distillation head, each `(B, K)`.
        labels: as in `labels_loss`; None if there are none; then both heads learn the teacher's predicted class.
        teacher: the teacher's logits, `(B, K)`.
        alpha: weight of the teacher, in `[0, 1]`.
        smoothing: as in `labels_loss`.
    """
    first, second = outputs
    if labels is None:
        return (hard_loss(first, teacher) + hard_loss(second, teacher)) / 2
    return (1 - alpha) * labels_loss(first, labels, smoothing) + alpha * hard_loss(second, teacher)


def _wide(logits: Tensor) -> Tensor:
    """Return half-precision logits as float32, because a cross-entropy in half precision loses small differences."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


class Objective:
    """The task loss of a run, and the teacher."""

    def __init__(self, settings: Distill, smoothing: float, teacher: nn.Module | None, labelled: bool) -> None:
        """Choose the sources of the loss: labels, teacher, or both.

        Args:
            settings: settings of distillation.
            smoothing: label smoothing.
            teacher: returns logits `(B, K)` in eval mode; None to learn only from labels.
            labelled: whether every picture has a label.

        Raises:
            RecipeError: there are neither labels nor a teacher.
        """
        self.kind = "none" if teacher is None else settings.kind
        self.teacher = None if self.kind == "none" else teacher
        if not labelled and self.teacher is None:
            raise RecipeError(
                "training without labels must have a teacher, but has none; give one and a train.distill.kind"
            )
        self.labelled = labelled
        self.alpha = settings.alpha if labelled else 1.0
        self.temperature = settings.temperature
        self.smoothing = smoothing
        self.values = False

    def judge(self, classes: int) -> None:
        """Choose the loss that fits a model with this many classes.

        Args:
            classes: number of outputs of the model, 0 for a model without a head.

        Raises:
            RecipeError: the outputs are not classes, but the loss uses labels or compares the outputs as classes.
        """
        self.values = gives_values(classes, self.labelled)
        if not self.values:
            return
        what = "without a head" if classes == 0 else "with one output and images without labels"
        if self.kind not in ("soft", "distance"):
            raise RecipeError(
                f"a model {what} must learn its teacher's outputs by their distance, but train.distill.kind is "
                f"'{self.kind}'; use 'distance'"
            )
        if self.alpha < 1:
            raise RecipeError(
                f"a model {what} must learn from a teacher alone, but the labels have a weight; set "
                "train.distill.alpha=1"
            )

    @property
    def token(self) -> bool:
        """Whether the student must return the outputs of both heads."""
        return self.kind == "token"

    @torch.no_grad()
    def ask(self, pictures: Tensor) -> Tensor | None:
        """Return the teacher's logits `(B, K)` for pictures `(B, C, h, w)`, or None if the teacher is not used."""
        if self.teacher is None or self.alpha == 0:
            return None
        logits: Tensor = self.teacher(fed(pictures, self.teacher))
        return logits

    def loss(self, outputs: Any, labels: Tensor, teacher: Tensor | None) -> Tensor:
        """Return the mean loss over a batch, scalar.

        Args:
            outputs: the student's logits `(B, K)`, or those of both heads for `token`.
            labels: int64 `(B,)` or distributions `(B, K)`; not used if the data has no labels.
            teacher: the result of `ask`.
        """
        if self.values and teacher is not None:
            return distance_loss(outputs, teacher)
        if self.token:
            if teacher is None:
                return labels_loss(outputs[0], labels, self.smoothing)
            return token_loss(outputs, labels if self.labelled else None, teacher, self.alpha, self.smoothing)
        if teacher is None:
            return labels_loss(as_classes(outputs), labels, self.smoothing)
        if self.kind == "distance":
            term = distance_loss(outputs, teacher)
        elif self.kind == "hard":
            term = hard_loss(as_classes(outputs), as_classes(teacher))
        else:
            term = soft_loss(as_classes(outputs), as_classes(teacher), self.temperature)
        if self.alpha == 1:
            return term
        return (1 - self.alpha) * labels_loss(as_classes(outputs), labels, self.smoothing) + self.alpha * term


def two_heads(model: nn.Module) -> Callable[[bool], None]:
    """Return a function that turns the outputs of both heads of a distilled timm model on or off.

    Raises:
        RecipeError: the model has no distillation token.
    """
    switch = getattr(model, "set_distilled_training", None)
    if not callable(switch):
        raise RecipeError(
            "distill.kind 'token' must have a model with a distillation token, but this one has none; "
            "use 'hard' or 'soft'"
        )

    def turn(on: bool) -> None:
        switch(on)

    return turn
