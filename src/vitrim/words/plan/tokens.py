"""What a plan makes of the tokens of a model: block after block, for each depends on those before."""

from collections.abc import Sequence
from typing import Protocol

from vitrim.words.errors import PlanError
from vitrim.words.spec import NO_WINDOWS, Block, Conv, Spec, Stage, torn
from vitrim.words.steps import Drop, GridMerge, Step, Tokens, flow_of, lost

__all__ = ["Decision", "check_pooled", "check_whole", "with_steps"]


class Decision(Protocol):
    """What a plan decides on the tokens of one block."""

    @property
    def tokens(self) -> Step | None:
        """The step it is to have; None leaves it alone."""

    @property
    def only_prefix(self) -> bool:
        """Whether it is to leave the patches behind."""


def with_steps(blocks: tuple[Block, ...], decisions: Sequence[Decision], stage: Stage, at: str) -> tuple[Block, ...]:
    """The blocks of a child on the tokens that `decisions` leave them; `blocks` still have the steps of the parent."""
    if not any(decision.tokens or decision.only_prefix for decision in decisions):
        return blocks
    if stage.window is not None:
        raise PlanError(f"{at}: {NO_WINDOWS}")
    here, before, reached = stage.enters, None, []
    for index, (block, decision) in enumerate(zip(blocks, decisions, strict=True)):
        step, wrong = _step(decision.tokens, block.tokens, here, before)
        wrong = wrong or lost(step, here, stage.patches)
        if wrong is None and isinstance(step, Drop) and not step.kept and not stage.prefix:
            wrong = "a model without prefix tokens must keep a patch, but none is left"
        if wrong is not None:
            raise PlanError(f"{at}.{index}.tokens: {wrong}")
        if block.only_prefix and (index < len(blocks) - 1 or not stage.prefix):
            raise PlanError(
                f"{at}.{index}.only_prefix: patches can be left behind in the last block of a model with prefix tokens "
                f"alone, but this is block {index} of {len(blocks)} with {stage.prefix} prefix tokens"
            )
        step = None if isinstance(step, Drop) and len(step.kept) == stage.patches else step
        child = block.model_copy(update={"tokens": step})
        if child.unseen() is not None:
            raise PlanError(f"{at}.{index}.tokens: {child.unseen()}")
        reached.append(child)
        before = step
        here = flow_of(step, here, stage.patches, block.only_prefix).leaves
    return tuple(reached)


def _step(
    decided: Step | None, mine: Step | None, arriving: Tokens, before: Step | None
) -> tuple[Step | None, str | None]:
    """The step of a child's block, of what a plan decides and what the parent's block had; or why there is none.

    Patches that were dropped `before` stay away where nothing is decided.
    """
    if decided is None:
        if isinstance(mine, Drop) and arriving.places is not None:
            here = set(arriving.places)
            return mine.model_copy(update={"kept": tuple(place for place in mine.kept if place in here)}), None
        return (before if mine is None and isinstance(before, Drop) else mine), None
    if mine is None or decided == mine:
        return decided, None
    if isinstance(decided, Drop) and isinstance(mine, Drop):
        missing = set(decided.kept) - set(mine.kept)
        if not missing:
            return decided, None
        return None, f"patches that were dropped before must stay away, but {sorted(missing)[:8]} are kept here"
    return None, f"a block can have one token step, but it has '{mine.kind}' already and '{decided.kind}' is asked for"


def check_whole(blocks: Sequence[Block], stage: Stage, spec: Spec, at: str) -> None:
    """Refuse convolutions where patches are missing, or where the grid is not known beforehand."""
    here = stage.enters
    for index, block in enumerate(blocks):
        wrong = torn(block, here, stage)
        if isinstance(block.mixer, Conv) and block.mixer.kernel > 1 and spec.host.arguments.get("dynamic_img_size"):
            wrong = "a 3 x 3 convolution must know the grid, but dynamic_img_size is set; build the model without it"
        if wrong is not None:
            raise PlanError(f"{at}.{index}.mixer: {wrong}")
        if stage.window is None:
            here = flow_of(block.tokens, here, stage.patches, block.only_prefix).leaves


def check_pooled(stages: Sequence[Stage], spec: Spec) -> None:
    """Refuse to leave no patch to a head that reads patches (a mean of none is no number), and to drop twice."""
    pool, last = str(spec.host.arguments.get("global_pool", "")), stages[-1]
    if not any(block.tokens or block.only_prefix for stage in stages for block in stage.blocks):
        return
    if spec.host.arguments.get("patch_drop_rate"):
        raise PlanError(
            "tokens: patches must not be dropped at random in training where they are cut, but patch_drop_rate is "
            "above 0; build the model without it"
        )
    merges = any(isinstance(block.tokens, GridMerge) for stage in stages for block in stage.blocks)
    if merges and spec.host.arguments.get("dynamic_img_size"):
        raise PlanError(
            "tokens: the grid must stay where neighbours are merged, but dynamic_img_size is on; build the model "
            "without it, and change the size with set_input_size"
        )
    if last.leaves.patches:
        return
    if last.blocks[-1].only_prefix and pool != "token":
        raise PlanError(
            "only_prefix: patches can be left behind only where the head reads the prefix tokens, but it pools "
            f"'{pool}'; leave it out"
        )
    if pool.startswith(("avg", "max")):
        raise PlanError(f"tokens: a head that pools patches ({pool}) must be left one at least, but none is kept")
