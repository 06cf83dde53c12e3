"""What a plan makes of the tokens of a model: block after block, for each depends on those before."""

from collections.abc import Sequence
from typing import Protocol

from vitrim.words.errors import PlanError
from vitrim.words.spec import NO_WINDOWS, Block, Spec, Stage, why_not_any_size, why_not_blocks, why_not_only_prefix
from vitrim.words.steps import Step, flow_of, why_not_tokens

__all__ = ["Decision", "check_head", "check_stage", "why_not_pooled", "with_steps"]


class Decision(Protocol):
    """What a plan decides on the tokens of one block."""

    @property
    def tokens(self) -> Step | None:
        """The step it is to have; None leaves it alone."""

    @property
    def only_prefix(self) -> bool:
        """Whether it is to compute the prefix tokens alone."""


def with_steps(blocks: tuple[Block, ...], decisions: Sequence[Decision], stage: Stage, at: str) -> tuple[Block, ...]:
    """The blocks of a child on the tokens that `decisions` leave them; `blocks` still have the steps of the parent.

    Raises:
        PlanError: naming the path, if a step cannot be put where it is asked for.
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
        wrong = wrong or why_not_tokens(step, here, stage.patches)
        if wrong is not None:
            raise PlanError(f"{at}.{index}.tokens: {wrong}")
        step = None if step is None else step.simplified(stage.patches)
        if step is not None and block.only_prefix and step.after_attention:
            step = None  # it would act on patches, and none of them leaves this block
        made.append(block.model_copy(update={"tokens": step}))
        following = None if step is None else step.following()
        here = flow_of(step, here, stage.patches, block.only_prefix).leaves
    return tuple(made)


def check_stage(stage: Stage, spec: Spec, at: str) -> None:
    """Refuse a stage of a child that could not run.

    Raises:
        PlanError: naming the path.
    """
    wrong = why_not_blocks(stage)
    if wrong is None and spec.host.arguments.get("dynamic_img_size"):
        wrong = why_not_any_size(stage)
    if wrong is not None:
        raise PlanError(f"{at}.{wrong[0]}: {wrong[1]}")


def check_head(stages: Sequence[Stage], spec: Spec) -> None:
    """Refuse to leave no patch to a head that reads patches (a mean of none is no number), and to drop twice.

    Raises:
        PlanError: in a sentence.
    """
    if not any(block.tokens or block.only_prefix for stage in stages for block in stage.blocks):
        return
    if spec.host.arguments.get("patch_drop_rate"):
        raise PlanError(
            "tokens: patches must not be dropped at random in training where they are cut, but patch_drop_rate is "
            "above 0; build the model without it"
        )
    last = stages[-1]
    if not last.leaves.patches:
        only_prefix = last.blocks[-1].only_prefix
        wrong = why_not_pooled(str(spec.host.arguments.get("global_pool", "")), only_prefix)
        if wrong is not None:
            raise PlanError(f"{'only_prefix' if only_prefix else 'tokens'}: {wrong}")


def why_not_pooled(pool: str, only_prefix: bool) -> str | None:
    """Why a head that pools by `pool` cannot follow a last block that leaves it no patch; None if it can.

    Args:
        pool: timm's name.
        only_prefix: whether that block computes the prefix tokens alone, so that only a head that reads nothing else
            gives the same output.
    """
    if only_prefix and pool != "token":
        return (
            "patches can be left behind only where the head reads the prefix tokens, but it pools "
            f"'{pool}'; leave only_prefix out, or keep global_pool='token'"
        )
    if pool.startswith(("avg", "max")):
        return f"a head that pools patches ({pool}) must be left one at least, but none is kept; keep a patch"
    return None
