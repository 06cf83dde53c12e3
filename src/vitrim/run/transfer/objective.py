"""The loss of segmentation.

B images, K classes, (h, w) height and width.
"""

from typing import Any

from torch import Tensor, nn

from vitrim.data import IGNORE
from vitrim.train import Distill, Objective
from vitrim.words.errors import RecipeError

__all__ = ["PixelObjective"]


class PixelObjective(Objective):
    """Cross-entropy of every pixel, from segmentation_models_pytorch.

    Ignored pixels count as zeros in the mean, as in mmsegmentation's default. So the loss of a batch is the mean of the
    losses of its parts, and a crop that contains only ignored pixels has loss 0.
    """

    def __init__(self, settings: Distill, smoothing: float, teacher: nn.Module | None, labelled: bool) -> None:
        """Build the loss; see `Objective`. A teacher is not supported.

        Raises:
            RecipeError: if a teacher is given, or the package that has the loss is missing.
        """
        if teacher is not None:
            raise RecipeError("segmentation must be learned from masks alone, but a teacher is given; leave it out")
        super().__init__(settings, smoothing, None, labelled)
        try:
            from segmentation_models_pytorch.losses import SoftCrossEntropyLoss
        except ImportError:
            raise RecipeError(
                "segmentation_models_pytorch must be installed for segmentation, but is not; "
                "run pip install 'vitrim[seg]'"
            ) from None
        self._loss: nn.Module = SoftCrossEntropyLoss(smooth_factor=smoothing, ignore_index=IGNORE)

    def loss(self, outputs: Any, labels: Tensor, teacher: Tensor | None) -> Tensor:
        """Return the mean loss over all pixels of a batch, scalar.

        Args:
            outputs: logits `(B, K, h, w)`.
            labels: int64 `(B, h, w)`, `IGNORE` for none.
            teacher: None.
        """
        value: Tensor = self._loss(outputs.float() if outputs.dtype.itemsize < 4 else outputs, labels)
        return value
