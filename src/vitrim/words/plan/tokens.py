"""The effect of a plan on the tokens of a model, computed in block order because each block depends on those before."""

from collections.abc import Sequence
from typing import Protocol

from vitrim.words.errors import PlanError
from vitrim.words.spec import (
    NO_WINDOWS,
    Block,
    Spec,
    Stage,
    why_not_any_size,
    why_not_blocks,
    why_not_only_prefix,
    why_not_placed,
)
from vitrim.words.steps import Step, flow_of, why_not_tokens

__all__ = ["Decision", "check_head", "check_stage", "why_not_pooled", "with_steps"]


class Decision(Protocol):
    """The part of a plan that concerns the tokens of one block."""

    @property
    def tokens(self) -> Step | None:
        """The token step that the block gets; None leaves it unchanged."""

    @property
    def only_prefix(self) -> bool:
        """Whether the block computes the prefix tokens only."""


def with_steps(blocks: tuple[Block, ...], decisions: Sequence[Decision], stage: Stage, at: str) -> tuple[Block, ...]:
    """Return the blocks of a child with their token steps.

    Args:
        blocks: the child's blocks with the token steps of the parent.
        decisions: the plan's decision for each block.
        stage: the stage of the parent.
        at: path of the blocks, for messages.

    Raises:
        PlanError: if a block cannot have the requested step; the message names the path.
    """
    if stage.window is not None:
        if any(decision.tokens or decision.only_prefix for decision in decisions):
            raise PlanError(f"{at}: {NO_WINDOWS}")
        return blocks
    here, following, made = stage.enters, None, []
    for index, (block, decision) in enumerate(zip(blocks, decisions, strict=True)):
        mine, decided = block.tokens, decision.tokens
        misplaced = why_not_only_prefix(block, index, stage)
        if misplaced is not None:
            raise PlanError(f"{at}.{index}.only_prefix: {misplaced}")
        step: Step | None
        if decided is not None:
            wrong = None if mine is None else decided.why_not_joining(mine)
            step = decided
        else:
            wrong = None
            step = following if mine is None else mine.inherited(here)
        wrong = wrong or why_not_tokens(step, here, stage.patches) or why_not_placed(step, stage)
        if wrong is not None:
            raise PlanError(f"{at}.{index}.tokens: {wrong}")
        step = None if step is None else step.simplified(stage.patches)
        if step is not None and block.only_prefix and step.after_attention:
            step = None  # it would act on patches, and this block outputs none
        made.append(block.model_copy(update={"tokens": step}))
        following = None if step is None else step.following()
        here = flow_of(step, here, stage.patches, block.only_prefix).leaves
    return tuple(made)


def check_stage(stage: Stage, spec: Spec, at: str) -> None:
    """Raise if a stage of a child could not run.

    Raises:
        PlanError: if so; the message names the path.
    """
    wrong = why_not_blocks(stage)
    if wrong is None and spec.host.arguments.get("dynamic_img_size"):
        wrong = why_not_any_size(stage)
    if wrong is not None:
        raise PlanError(f"{at}.{wrong[0]}: {wrong[1]}")


def check_head(stages: Sequence[Stage], spec: Spec) -> None:
    """Raise if a head that reads patches gets none, or if the model also drops patches at random in training.

    Raises:
        PlanError: if so.
    """
    if not any(block.tokens or block.only_prefix for stage in stages for block in stage.blocks):
        return
    if spec.host.arguments.get("patch_drop_rate"):
        raise PlanError(
            "tokens: patches must not be dropped at random in training if they are cut, but patch_drop_rate is "
            "above 0; build the model without it"
        )
    last = stages[-1]
    if not last.leaves.patches:
        only_prefix = last.blocks[-1].only_prefix
        wrong = why_not_pooled(str(spec.host.arguments.get("global_pool", "")), only_prefix)
        if wrong is not None:
            raise PlanError(f"{'only_prefix' if only_prefix else 'tokens'}: {wrong}")


def why_not_pooled(pool: str, only_prefix: bool) -> str | None:
    """Return why a head with pooling `pool` cannot run without patches; None if it can.

    Args:
        pool: timm's name of the pooling.
        only_prefix: whether the last block computes the prefix tokens only. Then the head must read only prefix tokens,
            so that its output does not change.
    """
    if only_prefix and pool != "token":
        return (
            "only_prefix is possible only if the head reads the prefix tokens alone, but it pools "
            f"'{pool}'; leave only_prefix out, or keep global_pool='token'"
        )
    if pool.startswith(("avg", "max")):
        return f"a head that pools patches ({pool}) must have at least one, but none is kept; keep a patch"
    return None
