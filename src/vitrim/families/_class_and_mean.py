"""A Vision Transformer whose classifier reads the class token beside the mean of the patches.

B images, N tokens, D width, K classes.

DINOv2's linear classifiers do so (Oquab et al.: DINOv2, 2023), and so does ``Dinov2ForImageClassification``
of Hugging Face transformers. timm pools tokens in one way at a time.
"""

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

__all__ = ["ClassAndMeanVisionTransformer"]


class ClassAndMeanVisionTransformer(VisionTransformer):  # type: ignore[misc]
    """A timm ``VisionTransformer`` with a head of 2 D inputs.

    Differences: `pool` gives ``(B, 2 D)``, the class token and the mean of the patches, both after the final norm;
    `global_pool` is ``avg``, since the head needs patches.

    Args:
        num_classes: K; 0 for none, then the model gives ``(B, 2 D)``.
        global_pool: ``avg``, or empty for tokens ``(B, N, D)``.
        **others: further arguments of ``VisionTransformer``.
    """

    def __init__(self, *, num_classes: int = 1000, global_pool: str = "avg", **others: Any) -> None:
        assert others.get("class_token", True), "The head reads the class token."
        super().__init__(**{**others, "num_classes": 0, "global_pool": "avg", "fc_norm": False})
        self.head_hidden_size = 2 * self.embed_dim
        self.reset_classifier(num_classes, global_pool)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Give the model a new classifier of K classes, with random weights."""
        assert global_pool in (None, "", "avg"), "The head reads the class token and the mean of the patches."
        like = self.cls_token
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = global_pool
        head: nn.Module = nn.Identity()
        if num_classes:
            head = nn.Linear(2 * self.embed_dim, num_classes, device=like.device, dtype=like.dtype)
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        self.head = head.train(self.training)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Pool tokens ``(B, N, D)`` to ``(B, 2 D)``, or return them where nothing is pooled."""
        kind = self.global_pool if pool_type is None else pool_type
        pooled: Tensor = super().pool(x, kind)
        return torch.cat([x[:, 0], pooled], dim=1) if kind else pooled
