"""Keep the patches that receive the most attention, separately in each image (MDC)."""

from typing import ClassVar, Literal, Self

from pydantic import NonNegativeFloat, model_validator

from vitrim.words.sizes import Size
from vitrim.words.steps._base import Flow, StepBase, Tokens

__all__ = ["TopK"]


class TopK(StepBase):
    """A block keeps the tokens that receive the most attention in each image, and the mean of the others.

    The tokens are chosen between attention and MLP, so all arriving tokens take part in attention. `kept` tokens stay,
    in their order; this number includes the prefix tokens, which always stay. With `fused`, one more token follows, the
    mean of the tokens that were left out. The number of tokens is the same for all images. If at most `kept` tokens
    arrive, the step does nothing.

    `by`: ``cls_attn`` ranks tokens by the attention they receive from the first token, averaged over heads; without
    prefix tokens, by the attention they receive on average. ``hsic_attn`` multiplies that by `weights`, one for each
    arriving patch.

    Source: Hou and Kung, CVPR Workshops 2022 (MDC); the fused token is a plain mean as in its published code.
    """

    needs_attention: ClassVar[bool] = True
    after_attention: ClassVar[bool] = True

    kind: Literal["top_k"] = "top_k"
    kept: Size
    fused: bool = True
    by: Literal["cls_attn", "hsic_attn"] = "cls_attn"
    weights: tuple[NonNegativeFloat, ...] = ()

    @model_validator(mode="after")
    def _weights(self) -> Self:
        if bool(self.weights) != (self.by == "hsic_attn"):
            raise ValueError(f"weights must be given for hsic_attn only, but by is {self.by} with {len(self.weights)}")
        return self

    @classmethod
    def example(cls, arriving: Tokens) -> Self | None:
        """See `StepBase.example`."""
        return cls(kept=arriving.prefix + arriving.patches // 2) if arriving.patches > 1 else None

    def why_not(self, arriving: Tokens, patches: int) -> str | None:
        """See `StepBase.why_not`."""
        if self.kept <= arriving.prefix:
            return f"a patch must be kept besides {arriving.prefix} prefix tokens, but {self.kept} tokens are kept"
        if self.weights and len(self.weights) != arriving.patches:
            return f"weights must be given for each of {arriving.patches} patches, but are for {len(self.weights)}"
        if arriving.constant_sizes or arriving.stands_for is not None:
            return "tokens must be chosen before others are merged, but here they represent several patches"
        return None

    def why_not_any_size(self) -> str | None:
        """See `StepBase.why_not_any_size`."""
        if not self.weights:
            return None
        return (
            "weights of patches must be for one grid, but dynamic_img_size is on; build the model without it, or "
            "use cls_attn"
        )

    def why_not_resized(self) -> str | None:
        """See `StepBase.why_not_resized`."""
        if not self.weights:
            return None
        return (
            f"tokens are chosen by weights of {len(self.weights)} patches; set the input size on the dense model, and "
            "cut tokens after"
        )

    def flow(self, arriving: Tokens, patches: int) -> Flow:
        """See `StepBase.flow`."""
        here = arriving.total
        if here <= self.kept:
            return Flow.same(arriving)
        left = self.kept + self.fused
        leaves = arriving._replace(patches=left - arriving.prefix, grid=None, places=None)
        return Flow(here, here, here, left, arriving, leaves)

    def own_cost(self, arriving: Tokens, width: int, qk: int) -> tuple[int, int]:
        """See `StepBase.own_cost`: without prefix tokens, the logits of all pairs are computed once more.

        With prefix tokens, one row of logits is an elementwise product, which is not counted: 0.003 % of DeiT-S.
        """
        return (0 if arriving.prefix or arriving.total <= self.kept else arriving.total**2 * qk), 0
